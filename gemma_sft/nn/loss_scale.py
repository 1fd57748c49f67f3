"""Dynamic loss scaling, for gradients in float16.

float16 holds nothing below 6e-8, where many gradients lie. The loss is
multiplied before the backward pass and the gradient divided after it
(Micikevicius et al. 2018, arXiv 1710.03740, section 3.2), by a power of two, so
that neither rounds. Where the scale was too large the gradient is not finite:
then the update is left out and the scale halved; it is doubled after `PERIOD`
good steps. The names and rules are those of jmp's `DynamicLossScale`.

A scale of 0 means that the run has to stop, see `next_scale`. Then no later
gradient is finite either, so the weights stay those of the last good step until
the host reads that; nothing after it is kept.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

# Micikevicius et al. trained with 8 to 32,768. jmp's examples begin at the
# upper end; Gemma 3 270M on Blop (configs/blop.py, two rows a batch, CPU) then
# left out each of its first six updates, and from 512 three of the first four;
# from 64 it left out none of six.
INITIAL = 2.0**6
FACTOR = 2.0
PERIOD = 2000  # Of jmp and of PyTorch's GradScaler.
# Below it gradients overflow without any help from the scale: jmp's
# `min_loss_scale`.
SMALLEST = 1.0
# Apex's `max_loss_scale`: gradients that are all 0 would double it for ever.
LARGEST = 2.0**24


@flax.struct.dataclass
class LossScale:
  """The scale as a part of the train state.

  Attributes:
    scale: f32 (), a power of two, or 0 when the run has to stop.
    count: int32 (), good steps since the scale has changed.
  """

  scale: jax.Array
  count: jax.Array


def make_loss_scale() -> LossScale:
  """Returns the scale before the first step."""
  return LossScale(jnp.float32(INITIAL), jnp.int32(0))


def scaled(loss: jax.Array, loss_scale: LossScale | None) -> jax.Array:
  """Returns what the gradient is taken of."""
  return loss if loss_scale is None else loss * loss_scale.scale


def unscaled(grads: Any, loss_scale: LossScale | None) -> Any:
  """Returns the gradient of the loss itself."""
  if loss_scale is None:
    return grads
  return jax.tree.map(lambda g: g / loss_scale.scale, grads)


def next_scale(
    loss_scale: LossScale, loss: jax.Array, finite: jax.Array) -> LossScale:
  """Returns the scale after a step.

  It is 0 where no smaller one would help: if the loss itself is not finite, or
  the scale would fall below `SMALLEST`.

  Args:
    loss_scale: Before the step.
    loss: Of the step, not scaled.
    finite: Whether all of its gradient is.
  """
  scale, count = loss_scale.scale, loss_scale.count + 1
  due = count >= PERIOD
  grown = jnp.where(due, jnp.minimum(scale * FACTOR, LARGEST), scale)
  shrunk = scale / FACTOR
  shrunk = jnp.where(
      jnp.isfinite(loss) & (shrunk >= SMALLEST), shrunk, 0)
  return LossScale(
      jnp.where(finite, grown, shrunk),
      jnp.where(finite & ~due, count, 0))


def keep_finite(new: Any, old: Any, grad_norm: jax.Array, loss: jax.Array
                ) -> tuple[Any, dict[str, jax.Array]]:
  """Returns (the state to go on with, what the step tells of it).

  After a gradient that is not finite that is the old state, but for its step
  and its scale. States without a scale are taken as they come.

  Args:
    new: `state.TrainState` with the update applied.
    old: Before it.
    grad_norm: Of the unscaled gradient; finite if all of that is.
    loss: Of the step, not scaled.
  """
  if old.loss_scale is None:
    return new, {}
  finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
  kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
  after = next_scale(old.loss_scale, loss, finite)
  return kept.replace(step=new.step, loss_scale=after), {
      'loss_scale': after.scale, 'skipped': 1.0 - finite}
