"""Chooses the attention kernel of a device, and checks that it is correct.

That a kernel does not refuse a device is not enough: before training, `choose`
compares it there with the reference (`check`), and tries the next kernel if the
output or the gradients differ.
"""

import functools
import math
from typing import Any
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gemma_sft import errors
from gemma_sft.nn import attention

# Relative errors by norm that `choose` accepts. f32: sums in another order,
# 1e-6 in splash. bf16: rounded probabilities and cotangents, 5e-3. A wrong mask
# or a missing cap gives more than 1e-1.
_TOLERANCE_F32, _TOLERANCE_HALF = 1e-4, 2e-2


def tolerance(dtype: Any, platform: str) -> float:
  """Returns the largest error of `check` that `choose` accepts."""
  # By default TPUs round the operands of f32 products, in every kernel
  # (jax_default_matmul_precision).
  exact = jnp.dtype(dtype) == jnp.float32 and platform != 'tpu'
  return _TOLERANCE_F32 if exact else _TOLERANCE_HALF


def choose(
    name: str, *, check: Callable[[str], tuple[float, float]] | None = None,
    **facts: Any) -> tuple[str, str]:
  """Returns (kernel, why) for a device.

  'auto' takes the first kernel that the device can run and whose check passes,
  or else 'chunked': on a CPU that was as fast as 'einsum' for rows of 256
  tokens and 2-4 times as fast for 2,048.

  `check` is the module's `check` with the run's shapes bound, or None to skip
  it; pure JAX is not checked. `facts` are the fields of `attention.Case`.

  Raises:
    UserError: for a kernel that the device cannot run or runs wrongly.
  """
  case = attention.Case(**facts)
  device = case.device_kind or case.platform
  refusals = {}

  def refuse(kernel):
    if kernel not in refusals:
      refusal = attention.KERNELS[kernel].refusal
      refusals[kernel] = '' if refusal is None else (
          refusal(case) or _fault(kernel, check, case))
    return refusals[kernel]

  def automatic():
    return next((name for name, kernel in attention.KERNELS.items()
                 if kernel.refusal and not refuse(name)), 'chunked')

  if name == 'auto':
    kernel = automatic()
    reasons = [f'{k}: {r}' for k, r in refusals.items() if r]
    return kernel, '; '.join(reasons) or f'the fastest on {device}'
  if refuse(name):
    raise errors.UserError(
        f'the attention kernel {name} cannot be used on {device}:'
        f' {refuse(name)}',
        'a kernel that computes the attention there',
        f'use auto, which takes {automatic()}')
  return name, 'as asked'


def _fault(kernel, check, case):
  """Returns what is wrong with a kernel's results, or ''."""
  if check is None:
    return ''
  try:
    value, gradient = check(kernel)
  # Whatever a compiler or a kernel's import raises, the next kernel is tried.
  except Exception as e:  # pylint: disable=broad-exception-caught
    lines = str(e).strip().splitlines()
    return f'it failed: {type(e).__name__}: {lines[0] if lines else ""}'
  limit = tolerance(case.dtype, case.platform)
  if value <= limit and gradient <= limit:
    return ''
  return (f'its output is off by {value:.1e} and its gradients by'
          f' {gradient:.1e}, more than {limit:.0e}')


def check(
    kernel: str, *, N: int, K: int, H: int, T: int, window: int | None,
    softcap: float | None, dtype: Any, mesh: jax.sharding.Mesh | None = None
) -> tuple[float, float]:
  """Returns a kernel's largest relative errors (output, gradients) by norm.

  Compares it on the device with 'einsum' in f32 and full precision, on random
  rows with padding (packed, except for cuDNN), in global layers and, if there
  is a `window`, in local ones. The reference needs memory for T * T logits, so
  T is at most 1,024 and the window short enough to cut something off. NaN
  anywhere is an error of infinity.
  """
  T = min(T, 1024)
  if jax.process_count() > 1:
    mesh = None  # Each process checks on a device of its own.
  B = 2 if mesh is None else 2 * math.prod(
      mesh.shape[a] for a in ('data', 'fsdp') if a in mesh.shape)
  if window is not None:
    window = max(1, min(window, T // 4))
  positions_BT, segment_ids_BT = _random_rows(B, T, packed=kernel != 'cudnn')
  keys = jax.random.split(jax.random.key(0), 4)
  # Logits large enough for the softcap, and of a usual size without one.
  scale = max(1.0, (softcap or 0) / 8) / math.sqrt(H)
  q, k, v, dout = (
      jax.random.normal(key, (B, T, heads, H))
      for key, heads in zip(keys, (N, K, K, N)))
  q, k, v = (q * scale).astype(dtype), k.astype(dtype), v.astype(dtype)
  filled_BTNH = (segment_ids_BT > 0)[:, :, None, None]
  dout = jnp.where(filled_BTNH, dout, 0).astype(dtype)

  # The arrays are arguments, since XLA would fold constants, slowly.
  @functools.partial(jax.jit, static_argnums=(0, 1, 2))
  def results(kernel, is_local, mesh, positions_BT, segment_ids_BT, dout, *qkv):
    out, vjp = jax.vjp(
        lambda *qkv: attention.attend(
            *qkv, positions_BT, segment_ids_BT, is_local, window=window,
            softcap=softcap, kernel=kernel, mesh=mesh), *qkv)
    # 0 * NaN is NaN, so results at padding have to be finite.
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
