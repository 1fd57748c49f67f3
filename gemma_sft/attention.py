"""The attention of the training forward, by the best kernel of the device.

    kernel   runs on             packed  softcap  memory of a row
    einsum   everything          yes     yes      the square of its length
    chunked  everything          yes     yes      256 queries at a time
    splash   TPU v4 and newer    yes     yes      linear
    cudnn    NVIDIA, bf16, f16   no      no       linear
    tokamax  NVIDIA H100, B200   yes     yes      linear

`einsum` is the library's own maths (`gemma/gm/nn/_modules.py`) with the
softmax in f32; every other kernel is held to it, by the tests where it runs on
a CPU and by `check` on the device at hand before `choose` takes it.
"""

import dataclasses
import functools
import importlib.util
import math
from typing import Any
from typing import Callable

import jax
from jax.experimental.pallas.ops.tpu import splash_attention
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from gemma_sft import errors
from gemma_sft import shapes

KERNELS = ('einsum', 'chunked', 'splash', 'cudnn', 'tokamax')

# Of masked logits, as in the library: finite, so that a row without a key is
# a mean and not NaN.
_MASKED = -2.3819763e38
# Queries at a time. On a CPU 128 saves up to a fifth of the attention and 512
# costs up to twice as much; accelerators would rather have fewer, larger steps.
_CHUNK = 256
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
  C = min(_CHUNK, T)
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


# Choice ----------------------------------------------------------------------


def supported(
    kernel: str,
    *,
    platform: str,
    device_kind: str,
    compute_capability: float,
    head_dim: int,
    softcap: float | None,
    packed: bool,
    dtype: Any,
) -> str:
  """Returns '' if a kernel can run, or else the reason why not.

  Sources: `jax/_src/cudnn/fused_attention_stablehlo.py` for cuDNN's head
  widths; tokamax 0.0.17, whose backward pass is for compute capability 9.0 and
  10.x alone; jax issue 23989 for TPU v3.

  Args:
    kernel: One of `KERNELS`.
    platform: 'cpu', 'gpu' or 'tpu'.
    device_kind: As JAX names the device: 'TPU v5 lite', 'NVIDIA H200'.
    compute_capability: Of an NVIDIA GPU, 0 elsewhere.
    head_dim: Head width H, the largest of the model.
    softcap: Of the attention's logits.
    packed: Whether rows hold more than one example.
    dtype: Of queries, keys and values.
  """
  half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
  if kernel == 'splash':
    if platform != 'tpu':
      return 'it is for TPUs'
    if any(old in device_kind for old in ('v2', 'v3')):
      return f'{device_kind} has no matrix product in Pallas kernels'
    if jnp.dtype(dtype) == jnp.float16:
      return 'it takes bfloat16 and float32, not float16'
  if kernel in ('cudnn', 'tokamax'):
    if platform != 'gpu' or not compute_capability:
      return 'it is for NVIDIA GPUs'
    if not half:
      return f'it takes bfloat16 and float16, not {jnp.dtype(dtype)}'
  if kernel == 'cudnn':
    if compute_capability < 8:
      return f'it needs compute capability 8.0, not {compute_capability}'
    widest = 256 if compute_capability >= 9 else 128
    if head_dim > widest or head_dim % 8:
      return (f'compute capability {compute_capability} takes heads up to'
              f' {widest} wide in steps of 8, not {head_dim}')
    if softcap is not None:
      return 'it has no softcap'
    if packed:
      return 'it takes one example a row'
  if kernel == 'tokamax':
    if int(compute_capability) not in (9, 10):
      return (f'its backward pass needs compute capability 9.0 or 10.x, not'
              f' {compute_capability}')
    if importlib.util.find_spec('tokamax') is None:
      return 'the package tokamax is not installed'
  return ''


# Relative errors by norm that `choose` accepts. f32: sums in another order,
# 1e-6 seen in splash. bf16: rounded probabilities and cotangents, 5e-3 seen;
# a wrong mask or a missing cap is above 1e-1.
_TOLERANCE_F32, _TOLERANCE_HALF = 1e-4, 2e-2


def tolerance(dtype: Any, platform: str) -> float:
  """Returns the largest error of `check` that `choose` accepts."""
  # TPUs make products of f32 from rounded ones unless asked otherwise
  # (jax_default_matmul_precision), in every kernel alike.
  exact = jnp.dtype(dtype) == jnp.float32 and platform != 'tpu'
  return _TOLERANCE_F32 if exact else _TOLERANCE_HALF


def choose(
    name: str,
    *,
    check: Callable[[str], tuple[float, float]] | None = None,
    **facts: Any,
) -> tuple[str, str]:
  """Returns (kernel, why) for a device.

  'auto' walks splash, cudnn, tokamax, and takes the first that the device has
  and whose check passes, or else 'chunked': on a CPU it was as fast as
  'einsum' for rows of 256 tokens and 2-4 times as fast for 2,048.

  Args:
    name: 'auto' or one of `KERNELS`.
    check: Runs the module's `check` for a kernel, with the run's shapes bound;
      None takes the kernels' word. Not called for pure JAX.
    **facts: The keyword arguments of `supported`.

  Raises:
    UserError: for an unknown name, or a kernel that the device lacks or runs
      wrongly.
  """
  if name != 'auto' and name not in KERNELS:
    raise errors.UserError(
        f'the attention kernel is {name!r}',
        f'auto or one of {", ".join(KERNELS)}',
        f'{errors.nearest(name, KERNELS)}Or use auto.')

  def refusal(kernel):
    return supported(kernel, **facts) or _fault(kernel, check, facts)

  refusals = {}

  def automatic():
    for kernel in ('splash', 'cudnn', 'tokamax'):
      if kernel not in refusals:
        refusals[kernel] = refusal(kernel)
      if not refusals[kernel]:
        return kernel
    return 'chunked'

  if name == 'auto':
    kernel = automatic()
    reasons = [f'{k}: {r}' for k, r in refusals.items() if r]
    return kernel, '; '.join(reasons) or f'the fastest on {_device(facts)}'
  refusals[name] = refusal(name)
  if refusals[name]:
    raise errors.UserError(
        f'the attention kernel {name} cannot be used on {_device(facts)}:'
        f' {refusals[name]}',
        'a kernel that computes the attention there',
        f'use auto, which takes {automatic()}')
  return name, 'as asked'


