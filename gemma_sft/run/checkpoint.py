"""Orbax checkpoints: adapters, optimizer, data position, config, proof.

    workdir/checkpoints/<step>/state      TrainState
                              /meta       JSON, see `Meta`

The frozen base is not in a checkpoint; `Meta.base` names it by content.
"""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import os
import shutil
from typing import Any

from absl import logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from gemma_sft import errors
from gemma_sft import state as state_lib
from gemma_sft.run import hosts


@dataclasses.dataclass(frozen=True)
class Meta:
  """What a checkpoint contains besides its arrays."""

  step: int  # Updates applied.
  data: dict[str, Any]  # State of the data iterator after these batches.
  chain: str  # Hash chain over them (`batches.extend_chain`).
  config: dict[str, Any]  # Flat.
  base: str  # Content hash of the base weights.
  data_hash: str  # Content hash of the training records.
  # SHA-256 of the state's bytes and of the trained weights' alone, for serving;
  # '' where hosts hold parts of them.
  digest: str = ''
  trainable_digest: str = ''
  # Scores of the evaluation at this step, or {}.
  metrics: dict[str, float] = dataclasses.field(default_factory=dict)
  # The best evaluation so far (`log.Best`), or {}.
  best: dict[str, Any] = dataclasses.field(default_factory=dict)
  stale: int = 0  # Evaluations since the best.


def tree_digest(tree: Any) -> str:
  """Returns SHA-256 over a tree's paths and bytes; '' if hosts hold parts.

  A leaf may be a function that reads the array, so that only one array is in
  memory at a time.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  if any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
         and not leaf.is_fully_replicated for _, leaf in leaves):
    return ''
  sha = hashlib.sha256()
  for path, leaf in leaves:
    sha.update(jax.tree_util.keystr(path).encode())
    array = leaf() if callable(leaf) else jax.device_get(leaf)
    sha.update(np.ascontiguousarray(array).tobytes())
  return sha.hexdigest()


class Checkpoints:
  """The checkpoints of a run: the newest few and the best."""

  def __init__(
      self, workdir: str, *, keep: int = 1, metric: str = '', mode: str = 'min',
      read_only: bool = False):
    """Opens workdir/checkpoints, which is created unless `read_only`.

    Kept are the newest `keep` checkpoints and the one with the `mode` (min or
    max) of `Meta.metrics[metric]`.
    """
    self._metric = metric
    self._dir = os.path.join(os.path.abspath(workdir), 'checkpoints')
    if not read_only:
      hosts.barrier()  # Orbax runs a collective, see `hosts.gather`.
    elif not os.path.isdir(self._dir):
      raise errors.UserError(
          f'no checkpoints in {workdir}', 'the workdir of a training run',
          'train first: python -m gemma_sft.train --config=... --workdir=...')
    policies = ocp.checkpoint_managers
    preservation_policy = policies.AnyPreservationPolicy([
        policies.LatestN(keep),
        policies.BestN(
            get_metric_fn=lambda metrics: metrics[metric], n=1,
            reverse=mode == 'min',  # It sorts, and keeps the last.
            keep_checkpoints_without_metrics=False)])
    self._manager = ocp.CheckpointManager(
        self._dir, options=ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy, read_only=read_only,
            cleanup_tmp_directories=not read_only))

  def steps(self) -> list[int]:
    """Returns the steps that have a checkpoint, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, state: state_lib.TrainState, meta: Meta) -> None:
    """Starts to save; the arrays are copied before it returns."""
    meta = dataclasses.replace(
        meta, digest=tree_digest(state),
        trainable_digest=tree_digest(state.trainable))
    with _disk_errors(self._dir):
      self._manager.save(
          meta.step,
          args=ocp.args.Composite(
              state=ocp.args.StandardSave(state),
              meta=ocp.args.JsonSave(dataclasses.asdict(meta))),
          metrics=meta.metrics if self._metric in meta.metrics else None,
          force=True)

  def wait(self) -> None:
    """Waits for the last save, and raises its error if it failed."""
    with _disk_errors(self._dir):
      self._manager.wait_until_finished()

  def close(self) -> None:
    with _disk_errors(self._dir):
      self._manager.close()

  def read_meta(self, step: int) -> Meta:
    """Returns a checkpoint's `Meta`."""
    restored = self._manager.restore(
        step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
    return Meta(**restored['meta'])

  def read_metas(self) -> dict[int, Meta]:
    """Returns {step: Meta} of the checkpoints that can be read."""
    metas = {}
    for step in self.steps():
      try:
        metas[step] = self.read_meta(step)
      except Exception as error:  # A damaged file may raise anything.
        logging.warning('checkpoint %d cannot be read: %s', step, error)
    return metas

  def restore(self, step: int, abstract_state: Any
              ) -> tuple[state_lib.TrainState, Meta]:
    """Returns an intact checkpoint, sharded like `abstract_state`."""
    # A run may resume on another card in another dtype.
    scaled = abstract_state.loss_scale is not None
    with ocp.PyTreeCheckpointer() as reader:
      saved = reader.metadata(self.state_path(step)).item_metadata.tree
    restored = self._manager.restore(
        step, args=ocp.args.Composite(
            state=ocp.args.StandardRestore(state_lib.with_scale(
                abstract_state, 'loss_scale' in saved)),
            meta=ocp.args.JsonRestore()))
    state, meta = restored['state'], Meta(**restored['meta'])
    _check_digest(state, meta.digest)
    return state_lib.with_scale(state, scaled), meta

  def restore_trainable(self, step: int) -> tuple[Any, Meta]:
    """Returns a checkpoint's adapters (or weights) on this host, and `Meta`."""
    try:
      # As NumPy arrays, because one device may serve what eight have trained.
      with ocp.PyTreeCheckpointer() as reader:
        saved = reader.metadata(self.state_path(step)).item_metadata.tree
        restored = reader.restore(
            self.state_path(step), restore_args=jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved))
      meta = self.read_meta(step)
      _check_digest(restored['trainable'], meta.trainable_digest)
    except Exception as error:
      raise self._unreadable(step, error) from error
    return restored['trainable'], meta

  def state_path(self, step: int) -> str:
    """Returns the folder of a state, which can be read leaf by leaf."""
    return os.path.join(self._dir, str(step), 'state')

  def explained_meta(self, step: int) -> Meta:
    """Like `read_meta`, but raises a `UserError` if it cannot be read."""
    try:
      return self.read_meta(step)
    except Exception as error:
      raise self._unreadable(step, error) from error

  def _unreadable(self, step, error):
    return errors.UserError(
        f'checkpoint {step} in {self._dir} cannot be read: {error}',
        f'an intact checkpoint, one of {self.steps()}',
        'choose another with --step')

  def restore_latest(self, abstract_state: Any, check: Callable[[Meta], None]
                     ) -> tuple[state_lib.TrainState, Meta] | None:
    """Returns the newest intact checkpoint, or None without any.

    A damaged one is skipped with a warning and moved aside, so that the run can
    save that step again. `check` raises `UserError` for a checkpoint of another
    run. It is called before the arrays are read, because arrays of other shapes
    would seem damaged. Raises `UserError` if there are checkpoints and none of
    them can be read.
    """
    steps, damaged, newest = self.steps(), [], None
    for step in reversed(steps):
      try:
        check(self.read_meta(step))
        newest = self.restore(step, abstract_state)
        break
      except errors.UserError:
        raise
      except Exception as error:  # A damaged file may raise anything.
        logging.warning(
            'checkpoint %d cannot be read and is skipped: %s', step,
            str(error).splitlines()[0] if str(error) else repr(error))
        damaged.append(step)
    hosts.check_same(
        'the newest intact checkpoint', newest and newest[1].step,
        f'the same one everywhere, of {self._dir}',
        'put --workdir on a disk that all hosts share')
    if newest:
      for step in damaged:
        self._set_aside(step)
    elif steps:
      raise errors.UserError(
          f'none of the checkpoints {steps} in {self._dir} can be read',
          'at least one intact checkpoint',
          'begin again in a new --workdir; the damaged ones stay there')
    return newest

  def _set_aside(self, step: int) -> None:
    if jax.process_index() == 0:
      target = os.path.join(os.path.dirname(self._dir), f'damaged-{step}')
      shutil.rmtree(target, ignore_errors=True)
      shutil.move(os.path.join(self._dir, str(step)), target)
    hosts.barrier()
    self._manager.reload()


