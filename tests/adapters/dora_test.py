"""DoRA: what defines it (arXiv 2402.09353), and that all of the code agrees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from gemma_sft import model as model_lib
from gemma_sft.adapters import dora
from gemma_sft.adapters import lora
from gemma_sft.adapters import projections
from gemma_sft.nn import blocks

_SCALE, _T = 2.0, 12
# The gating of 2 is not transposed.
_KINDS = ('1_fused', '2', '3', '4')
_params = tiny_models.params


def _fresh(kind, targets='attn/|mlp/', params=None):
  return lora.add_magnitudes(
      tiny_models.fresh_adapters(kind, targets), params or _params(kind),
      transposed_gating=tiny_models.model(kind).transposed_gating)


def _trained(kind, targets='attn/|mlp/'):
  rng = np.random.default_rng(1)
  return jax.tree.map(
      lambda leaf: leaf + rng.normal(0, 0.2, leaf.shape).astype(np.float32),
      _fresh(kind, targets))


@functools.partial(jax.jit, static_argnames=('kind', 'layers'))
def _hidden(kind, params, adapters=None, layers='scan'):
  tokens_BT = jnp.asarray(
      np.random.default_rng(0).integers(3, 512, (2, _T)), jnp.int32)
  return model_lib.hidden_states(
      tiny_models.model(kind), params, tokens_BT,
      jnp.broadcast_to(jnp.arange(_T)[None], (2, _T)),
      jnp.ones_like(tokens_BT), adapters=adapters, lora_scale=_SCALE,
      execution=blocks.Execution(layers=layers))


def _merge(kind, adapters, stacked=False):
  params = blocks.stack(_params(kind)) if stacked else _params(kind)
  return lora.merge(params, adapters, _SCALE,
                    transposed_gating=tiny_models.model(kind).transposed_gating)


# f32 sums in another order.
_assert_close = functools.partial(tiny_models.assert_close, tolerance=1e-5)


def test_by_hand():
  # One output, two inputs: W + s B A = (3, 4), whose norm is 5.
  projection = projections.BY_LAYER['linear'][0]
  weight_FD = jnp.asarray([[1.0], [4.0]])
  a_FR, b_RD = jnp.asarray([[1.0], [0.0]]), jnp.asarray([[1.0]])
  m_D = jnp.asarray([10.0])
  factor_D = dora.factor(projection, weight_FD, a_FR, b_RD, m_D, 2.0)
  np.testing.assert_allclose(factor_D, [2.0], rtol=1e-6)  # f32.
  total_FD = weight_FD + projections.update(projection, a_FR, b_RD, 2.0)
  np.testing.assert_allclose(
      dora.rescale_weight(projection, total_FD, m_D), [[6.0], [8.0]], rtol=1e-6)


@pytest.mark.parametrize('kind', _KINDS)
def test_it_begins_as_the_untouched_model(kind):
  _assert_close(
      _hidden(kind, _params(kind), _fresh(kind)), _hidden(kind, _params(kind)))


@pytest.mark.parametrize('layers', ('loop', 'scan'))
@pytest.mark.parametrize('kind', _KINDS)
def test_merged_weights_compute_the_same(kind, layers):
  adapters = _trained(kind)
  got = _hidden(kind, _params(kind), adapters, layers)
  # Merging rounds, in f32.
  _assert_close(got, _hidden(kind, _merge(kind, adapters)), tolerance=1e-4)
  # The magnitudes did something.
  plain = jax.tree_util.tree_map_with_path(
      lambda path, leaf, fresh: fresh if path[-1].key == 'm' else leaf,
      adapters, _fresh(kind))
  assert np.abs(got - _hidden(kind, _params(kind), plain)).max() > 0.05


def test_the_columns_of_a_merged_weight_have_the_trained_magnitudes():
  adapters = _trained('3')
  merged, layer = _merge('3', adapters)['layer_1'], adapters['layer_1']
  for slot, name in enumerate('kv'):
    _assert_close(
        np.linalg.norm(merged['attn']['kv_einsum']['w'][slot], axis=1),
        np.abs(layer['attn']['kv_einsum'][name]['m']))
  _assert_close(np.linalg.norm(merged['mlp']['linear'], axis=0),
                np.abs(layer['mlp']['linear']['down']['m']))


def test_the_norm_is_a_constant_of_the_gradient():
  # Then the gradient of B is m / ||.|| times that of plain LoRA, section 4.3.
  rng = np.random.default_rng(0)
  weight_FD, a_FR, b_RD, x_BTF = (
      jnp.asarray(rng.normal(0, 1, shape), jnp.float32)
      for shape in ((6, 5), (6, 2), (2, 5), (1, 3, 6)))
  m_D = jnp.arange(1.0, 6.0)
  y_BTD = jnp.einsum('BTF,FD->BTD', x_BTF, weight_FD)

  def out(b_RD, factors):
    here = {'mlp': {'linear': {'down': {'a': a_FR, 'b': b_RD, **factors}}}}
    return jnp.sum(lora.add_update(
        here, ('mlp', 'linear'), x_BTF, y_BTD, 2.0, None,
        weight=lambda: weight_FD)[..., 3])

  plain = jax.grad(out)(b_RD, {})
  got = jax.grad(out)(b_RD, {'m': m_D})
  norm = np.linalg.norm(weight_FD + 2.0 * a_FR @ b_RD, axis=0)
  np.testing.assert_allclose(got, plain * (m_D / norm)[None], rtol=1e-5)


@pytest.mark.parametrize('layers', ('loop', 'scan'))
def test_layers_without_an_adapter_stay_as_they_are(layers):
  adapters = _trained('3', 'layer_1/')
  assert list(adapters) == ['layer_1']
  merged = _hidden('3', _merge('3', adapters))
  # Merging rounds, in f32.
  _assert_close(
      _hidden('3', _params('3'), adapters, layers), merged, tolerance=1e-4)
  _assert_close(_hidden('3', _merge('3', adapters, stacked=True)), merged)
  grads = jax.grad(lambda a: _hidden('3', _params('3'), a, layers).sum())(
      adapters)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_magnitudes_of_a_quantised_base_are_those_it_dequantises_to():
  quantised = tiny_models.quantised(_params('3'), 'int4')
  adapters = _fresh('3', params=model_lib.dense(quantised))
  _assert_close(_hidden('3', quantised, adapters), _hidden('3', quantised))
