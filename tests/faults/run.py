"""Faults, counted: kills at random moments, and the faults that tests plant.

    python tests/faults/run.py [--kills=30] [--seed=0] [--only=kills]

A fifth of the kills (-9) end an export, the others a tiny run: while it
starts, steps, saves or evaluates. After each the run is started again, and
killed again, to its end: its losses, evaluations and last checkpoint must then
be those of a run that nobody disturbed, to the bit, and after no kill may a
checkpoint be gone that was whole before it. An export made again over the
remains of a killed one must have the same bytes. The other rows run tests of
tests/ that plant a fault. Status 1 if anything was not as it must be.
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
# Updates of the run for each kill: no kill may find it finished.
_STEPS_A_KILL = 12
_LONGEST = 600  # Seconds that a process may take for what is waited for.

# What is planted by tests: a row of the table and its tests.
_PLANTED = {
    'SIGTERM, several': ['train_test.py::test_sigterm_saves_exits_cleanly_and'
                         '_resumes'],
    'deadline': ['train_test.py::test_deadline_saves_and_resumes'],
    'full disk': ['checkpoint_test.py::test_full_disk_while_saving_loses'
                  '_nothing',
                  'checkpoint_test.py::test_full_disk_while_logging_is_told'],
    'workdir that cannot be written': [
        'train_test.py::test_workdir_that_cannot_be_written_is_refused',
        'train_test.py::test_workdir_that_is_a_file_is_refused'],
    'two runs in one workdir': [
        'train_test.py::test_workdir_in_use_is_refused_with_the_process'],
    'damaged and truncated checkpoints': [
        'checkpoint_test.py::test_damaged_newest_is_passed_over_for_the_one'
        '_before',
        'checkpoint_test.py::test_all_damaged_is_told_each_time_and_nothing_is'
        '_lost',
        'checkpoint_test.py::test_serving_a_damaged_checkpoint_is_told',
        'checkpoint_test.py::test_serving_passes_over_what_says_nothing'],
    'base weights missing or others at resume': [
        'train_test.py::test_resume_without_its_base_is_refused',
        'train_test.py::test_resume_on_another_base_is_refused'],
    'data changed at resume': [
        'train_test.py::test_resume_with_other_data_is_refused'],
    'config changed at resume': [
        'train_test.py::test_resume_with_another_config_is_refused'],
    'a loss that is not finite': [
        'train_test.py::test_a_step_that_is_not_finite_is_named',
        'train_test.py::test_the_checkpoint_before_a_step_that_is_not_finite'
        '_is_whole'],
    'several hosts: kills, signals, mistakes': ['multihost_test.py'],
}


@dataclasses.dataclass
class Row:
  """A line of the table.

  Attributes:
    times: How often the fault came.
    held: How often all was as it must be.
    wrong: What was not.
  """

  times: int = 0
  held: int = 0
  wrong: list[str] = dataclasses.field(default_factory=list)

  def count(self, wrong: list[str]) -> None:
    """Adds one time, with what was wrong."""
    self.times += 1
    self.held += not wrong
    self.wrong += wrong


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
  print('| fault | times | as it must be |\n|---|---|---|')
  for name, row in rows.items():
    print(f'| {name} | {row.times} | {row.held} |')
  wrong = [f'{name}: {what}' for name, row in rows.items()
           for what in row.wrong]
  print('\n'.join(wrong))
  return 1 if wrong else 0


# Kills -----------------------------------------------------------------------


def kill(folder: pathlib.Path, n: int, rng: random.Random) -> dict[str, Row]:
  """Returns a row for each kind of moment."""
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
    whole = _whole(workdir)
    process.send_signal(signal.SIGKILL)
    out, err = process.communicate()
    wrong = [] if process.returncode == -signal.SIGKILL else [
        f'kill {i}: ended by itself, {process.returncode}: {err[-300:]}']
    wrong += _resumed(out, newest, i)
    left = _whole(workdir)
    # What is older than the newest three and not the best goes by rotation.
    if whole and (not left or left[-1] < whole[-1]):
      wrong.append(f'kill {i}: checkpoints {whole} before it, {left} after')
    newest = left[-1] if left else 0
    rows[f'kill -9, {phase}'].count(wrong)
    print(f'kill {i + 1}: {phase}, newest checkpoint {newest}'
          + ''.join(f' | {w}' for w in wrong), flush=True)
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
  """Returns what to wait for, and how many seconds more."""
  if phase == 'starting':
    return lambda: True, rng.uniform(0.2, 8.0)

  def further():
    return (_whole(workdir) or [0])[-1] > newest

  if phase == 'save':
    folder, must = workdir / 'checkpoints', rng.choice((True, False))
    # Orbax writes under another name, which it changes at the end.
    return lambda: (further() or not must) and folder.is_dir() and any(
        not p.name.isdecimal() and p.is_dir() and p.stat().st_mtime > start
        for p in folder.iterdir()), rng.uniform(0, 0.01)
  # These come later than the next checkpoint: so the run moves on.
  target, pause = newest + rng.randint(1, 2 * _SAVE_EVERY), 0.02
  if phase == 'evaluation':
    target = (newest // _EVALUATE_EVERY + 1) * _EVALUATE_EVERY
    pause = 0.6
  return lambda: further() and _logged(
      workdir, start) >= target, rng.uniform(0, pause)


def _until(wait, process):
  deadline = time.monotonic() + _LONGEST
  while not wait() and process.poll() is None:
    if time.monotonic() > deadline:
      process.kill()
      raise SystemExit(f'nothing in {_LONGEST} s: {process.communicate()}')
    time.sleep(0.002)  # Leaves the run a core.


def _logged(workdir, start):
  """Returns the last step since a time: what a killed run wrote is older."""
  rows = metrics.read_jsonl(os.path.join(workdir, 'metrics.jsonl'))
  return max((row['step'] for row in rows
              if 'loss' in row and row['time'] > start), default=0)


def _whole(workdir):
  """Returns the steps of the checkpoints that have their final name."""
  folder = workdir / 'checkpoints'
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal()) \
      if folder.is_dir() else []


def _resumed(out, newest, i):
  """Returns what is wrong with where a start went on."""
  found = re.search(r'resuming after (\d+) updates', out)
  if found and int(found[1]) != newest:
    return [f'kill {i}: went on after {found[1]}, not {newest}']
  if not found and newest and 'step ' in out:
    return [f'kill {i}: began again in spite of checkpoint {newest}']
  return []


def _differences(workdir, straight, steps):
  wrong = []
  if conftest.losses(workdir) != conftest.losses(straight):
    wrong.append('the losses differ')
  if _evaluations(workdir) != _evaluations(straight):
    wrong.append('the evaluations differ')
  ours, theirs = (conftest.saved_state(w, steps) for w in (workdir, straight))
  wrong += [f'{path} differs' for path in theirs
            if not np.array_equal(ours.get(path), theirs[path])]
  steps_of = [checkpoint.Checkpoints(str(w), read_only=True).steps()
              for w in (workdir, straight)]
  return wrong + (
      [f'checkpoints {steps_of}'] if steps_of[0] != steps_of[1] else [])


def _evaluations(workdir):
  rows = metrics.read_jsonl(os.path.join(workdir, 'metrics.jsonl'))
  return {row['step']: {k: v for k, v in row.items() if k.startswith('eval/')}
          for row in rows if 'eval/loss' in row}


def _finish(process, name):
  out, err = process.communicate(timeout=_LONGEST * 2)
  if process.returncode:
    raise SystemExit(f'{name} ended with {process.returncode}:\n{err[-3000:]}')
  return out


# Exports ---------------------------------------------------------------------


def _kill_exports(folder, workdir, n, rng):
  row = Row()
  out = folder / 'export'  # One for all: a GGUF file holds its name.
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
    # A name that is final is of a file that is whole.
    wrong = [f'export {i}: {name} is there, and other than it must be'
             for name, digest in _hashes(out).items()
             if name in reference and digest != reference[name]]
    left = sorted(_hashes(out))
    _finish(_export(workdir, out, '--overwrite'), f'export {i}, again')
    if _hashes(out) != reference:
      wrong.append(f'export {i}: made again it is another')
    row.count(wrong)
    print(f'killed export {i + 1}: left {left or "nothing"}'
          + ''.join(f' | {w}' for w in wrong), flush=True)
  return row


def _export(workdir, out, *more):
  return conftest.start(
      'export', f'--workdir={workdir}', f'--out={out}',
      '--formats=lora,gguf-f16', *more, devices=1)


def _hashes(out):
  """Returns {name: SHA-256} of weights; what tells the time is left out."""
  return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest()
          for p in sorted(out.rglob('*'))
          if p.suffix in ('.safetensors', '.gguf')} if out.is_dir() else {}


# Planted faults --------------------------------------------------------------


def plant() -> dict[str, Row]:
  """Returns a row for each fault that tests plant."""
  nodes = [str(_TESTS / node) for group in _PLANTED.values() for node in group]
  with tempfile.TemporaryDirectory() as folder:
    results = os.path.join(folder, 'results.xml')
    subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-n', '0', '-m', '', '-W',
         'ignore', f'--junitxml={results}', *nodes],
        cwd=_TESTS.parent, check=False)
    cases = list(ElementTree.parse(results).iter('testcase'))
  rows = {}
  for name, group in _PLANTED.items():
    rows[name] = row = Row()
    for node in group:
      file, _, test = node.partition('::')
      mine = [c for c in cases if c.get('classname', '').endswith(
          pathlib.Path(file).stem) and (
              not test or c.get('name', '').partition('[')[0] == test)]
      if not mine:
        row.count([f'{node}: no such test'])
      for case in mine:
        row.count([f'{node}: {child.tag}' for child in case
                   if child.tag in ('failure', 'error', 'skipped')])
  return rows


if __name__ == '__main__':
  sys.exit(main())
