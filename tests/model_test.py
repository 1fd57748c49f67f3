"""Our way through the official models gives the official logits."""

import functools
import inspect
import re
import subprocess
import sys

import conftest
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft.adapters import lora
from gemma_sft.nn import blocks

_B, _T = 2, 20  # The window of the local layers is 8.
_KINDS = tiny_models.KINDS
# Sums of f32 products in another order, relative to the largest entry.
_CLOSE = 1e-5
_model = tiny_models.model
_params = tiny_models.params
_adapters = tiny_models.adapters
_assert_close = functools.partial(tiny_models.assert_close, tolerance=_CLOSE)


def _tokens(T=_T, seed=0):
  return jnp.asarray(
      np.random.default_rng(seed).integers(3, 512, (_B, T)), jnp.int32)


def _arranged(tokens_BT):
  """Returns (tokens, positions, segment ids) of rows of one example each."""
  T = tokens_BT.shape[1]
  positions_BT = jnp.broadcast_to(jnp.arange(T)[None], tokens_BT.shape)
  return tokens_BT, positions_BT, jnp.ones_like(tokens_BT)


@functools.partial(jax.jit, static_argnames=('kind', 'layers'))
def _hidden(kind, params, arranged, adapters=None, layers='scan'):
  return model_lib.hidden_states(
      _model(kind), params, *arranged, adapters=adapters, lora_scale=2.0,
      execution=blocks.Execution(layers=layers))


def _official_logits(kind, tokens_BT):
  with jax.numpy_rank_promotion('allow'):
    return _model(kind).transformer.apply(
        {'params': _params(kind)}, tokens_BT).logits


# Gemma 4 is never scanned.
@pytest.mark.parametrize('kind, layers', (
    *((kind, 'scan') for kind in _KINDS), *(
        (kind, 'loop') for kind in _KINDS if not kind.startswith('4'))))
def test_logits_are_the_librarys_own(kind, layers):
  model, params, tokens_BT = _model(kind), _params(kind), _tokens()
  x_BTD = _hidden(kind, params, _arranged(tokens_BT), layers=layers)
  assert x_BTD.shape == (_B, _T, 32) and x_BTD.dtype == jnp.float32
  logits_BTV = model_lib.logits(model, params, x_BTD)
  wanted_BTV = _official_logits(kind, tokens_BT)
  assert np.std(wanted_BTV) > 0.1  # No comparison of zeros.
  _assert_close(logits_BTV, wanted_BTV)


def test_adapters_work_beside_plain_calls_of_the_library():
  # `Transformer.__call__` is under `nn.jit`, whose cached traces ignore
  # interceptors: after a plain call, adapters would be left out silently.
  tokens_BT = _tokens()
  plain_BTV = _official_logits('3', tokens_BT)
  adapted_BTD, base_BTD = (
      _hidden('3', _params('3'), _arranged(tokens_BT), adapters)
      for adapters in (_adapters('3'), None))
  assert np.abs(adapted_BTD - base_BTD).max() > 0.1
  # Nor does the intercepted call leak into the library's, called before or not.
  np.testing.assert_array_equal(_official_logits('3', tokens_BT), plain_BTV)
  tokens_BT = _tokens(T=6)
  base_BTD = _hidden('3', _params('3'), _arranged(tokens_BT))
  _hidden('3', _params('3'), _arranged(tokens_BT), _adapters('3'))
  _assert_close(
      _official_logits('3', tokens_BT),
      model_lib.logits(_model('3'), _params('3'), base_BTD))


@pytest.mark.parametrize('kind', _KINDS)
def test_packed_examples_do_not_see_each_other(kind):
  # Each longer than the window, so the window has to follow the positions.
  lengths = (12, 17, 11, 8)
  examples = np.split(np.asarray(_tokens(T=48)[0]), np.cumsum(lengths)[:-1])
  segments_T = np.repeat([1, 2, 3, 0], lengths)
  positions_T = np.concatenate([np.arange(n) for n in lengths])
  packed_TD = _hidden(kind, _params(kind), tuple(
      jnp.asarray(row)[None] for row in (
          np.concatenate(examples), positions_T, segments_T)))[0]
  # The rows of padding see nothing; that must not become NaN.
  assert np.isfinite(packed_TD).all()
  for i, example in enumerate(examples[:3]):
    alone_T = np.pad(example, (0, 48 - len(example)))
    alone_TD = _hidden(kind, _params(kind), tuple(
        jnp.asarray(row)[None] for row in (
            alone_T, np.arange(48), (alone_T > 0).astype(np.int32))))[0]
    _assert_close(packed_TD[segments_T == i + 1], alone_TD[:len(example)])


