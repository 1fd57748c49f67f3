"""The runs of a sweep, and how far each of them is."""

import dataclasses
import glob
import itertools
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


@dataclasses.dataclass(frozen=True)
class PlannedRun:
  """One run of a sweep: a cell with a seed."""

  cell: grid.Cell
  seed: int
  identity: str  # See `record.identity`.
  workdir: str
  arguments: tuple[str, ...]  # The command line of its config.
  leaves: Mapping[str, Any]
  split: str  # To be answered and judged after training; '' for none.

  @property
  def evaluation(self) -> str:
    """The file of its verdicts; '' if the scores of training are used."""
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
    """Returns whether a run.json is of this run, trained to its end."""
    return bool(record and record['identity'] == self.identity
                and record['end'] and record['end']['finished'])

  def step(self) -> int:
    """Returns the last update that it logged."""
    rows = metrics.read_jsonl(os.path.join(self.workdir, 'metrics.jsonl'))
    return max((row['step'] for row in rows), default=0)


class Planner:
  """Turns cells into runs; hashes weights and records once for all runs."""

  def __init__(
      self, source: source_lib.SweepSource, workdir: str, evaluate: str):
    self._source, self._workdir, self._evaluate = source, workdir, evaluate
    self._known: dict[Any, Any] = {}

  def plan(
      self, cells: Sequence[grid.Cell], seeds: Sequence[int]
  ) -> list[PlannedRun]:
    """Returns the runs, all cells of the first seed first.

    So the seeds that are finished when a sweep is killed can be compared.

    Raises:
      UserError: for an invalid config, missing data or weights, naming the
        cell; for two cells that are the same run.
    """
    configs = {c.name: grid.load_cell(self._source, c) for c in cells}
    runs: dict[str, PlannedRun] = {}
    for seed, cell in itertools.product(seeds, cells):
      run = self.run(cell, configs[cell.name], seed)
      if other := runs.get(run.identity):
        raise errors.UserError(
            f'cell {cell.name} and cell {other.cell.name} are the same run',
            'cells that differ in what decides the result: meshes, kernels,'
            ' remat and names of files do not', 'remove one of them')
      runs[run.identity] = run
    return list(runs.values())

  def run(self, cell: grid.Cell, config: Any, seed: int) -> PlannedRun:
    """Returns the run of a cell, its validated config and a seed."""
    leaves = dict(config_lib.leaves(config)) | {'seed': seed}
    with grid.naming(cell):
      identity = record_lib.identity(
          leaves, self._base_hash(config, seed), self._data_hashes(config))
      split = choose_split(config, self._evaluate)
    name = re.sub(r'[^A-Za-z0-9.]+', '-', cell.name).strip('-')
    return PlannedRun(
        cell=cell, seed=seed, identity=identity, split=split, leaves=leaves,
        # A folder's name has at most 255 bytes.
        workdir=self._folder(identity, f'{name[:60]}-seed-{seed}'),
        arguments=tuple(
            self._source.arguments({**cell.changes, 'seed': seed})))

  def _folder(self, identity, name):
    """Returns the folder of this identity, or else a new one."""
    folder = os.path.join(self._workdir, 'runs')
    found = sorted(glob.glob(f'*-{identity}', root_dir=folder))
    return os.path.join(folder, found[0] if found else f'{name}-{identity}')

  def _base_hash(self, config, seed):
    key = config.model.weights, config.model.weights_sha256
    if key not in self._known:
      self._known[key] = base.resolve_weights(config.model)
    return base.base_hash(self._known[key], seed)

  def _data_hashes(self, config):
    task, section, hashes = tasks.load(config.task), config.data, {}
    for name in ('train', 'validation', 'test'):
      if not section[name]:
        continue
      key = (name, config.task, section[name], section.format, section.columns,
             section.limit, tuple(section.fields))
      if key not in self._known:
        self._known[key] = splits.data_hash(
            splits.read_split(section, name), task)
      hashes[name] = self._known[key]
    return hashes


def choose_split(config: Any, evaluate: str) -> str:
  """Returns the split to be judged after training, '' for none."""
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
