"""Which attention kernel a device runs, and whether it runs it rightly.

What a kernel says it can do (`supported`) is not taken on trust: `choose` runs
it on the device before training, beside the reference, and goes on to the next
where value or gradient differ (`check`).
"""

import functools
import importlib.util
import math
from typing import Any
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gemma_sft import errors
from gemma_sft.nn import attention


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
    kernel: One of `attention.KERNELS`.
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
    name: 'auto' or one of `attention.KERNELS`.
    check: Runs the module's `check` for a kernel, with the run's shapes bound;
      None takes the kernels' word. Not called for pure JAX.
    **facts: The keyword arguments of `supported`.

  Raises:
    UserError: for an unknown name, or a kernel that the device lacks or runs
      wrongly.
  """
  if name != 'auto' and name not in attention.KERNELS:
    raise errors.UserError(
        f'the attention kernel is {name!r}',
        f'auto or one of {", ".join(attention.KERNELS)}',
        f'{errors.nearest(name, attention.KERNELS)}Or use auto.')

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
    kernel: One of `attention.KERNELS`.
    N: Query heads.
    K: Key-value heads.
    H: Head width.
    window: Of the local layers, None if there are none.
    softcap: Of the attention's logits.
    dtype: Of queries, keys and values.
    T: Length of the rows.
    mesh: As in `attention.attend`.
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
        lambda *qkv: attention.attend(
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
