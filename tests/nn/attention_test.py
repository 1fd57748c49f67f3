"""Every attention kernel is the library's attention, or is not chosen."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import tiny_models

from gemma_sft import model as model_lib
from gemma_sft.nn import attention

gm = model_lib.import_gemma()
from gemma.gm.math import _positional_embeddings
from gemma.gm.nn import _layers

# Those that a CPU can run.
_HERE = ('einsum', 'chunked', 'splash')
_T, _D, _H = 100, 24, 16

# name: (query heads, key-value heads, window, softcap, norms of q and k)
_SHAPES = {
    'gemma1_2b': (2, 1, None, None, False),
    'gemma1_7b': (2, 2, None, None, False),
    'gemma2': (4, 2, 24, 5.0, False),
    'gemma3': (2, 1, 24, None, True),
}


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


_assert_close = functools.partial(tiny_models.assert_close, least=1)


# Against the library ---------------------------------------------------------


def _module(name, is_local):
  N, K, window, softcap, norms = _SHAPES[name]
  kind = gm.nn.AttentionType
  return gm.nn.Attention(
      num_heads=N, num_kv_heads=K, features=_D, head_dim=_H,
      attn_type=kind.LOCAL_SLIDING if is_local else kind.GLOBAL,
      query_pre_attn_scalar=_H ** -0.5, attn_logits_soft_cap=softcap,
      sliding_window_size=window, use_qk_norm=norms)


def _through_kernel(module, params, x_BTD, positions, segments, is_local,
                    kernel):
  """The library's module with its middle replaced."""
  if module.use_qkv_einsum:
    q, k, v = jnp.einsum('BTD,CNDH->CBTNH', x_BTD, params['qkv_einsum']['w'])
  else:
    q = jnp.einsum('BTD,NDH->BTNH', x_BTD, params['q_einsum']['w'])
    k, v = jnp.einsum('BTD,CKDH->CBTKH', x_BTD, params['kv_einsum']['w'])
  if module.use_qk_norm:
    q, k = (_layers.RMSNorm().apply({'params': params[name]}, x)
            for name, x in (('_query_norm', q), ('_key_norm', k)))
  rope = functools.partial(
      _positional_embeddings.apply_rope,
      base_frequency=module.rope_base_frequency)
  out_BTNH = attention.attend(
      rope(q, positions) * module.query_pre_attn_scalar, rope(k, positions), v,
      positions, segments, is_local, window=module.sliding_window_size,
      softcap=module.attn_logits_soft_cap, kernel=kernel)
  return jnp.einsum(
      'BTNH,NHD->BTD', out_BTNH, params['attn_vec_einsum']['w'])


@functools.cache
def _library_case(name, is_local):
  """Returns (module, inputs, output and gradients of the library)."""
  module = _module(name, is_local)
  positions, segments = _rows()
  mask_BTS = model_lib.segment_mask(segments)
  rng = np.random.default_rng(0)
  x_BTD = jnp.asarray(rng.normal(0, 1, (3, _T, _D)), jnp.float32)
  shapes = jax.eval_shape(
      module.init, jax.random.key(0), x_BTD, positions, None, mask_BTS)
  params = jax.tree.map(
      lambda leaf: jnp.asarray(rng.normal(0, 0.4, leaf.shape), jnp.float32),
      shapes['params'])
  dout_BTD = jnp.where(
      segments[:, :, None] > 0, rng.normal(0, 1, x_BTD.shape), 0)

  def library(params, x_BTD):
    with jax.numpy_rank_promotion('allow'):
      return module.apply(
          {'params': params}, x_BTD, positions, None, mask_BTS)[1]

  inputs = params, x_BTD, positions, segments, dout_BTD
  return module, inputs, _value_and_grads(library, *inputs[:2], dout_BTD,
                                          segments)


def _value_and_grads(fn, params, x_BTD, dout_BTD, segments):
  """Output where there is no padding, gradients of weights and inputs."""
  def run(params, x_BTD):
    out_BTD, vjp = jax.vjp(fn, params, x_BTD)
    return jnp.where(segments[:, :, None] > 0, out_BTD, 0), vjp(dout_BTD)

  return jax.jit(run)(params, x_BTD)


