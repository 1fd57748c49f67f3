"""Products in float16, everything else in float32: for cards without bfloat16.

A T4 multiplies float16 eight times as fast as float32 and has no bfloat16.
float16 ends at 65,504, and Gemma goes beyond: the residual stream of Gemma 3
does (unsloth.ai/blog/gemma3; 103,795 in the 270M's layer 14), and so can the
product of an MLP's gate and up. So only the operands of matrix products are
rounded to float16. Sums and results are float32, and so are residual stream,
norms, rotations, softmax and all sums of the backward pass.

    operand                         how it stays below 65,504
    input of q, k, v, gate, up      comes from a norm
    queries, keys, values           scaled before the product; logits float32
    input of o                      a mean of values
    input of down, and all others   each row divided by a power of two (`fit`)
    hidden states at the head       come from the final norm
    cotangents                      the loss scale (`loss_scale`)

`monitor/overflow.py` names the tensors that overflow all the same. Models with
weights in float16 always compute so, in training and in inference.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gemma_sft.adapters import projections
from gemma_sft.nn import blocks
from gemma_sft.nn import quantize

LARGEST = 65504.0  # numpy.finfo('float16').max
# Rows are scaled below 2**15, half of the largest: at a rate of a half, the
# adapters' dropout doubles what it keeps.
_FITTING_EXPONENT = 15
# The layers whose inputs float16 can hold.
_BOUNDED = frozenset(projections.BY_LAYER) - {'linear'}


def operations(params: Any) -> blocks.Operations:
  """Returns the operations of a forward pass with these weights."""
  if any(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(params)):
    return HalfOperations()
  return blocks.Operations()


class HalfOperations(blocks.Operations):
  """The operations of a forward pass whose weights are in float16."""

  def prepare(self, params):
    """Casts the weights of the norms to float32."""
    def cast(path, leaf):
      name = str(getattr(path[-1], 'key', ''))
      return leaf.astype(jnp.float32) if name.endswith('scale') else leaf

    return jax.tree_util.tree_map_with_path(cast, params)

  def encode(self, next_fun, embedder, tokens_BT):
    """Computes the library's `encode` in f32."""
    del next_fun
    table_VD = embedder.get_variable('params', 'input_embedding')
    return table_VD[tokens_BT].astype(jnp.float32) * jnp.sqrt(
        jnp.float32(table_VD.shape[1]))

  def project(self, next_fun, module, equation, x, add_update):
    """Rounds the operands of the products, the adapters' included."""
    del next_fun
    weight = module.get_variable('params', module.weight_name)
    bounded = is_bounded(module)
    if not bounded:
      x, factor_BT = fit(x)
    if isinstance(weight, quantize.Quantized):
      y = quantize.einsum(equation, x, weight, _dequantizing_einsum)
    else:
      y = einsum(equation, x, weight)
      if getattr(module, 'w_scale', None) is not None:  # Gemma 4 has one.
        y = y * module.w_scale
    y = add_update(x, y, einsum=einsum)
    return y if bounded else unfit(y, factor_BT)

  def attend(self, module, q_BTNH, k_BTKH, v_BTKH, *arrays, **settings):
    """Attends with float16 queries, keys and values."""
    return super().attend(
        module, *(x.astype(jnp.float16) for x in (q_BTNH, k_BTKH, v_BTKH)),
        *arrays, **settings)


def is_bounded(module: Any) -> bool:
  """Returns whether float16 can hold the inputs of an Einsum."""
  name = module.weight_name
  return (module.path[-1] if name == 'w' else name) in _BOUNDED


def operand(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Returns activations as they are multiplied with a weight."""
  return x.astype(jnp.float16) if weight.dtype == jnp.float16 else x


# Autodiff would multiply the f32 cotangent by the weight in f32, without the
# tensor cores. So it is rounded first, like the operands of the forward pass.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum(equation: str, x: jax.Array, weight: jax.Array) -> jax.Array:
  """Returns the f32 einsum of two arrays, both rounded to float16.

  Each axis of an operand is one of the other or of the result. Gradients have
  the dtypes of the operands.
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
  dx_equation, dweight_equation = quantize.gradient_equations(equation)
  dx = _multiply(dx_equation, dy, weight16)
  dweight = _multiply(dweight_equation, x16, dy)
  return dx.astype(x_like.dtype), dweight.astype(weight_like.dtype)


einsum.defvjp(_einsum_fwd, _einsum_bwd)


def _dequantizing_einsum(equation, x, quantized):
  return einsum(equation, x, quantize.dequantize(quantized, jnp.float16))


def fit(x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (rows (B, T, ...) that float16 can hold, their factors (B, T)).

  A factor is a power of two of at most 1, so it rounds nothing. The gradient
  takes it for a constant, because `unfit` divides the product by it.
  """
  axes = tuple(range(2, x_BTD.ndim))
  largest_BT = jnp.max(jnp.abs(jax.lax.stop_gradient(x_BTD)), axis=axes)
  _, exponent_BT = jnp.frexp(largest_BT)
  factor_BT = jnp.ldexp(
      jnp.ones_like(largest_BT),
      -jnp.maximum(exponent_BT - _FITTING_EXPONENT, 0))
  return x_BTD * _like(factor_BT, x_BTD), factor_BT


def unfit(y_BTD: jax.Array, factor_BT: jax.Array) -> jax.Array:
  """Returns a product of rows from `fit` as it would be without `fit`."""
  return y_BTD / _like(factor_BT, y_BTD)


def _like(factor_BT, x_BTD):
  return factor_BT.reshape(*factor_BT.shape, *(1,) * (x_BTD.ndim - 2))


class HeadProducts:
  """What `head.Products` does, for a head in float16."""

  # Probabilities are multiplied by it before they are rounded: the least with
  # all of its bits is then 2e-9, not 6e-5, and 1 stays below 65,504.
  _LIFT = 2.0**15
  # The embedding's gradient is scaled before it is rounded.
  gradient_dtype = jnp.float32

  def operand(self, x):
    """Rounds hidden states to float16."""
    return x.astype(jnp.float16)

  def multiply(self, equation, probs, other):
    """Multiplies lifted probabilities."""
    return jnp.einsum(
        equation, (probs * self._LIFT).astype(jnp.float16), other,
        preferred_element_type=jnp.float32) / self._LIFT

  def gradients(self, dlogits_GCV, x_GCD, embedding_VD):
    """Multiplies lifted cotangents of the logits."""
    return (self.multiply('GCV,VD->GCD', dlogits_GCV, embedding_VD),
            self.multiply('GCV,GCD->VD', dlogits_GCV, x_GCD))
