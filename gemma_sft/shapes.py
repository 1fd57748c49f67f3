"""The letters of shapes, types of arrays, and chunks of positions.

    B  rows of a batch        N  query heads        V  vocabulary
    T  query positions        K  key-value heads    F  MLP width
    S  key positions          H  head width         R  rank of an adapter
    D  model width            L  layers             A  microbatches

In numeric code a name ends with its shape (`logits_BTV`); those of trees and
scalars do not. The types below are checked in tests only, by jaxtyping's import
hook with beartype (`tests/conftest.py`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

TokensBT = Int[jax.Array, 'B T']
MaskBT = Bool[jax.Array, 'B T']
PositionsBT = Int[jax.Array, 'B T']
SegmentsBT = Int[jax.Array, 'B T']
HiddenBTD = Float[jax.Array, 'B T D']
EmbeddingVD = Float[jax.Array, 'V D']
Scalar = Float[jax.Array, '']


def split(x_BT: jax.Array, C: int) -> jax.Array:
  """Returns chunks of C positions, (T / C, B, C, ...), of (B, T, ...)."""
  B, _, *rest = x_BT.shape
  return jnp.moveaxis(x_BT.reshape(B, -1, C, *rest), 1, 0)


def join(x_nBC: jax.Array) -> jax.Array:
  """Undoes `split`."""
  n, B, C, *rest = x_nBC.shape
  return jnp.moveaxis(x_nBC, 0, 1).reshape(B, n * C, *rest)
