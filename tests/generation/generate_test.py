"""Generation with the cache says what full forwards without it say."""

import functools

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_sft import model as model_lib
from gemma_sft.generation import generate

# Ragged; two longer than the window of 8, one longer than a prompt bucket.
_LENGTHS = (3, 13, 70)
# More than one chunk of decoding.
_NEW = 18
_KINDS = {
    '1': dict(generation=1), '2': dict(generation=2), '3': dict(generation=3),
    '4': dict(generation=4, num_layers=3, per_layer_input_dim=8,
              shared_kv_layers=1)}
# An id that no row says: nothing stops early.
_NEVER = (-1,)


@functools.cache
def _model(kind):
  return model_lib.make_model('custom', **conftest.DIMENSIONS | _KINDS[kind])


@functools.cache
def _params(kind):
  params = conftest.make_params(_model(kind))
  # A small embedding, or the tied head only echoes the last token.
  table_VD = 0.05 * params['embedder']['input_embedding']
  return params | {
      'embedder': params['embedder'] | {'input_embedding': table_VD}}


@functools.cache
def _prompts():
  rng = np.random.default_rng(0)
  return [[2, *rng.integers(3, 512, n - 1).tolist()] for n in _LENGTHS]


@functools.partial(jax.jit, static_argnames='kind')
def _last_logits(kind, params, tokens_T, n):
  """Logits after the first n of a row padded to a fixed length."""
  tokens_BT = tokens_T[None]
  positions_BT = jnp.arange(tokens_BT.shape[1])[None]
  x_BTD = model_lib.hidden_states(
      _model(kind), params, tokens_BT, positions_BT,
      (positions_BT < n).astype(jnp.int32))
  return model_lib.logits(_model(kind), params, x_BTD[0, n - 1])


def _reference(kind, prompt, choose=lambda logits_V, _: np.argmax(logits_V)):
  """Greedy tokens, each by a full forward without a cache."""
  tokens = list(prompt)
  for _ in range(_NEW):
    padded = np.zeros(max(_LENGTHS) + _NEW, np.int32)
    padded[:len(tokens)] = tokens
    logits_V = np.asarray(_last_logits(
        kind, _params(kind), jnp.asarray(padded), len(tokens)))
    tokens.append(int(choose(logits_V, tokens)))
  return tokens[len(prompt):]


def _generate(kind='3', prompts=None, *, batch_size=3, stop_ids=_NEVER,
              vocab_size=512, seed=0, row_ids=None, is_done=None,
              progress=None, **sampling):
  return generate.generate(
      _model(kind), _params(kind), _prompts() if prompts is None else prompts,
      generate.Sampling(**dict(max_new_tokens=_NEW) | sampling),
      stop_ids=stop_ids, vocab_size=vocab_size, batch_size=batch_size,
      seed=seed, row_ids=row_ids, is_done=is_done, progress=progress)


@functools.cache
def _greedy(kind='3'):
  return _generate(kind)


@pytest.mark.parametrize('kind', _KINDS)
def test_greedy_tokens_are_those_of_full_forwards(kind):
  answers = _greedy(kind)
  for prompt, answer in zip(_prompts(), answers, strict=True):
    assert answer == _reference(kind, prompt)
  assert len({token for answer in answers for token in answer}) > 5


def test_rows_of_the_embedding_beyond_the_tokenizer_are_never_said():
  def choose(logits_V, _):
    return np.argmax(logits_V[:200])

  answers = _generate(vocab_size=200)
  assert answers == [_reference('3', p, choose) for p in _prompts()]
  assert max(max(a) for a in _greedy()) >= 200  # Or nothing was tested.


def test_neighbours_and_padding_do_not_matter():
  assert _generate(batch_size=2) == _greedy()  # The last batch is filled up.
  assert [_generate(prompts=[p], batch_size=1)[0] for p in _prompts()] == (
      _greedy())


def test_answers_come_in_the_order_of_the_prompts():
  assert _generate(prompts=_prompts()[::-1]) == _greedy()[::-1]


def test_a_stop_token_ends_a_row_and_is_left_out():
  answers = _greedy()
  stop = answers[0][5]
  expected = [a[:a.index(stop)] if stop in a else a for a in answers]
  assert _generate(stop_ids=(stop, -1)) == expected
  assert len(expected[0]) <= 5
  # On the first token, and after the first chunk.
  first, late = answers[1][0], answers[2][17]
  assert _generate(stop_ids=(first,))[1] == []
  assert _generate(stop_ids=(late,))[2] == answers[2][:answers[2].index(late)]


