"""One scanned block is the library's loop: values, gradients, what is kept."""

import functools

import conftest
import jax
from jax._src.ad_checkpoint import saved_residuals
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_sft import model as model_lib
from gemma_sft import sharding
from gemma_sft.adapters import lora
from gemma_sft.nn import blocks
from gemma_sft.nn import quantize

_B, _T, _L = 2, 24, 5
# Layers: local, local, global, local, local. The window is 8.
_DIMENSIONS = conftest.DIMENSIONS | dict(
    num_layers=_L, local_layers_per_global=2)
_KINDS = {
    '1': dict(generation=1),
    '1_fused': dict(generation=1, num_kv_heads=4),
    '2': dict(generation=2),
    '3': dict(generation=3),
}
_GEMMA_4 = {'4': dict(generation=4)}  # Is never scanned.


@functools.cache
def _model(kind):
  return model_lib.make_model(
      'custom', **_DIMENSIONS | (_KINDS | _GEMMA_4)[kind])


@functools.cache
def _params(kind):
  return conftest.make_params(_model(kind))


def _adapters(kind, targets='attn/|mlp/'):
  adapters = lora.init_adapters(
      _params(kind), rank=3, targets=targets, seed=0,
      transposed_gating=_model(kind).transposed_gating)
  rng = np.random.default_rng(1)
  return jax.tree.map(
      lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32),
      adapters)


def _packed():
  """Returns (tokens, positions, segment ids): two examples a row, padding."""
  rng = np.random.default_rng(0)
  tokens_BT = rng.integers(3, 512, (_B, _T)).astype(np.int32)
  positions_BT = np.zeros((_B, _T), np.int32)
  segments_BT = np.zeros((_B, _T), np.int32)
  for row, cut in enumerate((9, 13)):
    positions_BT[row, :cut] = np.arange(cut)
    positions_BT[row, cut:-2] = np.arange(_T - 2 - cut)
    segments_BT[row, :cut], segments_BT[row, cut:-2] = 1, 2
  return tuple(map(jnp.asarray, (tokens_BT, positions_BT, segments_BT)))


def _value_and_grad(kind, adapters, execution, params=None, dropout=None):
  tokens_BT, positions_BT, segments_BT = _packed()

  def fn(adapters):
    x_BTD = model_lib.hidden_states(
        _model(kind), params or _params(kind), tokens_BT, positions_BT,
        segments_BT, adapters=adapters, lora_scale=2.0, dropout=dropout,
        execution=execution)
    return jnp.sum(jnp.where(segments_BT[..., None] > 0, jnp.sin(x_BTD), 0))

  return jax.jit(jax.value_and_grad(fn))(adapters)


def _assert_close(got, wanted, tolerance=1e-5):  # f32 sums in another order.
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    g, w = np.asarray(g), np.asarray(w)
    np.testing.assert_allclose(
        g, w, rtol=0, atol=tolerance * max(1e-3, np.abs(w).max()))


# Adapters on everything, and on some layers alone.
@pytest.mark.parametrize('targets', ('attn/|mlp/', 'layer_[13]/attn/.*(q|v)$'))
@pytest.mark.parametrize('kind', _KINDS)
def test_scan_gives_the_value_and_gradient_of_the_loop(kind, targets):
  adapters = _adapters(kind, targets)
  wanted = _value_and_grad(kind, adapters, blocks.Execution(layers='loop'))
  got = _value_and_grad(kind, adapters, blocks.Execution(layers='scan'))
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(wanted))
  _assert_close(got, wanted, 1e-4)  # Five layers of f32 rounding, sin of it.


@pytest.mark.parametrize('layers', ('loop', 'scan'))
@pytest.mark.parametrize('kind', ('1_fused', '3'))
def test_stacked_weights_are_the_same_weights(kind, layers):
  execution, adapters = blocks.Execution(layers=layers), _adapters(kind)
  wanted = _value_and_grad(kind, adapters, execution)
  stacked = blocks.stack(_params(kind))
  _assert_close(
      _value_and_grad(kind, adapters, execution, stacked), wanted)


def test_stacking_and_back_changes_nothing():
  params = _params('2')
  stacked = blocks.stack(params)
  assert blocks.is_stacked(stacked) and not blocks.is_stacked(params)
  assert stacked['layers']['attn']['q_einsum']['w'].shape == (_L, 4, 32, 16)
  assert blocks.stack(stacked) is stacked
  back = blocks.unstack(stacked)
  assert sorted(back) == sorted(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)
  abstract = blocks.stack(model_lib.abstract_params(_model('2')))
  assert jax.tree.map(lambda a: a.shape, abstract) == jax.tree.map(
      lambda a: a.shape, stacked)


@pytest.mark.parametrize('kind', ('1_fused', '2', '3'))
def test_merging_into_stacked_weights_is_merging(kind):
  adapters = _adapters(kind, 'layer_[13]/attn|layer_2/mlp')
  transposed = _model(kind).transposed_gating
  wanted = lora.merge(
      _params(kind), adapters, 2.0, transposed_gating=transposed)
  got = lora.merge(
      blocks.stack(_params(kind)), adapters, 2.0, transposed_gating=transposed)
  _assert_close(blocks.unstack(got), wanted, 1e-6)  # The same f32 sums.


