"""Several processes as one run: how they join, exchange values and end.

The same command is started once per process. Which processes belong together is
read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, from
SLURM, or from a Cloud TPU slice. One process alone does nothing of this.

The processes exchange values through the key-value store of JAX's coordinator,
which is part of process 0. Each one writes every second that it is alive, and
at its end how it ended. No step can run without all of them: if one is silent
for `SILENCE` seconds or ends with an error, the others end too. If process 0
dies, JAX aborts the rest at once; then a child process of each of them
(`_LAST_WORDS`) prints what happened.
"""

import contextlib
import glob
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback
from typing import Any
from typing import Iterator
from typing import Mapping
import urllib.request

import jax

from gemma_sft import errors

# Seconds without a sign of life. A slow process still gives one, from a thread.
SILENCE = 30.0
# Seconds in which another process may reach the same error by itself.
GRACE = 10.0
_VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
_AGAIN = ('  expected: all processes alive to the end\n'
          '  fix: start the same command on all of them again; it resumes'
          ' from the last checkpoint\n')

_joined: '_Processes | None' = None


def index() -> int:
  """Returns this process's number, without touching a device."""
  return _joined.index if _joined else 0


def count() -> int:
  """Returns the number of processes, without touching a device."""
  return _joined.count if _joined else 1


@contextlib.contextmanager
def joined() -> Iterator[None]:
  """Joins the other processes, if there are any, and leaves them at the end.

  An exception inside ends all of them, and its message is printed once. Raises
  `UserError` if the variables are half set or the others do not come.
  """
  global _joined
  arguments = find(os.environ)
  if arguments is None or _joined:
    yield
    return
  _joined = _join(arguments)
  try:
    yield
  except errors.UserError as error:
    _joined.fail(f'error: {error}\n', 2)
  except KeyboardInterrupt:
    _joined.fail('interrupted\n', 130)
  except SystemExit as error:
    _joined.fail(f'ended with {error.code}\n',
                 error.code if isinstance(error.code, int) else 1)
  except BaseException as error:
    # Most often another process has died. `_watch` prints a better message for
    # that, and ends this process meanwhile.
    time.sleep(SILENCE + GRACE)
    _joined.fail(lost(error) or traceback.format_exc(), 1, about=repr(error))
  _joined.leave()
  _joined = None


def from_first(value: Any) -> Any:
  """Returns process 0's value; see `gather`."""
  return gather(value)[0]


def gather(value: Any) -> list[Any]:
  """Returns the values of all processes; all call it, in the same order.

  They are sent as JSON, in which floats keep every bit. No device takes part,
  so a step in progress continues. There is no time limit: a collective on CPUs
  would give up after 30 seconds, and a judge or a conversion of weights may
  take longer.
  """
  return _joined.gather(value) if _joined else [value]


def barrier() -> None:
  """Waits until all processes call it."""
  if _joined:
    _joined.barrier()


def check_same(what: str, value: Any, expected: str, fix: str) -> None:
  """Raises `UserError` where a value is not that of process 0; all call it."""
  first = from_first(value)
  if first != value:
    raise errors.UserError(
        f'{what} is {value} on process {index()} ({socket.gethostname()}) and'
        f' {first} on process 0', expected, fix)


# Joining ----------------------------------------------------------------------


def find(environment: Mapping[str, str]) -> dict[str, Any] | None:
  """Returns arguments for `jax.distributed.initialize`; None for one process.

  {} leaves all of them to JAX, which knows SLURM and Cloud TPU.
  JAX_NUM_PROCESSES=1 keeps a process alone, whatever else is set. Raises
  `UserError` if the variables are incomplete or wrong.
  """
  given = {name: environment[name] for name in _VARIABLES
           if environment.get(name)}
  if given.get('JAX_NUM_PROCESSES') == '1':
    return None
  if given:
    return _from_variables(given)
  if 'SLURM_STEP_NODELIST' in environment and 'SLURM_PROCID' in environment:
    n = environment.get('SLURM_STEP_NUM_TASKS') or environment.get(
        'SLURM_NTASKS', '1')
    return {} if n != '1' else None
  return {} if _tpu_hosts(environment) > 1 else None


def _from_variables(given):
  missing = [name for name in _VARIABLES if name not in given]
  if missing:
    values = ('HOST:PORT, of process 0', 'the number of processes',
              '0, 1, ...: another for each')
    raise errors.UserError(
        f'{", ".join(given)} set, and not {", ".join(missing)}',
        'all three of them for a run of several processes, or none',
        f'export {missing[0]}={values[_VARIABLES.index(missing[0])]}')
  address, n, i = (given[name] for name in _VARIABLES)
  if not re.fullmatch(r'.+:\d+', address):
    raise errors.UserError(
        f'JAX_COORDINATOR_ADDRESS={address}', 'HOST:PORT of process 0',
        f'export JAX_COORDINATOR_ADDRESS={address}:8476')
  if not (n.isdecimal() and i.isdecimal() and int(i) < int(n)):
    raise errors.UserError(
        f'JAX_NUM_PROCESSES={n} and JAX_PROCESS_ID={i}',
        'the number of processes, and this one\'s: 0 to that number less 1',
        'correct them; JAX_NUM_PROCESSES=1 trains in one process')
  return dict(coordinator_address=address, num_processes=int(n),
              process_id=int(i))


