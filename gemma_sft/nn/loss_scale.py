"""Dynamic loss scaling, for gradients in float16.

Many gradients are below 6e-8, float16's smallest number above 0. So the loss
is multiplied before the backward pass and the gradient divided after it
(Micikevicius et al. 2018, arXiv 1710.03740, section 3.2), by a power of two,
which rounds nothing. If the scale is too large, the gradient is not finite: the
update is skipped and the scale halved. After `PERIOD` good steps it is doubled,
as by jmp's `DynamicLossScale`.

A scale of 0 stops the run. It makes every later gradient non-finite too, so the
weights stay those of the last good step until the host reads the scale.
"""

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
  """The scale as a part of the train state."""

  scale: jax.Array  # f32 (), a power of two, or 0 when the run has to stop.
  count: jax.Array  # int32 (), good steps since the scale last changed.


def make_loss_scale() -> LossScale:
  """Returns the scale before the first step."""
  return LossScale(jnp.float32(INITIAL), jnp.int32(0))


def next_scale(
    loss_scale: LossScale, loss: jax.Array, finite: jax.Array) -> LossScale:
  """Returns the scale after a step whose gradient is `finite` or not.

  It is 0 where a smaller scale would not help: if the unscaled `loss` is not
  finite, or the scale would fall below `SMALLEST`.
  """
  scale, count = loss_scale.scale, loss_scale.count + 1
  due = count >= PERIOD
  grown = jnp.where(due, jnp.minimum(scale * FACTOR, LARGEST), scale)
  shrunk = scale / FACTOR
  shrunk = jnp.where(jnp.isfinite(loss) & (shrunk >= SMALLEST), shrunk, 0)
  return LossScale(jnp.where(finite, grown, shrunk),
                   jnp.where(finite & ~due, count, 0))
