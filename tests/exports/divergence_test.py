"""Verdicts on exported files: planted differences, limits, fixed prompts."""

import conftest
import numpy as np
import pytest
from scipy import optimize

from gemma_sft.exports import divergence

_RNG = np.random.default_rng(0)
# Three prompts of 4, 4 and 1 positions, 50 tokens.
_LOGITS = [_RNG.normal(0, 3, (n, 50)).astype(np.float32) for n in (4, 4, 1)]
_GREEDY = [[1, 2, 3], [4, 5], []]


def _compare(other, other_greedy=_GREEDY, kind='f32', **options):
  return divergence.compare(
      _LOGITS, other, _GREEDY, other_greedy, kind=kind, **options)


def _shifted(size):
  """The logits with one of prompt 1's second position changed."""
  other = [logits.astype(np.float64) for logits in _LOGITS]
  other[1][1, 7] += size
  return other


@pytest.mark.parametrize('kind', divergence.LIMITS)
def test_the_same_passes_and_a_nan_does_not(kind):
  found = _compare(_LOGITS, kind=kind)
  assert found == divergence.Divergence(
      kind=kind, max_logit_difference=0, kl_mean=0, kl_max=0, n_positions=9,
      greedy_equal=3, greedy_near_ties=0, greedy_total=3)
  assert found.passed and found.limit == divergence.LIMITS[kind]
  # A constant for each position, as log_softmax takes off, is no difference.
  other = [logits.astype(np.float64) - 7.5 + np.arange(len(logits))[:, None]
           for logits in _LOGITS]
  found = _compare(other)
  assert found.max_logit_difference < 1e-12 and found.passed
  # A NaN never passes.
  other[1][2, 3] = np.nan
  found = _compare(other, kind=kind)
  assert not found.passed
  assert np.isnan(found.kl_max) and np.isnan(found.max_logit_difference)


def test_the_figures_are_those_of_the_definition():
  found = _compare(_shifted(0.5), kind='q8_0')
  p = np.exp(_LOGITS[1][1].astype(np.float64))
  p /= p.sum()
  # Only token 7 moved: log q = log p + 0.5 [token 7] - log(1 + p_7 (e^0.5 - 1))
  normaliser = np.log1p(p[7] * np.expm1(0.5))
  kl = normaliser - 0.5 * p[7]
  np.testing.assert_allclose(  # f64 sums of 50 numbers.
      [found.kl_max, found.kl_mean, found.max_logit_difference],
      [kl, kl / 9, 0.5 - normaliser], rtol=1e-9)


def _with_divergence(wanted):
  """Logits whose only difference, at one position, has this divergence."""
  return _shifted(optimize.brentq(
      lambda size: _compare(_shifted(size)).kl_max - wanted, 0, 20))


def test_one_position_fails_an_f32_file():
  found = _compare(_with_divergence(1.1e-5))
  assert not found.passed and found.kl == found.kl_max
  assert 'worst of 9' in str(found)
  assert _compare(_with_divergence(0.9e-5)).passed


@pytest.mark.parametrize('kind', [k for k in divergence.LIMITS if k != 'f32'])
def test_the_mean_decides_for_a_rounded_file(kind):
  limit = divergence.LIMITS[kind]
  assert _compare(_with_divergence(8 * limit), kind=kind).passed
  found = _compare(_with_divergence(10 * limit), kind=kind)
  assert not found.passed
  assert found.kl == found.kl_mean
  assert 'mean of 9' in str(found)


def test_limits():
  assert divergence.LIMITS['f32'] == 1e-5
  assert divergence.LIMITS['f16'] == divergence.LIMITS['bf16'] == 1e-3
  limits = [divergence.LIMITS[kind] for kind in (
      'f32', 'f16', 'q8_0', 'q6_k', 'q5_k_m', 'q4_k_m')]
  assert limits == sorted(set(limits))
  assert (divergence.LIMITS['q8_0'], divergence.LIMITS['q4_k_m']) == (
      0.02, 0.05)