@pytest.mark.parametrize('n', (1, 16))
def test_no_more_tokens_than_asked_for(n):
  assert _generate(max_new_tokens=n) == [a[:n] for a in _greedy()]


def test_limits_of_new_tokens_share_programs():
  programs = (generate._prefill, generate._decode_chunk)
  _generate(max_new_tokens=5)
  before = [p._cache_size() for p in programs]
  for limit in (1, 16, 33, 128):
    answers = _generate(max_new_tokens=limit)
    assert [len(a) for a in answers] == [limit] * 3
  assert [p._cache_size() for p in programs] == before
  # A longer cache is another one.
  _generate(max_new_tokens=129)
  assert [p._cache_size() for p in programs] == [n + 1 for n in before]


def test_no_prompts_have_no_answers():
  assert _generate(prompts=[]) == []


def test_is_done_ends_its_row_alone():
  seen = {0: [], 1: [], 2: []}

  def is_done(number, tokens):
    seen[number].append(list(tokens))
    return number == 1

  answers = _generate(is_done=is_done)
  assert answers == [_greedy()[0], _greedy()[1][:16], _greedy()[2]]
  # It sees each chunk, and the answer as it ends.
  assert seen == {0: [answers[0][:16], answers[0]], 1: [answers[1]],
                  2: [answers[2][:16], answers[2]]}


def test_is_done_sees_an_answer_that_a_stop_token_ends():
  seen = []
  answers = _generate(stop_ids=(_greedy()[0][5],),
                      is_done=lambda i, t: seen.append((i, list(t))))
  assert (0, answers[0]) in seen


def test_a_sampled_row_is_that_of_its_id_alone():
  prompts = [_prompts()[0]] * 3
  rows = _generate(prompts=prompts, temperature=1.5)
  assert len({tuple(row) for row in rows}) == 3
  # The answers that are missing, made alone, are those of the first time.
  some = _generate(prompts=prompts[:2], row_ids=[2, 0], temperature=1.5)
  assert some == [rows[2], rows[0]]


def test_progress_counts_the_prompts_answered():
  counts = []
  _generate(batch_size=2, progress=counts.append)
  assert counts == [2, 3]


def test_the_last_few_do_not_fill_a_whole_batch(monkeypatch):
  sizes = []
  prefill = generate._prefill

  def counted(model, params, tokens_BT, *rest):
    sizes.append(len(tokens_BT))
    return prefill(model, params, tokens_BT, *rest)

  monkeypatch.setattr(generate, '_prefill', counted)
  prompts = [_prompts()[0]] * 13
  answers = _generate(prompts=prompts, batch_size=8)
  assert answers == [answers[0]] * 13
  _generate(prompts=prompts[:10], batch_size=8)
  assert sizes == [8, 8, 8, 2]


def test_long_prompts_come_fewer_at_a_time(monkeypatch):
  counts = []
  rng = np.random.default_rng(1)
  prompts = [[2, *rng.integers(3, 512, n).tolist()]
             for n in (3, 4, 5, 6, 40, 50)]
  answers = _generate(prompts=prompts, batch_size=8)
  monkeypatch.setattr(generate, '_MAX_PROMPT_TOKENS', 60)
  # 6 rows of 51 would be 306; 3 of 6 are 18. Of the rest, 2 of 41 are too many.
  assert _generate(prompts=prompts, batch_size=8,
                   progress=counts.append) == answers
  assert counts == [3, 4, 5, 6]


@pytest.mark.parametrize('kind', _KINDS)
@pytest.mark.parametrize('sampling', (
    dict(), dict(temperature=2.0, repetition_penalty=1.5)), ids=str)
def test_rows_that_go_on_alone_say_the_same(kind, sampling, monkeypatch):
  rng = np.random.default_rng(1)
  prompts = [[2, *rng.integers(3, 512, 4 + i).tolist()] for i in range(9)]
  sizes = []
  decode_chunk = generate._decode_chunk

  def counted(model, params, carry, keys_B, *rest):
    sizes.append(len(keys_B))
    return decode_chunk(model, params, carry, keys_B, *rest)

  def generate_all(last):
    """Rows end after a chunk but for two, then but for the one."""
    del sizes[:]
    return _generate(
        kind, prompts, batch_size=9, max_new_tokens=64, **sampling,
        is_done=lambda i, tokens: i not in (3, 7) or (
            i != last and len(tokens) >= 32))

  monkeypatch.setattr(generate, '_decode_chunk', counted)
  answers = generate_all(last=7)
  assert sizes == [9, 2, 2, 2]
  assert [len(a) for a in answers] == [16, 16, 16, 32, 16, 16, 16, 64, 16]
  monkeypatch.setattr(generate, '_SHRINK', 2)
  assert generate_all(last=7) == answers
  assert sizes == [9, 2, 1, 1]
  monkeypatch.setattr(generate, '_SHRINK', 100)
  assert generate_all(last=7) == answers
  assert sizes == [9, 9, 9, 9]


