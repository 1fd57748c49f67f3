"""Shows, token by token, what a config would train on; loads no weights.

    python -m gemma_sft.preview --config=configs/blop.py

Trained tokens are green, or in «guillemets» without colours; the rest is dim.
"""

from gemma_sft import cli

if __name__ == '__main__':
  cli.run(
      'gemma_sft.preview', cli.CONFIG, cli.split('train'),
      cli.integer('examples', 3, 'Number of examples to show.'),
      cli.switch(
          'color', None, 'Colours; the default is whether this is a terminal.'))

import sys
from typing import Any
from typing import Sequence

from gemma_sft import chat
from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft import tasks
from gemma_sft.inputs import splits
from gemma_sft.run import base

_GREEN, _DIM, _PLAIN = '\033[32m', '\033[2m', '\033[0m'
_BAR_WIDTH = 40


def main(
    config: Any, split: str, examples: int, color: bool | None) -> int:
  """Prints the preview; see the module's docstring."""
  cli.require('config', config, '--config=configs/blop.py')
  config_lib.validate(config)
  if split not in ('train', 'validation', 'test') or not config.data[split]:
    raise errors.UserError(
        f'--split={split}', 'a split that the config names',
        'one of train, validation, test')
  if examples < 0:
    raise errors.UserError(
        f'--examples={examples}', '0 or more', 'leave it out for three')
  color = sys.stdout.isatty() if color is None else color
  resolved = base.resolve_weights(config.model)
  tokenizer = base.load_tokenizer(
      config.model, resolved, base.load_model(config.model).generation)
  task = tasks.load(config.task)
  part = splits.load_splits(config.data, (split,), task, tokenizer)[split]
  print(f'audit: {part.report}\n')
  for example in part.examples[:examples]:
    n = int(example.loss_mask.sum())
    print(f'{example.where}: {len(example.tokens)} tokens, {n} trained')
    print(colored(example, tokenizer, color) + '\n')
  print(histogram([len(e.tokens) for e in part.examples]))
  print(fertility(part.examples, tokenizer))
  return 0


def colored(
    example: chat.Example, tokenizer: chat.Tokenizer, color: bool) -> str:
  """Returns the example's text with its trained tokens marked."""
  pieces, was_trained = [], None
  for token, trained in zip(example.tokens, example.loss_mask):
    if trained != was_trained:
      if color:
        pieces.append(_PLAIN + (_GREEN if trained else _DIM))
      elif was_trained is not None or trained:
        pieces.append('«' if trained else '»')
    was_trained = trained
    pieces.append(tokenizer.piece(token))
  pieces.append(_PLAIN if color else ('»' if was_trained else ''))
  return ''.join(pieces)


def histogram(lengths: Sequence[int], n_bins: int = 10) -> str:
  """Returns a bar chart of the lengths, with quantiles, as text."""
  low, high = min(lengths), max(lengths)
  width = max(1, -(-(high - low + 1) // n_bins))
  counts = [0] * n_bins
  for length in lengths:
    counts[(length - low) // width] += 1
  ordered = sorted(lengths)
  lines = ['tokens per example: median '
           f'{ordered[len(ordered) // 2]}, 95 % at most'
           f' {ordered[int(0.95 * (len(ordered) - 1))]}, longest {high}']
  for i, count in enumerate(counts):
    if low + i * width > high:
      break
    bar = '█' * round(_BAR_WIDTH * count / max(counts))
    lines.append(f'  {low + i * width:6d} to {low + (i + 1) * width - 1:6d}'
                 f' {count:6d} {bar}')
  return '\n'.join(lines)


def fertility(
    examples: Sequence[chat.Example], tokenizer: chat.Tokenizer) -> str:
  """Returns the number of tokens per character and per word, as text.

  More than about 0.5 tokens per character mean that the tokenizer does not know
  the script or the notation.
  """
  tokens = characters = words = 0
  for example in examples:
    text = tokenizer.decode(example.tokens[example.loss_mask])
    tokens += int(example.loss_mask.sum())
    characters += len(text)
    words += len(text.split())
  return (f'fertility of the trained text: {tokens / max(1, characters):.2f}'
          f' tokens per character, {tokens / max(1, words):.2f} per word')
