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

import collections
import itertools
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
  splits.check_named(config.data, split)
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
  parts = []
  for trained, run in itertools.groupby(
      zip(example.loss_mask, example.tokens), key=lambda pair: pair[0]):
    text = ''.join(tokenizer.piece(token) for _, token in run)
    if color:
      text = f'{_GREEN if trained else _DIM}{text}{_PLAIN}'
    parts.append(f'«{text}»' if trained and not color else text)
  return ''.join(parts)


def histogram(lengths: Sequence[int], n_bins: int = 10) -> str:
  """Returns a bar chart of the lengths, with quantiles, as text."""
  low, high = min(lengths), max(lengths)
  width = max(1, -(-(high - low + 1) // n_bins))
  counts = collections.Counter((n - low) // width for n in lengths)
  ordered = sorted(lengths)
  lines = ['tokens per example: median '
           f'{ordered[len(ordered) // 2]}, 95 % at most'
           f' {ordered[int(0.95 * (len(ordered) - 1))]}, longest {high}']
  for start in range(low, high + 1, width):
    count = counts[(start - low) // width]
    bar = '█' * round(_BAR_WIDTH * count / max(counts.values()))
    lines.append(f'  {start:6d} to {start + width - 1:6d} {count:6d} {bar}')
  return '\n'.join(lines)


def fertility(
    examples: Sequence[chat.Example], tokenizer: chat.Tokenizer) -> str:
  """Returns the number of tokens per character and per word, as text.

  More than about 0.5 tokens per character mean that the tokenizer does not know
  the script or the notation.
  """
  texts = [tokenizer.decode(e.tokens[e.loss_mask]) for e in examples]
  tokens = sum(int(e.loss_mask.sum()) for e in examples)
  characters = max(1, sum(map(len, texts)))
  words = max(1, sum(len(text.split()) for text in texts))
  return (f'fertility of the trained text: {tokens / characters:.2f} tokens per'
          f' character, {tokens / words:.2f} per word')
