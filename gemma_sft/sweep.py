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

import functools
import os
from typing import Any
from typing import Sequence

import jax

from gemma_sft import errors
from gemma_sft import plan as plan_entry
from gemma_sft import progress
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


def main(
    config: Any, workdir: str, topology: str = 'cpu', grid: str = '',
    seeds: int = 0, baseline_cell: str = '', evaluate: str = 'auto',
    parallel: int = 1, shard: str = '', dry_run: bool = False, search: str = '',
    trials: int = 20) -> int:
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
    for name, is_set in dict(
        grid=grid, seeds=seeds, baseline_cell=baseline_cell, shard=shard,
        evaluate=evaluate != 'auto').items():
      if is_set:
        raise errors.UserError(
            f'--{name} with --search', 'a search or a grid: a trial is one run'
            ' with config.seed, scored on validation',
            'search first, then compare the best with --grid and --seeds')
    return search_lib.run(
        source, config, search, trials=trials, workdir=workdir, slots=slots,
        dry_run=dry_run)
  target = hardware.parse(topology)
  part, n_parts = parse_shard(shard)
  sweep = grid_lib.make_sweep(
      source, config, grid=grid, seeds=seeds, baseline=baseline_cell)
  planned = runs_lib.Planner(source, workdir, evaluate).plan(
      sweep.cells, sweep.seeds)

  def schedule():
    return Schedule(planned[part::n_parts], parallel)

  if dry_run:
    _list(source, schedule(), target)
    return 0
  # Under the lock, so that no other sweep changes which runs are finished.
  with workdir_lib.lock_workdir(workdir if not shard else os.path.join(
      workdir, 'shards', f'{part}-of-{n_parts}')):
    return _run(sweep, planned, schedule(), slots, workdir, source.path)


def parse_shard(text: str) -> tuple[int, int]:
  """Returns (0, 2) of '0/2', and (0, 1) of ''."""
  part, _, n_parts = (text or '0/1').partition('/')
  if not (part.isdecimal() and n_parts.isdecimal()
          and int(part) < int(n_parts)):
    raise errors.UserError(
        f'--shard={text}', 'i/n, i from 0 to n - 1',
        'for two hosts --shard=0/2 and --shard=1/2')
  return int(part), int(n_parts)


# The runs --------------------------------------------------------------------


def _run(sweep, planned, mine, slots, workdir, config) -> int:
  """Runs this host's part, then compares all finished runs."""
  _say(mine.summary())
  with processes.Stop() as stop:
    processes.run_all(slots, stop, start=mine.start, on_end=mine.end)
  summary = page.write(sweep, planned, mine.messages, workdir, config)
  print(f'comparison: {os.path.join(workdir, "sweep.html")}')
  for run in mine.runs:
    if run.workdir in mine.messages:
      log = os.path.join(run.workdir, 'log.txt')
      print(f'not finished: {run.cell.name}, seed {run.seed}:'
            f' {mine.messages[run.workdir]} ({log})')
  if not (stop.signal or summary['complete'] or mine.messages):
    print('other hosts are still running; the last one to end, or the same'
          ' command again, completes the comparison')
  return stop.exit_status(bool(mine.messages))


class Schedule:
  """The runs of this host, in order; says how each starts and ends."""

  def __init__(self, runs: Sequence[runs_lib.PlannedRun], parallel: int):
    self.runs = list(runs)
    self.finished = [r for run in runs if (r := results_lib.read(run))]
    self.unfinished = [r for r in runs if r.state() != runs_lib.FINISHED]
    self.messages: dict[str, str] = {}  # {workdir: why a run did not finish}.
    self.parallel = parallel
    self._waiting = list(self.unfinished)

  def summary(self, left: str = '') -> str:
    """Returns how many runs are finished, and the time that is left."""
    return (f'{len(self.runs)} runs: {len(self.finished)} finished,'
            f' {len(self.unfinished)} to go{left or self._time_left()}')

  def seconds(self, run: runs_lib.PlannedRun) -> float | None:
    """Returns what a run still takes, judging by finished ones, if known."""
    return results_lib.estimate_seconds(run, self.finished)

  def start(
      self, environment: processes.Environment) -> processes.Process | None:
    """Starts or continues the next run; returns None if there is no more."""
    if not self._waiting:
      return None
    run = self._waiting.pop(0)
    state = {
        runs_lib.TO_CONTINUE: f'continues after {run.step()} updates',
        runs_lib.TO_EVALUATE: 'is trained; evaluation'}
    _say(f'{self._name(run)} | {state.get(run.state(), "starts")}')
    return processes.Process(run, environment)

  def end(
      self, process: processes.Process, outcome: processes.Outcome) -> None:
    """Notes how a run ended."""
    run = process.run
    text = f'{outcome.state} after {progress.duration(outcome.seconds)}'
    self.unfinished.remove(run)
    result = results_lib.read(run)
    if outcome.state != 'finished':
      self.messages[run.workdir] = outcome.message
      text += f' | {outcome.message}'
    elif result is not None:
      self.finished.append(result)
      for name in dict.fromkeys((result.headline, 'loss')):
        text += (f' | {wording.label(name)}'
                 f' {wording.show(name, result.scores.get(name))}')
    _say(f'{self._name(run)} | {text} | {len(self.unfinished)} left'
         + self._time_left())

  def _name(self, run):
    number, n_runs = self.runs.index(run) + 1, len(self.runs)
    return (f'run {number:{len(str(n_runs))}d}/{n_runs} | {run.cell.name} |'
            f' seed {run.seed}')

  def _time_left(self):
    seconds = list(map(self.seconds, self.unfinished))
    if None in seconds:
      return ', time unknown' + (
          '' if self.finished else ' until one is finished')
    left = progress.duration(sum(seconds) / self.parallel)
    return f', about {left}' if seconds else ''


_say = functools.partial(print, flush=True)


def _list(source, schedule, target) -> None:
  """Prints the runs, and how long those that are not finished take."""
  by_flops = {}  # {cell: estimate}, for cells of which no finished run says.
  for run in schedule.runs:
    time = ''
    if run in schedule.unfinished:
      seconds = schedule.seconds(run)
      name = run.cell.name
      if seconds is not None:
        time = f' | about {progress.duration(seconds)}'
      else:
        if name not in by_flops:
          by_flops[name] = plan_entry.training_seconds(
              grid_lib.load_cell(source, run.cell), target)
        time = f' | training {by_flops[name].show()}'
    _say(f'{run.state():11} | {run.cell.name} | seed {run.seed}{time} |'
         f' {run.workdir}')
  left = ''
  if by_flops:
    ranges = [by_flops.get(run.cell.name) for run in schedule.unfinished]
    if all(ranges):
      total = estimate.Seconds(
          sum(r.quick for r in ranges), sum(r.slow for r in ranges), '')
      left = f', training {total.times(1 / schedule.parallel).show()}'
    assumption = next(iter(by_flops.values())).assumption
    _say(f'training time from the FLOPs of a step on {target.name}, at'
         f' {assumption}; answering the judged split comes on top')
  _say(schedule.summary(left))
  _say('dry run: nothing was started')
