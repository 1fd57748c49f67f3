"""Starts runs as processes, one or several at a time, and stops them."""

import dataclasses
import glob
import os
import signal
import subprocess
import sys
import time
from typing import Any
from typing import Callable
from typing import Mapping
from typing import Sequence

from gemma_sft import errors
from gemma_sft.monitor import record as record_lib
from gemma_sft.monitor import stop as stop_lib
from gemma_sft.run import workdir
from gemma_sft.sweeping import runs

_POLL_SECONDS = 0.2


class Stop:
  """Notes SIGINT and SIGTERM: the first stops the runs, a second kills them.

  A context manager: signals are handled between enter and exit.
  """

  def __init__(self):
    self.signal: signal.Signals | None = None
    self.killed = False
    self._before: dict[int, Any] = {}

  def __enter__(self) -> 'Stop':
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._on_signal)
    return self

  def __exit__(self, *exception: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _on_signal(self, number, frame):
    del frame
    self.killed = self.signal is not None
    self.signal = signal.Signals(number)

  def pass_on(self, process: 'Process') -> None:
    """Stops or kills a process if a signal came."""
    if self.signal:
      process.stop(f'stopped by {self.signal.name}')
    if self.killed:
      process.kill()


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run ended.

  Attributes:
    state: finished, stopped or failed.
    seconds: Since this process started it.
    message: Why it is not finished.
  """

  state: str
  seconds: float
  message: str = ''


class Process:
  """One run: training, then evaluation, each in its own process."""

  def __init__(self, run: runs.PlannedRun, environment: Mapping[str, str]):
    """Prepares an unfinished run; `poll` starts its processes."""
    self.run = run
    self._environment = dict(environment)
    self._process: subprocess.Popen | None = None
    self._stages = ['train', *(['evaluate'] if run.split else [])]
    self._stopping = ''
    self._start = time.monotonic()
    os.makedirs(run.workdir, exist_ok=True)
    self.log = os.path.join(run.workdir, 'log.txt')

  def poll(self) -> Outcome | None:
    """Starts what comes next; returns how the run ended, or None."""
    if self._process is None:
      if self._stopping:
        return self._outcome('stopped', self._stopping)
      # A sweep that was killed leaves its child running: wait for it.
      if not self._is_free():
        return None
      if not self._stages:
        return self._outcome('finished', '')
      self._start_stage()
      return None
    status = self._process.poll()
    if status is None:
      return None
    self._process = None
    stage = self._stages.pop(0)
    # A training that stops by itself (deadline, signal) can be continued.
    if status not in (0, stop_lib.UNFINISHED) and not self._stopping:
      return self._outcome('failed', last_error(self.log, status))
    record = record_lib.read(self.run.workdir)
    if stage == 'train' and not self.run.is_trained(record):
      end = record and record['end'] or {}
      if end.get('finished'):
        return self._outcome(
            'failed', f'run.json is of {record["identity"]}, not of'
            f' {self.run.identity}: data or weights changed meanwhile')
      return self._outcome('stopped', self._stopping or (
          f'training ended by {end.get("reason", "itself")} after'
          f' {end.get("step", self.run.step())} updates'))
    if self._stopping and self._stages or status:
      return self._outcome('stopped', self._stopping)
    if self._stages:
      self._start_stage()
      return None
    return self._outcome('finished', '')

  def stop(self, reason: str) -> None:
    """Makes the run save and end; `poll` returns the outcome."""
    if not self._stopping:
      self._stopping = reason
      if self._process is not None:
        self._process.terminate()

  def kill(self) -> None:
    """Ends the process at once."""
    if self._process is not None:
      self._process.kill()

  def _outcome(self, state, message):
    return Outcome(state, time.monotonic() - self._start, message)

  def _is_free(self):
    try:
      workdir.lock_workdir(self.run.workdir).close()
    except errors.UserError:
      return False
    if self.run.is_trained(record_lib.read(self.run.workdir)):
      self._stages = [s for s in self._stages if s != 'train']
    return True

  def _start_stage(self):
    module = self._stages[0]
    command = [sys.executable, '-u', '-m', f'gemma_sft.{module}',
               *self.run.arguments, f'--workdir={self.run.workdir}']
    if module == 'evaluate':
      command.append(f'--split={self.run.split}')
    with open(self.log, 'ab') as log:
      log.write(f'\n$ {" ".join(command[3:])}\n'.encode())
      log.flush()
      # In its own session, so that Ctrl-C reaches the sweep alone, which sends
      # one SIGTERM; a second signal would end training without a checkpoint.
      self._process = subprocess.Popen(
          command, stdout=log, stderr=subprocess.STDOUT,
          stdin=subprocess.DEVNULL,
          # A run is not one of several hosts, even if the sweep is.
          env=self._environment | {'JAX_NUM_PROCESSES': '1'},
          start_new_session=True)


def last_error(path: str, status: int) -> str:
  """Returns why a process failed: the last error in its log."""
  with open(path, encoding='utf-8', errors='replace') as file:
    lines = [line.strip() for line in file.read().splitlines() if line.strip()]
  start = max((i for i, line in enumerate(lines) if line.startswith('$ ')),
              default=0)
  lines = lines[start + 1:]
  if status < 0:
    name = signal.Signals(-status).name
    return f'ended by {name}' + (
        ', perhaps out of memory' if status == -signal.SIGKILL else '')
  reported = [line for line in lines if line.startswith('error: ')]
  return (reported or lines or [f'exit status {status}'])[-1].removeprefix(
      'error: ')


# Devices ---------------------------------------------------------------------


def make_slots(
    parallel: int, environment: Mapping[str, str], dev: str = '/dev'
) -> list[dict[str, str]]:
  """Returns one environment for each of the runs at a time.

  A single run at a time has all devices. Several runs get a GPU or a TPU chip
  each, by the variables that JAX's multi-process tests set; on a CPU they share
  the cores.

  Args:
    dev: Folder of the devices.

  Raises:
    UserError: for more runs than devices.
  """
  if parallel < 1:
    raise errors.UserError(
        f'--parallel={parallel}', 'at least 1', 'leave it out for 1')
  if parallel == 1:
    return [dict(environment)]
  gpus = [os.path.basename(p)[len('nvidia'):]
          for p in sorted(glob.glob(os.path.join(dev, 'nvidia[0-9]*')))]
  if 'CUDA_VISIBLE_DEVICES' in environment:
    gpus = [g for g in environment['CUDA_VISIBLE_DEVICES'].split(',') if g]
  chips = [str(i) for i in range(len(
      glob.glob(os.path.join(dev, 'accel[0-9]*'))
      or glob.glob(os.path.join(dev, 'vfio', '[0-9]*'))))]
  if environment.get('JAX_PLATFORMS') == 'cpu' or not (gpus or chips):
    return [dict(environment) for _ in range(parallel)]
  found = gpus or chips
  if parallel > len(found):
    raise errors.UserError(
        f'--parallel={parallel}',
        f'at most {len(found)}, the {"GPUs" if gpus else "TPU chips"} here',
        f'--parallel={len(found)}')
  if gpus:
    return [{**environment, 'CUDA_VISIBLE_DEVICES': g} for g in gpus[:parallel]]
  return [{**environment, 'TPU_VISIBLE_CHIPS': chip, 'TPU_PROCESS_BOUNDS':
           '1,1,1', 'TPU_CHIPS_PER_PROCESS_BOUNDS': '1,1,1',
           'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'} for chip in chips[:parallel]]


def run_all(
    planned: Sequence[runs.PlannedRun],
    slots: Sequence[Mapping[str, str]],
    stop: Stop,
    *,
    on_start: Callable[[runs.PlannedRun], None],
    on_end: Callable[[runs.PlannedRun, Outcome], None],
) -> dict[str, Outcome]:
  """Runs what is not finished; returns {workdir: outcome} of what was started.

  A run that fails does not end the others.

  Args:
    stop: Entered; a signal makes running processes save and end.
    on_start: Called with each run before it starts.
    on_end: Called with each run and its outcome.
  """
  waiting = [r for r in planned if r.state() != runs.FINISHED]
  free, running, outcomes = list(range(len(slots))), {}, {}
  while running or waiting and not stop.signal:
    while free and waiting and not stop.signal:
      slot, run = free.pop(0), waiting.pop(0)
      on_start(run)
      running[slot] = Process(run, slots[slot])
    for slot, process in list(running.items()):
      stop.pass_on(process)
      outcome = process.poll()
      if outcome is not None:
        outcomes[process.run.workdir] = outcome
        on_end(process.run, outcome)
        del running[slot]
        free.append(slot)
    time.sleep(_POLL_SECONDS)
  return outcomes
