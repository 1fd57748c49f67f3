"""Prompting as the baseline of tuning: examples of the training split shown.

`few:4` shows the same four, drawn by the seed, before every question; `rag:4`
shows the four whose prompts are nearest to the question by BM25 (Robertson and
Zaragoza 2009, through `bm25s`), the nearest last. Both take them from the
training split only.
"""

import dataclasses
import logging
from typing import Any
from typing import Sequence

import numpy as np

from gemma_sft import chat
from gemma_sft import errors

KINDS = ('zero', 'few', 'rag')

# A conversation that ends with the model's answer, or plain text.
Conversation = Sequence[chat.Message] | str


@dataclasses.dataclass(frozen=True)
class Baseline:
  """A way of prompting: `kind` of `KINDS`, and how many examples."""

  kind: str
  n: int

  def __str__(self) -> str:
    return self.kind if self.kind == 'zero' else f'{self.kind}:{self.n}'


def parse(text: str) -> Baseline:
  """Returns the baseline that 'zero', 'few:4' or 'rag:4' names.

  Raises:
    UserError: for anything else.
  """
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
  """Puts examples of the training split before a question."""

  def __init__(
      self, baseline: Baseline, training: Sequence[Conversation], seed: int):
    """Draws or indexes the examples.

    Args:
      baseline: What to show.
      training: The training split's conversations.
      seed: Of the draw for `few`.

    Raises:
      UserError: if there are fewer examples than are to be shown.
    """
    if baseline.n > len(training):
      raise errors.UserError(
          f'{baseline}, with {len(training)} training examples',
          'at most as many as there are', 'ask for fewer')
    self._baseline = baseline
    self._training = training
    self._drawn: list[int] = []
    self._retriever: Any = None
    if baseline.kind == 'few':
      order = np.random.default_rng([seed, _FEW_SHOT]).permutation(
          len(training))
      self._drawn = [int(i) for i in order[:baseline.n]]
    elif baseline.kind == 'rag':
      import bm25s

      # Else it tells each step of its work to the root logger.
      logging.getLogger('bm25s').setLevel(logging.WARNING)
      self._retriever = bm25s.BM25()
      self._retriever.index(
          [words(question(c)) for c in training], show_progress=False)

  def places(self, conversation: Conversation) -> list[int]:
    """Returns which training examples are shown before a question, in order.

    Args:
      conversation: Its last answer, if it has one, is not looked at.
    """
    if self._baseline.kind != 'rag':
      return self._drawn
    asked = words(question(conversation))
    scores = self._retriever.get_scores(asked) if asked else np.zeros(
        len(self._training))
    # A stable sort: equals in the order of the file, on every machine.
    best = np.argsort(-scores, kind='stable')[:self._baseline.n]
    return [int(i) for i in best[::-1]]

  def choose(self, conversation: Conversation) -> list[Conversation]:
    """Returns the training examples to show before a question, in order."""
    return [self._training[i] for i in self.places(conversation)]


def before(
    examples: Sequence[Sequence[chat.Message]],
    conversation: Sequence[chat.Message],
) -> list[chat.Message]:
  """Returns a conversation with examples as turns before it.

  Args:
    examples: Their system texts are left out.
    conversation: Its system text, if any, stays first.

  Raises:
    UserError: if an example is plain text, which is no turn.
  """
  if any(isinstance(example, str) for example in examples):
    raise errors.UserError(
        'training examples that are plain text', 'conversations, to be shown'
        ' before a question', 'leave --baseline out')
  system = [m for m in conversation[:1] if m.role == 'system']
  turns = [m for example in examples for m in example if m.role != 'system']
  return [*system, *turns, *conversation[len(system):]]


# What stands before a question in a transcript.
NEXT = 'Prompt:\n'


def transcript(
    examples: Sequence[Conversation], conversation: Conversation) -> str:
  """Returns a question after examples as plain text, to be continued.

  A pretrained model has never seen the tags of turns: it neither takes a turn
  for one nor ends its own. Prompted in its own element it does far better, and
  a baseline that does not is no baseline.

  Args:
    examples: With their answers.
    conversation: Its last answer, if it has one, is left out.
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
  """Returns what stands before the transcript's next question, and whether
  there is one."""
  answer, found, _ = f'\n{text}'.partition(f'\n{NEXT}')
  return answer[1:].rstrip() if found else text, bool(found)


# A purpose of its own for the draw, see DESIGN: randomness is a function of
# (seed, purpose, ...).
_FEW_SHOT = 0x6665_7773


def question(conversation: Conversation) -> str:
  """Returns what is asked: all but the last answer, or a text's first line."""
  if isinstance(conversation, str):
    return conversation.partition('\n')[0]
  turns = [m for m in conversation if m.role != 'system']
  if turns[-1].role == 'model':
    turns = turns[:-1]
  return '\n'.join(m.content for m in turns)


def words(text: str) -> list[str]:
  """Returns the words of a text as BM25 counts them, in lower case.

  Letters with their marks and digits; Han characters singly and in pairs, as
  Chinese is written without spaces.
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
