"""Where a run starts from: its own checkpoint, or another run's adapters."""

import dataclasses
from typing import Any

import jax

from gemma_sft import batches
from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft import state as state_lib
from gemma_sft.inputs import records as records_lib
from gemma_sft.run import checkpoint as checkpoint_lib
from gemma_sft.run import hosts
from gemma_sft.run import prepare as prepare_lib


def open_checkpoints(run: prepare_lib.Run) -> checkpoint_lib.Checkpoints:
  """Returns the checkpoints in the run's workdir."""
  config = run.config
  return checkpoint_lib.Checkpoints(
      run.workdir, keep=config.checkpoint.keep, metric=config.eval.metric,
      mode=config.eval.mode)


def from_checkpoint(
    run: prepare_lib.Run, checkpoints: checkpoint_lib.Checkpoints
) -> tuple[state_lib.TrainState, checkpoint_lib.Meta] | None:
  """Returns the newest intact checkpoint in the workdir, or None without any.

  Raises `UserError` if its config, base weights, data or batches differ.
  """
  shapes = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=leaf.sharding), run.initial_state)
  return checkpoints.restore_latest(
      shapes, lambda meta: _check_resume(run, meta))


def from_run(run: prepare_lib.Run, workdir: str) -> state_lib.TrainState:
  """Returns the fresh state with another run's best adapters in it.

  Raises if the base, or the scale or shape of that run's adapters differ.
  """
  checkpoints = checkpoint_lib.Checkpoints(workdir, read_only=True)
  step = checkpoint_lib.choose_step(checkpoints, -1)
  trainable, meta = checkpoints.restore_trainable(step)
  check_weights(run.config, run.base_hash, meta, f'config.init_from: {workdir}')
  hosts.say(f'starting from {workdir}, step {step}')
  fresh = run.initial_state.trainable
  return dataclasses.replace(
      run.initial_state, trainable=jax.tree.map(
          lambda leaf, like: jax.device_put(leaf, like.sharding),
          trainable, fresh))


def _check_resume(run, meta):
  """Raises where the checkpoint is not of this run, naming what differs."""
  different = config_lib.differences(meta.config, run.config)
  if different:
    raise errors.UserError(
        f'the checkpoint in {run.workdir} is of another config: '
        + '; '.join(different),
        'the config that the run began with',
        'undo the change, or choose another --workdir')
  if meta.base != run.base_hash:
    raise errors.UserError(
        f'the base weights have hash {run.base_hash[:16]}, the checkpoint was'
        f' trained on {meta.base[:16]}', 'the same base weights',
        'point --config.model.weights at those, or choose another --workdir')
  # Older checkpoints have the hash of the records alone, without the files that
  # these refer to; the chain below is over the tokens themselves.
  if meta.data_hash != run.data_hash and (
      meta.data_hash != records_lib.content_hash(run.splits['train'].records)):
    raise errors.UserError(
        f'the training records ({run.config.data.train}) with the files that'
        f' they refer to have hash {run.data_hash[:16]}, the checkpoint was'
        f' trained on {meta.data_hash[:16]}', 'unchanged training data',
        'restore the file, or choose another --workdir')
  if meta.chain != batches.chain_of(run.source, meta.step):
    raise errors.UserError(
        f'the {meta.step} batches before this checkpoint cannot be reproduced',
        f'hash chain {meta.chain[:16]}', 'the tokenizer or the packing has'
        ' changed since then; choose another --workdir')
  hosts.say(f'resuming after {meta.step} updates; batches {meta.chain[:16]}'
            ' verified')


def check_weights(
    config: Any, base: str, meta: checkpoint_lib.Meta, what: str) -> None:
  """Raises if a checkpoint's weights mean something else under this config.

  `base` is the content hash of the config's base weights; `what` begins the
  message.
  """
  different = [
      line for line in config_lib.differences(meta.config, config)
      if line.startswith(('model.', 'lora.'))
      and not line.startswith('lora.dropout')]
  if meta.base != base:
    different.append(f'base weights: {meta.base[:40]} -> {base[:40]}')
  if different:
    raise errors.UserError(
        f'{what} cannot be taken over: ' + '; '.join(different),
        'the model, the adapters and the base weights that it was trained with',
        "undo the change; without --config the run's own config is taken")
