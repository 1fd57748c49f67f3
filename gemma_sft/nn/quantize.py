"""The frozen base of QLoRA in 8 or 4 bits (Dettmers et al. 2023, 2305.14314).

Weights are cut into blocks along their last axis and each block is divided by
its largest magnitude, then rounded to one of 255 or 15 equal steps (int8, int4)
or to the 16 levels of nf4, which are spaced by the quantiles of a normal
distribution. Only projections are quantised, not embeddings, norms and scales.
On the device a weight is dequantised only while a product needs it.

    kind   bits a weight, scale included   error of normal weights, relative rms
    int8   8.125                           0.65 %
    int4   4.25                            10.8 %
    nf4    4.25                            9.2 %
"""

from collections.abc import Callable
import functools
import math
import statistics
from typing import Any

import flax.struct
import jax
from jax.experimental import layout
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gemma_sft import errors
from gemma_sft.adapters import projections

KINDS = ('int8', 'int4', 'nf4')

# Largest block; bitsandbytes also has 64 for 4 bits.
_BLOCK = {'int8': 128, 'int4': 64, 'nf4': 64}
_LARGEST = {'int8': 127, 'int4': 7, 'nf4': 1}  # Multiple of the scale.


@flax.struct.dataclass
class Quantized:
  """A weight in blocks along its last axis; a pytree of two leaves.

  Leading axes may be stacked, sliced and scanned over like those of an array.
  Values are int8 (..., n). In 4 bits they are uint8 (..., n / 2): the first
  half of a block's values in the low bits, the second half in the high bits.
  """

  values: jax.Array
  scales: jax.Array  # bfloat16 (..., n / block).
  kind: str = flax.struct.field(pytree_node=False)

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the weight."""
    *leading, last = self.values.shape
    return (*leading, last if self.kind == 'int8' else 2 * last)

  @property
  def size(self) -> int:
    """Number of parameters, scales not counted."""
    return math.prod(self.shape)


def is_quantized(path: str) -> bool:
  """Whether the weight at a path, as 'layer_0/mlp/linear', can be quantised.

  These are the weights that can have an adapter.
  """
  return path.removesuffix('/w').rpartition('/')[2] in projections.BY_LAYER


@functools.cache
def nf4_levels() -> tuple[float, ...]:
  """Returns the 16 levels of nf4, from -1 to 1 with an exact 0.

  Quantiles of the standard normal at equal steps of probability, 8 of the
  positive and 7 of the negative half, divided by the largest (arXiv 2305.14314,
  section 3; the outermost probability is the mean of 1 - 1/30 and 1 - 1/32, as
  in bitsandbytes).
  """
  outermost = (1 - 1 / 30 + 1 - 1 / 32) / 2
  quantile = statistics.NormalDist().inv_cdf
  positive, negative = (
      [quantile(p) for p in np.linspace(outermost, 0.5, n)[:-1]]
      for n in (9, 8))
  largest = positive[0]
  return tuple(sorted(
      [p / largest for p in positive] + [0.0] + [-n / largest for n in negative]
  ))


def quantize(array: np.ndarray, kind: str) -> Quantized:
  """Returns a weight of any dtype quantised on the host, with numpy leaves.

  Raises:
    UserError: for an odd n in 4 bits, or values that are not finite.
  """
  block = _block_size(array.shape, kind)
  blocks = np.asarray(array, np.float32).reshape(*array.shape[:-1], -1, block)
  largest = np.maximum(blocks.max(axis=-1), -blocks.min(axis=-1))
  scales = _round_up(largest / np.float32(_LARGEST[kind]))
  if not np.isfinite(scales).all():
    raise errors.UserError(
        f'a weight of shape {array.shape} with values that are not finite',
        'weights that are numbers', 'fetch the weights again')
  # A block of zeros has the scale 0.
  divisors = np.where(scales == 0, 1, scales).astype(np.float32)
  blocks = blocks / divisors[..., None]
  if kind == 'nf4':
    levels = np.array(nf4_levels(), np.float32)
    codes = np.zeros(blocks.shape, np.uint8)
    for boundary in (levels[1:] + levels[:-1]) / 2:
      codes += blocks > boundary
  else:
    codes = np.rint(blocks, out=blocks).astype(np.int8)
  if kind == 'int8':
    return Quantized(codes.reshape(array.shape), scales, kind)
  if kind == 'int4':
    codes = (codes + 8).astype(np.uint8)
  low, high = codes[..., : block // 2], codes[..., block // 2 :]
  packed = (low | high << 4).reshape(*array.shape[:-1], -1)
  return Quantized(packed, scales, kind)


def _block_size(shape: tuple[int, ...], kind: str) -> int:
  """Returns the largest allowed block size that divides the last axis."""
  n = shape[-1]
  step = 1 if kind == 'int8' else 2
  if n % step:
    raise errors.UserError(
        f'a weight of shape {shape}, whose last axis is odd',
        f'an even last axis for {kind}: two values share a byte',
        "set --config.model.quantization=int8, or ''")
  return max(b for b in range(step, _BLOCK[kind] + 1, step) if n % b == 0)


def _round_up(array: np.ndarray) -> np.ndarray:
  """Rounds non-negative f32 up to bfloat16, so that no value is clipped."""
  bits = array.astype(np.float32).view(np.uint32)
  return ((bits + np.uint32(0xFFFF)) >> 16).astype(np.uint16).view(
      ml_dtypes.bfloat16)


def dequantize(quantized: Quantized, dtype: Any) -> jax.Array:
  """Returns the weight (..., n): codes times scales in f32, cast to `dtype`."""
  shape = quantized.shape
  scales = jnp.asarray(quantized.scales, jnp.float32)[..., None]
  n_blocks = scales.shape[-2]
  values = jnp.asarray(quantized.values).reshape(*shape[:-1], n_blocks, -1)
  if quantized.kind != 'int8':
    values = jnp.stack((values & 15, values >> 4), axis=-2)
    values = values.reshape(*shape[:-1], n_blocks, -1)
  if quantized.kind == 'nf4':
    multiples = _look_up(values)
  else:
    offset = 0 if quantized.kind == 'int8' else 8
    multiples = values.astype(jnp.float32) - offset
  return (multiples * scales).astype(dtype).reshape(shape)


def dense(weight: Any, dtype: Any) -> jax.Array:
  """Returns a weight, quantised or not, as an array of a dtype."""
  if isinstance(weight, Quantized):
    return dequantize(weight, dtype)
  return weight.astype(dtype)


def _look_up(codes: jax.Array) -> jax.Array:
  """Returns the levels of nf4 codes.

  A tree of selects, one bit a level: elementwise operations, which fuse with
  what follows on every backend (on a CPU as fast as a gather).
  """
  levels = [jnp.float32(level) for level in nf4_levels()]
  for bit in range(4):
    is_set = (codes >> bit) & 1 == 1
    levels = [
        jnp.where(is_set, high, low)
        for low, high in zip(levels[::2], levels[1::2])]
  return levels[0]


def _dequantizing_einsum(equation, x, quantized):
  return jnp.einsum(equation, x, dequantize(quantized, x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(
    equation: str, x: jax.Array, quantized: Quantized,
    product: Callable[..., jax.Array] = _dequantizing_einsum) -> jax.Array:
  """Returns the einsum of `x` with the weight, computed in the dtype of `x`.

  Differentiable in `x` only: the base is frozen. Each axis of `x` is one of the
  weight or of the result. `product` dequantises and multiplies.
  """
  return _multiply(equation, x, quantized, product)


def _multiply(equation, x, quantized, product):
  # The barrier makes the full weight depend on x. Without it the compiler could
  # move the dequantising out of a loop over microbatches, or keep the full
  # weight for the backward pass.
  quantized, x = jax.lax.optimization_barrier((quantized, x))
  # Without this a TPU's compiler transposes the codes of all layers before the
  # loop over them, and holds them twice.
  return product(equation, x, jax.tree.map(_row_major, quantized))


def _row_major(array):
  return layout.with_layout_constraint(
      array, layout.Layout(major_to_minor=tuple(range(array.ndim))))


# Differentiating the einsum itself would keep the dequantised weight from the
# forward to the backward pass; under a scan over layers, those of all layers:
# the whole base in full precision. So the residual is the quantised weight,
# which exists anyway, and the backward pass dequantises again.


def _einsum_fwd(equation, x, quantized, product):
  # An empty array carries the dtype of `x`, which float16 products ignore.
  return _multiply(equation, x, quantized, product), (
      quantized, jnp.zeros(0, x.dtype))


def _einsum_bwd(equation, product, residuals, dy):
  quantized, x_like = residuals
  dx_equation, _ = gradient_equations(equation)
  return _multiply(dx_equation, dy, quantized, product).astype(
      x_like.dtype), None


def gradient_equations(equation: str) -> tuple[str, str]:
  """Returns the einsums of the gradients: of (dy, weight) and of (x, dy)."""
  operands, result = equation.replace(' ', '').split('->')
  x, weight = operands.split(',')
  return f'{result},{weight}->{x}', f'{x},{result}->{weight}'


einsum.defvjp(_einsum_fwd, _einsum_bwd)
