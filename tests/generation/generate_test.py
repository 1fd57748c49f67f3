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
def _logits(kind, params, tokens_BT):
  """The logits of a full forward, without a cache."""
  positions_BT = jnp.broadcast_to(
      jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
  x_BTD = model_lib.hidden_states(
      _model(kind), params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
  return model_lib.logits(_model(kind), params, x_BTD)


def _check(kind, answers, choose=lambda logits_V, _: np.argmax(logits_V)):
  """Each token is chosen by the logits after those before it."""
  tokens_BT = np.zeros((len(answers), max(_LENGTHS) + _NEW), np.int32)
  rows = [[*p, *a] for p, a in zip(_prompts(), answers, strict=True)]
  for r, row in enumerate(rows):
    tokens_BT[r, :len(row)] = row
  logits_BTV = np.asarray(_logits(kind, _params(kind), tokens_BT))
  for row, n, logits_TV in zip(rows, _LENGTHS, logits_BTV):
    assert len(row) == n + _NEW
    assert row[n:] == [
        choose(logits_TV[t - 1], row[:t]) for t in range(n, len(row))]


def _generate(kind='3', prompts=None, **options):
  """Options are those of `generate`, or fields of `Sampling`."""
  sampling = dict(max_new_tokens=_NEW)
  for name in generate.Sampling.__dataclass_fields__:
    if name in options:
      sampling[name] = options.pop(name)
  return generate.generate(
      _model(kind), _params(kind), _prompts() if prompts is None else prompts,
      generate.Sampling(**sampling),
      **dict(stop_ids=_NEVER, vocab_size=512, batch_size=3) | options)


@pytest.fixture
def sizes(monkeypatch):
  """The rows of each call of `_prefill` and of `_decode_chunk`."""
  sizes = {'_prefill': [], '_decode_chunk': []}

  def count(call, sizes, i, *arguments):
    sizes.append(len(arguments[i]))
    return call(*arguments)

  for name, i in (('_prefill', 2), ('_decode_chunk', 3)):
    monkeypatch.setattr(generate, name, functools.partial(
        count, getattr(generate, name), sizes[name], i))
  return sizes


@functools.cache
def _greedy(kind='3'):
  return _generate(kind)


@pytest.mark.parametrize('kind', _KINDS)
def test_greedy_tokens_are_those_of_full_forwards(kind):
  _check(kind, _greedy(kind))
  assert len({token for answer in _greedy(kind) for token in answer}) > 5


def test_rows_of_the_embedding_beyond_the_tokenizer_are_never_said():
  _check('3', _generate(vocab_size=200),
         lambda logits_V, _: np.argmax(logits_V[:200]))
  assert max(max(a) for a in _greedy()) >= 200  # Or nothing was tested.


def test_neighbours_padding_and_order_do_not_matter():
  done = []
  answers = _generate(
      batch_size=1, on_answer=lambda i, tokens: done.append((i, tokens)))
  assert answers == _greedy() and done == list(enumerate(answers))
  assert _generate(prompts=_prompts()[::-1]) == _greedy()[::-1]
  assert _generate(prompts=[]) == []


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
  def compiled():
    return [p._cache_size() for p in (
        generate._prefill, generate._decode_chunk)]

  _generate(max_new_tokens=5)
  before = compiled()
  for limit in (1, 16, 33, 128):
    assert list(map(len, _generate(max_new_tokens=limit))) == [limit] * 3
  assert compiled() == before
  _generate(max_new_tokens=129)  # A longer cache is another one.
  assert compiled() == [n + 1 for n in before]


@pytest.mark.parametrize('stop', (False, True), ids=('chunks', 'stop token'))
def test_is_done_ends_its_row_alone(stop):
  seen = {0: [], 1: [], 2: []}

  def is_done(number, tokens):
    seen[number].append(list(tokens))
    return number == 1

  stop_id = _greedy()[0][5] if stop else -1
  answers = _generate(stop_ids=(stop_id,), is_done=is_done)
  greedy = [a[:a.index(stop_id)] if stop_id in a else a for a in _greedy()]
  assert answers == [greedy[0], greedy[1][:16], greedy[2]]
  # It sees each chunk, and the answer as it ends.
  assert seen == {i: [answer] if len(answer) <= 16 else [answer[:16], answer]
                  for i, answer in enumerate(answers)}


def test_the_last_few_do_not_fill_a_whole_batch(sizes):
  prompts = [_prompts()[0]] * 10
  answers = _generate(prompts=prompts, batch_size=6)
  assert answers == [_greedy()[0]] * 10
  _generate(prompts=prompts[:7], batch_size=6)
  assert sizes['_prefill'] == [6, 6, 6, 1]


def test_long_prompts_come_fewer_at_a_time(monkeypatch, sizes):
  rng = np.random.default_rng(1)
  prompts = [[2, *rng.integers(3, 512, n).tolist()]
             for n in (3, 4, 5, 6, 40, 50)]
  answers = _generate(prompts=prompts, batch_size=8)
  monkeypatch.setattr(generate, '_MAX_PROMPT_TOKENS', 60)
  # 6 rows of 51 would be 306; 3 of 6 are 18. Of the rest, 2 of 41 are too many.
  assert _generate(prompts=prompts, batch_size=8) == answers
  assert sizes['_prefill'] == [6, 3, 1, 1, 1]


@pytest.mark.parametrize('kind, sampling', (
    *((kind, {}) for kind in _KINDS),
    ('3', dict(temperature=2.0, repetition_penalty=1.5))), ids=str)
def test_rows_that_continue_alone_say_the_same(
    kind, sampling, monkeypatch, sizes):
  rng = np.random.default_rng(1)
  prompts = [[2, *rng.integers(3, 512, 4 + i).tolist()] for i in range(9)]
  answers = []
  # Rows end after a chunk but for two, then but for one.
  for shrink, rows in ((generate._SHRINK, [9, 2, 2, 2]), (2, [9, 2, 1, 1]),
                       (100, [9, 9, 9, 9])):
    monkeypatch.setattr(generate, '_SHRINK', shrink)
    sizes['_decode_chunk'].clear()
    answers.append(_generate(
        kind, prompts, batch_size=9, max_new_tokens=64, **sampling,
        is_done=lambda i, tokens: i not in (3, 7) or (
            i == 3 and len(tokens) >= 32)))
    assert sizes['_decode_chunk'] == rows
  assert [len(a) for a in answers[0]] == [16, 16, 16, 32, 16, 16, 16, 64, 16]
  assert answers[1:] == answers[:1] * 2


def test_samples_are_a_function_of_seed_and_row():
  hot = dict(temperature=2.0)
  answers = _generate(**hot)
  assert _generate(**hot) == answers
  assert _generate(**hot, batch_size=1) == answers  # Not of its neighbours.
  for others in (_generate(**hot, seed=1), _greedy()):
    assert all(a != b for a, b in zip(answers, others))
  # The same prompt again is another row.
  prompts = [_prompts()[0]] * 3
  rows = _generate(prompts=prompts, **hot)
  assert rows[0] == answers[0] and len(set(map(tuple, rows))) == 3
  # An answer that is made later, with its id, is that of the first time.
  some = _generate(prompts=prompts[:1], batch_size=1, row_ids=[2], **hot)
  assert some == rows[2:]


def test_the_narrowest_sampling_is_greedy():
  assert _generate(temperature=1e-4, top_k=1, top_p=1e-6) == _greedy()


def test_the_repetition_penalty_in_the_model():
  penalty, window = 3.0, 8

  def choose(logits_V, tokens):
    recent = np.unique(tokens[-window:])
    seen = logits_V[recent]
    logits_V = logits_V.copy()
    logits_V[recent] = np.where(seen > 0, seen / penalty, seen * penalty)
    return np.argmax(logits_V)

  answers = _generate(repetition_penalty=penalty, repetition_window=window)
  _check('3', answers, choose)
  assert answers != _greedy()


_LOGITS = np.log([0.4, 0.3, 0.15, 0.1, 0.05])


def _support(recent=(-1, -1), n=400, logits=_LOGITS, **sampling):
  """Tokens that are ever chosen by these logits, and their shares."""
  keys_B = jax.random.split(jax.random.key(0), n)
  chosen = np.asarray(generate._choose(
      jnp.tile(jnp.float32([logits]), (n, 1)),
      jnp.tile(jnp.asarray([recent]), (n, 1)), keys_B, 0,
      generate.Sampling(**sampling)))
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
    # The narrowest sampling takes the likeliest, as temperature 0 does.
    (dict(temperature=2.0, top_k=1), 1), (dict(temperature=2.0, top_p=1e-6), 1),
    (dict(temperature=1e-4), 1), (dict(temperature=0.0), 1),
), ids=str)
def test_which_tokens_can_be_chosen(sampling, kept):
  assert sorted(_support(**sampling)) == list(range(kept))


