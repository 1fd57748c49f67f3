"""Codes, errors and gradients of quantised weights; none is kept in full."""

import functools
import gc

import conftest
from flax import traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from configs import tiny
from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft import sharding
from gemma_sft import train
from gemma_sft.adapters import lora
from gemma_sft.exports import arrays as arrays_lib
from gemma_sft.nn import blocks
from gemma_sft.nn import quantize
from gemma_sft.run import base as base_lib
from gemma_sft.run import restore
from gemma_sft.weights import load
from gemma_sft.weights import names
from gemma_sft.weights import safetensors_file

# Appendix E of arXiv 2305.14314.
_PUBLISHED_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0)

# Grids of each kind in units of the block's largest magnitude.
_LEVELS = {
    'int8': np.arange(-127, 128) / 127,
    'int4': np.arange(-7, 8) / 7,
    'nf4': np.array(_PUBLISHED_NF4)}
_BLOCKS = {'int8': 128, 'int4': 64, 'nf4': 64}
_LARGEST = {'int8': 127, 'int4': 7, 'nf4': 1}

_kinds = pytest.mark.parametrize('kind', quantize.KINDS)


def _normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


_dequantize = jax.jit(quantize.dequantize, static_argnums=1)


def _full(quantized, dtype=jnp.float32):
  return np.asarray(_dequantize(quantized, dtype))


def test_nf4_levels_are_the_published_ones():
  # Theirs are quantiles in float32.
  np.testing.assert_allclose(
      quantize.nf4_levels(), _PUBLISHED_NF4, rtol=0, atol=2e-7)


# In a block with the largest magnitude m the others are normal within [-m, m]:
# the rms of their distance to the grid times m, over the distribution of m,
# whose CDF is (2 Phi(m) - 1)^block; integrated numerically.
@pytest.mark.parametrize('kind, expected', (
    ('int8', 0.006461), ('int4', 0.10755), ('nf4', 0.09196)))
def test_error_of_normal_weights_is_that_of_the_theory(kind, expected):
  weight = _normal(512, 1024)
  error = np.sqrt(np.mean((_full(quantize.quantize(weight, kind)) - weight)**2))
  # Scales are rounded up to bfloat16: up to 0.8 % more, and the sum over 4,096
  # blocks or more is within 0.5 %.
  np.testing.assert_allclose(error, expected, rtol=0.015)


