"""The projections that can have an adapter, and their einsums."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Projection:
  """One adapter's projection: a library weight, or a slot of a fused one."""

  name: str  # Of the adapter, see `lora`.
  index: int | None  # The slot where the library fuses several projections.
  down: str  # Einsum of the layer's input with A.
  up: str  # Einsum of the result with B.
  update: str  # Einsum of A with B into the layout of the weight (of the slot).
  outputs: str  # The letters of that layout that are the layer's outputs.

  @property
  def at(self) -> Any:
    """Indexes this projection's part of a library weight."""
    return ... if self.index is None else self.index

  def slot(self, weight: jax.Array) -> jax.Array:
    """Returns this projection's part of a library weight."""
    return weight if self.index is None else weight[self.index]

  @property
  def layout(self) -> str:
    """The letters of the weight (of the slot): 'NDH' for q."""
    return self.update.partition('->')[2]

  def factor_shapes(
      self, shape: tuple[int, ...], rank: int
  ) -> tuple[tuple[int, ...], ...]:
    """Returns the shapes of A and B for a weight (a slot) of a shape."""
    sizes = dict(zip(self.layout, shape, strict=True), R=rank)
    factors = self.update.partition('->')[0].split(',')
    return tuple(tuple(sizes[axis] for axis in factor) for factor in factors)


_Q = dict(down='BTD,DR->BTR', up='BTR,RNH->BTNH', update='DR,RNH->NDH',
          outputs='NH')
_GATE = dict(down='BTD,DR->BTR', up='BTR,RF->BTF', update='DR,RF->FD',
             outputs='F')

# By the last part of a weight's path. In keys and values, N stands for K heads.
BY_LAYER = {
    'q_einsum': (Projection('q', None, **_Q),),
    'k_einsum': (Projection('k', None, **_Q),),  # Gemma 4 31B: v is k.
    'kv_einsum': (Projection('k', 0, **_Q), Projection('v', 1, **_Q)),
    'qkv_einsum': (Projection('q', 0, **_Q), Projection('k', 1, **_Q),
                   Projection('v', 2, **_Q)),
    'attn_vec_einsum': (Projection(
        'o', None, 'BTNH,NHR->BTR', 'BTR,RD->BTD', 'NHR,RD->NHD', 'D'),),
    'gating_einsum': (Projection('gate', 0, **_GATE),
                      Projection('up', 1, **_GATE)),
    'linear': (Projection(
        'down', None, 'BTF,FR->BTR', 'BTR,RD->BTD', 'FR,RD->FD', 'D'),),
}


def oriented(
    name: str, projection: Projection, transposed_gating: bool) -> Projection:
  """Returns a projection for the gate's layout, which generations differ in."""
  if name == 'gating_einsum' and not transposed_gating:
    return dataclasses.replace(projection, update='DR,RF->DF')
  return projection


def update(
    projection: Projection, a: jax.Array, b: jax.Array, scaling: float
) -> jax.Array:
  """Returns scaling * A B in the layout of the weight (of the slot), in f32."""
  return scaling * jnp.einsum(
      projection.update, a.astype(jnp.float32), b.astype(jnp.float32))
