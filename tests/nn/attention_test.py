"""Every attention kernel is the library's attention, or is not chosen."""

import contextlib
import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import tiny_models

from gemma_sft import model as model_lib
from gemma_sft import sharding
from gemma_sft.nn import attention
from gemma_sft.nn import blocks

gm = model_lib.import_gemma()

# Those that a CPU can run.
_HERE = ('einsum', 'chunked', 'splash')
_T, _D, _H = 100, 24, 16

# name: (query heads, key-value heads, window, softcap, norms of q and k)
_SHAPES = {
    'gemma1_2b': (2, 1, None, None, False),
    'gemma1_7b': (2, 2, None, None, False),
    'gemma2': (4, 2, 24, 5.0, False),
    'gemma3': (2, 1, 24, None, True)}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
  """Seven chunks and blocks of the least size, instead of one of each."""
  monkeypatch.setattr(attention, 'QUERY_CHUNK', 16)
  monkeypatch.setattr(attention, '_SPLASH_BLOCK', 128)


def _rows(T=_T, padding=9):
  """Rows of three examples, of one, and of padding alone."""
  segment_ids_BT = np.zeros((3, T), np.int32)
  positions_BT = np.zeros((3, T), np.int32)
  for row, start, end, segment in (
      (0, 0, 13, 1), (0, 13, 70, 2), (0, 70, T - padding, 3),
      (1, 0, T - padding, 1)):
    segment_ids_BT[row, start:end] = segment
    positions_BT[row, start:end] = np.arange(end - start)
  return jnp.asarray(positions_BT), jnp.asarray(segment_ids_BT)


def _qkv(B=3, T=_T, N=2, K=1, H=_H, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(0, scale, (B, T, heads, H)), dtype)
          for heads, scale in ((N, 3 / H ** 0.5), (K, 1), (K, 1))]


# Tolerances are those of f32 sums in another order.
_assert_close = functools.partial(tiny_models.assert_close, least=1)


@functools.cache
def _library_case(name, is_local):
  """Returns a function of a kernel, None for the library's own attention.

  It returns the output where there is no padding, and gradients.
  """
  N, K, window, softcap, norms = _SHAPES[name]
  kind = gm.nn.AttentionType
  module = gm.nn.Attention(
      num_heads=N, num_kv_heads=K, features=_D, head_dim=_H,
      attn_type=kind.LOCAL_SLIDING if is_local else kind.GLOBAL,
      query_pre_attn_scalar=_H ** -0.5, attn_logits_soft_cap=softcap,
      sliding_window_size=window, use_qk_norm=norms)
  positions, segments = _rows()
  rest = positions, None, model_lib.segment_mask(segments)
  rng = np.random.default_rng(0)
  x_BTD, dout_BTD = jnp.asarray(rng.normal(0, 1, (2, 3, _T, _D)), jnp.float32)
  filled = segments[:, :, None] > 0
  shapes = jax.eval_shape(module.init, jax.random.key(0), x_BTD, *rest)
  params = jax.tree.map(
      lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), jnp.float32),
      shapes['params'])
  config = types.SimpleNamespace(
      head_dim=_H, local_scale_factor=1.0, global_scale_factor=1.0,
      **dict.fromkeys(('local_base_frequency', 'global_base_frequency'),
                      module.rope_base_frequency))

  @functools.partial(jax.jit, static_argnums=0)
  def results(kernel, params, x_BTD):
    forward = contextlib.nullcontext()
    if kernel:
      forward = nn.intercept_methods(blocks.Forward(
          config, blocks.Operations(), positions, segments,
          blocks.Execution(attention=kernel)).with_rope())
    with forward, jax.numpy_rank_promotion('raise' if kernel else 'allow'):
      out_BTD, vjp = jax.vjp(lambda params, x_BTD: module.apply(
          {'params': params}, x_BTD, *rest)[1], params, x_BTD)
    return jnp.where(filled, out_BTD, 0), vjp(jnp.where(filled, dout_BTD, 0))

  return functools.cache(lambda kernel: results(kernel, params, x_BTD))


@pytest.mark.parametrize('kernel', _HERE)
@pytest.mark.parametrize('name, is_local', [
    (name, is_local) for name in _SHAPES for is_local in (False, True)
    if not is_local or _SHAPES[name][2]])
def test_value_and_gradients_are_the_librarys(name, is_local, kernel):
  results = _library_case(name, is_local)
  # Peaked softmaxes.
  _assert_close(results(kernel), results(None), 2e-5)