def _tpu_hosts(environment):
  """Returns the number of hosts of the TPU slice; 1 without a TPU.

  The variables and the metadata are those that JAX's own clusters read
  (jax/_src/clusters/cloud_tpu_cluster.py).
  """
  chips = glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*')
  if (not chips or environment.get('JAX_PLATFORMS', 'tpu').find('tpu') < 0
      or 'TPU_PROCESS_BOUNDS' in environment):  # A run on some of the chips.
    return 1
  slices = int(environment.get('MEGASCALE_NUM_SLICES') or 1)
  for name in ('TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES'):
    if environment.get(name):
      return slices * len(environment[name].split(','))
  if 'TPU_SKIP_MDS_QUERY' in environment:
    return slices
  host = environment.get('GCE_METADATA_IP', 'metadata.google.internal')
  request = urllib.request.Request(
      f'http://{host}/computeMetadata/v1/instance/attributes/'
      'worker-network-endpoints', headers={'Metadata-Flavor': 'Google'})
  try:
    # The scheme is constant: http.
    with urllib.request.urlopen(request, timeout=3) as reply:  # nosec B310
      return slices * len(reply.read().decode().split(','))
  except OSError:
    return slices


def _join(arguments):
  from jax._src import distributed

  seconds = float(os.environ.get('GEMMA_SFT_JOIN_SECONDS') or 300)
  # The service would take over SIGTERM, which `monitor/stop.py` handles.
  jax.config.update('jax_enable_preemption_service', False)
  # On the few threads of a CPU, two programs that wait for other processes may
  # each hold what the other needs. Such deadlocks were seen.
  jax.config.update('jax_cpu_enable_async_dispatch', False)
  # JAX would abort without our message.
  alarm = threading.Timer(seconds, _too_late, (arguments, seconds))
  alarm.daemon = True
  alarm.start()
  try:
    jax.distributed.initialize(
        **arguments, initialization_timeout=int(seconds) + 60)
  except Exception as error:  # Whatever gRPC says.
    raise _not_met(arguments, seconds, str(error)) from None
  finally:
    alarm.cancel()
  state = distributed.global_state
  return _Processes(state.client, state.process_id, state.num_processes,
                    state.coordinator_address)


def _too_late(arguments, seconds):
  """Ends this process because the others did not join in time."""
  address = arguments.get('coordinator_address', '')
  why = 'one or more of the others did not join'
  if address and arguments['process_id']:
    host, _, port = address.rpartition(':')
    try:
      socket.create_connection((host.strip('[]'), int(port)), 5).close()
    except OSError:
      why = f'process 0 could not be reached at {address}'
  sys.stderr.write(f'error: {_not_met(arguments, seconds, why)}\n')
  sys.stderr.flush()
  os._exit(2)


def _not_met(arguments, seconds, why):
  n, i = arguments.get('num_processes'), arguments.get('process_id')
  who = '' if n is None else f': this is {i} of {n}'
  return errors.UserError(
      f'the processes of this run have not met{who};'
      f' {" ".join(why.split())[:300]} within {seconds:.0f} s',
      'the same command on all of them, each seeing the port of process 0',
      'look at the logs of the others; GEMMA_SFT_JOIN_SECONDS waits longer')


def lost(error: BaseException) -> str:
  """Returns the message for processes that did not meet, or ''."""
  text = str(error)
  if not isinstance(error, jax.errors.JaxRuntimeError) or (
      'Gloo context initialization failed' not in text):
    return ''
  # Gloo connects CPUs, with a time limit that cannot be set.
  return (f'error: the processes did not meet: {text.partition(chr(10))[0]};'
          ' on CPUs they have 30 s, too short where processes outnumber cores\n'
          f'{_AGAIN}')


# While they run ---------------------------------------------------------------

# Runs until its standard input ends. A line before the end means that the
# process ended in order.
_LAST_WORDS = r"""
import socket, sys
who, address, again = sys.argv[1:]
if not sys.stdin.read():
  host, _, port = address.rpartition(':')
  what = 'it was killed, or ran out of memory'
  if not who.startswith('process 0 '):
    try:
      socket.create_connection((host.strip('[]'), int(port)), 5).close()
    except OSError:
      what = ('process 0 (%s), through which all are joined, has died or its'
              ' machine is gone' % address)
  sys.stderr.write('error: %s has ended in the middle: %s\n%s' % (
      who, what, again))
"""


