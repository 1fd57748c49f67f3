"""Runs a config with several settings and seeds, and compares the results.

    python -m gemma_sft.sweep --config=configs/slang.py --workdir=W --seeds=3 \\
        --grid='lora.rank=4,8;train.epochs=1,5'
    python -m gemma_sft.sweep --config=configs/slang.py --workdir=W
    python -m gemma_sft.sweep --config=configs/slang.py --workdir=W \\
        --search='optimizer.learning_rate=1e-5..1e-3:log;lora.rank=4,8,16'

The first form runs every combination of the factors' values. The second runs
what `sweep()` in the config file returns (see gemma_sft/sweeping/grid.py). The
third searches, judged on the validation split alone, and ends hopeless trials
early.

Each run is an ordinary workdir in W/runs, trained and evaluated by processes of
its own. The same command again continues: finished runs are never repeated,
interrupted runs continue. --dry_run lists the runs and how long each will take,
judging by finished runs, or else by the FLOPs of a step (--topology names
another device than this machine, such as kaggle-tpu).

--parallel=2 runs two at a time, each on a GPU or TPU chip of its own. With
--shard=0/2 and --shard=1/2, two hosts that share W take every other run each,
and the last to end writes the whole comparison: W/sweep.html, report.md,
sweep.json. Overrides hold for all runs: --config.train.steps=100.
"""

from gemma_sft import cli

if __name__ == '__main__':
  cli.run(
      'gemma_sft.sweep', cli.CONFIG, cli.WORKDIR, cli.TOPOLOGY,
      cli.text(
          'grid', '', 'Factors and their values, every combination of which is'
          ' a cell: lora.rank=4,8;train.epochs=1,5. The factor config is the'
          ' argument of the config file. Default: what sweep() of that file'
          ' returns.'),
      cli.integer(
          'seeds', 0, 'Runs of each cell, with config.seed and the numbers'
          ' after it. Default: what sweep() of the config file returns, or 1.'),
      cli.text(
          'baseline_cell', '', 'Name of the cell that the others are compared'
          ' with. Default: that of sweep(), or the first.'),
      cli.choice(
          'evaluate', 'auto', ['auto', 'test', 'validation', 'none'],
          'Split that the best checkpoint of each run answers. auto: test if it'
          ' is set, else validation; none: the validation scores of training'
          ' count.'),
      cli.integer(
          'parallel', 1, 'Runs at a time, each on a GPU or TPU chip of its'
          ' own.'),
      cli.text(
          'shard', '', 'i/n: this process takes every n-th run, from the i-th'
          ' (0/2 and 1/2 on two hosts that share --workdir).'),
      cli.switch('dry_run', False, 'List the runs and stop.'),
      cli.text(
          'search', '', 'Space to search instead of a grid: '
          'optimizer.learning_rate=1e-5..1e-3:log;lora.rank=4,8,16.'),
      cli.integer(
          'trials', 20, 'Trials of --search, including those of earlier'
          ' calls.'))

import os
from typing import Any
from typing import Mapping
from typing import Sequence

import jax

from gemma_sft import errors
from gemma_sft import plan as plan_entry
from gemma_sft.monitor import metrics
from gemma_sft.planning import estimate
from gemma_sft.planning import hardware
from gemma_sft.run import workdir as workdir_lib
from gemma_sft.sweeping import grid as grid_lib
from gemma_sft.sweeping import page
from gemma_sft.sweeping import processes
from gemma_sft.sweeping import results as results_lib
from gemma_sft.sweeping import runs as runs_lib
from gemma_sft.sweeping import search as search_lib
from gemma_sft.sweeping import source as source_lib
from gemma_sft.sweeping import wording

_HERE = hardware.parse('cpu')


