"""Our gated GELU is the library's, in value and gradient."""

import flax.linen as nn
from gemma.gm.nn import _modules as modules
from gemma.gm.nn.gemma4 import _modules as modules4
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_sft.nn import blocks
from gemma_sft.nn import gelu

# Beyond 10 the derivative is 0 or 1, and 300**3 is large.
_GATES = (*np.linspace(-10, 10, 401), -300.0, 300.0)


def _library(gate_up):
  return nn.gelu(gate_up[..., 0, :]) * gate_up[..., 1, :]


def _value_and_gradient(function, dtype):
  rng = np.random.default_rng(0)
  # All of them are numbers of bfloat16.
  gate_up = jnp.asarray(
      [_GATES, rng.normal(0, 2, len(_GATES))], jnp.bfloat16).astype(dtype)
  weights = jnp.asarray(rng.normal(0, 1, len(_GATES)), jnp.bfloat16)
  value, gradient = jax.jit(jax.value_and_grad(
      lambda x: (function(x) * weights).astype(jnp.float32).sum()))(gate_up)
  return value, gradient.astype(jnp.float32)


def test_float32_is_the_librarys():
  for got, wanted in zip(
      _value_and_gradient(gelu.gated_gelu, jnp.float32),
      _value_and_gradient(_library, jnp.float32)):
    # Sums of 403 numbers of about 10, in another order.
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_rounded_once():
  _, got = _value_and_gradient(gelu.gated_gelu, jnp.bfloat16)
  _, library = _value_and_gradient(_library, jnp.bfloat16)
  _, wanted = _value_and_gradient(_library, jnp.float32)
  # 8 bits of mantissa; 1 + tanh cancels where the gate is below -4.
  np.testing.assert_allclose(got, wanted, rtol=2**-8, atol=1e-6)
  assert np.abs(got - wanted).mean() < np.abs(library - wanted).mean()


@pytest.mark.parametrize('module', (
    modules.FeedForward(8, 12, transpose_gating_einsum=True),
    modules.FeedForward(8, 12, transpose_gating_einsum=False),
    modules4.FeedForward(8, 12)), ids=('gemma2', 'gemma1', 'gemma4'))
def test_feed_forward_is_the_librarys(module):
  x = jax.random.normal(jax.random.key(0), (2, 3, 8))
  params = module.init(jax.random.key(1), x)

  def intercept(next_fun, args, kwargs, context):
    if type(context.module).__name__ == 'FeedForward':
      return blocks.feed_forward(context.module, *args)
    return next_fun(*args, **kwargs)

  def gradients(params, x):
    return jax.jit(jax.grad(
        lambda *args: jnp.sin(module.apply(*args)).sum(), (0, 1)))(params, x)

  wanted = gradients(params, x)
  with nn.intercept_methods(intercept):
    got = gradients(params, x)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6),
               got, wanted)
