"""One scanned block is the library's loop: values, gradients, what is kept."""

import functools

import jax
from jax._src.ad_checkpoint import saved_residuals
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from gemma_sft import model as model_lib
from gemma_sft import sharding
from gemma_sft.adapters import lora
from gemma_sft.nn import blocks
from gemma_sft.nn import quantize

_B, _T, _L = 2, 24, 4
# Layers: local, local, global, local. The window is 8.
_DIMENSIONS = dict(num_layers=_L, local_layers_per_global=2)
_model = functools.partial(tiny_models.model, **_DIMENSIONS)
_params = functools.partial(tiny_models.params, **_DIMENSIONS)
_adapters = functools.partial(tiny_models.adapters, **_DIMENSIONS)


@functools.partial(jax.jit, static_argnames=('kind', 'execution'))
def _run(kind, execution, params, rows, adapters, dropout_keys):
  def fn(adapters):
    dropout = None if dropout_keys is None else lora.Dropout(0.5, dropout_keys)
    x_BTD = model_lib.hidden_states(
        _model(kind), params, *rows, adapters=adapters, lora_scale=2.0,
        dropout=dropout, execution=execution)
    return jnp.sum(jnp.where(rows[2][..., None] > 0, jnp.sin(x_BTD), 0))

  return jax.value_and_grad(fn)(adapters)


def _value_and_grad(kind, adapters, params=None, rows=None, dropout_keys=None,
                    **execution):
  return _run(
      kind, blocks.Execution(**execution), params or _params(kind),
      rows or tiny_models.packed_rows(), adapters, dropout_keys)


def _assert_close(got, wanted, tolerance=1e-5):  # f32 sums in another order.
  tiny_models.assert_close(got, wanted, tolerance)


# Adapters on everything, and on some layers alone.
@pytest.mark.parametrize('kind, targets', (
    *((kind, 'attn/|mlp/') for kind in ('1', '1_fused', '2', '3')),
    ('1_fused', 'layer_[13]/attn/.*(q|v)$'), ('3', 'layer_[13]/attn/.*(q|v)$')))
def test_scan_gives_the_value_and_gradient_of_the_loop(kind, targets):
  adapters = _adapters(kind, targets)
  got, wanted = (_value_and_grad(kind, adapters, layers=layers)
                 for layers in ('scan', 'loop'))
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(wanted))
  _assert_close(got, wanted, 1e-4)  # Four layers of f32 rounding, sin of it.


@pytest.mark.parametrize('kind, layers', (('1_fused', 'loop'), ('3', 'scan')))
def test_stacked_weights_are_the_same_weights(kind, layers):
  adapters = _adapters(kind)
  _assert_close(
      _value_and_grad(
          kind, adapters, blocks.stack(_params(kind)), layers=layers),
      _value_and_grad(kind, adapters, layers=layers))


def test_stacking_and_back_changes_nothing():
  params = _params('2')
  stacked = blocks.stack(params)
  assert 'layers' in stacked and 'layers' not in params
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
  merge = jax.jit(functools.partial(
      lora.merge, scaling=2.0, adapters=_adapters(
          kind, 'layer_[13]/attn|layer_2/mlp'),
      transposed_gating=_model(kind).transposed_gating))
  _assert_close(blocks.unstack(merge(blocks.stack(_params(kind)))),
                merge(_params(kind)), 1e-6)  # The same f32 sums.


@pytest.mark.parametrize('kind, remat, layers', (
    ('2', 'elementwise', 'scan'), ('3', 'elementwise', 'loop'),
    ('3', 'block', 'scan'), ('2', 'block', 'loop')))
def test_recomputing_changes_no_number(kind, remat, layers):
  adapters = _adapters(kind)
  _assert_close(_value_and_grad(kind, adapters, layers=layers, remat=remat),
                _value_and_grad(kind, adapters, layers=layers))


def _kept(remat):
  """Returns the shapes that the scanned forward keeps for each layer."""
  tokens_BT, positions_BT, segments_BT = tiny_models.packed_rows()
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
  adapters = _adapters('3', '(q|v)$')  # Random bits take long to compile.
  loop, scan = (
      _value_and_grad('3', adapters, dropout_keys=keys_B, layers=layers)
      for layers in ('loop', 'scan'))
  _assert_close(scan, loop, 1e-4)  # The same masks in both.
  assert abs(scan[0] - _value_and_grad('3', adapters, layers='scan')[0]) > 1e-3
  # The same layers with the same inputs differ only in their number.
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
  quantised = tiny_models.quantised(_params(kind), quantization)
  adapters = _adapters(kind)
  _assert_close(*(
      _value_and_grad(kind, adapters, params, layers=layers)
      for params in (quantised, model_lib.dense(quantised))))


@pytest.mark.parametrize('shape, quantization', (
    ((8, 1, 1), ''), ((2, 4, 1), 'nf4'), ((2, 2, 2), ''), ((2, 2, 2), 'nf4')))
def test_scan_over_a_mesh_is_that_of_one_device(shape, quantization):
  mesh = sharding.make_mesh(**dict(zip(sharding.AXES, shape)))
  rows = tuple(jnp.concatenate([a] * 4) for a in tiny_models.packed_rows())
  params = _params('3')
  if quantization:
    params = tiny_models.quantised(params, quantization)
  params, adapters = blocks.stack(params), _adapters('3')
  wanted = _value_and_grad('3', adapters, params, rows, layers='scan')
  got = _value_and_grad(
      '3', jax.device_put(adapters, sharding.replicated(mesh)),
      jax.device_put(params, sharding.tree_shardings(params, mesh)),
      jax.device_put(rows, jax.NamedSharding(mesh, jax.P(('data', 'fsdp')))),
      layers='scan', mesh=mesh)
  _assert_close(got, wanted, 1e-4)  # f32 sums over devices.