class _Processes:
  """This process and its connection to the others."""

  def __init__(self, client: Any, index: int, count: int, address: str):
    self.index, self.count = index, count
    self._client, self._calls = client, 0
    self._alive: dict[int, tuple[str, float]] = {}
    self._ended: dict[int, float] = {}  # When the end was first seen.
    self._over = threading.Event()
    self._name = f'process {index} of {count} on {socket.gethostname()}'
    self._child = subprocess.Popen(
        [sys.executable, '-c', _LAST_WORDS, self._name, address, _AGAIN],
        stdin=subprocess.PIPE, start_new_session=True, text=True)
    if index:  # Process 0 alone logs what all of them see.
      logging.getLogger('absl').setLevel(logging.ERROR)
    threading.Thread(target=self._watch, daemon=True).start()

  def barrier(self):
    # If a process dies meanwhile, the watching thread ends this one.
    self._calls += 1
    self._client.wait_at_barrier(f'gemma_sft/barrier/{self._calls}', 10**8)

  def gather(self, value):
    folder = f'gemma_sft/gather/{self._calls + 1}'
    mine = f'{folder}/{self.index}'
    self._client.key_value_set(mine, json.dumps(value))
    self.barrier()
    values = dict(self._client.key_value_dir_get(folder))
    self.barrier()
    self._client.key_value_delete(mine)
    return [json.loads(values[f'{folder}/{i}']) for i in range(self.count)]

  def fail(self, message, status, *, about=''):
    """Ends this process; prints the message unless process 0 prints it too."""
    self._over.set()
    about = about or message
    self._note('end', {'status': status, 'about': about})
    printed = False
    if self.index:
      deadline = time.monotonic() + GRACE
      while not printed and time.monotonic() < deadline:
        printed = self._notes('end').get(0, {}).get('about') == about
        time.sleep(0.2)
      message = f'{self._name}: {message}'
    self._exit('' if printed else message, status)

  def leave(self):
    """Waits until the others have ended."""
    self._over.set()
    self._note('end', {'status': 0, 'about': ''})
    with contextlib.suppress(Exception):  # The work is done and saved.
      jax.distributed.shutdown()
    self._child.communicate('ended\n')

  def _exit(self, message, status):
    """Ends at once; the usual way out would wait for dead processes."""
    sys.stdout.flush()
    if message:
      sys.stderr.write(message)
      sys.stderr.flush()
    self._child.communicate('ended\n')
    if self.index:
      self._note('gone', status)
    deadline = time.monotonic() + GRACE
    while self.index == 0 and time.monotonic() < deadline and (
        len(self._notes('gone')) < self.count - 1):
      time.sleep(0.2)  # The coordinator of the others ends with this process.
    os._exit(status)

  def _note(self, kind, value):
    with contextlib.suppress(Exception):  # The coordinator may be gone.
      self._client.key_value_set(
          f'gemma_sft/{kind}/{self.index}', json.dumps(value),
          allow_overwrite=True)

  def _notes(self, kind):
    """Returns {process: what it wrote}; {} if the coordinator is gone."""
    try:
      pairs = self._client.key_value_dir_get(f'gemma_sft/{kind}')
    except Exception:  # Then JAX ends this process.
      return {}
    return {int(key.rpartition('/')[2]): json.loads(value)
            for key, value in pairs}

  def _watch(self):
    beat = 0
    while not self._over.wait(1.0):
      beat += 1
      self._note('alive', [beat, socket.gethostname()])
      found = self._find_ended()
      if found and not self._over.is_set():
        self._over.set()
        message, status, printer = found
        self._note('end', {'status': status, 'about': message})
        self._exit(message if self.index == printer else '', status)

  def _find_ended(self):
    """Returns (message, exit status, who prints it) if a process has ended."""
    now = time.monotonic()
    alive, ended = self._notes('alive'), self._notes('end')
    for i, (beat, _) in alive.items():
      if self._alive.get(i, ('',))[0] != beat:
        self._alive[i] = (beat, now)
    silent = {i: alive[i][1] for i, (_, seen) in self._alive.items()
              if i != self.index and i not in ended and i in alive
              and now - seen > SILENCE}
    if silent:
      printer = min(i for i in range(self.count) if i not in silent)
      names = ', '.join(f'process {i} ({h})' for i, h in silent.items())
      return (f'error: {names} has been silent for {SILENCE:.0f} s: killed, out'
              f' of memory, or its machine is gone\n{_AGAIN}', 1, printer)
    for i, note in ended.items():
      self._ended.setdefault(i, now)
      # Process 0 prints its own error, and the coordinator ends with it.
      if note['status'] and now - self._ended[i] > (GRACE if i else 0):
        line = note['about'].partition('\n')[0]
        return (f'error: process {i} of {self.count} has ended with status'
                f' {note["status"]}: {line}\n', note['status'], 0)
    return None


def say(text: str) -> None:
  """Prints a line, on the first host only."""
  if jax.process_index() == 0:
    print(text, flush=True)
