"""What a run changes, step by step."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from gemma_sft import lora


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


def stack_layers(state: TrainState, num_layers: int) -> TrainState:
  """Returns a state whose adapters, and their moments, are stacked.

  The step runs on this form: with an array for each layer, updating the arrays
  takes the compiler longer than the model does. Everywhere else, checkpoints
  included, adapters are per layer.

  Args:
    state: With adapters per layer.
    num_layers: See `lora.stack`.
  """
  return _each_tree(
      lambda tree: {'layers': lora.stack(tree, num_layers)}, state)


def unstack_layers(state: TrainState, like: TrainState) -> TrainState:
  """Undoes `stack_layers`; `like` is the state before, or its shapes."""
  return _each_tree(
      lambda tree, like: lora.unstack(tree['layers'], like), state, like)


def _each_tree(fn: Callable[..., Any], *states: TrainState) -> TrainState:
  """Applies a function to the trees of adapters in states."""
  return jax.tree.map(
      lambda *nodes: fn(*nodes) if isinstance(nodes[0], dict) else nodes[0],
      *states, is_leaf=lambda node: isinstance(node, dict))