# Sampling ---------------------------------------------------------------------


def test_samples_are_a_function_of_seed_and_row():
  hot = dict(temperature=2.0)
  answers = _generate(**hot)
  assert _generate(**hot) == answers
  # Not of the rows beside it.
  assert _generate(**hot, batch_size=2) == answers
  assert _generate(prompts=_prompts()[:1], **hot, batch_size=1) == answers[:1]
  other = _generate(**hot, seed=1)
  assert all(a != b for a, b in zip(answers, other))
  assert all(a != b for a, b in zip(answers, _greedy()))
  # The same prompt again is another row.
  one, again = _generate(prompts=[_prompts()[0]] * 2, **hot, batch_size=2)
  assert one != again


@pytest.mark.parametrize('sampling', (
    dict(temperature=2.0, top_k=1), dict(temperature=2.0, top_p=1e-6),
    dict(temperature=1e-4)), ids=str)
def test_the_narrowest_sampling_is_greedy(sampling):
  assert _generate(**sampling) == _greedy()


def test_the_repetition_penalty_in_the_model():
  penalty, window = 3.0, 8

  def choose(logits_V, tokens):
    recent = np.unique(tokens[-window:])
    seen = logits_V[recent]
    logits_V = logits_V.copy()
    logits_V[recent] = np.where(seen > 0, seen / penalty, seen * penalty)
    return np.argmax(logits_V)

  answers = _generate(repetition_penalty=penalty, repetition_window=window)
  assert answers == [_reference('3', p, choose) for p in _prompts()]
  assert answers != _greedy()


_LOGITS = np.log([[0.4, 0.3, 0.15, 0.1, 0.05]]).astype(np.float32)


def _support(recent=(-1, -1), n=400, **sampling):
  """Tokens that are ever chosen of _LOGITS, and their shares."""
  keys_B = jax.random.split(jax.random.key(0), n)
  chosen = np.asarray(generate._choose(
      jnp.tile(_LOGITS, (n, 1)), jnp.tile(jnp.asarray([recent]), (n, 1)),
      keys_B, 0, generate.Sampling(**sampling)))
  tokens, counts = np.unique(chosen, return_counts=True)
  return dict(zip(tokens.tolist(), (counts / n).tolist()))


@pytest.mark.parametrize('sampling, kept', (
    (dict(temperature=1.0), 5),
    (dict(temperature=1.0, top_k=3), 3),
    (dict(temperature=1.0, top_k=5), 5),
    (dict(temperature=1.0, top_p=0.39), 1),
    (dict(temperature=1.0, top_p=0.41), 2),  # The first does not reach it.
    (dict(temperature=1.0, top_p=0.84), 3),
    (dict(temperature=1.0, top_k=2, top_p=0.99), 2),
    (dict(temperature=0.0), 1),
), ids=str)
def test_which_tokens_can_be_chosen(sampling, kept):
  assert sorted(_support(**sampling)) == list(range(kept))


@pytest.mark.parametrize('temperature', (0.5, 1.0, 2.0))
def test_shares_follow_the_temperature(temperature):
  expected = np.exp(_LOGITS[0] / temperature)
  expected /= expected.sum()
  shares = _support(temperature=temperature, n=4000)
  # Four deviations of a share of 4,000 draws are at most 0.032.
  np.testing.assert_allclose(
      [shares.get(i, 0) for i in range(5)], expected, atol=0.032)


def test_the_repetition_penalty_by_hand(monkeypatch):
  monkeypatch.setattr(f'{__name__}._LOGITS', np.float32([[2.0, 1.5, -1.0]]))
  # 2 / 1.5 is below 1.5; 2 / 1.2 is not; a negative one is multiplied.
  for recent, penalty, chosen in (
      ((0, -1), 1.5, 1), ((0, -1), 1.2, 0), ((-1, -1), 9.0, 0),
      ((0, 1), 1.5, 0), ((1, 2), 2.0, 0)):
    assert list(_support(recent, n=1, repetition_penalty=penalty)) == [chosen]
  monkeypatch.setattr(f'{__name__}._LOGITS', np.float32([[-2.0, -1.5, -9.0]]))
  assert list(_support((1, 2), n=1, repetition_penalty=1.4)) == [0]
