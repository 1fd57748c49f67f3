"""AdamW and its schedules."""

from typing import Any

import jax
import optax


def make_schedule(
    *, learning_rate: float, schedule: str, warmup_ratio: float,
    final_share: float, total_steps: int) -> optax.Schedule:
  """Returns step -> learning rate.

  It rises linearly from 0 to its peak, `learning_rate`, in a `warmup_ratio` of
  the steps. Then the `schedule` is 'constant', 'linear' or 'cosine', and ends
  at a `final_share` of the peak.
  """
  warmup = round(warmup_ratio * total_steps)
  decay = max(1, total_steps - warmup)
  if schedule == 'constant':
    after = optax.constant_schedule(learning_rate)
  elif schedule == 'linear':
    after = optax.linear_schedule(
        learning_rate, learning_rate * final_share, decay)
  else:
    after = optax.cosine_decay_schedule(learning_rate, decay, final_share)
  if not warmup:
    return after
  # Update 0 already has a rate; the ramp reaches the peak at update `warmup`.
  ramp = optax.linear_schedule(
      learning_rate / (warmup + 1), learning_rate, warmup)
  return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(
    schedule: optax.Schedule, *, b1: float, b2: float, eps: float,
    weight_decay: float, max_grad_norm: float, b_ratio: float = 1.0
) -> optax.GradientTransformation:
  """Returns AdamW (arXiv 1711.05101) after clipping by the global norm.

  The decoupled `weight_decay` acts on every trained leaf. A `max_grad_norm` of
  0 does not clip. `b_ratio` is that of LoRA+ (arXiv 2402.12354): the learning
  rate of the adapters' B over that of the rest.
  """
  steps: list[Any] = []
  if max_grad_norm:
    steps.append(optax.clip_by_global_norm(max_grad_norm))
  steps.append(optax.adamw(
      schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay))
  if b_ratio != 1:
    steps.append(_scale_b(b_ratio))
  return optax.chain(*steps)


def _scale_b(ratio: float) -> optax.GradientTransformation:
  """Multiplies the updates of leaves named 'b': a learning rate of their own.

  That holds because both Adam's update and the decoupled weight decay are
  proportional to the rate.
  """
  def scale(path, update):
    return update * ratio if getattr(path[-1], 'key', None) == 'b' else update

  return optax.stateless(
      lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))
