"""Compares a runtime's outputs with the JAX model's: prompts and limits."""

from collections.abc import Sequence
import dataclasses

import numpy as np
from scipy import special

from gemma_sft import chat

# Largest Kullback-Leibler divergence from the JAX model in nats, see `compare`.
# An f32 file is the same model up to rounding: llama.cpp looks GELU up in a
# float16 table and stays below 3e-6 on Gemma 3 270M. f16 and bf16 round every
# weight once. The limits of q8_0 and q4_k_m are what users expect of these
# formats; q6_k and q5_k_m lie between them, and q4_0 has no more bits than
# q4_k_m.
LIMITS = {
    'f32': 1e-5, 'f16': 1e-3, 'bf16': 1e-3, 'q8_0': 0.02, 'q6_k': 0.025,
    'q5_k_m': 0.03, 'q4_k_m': 0.05, 'q4_0': 0.05}
# llama-server sums probabilities in float32, whose smallest number is e^-103.
# Probabilities below e^-80 do not matter and are compared as e^-80.
_FLOOR = -80.0
# Tokens by which the longest prompt exceeds the sliding window.
_BEYOND_WINDOW = 32

_TEXTS = (
    'The mill stood at the foot of the hill, where the stream was widest, and'
    ' every morning the miller walked down to see how high the water was.',
    'def median(values):\n  """Returns the middle one of sorted values."""\n'
    '  values = sorted(values)\n  middle = len(values) // 2\n  if len(values)',
    # Hindi: "The capital of India is New Delhi, and its largest city is".
    '\u092d\u093e\u0930\u0924 \u0915\u0940 \u0930\u093e\u091c\u0927\u093e\u0928'
    '\u0940 \u0928\u0908 \u0926\u093f\u0932\u094d\u0932\u0940 \u0939\u0948'
    ' \u0914\u0930 \u0907\u0938\u0915\u093e \u0938\u092c\u0938\u0947'
    ' \u092c\u0921\u093c\u093e \u0936\u0939\u0930',
    # Chinese: "In spring the trees by the river turned green, the children".
    '\u6625\u5929\uff0c\u6cb3\u8fb9\u7684\u6811\u7eff\u4e86\uff0c'
    '\u5b69\u5b50\u4eec',
)
_QUESTION = 'Name three things that float on water, one a line.'
_LONG = (
    'The {number}th traveller brought {count} apples, {place} the river, and'
    ' said that the road had been long.\n')
_PLACES = ('over', 'along', 'across', 'beside', 'against')


@dataclasses.dataclass(frozen=True)
class Divergence:
  """How far a runtime is from the JAX model; divergences are in nats."""

  kind: str  # A key of `LIMITS`.
  # Of two log-probabilities, which are the logits up to a constant for each
  # position.
  max_logit_difference: float
  kl_mean: float  # Over all compared positions.
  kl_max: float  # At one position.
  n_positions: int
  greedy_equal: int  # Prompts whose greedy answers are the same tokens.
  # Prompts whose answers differ first at a token where the JAX model's two
  # candidates are as close as the rounding.
  greedy_near_ties: int
  greedy_total: int  # Prompts with a greedy answer.

  @property
  def limit(self) -> float:
    """The largest `kl` of a file that passes."""
    return LIMITS[self.kind]

  @property
  def passed(self) -> bool:
    """Whether the file is close enough; never with a NaN."""
    same = self.greedy_equal + self.greedy_near_ties == self.greedy_total
    return self.kl <= self.limit and (same or self.kind != 'f32')

  @property
  def kl(self) -> float:
    """The divergence that is compared with the limit."""
    return self.kl_max if self.kind == 'f32' else self.kl_mean

  def __str__(self) -> str:
    judged = 'worst' if self.kind == 'f32' else 'mean'
    return (f'KL {self.kl:.1e} ({judged} of {self.n_positions} positions, at'
            f' most {self.limit:g}), worst {self.kl_max:.1e}, log-probabilities'
            f' within {self.max_logit_difference:.2g}, greedy text equal for'
            f' {self.greedy_equal} of {self.greedy_total}'
            + (f' ({self.greedy_near_ties} near ties)'
               if self.greedy_near_ties and self.kind == 'f32' else ''))