@pytest.mark.parametrize('kernel', _HERE)
@pytest.mark.parametrize('name, is_local', [
    (name, is_local) for name in _SHAPES for is_local in (False, True)
    if not is_local or _SHAPES[name][2]])
def test_value_and_gradients_are_the_librarys(name, is_local, kernel):
  module, inputs, wanted = _library_case(name, is_local)
  params, x_BTD, positions, segments, dout_BTD = inputs
  got = _value_and_grads(
      lambda params, x_BTD: _through_kernel(
          module, params, x_BTD, positions, segments, is_local, kernel),
      params, x_BTD, dout_BTD, segments)
  # f32: sums in another order, through peaked softmaxes.
  _assert_close(got, wanted, 2e-5)


# Between kernels -------------------------------------------------------------


def _results(kernel, q, k, v, positions, segments, is_local, *, window,
             softcap=None, mesh=None):
  """Returns output and gradients where there is no padding."""
  @jax.jit
  def run(q, k, v, positions, segments):
    filled = segments[:, :, None, None] > 0
    out, vjp = jax.vjp(
        lambda *qkv: attention.attend(
            *qkv, positions, segments, is_local, window=window,
            softcap=softcap, kernel=kernel, mesh=mesh), q, k, v)
    dout = jnp.where(filled, jnp.cos(jnp.arange(out.size)).reshape(
        out.shape), 0).astype(out.dtype)
    return jnp.where(filled, out, 0), vjp(dout)

  return run(q, k, v, positions, segments)


# Chunks of 16 with copies of their own keys (windows 1 to 40: 17 reaches one
# chunk back and 18 two), and windows so wide that the quarters are used.
@pytest.mark.parametrize('window', (1, 17, 18, 40, 80, 143, 1000))
@pytest.mark.parametrize('T', (144, 143, 15))
def test_chunks_of_any_length_and_window(T, window):
  positions = jnp.tile(jnp.arange(T)[None], (2, 1))
  segments = jnp.ones((2, T), jnp.int32).at[1, T - 3:].set(0)
  qkv = _qkv(B=2, T=T)
  got, wanted = (
      _results(kernel, *qkv, positions, segments, True, window=window)
      for kernel in ('chunked', 'einsum'))
  _assert_close(got, wanted, 1e-5)  # f32 sums in another order.


# Three blocks of 128, of which a window of 100 leaves one out.
@pytest.mark.parametrize('is_local', (False, True))
def test_splash_over_several_blocks(is_local):
  positions, segments = _rows(T=300)
  qkv = _qkv(T=300, N=4, K=2)
  got, wanted = (
      _results(kernel, *qkv, positions, segments, is_local, window=100,
               softcap=5.0) for kernel in ('splash', 'einsum'))
  _assert_close(got, wanted, 1e-5)  # f32 sums in another order.


@pytest.mark.parametrize('kernel', _HERE)
def test_flags_of_layers_in_a_scan(kernel):
  positions, segments = _rows()
  q, k, v = _qkv(N=2, K=2)
  flags = (True, False)

  def layer(x, is_local, k, v, positions, segments):
    return attention.attend(
        x, k, v, positions, segments, is_local, window=24, softcap=None,
        kernel=kernel)

  def scanned(x, *rest):
    return jnp.sum(jnp.sin(jax.lax.scan(
        lambda x, flag: (layer(x, flag, *rest), None), x,
        jnp.asarray(flags))[0]))

  def unrolled(x, *rest, flags=flags):
    for flag in flags:
      x = layer(x, flag, *rest)
    return jnp.sum(jnp.sin(x))

  got, wanted, other = (
      jax.jit(jax.value_and_grad(fn))(q, k, v, positions, segments)
      for fn in (scanned, unrolled,
                 functools.partial(unrolled, flags=(True, True))))
  # f32: a sum of thousands that cancel, compiled apart.
  _assert_close(got, wanted, 1e-5)
  assert abs(other[0] - wanted[0]) > 1e-3  # The layers matter.


@pytest.mark.parametrize('kernel', _HERE)
@pytest.mark.parametrize('is_local', (True, jnp.asarray(True)),
                         ids=('static', 'traced'))