def _check_digest(tree, saved):
  digest = tree_digest(tree)
  if digest and saved and digest != saved:
    raise ValueError('its bytes have changed on disk')


def choose_step(checkpoints: Checkpoints, step: int) -> int:
  """Returns the step of the checkpoint to evaluate, sample from or export.

  -1 is the best (the latest if nothing was evaluated), -2 the latest. Raises
  `UserError` if there is no such checkpoint.
  """
  steps = checkpoints.steps()
  if not steps:
    raise errors.UserError(
        'the workdir has no checkpoints', 'a run that has saved one',
        'train first: python -m gemma_sft.train --config=... --workdir=...')
  if step in (-1, -2):
    metas = checkpoints.read_metas()
    if not metas:
      raise errors.UserError(
          f'none of the checkpoints {steps} can be read',
          'at least one intact checkpoint', 'train again in a new --workdir')
    latest = max(metas)
    metric = metas[latest].config['eval.metric']
    scored = {s: m.metrics[metric] for s, m in metas.items()
              if metric in m.metrics}
    if step == -2 or not scored:
      return latest
    sign = 1 if metas[latest].config['eval.mode'] == 'max' else -1
    # Ties go to the later step.
    return max(scored, key=lambda s: (sign * scored[s], s))
  if step not in steps:
    raise errors.UserError(
        f'no checkpoint of step {step}', f'one of {steps}',
        '--step=-1 takes the best, --step=-2 the latest')
  return step


_FULL = ('No space left', 'File too large', 'Disk quota exceeded')


@contextlib.contextmanager
def _disk_errors(path: str) -> Iterator[None]:
  """Turns the error of a full disk into a `UserError`."""
  try:
    yield
  except Exception as error:  # TensorStore raises ValueError for it.
    if not any(text in repr(error) for text in _FULL):
      raise
    free = shutil.disk_usage(os.path.dirname(path)).free / 1e9
    raise errors.UserError(
        f'the disk is full: a checkpoint could not be saved in {path}'
        f' ({free:.1f} GB free)',
        'room for one more checkpoint',
        'make room and start the same command again: it resumes from the'
        ' last intact checkpoint') from error