def compare(
    reference: Sequence[np.ndarray], other: Sequence[np.ndarray],
    reference_greedy: Sequence[Sequence[int]],
    other_greedy: Sequence[Sequence[int]], *, kind: str,
    along_greedy: Sequence[np.ndarray] | None = None) -> Divergence:
  """Compares a runtime's distributions and greedy answers with the model's.

  Files in f32 are judged by their worst position: one that is far off means a
  wrong mask, RoPE or norm. The others are judged by the mean: rounded weights
  move single positions far where the model is undecided (bfloat16 on the 270M:
  mean 3e-4, worst 3e-3), while a fault moves all of them.

  Greedy answers count for f32 only. They have to be equal, or differ first at a
  near tie: the logits of the two tokens lie within twice the largest measured
  difference, as each of the two may be off by that much.

  Args:
    reference: For each prompt, logits or log-probabilities (n, V).
    other: The same; columns beyond V belong to no token and are ignored.
    reference_greedy: For each prompt, the tokens of the greedy answer.
    other_greedy: The same.
    kind: A key of `LIMITS`.
    along_greedy: See `Reference`; without it, no answer is a near tie.
  """
  differences, divergences = [], []
  for ours_nV, theirs_nV in zip(reference, other, strict=True):
    n, V = ours_nV.shape
    if len(theirs_nV) != n or theirs_nV.shape[1] < V:
      raise ValueError(f'{theirs_nV.shape} is compared with {(n, V)}')
    ours_nV = _log_softmax(ours_nV)
    theirs_nV = _log_softmax(theirs_nV[:, :V])
    differences.append(np.abs(ours_nV - theirs_nV).max())
    divergences.append(
        np.sum(np.exp(ours_nV) * (ours_nV - theirs_nV), axis=1))
  divergences = np.concatenate(divergences)
  # Numpy's max, unlike Python's, keeps a NaN.
  difference = float(np.max(differences))
  greedy = [
      _same_answer(list(ours), list(theirs), difference,
                   None if along_greedy is None else along_greedy[i])
      for i, (ours, theirs) in enumerate(
          zip(reference_greedy, other_greedy, strict=True))]
  return Divergence(
      kind=kind, max_logit_difference=difference,
      kl_mean=float(divergences.mean()), kl_max=float(divergences.max()),
      n_positions=len(divergences), greedy_equal=greedy.count('equal'),
      greedy_near_ties=greedy.count('tie'), greedy_total=len(greedy))


def _log_softmax(logits_nV: np.ndarray) -> np.ndarray:
  logits_nV = np.asarray(logits_nV, np.float64)
  return np.maximum(special.log_softmax(logits_nV, axis=1), _FLOOR)


def _same_answer(ours, theirs, difference, logits_TV) -> str:
  """Returns 'equal', 'tie' or 'different'."""
  if ours == theirs:
    return 'equal'
  n = next((i for i, pair in enumerate(zip(ours, theirs))
            if pair[0] != pair[1]), None)
  # If one answer is a prefix of the other, the token that ended it is unknown.
  if n is None or logits_TV is None:
    return 'different'
  logits_V = np.asarray(logits_TV[n], np.float64)
  gap = logits_V[ours[n]] - logits_V[theirs[n]]
  return 'tie' if gap <= 2 * difference else 'different'


def prompts(tokenizer: chat.Tokenizer, window: int | None) -> list[list[int]]:
  """Returns the fixed prompts as token ids, BOS first.

  They are English, code, Hindi, Chinese, a rendered question, BOS alone, and,
  if local layers attend to a window of tokens, a text that is longer: only that
  one shows a mask that is off by one, or the RoPE of the other kind of layer.
  """
  found = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in _TEXTS]
  found.append(chat.render_prompt([chat.Message('user', _QUESTION)], tokenizer))
  found.append([tokenizer.bos_id])
  if window is not None:
    found.append(_long_prompt(tokenizer, window + _BEYOND_WINDOW))
  return found


def _long_prompt(tokenizer: chat.Tokenizer, length: int) -> list[int]:
  """Returns `length` tokens of lines that differ, so that positions matter."""
  ids, number = [tokenizer.bos_id], 4
  while len(ids) < length:
    ids += tokenizer.encode(_LONG.format(
        number=number, count=number * number % 97,
        place=_PLACES[number % len(_PLACES)]))
    number += 1
  return ids[:length]


def template_conversations() -> list[tuple[str, list[dict[str, str]]]]:
  """Returns (name, messages) that all formats' templates have to render alike.

  Roles are system, user and assistant, as clients send them.
  """
  question = {'role': 'user', 'content': 'What floats?'}
  answer = {'role': 'assistant', 'content': 'Wood, ice and oil.'}
  more = {'role': 'user', 'content': 'And what sinks?\nTwo things.'}
  last = {'role': 'assistant', 'content': 'Stone.\n\nIron.'}
  system = {'role': 'system', 'content': 'Answer in one line.'}
  spaced = [{**message, 'content': f' \n\t{message["content"]}\n\n '}
            for message in (system, question, answer, more)]
  return [
      ('question', [question]),
      ('question and answer', [question, answer]),
      ('two questions', [question, answer, more]),
      ('two questions and answers', [question, answer, more, last]),
      ('system and question', [system, question]),
      ('system, two questions', [system, question, answer, more]),
      ('system, answered', [system, question, answer]),
      ('white space', spaced),
  ]
