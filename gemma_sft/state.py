"""The state that a step changes, and the settings that it is compiled for."""

from collections.abc import Callable
import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from gemma_sft import model as model_lib
from gemma_sft.adapters import lora
from gemma_sft.nn import blocks
from gemma_sft.nn import loss_scale as loss_scale_lib


@dataclasses.dataclass(frozen=True)
class StepSettings:
  """What a step's program depends on besides its arrays."""

  model: model_lib.Model
  lora_enabled: bool  # Otherwise all weights are trained.
  lora_scale: float
  dropout: float  # Rate at the adapters' inputs.
  seed: int  # Of the dropout.
  compute_dtype: Any  # Of the forward pass when all weights are trained.
  execution: blocks.Execution
  loss_chunk: int  # Trained positions whose loss is computed at a time.
  groups: int  # Device shards of a batch's rows.
  mesh: jax.sharding.Mesh


@flax.struct.dataclass
class TrainState:
  """Everything that training changes; the frozen base is not in it.

  `step`, int32 (), is the number of batches consumed. It equals the number of
  updates applied, except in float16, where a skipped update counts too.
  """

  step: jax.Array
  trainable: Any  # The adapters, or all weights in float32.
  opt_state: Any
  loss_scale = None  # Not a field, so that checkpoints do not contain it.

  def unscaled(self, grads: Any) -> Any:
    """Returns the gradient of the loss itself."""
    return grads

  def updated(
      self, trainable: Any, opt_state: Any, loss: jax.Array,
      grad_norm: jax.Array) -> tuple['TrainState', dict[str, jax.Array]]:
    """Returns (the state after an update, metrics of the loss scale)."""
    del loss, grad_norm
    return self.replace(
        step=self.step + 1, trainable=trainable, opt_state=opt_state), {}


@flax.struct.dataclass
class ScaledTrainState(TrainState):
  """The state of a run in float16, with the scale of its next loss."""

  loss_scale: loss_scale_lib.LossScale

  def unscaled(self, grads: Any) -> Any:
    """Divides the gradient by the scale."""
    return jax.tree.map(lambda g: g / self.loss_scale.scale, grads)

  def updated(
      self, trainable: Any, opt_state: Any, loss: jax.Array,
      grad_norm: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    """Like `TrainState.updated`; skips an update that is not finite."""
    new, _ = super().updated(trainable, opt_state, loss, grad_norm)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
    kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, self)
    after = loss_scale_lib.next_scale(self.loss_scale, loss, finite)
    return kept.replace(step=new.step, loss_scale=after), {
        'loss_scale': after.scale, 'skipped': 1.0 - finite}


def make_state(
    trainable: Any, optimizer: optax.GradientTransformation, *,
    scaled: bool = False) -> TrainState:
  """Returns the state before the first update; `scaled` in float16."""
  fields = jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable)
  if scaled:
    return ScaledTrainState(*fields, loss_scale_lib.make_loss_scale())
  return TrainState(*fields)


def with_scale(state: TrainState, scaled: bool) -> TrainState:
  """Returns a state, or its shapes, with or without a loss scale.

  A missing scale starts afresh: a run may resume on a card of another dtype.
  """
  if (state.loss_scale is not None) == scaled:
    return state
  fields = state.step, state.trainable, state.opt_state
  if not scaled:
    return TrainState(*fields)
  loss_scale = loss_scale_lib.make_loss_scale()
  if isinstance(state.step, jax.ShapeDtypeStruct):
    loss_scale = jax.tree.map(
        lambda leaf: state.step.update(dtype=leaf.dtype), loss_scale)
  else:
    loss_scale = jax.device_put(loss_scale, state.step.sharding)
  return ScaledTrainState(*fields, loss_scale)


def stack_layers(state: TrainState, num_layers: int) -> TrainState:
  """Returns a state whose adapters and their moments are stacked.

  The step runs on this form: with one array per layer, the compiler spends
  longer on the updates than on the model. Everywhere else, checkpoints
  included, adapters are per layer.
  """
  return _each_tree(
      lambda tree: {'layers': lora.stack(tree, num_layers)}, state)


def unstack_layers(state: TrainState, like: TrainState) -> TrainState:
  """Undoes `stack_layers`; `like` is the unstacked state, or its shapes."""
  return _each_tree(
      lambda tree, like: lora.unstack(tree['layers'], like), state, like)


def _each_tree(fn: Callable[..., Any], *states: TrainState) -> TrainState:
  """Applies a function to the trees of adapters in states."""
  return jax.tree.map(
      lambda *nodes: fn(*nodes) if isinstance(nodes[0], dict) else nodes[0],
      *states, is_leaf=lambda node: isinstance(node, dict))