def main(
    config: Any,
    workdir: str,
    grid: str = '',
    seeds: int = 0,
    baseline_cell: str = '',
    evaluate: str = 'auto',
    parallel: int = 1,
    shard: str = '',
    dry_run: bool = False,
    search: str = '',
    trials: int = 20,
    topology: str = 'cpu',
) -> int:
  """Runs the sweep; see the module's docstring."""
  cli.require('config', config, '--config=configs/slang.py')
  cli.require('workdir', workdir, '--workdir=sweeps/slang')
  # This process only hashes weights and data; the runs need the devices.
  jax.config.update('jax_platforms', 'cpu')
  source = source_lib.SweepSource.from_flag(*cli.config_source())
  if seeds < 0:
    raise errors.UserError(
        f'--seeds={seeds}', 'at least 1', 'for example --seeds=3')
  slots = processes.make_slots(parallel, os.environ)
  if search:
    _refuse_with_search(
        grid=grid, seeds=seeds, baseline_cell=baseline_cell, shard=shard,
        evaluate=evaluate if evaluate != 'auto' else '')
    return search_lib.run(
        source, config, search, trials=trials, workdir=workdir, slots=slots,
        dry_run=dry_run)
  return compare(
      source, config, workdir, grid=grid, seeds=seeds, baseline=baseline_cell,
      evaluate=evaluate, slots=slots, shard=shard, dry_run=dry_run,
      target=hardware.parse(topology))


def compare(
    source: source_lib.SweepSource,
    config: Any,
    workdir: str,
    *,
    grid: str = '',
    seeds: int = 0,
    baseline: str = '',
    evaluate: str = 'auto',
    slots: Sequence[Mapping[str, str]],
    shard: str = '',
    dry_run: bool = False,
    target: hardware.Slice = _HERE,
) -> int:
  """Runs what is missing of a grid and compares; returns the exit status.

  Args:
    seeds: --seeds; 0 for the file's.
    baseline: --baseline_cell; '' for the file's.
    shard: --shard; '' for all runs.
    dry_run: List the runs, and stop.
    target: For the time estimates of a dry run, where no run is finished.
  """
  part, n_parts = parse_shard(shard)
  sweep = grid_lib.make_sweep(
      source, config, grid=grid, seeds=seeds, baseline=baseline)
  planned = runs_lib.Planner(source, workdir, evaluate).plan(
      sweep.cells, sweep.seeds)
  if dry_run:
    _list(source, planned[part::n_parts], len(slots), target)
    return 0
  with workdir_lib.lock_workdir(workdir if not shard else os.path.join(
      workdir, 'shards', f'{part}-of-{n_parts}')):
    return _run(
        sweep, planned, planned[part::n_parts], slots, workdir, source.path)


def _refuse_with_search(**flags: Any) -> None:
  for name, value in flags.items():
    if value:
      raise errors.UserError(
          f'--{name} with --search', 'a search or a grid: a trial is one run'
          ' with config.seed, scored on validation',
          'search first, then compare the best with --grid and --seeds')


def parse_shard(text: str) -> tuple[int, int]:
  """Returns (0, 2) of '0/2', and (0, 1) of ''.

  Raises:
    UserError: for anything else.
  """
  if not text:
    return 0, 1
  part, _, n_parts = text.partition('/')
  if not (part.isdecimal() and n_parts.isdecimal()
          and int(part) < int(n_parts)):
    raise errors.UserError(
        f'--shard={text}', 'i/n, i from 0 to n - 1',
        'for two hosts --shard=0/2 and --shard=1/2')
  return int(part), int(n_parts)


# The runs --------------------------------------------------------------------


def _run(sweep, planned, mine, slots, workdir, config) -> int:
  """Runs this host's part, then compares all finished runs."""
  progress = Progress(mine, len(slots))
  with processes.Stop() as stop:
    outcomes = processes.run_all(
        mine, slots, stop, on_start=progress.start, on_end=progress.end)
  messages = {w: o.message for w, o in outcomes.items()
              if o.state != 'finished'}
  summary = page.write(sweep, planned, messages, workdir, config)
  print()
  for sentence in summary['sentences']:
    print(sentence)
  print(f'comparison: {os.path.join(workdir, "sweep.html")}')
  for run in mine:
    if run.workdir in messages:
      log = os.path.join(run.workdir, 'log.txt')
      print(f'not finished: {run.cell.name}, seed {run.seed}:'
            f' {messages[run.workdir]} ({log})')
  if stop.signal:
    print(f'stopped by {stop.signal.name}; the same command goes on from here')
    return 128 + stop.signal
  if not summary['complete'] and not messages:
    print('other hosts are still running; the last one to end, or the same'
          ' command again, completes the comparison')
  return 1 if messages else 0


