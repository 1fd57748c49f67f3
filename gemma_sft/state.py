"""What a run changes, step by step."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from gemma_sft.adapters import lora
from gemma_sft.nn import loss_scale as loss_scale_lib


@flax.struct.dataclass
class TrainState:
  """The whole of what training changes; the frozen base is not in it.

  Attributes:
    step: int32 (), the number of updates already applied (in float16 those
      that were left out count too: a step is a batch consumed).
    trainable: The adapters, or all weights in f32 with full fine-tuning.
    opt_state: Optax's.
  """

  step: jax.Array
  trainable: Any
  opt_state: Any
  loss_scale = None  # No field: checkpoints of others know nothing of it.


@flax.struct.dataclass
class ScaledTrainState(TrainState):
  """The state of a run whose products are in float16.

  Attributes:
    loss_scale: Of its next step.
  """

  loss_scale: loss_scale_lib.LossScale


def make_state(
    trainable: Any,
    optimizer: optax.GradientTransformation,
    *,
    scaled: bool = False,
) -> TrainState:
  """Returns the state before the first update; `scaled` is for float16."""
  fields = dict(
      step=jnp.zeros((), jnp.int32),
      trainable=trainable,
      opt_state=optimizer.init(trainable))
  if scaled:
    return ScaledTrainState(
        **fields, loss_scale=loss_scale_lib.make_loss_scale())
  return TrainState(**fields)


def with_scale(state: TrainState, scaled: bool) -> TrainState:
  """Returns a state, or its shapes, in the form of float16 or of the others.

  A scale that was not there is a fresh one: a run may go on on another card.
  """
  if (state.loss_scale is not None) == scaled:
    return state
  fields = dict(step=state.step, trainable=state.trainable,
                opt_state=state.opt_state)
  if not scaled:
    return TrainState(**fields)
  loss_scale = loss_scale_lib.make_loss_scale()
  if isinstance(state.step, jax.ShapeDtypeStruct):
    loss_scale = jax.tree.map(
        lambda leaf: state.step.update(dtype=leaf.dtype), loss_scale)
  else:
    loss_scale = jax.device_put(loss_scale, state.step.sharding)
  return ScaledTrainState(**fields, loss_scale=loss_scale)


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