def _device(facts):
  return facts['device_kind'] or facts['platform']


def _fault(kernel, check, facts):
  """Returns '' if a kernel computes what it should, or else what is wrong."""
  if check is None or kernel in ('einsum', 'chunked'):
    return ''
  try:
    value, gradient = check(kernel)
  # Whatever a compiler or a kernel's import raises: the next one is tried.
  except Exception as e:  # pylint: disable=broad-exception-caught
    lines = str(e).strip().splitlines()
    return f'it failed: {type(e).__name__}: {lines[0] if lines else ""}'
  limit = tolerance(facts['dtype'], facts['platform'])
  if value <= limit and gradient <= limit:
    return ''
  return (f'its output is off by {value:.1e} and its gradients by'
          f' {gradient:.1e}, more than {limit:.0e}')


def check(
    kernel: str,
    *,
    N: int,
    K: int,
    H: int,
    window: int | None,
    softcap: float | None,
    dtype: Any,
    T: int,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[float, float]:
  """Returns a kernel's largest relative errors (output, gradients) by norm.

  On the device, against 'einsum' in f32 and full precision, on random rows
  with padding (packed, but for cuDNN), global and local layers. Rows longer
  than 1,024 are checked at 1,024, with a window that still cuts something off:
  the reference takes the square. NaN anywhere is an error of infinity.

  Args:
    kernel: One of `KERNELS`.
    N: Query heads.
    K: Key-value heads.
    H: Head width.
    window: Of the local layers, None if there are none.
    softcap: Of the attention's logits.
    dtype: Of queries, keys and values.
    T: Length of the rows.
    mesh: As in `attend`.
  """
  T = min(T, 1024)
  if jax.process_count() > 1:
    mesh = None  # Each process on a device of its own.
  B = 2 if mesh is None else 2 * math.prod(
      mesh.shape[a] for a in ('data', 'fsdp') if a in mesh.shape)
  if window is not None:
    window = max(1, min(window, T // 4))
  positions_BT, segment_ids_BT = _random_rows(B, T, packed=kernel != 'cudnn')
  keys = jax.random.split(jax.random.key(0), 4)
  # Logits at which a softcap matters, and of a usual size without one.
  scale = max(1.0, (softcap or 0) / 8) / math.sqrt(H)
  q, k, v, dout = (
      jax.random.normal(key, (B, T, heads, H))
      for key, heads in zip(keys, (N, K, K, N)))
  q, k, v = (q * scale).astype(dtype), k.astype(dtype), v.astype(dtype)
  filled_BTNH = (segment_ids_BT > 0)[:, :, None, None]
  dout = jnp.where(filled_BTNH, dout, 0).astype(dtype)

  # Compiled with the arrays as arguments: constants would be folded, slowly.
  @functools.partial(jax.jit, static_argnums=(0, 1, 2))
  def results(kernel, is_local, mesh, positions_BT, segment_ids_BT, dout, *qkv):
    out, vjp = jax.vjp(
        lambda *qkv: attend(
            *qkv, positions_BT, segment_ids_BT, is_local, window=window,
            softcap=softcap, kernel=kernel, mesh=mesh), *qkv)
    # 0 * NaN is NaN: what padding holds has to be finite.
    out = jnp.where((segment_ids_BT > 0)[:, :, None, None], out, 0 * out)
    return out, *vjp(dout)

  worst = [0.0, 0.0]
  for is_local in (False,) if window is None else (False, True):
    with jax.default_matmul_precision('highest'):
      wanted = results(
          'einsum', is_local, None, positions_BT, segment_ids_BT,
          *(x.astype(jnp.float32) for x in (dout, q, k, v)))
    got = results(
        kernel, is_local, mesh, positions_BT, segment_ids_BT, dout, q, k, v)
    relative = [_relative_error(g, w) for g, w in zip(got, wanted)]
    worst = [max(worst[0], relative[0]), max(worst[1], *relative[1:])]
  return worst[0], worst[1]


def _relative_error(got, wanted):
  got, wanted = (np.asarray(x, np.float32) for x in (got, wanted))
  error = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
  return error if math.isfinite(error) else math.inf


def _random_rows(B, T, packed):
  """Returns (positions, segment ids): about four examples or one a row."""
  rng = np.random.default_rng(0)
  positions_BT = np.zeros((B, T), np.int32)
  segment_ids_BT = np.zeros((B, T), np.int32)
  for row in range(B):
    filled = T - int(rng.integers(1, max(2, T // 8)))
    cuts = (np.sort(rng.choice(np.arange(1, filled), 3, replace=False))
            if packed and filled > 8 else [])
    edges = [0, *cuts, filled]
    for i, (start, end) in enumerate(zip(edges, edges[1:])):
      positions_BT[row, start:end] = np.arange(end - start)
      segment_ids_BT[row, start:end] = i + 1
  return jnp.asarray(positions_BT), jnp.asarray(segment_ids_BT)
