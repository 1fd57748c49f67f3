"""DoRA: low-rank updates of a weight's direction and a trained magnitude.

Liu et al. 2024, arXiv 2402.09353: the weight W of a layer becomes

    W' = m * (W + s B A) / ||W + s B A||

with a norm and a trained magnitude m for each output. m starts as ||W||, so
that W' starts as W. The gradient takes the norm for a constant, as the paper
proposes (section 4.3). A layer's output is linear in the weight, so its output
y and low-rank update u are rescaled instead: (y + u) * m / ||W + s B A||.

In a tree of adapters, a leaf 'm' beside 'a' and 'b' makes an adapter DoRA.
"""

import jax
import jax.numpy as jnp

from gemma_sft.adapters import projections


def norm(projection: projections.Projection, weight: jax.Array) -> jax.Array:
  """Returns the f32 norm of a weight for each output: (N, H) for q."""
  layout, weight = projection.layout, weight.astype(jnp.float32)
  return jnp.sqrt(jnp.einsum(
      f'{layout},{layout}->{projection.outputs}', weight, weight))


def rescale_weight(
    projection: projections.Projection, weight: jax.Array, m: jax.Array
) -> jax.Array:
  """Returns W' of the weight with its update added, in f32."""
  layout = projection.layout
  return jnp.einsum(
      f'{layout},{projection.outputs}->{layout}', weight,
      _ratio(m, norm(projection, weight)))


def factor(
    projection: projections.Projection, weight: jax.Array, a: jax.Array,
    b: jax.Array, m: jax.Array, scaling: float) -> jax.Array:
  """Returns m / ||W + s B A||, by which the layer's output is multiplied.

  `weight` is the frozen W (of the slot), `scaling` is s, from `lora.scale`.
  """
  total = weight.astype(jnp.float32) + projections.update(
      projection, a, b, scaling)
  return _ratio(m, jax.lax.stop_gradient(norm(projection, total)))


def _ratio(m, norms):
  """Returns m / norms, or 1 where m is NaN: that layer has no adapter."""
  return jnp.where(jnp.isnan(m), 1, m / jnp.where(norms == 0, 1, norms))
