"""The attention of the training forward, in several kernels.

    kernel   runs on             packed  softcap  memory of a row
    einsum   everything          yes     yes      the square of its length
    chunked  everything          yes     yes      256 queries at a time
    splash   TPU v4 and newer    yes     yes      linear
    cudnn    NVIDIA, bf16, f16   no      no       linear
    tokamax  NVIDIA H100, B200   yes     yes      linear

`einsum` is the library's own computation (`gemma/gm/nn/_modules.py`) with the
softmax in f32. Every other kernel has to agree with it: in the tests where a
CPU can run it, and on the device itself before `attention_choice` chooses it.

A new kernel is two functions and a row in `KERNELS`.
"""

from collections.abc import Callable
import dataclasses
import functools
import importlib.util
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from gemma_sft import shapes

# The value of masked logits, as in the library: finite, so that a row without
# a key gives a mean and not NaN.
_MASKED = -2.3819763e38
# Queries at a time. On a CPU 128 is up to a fifth faster and 512 up to twice as
# slow; accelerators prefer fewer, larger steps.
QUERY_CHUNK = 256
# In global layers a query meets the keys up to the end of its quarter of the
# row: 5/8 of the square. Each part is compiled on its own, so there are few.
_PARTS = 4
_SPLASH_BLOCK = 512  # Queries and keys at a time; rows are padded to it.


@dataclasses.dataclass(frozen=True)
class _Spec:
  """The static arguments: each set of them is compiled once."""

  kernel: str
  is_local: bool | None  # None: a traced flag says it.
  window: int | None
  softcap: float | None
  mesh: jax.sharding.Mesh | None


def attend(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    positions_BT: shapes.PositionsBT,
    segment_ids_BT: shapes.SegmentsBT,
    is_local: bool | jax.Array,
    *,
    window: int | None,
    softcap: float | None,
    kernel: str,
    mesh: jax.sharding.Mesh | None = None,
) -> jax.Array:
  """Returns each query's weighted mean of the values it sees, (B, T, N, H).

  A query sees the keys of its own segment up to itself; in a local layer only
  those of the last `window` positions, its own included. `is_local` may be
  traced (layers in a scan). Positions count from the start of a segment; the
  segments of a row are 1, 2, ..., and the result at padding (segment 0) is
  finite and has no meaning.

  Queries are rotated and scaled, keys are rotated, and K divides N. The result
  has the dtype of the queries. With a softcap, logits become
  softcap * tanh(logits / softcap). Kernels on several devices need the mesh.
  """
  if window is None:
    is_local = False
  static = isinstance(is_local, (bool, np.bool_))
  spec = _Spec(
      kernel, bool(is_local) if static else None, window, softcap, mesh)
  return _attend(
      spec, q_BTNH, k_BTKH, v_BTKH, positions_BT, segment_ids_BT,
      None if static else is_local)


# Autodiff of a cond saves what either branch needs, with zeros for the branch
# that was not taken: twice the memory, and for chunks their stacked keys too.
# So the gradient is taken inside the cond, from the inputs. In return the
# backward pass repeats the attention's forward (2-3 % of a step). 'chunked'
# does that anyway, and the compiler drops the second repetition.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec, *inputs):
  return _in_branch(spec, inputs, lambda kernel, *qkv: kernel(*qkv))


def _attend_fwd(spec, *inputs):
  return _attend(spec, *inputs), inputs