def test_segment_mask_by_hand():
  mask_BTS = model_lib.segment_mask(jnp.asarray([[1, 1, 2, 2, 0]]))
  np.testing.assert_array_equal(mask_BTS[0].astype(int), [
      [1, 0, 0, 0, 0],
      [1, 1, 0, 0, 0],
      [0, 0, 1, 0, 0],
      [0, 0, 1, 1, 0],
      [0, 0, 0, 0, 0]])


@pytest.mark.parametrize('kind', _KINDS)
def test_no_position_sees_a_later_one(kind):
  at = 11
  tokens_BT = _tokens()
  changed_BT = tokens_BT.at[:, at:].set(_tokens(seed=5)[:, at:])
  before_BTD, after_BTD = (
      _hidden(kind, _params(kind), _arranged(t))
      for t in (tokens_BT, changed_BT))
  np.testing.assert_array_equal(before_BTD[:, :at], after_BTD[:, :at])
  assert (np.abs(before_BTD - after_BTD)[:, at:].max(axis=2) > 1e-3).all()


@pytest.mark.parametrize('kind', ('2', '3'))
def test_no_gradient_flows_to_a_later_token(kind):
  # Rows of the embedding that occur after position 11 alone get none.
  at = 11
  tokens_BT = jnp.broadcast_to(jnp.arange(3, 3 + _T)[None], (_B, _T))

  @jax.jit
  @jax.grad
  def gradient(table_VD):
    params = dict(_params(kind))
    params['embedder'] = params['embedder'] | {'input_embedding': table_VD}
    x_BTD = model_lib.hidden_states(_model(kind), params, *_arranged(tokens_BT))
    return jnp.sum(x_BTD[:, at] ** 3)  # The norm makes the plain sum flat.

  size_V = np.abs(gradient(model_lib.embedding(_params(kind)))).max(axis=1)
  assert (size_V[3:3 + at + 1] > 0).all()
  assert not size_V[3 + at + 1:].any()


@pytest.mark.parametrize('kind', ('3', '4'))
def test_compute_follows_the_weights_dtype(kind):
  params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), _params(kind))
  x_BTD = jax.eval_shape(
      lambda p, a: model_lib.hidden_states(
          _model(kind), p, *_arranged(_tokens()), adapters=a,
          dropout=lora.make_dropout(0.5, 0, 0, jnp.arange(_B))),
      params, _adapters(kind))
  assert x_BTD.dtype == jnp.bfloat16  # Though the adapters are f32.
  assert jax.eval_shape(
      lambda p, x: model_lib.logits(_model(kind), p, x), params, x_BTD
  ).dtype == jnp.float32


_COUNTS = {
    'gemma1_2b': 2_506_434_560,
    'gemma1_7b': 8_538_074_112,
    'gemma2_2b': 2_614_636_800,
    'gemma2_9b': 9_242_164_736,
    'gemma2_27b': 27_227_718_144,
    'gemma3_270m': 268_098_176,
    'gemma3_1b': 999_885_952,
    'gemma3_4b': 3_880_099_328,
    'gemma3_12b': 11_765_788_416,
    'gemma3_27b': 27_009_002_240,
    # As the library builds them; nobody publishes a count of the text part.
    'gemma4_e2b': 4_647_449_891,
    'gemma4_e4b': 7_518_069_034,
    'gemma4_31b': 30_697_345_340}


