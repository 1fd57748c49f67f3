"""Starts runs as processes, one or several at a time, and stops them."""

import dataclasses
import glob
import os
import signal
import subprocess
import sys
import time
from typing import Callable
from typing import Mapping
from typing import Sequence

from gemma_sft import errors
from gemma_sft.monitor import record as record_lib
from gemma_sft.monitor import stop as stop_lib
from gemma_sft.run import workdir
from gemma_sft.sweeping import runs

_POLL_SECONDS = 0.5
Environment = Mapping[str, str]


class Stop(stop_lib.StopRequest):
  """Notes SIGINT and SIGTERM: the first stops the runs, a second kills them.

  Ask `signal`: only the installation of handlers is inherited.
  """

  def __init__(self):
    super().__init__(deadline_minutes=0)
    self.signal: signal.Signals | None = None
    self.killed = False

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

  def exit_status(self, failed: bool) -> int:
    """Returns the command's exit status, and prints that a signal came."""
    if not self.signal:
      return int(failed)
    print(f'stopped by {self.signal.name}; the same command continues from'
          ' here')
    return 128 + self.signal


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run ended, after how many seconds, and why it is not finished."""

  state: str  # finished, stopped or failed.
  seconds: float
  message: str


class Process:
  """One run: training, then evaluation, each in its own process."""

  def __init__(self, run: runs.PlannedRun, environment: Environment):
    """Prepares an unfinished run; `poll` starts its processes."""
    self.run = run
    self._environment = environment
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
      return self._start_next()
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
    return self._start_next()

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

  def _start_next(self):
    if not self._stages:
      return self._outcome('finished', '')
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
          env={**self._environment, 'JAX_NUM_PROCESSES': '1'},
          start_new_session=True)
    return None


def last_error(path: str, status: int) -> str:
  """Returns why a process failed: the last error in its log."""
  if status < 0:
    name = signal.Signals(-status).name
    return f'ended by {name}' + (
        ', perhaps out of memory' if status == -signal.SIGKILL else '')
  with open(path, encoding='utf-8', errors='replace') as file:
    lines = [line.strip() for line in file.read().splitlines() if line.strip()]
  start = max((i for i, line in enumerate(lines) if line.startswith('$ ')),
              default=0)
  lines = lines[start + 1:]
  reported = [line for line in lines if line.startswith('error: ')]
  return (reported or lines or [f'exit status {status}'])[-1].removeprefix(
      'error: ')


def make_slots(
    parallel: int, environment: Environment, dev: str = '/dev'
) -> list[Environment]:
  """Returns one environment for each of the runs at a time.

  A single run at a time has all devices. Several runs get a GPU or a TPU chip
  each, by the variables that JAX's multi-process tests set; on a CPU they share
  the cores.

  Raises:
    UserError: for more runs than devices.
  """
  if parallel < 1:
    raise errors.UserError(
        f'--parallel={parallel}', 'at least 1', 'leave it out for 1')
  gpus = [os.path.basename(p)[len('nvidia'):]
          for p in sorted(glob.glob(os.path.join(dev, 'nvidia[0-9]*')))]
  if 'CUDA_VISIBLE_DEVICES' in environment:
    gpus = [g for g in environment['CUDA_VISIBLE_DEVICES'].split(',') if g]
  chips = (glob.glob(os.path.join(dev, 'accel[0-9]*'))
           or glob.glob(os.path.join(dev, 'vfio', '[0-9]*')))
  devices = [{'CUDA_VISIBLE_DEVICES': gpu} for gpu in gpus] or [
      {'TPU_VISIBLE_CHIPS': str(i), 'TPU_PROCESS_BOUNDS': '1,1,1',
       'TPU_CHIPS_PER_PROCESS_BOUNDS': '1,1,1',
       'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'} for i in range(len(chips))]
  if (parallel == 1 or environment.get('JAX_PLATFORMS') == 'cpu'
      or not devices):
    return [environment] * parallel
  if parallel > len(devices):
    raise errors.UserError(
        f'--parallel={parallel}',
        f'at most {len(devices)}, the {"GPUs" if gpus else "TPU chips"} here',
        f'--parallel={len(devices)}')
  return [{**environment, **device} for device in devices[:parallel]]


def run_all(
    slots: Sequence[Environment],
    stop: Stop,
    *,
    start: Callable[[Environment], Process | None],
    on_end: Callable[[Process, Outcome], None],
    watch: Callable[[Process], None] = lambda process: None,
) -> None:
  """Runs a process in each slot until there is no more to run.

  Args:
    stop: Entered; a signal makes running processes save and end.
    start: Returns the next run in an environment; None if there is no more.
    watch: Called again and again with each running process.
  """
  free, running = list(slots), {}
  while True:
    while free and not stop.signal and (process := start(free[0])):
      running[process] = free.pop(0)
    if not running:
      return
    for process in list(running):
      stop.pass_on(process)
      watch(process)
      outcome = process.poll()
      if outcome is not None:
        on_end(process, outcome)
        free.append(running.pop(process))
    time.sleep(_POLL_SECONDS)