@pytest.mark.parametrize('temperature', (0.5, 1.0, 2.0))
def test_shares_follow_the_temperature(temperature):
  expected = np.exp(_LOGITS / temperature)
  expected /= expected.sum()
  shares = _support(temperature=temperature, n=4000)
  # Four deviations of a share of 4,000 draws are at most 0.032.
  np.testing.assert_allclose(
      [shares.get(i, 0) for i in range(5)], expected, atol=0.032)


@pytest.mark.parametrize('logits, recent, penalty, chosen', (
    ((2.0, 1.5, -1.0), (0, -1), 1.5, 1),  # 2 / 1.5 is below 1.5.
    ((2.0, 1.5, -1.0), (0, -1), 1.2, 0),  # 2 / 1.2 is not.
    ((2.0, 1.5, -1.0), (-1, -1), 9.0, 0),
    ((2.0, 1.5, -1.0), (0, 1), 1.5, 0),
    ((2.0, 1.5, -1.0), (1, 2), 2.0, 0),
    ((-2.0, -1.5, -9.0), (1, 2), 1.4, 0)))  # A negative one is multiplied.
def test_the_repetition_penalty_by_hand(logits, recent, penalty, chosen):
  found = _support(recent, n=1, logits=logits, repetition_penalty=penalty)
  assert list(found) == [chosen]
