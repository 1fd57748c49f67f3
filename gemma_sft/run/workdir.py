"""The lock that keeps a workdir to one run at a time."""

import contextlib
import os
import time
from typing import Any
import uuid

from gemma_sft import errors
from gemma_sft.run import hosts


def lock_workdir(workdir: str) -> Any:
  """Takes the workdir for this process until it ends; returns the open file.

  Of several processes that have joined, the first takes it.

  Raises:
    UserError: if another process has it, it cannot be written, or the hosts of
      a run do not share it.
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
        'one run a workdir', 'wait for it, stop it, or choose another'
        ' --workdir') from None
  file.truncate(0)
  token = uuid.uuid4().hex
  file.write(f'{os.getpid()}\n{token}')
  file.flush()
  os.fsync(file.fileno())
  hosts.from_first(token)
  return file


def _shared_lock(workdir):
  """Opens the file that process 0 has locked."""
  token = hosts.from_first(None)
  path = os.path.join(workdir, '.lock')
  for _ in range(20):  # A network's file system may be late.
    with contextlib.suppress(OSError):
      file = open(path, encoding='utf-8')
      if token in file.read():
        return file
      file.close()
    time.sleep(0.5)
  raise errors.UserError(
      f'workdir {workdir} on process {hosts.index()} is not the one that'
      ' process 0 has', 'a folder that all hosts of the run share, for the'
      ' checkpoints that all of them write',
      'put --workdir on a disk that all of them mount, such as NFS')