@_kinds
def test_each_code_is_the_nearest_and_nothing_is_clipped(kind):
  weight = _normal(3, 2, 256)
  quantized = quantize.quantize(weight, kind)
  assert quantized.scales.shape == (3, 2, 256 // _BLOCKS[kind])
  scales = np.repeat(
      quantized.scales.astype(np.float32), _BLOCKS[kind], axis=-1)
  levels = _LEVELS[kind] * _LARGEST[kind]
  grid = (levels * scales[..., None]).astype(np.float32)
  assert (np.abs(weight) <= grid.max(axis=-1) * (1 + 1e-7)).all()
  nearest = np.take_along_axis(
      grid, np.abs(grid - weight[..., None]).argmin(axis=-1)[..., None],
      axis=-1)[..., 0]
  np.testing.assert_allclose(_full(quantized), nearest, rtol=1e-6)


@_kinds
def test_what_the_grid_holds_comes_back_exactly(kind):
  rng = np.random.default_rng(1)
  levels = np.array(quantize.nf4_levels(), np.float32)
  if kind != 'nf4':
    levels = np.rint(_LEVELS[kind] * _LARGEST[kind]).astype(np.float32)
  # Each block holds its grid's largest; scales are powers of two; one is 0.
  blocks = levels[rng.integers(0, len(levels), (2, 5, _BLOCKS[kind]))]
  blocks[..., 7] = levels[-1]
  weight = blocks * 2.0 ** np.arange(-5, 5).reshape(2, 5, 1)
  weight[0, 0] = 0
  weight = weight.reshape(2, -1).astype(np.float32)
  quantized = quantize.quantize(weight, kind)
  np.testing.assert_array_equal(_full(quantized), weight)
  again = quantize.quantize(_full(quantized), kind)
  jax.tree.map(np.testing.assert_array_equal, again, quantized)


@pytest.mark.parametrize('kind, last', (
    *((kind, last) for kind in ('int8', 'int4') for last in (2, 48, 194, 320)),
    ('nf4', 100)))
def test_last_axes_that_blocks_do_not_divide(kind, last):
  weight = _normal(3, last)
  quantized = quantize.quantize(weight, kind)
  block = last // quantized.scales.shape[-1]
  assert last % block == 0 and block <= _BLOCKS[kind]
  assert quantized.shape == weight.shape
  assert quantized.size == weight.size
  assert quantized.values.nbytes == weight.size // (1 if kind == 'int8' else 2)
  assert np.abs(_full(quantized) - weight).max() < 0.2 * np.abs(weight).max()


def test_mistakes_are_named():
  weight = _normal(4, 7)
  for kind in ('int4', 'nf4'):
    with pytest.raises(errors.UserError, match=r'\(4, 7\).* odd'):
      quantize.quantize(weight, kind)
  np.testing.assert_allclose(
      _full(quantize.quantize(weight, 'int8')), weight, atol=0.02)
  for value in (np.nan, np.inf):
    weight[1, 2] = value
    with pytest.raises(errors.UserError, match='not finite'):
      quantize.quantize(weight, 'int8')


def test_what_is_quantised_is_what_can_have_an_adapter(model):
  abstract = model_lib.abstract_params(model)
  assert {path.removesuffix('/w')
          for path in traverse_util.flatten_dict(abstract, sep='/')
          if quantize.is_quantized(path)} == set(
              map('/'.join, lora._weights(abstract)))
  assert quantize.is_quantized('layers/attn/q_einsum/w')


_EQUATIONS = {
    'BTD,NDH->BTNH': ((2, 3, 8), (4, 8, 128)),
    'BSD,CKDH->CBSKH': ((2, 3, 8), (2, 2, 8, 128)),
    'BTNH,NHD->BTD': ((2, 3, 4, 16), (4, 16, 128)),
    '...F,NFH->...NH': ((2, 3, 8), (2, 8, 128)),
    '...F,NHF->...NH': ((2, 3, 128), (2, 8, 128)),
    '...H,HF->...F': ((2, 3, 8), (8, 128))}


@pytest.mark.parametrize('equation, kind', zip(_EQUATIONS, 2 * quantize.KINDS))
@pytest.mark.parametrize('dtype', (jnp.float32, jnp.bfloat16))
def test_value_and_gradient_are_those_of_the_full_weight(equation, kind, dtype):
  x_shape, weight_shape = _EQUATIONS[equation]
  x = jnp.asarray(_normal(*x_shape), dtype)
  quantized = quantize.quantize(_normal(*weight_shape, seed=1), kind)
  full = quantize.dequantize(quantized, dtype)

  def value(product, x, weight):
    return jnp.sum(jnp.sin(product(equation, x, weight)).astype(jnp.float32))

  @jax.jit
  def both(x, quantized, full):
    return [jax.value_and_grad(functools.partial(value, product))(x, weight)
            for product, weight in (
                (quantize.einsum, quantized), (jnp.einsum, full))]

  got, want = both(x, quantized, full)
  assert got[1].dtype == dtype
  # The sums may run in another order; bfloat16 has 8 bits.
  tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
  for g, w in zip(got, want):
    g, w = np.asarray(g, np.float32), np.asarray(w, np.float32)
    np.testing.assert_allclose(
        g, w, rtol=0, atol=tolerance * max(1, np.abs(w).max()))


_L, _D = 4, 128


def _layers(kind):
  return [quantize.quantize(0.1 * _normal(_D, _D, seed=i), kind)
          for i in range(_L)]


@functools.cache
def _stacked(kind):
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *_layers(kind))


