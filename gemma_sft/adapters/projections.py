"""How each adapter meets its share of a weight of the library.

By the tail of the weight's path. See `lora` for the tree of adapters.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Projection:
  """How one adapter meets its share of a library weight.

  Attributes:
    name: What the adapter is called.
    index: Its slot where the library fuses several, else None.
    down: Einsum of the layer's input with A.
    up: Einsum of that with B.
    update: Einsum of A with B into the layout of the weight (of the slot).
    outputs: The letters of that layout that are the layer's outputs.
  """

  name: str
  index: int | None
  down: str
  up: str
  update: str
  outputs: str


_Q = dict(down='BTD,DR->BTR', up='BTR,RNH->BTNH', update='DR,RNH->NDH',
          outputs='NH')
_GATE = dict(down='BTD,DR->BTR', up='BTR,RF->BTF', update='DR,RF->FD',
             outputs='F')

# By the tail of the weight's path. Keys and values have K heads where N stands.
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


def oriented(name: str, projection: Projection, transposed_gating: bool
             ) -> Projection:
  """Returns a projection for the MLP's layout, which generations differ in.

  Args:
    name: The tail of the weight's path.
    projection: One of `BY_LAYER[name]`.
    transposed_gating: `Model.transposed_gating`.
  """
  if name == 'gating_einsum' and not transposed_gating:
    return dataclasses.replace(projection, update='DR,RF->DF')
  return projection


def update(
    projection: Projection, a: jax.Array, b: jax.Array, scaling: float
) -> jax.Array:
  """Returns scaling * A B in the layout of the weight (of the slot), in f32."""
  return scaling * jnp.einsum(
      projection.update, a.astype(jnp.float32), b.astype(jnp.float32))
