"""Counts faults: kills at random moments, and the faults that tests plant.

    python tests/faults/run.py [--kills=30] [--seed=0] [--only=kills]

A fifth of the kills (-9) hit an export. The others hit a tiny run while it
starts, steps, saves or evaluates; it is started again after each, until it
ends. A case passes if no intact checkpoint is lost and if losses, evaluations
and the last checkpoint are bit-identical to those of an undisturbed run. An
export over the remains of a killed one must have the same bytes. The other rows
run tests of tests/ that plant a fault. Status 1 if a case fails.
"""

import argparse
import collections
import dataclasses
import hashlib
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Callable
from xml.etree import ElementTree

_TESTS = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS.parent), str(_TESTS)]

import conftest
import numpy as np

from gemma_sft.monitor import metrics
from gemma_sft.run import checkpoint

_PHASES = ('starting', 'step', 'save', 'evaluation')
_SAVE_EVERY, _EVALUATE_EVERY = 3, 6
# Updates per kill: so many that no kill comes after the end of the run.
_STEPS_A_KILL = 12
_TIMEOUT = 600  # Seconds for whatever the drill waits for.

# Row of the table -> file of tests -> its tests; () for all.
_PLANTED = {
    'SIGTERM, several': {'train_test.py': (
        'test_sigterm_saves_exits_cleanly_and_resumes',)},
    'deadline': {'train_test.py': ('test_deadline_saves_and_resumes',)},
    'full disk': {'run/checkpoint_test.py': (
        'test_full_disk_while_saving_loses_nothing',
        'test_full_disk_while_logging_is_told')},
    'workdir that cannot be written': {'train_test.py': (
        'test_workdir_that_cannot_be_written_is_refused',
        'test_workdir_that_is_a_file_is_refused')},
    'two runs in one workdir': {'train_test.py': (
        'test_workdir_in_use_is_refused_with_the_process',)},
    'damaged and truncated checkpoints': {'run/checkpoint_test.py': (
        'test_damaged_newest_is_passed_over_for_the_one_before',
        'test_all_damaged_is_told_each_time_and_nothing_is_lost',
        'test_serving_a_damaged_checkpoint_is_told',
        'test_serving_passes_over_what_says_nothing')},
    'base weights missing or others at resume': {'train_test.py': (
        'test_resume_without_its_base_is_refused',
        'test_resume_on_another_base_is_refused')},
    'data changed at resume': {'train_test.py': (
        'test_resume_with_other_data_is_refused',)},
    'config changed at resume': {'train_test.py': (
        'test_resume_with_another_config_is_refused',)},
    'a loss that is not finite': {'train_test.py': (
        'test_a_step_that_is_not_finite_is_named',
        'test_the_checkpoint_before_a_step_that_is_not_finite_is_whole')},
    'several hosts: kills, signals, mistakes': {'run/multihost_test.py': ()},
}


@dataclasses.dataclass
class Row:
  """A line of the table: cases, those that passed, and what went wrong."""

  cases: int = 0
  passed: int = 0
  failures: list[str] = dataclasses.field(default_factory=list)

  def count(self, failures: list[str]) -> None:
    """Adds a case with its failures."""
    self.cases += 1
    self.passed += not failures
    self.failures += failures