@pytest.mark.parametrize('layers', ('loop', 'scan'))
@pytest.mark.parametrize('remat', ('elementwise', 'block'))
@pytest.mark.parametrize('kind', ('2', '3'))
def test_rematerialisation_changes_no_number(kind, remat, layers):
  adapters = _adapters(kind)
  wanted = _value_and_grad(kind, adapters, blocks.Execution(layers=layers))
  _assert_close(_value_and_grad(
      kind, adapters, blocks.Execution(layers=layers, remat=remat)), wanted)


def _kept(remat):
  """Returns the shapes that the scanned forward keeps for each layer."""
  tokens_BT, positions_BT, segments_BT = _packed()
  kept = saved_residuals(
      lambda adapters: model_lib.hidden_states(
          _model('3'), _params('3'), tokens_BT, positions_BT, segments_BT,
          adapters=adapters, execution=blocks.Execution(
              layers='scan', remat=remat)), _adapters('3'))
  return sorted(aval.shape for aval, source in kept
                if aval.shape[:3] == (_L, _B, _T) and 'argument' not in source)


def test_what_each_policy_keeps():
  D, F, N, K, H, R = 32, 48, 4, 2, 16, 3
  stream = (_L, _B, _T, D)
  assert _kept('block') == [stream]
  everything, some = _kept('none'), _kept('elementwise')
  assert len(some) < len(everything) / 2
  # Results of projections and of attention, nothing elementwise.
  assert set(some) <= {
      stream, (_L, _B, _T, 2, F), (_L, _B, _T, N, H), (_L, _B, _T, K, H),
      (_L, 2, _B, _T, K, H), (_L, _B, _T, R)}


def test_dropout_draws_another_mask_in_each_layer():
  keys_B = jax.random.split(jax.random.key(0), _B)
  dropout = lora.Dropout(0.5, keys_B)
  adapters = _adapters('3')
  loop, scan = (
      _value_and_grad('3', adapters, blocks.Execution(layers=layers),
                      dropout=dropout) for layers in ('loop', 'scan'))
  _assert_close(scan, loop, 1e-4)  # The same masks in both.
  assert abs(float(scan[0] - _value_and_grad(
      '3', adapters, blocks.Execution(layers='scan'))[0])) > 1e-3
  # Alike layers with alike inputs, told apart by their number alone.
  x_BTD = jnp.ones((_B, _T, 32))
  factors = {'linear': {'down': {
      'a': jnp.ones((32, 3)), 'b': jnp.ones((3, 32))}}}
  first, second = (
      lora.add_update({'mlp': factors}, ('mlp', 'linear'), x_BTD, x_BTD, 1.0,
                      lora.Dropout(0.5, keys_B, layer)) for layer in (0, 1))
  assert np.abs(first - second).max() > 0.1


@pytest.mark.parametrize('kind, layers, quantization', (
    *(('3', 'scan', kind) for kind in quantize.KINDS), ('3', 'loop', 'int8'),
    ('2', 'scan', 'nf4'), ('1_fused', 'scan', 'nf4'), ('4', 'loop', 'int4')))
def test_a_quantised_base_computes_with_what_it_dequantises_to(
    kind, layers, quantization):
  def each(path, leaf):
    name = '/'.join(k.key for k in path)
    if not quantize.is_quantized(name):
      return leaf
    return quantize.quantize(np.asarray(leaf), quantization)

  quantised = jax.tree_util.tree_map_with_path(each, _params(kind))
  plain = jax.tree.map(
      lambda leaf: quantize.dequantize(leaf, jnp.float32)
      if isinstance(leaf, quantize.Quantized) else leaf, quantised,
      is_leaf=lambda leaf: isinstance(leaf, quantize.Quantized))
  execution, adapters = blocks.Execution(layers=layers), _adapters(kind)
  _assert_close(
      _value_and_grad(kind, adapters, execution, quantised),
      _value_and_grad(kind, adapters, execution, plain))


@pytest.mark.parametrize('shape', ((8, 1, 1), (2, 4, 1), (2, 2, 2)))
@pytest.mark.parametrize('quantization', ('', 'nf4'))
def test_scan_over_a_mesh_is_that_of_one_device(shape, quantization):
  mesh = sharding.make_mesh(**dict(zip(sharding.AXES, shape)))
  tokens, positions, segments = (
      jnp.concatenate([a] * 4) for a in _packed())
  params = _params('3')
  if quantization:
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: quantize.quantize(np.asarray(leaf), quantization)
        if quantize.is_quantized('/'.join(k.key for k in path)) else leaf,
        params)
  params = blocks.stack(params)
  adapters = _adapters('3')

  def run(params, rows, adapters, mesh):
    def fn(adapters):
      x_BTD = model_lib.hidden_states(
          _model('3'), params, *rows, adapters=adapters,
          execution=blocks.Execution(layers='scan', mesh=mesh))
      return jnp.sum(jnp.where(rows[2][..., None] > 0, jnp.sin(x_BTD), 0))
    return jax.jit(jax.value_and_grad(fn))(adapters)

  wanted = run(params, (tokens, positions, segments), adapters, None)
  placed = jax.device_put(params, sharding.tree_shardings(params, mesh))
  rows = jax.device_put((tokens, positions, segments), jax.NamedSharding(
      mesh, jax.P(('data', 'fsdp'))))
  got = run(placed, rows, jax.device_put(
      adapters, sharding.replicated(mesh)), mesh)
  _assert_close(got, wanted, 1e-4)  # f32 sums over devices.