@pytest.mark.parametrize('name', model_lib.PRESETS)
def test_presets_have_the_published_size(name):
  model = model_lib.make_model(name)
  params = model_lib.abstract_params(model)
  assert (model.name, model.generation) == (name, int(name[5]))
  assert model_lib.count_params(params) == _COUNTS[name]
  # Text alone: no tower that nothing here would train or feed.
  assert not [k for k in params if 'vision' in k or 'audio' in k]
  gating = params['layer_0']['mlp']['gating_einsum'].shape
  width, hidden = model.config.embed_dim, model.config.hidden_dim
  assert gating == ((2, hidden, width) if model.transposed_gating else
                    (2, width, hidden))


def test_dimensions_of_a_custom_model():
  model = _model('3')
  assert model_lib.embedding(_params('3')).shape == (512, 32)
  assert model.config.num_layers == 2
  kinds = [kind.name for kind in model.config.attention_types]
  assert kinds == ['LOCAL_SLIDING', 'GLOBAL']
  assert model.config.sliding_window_size == 8
  # A static argument of jitted functions.
  assert hash(model) == hash(model_lib.make_model(
      'custom', **conftest.DIMENSIONS | _KINDS['3']))


@pytest.mark.parametrize('name, changes, got', (
    ('gemma4_26b_a4b', {}, 'mixture of experts'),
    ('gemma3_270', {}, "Did you mean 'gemma3_270m'?"),
    ('llama', {}, 'one of gemma1_2b'),
    ('custom', dict(generation=5), 'generation is 5'),
    ('custom', dict(generation=3, num_kv_heads=3), '4 query heads and 3'),
    ('custom', dict(generation=3, num_kv_heads=0), '4 query heads and 0')))
def test_mistakes(name, changes, got):
  dimensions = conftest.DIMENSIONS | changes if name == 'custom' else {}
  with pytest.raises(errors.UserError, match=got):
    model_lib.make_model(name, **dimensions)


@pytest.mark.parametrize('kind', ('3', '4'))
def test_the_internals_that_are_reached_are_as_they_were(kind):
  transformer = type(_model(kind).transformer)
  # Raises on a new argument that `run_library` does not give.
  inspect.signature(transformer._encode_and_get_inputs).bind(
      None, tokens=0, positions=0, attention_mask=0)
  inspect.signature(transformer._apply_attention).bind(None, 0, 0)
  assert [*inspect.signature(transformer._apply_attention).parameters][:3] == [
      'self', 'inputs', 'cache']
  source = inspect.getsource(inspect.getmodule(transformer))
  assert 'nn.jit' in source, '__call__ may serve interceptors now'
  assert 'self._apply_attention(' in inspect.getsource(transformer)


@pytest.mark.parametrize('kind', _KINDS)
def test_every_projection_is_an_einsum_that_is_adapted(kind):
  # A layer of another class would be left out without a word.
  calls = set()

  def intercept(next_fun, args, kwargs, context):
    module = context.module
    if type(module).__name__ == 'Einsum' and context.method_name == '__call__':
      calls.add('/'.join((*module.path, module.weight_name)))
    return next_fun(*args, **kwargs)

  with nn.intercept_methods(intercept):
    model_lib._init_shapes.__wrapped__(_model(kind))
  flat = flax.traverse_util.flatten_dict(_params(kind), sep='/')
  names = {name for name, leaf in flat.items() if leaf.ndim >= 2}
  # Embeddings, and Gemma 4's small gates, have no adapter.
  assert {n for n in names if not re.search('embedder|per_layer', n)} == {
      n for n in calls if not re.search('embedder|per_layer', n)}


def test_tensorflow_is_not_imported():
  script = """
import sys
from gemma_sft import batches, loss, model, optimizer, sharding
from gemma_sft.generation import generate
model.abstract_params(model.make_model(
    'custom', generation=4, vocab_size=8, num_layers=1, embed_dim=8,
    hidden_dim=8, num_heads=2, num_kv_heads=1, head_dim=4))
print(set(sys.modules) & {'tensorflow', 'keras', 'tensorflow_datasets'})
"""
  done = subprocess.run(
      [sys.executable, '-c', script], check=True, capture_output=True,
      text=True, cwd=conftest.ROOT)
  assert done.stdout == 'set()\n'