def _attend_bwd(spec, inputs, dout_BTNH):
  def gradients(kernel, *qkv_and_dout):
    *qkv, dout_BTNH = qkv_and_dout
    return jax.vjp(kernel, *qkv)[1](dout_BTNH)

  return (*_in_branch(spec, inputs, gradients, dout_BTNH), None, None, None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _in_branch(spec, inputs, fn, *more):
  """Returns fn(kernel, q, k, v, *more) for a local or a global layer."""
  *qkv, positions, segments, flag = inputs

  def branch(is_local, *arrays):
    window = spec.window if is_local else None
    return fn(
        lambda *qkv: KERNELS[spec.kernel].run(
            *qkv, positions, segments, window, spec.softcap, spec.mesh),
        *arrays)

  if flag is None:
    return branch(spec.is_local, *qkv, *more)
  return jax.lax.cond(
      flag, functools.partial(branch, True), functools.partial(branch, False),
      *qkv, *more)


# Pure JAX --------------------------------------------------------------------


def _einsum(q, k, v, positions_BT, segment_ids_BT, window, softcap, mesh):
  """Computes all logits at once."""
  del mesh
  T = q.shape[1]
  mask_BTS = _same(segment_ids_BT, segment_ids_BT) & jnp.tril(
      jnp.ones((T, T), bool))[None]
  if window is not None:
    distance_BTS = positions_BT[:, :, None] - positions_BT[:, None, :]
    mask_BTS &= distance_BTS < window
  return _mean(_group(q, k), k, v, mask_BTS, softcap).reshape(q.shape)


def _chunked(q, k, v, positions_BT, segment_ids_BT, window, softcap, mesh):
  """Computes a chunk of queries at a time, with only the keys near it.

  Distances are differences of indices, which within a segment are those of
  positions.
  """
  del positions_BT, mesh
  T = q.shape[1]
  C = min(QUERY_CHUNK, T)
  n = -(-T // C)
  q_BTKGH, k, v, segment_ids_BT = (
      _pad(x, n * C) for x in (_group(q, k), k, v, segment_ids_BT))
  # How many chunks before a query's own a window reaches into.
  back = n if window is None else min(n, -(-(window - 1) // C))
  if 8 * (1 + back) < 5 * n:  # Less than the 5/8 of the global form.
    out = _local_chunks(q_BTKGH, k, v, segment_ids_BT, C, back, window, softcap)
  else:
    out = _global_chunks(q_BTKGH, k, v, segment_ids_BT, C, window, softcap)
  return out[:, :T].reshape(q.shape)


def _local_chunks(q_BTKGH, k, v, segment_ids_BT, C, back, window, softcap):
  """Gives each chunk a copy of its keys: 1 + back times the keys' memory.

  Slicing the keys inside the scan would need no copy, but its gradient adds an
  array of all keys for every chunk.
  """
  distance_CS = (jnp.arange(C)[:, None] + back * C
                 - jnp.arange((1 + back) * C)[None])
  near_CS = (distance_CS >= 0) & (distance_CS < window)

  def spans(x):
    """Joins each chunk with the `back` before it; zeros before the first."""
    x = shapes.split(x, C)
    pad = jnp.pad(x, ((back, 0),) + ((0, 0),) * (x.ndim - 1))
    return jnp.concatenate(
        [pad[i:i + x.shape[0]] for i in range(back + 1)], axis=2)

  @jax.checkpoint  # Saves no probabilities.
  def one(chunk):
    q_BCKGH, q_segments_BC, k_BSKH, v_BSKH, k_segments_BS = chunk
    mask_BCS = _same(q_segments_BC, k_segments_BS) & near_CS[None]
    return _mean(q_BCKGH, k_BSKH, v_BSKH, mask_BCS, softcap)

  return shapes.join(jax.lax.map(one, (
      shapes.split(q_BTKGH, C), shapes.split(segment_ids_BT, C), spans(k),
      spans(v), spans(segment_ids_BT))))


def _global_chunks(q_BTKGH, k, v, segment_ids_BT, C, window, softcap):
  """Gives the chunks of each part the keys up to the end of that part."""
  n = q_BTKGH.shape[1] // C
  parts = min(_PARTS, n)
  edges = [n * i // parts for i in range(parts + 1)]

  def part(first, last):
    S = last * C
    k_BSKH, v_BSKH, k_segments_BS = k[:, :S], v[:, :S], segment_ids_BT[:, :S]

    @jax.checkpoint  # Saves no probabilities.
    def one(chunk):
      i, q_BCKGH, q_segments_BC = chunk
      distance_CS = i * C + jnp.arange(C)[:, None] - jnp.arange(S)[None]
      near_CS = distance_CS >= 0
      if window is not None:
        near_CS &= distance_CS < window
      mask_BCS = _same(q_segments_BC, k_segments_BS) & near_CS[None]
      return _mean(q_BCKGH, k_BSKH, v_BSKH, mask_BCS, softcap)

    return shapes.join(jax.lax.map(one, (
        jnp.arange(first, last), *(shapes.split(x[:, first * C:S], C)
                                   for x in (q_BTKGH, segment_ids_BT)))))

  return jnp.concatenate(
      [part(*edge) for edge in zip(edges, edges[1:])], axis=1)


def _mean(q_BTKGH, k_BSKH, v_BSKH, mask_BTS, softcap):
  """Returns the means by a softmax in f32, products in the inputs' dtype."""
  logits_BKTGS = _logits(q_BTKGH, k_BSKH)
  if softcap is not None:
    logits_BKTGS = softcap * jnp.tanh(logits_BKTGS / softcap)
  logits_BKTGS = jnp.where(mask_BTS[:, None, :, None, :], logits_BKTGS, _MASKED)
  probs_BKTGS = jax.nn.softmax(logits_BKTGS, axis=-1).astype(v_BSKH.dtype)
  return jnp.einsum('BKTGS,BSKH->BTKGH', probs_BKTGS, v_BSKH)


# Autodiff would multiply the f32 cotangent by the bf16 keys in f32, several
# times slower on GPUs. So it is rounded to bf16 first, as flash kernels do.
@jax.custom_vjp
def _logits(q_BTKGH, k_BSKH):
  return jnp.einsum('BTKGH,BSKH->BKTGS', q_BTKGH, k_BSKH,
                    preferred_element_type=jnp.float32)


def _logits_fwd(q_BTKGH, k_BSKH):
  return _logits(q_BTKGH, k_BSKH), (q_BTKGH, k_BSKH)


def _logits_bwd(inputs, dlogits_BKTGS):
  q_BTKGH, k_BSKH = inputs
  dlogits_BKTGS = dlogits_BKTGS.astype(q_BTKGH.dtype)
  return (jnp.einsum('BKTGS,BSKH->BTKGH', dlogits_BKTGS, k_BSKH),
          jnp.einsum('BKTGS,BTKGH->BSKH', dlogits_BKTGS, q_BTKGH))


_logits.defvjp(_logits_fwd, _logits_bwd)


def _group(q_BTNH, k_BTKH):
  """Groups queries by the key-value head they share: (B, T, K, G, H)."""
  B, T, _, H = q_BTNH.shape
  return q_BTNH.reshape(B, T, k_BTKH.shape[2], -1, H)


def _same(q_segments_BT, k_segments_BS):
  return q_segments_BT[:, :, None] == k_segments_BS[:, None, :]


def _pad(x_BT, length):
  """Adds zeros at the end of the rows; a segment id of 0 is padding."""
  ends = ((0, 0), (0, length - x_BT.shape[1]))
  return jnp.pad(x_BT, ends + ((0, 0),) * (x_BT.ndim - 2))


# Fused kernels ---------------------------------------------------------------


def _splash(q, k, v, positions_BT, segment_ids_BT, window, softcap, mesh):
  """Runs JAX's Pallas kernel for TPUs; on a CPU it is interpreted, slowly."""
  # Here, because the import takes a twelfth of the start of every command.
  from jax.experimental.pallas.ops.tpu import splash_attention

  del positions_BT
  interpret = _platform(mesh) != 'tpu'

  def local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    _, T, N, _ = q_BTNH.shape
    block = min(_SPLASH_BLOCK, -(-T // 128) * 128)
    padded = -(-T // block) * block
    q_BNTH, k_BKTH, v_BKTH = (
        jnp.swapaxes(_pad(x, padded), 1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    kernel = _splash_kernel(padded, N, block, window, softcap, interpret)
    segment_ids_BT = _pad(segment_ids_BT, padded)
    out_BNTH = jax.vmap(kernel)(
        q_BNTH, k_BKTH, v_BKTH,
        splash_attention.SegmentIds(segment_ids_BT, segment_ids_BT))
    return jnp.swapaxes(out_BNTH, 1, 2)[:, :T]

  return _on_each_device(local, mesh, q, k, v, segment_ids_BT)


@functools.lru_cache(maxsize=32)
def _splash_kernel(T, N, block, window, softcap, interpret):
  """Returns the kernel for N heads, with its tables of blocks in numpy.

  As JAX arrays they would belong to the first trace, and later traces reuse
  them.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention

  mask = (splash_attention.CausalMask((T, T)) if window is None else
          splash_attention.LocalMask((T, T), (window - 1, 0), 0))
  sizes = splash_attention.BlockSizes(**{name: block for name in (
      'block_q', 'block_kv', 'block_kv_compute', 'block_q_dkv', 'block_kv_dkv',
      'block_kv_dkv_compute', 'block_q_dq', 'block_kv_dq')})
  with jax.ensure_compile_time_eval():
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([mask] * N), block_sizes=sizes,
        attn_logits_soft_cap=softcap, interpret=interpret)
    return jax.tree.map(np.asarray, kernel)


def _cudnn(
    q, k, v, positions_BT, segment_ids_BT, window, softcap, mesh,
    implementation='cudnn'):
  """Runs cuDNN's flash attention on rows of one segment, padded at the end.

  There only padding sees padding, and the results at padding are zeroed, so
  cuDNN need not know the lengths.
  """
  del positions_BT, softcap  # `_cudnn_refusal` refuses a softcap.

  def local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, scale=1.0, is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation)
    return jnp.where(segment_ids_BT[:, :, None, None] > 0, out_BTNH, 0)

  return _on_each_device(local, mesh, q, k, v, segment_ids_BT)


def _tokamax(
    q, k, v, positions_BT, segment_ids_BT, window, softcap, mesh,
    implementation='mosaic_gpu'):
  """Runs tokamax's Mosaic kernel.

  The public function takes packing only as a (B, T, T) mask, so this calls its
  operator with the first key that each query sees.
  """
  del positions_BT
  from tokamax._src.ops.attention import api
  from tokamax._src.ops.attention import base

  def local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    index_T = jnp.arange(q_BTNH.shape[1])
    previous_BT = jnp.pad(segment_ids_BT, ((0, 0), (1, 0)))[:, :-1]
    first_BT = jax.lax.cummax(
        jnp.where(segment_ids_BT != previous_BT, index_T[None], 0), axis=1)
    if window is not None:
      first_BT = jnp.maximum(first_BT, index_T[None] - window + 1)
    return api.IMPLEMENTATIONS[implementation](
        q_BTNH, k_BTKH, v_BTKH, logits_scale=1.0, logits_soft_cap=softcap,
        mask=base.Mask(k_start=first_BT[:, None], is_causal=True))

  return _on_each_device(local, mesh, q, k, v, segment_ids_BT)


def _on_each_device(fn, mesh, q, k, v, segment_ids_BT):
  """Calls on each device's share a kernel that the compiler cannot split."""
  if mesh is None or mesh.size == 1:
    return fn(q, k, v, segment_ids_BT)
  rows = tuple(a for a in ('data', 'fsdp') if a in mesh.shape)
  if q.shape[0] % math.prod(mesh.shape[a] for a in rows):
    rows = None
  tensor = mesh.shape.get('tensor', 1)
  heads = 'tensor' if tensor > 1 and k.shape[2] % tensor == 0 else None
  spec = P(rows, None, heads, None)
  # The kernels' outputs do not say over which axes they vary.
  return jax.shard_map(
      fn, mesh=mesh, in_specs=(spec, spec, spec, P(rows, None)),
      out_specs=spec, check_vma=False)(q, k, v, segment_ids_BT)


def _platform(mesh):
  """Asks the mesh first: programs are also compiled for absent devices."""
  return jax.default_backend() if mesh is None else (
      mesh.devices.flat[0].platform)


# Which device can run which -------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
  """What decides whether a kernel can run."""

  platform: str  # 'cpu', 'gpu' or 'tpu'.
  device_kind: str  # As JAX names it: 'TPU v5 lite', 'NVIDIA H200'.
  compute_capability: float  # Of an NVIDIA GPU, 0 elsewhere.
  head_dim: int  # The largest of the model.
  softcap: float | None
  packed: bool  # Whether rows hold more than one example.
  dtype: Any  # Of queries, keys and values.


def _splash_refusal(case):
  if case.platform != 'tpu':
    return 'it is for TPUs'
  # jax issue 23989.
  if any(old in case.device_kind for old in ('v2', 'v3')):
    return f'{case.device_kind} has no matrix product in Pallas kernels'
  if jnp.dtype(case.dtype) == jnp.float16:
    return 'it takes bfloat16 and float32, not float16'
  return ''


def _nvidia_refusal(case):
  if case.platform != 'gpu' or not case.compute_capability:
    return 'it is for NVIDIA GPUs'
  if jnp.dtype(case.dtype) not in (jnp.bfloat16, jnp.float16):
    return f'it takes bfloat16 and float16, not {jnp.dtype(case.dtype)}'
  return ''


def _cudnn_refusal(case):
  if refusal := _nvidia_refusal(case):
    return refusal
  capability = case.compute_capability
  if capability < 8:
    return f'it needs compute capability 8.0, not {capability}'
  # Head widths: jax/_src/cudnn/fused_attention_stablehlo.py.
  widest = 256 if capability >= 9 else 128
  if case.head_dim > widest or case.head_dim % 8:
    return (f'compute capability {capability} takes heads up to {widest} wide'
            f' in steps of 8, not {case.head_dim}')
  if case.softcap is not None:
    return 'it has no softcap'
  return 'it takes one example a row' if case.packed else ''


def _tokamax_refusal(case):
  if refusal := _nvidia_refusal(case):
    return refusal
  if int(case.compute_capability) not in (9, 10):  # As of tokamax 0.0.17.
    return (f'its backward pass needs compute capability 9.0 or 10.x, not'
            f' {case.compute_capability}')
  if importlib.util.find_spec('tokamax') is None:
    return 'the package tokamax is not installed'
  return ''


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A kernel of `attend`."""

  # (q, k, v, positions, segment ids, window, softcap, mesh) -> result.
  run: Callable[..., jax.Array]
  # Says why it cannot run in a case, '' if it can. None: it runs everywhere.
  refusal: Callable[[Case], str] | None = None


# 'auto' tries those with a `refusal` in this order.
KERNELS = {
    'einsum': Kernel(_einsum),
    'chunked': Kernel(_chunked),
    'splash': Kernel(_splash, _splash_refusal),
    'cudnn': Kernel(_cudnn, _cudnn_refusal),
    'tokamax': Kernel(_tokamax, _tokamax_refusal),
}
