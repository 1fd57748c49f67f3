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

_TESTS = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS.parent), str(_TESTS)]

import conftest
import numpy as np
import pytest

from gemma_sft import pages
from gemma_sft.monitor import metrics

_PHASES = ('starting', 'step', 'save', 'evaluation')
_SAVE_EVERY, _EVALUATE_EVERY = 3, 6
# Updates per kill: so many that no kill comes after the end of the run.
_STEPS_A_KILL = 12
_TIMEOUT = 600  # Seconds for whatever the drill waits for.

_TRAIN = 'tests/train_test.py::test_'
_CHECKPOINT = 'tests/run/checkpoint_test.py::test_'
# Row of the table -> pytest's ids of its tests, or of a whole file.
PLANTED = {
    'SIGTERM, several': [_TRAIN + 'sigterm_saves_exits_cleanly_and_resumes'],
    'deadline': [_TRAIN + 'deadline_saves_and_resumes'],
    'full disk': [_CHECKPOINT + 'full_disk_while_saving_loses_nothing',
                  _CHECKPOINT + 'full_disk_while_logging_is_reported'],
    'workdir that cannot be written': [
        _TRAIN + 'workdir_that_cannot_be_written_is_refused'],
    'two runs in one workdir': [
        _TRAIN + 'workdir_in_use_is_refused_with_the_process'],
    'damaged and truncated checkpoints': [
        _CHECKPOINT + 'a_damaged_newest_checkpoint_is_skipped',
        _CHECKPOINT + 'all_damaged_is_reported_and_nothing_is_lost',
        _CHECKPOINT + 'serving_a_damaged_checkpoint_is_refused',
        _CHECKPOINT + 'serving_skips_one_without_meta'],
    'base weights missing or others at resume': [
        _TRAIN + 'resume_without_its_base_or_on_another_is_refused'],
    'data changed at resume': [_TRAIN + 'resume_with_other_data_is_refused'],
    'config changed at resume': [
        _TRAIN + 'resume_with_another_config_is_refused'],
    'a loss that is not finite': [
        _TRAIN + 'the_checkpoint_before_a_step_that_is_not_finite_is_whole',
        _TRAIN + 'a_base_that_is_not_finite_stops_at_step_1'],
    'several hosts: kills, signals, mistakes': ['tests/run/multihost_test.py']}


class Row:
  """A line of the table; as a plugin of pytest it counts the tests that run."""

  def __init__(self):
    self.cases: list[list[str]] = []  # The failures of each.

  def pytest_runtest_logreport(self, report):
    if not report.passed:
      self.cases.append([f'{report.nodeid}: {report.outcome}'])
    elif report.when == 'call':
      self.cases.append([])


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
  print(pages.table(('fault', 'cases', 'passed'), [
      (name, len(row.cases), sum(not failures for failures in row.cases))
      for name, row in rows.items()]))
  failures = [f'{name}: {failure}' for name, row in rows.items()
              for failures in row.cases for failure in failures]
  print('\n'.join(failures))
  return 1 if failures else 0


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
    deadline = time.monotonic() + _TIMEOUT
    while not wait() and process.poll() is None:
      if time.monotonic() > deadline:
        process.kill()
        raise SystemExit(f'nothing in {_TIMEOUT} s: {process.communicate()}')
      time.sleep(0.002)  # So that the run has a core.
    time.sleep(pause)
    before = _intact(workdir)
    process.kill()
    out, err = process.communicate()
    failures = _resumed(out, newest, i)
    if process.returncode != -signal.SIGKILL:
      failures.append(
          f'kill {i}: ended by itself, {process.returncode}: {err[-300:]}')
    after = _intact(workdir)
    # Rotation removes all but the newest three and the best.
    if before and (not after or after[-1] < before[-1]):
      failures.append(f'kill {i}: checkpoints {before} before, {after} after')
    newest = after[-1] if after else 0
    rows[f'kill -9, {phase}'].cases.append(failures)
    print(f'kill {i + 1}: {phase}, newest checkpoint {newest}', *failures,
          sep=' | ', flush=True)
  out = _finish(_train(command, workdir), 'the last start')
  rows['the run after all these kills'].cases.append(
      _resumed(out, newest, 'last') + _differences(workdir, straight, steps))
  rows['kill -9, export'] = _kill_exports(folder, straight, n_exports, rng)
  return dict(rows)


def _train(command, workdir):
  return conftest.start('train', *command, f'--workdir={workdir}', devices=1)


def _moment(phase, workdir, newest, start, rng):
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
  return lambda: has_newer() and any(
      row['step'] >= target and 'loss' in row and row['time'] > start
      for row in _metrics(workdir)), rng.uniform(0, pause)


def _metrics(workdir):
  return metrics.read_jsonl(os.path.join(workdir, 'metrics.jsonl'))


def _intact(workdir):
  """Returns the steps of the checkpoints that have their final name."""
  return sorted(int(path.name) for path in workdir.glob('checkpoints/*')
                if path.name.isdecimal())


def _resumed(out, newest, i):
  """Returns a failure if a run did not resume at the newest checkpoint."""
  found = re.search(r'resuming after (\d+) updates', out)
  after = int(found[1]) if found else 0
  if after != newest and (found or 'step ' in out):
    return [f'kill {i}: resumed after {after} updates, not {newest}']
  return []


def _differences(workdir, straight, steps):
  failures = [f'the {name} differ' for name, read in (
      ('losses', conftest.losses), ('evaluations', _evaluations),
      ('checkpoints', _intact)) if read(workdir) != read(straight)]
  ours, theirs = (conftest.saved_state(w, steps) for w in (workdir, straight))
  return failures + [f'{path} differs' for path in theirs
                     if not np.array_equal(ours.get(path), theirs[path])]


def _evaluations(workdir):
  return {row['step']: {k: v for k, v in row.items() if k.startswith('eval/')}
          for row in _metrics(workdir) if 'eval/loss' in row}


def _finish(process, name):
  out, err = process.communicate(timeout=_TIMEOUT * 2)
  if process.returncode:
    raise SystemExit(f'{name} ended with {process.returncode}:\n{err[-3000:]}')
  return out


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
      process.kill()
      process.communicate()
    # A file with its final name must be complete.
    after = _hashes(out)
    failures = [f'export {i}: {name} is there but differs' for name in after
                if after[name] != reference.get(name, after[name])]
    _finish(_export(workdir, out, '--overwrite'), f'export {i}, again')
    if _hashes(out) != reference:
      failures.append(f'export {i}: the repeated export differs')
    row.cases.append(failures)
    print(f'killed export {i + 1}: left {sorted(after) or "nothing"}',
          *failures, sep=' | ', flush=True)
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


def plant() -> dict[str, Row]:
  """Returns a row for each fault that tests plant."""
  os.chdir(_TESTS.parent)  # The tests name data and configs from there.
  rows = {name: Row() for name in PLANTED}
  for name, row in rows.items():
    pytest.main(['-q', '-n', '0', '-m', '', '-W', 'ignore',
                 *(str(_TESTS.parent / node) for node in PLANTED[name])],
                plugins=[row])
    if not row.cases:
      row.cases.append(['no such test'])
  return rows


if __name__ == '__main__':
  sys.exit(main())
