"""Checks the rendered data before the first step.

Some mistakes ruin a fine-tuning run without an error: an end of turn that is
never trained, a doubled BOS, a mask that covers nothing or everything, a test
prompt in the training split. Each stops the run here, and the row is named.
"""

import collections
import dataclasses
from typing import Mapping
from typing import Sequence
import unicodedata

import numpy as np

from gemma_sft import chat
from gemma_sft import errors


@dataclasses.dataclass(frozen=True)
class Report:
  """The audit's counts over one split."""

  split: str
  n_examples: int
  n_tokens: int
  n_trained: int
  n_cut: int
  n_duplicates: int
  n_control_text: int
  longest: int

  def __str__(self) -> str:
    share = self.n_trained / max(1, self.n_tokens)
    text = (f'{self.split}: {self.n_examples} examples, {self.n_tokens} tokens,'
            f' {self.n_trained} trained ({share:.0%}), longest {self.longest}')
    if self.n_cut:
      text += f', {self.n_cut} CUT at the limit'
    if self.n_duplicates:
      text += f', {self.n_duplicates} duplicates'
    if self.n_control_text:
      text += (f', {self.n_control_text} with control-token text (kept as'
               ' ordinary text)')
    return text


def check_split(
    split: str, examples: Sequence[chat.Example], tokenizer: chat.Tokenizer, *,
    max_length: int, max_cut_share: float, n_control_text: int = 0
) -> tuple[list[chat.Example], Report]:
  """Returns the examples, cut to `max_length` where allowed, and the counts.

  `max_length` is the longest input in tokens: an example may have one more,
  because its last token is only a target. A `max_cut_share` of the examples may
  be longer and is cut.

  Raises:
    UserError: naming the offending row.
  """
  if not examples:
    raise errors.UserError(
        f'the {split} split has no examples', 'at least one',
        f'look at config.data.{split}')
  too_long = [e for e in examples if len(e.tokens) - 1 > max_length]
  if len(too_long) > max_cut_share * len(examples):
    worst = max(too_long, key=lambda e: len(e.tokens))
    raise errors.UserError(
        f'{worst.where}: {len(worst.tokens) - 1} tokens; {len(too_long)} of'
        f' {len(examples)} examples of {split} are longer than the limit',
        f'at most {max_length} tokens (config.data.max_length)',
        f'--config.data.max_length={len(worst.tokens) - 1}, or shorten or split'
        ' the row, or allow cutting with --config.data.max_cut_share='
        f'{len(too_long) / len(examples) + 0.005:.2f}')
  cut = [_cut(e, max_length + 1, tokenizer) for e in examples]
  ends = set(tokenizer.stop_ids)
  for example, uncut in zip(cut, examples):
    _check_example(example, uncut, tokenizer, ends)
  keys = collections.Counter(
      e.tokens.tobytes() + e.loss_mask.tobytes() for e in cut)
  return cut, Report(
      split=split,
      n_examples=len(cut),
      n_tokens=sum(len(e.tokens) for e in cut),
      n_trained=int(sum(e.loss_mask.sum() for e in cut)),
      n_cut=len(too_long),
      n_duplicates=len(cut) - len(keys),
      n_control_text=n_control_text,
      longest=max(len(e.tokens) for e in examples))


def _cut(example, n, tokenizer):
  """Returns an example's first n tokens, its target text counted again."""
  if len(example.tokens) <= n:
    return example
  tokens, mask = example.tokens[:n], example.loss_mask[:n]
  text = tokenizer.decode(tokens[mask])
  return dataclasses.replace(
      example, tokens=tokens, loss_mask=mask,
      target_bytes=len(text.encode()), target_characters=len(text))


def _check_example(example, uncut, tokenizer, ends):
  tokens, mask = example.tokens, example.loss_mask
  n_bos = int((tokens == tokenizer.bos_id).sum())
  if n_bos != 1 or tokens[0] != tokenizer.bos_id:
    raise errors.UserError(
        f'{example.where}: {n_bos} BOS tokens, the first token is'
        f' {tokenizer.piece(tokens[0])!r}', 'exactly one BOS, at the start',
        'render with gemma_sft.chat only, and do not write <bos> into the data')
  if not mask.any():
    raise errors.UserError(
        f'{example.where}: no token is trained',
        'an answer within the limit of tokens',
        'the prompt alone fills config.data.max_length; raise it or shorten'
        ' the prompt')
  if mask.all():
    raise errors.UserError(
        f'{example.where}: every token is trained, BOS included',
        'a prompt whose tokens are not trained',
        'render with gemma_sft.chat only')
  last = int(np.flatnonzero(mask)[-1])
  is_cut = len(example.tokens) < len(uncut.tokens)
  if not is_cut and int(tokens[last]) not in ends:
    raise errors.UserError(
        f'{example.where}: the last trained token is'
        f' {tokenizer.piece(tokens[last])!r}',
        'the end of turn (or EOS), or the tuned model will not stop',
        'render with gemma_sft.chat only')


def normalise(text: str) -> str:
  """Returns text with case, punctuation, width and spacing made uniform.

  Letters, marks (the vowels of Indic scripts) and numbers stay. A text that has
  none of them, such as emoji, keeps all its characters.
  """
  text = unicodedata.normalize('NFKC', text).casefold()
  kept = ''.join(
      c if unicodedata.category(c)[0] in 'LMN' else ' ' for c in text)
  return ' '.join(kept.split()) or ' '.join(text.split())


def check_leakage(prompts: Mapping[str, Sequence[tuple[str, str]]]) -> None:
  """Raises a `UserError` if two splits have a prompt in common.

  `prompts` are {split: (prompt, where) of each example}. Prompts are compared
  after `normalise`; plain text is compared as a whole.
  """
  seen: dict[str, tuple[str, str]] = {}
  for split, rows in prompts.items():
    leaks = [(where, *seen[normalise(p)]) for p, where in rows
             if normalise(p) in seen]
    if leaks:
      where, other_where, other = leaks[0]
      raise errors.UserError(
          f'{where} has the prompt of {other_where}; {len(leaks)} of'
          f' {len(rows)} prompts of {split} are in {other} already',
          'splits without a common prompt (case, punctuation and spacing'
          ' aside)',
          'keep all rows of one prompt in one split')
    seen |= {normalise(p): (where, split) for p, where in rows}
