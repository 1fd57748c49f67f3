"""Adapters do what PEFT's do, to the projection that they name alone."""

import functools
import math

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft.adapters import lora

_KINDS = ('1', '1_fused', '2', '3', '4')
_SCALE = 1.5
_T = 12
_model = tiny_models.model
_params = tiny_models.params
_fresh = tiny_models.fresh_adapters
_trained = tiny_models.adapters


def _merge(kind, adapters, params=None):
  return lora.merge(params or _params(kind), adapters, _SCALE,
                    transposed_gating=_model(kind).transposed_gating)


def _names(adapters):
  flat = flax.traverse_util.flatten_dict(adapters, sep='/')
  return sorted(name[:-2] for name in flat if name.endswith('/a'))


@functools.partial(jax.jit, static_argnames='kind')
def _hidden(kind, params, adapters=None):
  tokens_BT = jnp.asarray(
      np.random.default_rng(0).integers(3, 512, (1, _T)), jnp.int32)
  return model_lib.hidden_states(
      _model(kind), params, tokens_BT, jnp.arange(_T)[None],
      jnp.ones_like(tokens_BT), adapters=adapters, lora_scale=_SCALE)


_assert_close = tiny_models.assert_close


@pytest.mark.parametrize('kind', _KINDS)
def test_in_the_model(kind):
  base_TD = _hidden(kind, _params(kind))
  # The first step sees the base: zeros are added, in f32.
  _assert_close(_hidden(kind, _params(kind), _fresh(kind)), base_TD, 1e-6)
  adapters = _trained(kind)
  adapted_TD = _hidden(kind, _params(kind), adapters)
  assert np.abs(adapted_TD - base_TD).max() > 0.1
  # Sums of f32 products in another order.
  merged_TD = _hidden(kind, _merge(kind, adapters))
  _assert_close(adapted_TD, merged_TD, 1e-5)


@pytest.mark.parametrize('kind', ('3', '1_fused'))
def test_each_adapter_moves_the_model_as_its_merged_weight_does(kind):
  # One at a time, so that none can take another's place.
  base_TD = _hidden(kind, _params(kind))
  everything = flax.traverse_util.flatten_dict(_trained(kind))
  zeros = jax.tree.map(jnp.zeros_like, everything)
  for path in everything:
    if path[-1] != 'a' or path[0] != 'layer_0':
      continue
    pair = {(*path[:-1], part): everything[*path[:-1], part]
            for part in ('a', 'b')}
    one = flax.traverse_util.unflatten_dict(zeros | pair)
    adapted_TD = _hidden(kind, _params(kind), one)
    assert np.abs(adapted_TD - base_TD).max() > 1e-3, path
    _assert_close(adapted_TD, _hidden(kind, _merge(kind, one)), 1e-5)


def test_an_adapter_of_k_leaves_v_alone():
  adapters = _trained('3', 'layer_1/attn/kv_einsum/k')
  assert _names(adapters) == ['layer_1/attn/kv_einsum/k']
  factors = adapters['layer_1']['attn']['kv_einsum']['k']
  before = _params('3')['layer_1']['attn']['kv_einsum']['w']
  by_hand = before.at[0].add(
      _SCALE * jnp.einsum('DR,RKH->KDH', factors['a'], factors['b']))
  merged = _merge('3', adapters)['layer_1']['attn']['kv_einsum']['w']
  np.testing.assert_allclose(merged, by_hand, rtol=0, atol=1e-6)  # f32.
  np.testing.assert_array_equal(merged[1], before[1])
  # The forward pass too.
  _assert_close(_hidden('3', _params('3'), adapters),
                _hidden('3', _merge('3', adapters)), 1e-5)


def _as_linear(kind, layer, name):
  """Returns the torch-like weight (out, in) of a projection."""
  def heads(w):  # (N, D, H) -> (N * H, D)
    w = np.asarray(w)
    return w.transpose(0, 2, 1).reshape(-1, w.shape[1])

  attn, mlp = layer['attn'], layer['mlp']
  if name == 'o':
    w = np.asarray(attn['attn_vec_einsum']['w'])
    return w.reshape(-1, w.shape[-1]).T
  if name == 'down':
    return np.asarray(mlp['linear']).T
  if name in ('gate', 'up'):
    w = np.asarray(mlp['gating_einsum'])[('gate', 'up').index(name)]
    return w if _model(kind).transposed_gating else w.T
  if kind == '1_fused':
    return heads(attn['qkv_einsum']['w'][('q', 'k', 'v').index(name)])
  if name == 'q':
    return heads(attn['q_einsum']['w'])
  return heads(attn['kv_einsum']['w'][('k', 'v').index(name)])


