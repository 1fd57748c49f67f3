"""Dynamic loss scaling, for gradients in float16.

Many gradients are below 6e-8, where float16 ends. So the loss is multiplied
before the backward pass and the gradient divided after it (Micikevicius et al.
2018, arXiv 1710.03740, section 3.2), by a power of two, which rounds nothing.
If the scale is too large, the gradient is not finite: the update is skipped
and the scale halved. After `PERIOD` good steps it is doubled. The names and
rules are those of jmp's `DynamicLossScale`.

A scale of 0 means that the run has to stop (`next_scale`). It makes every later
gradient non-finite too, so the weights stay those of the last good step until
the host reads the scale and stops.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

# Micikevicius et al. trained with 8 to 32,768. jmp's examples start at the
# upper end. Gemma 3 270M on Blop (configs/blop.py, two rows a batch, CPU) then
# skips its first six updates; from 512 it skips three of the first four, from
# 64 none of six.
INITIAL = 2.0**6
FACTOR = 2.0
PERIOD = 2000  # Of jmp and of PyTorch's GradScaler.
# jmp's `min_loss_scale`: below it gradients overflow whatever the scale.
SMALLEST = 1.0
# Apex's `max_loss_scale`: gradients that are all 0 would double it forever.
LARGEST = 2.0**24


@flax.struct.dataclass
class LossScale:
  """The scale as a part of the train state.

  Attributes:
    scale: f32 (), a power of two, or 0 when the run has to stop.
    count: int32 (), good steps since the scale last changed.
  """

  scale: jax.Array
  count: jax.Array


def make_loss_scale() -> LossScale:
  """Returns the scale before the first step."""
  return LossScale(jnp.float32(INITIAL), jnp.int32(0))


def unscaled(grads: Any, loss_scale: LossScale) -> Any:
  """Returns the gradient of the loss itself."""
  return jax.tree.map(lambda g: g / loss_scale.scale, grads)


def next_scale(
    loss_scale: LossScale, loss: jax.Array, finite: jax.Array) -> LossScale:
  """Returns the scale after a step.

  It is 0 where a smaller one would not help: if the unscaled `loss` is not
  finite, or the scale would fall below `SMALLEST`. `finite` says whether all of
  the gradient is.
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
  """Returns (the state to go on with, metrics of the step).

  After a gradient that is not finite, that is the `old` state with a new step
  and scale. `grad_norm` and `loss` are unscaled.
  """
  finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
  kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
  after = next_scale(old.loss_scale, loss, finite)
  return kept.replace(step=new.step, loss_scale=after), {
      'loss_scale': after.scale, 'skipped': 1.0 - finite}