def _scanned(product, x, weights):
  def layer(x, weight):
    return x + jnp.sin(product('BD,DF->BF', x, weight)), None

  return jnp.sum(jax.lax.scan(layer, x, weights)[0] ** 2)


def _plain(equation, x, quantized):
  return jnp.einsum(equation, x, quantize.dequantize(quantized, x.dtype))


@_kinds
def test_a_stack_is_its_layers(kind):
  stacked, full = _stacked(kind), _full(_stacked(kind))
  assert stacked.shape == (_L, _D, _D) and stacked.kind == kind
  for i, layer in enumerate(_layers(kind)):
    jax.tree.map(np.testing.assert_array_equal,
                 jax.tree.map(lambda leaf, i=i: leaf[i], stacked), layer)
    np.testing.assert_array_equal(full[i], _full(layer))


@pytest.mark.parametrize('kind, remat', (
    ('int8', True), ('int4', False), ('nf4', True)))
def test_gradient_under_scan(kind, remat):
  x, stacked = jnp.asarray(_normal(4, _D)), _stacked(kind)
  product = (jax.checkpoint(quantize.einsum, static_argnums=0) if remat
             else quantize.einsum)
  got = jax.jit(jax.grad(functools.partial(_scanned, product)))(x, stacked)
  want = jax.jit(jax.grad(functools.partial(_scanned, _plain)))(x, stacked)
  np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())


def _residuals(product, x, stacked):
  """What the forward pass leaves for the backward pass, as shapes."""
  return jax.tree.leaves(jax.eval_shape(lambda x, stacked: jax.vjp(
      lambda x: _scanned(product, x, stacked), x)[1], x, stacked))


def _bytes(leaves):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@_kinds
def test_no_full_weights_are_kept_for_the_backward_pass(kind):
  x, stacked = jnp.asarray(_normal(4, _D)), _stacked(kind)
  kept = _residuals(quantize.einsum, x, stacked)
  assert not [leaf.shape for leaf in kept if leaf.size >= stacked.size
              and jnp.issubdtype(leaf.dtype, jnp.floating)]
  # The bytes: the base itself as it is stored, and the layers' activations.
  assert _bytes(kept) < (
      stacked.values.nbytes + stacked.scales.nbytes + 2 * _L * x.nbytes)
  # What it would be, and that this test would see it.
  assert _bytes(_residuals(_plain, x, stacked)) > 4 * stacked.size


@pytest.mark.parametrize('scan', (True, False))
def test_compiled_program_holds_one_full_weight_at_a_time(scan):
  x, stacked = jnp.asarray(_normal(4, _D)), _stacked('nf4')

  def unrolled(product, x, stacked):
    for i in range(_L):
      layer = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
      x = x + jnp.sin(product('BD,DF->BF', x, layer))
    return jnp.sum(x**2)

  def temporaries(product):
    gradient = jax.grad(functools.partial(
        _scanned if scan else unrolled, product))
    compiled = jax.jit(gradient).lower(x, stacked).compile()
    text = compiled.as_text()
    return compiled.memory_analysis().temp_size_in_bytes, text

  bytes_, text = temporaries(quantize.einsum)
  plain_bytes, plain_text = temporaries(_plain)
  assert plain_bytes > 4 * stacked.size
  if scan:
    # XLA's CPU buffers for a loop are several copies; the stack is the point.
    assert f'f32[{_L},{_D},{_D}]' in plain_text
    assert f'f32[{_L},{_D},{_D}]' not in text
  else:
    assert bytes_ < 3 * 4 * _D * _D