@functools.cache
def _compiled(kernel, is_local, window, softcap, mesh):
  """Returns (output where there is no padding, gradients), jitted."""
  def run(q, k, v, positions, segments, dout):
    out, vjp = jax.vjp(
        lambda *qkv: attention.attend(
            *qkv, positions, segments, is_local, window=window,
            softcap=softcap, kernel=kernel, mesh=mesh), q, k, v)
    return jnp.where(_filled(segments), out, 0), vjp(dout)

  return jax.jit(run)


def _filled(segments):
  return (segments > 0)[:, :, None, None]


def _dout(q, segments):
  return jnp.where(
      _filled(segments), jnp.cos(jnp.arange(q.size)).reshape(q.shape), 0
  ).astype(q.dtype)


def _results(kernel, *arrays, is_local=True, window=24, softcap=None,
             mesh=None, dout=None):
  """Of q, k, v, positions, segments; `dout` is zero at padding by default."""
  if dout is None:
    dout = _dout(arrays[0], arrays[-1])
  return _compiled(kernel, is_local, window, softcap, mesh)(*arrays, dout)


@functools.partial(jax.jit, static_argnames='softcap')
def _einsum(q, k, v, positions, segments, window, softcap):
  # A traced window: one program for all of them.
  out, vjp = jax.vjp(lambda *qkv: attention.KERNELS['einsum'].run(
      *qkv, positions, segments, window, softcap, None), q, k, v)
  return jnp.where(_filled(segments), out, 0), vjp(_dout(q, segments))


def _wanted(*arrays, is_local=True, window=24, softcap=None):
  return _einsum(*arrays, window if is_local else 10_000, softcap)


# Chunks of 16 with copies of their own keys (windows 1 to 40: 17 reaches one
# chunk back and 18 two), and windows so wide that the quarters are used.
@pytest.mark.parametrize('T, window', (
    *((144, window) for window in (1, 17, 18, 40, 80, 143, 1000)),
    (143, 17), (143, 80), (15, 1), (15, 1000)))
def test_chunks_of_any_length_and_window(T, window):
  positions = jnp.tile(jnp.arange(T)[None], (2, 1))
  segments = jnp.ones((2, T), jnp.int32).at[1, T - 3:].set(0)
  arrays = (*_qkv(B=2, T=T), positions, segments)
  _assert_close(_results('chunked', *arrays, window=window),
                _wanted(*arrays, window=window), 1e-5)


# Three blocks of 128, of which a window of 100 leaves one out.
@pytest.mark.parametrize('is_local', (False, True))
def test_splash_over_several_blocks(is_local):
  arrays = (*_qkv(T=300, N=4, K=2), *_rows(T=300))
  settings = dict(is_local=is_local, window=100, softcap=5.0)
  _assert_close(_results('splash', *arrays, **settings),
                _wanted(*arrays, **settings), 1e-5)


def _layers(flags, kernel, scanned):
  """Returns the value and gradient of layers that are local by their flags."""
  @jax.jit
  @jax.value_and_grad
  def run(x, *rest):
    def layer(x, flag):
      return attention.attend(
          x, *rest, flag, window=24, softcap=None, kernel=kernel), None

    if scanned:
      x, _ = jax.lax.scan(layer, x, jnp.asarray(flags))
    else:
      for flag in flags:
        x, _ = layer(x, flag)
    return jnp.sum(jnp.sin(x))

  return run(*_qkv(N=2, K=2), *_rows())


@pytest.mark.parametrize('kernel', _HERE)
def test_flags_of_layers_in_a_scan(kernel):
  wanted = _layers((True, False), kernel, False)
  # A sum of thousands that cancel, compiled apart.
  _assert_close(_layers((True, False), kernel, True), wanted, 1e-5)
  other = _layers((True, True), kernel, False)
  assert abs(other[0] - wanted[0]) > 1e-3  # The layers matter.


@pytest.mark.parametrize('kernel', _HERE)
@pytest.mark.parametrize('is_local', (True, jnp.asarray(True)),
                         ids=('static', 'traced'))
def test_the_backward_pass_keeps_only_the_inputs(kernel, is_local):
  rows, qkv = _rows(), _qkv()
  vjp = jax.eval_shape(lambda *qkv: jax.vjp(
      lambda *qkv: attention.attend(
          *qkv, *rows, is_local, window=24, softcap=None, kernel=kernel),
      *qkv)[1], *qkv)
  kept = sum(leaf.size for leaf in jax.tree.leaves(vjp))
  assert kept <= sum(x.size for x in (*qkv, *rows)) + 1