def main() -> int:
  """Returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--kills', type=int, default=30)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--only', choices=('kills', 'planted'))
  arguments = parser.parse_args()
  rows = {}
  if arguments.only != 'planted':
    with tempfile.TemporaryDirectory(prefix='faults') as folder:
      rows |= kill(
          pathlib.Path(folder), arguments.kills, random.Random(arguments.seed))
  if arguments.only != 'kills':
    rows |= plant()
  print('| fault | cases | passed |\n|---|---|---|')
  for name, row in rows.items():
    print(f'| {name} | {row.cases} | {row.passed} |')
  failures = [f'{name}: {failure}' for name, row in rows.items()
              for failure in row.failures]
  print('\n'.join(failures))
  return 1 if failures else 0


# Kills -----------------------------------------------------------------------


def kill(folder: pathlib.Path, n: int, rng: random.Random) -> dict[str, Row]:
  """Returns a row for each phase of a run, and one for exports."""
  rows = collections.defaultdict(Row)
  n_exports = n // 5
  config = conftest.run_config.__wrapped__(
      conftest.config.__wrapped__(folder), folder)
  config.train.steps = steps = _STEPS_A_KILL * (n - n_exports)
  config.checkpoint.update(every=_SAVE_EVERY, keep=3)
  config.eval.update(every=_EVALUATE_EVERY, judged=2)
  command = conftest.flags(config)
  straight, workdir = folder / 'straight', folder / 'killed'
  _finish(_train(command, straight), 'the undisturbed run')
  newest = 0
  for i in range(n - n_exports):
    phase = _PHASES[i % len(_PHASES)]
    start = time.time()
    process = _train(command, workdir)
    wait, pause = _moment(phase, workdir, newest, start, rng)
    _until(wait, process)
    time.sleep(pause)
    before = _intact(workdir)
    process.send_signal(signal.SIGKILL)
    out, err = process.communicate()
    failures = [] if process.returncode == -signal.SIGKILL else [
        f'kill {i}: ended by itself, {process.returncode}: {err[-300:]}']
    failures += _resumed(out, newest, i)
    after = _intact(workdir)
    # Rotation removes all but the newest three and the best.
    if before and (not after or after[-1] < before[-1]):
      failures.append(f'kill {i}: checkpoints {before} before, {after} after')
    newest = after[-1] if after else 0
    rows[f'kill -9, {phase}'].count(failures)
    print(f'kill {i + 1}: {phase}, newest checkpoint {newest}'
          + ''.join(f' | {w}' for w in failures), flush=True)
  out = _finish(_train(command, workdir), 'the last start')
  rows['the run after all these kills'].count(
      _resumed(out, newest, 'last') + _differences(workdir, straight, steps))
  rows['kill -9, export'] = _kill_exports(folder, straight, n_exports, rng)
  return dict(rows)


def _train(command, workdir):
  return conftest.start('train', *command, f'--workdir={workdir}', devices=1)


def _moment(
    phase: str, workdir: pathlib.Path, newest: int, start: float,
    rng: random.Random
) -> tuple[Callable[[], bool], float]:
  """Returns a condition to wait for, and a pause in seconds after it."""
  if phase == 'starting':
    return lambda: True, rng.uniform(0.2, 8.0)

  def has_newer():
    return (_intact(workdir) or [0])[-1] > newest

  if phase == 'save':
    folder, must = workdir / 'checkpoints', rng.choice((True, False))
    # Orbax writes under a temporary name.
    return lambda: (has_newer() or not must) and folder.is_dir() and any(
        not p.name.isdecimal() and p.is_dir() and p.stat().st_mtime > start
        for p in folder.iterdir()), rng.uniform(0, 0.01)
  # After the next checkpoint, so that the run advances.
  target, pause = newest + rng.randint(1, 2 * _SAVE_EVERY), 0.02
  if phase == 'evaluation':
    target = (newest // _EVALUATE_EVERY + 1) * _EVALUATE_EVERY
    pause = 0.6
  return lambda: has_newer() and _logged(
      workdir, start) >= target, rng.uniform(0, pause)


def _until(wait, process):
  deadline = time.monotonic() + _TIMEOUT
  while not wait() and process.poll() is None:
    if time.monotonic() > deadline:
      process.kill()
      raise SystemExit(f'nothing in {_TIMEOUT} s: {process.communicate()}')
    time.sleep(0.002)  # So that the run has a core.


def _logged(workdir, start):
  """Returns the last step logged since a time, after earlier runs."""
  rows = metrics.read_jsonl(os.path.join(workdir, 'metrics.jsonl'))
  return max((row['step'] for row in rows
              if 'loss' in row and row['time'] > start), default=0)


def _intact(workdir):
  """Returns the steps of the checkpoints that have their final name."""
  return sorted(int(path.name) for path in workdir.glob('checkpoints/*')
                if path.name.isdecimal())


def _resumed(out, newest, i):
  """Returns a failure if a run did not resume at the newest checkpoint."""
  found = re.search(r'resuming after (\d+) updates', out)
  if found and int(found[1]) != newest:
    return [f'kill {i}: resumed after {found[1]}, not {newest}']
  if not found and newest and 'step ' in out:
    return [f'kill {i}: started afresh, without checkpoint {newest}']
  return []


def _differences(workdir, straight, steps):
  failures = []
  if conftest.losses(workdir) != conftest.losses(straight):
    failures.append('the losses differ')
  if _evaluations(workdir) != _evaluations(straight):
    failures.append('the evaluations differ')
  ours, theirs = (conftest.saved_state(w, steps) for w in (workdir, straight))
  failures += [f'{path} differs' for path in theirs
               if not np.array_equal(ours.get(path), theirs[path])]
  ours, theirs = (checkpoint.Checkpoints(str(w), read_only=True).steps()
                  for w in (workdir, straight))
  if ours != theirs:
    failures.append(f'checkpoints {ours}, not {theirs}')
  return failures


def _evaluations(workdir):
  rows = metrics.read_jsonl(os.path.join(workdir, 'metrics.jsonl'))
  return {row['step']: {k: v for k, v in row.items() if k.startswith('eval/')}
          for row in rows if 'eval/loss' in row}


def _finish(process, name):
  out, err = process.communicate(timeout=_TIMEOUT * 2)
  if process.returncode:
    raise SystemExit(f'{name} ended with {process.returncode}:\n{err[-3000:]}')
  return out


# Exports ---------------------------------------------------------------------


def _kill_exports(folder, workdir, n, rng):
  row = Row()
  out = folder / 'export'  # The same for all: a GGUF contains its name.
  start = time.monotonic()
  _finish(_export(workdir, out), 'the undisturbed export')
  seconds = time.monotonic() - start
  reference = _hashes(out)
  for i in range(n):
    shutil.rmtree(out)
    process = _export(workdir, out)
    try:
      process.communicate(timeout=rng.uniform(0.3, 0.95) * seconds)
    except subprocess.TimeoutExpired:
      process.send_signal(signal.SIGKILL)
      process.communicate()
    # A file with its final name must be complete.
    after = _hashes(out)
    failures = [f'export {i}: {name} is there but differs'
                for name, digest in after.items()
                if name in reference and digest != reference[name]]
    _finish(_export(workdir, out, '--overwrite'), f'export {i}, again')
    if _hashes(out) != reference:
      failures.append(f'export {i}: the repeated export differs')
    row.count(failures)
    print(f'killed export {i + 1}: left {sorted(after) or "nothing"}'
          + ''.join(f' | {w}' for w in failures), flush=True)
  return row


def _export(workdir, out, *more):
  return conftest.start(
      'export', f'--workdir={workdir}', f'--out={out}',
      '--formats=lora,gguf-f16', *more, devices=1)


def _hashes(out):
  """Returns {name: SHA-256} of weights: other files contain the time."""
  return {str(path.relative_to(out)): hashlib.sha256(
      path.read_bytes()).hexdigest() for path in out.rglob('*')
          if path.suffix in ('.safetensors', '.gguf')}


# Planted faults --------------------------------------------------------------


def planted() -> dict[str, list[str]]:
  """Returns row -> pytest's ids of its tests, or of a whole file."""
  return {name: [f'tests/{file}' + (test and f'::{test}')
                 for file, tests in group.items() for test in tests or ('',)]
          for name, group in _PLANTED.items()}


def plant() -> dict[str, Row]:
  """Returns a row for each fault that tests plant."""
  nodes = planted()
  with tempfile.TemporaryDirectory() as folder:
    results = os.path.join(folder, 'results.xml')
    subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-n', '0', '-m', '', '-W',
         'ignore', f'--junitxml={results}',
         *(node for group in nodes.values() for node in group)],
        cwd=_TESTS.parent, check=False)
    cases = list(ElementTree.parse(results).iter('testcase'))
  rows = {name: Row() for name in nodes}
  for name, group in nodes.items():
    for node in group:
      file, _, test = node.partition('::')
      mine = [c for c in cases if c.get('classname', '').endswith(
          pathlib.Path(file).stem) and (
              not test or c.get('name', '').partition('[')[0] == test)]
      if not mine:
        rows[name].count([f'{node}: no such test'])
      for case in mine:
        rows[name].count([f'{node}: {child.tag}' for child in case
                          if child.tag in ('failure', 'error', 'skipped')])
  return rows


if __name__ == '__main__':
  sys.exit(main())
