"""The attention of the training forward, by the best kernel of the device.

    kernel   runs on             packed  softcap  memory of a row
    einsum   everything          yes     yes      the square of its length
    chunked  everything          yes     yes      256 queries at a time
    splash   TPU v4 and newer    yes     yes      linear
    cudnn    NVIDIA, bf16, f16   no      no       linear
    tokamax  NVIDIA H100, B200   yes     yes      linear

`einsum` is the library's own maths (`gemma/gm/nn/_modules.py`) with the
softmax in f32; every other kernel is held to it, by the tests where it runs on
a CPU and by `attention_choice` on the device at hand before it is taken.
"""

import dataclasses
import functools
import math

import jax
from jax.experimental.pallas.ops.tpu import splash_attention
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from gemma_sft import shapes

KERNELS = ('einsum', 'chunked', 'splash', 'cudnn', 'tokamax')

# Of masked logits, as in the library: finite, so that a row without a key is
# a mean and not NaN.
_MASKED = -2.3819763e38
# Queries at a time. On a CPU 128 saves up to a fifth of the attention and 512
# costs up to twice as much; accelerators would rather have fewer, larger steps.
QUERY_CHUNK = 256
# Global layers: keys up to the end of a query's quarter of the row, 5/8 of the
# square. Each part is compiled on its own, so there are few.
_PARTS = 4
_SPLASH_BLOCK = 512  # Queries and keys at a time; rows are padded to it.


@dataclasses.dataclass(frozen=True)
class _Spec:
  """What is static: an attention is compiled once for each of these."""

  kernel: str
  is_local: bool | None  # None: by the traced flag.
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
  """Returns each query's mean of the values it sees, (B, T, N, H).

  A query sees the keys of its own segment up to itself; in a local layer only
  those of the last `window` positions. What comes out at padding (segment 0)
  is finite and means nothing.

  Args:
    q_BTNH: Queries, rotated and scaled. The result has their dtype.
    k_BTKH: Keys, rotated; K divides N.
    v_BTKH: Values.
    positions_BT: Position in its segment of each token, rising by one.
    segment_ids_BT: 1, 2, ... for the examples of a row, 0 for padding.
    is_local: Whether the window counts; may be traced (layers in a scan).
    window: Positions that a local layer sees, itself among them.
    softcap: Logits become softcap * tanh(logits / softcap).
    kernel: One of `KERNELS`, from `choose`.
    mesh: Where the arrays lie; needed by kernels on more than one device.
  """
  if window is None:
    is_local = False
  static = isinstance(is_local, (bool, np.bool_))
  spec = _Spec(kernel, bool(is_local) if static else None, window, softcap,
               mesh)
  return _attend(spec, q_BTNH, k_BTKH, v_BTKH, positions_BT, segment_ids_BT,
                 None if static else is_local)


# Autodiff of a cond keeps what either branch needs, and zeros for the branch
# that was not taken: twice the memory, and for chunks their stacked keys too.
# So the gradient is taken inside the cond, from the inputs. The price is that
# the backward pass repeats the attention's forward (2-3 % of a step), which
# 'chunked' does anyway: the compiler drops what its own repetition makes idle.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec, q, k, v, positions, segments, flag):
  def run(is_local, q, k, v):
    return _run(spec, is_local, q, k, v, positions, segments)

  return _by_flag(spec, flag, run, q, k, v)


def _attend_fwd(spec, *inputs):
  return _attend(spec, *inputs), inputs


