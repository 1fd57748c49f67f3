"""Which runs a sweep is made of, and how far each of them is."""

import dataclasses
import os
import re
from typing import Any
from typing import Mapping
from typing import Sequence

from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft import tasks
from gemma_sft.inputs import splits
from gemma_sft.monitor import metrics
from gemma_sft.monitor import record as record_lib
from gemma_sft.run import base
from gemma_sft.sweeping import grid
from gemma_sft.sweeping import source as source_lib

FINISHED, TO_EVALUATE, TO_CONTINUE, TO_DO = (
    'finished', 'to evaluate', 'to continue', 'to do')
# A name in front of the identity, for people; file systems take 255 bytes.
_NAME = 60


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of a sweep: a cell with a seed.

  Attributes:
    cell: What it is a run of.
    seed: Its config.seed.
    identity: See `record.identity`.
    workdir: Its folder.
    arguments: The command line of its config.
    leaves: Its flat config.
    split: Answered and judged after training; '' for none.
  """

  cell: grid.Cell
  seed: int
  identity: str
  workdir: str
  arguments: tuple[str, ...]
  leaves: Mapping[str, Any]
  split: str

  @property
  def evaluation(self) -> str:
    """The file of its verdicts, '' if training's own are what counts."""
    return self.split and os.path.join(
        self.workdir, 'evaluation', f'{self.split}-tuned.json')

  def state(self) -> str:
    """Returns finished, to evaluate, to continue or to do."""
    record = record_lib.read(self.workdir)
    if self.is_trained(record):
      done = not self.split or os.path.exists(self.evaluation)
      return FINISHED if done else TO_EVALUATE
    started = record or os.path.isdir(
        os.path.join(self.workdir, 'checkpoints'))
    return TO_CONTINUE if started else TO_DO

  def is_trained(self, record: Mapping[str, Any] | None) -> bool:
    """Whether a run.json is of this run, trained to its end."""
    return bool(record and record['identity'] == self.identity
                and record['end'] and record['end']['finished'])

  def step(self) -> int:
    """Returns the last update that it logged."""
    rows = metrics.read_jsonl(os.path.join(self.workdir, 'metrics.jsonl'))
    return max((row['step'] for row in rows), default=0)


class Planner:
  """Turns cells into runs."""

  def __init__(self, source: source_lib.Source, workdir: str, evaluate: str):
    """Makes one that has read nothing yet.

    Args:
      source: The config file.
      workdir: Of the sweep.
      evaluate: auto, test, validation or none.
    """
    self._source, self._workdir = source, workdir
    self._evaluate = evaluate
    # Weights and records are hashed once for all runs.
    self._base: dict[Any, Any] = {}
    self._records: dict[Any, str] = {}

  def plan(
      self, cells: Sequence[grid.Cell], seeds: Sequence[int]) -> list[Run]:
    """Returns the runs, all cells of the first seed first.

    After a kill those that are there are then complete pairs.

    Raises:
      UserError: for a config that is not valid, naming the cell; for two cells
        that are the same run.
    """
    configs = {c.name: grid.load_cell(self._source, c) for c in cells}
    plan, seen = [], {}
    for seed in seeds:
      for cell in cells:
        run = self.run(cell, configs[cell.name], seed)
        if run.identity in seen:
          other = seen[run.identity]
          raise errors.UserError(
              f'cell {cell.name} and cell {other.name} are the same run',
              'cells that differ in what decides the result: meshes, kernels,'
              ' remat and names of files do not',
              'remove one of them')
        seen[run.identity] = cell
        plan.append(run)
    return plan

  def run(self, cell: grid.Cell, config: Any, seed: int) -> Run:
    """Returns the run of a cell, its validated config and a seed.

    Raises:
      UserError: naming the cell, for data or weights that are not there.
    """
    leaves = dict(config_lib.leaves(config)) | {'seed': seed}
    try:
      identity = record_lib.identity(
          leaves, self._base_hash(config, seed), self._data_hashes(config))
      split = choose_split(config, self._evaluate)
    except errors.UserError as error:
      raise grid.named(cell, error) from error
    words = re.sub(r'[^A-Za-z0-9.]+', '-', cell.name).strip('-')[:_NAME]
    return Run(
        cell=cell, seed=seed, identity=identity, split=split, leaves=leaves,
        workdir=self._folder(identity, f'{words}-seed-{seed}'),
        arguments=tuple(
            self._source.arguments({**cell.changes, 'seed': seed})))

  def _folder(self, identity, name):
    """Returns the run's folder: found by its identity, whatever its name."""
    folder = os.path.join(self._workdir, 'runs')
    for found in sorted(os.listdir(folder) if os.path.isdir(folder) else ()):
      if found.endswith(f'-{identity}'):
        return os.path.join(folder, found)
    return os.path.join(folder, f'{name}-{identity}')

  def _base_hash(self, config, seed):
    key = config.model.weights, config.model.weights_sha256
    if key not in self._base:
      self._base[key] = base.resolve_weights(config.model)
    return base.base_hash(self._base[key], seed)

  def _data_hashes(self, config):
    task, section, hashes = tasks.load(config.task), config.data, {}
    for name in ('train', 'validation', 'test'):
      if not section[name]:
        continue
      key = (name, config.task, section[name], section.format, section.columns,
             section.limit, tuple(section.fields))
      if key not in self._records:
        self._records[key] = splits.data_hash(
            splits.read_split(section, name), task)
      hashes[name] = self._records[key]
    return hashes