def test_a_zero_probability_is_finite():
  other = [logits.astype(np.float64) for logits in _LOGITS]
  other[0][0, 3] = -np.inf
  found = _compare(other)
  assert np.isfinite(found.kl_max) and not found.passed
  # Where the model has none either, nothing is wrong.
  ours = [np.array([[0.0, 1.0, -200.0]])]
  theirs = [np.array([[0.0, 1.0, -np.inf]])]
  found = divergence.compare(ours, theirs, [], [], kind='f32')
  assert found.passed and found.max_logit_difference == 0


def test_columns_beyond_the_vocabulary_are_left_out():
  other = [np.pad(logits, ((0, 0), (0, 5)), constant_values=9)
           for logits in _LOGITS]
  assert _compare(other).kl_max == 0
  with pytest.raises(ValueError, match='49'):
    _compare([logits[:, :49] for logits in _LOGITS])
  with pytest.raises(ValueError, match='compared'):
    _compare([logits[-1:] for logits in _LOGITS])


@pytest.mark.parametrize('theirs', [[1, 9, 3], [1, 2], [1, 2, 3, 4]])
def test_another_answer_fails_f32_alone(theirs):
  greedy = [theirs, *_GREEDY[1:]]
  found = _compare(_LOGITS, greedy)
  assert (found.greedy_equal, found.greedy_total, found.passed) == (2, 3, False)
  assert all(_compare(_LOGITS, greedy, kind=k).passed for k in ('f16', 'q8_0'))


def test_a_near_tie_is_no_fault():
  other = _shifted(1e-4)
  difference = _compare(other).max_logit_difference
  greedy = [[1, 9, 8], *_GREEDY[1:]]
  # Of the first answer, after the one token that they share.
  along = [np.full((len(ids) + 1, 50), np.nan) for ids in _GREEDY]
  along[0][1, [2, 9]] = 1.0, 1.0 - 1.9 * difference
  close = _compare(other, greedy, along_greedy=along)
  assert close.passed and close.greedy_near_ties == 1
  assert close.greedy_equal == 2
  along[0][1, 9] = 1.0 - 2.1 * difference
  far = _compare(other, greedy, along_greedy=along)
  assert not far.passed and far.greedy_near_ties == 0


@pytest.mark.parametrize('generation', [2, 3, 4])
def test_prompts(generation):
  tokenizer = conftest.make_tokenizer(generation)
  prompts = divergence.prompts(tokenizer, 64)
  assert prompts == divergence.prompts(tokenizer, 64)
  assert {ids[0] for ids in prompts} == {tokenizer.bos_id}
  assert all(tokenizer.bos_id not in ids[1:] for ids in prompts)
  assert min(map(len, prompts)) == 1
  assert len(prompts[-1]) == 64 + 32
  texts = [tokenizer.decode(ids) for ids in prompts]
  for word in ('mill', 'def median', '\u092d\u093e\u0930\u0924', '\u6625'):
    assert sum(word in text for text in texts) == 1
  rendered = [ids for ids in prompts if tokenizer.turn_ids[0] in ids]
  assert len(rendered) == 1
  assert rendered[0].count(tokenizer.turn_ids[0]) == 2
  assert divergence.prompts(tokenizer, None) == prompts[:-1]


def test_the_long_prompt_does_not_repeat():
  # A period as long as the window would hide a mask that is off.
  ids = divergence.prompts(conftest.make_tokenizer(3), 512)[-1]
  lines = conftest.make_tokenizer(3).decode(ids).splitlines()
  assert len(lines) > 4 and len(set(lines)) == len(lines)


def test_conversations_are_of_all_kinds():
  conversations = divergence.template_conversations()
  assert len({name for name, _ in conversations}) == len(conversations)
  firsts = {messages[0]['role'] for _, messages in conversations}
  lasts = {messages[-1]['role'] for _, messages in conversations}
  assert (firsts, lasts) == ({'system', 'user'}, {'user', 'assistant'})
  contents = [m['content'] for _, messages in conversations for m in messages]
  assert any(content != content.strip() for content in contents)
