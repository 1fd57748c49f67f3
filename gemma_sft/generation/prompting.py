"""Prompting as a baseline for tuning: training examples before a question.

`few:4` puts the same four examples, drawn by the seed, before every question.
`rag:4` puts those four whose prompts are nearest to the question by BM25
(Robertson and Zaragoza 2009, through `bm25s`), the nearest last.
"""

import dataclasses
import logging
from typing import Any
from typing import Sequence

import numpy as np

from gemma_sft import chat
from gemma_sft import errors

KINDS = ('zero', 'few', 'rag')
# Begins a question in a transcript.
NEXT = 'Prompt:\n'
# The purpose of the random draw: randomness is a function of (seed, purpose).
_FEW_SHOT = 0x6665_7773

# A conversation that ends with the model's answer, or plain text.
Conversation = Sequence[chat.Message] | str


@dataclasses.dataclass(frozen=True)
class Baseline:
  """A way of prompting: one of `KINDS`, and the number of examples."""

  kind: str
  n: int

  def __str__(self) -> str:
    return self.kind if self.kind == 'zero' else f'{self.kind}:{self.n}'


def parse(text: str) -> Baseline:
  """Returns what 'zero', 'few:4' or 'rag:4' names, or raises a `UserError`."""
  kind, colon, n = text.strip().partition(':')
  if kind == 'zero' and not colon:
    return Baseline('zero', 0)
  if kind in ('few', 'rag') and n.isascii() and n.isdigit() and int(n) > 0:
    return Baseline(kind, int(n))
  raise errors.UserError(
      f'the way of prompting {text!r}',
      'zero, few:N or rag:N, N examples of the training split',
      f'{errors.nearest(kind, KINDS)}For example few:4.')


class Prompter:
  """Chooses the training examples that stand before a question."""

  def __init__(
      self, baseline: Baseline, training: Sequence[Conversation], seed: int):
    """Draws the examples, or indexes them; raises `UserError` for too few."""
    if baseline.n > len(training):
      raise errors.UserError(
          f'{baseline}, with {len(training)} training examples',
          'at most as many as the training split has', 'ask for fewer')
    self._baseline = baseline
    self._training = training
    order = np.random.default_rng([seed, _FEW_SHOT]).permutation(len(training))
    self._drawn = order[:baseline.n].tolist()
    if baseline.kind == 'rag':
      import bm25s

      # By default it logs each step of its work.
      logging.getLogger('bm25s').setLevel(logging.WARNING)
      self._retriever: Any = bm25s.BM25()
      self._retriever.index(
          [words(question(c)) for c in training], show_progress=False)

  def indices(self, conversation: Conversation) -> list[int]:
    """Returns the indices of the examples for a conversation's question."""
    if self._baseline.kind != 'rag':
      return self._drawn
    asked = words(question(conversation))
    scores = self._retriever.get_scores(asked) if asked else np.zeros(
        len(self._training))
    # A stable sort: ties are in the order of the file on every machine.
    best = np.argsort(-scores, kind='stable')[:self._baseline.n]
    return best[::-1].tolist()

  def choose(self, conversation: Conversation) -> list[Conversation]:
    """Returns the training examples to show before a question, in order."""
    return [self._training[i] for i in self.indices(conversation)]


def render(
    tokenizer: chat.Tokenizer, examples: Sequence[Conversation],
    conversation: Conversation, *, as_text: bool = False) -> list[int]:
  """Returns the tokens of a prompt: the examples, then the question.

  A conversation ends with the user's turn. `as_text` renders a `transcript`
  without the tags of turns, as is always done for plain text.
  """
  if as_text or isinstance(conversation, str):
    return [tokenizer.bos_id,
            *tokenizer.encode(transcript(examples, conversation))]
  return chat.render_prompt(before(examples, conversation), tokenizer)


def before(
    examples: Sequence[Conversation], conversation: Sequence[chat.Message]
) -> list[chat.Message]:
  """Returns a conversation with examples as turns before it.

  The system text of the conversation stays first; those of the examples are
  dropped. Raises `UserError` for an example that is plain text.
  """
  if any(isinstance(example, str) for example in examples):
    raise errors.UserError(
        'training examples that are plain text',
        'conversations, which can stand before a question',
        'leave --baseline out')
  system = [m for m in conversation[:1] if m.role == 'system']
  turns = [m for example in examples for m in example if m.role != 'system']
  return [*system, *turns, *conversation[len(system):]]


def transcript(
    examples: Sequence[Conversation], conversation: Conversation) -> str:
  """Returns examples and a question as plain text for the model to continue.

  A pretrained model has never seen the tags that separate turns: it neither
  recognises a turn nor ends its own. It answers far better in plain text, so
  that is the baseline to beat. A last answer of the conversation is left out.
  """
  if isinstance(conversation, str):
    return ''.join(f'{example}\n\n' for example in examples) + (
        question(conversation) + '\n')
  if conversation[-1].role == 'model':
    conversation = conversation[:-1]
  turns = [m for example in examples for m in (
      [chat.Message('model', example)] if isinstance(example, str)
      else example)]
  heads = {'system': '', 'user': NEXT, 'model': 'Answer:\n'}
  return ''.join(
      f'{heads[m.role]}{m.content.strip()}\n\n'
      for m in [*turns, *conversation]) + heads['model']


def first_answer(text: str) -> tuple[str, bool]:
  """Returns the text up to the next question, and whether there is one."""
  answer, found, _ = f'\n{text}'.partition(f'\n{NEXT}')
  return answer[1:].rstrip() if found else text, bool(found)


def question(conversation: Conversation) -> str:
  """Returns all turns but the last answer, or the first line of plain text."""
  if isinstance(conversation, str):
    return conversation.partition('\n')[0]
  turns = [m for m in conversation if m.role != 'system']
  if turns[-1].role == 'model':
    turns = turns[:-1]
  return '\n'.join(m.content for m in turns)


def words(text: str) -> list[str]:
  """Returns the words of a text for BM25, in lower case.

  A word is a run of letters, marks and digits. Chinese is written without
  spaces: there, each Han character and each pair of neighbours is a word.
  """
  import regex

  found = []
  for run in regex.findall(
      r'\p{Han}+|(?:(?!\p{Han})[\p{L}\p{M}\p{N}])+', text.lower()):
    if regex.match(r'\p{Han}', run):
      found += [*run, *(run[i:i + 2] for i in range(len(run) - 1))]
    else:
      found.append(run)
  return found
