"""DoRA: low-rank updates of a weight's direction, its magnitude trained apart.

Liu et al. 2024, arXiv 2402.09353: the weight W of a layer becomes

    W' = m * (W + s B A) / ||W + s B A||

with a norm and a trained magnitude m for each output. m begins as ||W||, so
that W' begins as W. As the paper proposes (section 4.3), the norm counts as a
constant in the gradient. The layer's output y and its low-rank update u are
linear in the weight, so only they are rescaled: (y + u) * m / ||W + s B A||.

In a tree of adapters a leaf 'm' beside 'a' and 'b' makes it DoRA.
"""

import jax
import jax.numpy as jnp

from gemma_sft.adapters import projections


def norm(projection: projections.Projection, weight: jax.Array) -> jax.Array:
  """Returns the f32 norm of a weight's column for each of its outputs.

  Args:
    projection: Whose layout the weight has (of its slot, where several are
      fused).
    weight: For example (N, D, H) of q; the norm is then (N, H).
  """
  layout, weight = _layout(projection), weight.astype(jnp.float32)
  return jnp.sqrt(jnp.einsum(
      f'{layout},{layout}->{projection.outputs}', weight, weight))


def rescale_weight(
    projection: projections.Projection, weight: jax.Array, m: jax.Array
) -> jax.Array:
  """Returns W' of the weight with its update added, in f32."""
  layout = _layout(projection)
  return jnp.einsum(
      f'{layout},{projection.outputs}->{layout}', weight,
      _ratio(m, norm(projection, weight)))


def factor(
    projection: projections.Projection,
    weight: jax.Array,
    a: jax.Array,
    b: jax.Array,
    m: jax.Array,
    scaling: float,
) -> jax.Array:
  """Returns m / ||W + s B A||, by which the layer's output is multiplied.

  Args:
    projection: Of the adapter.
    weight: The frozen weight (of the slot).
    a: A.
    b: B.
    m: The trained magnitude, in the shape of one output.
    scaling: s, from `lora.scale`.
  """
  total = weight.astype(jnp.float32) + projections.update(
      projection, a, b, scaling)
  return _ratio(m, jax.lax.stop_gradient(norm(projection, total)))


def _ratio(m, norms):
  """1 where m is NaN: stacked with layers that have an adapter, without one."""
  return jnp.where(jnp.isnan(m), 1, m / jnp.where(norms == 0, 1, norms))


def _layout(projection):
  return projection.update.partition('->')[2]