@pytest.mark.parametrize('kind', ('1_fused', '2', '3'))
def test_merging_is_the_formula_of_peft(kind):
  adapters = _trained(kind)
  merged = _merge(kind, adapters)
  flat = flax.traverse_util.flatten_dict(adapters)
  for *path, name, part in flat:
    if part == 'b':
      R = flat[*path, name, 'b'].shape[0]
      lora_A = np.asarray(flat[*path, name, 'a']).reshape(-1, R).T  # (R, in)
      lora_B = np.asarray(flat[*path, name, 'b']).reshape(R, -1).T  # (out, R)
      before, after = (_as_linear(kind, tree[path[0]], name)
                       for tree in (_params(kind), merged))
      np.testing.assert_allclose(  # Entries of about 1, in f32.
          after, before + _SCALE * lora_B @ lora_A, rtol=0, atol=1e-6)
  assert {path[-2] for path in flat} == {
      'q', 'k', 'v', 'o', 'gate', 'up', 'down'}


def test_what_has_no_adapter_is_not_copied():
  flatten = functools.partial(flax.traverse_util.flatten_dict, sep='/')
  before = flatten(_params('3'))
  merged = flatten(_merge('3', _trained('3', 'layer_1/attn/q_einsum')))
  changed = [path for path in merged if merged[path] is not before[path]]
  assert changed == ['layer_1/attn/q_einsum/w']
  assert all(leaf is before[path]
             for path, leaf in flatten(_params('3')).items())


def test_merging_sums_in_f32_and_keeps_the_dtype():
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), _params('3'))
  adapters = _trained('3', 'layer_0/mlp/linear')
  merged = _merge('3', adapters, params)['layer_0']['mlp']['linear']
  assert merged.dtype == jnp.bfloat16
  factors = adapters['layer_0']['mlp']['linear']['down']
  weight = np.asarray(params['layer_0']['mlp']['linear'], np.float32)
  exact = weight + _SCALE * np.einsum('FR,RD->FD', factors['a'], factors['b'])
  np.testing.assert_array_equal(merged, jnp.asarray(exact, jnp.bfloat16))


_ATTN = ['attn_vec_einsum/o', 'kv_einsum/k', 'kv_einsum/v', 'q_einsum/q']
_MLP = ['gating_einsum/gate', 'gating_einsum/up', 'linear/down']


@pytest.mark.parametrize('kind, targets, layer_0, layer_1', (
    ('3', 'attn/', _ATTN, _ATTN),
    ('3', 'attn/|mlp/', _ATTN + _MLP, _ATTN + _MLP),
    ('3', '/(q|v)$', *2 * (['kv_einsum/v', 'q_einsum/q'],)),
    ('3', 'layer_1/.*/(o|down)$', [], ['attn_vec_einsum/o', 'linear/down']),
    ('1_fused', '/(q|v)$', *2 * (['qkv_einsum/q', 'qkv_einsum/v'],))))
def test_targets(kind, targets, layer_0, layer_1):
  assert _names(_fresh(kind, targets)) == [
      f'layer_{i}/{"mlp" if name in _MLP else "attn"}/{name}'
      for i, names in enumerate((layer_0, layer_1)) for name in names]


def test_the_number_of_adapter_weights():
  D, F, N, K, H, R, layers = 32, 48, 4, 2, 16, 3, 2
  attention = (D + N * H) * 2 + (D + K * H) * 2  # q, o; k, v.
  mlp = (D + F) * 3  # gate, up, down.
  for kind in ('2', '3'):  # Both layouts of the gate.
    assert model_lib.count_params(_fresh(kind)) == (
        layers * R * (attention + mlp)) == 3360


def test_scale():
  assert lora.scale(16, 8.0, False) == 0.5
  assert lora.scale(16, 8.0, True) == 2.0  # 8 / sqrt(16), rsLoRA.


def test_fresh_adapters():
  adapters = flax.traverse_util.flatten_dict(_fresh('3', rank=64))
  for (*path, part), leaf in adapters.items():
    assert leaf.dtype == jnp.float32
    if part == 'b':
      assert not leaf.any()
      continue
    # Uniform in +-1/sqrt(fan in): its deviation is the bound over sqrt(3).
    bound = 1 / math.sqrt(math.prod(leaf.shape[:-1]))
    assert np.abs(leaf).max() <= bound
    # 2,048 draws at least: 5 % is more than three deviations of the estimate.
    np.testing.assert_allclose(np.std(leaf) * math.sqrt(3), bound, rtol=0.05)
    assert path[-1] in 'q k v o gate up down'.split()


