"""Runs as processes: started, watched, stopped, one or several at a time."""

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

# Seconds between looks at the processes.
_POLL = 0.2


class Stop:
  """SIGINT or SIGTERM: end the runs cleanly. A second one kills them."""

  def __init__(self):
    """Takes no signals yet: it is a context manager."""
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


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run ended.

  Attributes:
    state: finished, stopped or failed.
    seconds: Since it was started here.
    message: Why it is not finished.
  """

  state: str
  seconds: float
  message: str = ''


class Process:
  """One run: training, then evaluation, each a process of its own."""

  def __init__(self, run: runs.Run, environment: Mapping[str, str]):
    """Starts it, or waits where another process has its workdir.

    Args:
      run: Not finished.
      environment: Of its processes.
    """
    self.run = run
    self._environment = dict(environment)
    self._process: subprocess.Popen | None = None
    self._stages = ['train', *(['evaluate'] if run.split else [])]
    self._stopping = ''
    self._start = time.monotonic()
    os.makedirs(run.workdir, exist_ok=True)
    self.log = os.path.join(run.workdir, 'log.txt')

  def poll(self) -> Outcome | None:
    """Goes on with it; returns how it ended, or None."""
    if self._process is None:
      if self._stopping:
        return self._outcome('stopped', self._stopping)
      # A sweep that was killed outright leaves its child at work: wait for it.
      if not self._is_free():
        return None
      if not self._stages:
        return self._outcome('finished', '')
      self._begin()
      return None
    status = self._process.poll()
    if status is None:
      return None
    self._process = None
    stage = self._stages.pop(0)
    # One that stops by itself (a deadline, a signal) can go on.
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
      self._begin()
      return None
    return self._outcome('finished', '')

  def stop(self, why: str) -> None:
    """Lets the run save and end; `poll` then says so."""
    if not self._stopping:
      self._stopping = why
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

  def _begin(self):
    module, more = self._stages[0], []
    if module == 'evaluate':
      more = [f'--split={self.run.split}']
    command = [sys.executable, '-u', '-m', f'gemma_sft.{module}',
               *self.run.arguments, f'--workdir={self.run.workdir}', *more]
    with open(self.log, 'ab') as log:
      log.write(f'\n$ {" ".join(command[3:])}\n'.encode())
      log.flush()
      # A session of its own: Ctrl-C is for the sweep, which passes on one
      # SIGTERM; a second signal would end training without a checkpoint.
      self._process = subprocess.Popen(
          command, stdout=log, stderr=subprocess.STDOUT,
          stdin=subprocess.DEVNULL,
          # Runs of their own, whatever else starts here with this sweep.
          env=self._environment | {'JAX_NUM_PROCESSES': '1'},
          start_new_session=True)


def last_error(path: str, status: int) -> str:
  """Returns what a log says last of why its process failed.

  Args:
    path: The log.
    status: Of the process.
  """
  with open(path, encoding='utf-8', errors='replace') as file:
    lines = [line.strip() for line in file.read().splitlines() if line.strip()]
  begun = max((i for i, line in enumerate(lines) if line.startswith('$ ')),
              default=0)
  lines = lines[begun + 1:]
  told = [line for line in lines if line.startswith('error: ')]
  if status < 0:
    ended = f'ended by {signal.Signals(-status).name}'
    return ended + (', perhaps for want of memory' if status == -9 else '')
  return (told or lines or [f'exit status {status}'])[-1].removeprefix(
      'error: ')


# Devices ---------------------------------------------------------------------


def make_slots(
    parallel: int, environment: Mapping[str, str], dev: str = '/dev'
) -> list[dict[str, str]]:
  """Returns the environment of each run that goes on at the same time.

  One after another, a run has all devices. Several have a GPU or a TPU chip
  each (the variables are those that JAX's own multi-process tests set), and
  share the cores of a CPU.

  Args:
    parallel: Their number.
    environment: Of this process.
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
    plan: Sequence[runs.Run],
    slots: Sequence[Mapping[str, str]],
    stop: Stop,
    *,
    on_start: Callable[[runs.Run], None],
    on_end: Callable[[runs.Run, Outcome], None],
) -> dict[str, Outcome]:
  """Runs what is not finished; returns {workdir: outcome} of what was started.

  A run that fails does not end the others.

  Args:
    plan: In order.
    slots: See `make_slots`.
    stop: Entered; asks the runs under way to save and end.
    on_start: Called with each run.
    on_end: Called with each run and how it ended.
  """
  waiting = [r for r in plan if r.state() != runs.FINISHED]
  free, going, outcomes = list(range(len(slots))), {}, {}
  while going or waiting and not stop.signal:
    while free and waiting and not stop.signal:
      slot, run = free.pop(0), waiting.pop(0)
      on_start(run)
      going[slot] = Process(run, slots[slot])
    for slot, process in list(going.items()):
      if stop.signal:
        process.stop(f'stopped by {stop.signal.name}')
      if stop.killed:
        process.kill()
      outcome = process.poll()
      if outcome is not None:
        outcomes[process.run.workdir] = outcome
        on_end(process.run, outcome)
        del going[slot]
        free.append(slot)
    time.sleep(_POLL)
  return outcomes