class Progress:
  """Prints a line at the start and the end of each run."""

  def __init__(self, runs: Sequence[runs_lib.PlannedRun], parallel: int):
    """Prints how many are finished already."""
    self._runs, self._parallel = list(runs), parallel
    self._finished = _finished(runs)
    self._open = _unfinished(runs)
    _say(f'{len(runs)} runs: {len(self._finished)} finished,'
         f' {len(self._open)} to go' + self._time_left())

  def start(self, run: runs_lib.PlannedRun) -> None:
    """Prints that a run starts or continues."""
    state = {
        runs_lib.TO_CONTINUE: f'continues after {run.step()} updates',
        runs_lib.TO_EVALUATE: 'is trained; evaluation'}
    _say(f'{self._name(run)} | {state.get(run.state(), "starts")}')

  def end(self, run: runs_lib.PlannedRun, outcome: processes.Outcome) -> None:
    """Prints how a run ended, and what is left."""
    text = f'{outcome.state} after {metrics.duration(outcome.seconds)}'
    self._open.remove(run)
    result = results_lib.read(run)
    if outcome.state == 'finished' and result is not None:
      self._finished.append(result)
      for name in dict.fromkeys((result.headline, 'loss')):
        text += (f' | {wording.label(name)}'
                 f' {wording.show(name, result.scores.get(name))}')
    if outcome.message:
      text += f' | {outcome.message}'
    _say(f'{self._name(run)} | {text} | {len(self._open)} left'
         + self._time_left())

  def _name(self, run):
    number, n_runs = self._runs.index(run) + 1, len(self._runs)
    return (f'run {number:{len(str(n_runs))}d}/{n_runs} | {run.cell.name} |'
            f' seed {run.seed}')

  def _time_left(self):
    return _time_left(self._open, self._finished, self._parallel)


def _say(text):
  print(text, flush=True)


def _finished(runs):
  return [r for run in runs if (r := results_lib.read(run))]


def _unfinished(runs):
  return [run for run in runs if run.state() != runs_lib.FINISHED]


def _time_left(runs, finished, parallel):
  """Returns ', about 2 h 05 m', or '' if no run is left."""
  if not runs:
    return ''
  seconds = [results_lib.estimate_seconds(run, finished) for run in runs]
  if None in seconds:
    return ', time unknown' + ('' if finished else ' until one is finished')
  return f', about {metrics.duration(sum(seconds) / parallel)}'


def _list(source, runs, parallel, target) -> None:
  """Prints the runs, and how long those that are not finished take."""
  finished, unfinished = _finished(runs), _unfinished(runs)
  by_flops = {}  # {cell: estimate}, for cells of which no finished run says.
  for run in runs:
    time = ''
    if run in unfinished:
      seconds = results_lib.estimate_seconds(run, finished)
      if seconds is not None:
        time = f' | about {metrics.duration(seconds)}'
      else:
        name = run.cell.name
        if name not in by_flops:
          by_flops[name] = plan_entry.training_seconds(
              grid_lib.load_cell(source, run.cell), target)
        time = f' | training {_range(by_flops[name])}'
    _say(f'{run.state():11} | {run.cell.name} | seed {run.seed}{time} |'
         f' {run.workdir}')
  left = _time_left(unfinished, finished, parallel)
  if by_flops:
    ranges = [by_flops.get(run.cell.name) for run in unfinished]
    if all(ranges):
      left = ', training ' + _range(estimate.Seconds(
          sum(r.quick for r in ranges) / parallel,
          sum(r.slow for r in ranges) / parallel, ''))
    assumption = next(iter(by_flops.values())).assumption
    _say(f'training time from the FLOPs of a step on {target.name}, at'
         f' {assumption}; answering the judged split comes on top')
  _say(f'{len(runs)} runs: {len(finished)} finished,'
       f' {len(unfinished)} to go' + left)
  _say('dry run: nothing was started')


def _range(seconds):
  return (f'{metrics.duration(seconds.quick)} to'
          f' {metrics.duration(seconds.slow)}')