def _attend_bwd(spec, inputs, dout_BTNH):
  q, k, v, positions, segments, flag = inputs

  def run(is_local, q, k, v, dout_BTNH):
    _, vjp = jax.vjp(
        lambda q, k, v: _run(spec, is_local, q, k, v, positions, segments),
        q, k, v)
    return vjp(dout_BTNH)

  return (*_by_flag(spec, flag, run, q, k, v, dout_BTNH), None, None, None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _by_flag(spec, flag, run, *arrays):
  if flag is None:
    return run(spec.is_local, *arrays)
  return jax.lax.cond(
      flag, functools.partial(run, True), functools.partial(run, False),
      *arrays)


def _run(spec, is_local, q, k, v, positions, segments):
  window = spec.window if is_local else None
  return _VARIANTS[spec.kernel](
      q, k, v, positions, segments, window, spec.softcap, spec.mesh)


# Pure JAX --------------------------------------------------------------------


def _einsum(q, k, v, positions_BT, segment_ids_BT, window, softcap, mesh):
  """All logits at once."""
  del mesh
  T = q.shape[1]
  mask_BTS = _same(segment_ids_BT, segment_ids_BT) & jnp.tril(
      jnp.ones((T, T), bool))[None]
  if window is not None:
    distance_BTS = positions_BT[:, :, None] - positions_BT[:, None, :]
    mask_BTS &= distance_BTS < window
  return _mean(_group(q, k), k, v, mask_BTS, softcap).reshape(q.shape)


def _chunked(q, k, v, positions_BT, segment_ids_BT, window, softcap, mesh):
  """A chunk of queries at a time, and only the keys near it.

  Differences of indices stand for those of positions: they are the same
  within a segment.
  """
  del positions_BT, mesh
  T = q.shape[1]
  C = min(QUERY_CHUNK, T)
  n = -(-T // C)
  q_BTKGH, k, v, segment_ids_BT = (
      _pad(x, n * C) for x in (_group(q, k), k, v, segment_ids_BT))
  # Chunks before a query's own that a window can reach into.
  back = n if window is None else min(n, -(-(window - 1) // C))
  if 8 * (1 + back) < 5 * n:  # Else the parts below are no more work.
    out = _local_chunks(q_BTKGH, k, v, segment_ids_BT, C, back, window, softcap)
  else:
    out = _global_chunks(q_BTKGH, k, v, segment_ids_BT, C, window, softcap)
  return out[:, :T].reshape(q.shape)


def _local_chunks(q_BTKGH, k, v, segment_ids_BT, C, back, window, softcap):
  """Each chunk with its own keys, copied: 1 + back times the keys' memory.

  Slices of the whole keys inside the scan would need no copy, but their
  gradient is an addition of the whole keys' for every chunk.
  """
  distance_CS = (jnp.arange(C)[:, None] + back * C
                 - jnp.arange((1 + back) * C)[None])
  near_CS = (distance_CS >= 0) & (distance_CS < window)

  def chunks(x):
    x = x.reshape(x.shape[0], -1, C, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def spans(x):
    """The chunk and those `back` before it; zeros before the first."""
    x = chunks(x)
    pad = jnp.pad(x, ((back, 0),) + ((0, 0),) * (x.ndim - 1))
    return jnp.concatenate(
        [pad[i:i + x.shape[0]] for i in range(back + 1)], axis=2)

  @jax.checkpoint  # Keeps no probabilities.
  def one(chunk):
    q_BCKGH, q_segments_BC, k_BSKH, v_BSKH, k_segments_BS = chunk
    mask_BCS = _same(q_segments_BC, k_segments_BS) & near_CS[None]
    return _mean(q_BCKGH, k_BSKH, v_BSKH, mask_BCS, softcap)

  return _join(jax.lax.map(one, (
      chunks(q_BTKGH), chunks(segment_ids_BT), spans(k), spans(v),
      spans(segment_ids_BT))))


def _global_chunks(q_BTKGH, k, v, segment_ids_BT, C, window, softcap):
  n = q_BTKGH.shape[1] // C
  parts = min(_PARTS, n)
  edges = [n * i // parts for i in range(parts + 1)]

  def part(first, last):
    S = last * C
    k_BSKH, v_BSKH, k_segments_BS = k[:, :S], v[:, :S], segment_ids_BT[:, :S]

    @jax.checkpoint  # Keeps no probabilities.
    def one(chunk):
      i, q_BCKGH, q_segments_BC = chunk
      distance_CS = i * C + jnp.arange(C)[:, None] - jnp.arange(S)[None]
      near_CS = distance_CS >= 0
      if window is not None:
        near_CS &= distance_CS < window
      mask_BCS = _same(q_segments_BC, k_segments_BS) & near_CS[None]
      return _mean(q_BCKGH, k_BSKH, v_BSKH, mask_BCS, softcap)

    def chunks(x):
      x = x[:, first * C:S]
      x = x.reshape(x.shape[0], -1, C, *x.shape[2:])
      return jnp.moveaxis(x, 1, 0)

    return _join(jax.lax.map(one, (
        jnp.arange(first, last), chunks(q_BTKGH), chunks(segment_ids_BT))))

  return jnp.concatenate(
      [part(*edge) for edge in zip(edges, edges[1:])], axis=1)


def _mean(q_BTKGH, k_BSKH, v_BSKH, mask_BTS, softcap):
  """The attention itself; softmax in f32, products in the inputs' dtype."""
  logits_BKTGS = _logits(q_BTKGH, k_BSKH)
  if softcap is not None:
    logits_BKTGS = softcap * jnp.tanh(logits_BKTGS / softcap)
  logits_BKTGS = jnp.where(
      mask_BTS[:, None, :, None, :], logits_BKTGS, _MASKED)
  probs_BKTGS = jax.nn.softmax(logits_BKTGS, axis=-1).astype(v_BSKH.dtype)
  return jnp.einsum('BKTGS,BSKH->BTKGH', probs_BKTGS, v_BSKH)


# Autodiff would multiply the f32 cotangent by the bf16 keys as f32, which GPUs
# do several times slower. Rounded to bf16 first, as flash kernels do.
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
  """Queries by the key-value head that they share: (B, T, K, N / K, H)."""
  B, T, _, H = q_BTNH.shape
  return q_BTNH.reshape(B, T, k_BTKH.shape[2], -1, H)


def _same(q_segments_BT, k_segments_BS):
  return q_segments_BT[:, :, None] == k_segments_BS[:, None, :]


def _pad(x_BT, length):
  """Adds zeros at the end of the rows: of segment ids, padding."""
  ends = ((0, 0), (0, length - x_BT.shape[1]))
  return jnp.pad(x_BT, ends + ((0, 0),) * (x_BT.ndim - 2))


def _join(x_nBC):
  """(chunks, B, C, ...) to (B, T, ...)."""
  n, B, C, *rest = x_nBC.shape
  return jnp.moveaxis(x_nBC, 0, 1).reshape(B, n * C, *rest)


# Fused kernels ---------------------------------------------------------------


def _splash(q, k, v, positions_BT, segment_ids_BT, window, softcap, mesh):
  """JAX's Pallas kernel for TPUs; on a CPU it is interpreted, slowly."""
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
  """The kernel for N heads, with its tables of blocks as numpy arrays.

  They are made outside the trace that asks first, for all the later ones.
  """
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
  """cuDNN's flash attention, for rows of one segment and padding at the end.

  So no query but padding sees padding, and padding is cut off below: neither
  needs cuDNN's own lengths.
  """
  del positions_BT, softcap  # `supported` refuses a softcap.

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
  """Tokamax's Mosaic kernel.

  The public function takes packing only as a (B, T, T) mask, so its operator
  is called with the first key that each query sees.
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


_VARIANTS = {'einsum': _einsum, 'chunked': _chunked, 'splash': _splash,
             'cudnn': _cudnn, 'tokamax': _tokamax}


def _on_each_device(fn, mesh, q, k, v, segment_ids_BT):
  """Calls a kernel that the compiler cannot split on each device's share."""
  if mesh is None or mesh.size == 1:
    return fn(q, k, v, segment_ids_BT)
  rows = tuple(a for a in ('data', 'fsdp') if a in mesh.shape)
  rows = rows if q.shape[0] % math.prod(mesh.shape[a] for a in rows) == 0 else (
      None)
  tensor = mesh.shape.get('tensor', 1)
  heads = 'tensor' if tensor > 1 and k.shape[2] % tensor == 0 else None
  spec = P(rows, None, heads, None)
  # The kernels' outputs do not say over which axes they vary.
  return jax.shard_map(
      fn, mesh=mesh, in_specs=(spec, spec, spec, P(rows, None)),
      out_specs=spec, check_vma=False)(q, k, v, segment_ids_BT)


def _platform(mesh):
  """Of the mesh first: programs are also compiled for absent devices."""
  return jax.default_backend() if mesh is None else (
      mesh.devices.flat[0].platform)
