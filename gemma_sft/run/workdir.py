"""The lock that keeps a workdir to one run at a time."""

import contextlib
import os
import time
from typing import Any
import uuid

from gemma_sft import errors
from gemma_sft.run import hosts


def lock_workdir(workdir: str) -> Any:
  """Locks the workdir until this process ends; returns the open lock file.

  In a run of several processes, the first one takes the lock. Raises
  `UserError` if another process has the lock, the workdir cannot be written, or
  the hosts of a run do not share it.
  """
  import fcntl  # POSIX only.

  if hosts.index():
    return _shared_lock(workdir)
  try:
    os.makedirs(workdir, exist_ok=True)
    file = open(os.path.join(workdir, '.lock'), 'a+', encoding='utf-8')
  except OSError as error:
    raise errors.UserError(
        f'workdir {workdir}: {error.strerror}', 'a folder that can be written',
        'choose another --workdir') from None
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    file.seek(0)
    raise errors.UserError(
        f'workdir {workdir} is in use by process {file.readline().strip()}',
        'one run per workdir', 'wait for it, stop it, or choose another'
        ' --workdir') from None
  file.truncate(0)
  token = uuid.uuid4().hex
  file.write(f'{os.getpid()}\n{token}')
  file.flush()
  os.fsync(file.fileno())
  hosts.from_first(token)
  return file


def _shared_lock(workdir):
  """Opens the lock file of process 0."""
  token = hosts.from_first(None)
  path = os.path.join(workdir, '.lock')
  for _ in range(20):  # A network file system may show it late.
    with contextlib.suppress(OSError):
      file = open(path, encoding='utf-8')
      if token in file.read():
        return file
      file.close()
    time.sleep(0.5)
  raise errors.UserError(
      f'workdir {workdir} on process {hosts.index()} is not that of process 0',
      'a folder that all hosts of the run share, as all write checkpoints',
      'put --workdir on a disk that all of them mount, such as NFS')
