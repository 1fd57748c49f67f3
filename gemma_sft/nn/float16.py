"""Products in float16, everything else in float32: for cards without bfloat16.

A T4 multiplies float16 eight times as fast as float32 and has no bfloat16.
float16 ends at 65,504, and Gemma goes beyond: the residual stream of Gemma 3
does (unsloth.ai/blog/gemma3; 103,795 in the 270M's layer 14), and so can the
product of an MLP's gate and up. So float16 is what is multiplied and nothing
else: operands are rounded on their way into a matrix product, sums and results
are float32, and so are residual stream, norms, rotations, softmax and what the
backward pass adds up.

    operand                         how it stays below 65,504
    input of q, k, v, gate, up      comes from a norm
    queries, keys, values           scaled before the product; logits float32
    input of o                      a mean of values
    input of down, and all others   each row divided by a power of two (`fit`)
    hidden states at the head       come from the final norm
    cotangents                      the loss scale (`loss_scale`)

What breaks these bounds all the same is found and named by `overflow`. Weights
in float16 ask for it: no setting does, so whoever loads them computes alike.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

LARGEST = 65504.0  # numpy.finfo('float16').max
# Rows are brought below this, half of the end: adapters' dropout multiplies
# what is kept by up to 2 after that (a rate of a half).
_FITTING_EXPONENT = 15


def is_used(params: Any) -> bool:
  """Whether products of these weights are made in float16."""
  return any(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(params))


def with_float32_scales(params: Any) -> Any:
  """Returns weights of which those of the norms are float32."""
  def cast(path, leaf):
    name = str(getattr(path[-1], 'key', ''))
    return leaf.astype(jnp.float32) if name.endswith('scale') else leaf

  return jax.tree_util.tree_map_with_path(cast, params)


def operand(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Returns activations as they are multiplied with a weight."""
  return x.astype(jnp.float16) if weight.dtype == jnp.float16 else x


# Autodiff would multiply the f32 cotangent by the weight as f32, without the
# tensor cores: rounded first, as the operands of the forward product are.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
  """Returns the f32 einsum of two arrays, both rounded to float16.

  Args:
    equation: Each axis of an operand is one of the other or of the result.
    x: Activations.
    weight: Of any dtype; its gradient has that.
  """
  return _multiply(equation, x, weight)


def _multiply(equation, x, weight):
  return jnp.einsum(
      equation, x.astype(jnp.float16), weight.astype(jnp.float16),
      preferred_element_type=jnp.float32)


def _einsum_fwd(equation, x, weight):
  x16, weight16 = x.astype(jnp.float16), weight.astype(jnp.float16)
  # Empty arrays carry the dtypes.
  like = jnp.zeros(0, x.dtype), jnp.zeros(0, weight.dtype)
  return _multiply(equation, x16, weight16), (x16, weight16, *like)


def _einsum_bwd(equation, residuals, dy):
  x16, weight16, x_like, weight_like = residuals
  operands, result = equation.replace(' ', '').split('->')
  x_axes, weight_axes = operands.split(',')
  dx = _multiply(f'{result},{weight_axes}->{x_axes}', dy, weight16)
  dweight = _multiply(f'{x_axes},{result}->{weight_axes}', x16, dy)
  return dx.astype(x_like.dtype), dweight.astype(weight_like.dtype)


einsum.defvjp(_einsum_fwd, _einsum_bwd)


def fit(x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (rows that float16 can hold, the factors (B, T) they took).

  The factor is 1 or a power of two below, so nothing is rounded by it, and
  counts as a constant in the gradient: a product that is divided by it is what
  it would be without.

  Args:
    x_BTD: Activations (B, T, ...).
  """
  axes = tuple(range(2, x_BTD.ndim))
  largest_BT = jnp.max(jnp.abs(jax.lax.stop_gradient(x_BTD)), axis=axes)
  _, exponent_BT = jnp.frexp(largest_BT)
  factor_BT = jnp.ldexp(
      jnp.ones_like(largest_BT),
      -jnp.maximum(exponent_BT - _FITTING_EXPONENT, 0))
  return x_BTD * _like(factor_BT, x_BTD), factor_BT


def unfit(y_BTD: jax.Array, factor_BT: jax.Array) -> jax.Array:
  """Returns what was made from rows of `fit` as without it."""
  return y_BTD / _like(factor_BT, y_BTD)


def _like(factor_BT, x_BTD):
  return factor_BT.reshape(*factor_BT.shape, *(1,) * (x_BTD.ndim - 2))