@_kinds
def test_sharded_over_devices(kind):
  mesh = sharding.make_mesh(data=2, fsdp=4, tensor=1)
  x, stacked = jnp.asarray(_normal(4, _D)), _stacked(kind)
  fn = jax.jit(jax.value_and_grad(functools.partial(_scanned, quantize.einsum)))
  want = fn(x, stacked)
  sharded = jax.device_put(stacked, NamedSharding(mesh, P(None, 'fsdp', None)))
  assert sharded.values.addressable_shards[0].data.size == (
      stacked.values.size // 4)
  got = fn(jax.device_put(x, NamedSharding(mesh, P('data'))), sharded)
  # Sums over shards run in another order.
  for g, w in zip(got, want):
    np.testing.assert_allclose(g, w, atol=1e-5 * np.abs(w).max())


def _write_hf(model, folder):
  arrays = _load((model, load.resolve('random', '')), dtype=jnp.float32)
  tensors = dict(names.from_library(
      load.weight_layout(model), 'hf', lambda path: np.asarray(arrays[path])))
  folder.mkdir()
  (folder / 'config.json').write_text('{}')
  safetensors_file.write_model(
      folder, iter(tensors.items()), {n: a.shape for n, a in tensors.items()},
      dtype='float32', max_bytes=1_000_000)
  return str(folder)


@pytest.fixture(scope='module', params=('random', 'orbax', 'hf'))
def source(request, tmp_path_factory):
  """(model, weights) of each kind in turn."""
  config, tmp_path = tiny.get_config(), tmp_path_factory.mktemp('source')
  model = base_lib.load_model(config.model)
  name = {
      'random': lambda: 'random',
      'orbax': lambda: conftest.save_base(config, tmp_path / 'base', seed=1),
      'hf': lambda: _write_hf(model, tmp_path / 'hf')}[request.param]()
  resolved = load.resolve(name, tmp_path / 'cache')
  assert resolved.kind == request.param
  return model, resolved


def _load(source, **options):
  """Returns {path: weight}."""
  model, resolved = source
  return traverse_util.flatten_dict(load.load_params(
      resolved, model_lib.abstract_params(model), seed=1,
      layout=load.weight_layout(model), **options), sep='/')


def _assert_equal(got, want):
  """Compares two trees to the bit."""
  jax.tree.map(functools.partial(
      np.testing.assert_array_equal, strict=True), got, want)


@pytest.mark.parametrize('kind', ('int8', 'nf4'))
def test_what_is_loaded_is_the_full_base_quantised(source, kind):
  full = _load(source, dtype=jnp.float32)
  # The dtype is that of the rest; codes are made of what the source holds.
  loaded = _load(source, dtype=jnp.bfloat16, quantization=kind)
  assert loaded.keys() == full.keys()
  for path, array in full.items():
    if path.endswith(('_einsum/w', 'gating_einsum', 'linear')):
      want = quantize.quantize(np.asarray(array), kind)
      assert loaded[path].shape == array.shape
    else:
      want = array.astype(jnp.bfloat16)
    _assert_equal(loaded[path], want)


@pytest.mark.parametrize('kind', ('', 'int4'))
def test_stacked_is_each_layer_on_the_mesh(source, kind):
  model, _ = source
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  shardings = sharding.tree_shardings(model_lib.abstract_params(model), mesh)
  options = dict(dtype=jnp.float32, quantization=kind)
  layers = _load(source, **options)
  stacked = _load(source, shardings=shardings, stacked=True, **options)
  unstacked = blocks.unstack(
      traverse_util.unflatten_dict(jax.device_get(stacked), sep='/'))
  unstacked = traverse_util.flatten_dict(unstacked, sep='/')
  assert unstacked.keys() == layers.keys()
  for path, got in unstacked.items():
    _assert_equal(got, jax.device_get(layers[path]))
  # 4 heads over 'tensor' and D = 32 over 'fsdp': a quarter on each device.
  for leaf in jax.tree.leaves(stacked['layers/attn/q_einsum/w']):
    assert leaf.sharding.spec == P(None, 'tensor', 'fsdp')
  # D is last here: one block of 32 is not divided, its packed values are.
  down = stacked['layers/mlp/linear']
  if kind:
    assert down.values.sharding.spec == P(None, 'tensor', 'fsdp')
    # Written as it was asked for: XLA never returns these.
    assert tuple(down.scales.sharding.spec)[:2] == (None, 'tensor')
    assert not any(tuple(down.scales.sharding.spec)[2:])


def test_padded_vocabulary_is_cut_aloud(config, tmp_path, caplog):
  config.model.update(vocab_size=256_000, num_layers=1, embed_dim=2)
  model = base_lib.load_model(config.model)

  def pad(params):
    rows = params['embedder']['input_embedding']
    params['embedder']['input_embedding'] = jnp.pad(rows, ((0, 128), (0, 0)))
    return params

  path = conftest.save_base(config, tmp_path / 'base', seed=1, change=pad)
  source = model, load.resolve(path, tmp_path / 'cache')
  with caplog.at_level('WARNING', logger='absl'):
    loaded = _load(source, dtype=jnp.float32, quantization='int8')
  assert loaded[names.EMBEDDING].shape == (256_000, 2)
  assert sum('256128' in line for line in caplog.messages) == 1


def test_the_full_base_is_never_on_the_devices(source, monkeypatch):
  def live():
    return sum(array.nbytes for array in jax.live_arrays())

  full = sum(leaf.nbytes for leaf in _load(source, dtype=jnp.float32).values())
  gc.collect()
  before, seen = live(), []
  original = quantize.quantize

  def watched(array, kind):
    seen.append(live() - before)
    assert isinstance(array, np.ndarray)
    return original(array, kind)

  monkeypatch.setattr(quantize, 'quantize', watched)
  loaded = _load(source, dtype=jnp.float32, quantization='nf4')
  after = live() - before
  assert after == sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
  # The tiny model is a third embedding, which stays as it is.
  assert max(seen) <= after < 0.6 * full


def test_what_is_exported_is_what_was_trained(config, tmp_path):
  config.model.quantization = 'nf4'
  config.model.weights = conftest.save_base(config, tmp_path / 'base', seed=1)
  config.lora.targets = 'attn/'
  config.optimizer.update(learning_rate=0.05, schedule='constant')
  config.train.steps = 1
  config.data.validation = ''
  config.eval.update(judged=0, prompts=())
  workdir = str(tmp_path / 'w')
  train.main(config, workdir, False)
  arrays = arrays_lib.open_arrays(
      restore.choose_weights(config, workdir, base=False, step=-1))
  model = base_lib.load_model(config.model)
  source = model, load.resolve(config.model.weights, tmp_path / 'cache')
  for path, array in _load(source, dtype=jnp.float32).items():
    want = np.asarray(array)
    if quantize.is_quantized(path):
      want = _full(quantize.quantize(want, 'nf4'))
    _assert_equal(arrays.read_base(path), want)
    assert np.array_equal(arrays.read(path), want) != ('/attn/' in path and
                                                      '_einsum' in path)
  base = arrays_lib.open_arrays(
      restore.choose_weights(config, workdir, base=True, step=-1))
  _assert_equal(base.read('layer_0/mlp/linear'),
                arrays.read_base('layer_0/mlp/linear'))

  # The forward of the run (codes, adapters beside them) and of the export.
  served = restore.load_weights(config, workdir, base=False, step=-1)
  exported = traverse_util.unflatten_dict(
      {path: arrays.read(path) for path in arrays.layout.shapes}, sep='/')
  tokens_BT = jnp.asarray(
      np.random.default_rng(0).integers(3, 200, (2, 16)), jnp.int32)
  positions_BT = jnp.broadcast_to(jnp.arange(16), (2, 16))
  hidden_states = jax.jit(lambda params: model_lib.hidden_states(
      model, params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT)))
  got, want = map(hidden_states, (exported, served.params))
  # One product with the merged weight, or two: rounding alone.
  np.testing.assert_allclose(got, want, atol=1e-4)
