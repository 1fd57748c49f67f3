"""Loads the tuned model and its base into memory together."""

import dataclasses
from typing import Any

from gemma_sft import model as model_lib
from gemma_sft.run import build
from gemma_sft.run import restore


def load(
    config: Any, workdir: str, *, base_only: bool, step: int
) -> dict[str, restore.Served]:
  """Returns {'tuned': ..., 'base': ...}, reading the base weights once.

  The tuned model is the base with the adapters merged in. It shares the arrays
  without adapters (the embedding, which is most of a small model), and holds
  merged copies of the others.

  Args:
    config: The run's.
    workdir: The run's.
    base_only: Leave out the tuned model.
    step: See `checkpoint.choose_step`.

  Raises:
    UserError: see `restore.choose_weights`.
  """
  if base_only:
    return {'base': restore.load_weights(
        config, workdir, base=True, step=step)}
  # Raises its errors before gigabytes are read.
  chosen = restore.choose_weights(config, workdir, base=False, step=step)
  base = restore.load_weights(config, workdir, base=True, step=step)
  if not config.lora.enabled:  # All weights were trained: none are shared.
    tuned = restore.load_weights(config, workdir, base=False, step=step)
    return {'tuned': tuned, 'base': base}
  adapters, _ = chosen.checkpoints.restore_trainable(chosen.step)
  params = model_lib.merge(
      base.model, base.params, adapters, build.lora_scale(config))
  tuned = dataclasses.replace(
      base, params=params, description=chosen.description,
      identity=chosen.identity)
  return {'tuned': tuned, 'base': base}