def test_the_backward_pass_keeps_only_the_inputs(kernel, is_local):
  positions, segments = _rows()
  qkv = _qkv()
  _, vjp = jax.vjp(
      lambda *qkv: attention.attend(
          *qkv, positions, segments, is_local, window=24, softcap=None,
          kernel=kernel), *qkv)
  kept = sum(leaf.size for leaf in jax.tree.leaves(vjp))
  assert kept <= sum(x.size for x in (*qkv, positions, segments)) + 1


@pytest.mark.parametrize('kernel', _HERE)
@pytest.mark.parametrize('is_local', (False, True))
def test_padding_is_finite_and_touches_nothing(kernel, is_local):
  positions, segments = _rows()
  filled = (segments > 0)[:, :, None, None]
  q, k, v = _qkv()
  # Huge, but not so that products overflow.
  other = [jnp.where(filled, x, 1e9) for x in (q, k, v)]
  one, two = (
      _results(kernel, *qkv, positions, segments, is_local, window=24)
      for qkv in ((q, k, v), other))
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    assert np.isfinite(a).all() and np.isfinite(b).all()
    np.testing.assert_array_equal(jnp.where(filled, a, 0),
                                  jnp.where(filled, b, 0))
  # Even where the padding's own output is asked for.
  grads = jax.jit(jax.grad(
      lambda *arrays: jnp.sum(attention.attend(
          *arrays, is_local, window=24, softcap=None, kernel=kernel)),
      argnums=(0, 1, 2)))(q, k, v, positions, segments)
  assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize('kernel', _HERE)
@pytest.mark.parametrize('dtype', (jnp.bfloat16, jnp.float16))
def test_half_precision_keeps_the_softmax_in_f32(kernel, dtype):
  positions, segments = _rows()
  qkv = _qkv(dtype=dtype)
  got = _results(kernel, *qkv, positions, segments, True, window=24)
  wanted = _results(
      'einsum', *(x.astype(jnp.float32) for x in qkv), positions, segments,
      True, window=24)
  assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(got))
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    error = np.linalg.norm(g.astype(jnp.float32) - w) / np.linalg.norm(w)
    assert error < jnp.finfo(dtype).eps  # Rounded probabilities, cotangents.


@pytest.mark.parametrize('kernel', ('chunked', 'splash'))
@pytest.mark.parametrize('K', (1, 2))  # Over tensor=2: whole, split.
def test_rows_and_heads_over_a_mesh(kernel, K):
  mesh = jax.make_mesh(
      (2, 2, 2), ('data', 'fsdp', 'tensor'),
      axis_types=(jax.sharding.AxisType.Auto,) * 3)
  positions, segments = (jnp.tile(x[:2], (2, 1)) for x in _rows())
  qkv = _qkv(B=4, N=4, K=K)
  wanted = _results(
      'einsum', *qkv, positions, segments, True, window=24)
  by_rows = NamedSharding(mesh, P(('data', 'fsdp')))
  arrays = jax.device_put((*qkv, positions, segments), by_rows)
  got = _results(kernel, *arrays, True, window=24, mesh=mesh)
  _assert_close(got, wanted, 1e-5)  # f32 sums in another order.


# cuDNN's and tokamax's calls, through what those packages run on a CPU.


@pytest.mark.parametrize('kernel, window, softcap', (
    *(('cudnn', window, None) for window in (None, 1, 24)),
    ('tokamax', None, 5.0), ('tokamax', 24, None)))
def test_the_call_of_a_fused_kernel(kernel, window, softcap):
  first = 0
  if kernel == 'tokamax':
    pytest.importorskip('tokamax')
  else:
    first = 1  # One example a row.
  positions, segments = (x[first:] for x in _rows())
  qkv = [x[first:] for x in _qkv(N=4, K=2)]
  got, wanted = (
      jnp.where(segments[:, :, None, None] > 0, fn(
          *qkv, positions, segments, window, softcap, None), 0)
      for fn in (functools.partial(
          attention.KERNELS[kernel].run, implementation='xla'),
                 attention.KERNELS['einsum'].run))
  _assert_close(got, wanted, 1e-5)  # f32 sums in another order.


# Cost ------------------------------------------------------------------------


def _cost(kernel, T, is_local):
  """Returns (multiplications of products, elements of the largest array)."""
  positions = jnp.tile(jnp.arange(T)[None], (1, 1))
  segments = jnp.ones((1, T), jnp.int32)
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