def test_each_a_is_a_function_of_seed_and_path():
  def a_of(adapters):
    return {name: np.asarray(leaf) for name, leaf in
            flax.traverse_util.flatten_dict(adapters, sep='/').items()
            if name.endswith('/a')}
  everything, other = a_of(_fresh('3')), a_of(_fresh('3', seed=1))
  # Whatever else is adapted.
  for name, leaf in a_of(_fresh('3', '/q$')).items():
    np.testing.assert_array_equal(leaf, everything[name])
  assert len({leaf.tobytes() for leaf in (
      *everything.values(), *other.values())}) == 2 * len(everything)


def test_targets_that_match_nothing_are_refused():
  with pytest.raises(errors.UserError, match=(
      "targets is 'query', which matches no projection")):
    _fresh('3', targets='query')


def test_what_no_forward_reads_gets_no_adapter():
  # From shapes alone.
  model = _model('4', num_layers=6, shared_kv_layers=2)
  adapters = jax.eval_shape(lambda: lora.init_adapters(
      model_lib.abstract_params(model), rank=2, targets='attn/', seed=0,
      transposed_gating=True, unused=model.unused_weights))
  kinds = [set(adapters[f'layer_{i}']['attn']) for i in range(6)]
  assert kinds[3] == {'q_einsum', 'kv_einsum', 'attn_vec_einsum'}
  assert kinds[4] == kinds[5] == {'q_einsum', 'attn_vec_einsum'}


_LINEAR = ('layer_0', 'mlp', 'linear')


def _dropped(seed, step, rows, path=_LINEAR, T=50, F=32):
  """Returns ones (B, T, F) through dropout and an adapter that is identity."""
  x = y = jnp.ones((len(rows), T, F))
  a, b, name = jnp.eye(F), jnp.eye(F), 'down'
  if path[-1] == 'q_einsum':
    y, b, name = y[:, :, None], b[:, None, :], 'q'
  adapters = flax.traverse_util.unflatten_dict(
      {(*path, name, 'a'): a, (*path, name, 'b'): b})
  y = lora.add_update(
      adapters, path, x, jnp.zeros_like(y), 1.0,
      lora.make_dropout(0.25, seed, step, jnp.asarray(rows)))
  return np.asarray(y).reshape(x.shape)


def test_dropout_keeps_the_mean():
  dropped = _dropped(0, 0, range(8))
  assert set(np.unique(dropped)) == {0, np.float32(1 / 0.75)}
  # 12,800 draws of deviation 0.58: 0.02 is four deviations of the mean.
  np.testing.assert_allclose(dropped.mean(), 1, atol=0.02)


def test_dropout_is_a_function_of_seed_step_and_row():
  def draw(seed=0, step=0, row=0, **more):
    return _dropped(seed, step, [row], T=4, **more).tobytes()
  variants = {draw(), draw(seed=1), draw(step=1), draw(row=1),
              draw(path=('layer_1', 'mlp', 'linear')),
              draw(path=('layer_0', 'attn', 'q_einsum'))}
  assert len(variants) == 6 and draw() in variants


def test_dropout_does_not_depend_on_the_microbatches():
  tokens_BT = jnp.asarray(
      np.random.default_rng(0).integers(3, 512, (8, 6)), jnp.int32)
  adapters = _trained('3')

  @jax.jit
  def hidden(tokens_BT, rows):
    return model_lib.hidden_states(
        _model('3'), _params('3'), tokens_BT,
        jnp.broadcast_to(jnp.arange(6)[None], tokens_BT.shape),
        jnp.ones_like(tokens_BT), adapters=adapters, lora_scale=_SCALE,
        dropout=lora.make_dropout(0.3, 0, 5, rows))

  rows = jnp.arange(40, 48)
  at_once_BTD = hidden(tokens_BT, rows)
  for b in range(8):
    one_BTD = hidden(tokens_BT[b:b + 1], rows[b:b + 1])
    _assert_close(at_once_BTD[b:b + 1], one_BTD, 1e-5)  # f32.
  assert np.abs(at_once_BTD - hidden(tokens_BT, rows + 8)).max() > 0.01
