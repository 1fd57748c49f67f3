"""The gathered, chunked loss is the plain one, and never loses a token."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import tiny_models

from gemma_sft import sharding
from gemma_sft.nn import head

_B, _T, _D, _V = 8, 6, 16, 40
_both_heads = pytest.mark.parametrize('frozen_head', (False, True))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
  """A frozen head takes the vocabulary of 40 in five blocks."""
  monkeypatch.setattr(head, 'VOCABULARY_BLOCK', 8)


def _inputs(seed=0, share=0.4, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  x_BTD = jnp.asarray(rng.normal(0, 1, (_B, _T, _D)), dtype)
  embedding_VD = jnp.asarray(rng.normal(0, 1, (_V, _D)), dtype)
  targets_BT = jnp.asarray(rng.integers(0, _V, (_B, _T)), jnp.int32)
  mask_BT = jnp.asarray(rng.random((_B, _T)) < share)
  return x_BTD, embedding_VD, targets_BT, mask_BT


def _plain(x_BTD, embedding_VD, targets_BT, mask_BT, softcap=None):
  """All logits at once."""
  logits_BTV = jnp.einsum('BTD,VD->BTV', x_BTD, embedding_VD)
  if softcap is not None:
    logits_BTV = softcap * jnp.tanh(logits_BTV / softcap)
  log_BTV = jax.nn.log_softmax(logits_BTV)
  picked_BT = jnp.take_along_axis(log_BTV, targets_BT[..., None], axis=2)[
      ..., 0]
  return -jnp.sum(jnp.where(mask_BT, picked_BT, 0))


_plain_value_and_grads = jax.jit(
    jax.value_and_grad(_plain, argnums=(0, 1)), static_argnames='softcap')


@functools.cache
def _compiled(**settings):
  def twice(*arrays):
    nll, n = head.masked_nll(*arrays, **settings)
    return 2 * nll, n

  return jax.jit(jax.value_and_grad(twice, argnums=(0, 1), has_aux=True))


def _results(*inputs, max_trained=48, chunk_size=64, **settings):
  """Returns (nll, count, gradients), of twice the nll, which rounds nothing."""
  (value, n), grads = _compiled(
      max_trained=max_trained, chunk_size=chunk_size, **settings)(*inputs)
  return value / 2, n, jax.tree.map(lambda g: g / 2, grads)


_masked_nll = jax.jit(head.masked_nll, static_argnames=(
    'max_trained', 'groups', 'chunk_size', 'frozen_head'))
_assert_close = functools.partial(tiny_models.assert_close, least=1)


@pytest.mark.parametrize(
    'frozen_head, softcap, groups, chunk_size, scale, tolerance', (
        # f32 sums in another order.
        (False, None, 1, 3, 1.0, 1e-5), (False, 5.0, 1, 3, 1.0, 1e-5),
        (False, 5.0, 1, 64, 1.0, 1e-5), (False, None, 2, 3, 1.0, 1e-5),
        (False, 5.0, 8, 2, 1.0, 1e-5), (False, None, 8, 64, 1.0, 1e-5),
        (True, None, 1, 64, 1.0, 1e-5), (True, 5.0, 8, 64, 1.0, 1e-5),
        (True, 5.0, 2, 5, 1.0, 1e-5),
        # The running maximum has to rescale what came before. Logits of 1,500
        # are rounded by 1e-4, and so are the logarithms of the softmax.
        (True, None, 8, 64, 100.0, 1e-4), (True, 5.0, 1, 7, 100.0, 1e-4)))
def test_value_and_gradients_are_those_of_all_logits(
    frozen_head, softcap, groups, chunk_size, scale, tolerance):
  x_BTD, *rest, mask_BT = _inputs()
  # One group of the eight, and the first half of a pair, trains nothing.
  mask_BT = mask_BT.at[:_B // groups if groups > 1 else 1].set(False)
  inputs = (scale * x_BTD, *rest, mask_BT)
  most = int(mask_BT.reshape(groups, -1).sum(axis=1).max())
  value, n, (dx_BTD, dembedding_VD) = _results(
      *inputs, max_trained=most + 1, groups=groups, chunk_size=chunk_size,
      softcap=softcap, frozen_head=frozen_head)
  assert n == mask_BT.sum() and n.dtype == jnp.float32
  wanted, (wanted_dx_BTD, wanted_de_VD) = _plain_value_and_grads(
      *inputs, softcap=softcap)
  _assert_close((value, dx_BTD), (wanted, wanted_dx_BTD), tolerance)
  if frozen_head:
    assert not dembedding_VD.any()
  else:
    _assert_close(dembedding_VD, wanted_de_VD, tolerance)


def test_a_number_by_hand():
  # Two tokens of probability 1/2 each over a vocabulary of two; one trained.
  nll, n = _masked_nll(
      jnp.zeros((1, 2, 3)), jnp.ones((2, 3)), jnp.zeros((1, 2), jnp.int32),
      jnp.asarray([[False, True]]), max_trained=2)
  assert (float(n), nll.dtype) == (1.0, jnp.float32)
  np.testing.assert_allclose(nll, np.log(2), rtol=1e-6)  # f32.


def test_untrained_positions_do_not_count():
  x_BTD, embedding_VD, targets_BT, mask_BT = _inputs()
  other_BTD = jnp.where(mask_BT[..., None], x_BTD, 100.0)
  other_BT = jnp.where(mask_BT, targets_BT, 0)
  one, other = (
      _results(x, embedding_VD, t, mask_BT)[0]
      for x, t in ((x_BTD, targets_BT), (other_BTD, other_BT)))
  assert one == other  # The same numbers in the same order.


@_both_heads
@pytest.mark.parametrize('chunk_size', (4, 64))
def test_nothing_trained_is_zero(chunk_size, frozen_head):
  *inputs, mask_BT = _inputs()
  value, n, grads = _results(
      *inputs, jnp.zeros_like(mask_BT), chunk_size=chunk_size,
      frozen_head=frozen_head)
  assert (value, n) == (0.0, 0.0)
  assert all(not np.any(g) for g in grads)


@pytest.mark.parametrize('chunk_size', (1, 64))
def test_everything_trained_at_the_bound(chunk_size):
  *inputs, mask_BT = _inputs()
  inputs = (*inputs, jnp.ones_like(mask_BT))
  nll, n = _masked_nll(*inputs, max_trained=_T, groups=8, chunk_size=chunk_size)
  assert n == _B * _T
  wanted, _ = _plain_value_and_grads(*inputs)
  _assert_close(nll, wanted, 1e-5)  # f32 sums in another order.


# Chunks whose last one has room to spare, and one chunk.
@_both_heads
@pytest.mark.parametrize('groups, chunk_size', ((1, 4), (2, 64)))
def test_more_trained_tokens_than_the_bound_are_not_dropped_silently(
    groups, chunk_size, frozen_head):
  inputs = _inputs()
  most = int(inputs[3].reshape(groups, -1).sum(axis=1).max())
  for bound, is_whole in ((most, True), (most - 1, False)):
    nll, n = _masked_nll(
        *inputs, max_trained=bound, groups=groups, chunk_size=chunk_size,
        frozen_head=frozen_head)
    assert np.isfinite(nll) == is_whole
    assert n == inputs[3].sum()


@_both_heads
@pytest.mark.parametrize('position', ((0, 0), (0, 1), (5, 3)))
@pytest.mark.parametrize('chunk_size', (4, 64))
def test_not_a_number_is_seen_where_it_is_trained_only(
    position, chunk_size, frozen_head):
  x_BTD, *rest, mask_BT = _inputs()
  x_BTD = x_BTD.at[position].set(jnp.nan)
  for trained in (False, True):
    value, _, grads = _results(
        x_BTD, *rest, mask_BT.at[position].set(trained), chunk_size=chunk_size,
        frozen_head=frozen_head)
    assert np.isnan(value) == trained
    assert trained or all(np.isfinite(g).all() for g in grads)


@_both_heads
def test_bfloat16_inputs_are_summed_in_f32(frozen_head):
  wide, narrow = _inputs(), _inputs(dtype=jnp.bfloat16)
  settings = dict(chunk_size=4, frozen_head=frozen_head)
  value, _, grads = _results(*narrow, **settings)
  assert value.dtype == jnp.float32
  assert all(g.dtype == jnp.bfloat16 for g in grads)
  # Of bfloat16's 8 bits of mantissa; the sums add nothing to that.
  wanted, _, wanted_grads = _results(*wide, **settings)
  _assert_close((value, *(g.astype(jnp.float32) for g in grads)),
                (wanted, *wanted_grads), 2e-2)
  exact, *_ = _results(
      *(a.astype(jnp.float32) for a in narrow[:2]), *narrow[2:], **settings)
  np.testing.assert_allclose(value, exact, rtol=1e-5)  # Products are exact.


@pytest.mark.parametrize('frozen_head, logits, absent', (
    (False, f'f32[1,4,{_V}]', (f'48,{_V}]',)),
    (True, 'f32[1,1,12,8]', (f'12,{_V}]', '48,8]'))))
def test_only_a_chunk_of_logits_exists(frozen_head, logits, absent):
  program = str(_compiled(
      max_trained=48, chunk_size=12 if frozen_head else 4,
      frozen_head=frozen_head).trace(*_inputs()).jaxpr)
  assert logits in program
  assert not any(shape in program for shape in absent)


@pytest.mark.parametrize('wrong', (0, 2, 3))
def test_shapes_that_do_not_belong_together_are_refused(wrong):
  inputs = list(_inputs())
  inputs[wrong] = inputs[wrong][:4]
  with pytest.raises(Exception, match='B T|shape'):
    head.masked_nll(*inputs, max_trained=48)


@pytest.mark.parametrize('frozen_head, softcap', (
    (True, None), (True, 5.0), (False, None), (False, 5.0)))
def test_a_vocabulary_in_shards_gives_the_same(frozen_head, softcap):
  mesh = sharding.make_mesh(data=2, fsdp=1, tensor=4)
  inputs = _inputs()
  wanted, (wanted_dx_BTD, wanted_de_VD) = _plain_value_and_grads(
      *inputs, softcap=softcap)
  rows = NamedSharding(mesh, P('data'))
  fn = jax.jit(jax.value_and_grad(
      lambda x, e, t, m: head.masked_nll(
          x, e, t, m, max_trained=24, groups=2, chunk_size=5, softcap=softcap,
          frozen_head=frozen_head, mesh=mesh)[0], argnums=(0, 1)),
      in_shardings=(rows, NamedSharding(mesh, P('tensor')), rows, rows))
  compiled = fn.lower(*inputs).compile()
  value, (dx_BTD, de_VD) = compiled(*jax.device_put(
      inputs, compiled.input_shardings[0]))
  _assert_close((value, dx_BTD), (wanted, wanted_dx_BTD), 1e-5)  # f32 sums.
  if not frozen_head:
    _assert_close(de_VD, wanted_de_VD, 1e-5)
    return
  # No device sees another's part of the embedding but the targets' rows.
  gathered = [line for line in compiled.as_text().splitlines()
              if 'all-gather' in line]
  assert not [line for line in gathered if f'[{_V},{_D}]' in line]


@pytest.mark.parametrize('vocabulary, blocks', (
    (512, 1), (262_144, 32), (256_000, 32), (256_128, 32),
    (262_147, 1)))  # A prime.
def test_blocks_of_gemmas_vocabularies(vocabulary, blocks, monkeypatch):
  monkeypatch.undo()
  assert head._n_blocks(vocabulary) == blocks


_masked_hits = jax.jit(head.masked_hits, static_argnames=(
    'max_trained', 'groups', 'chunk_size'))


@pytest.mark.parametrize('groups, chunk_size', ((1, 3), (1, 64), (8, 2)))
def test_hits_are_the_likeliest_tokens_where_trained(groups, chunk_size):
  x_BTD, embedding_VD, targets_BT, mask_BT = _inputs(seed=3)
  best_BT = np.einsum('BTD,VD->BTV', x_BTD, embedding_VD).argmax(axis=2)
  # Half of all positions right, trained or not.
  right_BT = np.random.default_rng(4).random((_B, _T)) < 0.5
  targets_BT = jnp.asarray(np.where(right_BT, best_BT, (best_BT + 1) % _V))
  hits = _masked_hits(
      x_BTD, embedding_VD, targets_BT, mask_BT, max_trained=_B * _T // groups,
      groups=groups, chunk_size=chunk_size)
  expected = int((right_BT & np.asarray(mask_BT)).sum())
  assert 0 < expected < int(mask_BT.sum())
  assert int(hits) == expected


def test_hits_are_not_dropped_silently():
  assert np.isnan(_masked_hits(*_inputs(share=1.0), max_trained=_T))