@pytest.mark.parametrize('kernel', _HERE)
@pytest.mark.parametrize('is_local', (False, True))
def test_padding_is_finite_and_touches_nothing(kernel, is_local):
  rows, qkv = _rows(), _qkv()
  filled = _filled(rows[1])
  # Huge, but not so that products overflow.
  other = [jnp.where(filled, x, 1e9) for x in qkv]
  one, two = (_results(kernel, *x, *rows, is_local=is_local)
              for x in (qkv, other))
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    assert np.isfinite(a).all() and np.isfinite(b).all()
    np.testing.assert_array_equal(jnp.where(filled, a, 0),
                                  jnp.where(filled, b, 0))
  # Even where the padding's own output is asked for.
  _, grads = _results(kernel, *qkv, *rows, is_local=is_local,
                      dout=jnp.ones_like(qkv[0]))
  assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize('kernel', _HERE)
@pytest.mark.parametrize('dtype', (jnp.bfloat16, jnp.float16))
def test_half_precision_keeps_the_softmax_in_f32(kernel, dtype):
  rows, qkv = _rows(), _qkv(dtype=dtype)
  got = _results(kernel, *qkv, *rows)
  wanted = _wanted(*(x.astype(jnp.float32) for x in qkv), *rows)
  assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(got))
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    error = np.linalg.norm(g.astype(jnp.float32) - w) / np.linalg.norm(w)
    assert error < jnp.finfo(dtype).eps  # Rounded probabilities, cotangents.


@pytest.mark.parametrize('kernel', ('chunked', 'splash'))
@pytest.mark.parametrize('K', (1, 2))  # Over tensor=2: whole, split.
def test_rows_and_heads_over_a_mesh(kernel, K):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  arrays = (*_qkv(B=4, N=4, K=K), *(jnp.tile(x[:2], (2, 1)) for x in _rows()))
  by_rows = NamedSharding(mesh, P(('data', 'fsdp')))
  placed = jax.device_put((*arrays, _dout(arrays[0], arrays[-1])), by_rows)
  got = _results(kernel, *placed[:-1], mesh=mesh, dout=placed[-1])
  _assert_close(got, _wanted(*arrays), 1e-5)


# cuDNN's and tokamax's calls, through what those packages run on a CPU.


@pytest.mark.parametrize('kernel, window, softcap', (
    *(('cudnn', window, None) for window in (None, 1, 24)),
    ('tokamax', None, 5.0), ('tokamax', 24, None)))
def test_the_call_of_a_fused_kernel(kernel, window, softcap):
  if kernel == 'tokamax':
    pytest.importorskip('tokamax')
  first = 1 if kernel == 'cudnn' else 0  # One example a row.
  arrays = [x[first:] for x in (*_qkv(N=4, K=2), *_rows())]
  run = jax.jit(lambda *arrays: attention.KERNELS[kernel].run(
      *arrays, window, softcap, None, implementation='xla'))
  got = jnp.where(_filled(arrays[-1]), run(*arrays), 0)
  wanted, _ = _wanted(*arrays, window=window or 10_000, softcap=softcap)
  _assert_close(got, wanted, 1e-5)


def _cost(kernel, T, is_local):
  """Returns (multiplications of products, elements of the largest array)."""
  positions, segments = jnp.arange(T)[None], jnp.ones((1, T), jnp.int32)
  jaxpr = jax.make_jaxpr(jax.grad(
      lambda q, k, v: jnp.sum(attention.attend(
          q, k, v, positions, segments, is_local, window=24, softcap=None,
          kernel=kernel)), argnums=(0, 1, 2)))(*_qkv(B=1, T=T))
  return _count(jaxpr.jaxpr, 1)


def _count(jaxpr, times):
  products, largest = 0, 0
  for eqn in jaxpr.eqns:
    largest = max([largest, *(v.aval.size for v in eqn.outvars)])
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      shape = eqn.invars[0].aval.shape
      products += times * eqn.outvars[0].aval.size * int(
          np.prod([shape[d] for d in contracted]))
    repeats = eqn.params.get('length', 1)
    for value in jax.tree.leaves(
        tuple(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'jaxpr')):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        more, size = _count(inner, times * repeats)
        products, largest = products + more, max(largest, size)
  return products, largest


def test_a_local_layer_costs_its_window():
  # 16 queries meet 48 keys, eight passes of a product for either head.
  (short, _), (long, largest) = (_cost('chunked', T, True) for T in (512, 1024))
  assert long == 2 * short
  assert largest < 1024 * 1024 / 8
  assert _cost('einsum', 1024, True)[0] > 10 * long


def test_a_global_layer_costs_five_eighths_of_the_square():
  square, most = _cost('einsum', 1024, False)
  chunked, largest = _cost('chunked', 1024, False)
  assert most == 2 * 1024 * 1024  # Both heads'.
  # As traced: nine products over 5/8 of the square, where 'einsum' has eight.
  assert chunked < 0.75 * square
  assert largest < 1024 * 1024 / 8