def choose_split(config: Any, evaluate: str) -> str:
  """Returns the split to be judged after training, '' for none.

  Args:
    config: Of a run.
    evaluate: auto, test, validation or none.

  Raises:
    UserError: if the config has no such split.
  """
  known = [s for s in ('test', 'validation') if config.data[s]]
  if evaluate == 'none' and 'validation' in known:
    return ''
  if evaluate == 'auto' and known:
    return known[0]
  if evaluate not in known:
    raise errors.UserError(
        f'--evaluate={evaluate}',
        'a split that the config names (none takes the validation scores of'
        f' training): {known or "it has none"}',
        'set --config.data.validation')
  return evaluate


# How long it takes ----------------------------------------------------------


def estimate_seconds(
    run: Run, finished: Sequence['Timing']) -> float | None:
  """Returns how long a run takes, going by finished runs; None if none says.

  A run of the same cell takes as long; another one by its updates, if the
  number of them is known: set by config.train.steps, or as many an epoch as
  a run on the same batches had.

  Args:
    run: Not finished.
    finished: Timings of finished runs of the same sweep.
  """
  alike = [t for t in finished if t.cell == run.cell.name]
  if not alike:
    alike = [t for t in finished if _updates(run.leaves, t)]
  if not alike:
    return None
  known = [
      t.seconds if t.cell == run.cell.name else
      t.evaluating + t.training * _updates(run.leaves, t) / t.steps
      for t in alike]
  mean = sum(known) / len(known)
  total = alike[0].steps if alike[0].cell == run.cell.name else _updates(
      run.leaves, alike[0])
  return mean * max(0.0, 1 - run.step() / max(1, total))


@dataclasses.dataclass(frozen=True)
class Timing:
  """How long a finished run took.

  Attributes:
    cell: Its cell's name.
    leaves: Its flat config.
    steps: Its updates.
    training: Seconds of training, the start included.
    evaluating: Seconds of answering afterwards.
  """

  cell: str
  leaves: Mapping[str, Any]
  steps: int
  training: float
  evaluating: float

  @property
  def seconds(self) -> float:
    """Of both."""
    return self.training + self.evaluating


def _updates(leaves, timing):
  """Returns the updates of a run, by those of another; 0 if unknown."""
  if leaves['train.steps']:
    return leaves['train.steps']
  other = timing.leaves
  same = all(leaves[k] == other[k] for k in leaves if k.startswith(
      ('data.', 'train.gradient_accumulation_steps')))
  if not same or other['train.steps']:
    return 0
  return round(timing.steps * leaves['train.epochs'] / other['train.epochs'])
