"""What a run changes, step by step."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
  """The whole of what training changes; the frozen base is not in it.

  Attributes:
    step: int32 (), the number of updates already applied.
    trainable: The adapters, or all weights in f32 with full fine-tuning.
    opt_state: Optax's.
  """

  step: jax.Array
  trainable: Any
  opt_state: Any


def make_state(
    trainable: Any, optimizer: optax.GradientTransformation) -> TrainState:
  """Returns the state before the first update."""
  return TrainState(
      step=jnp.zeros((), jnp.int32),
      trainable=trainable,
      opt_state=optimizer.init(trainable))
