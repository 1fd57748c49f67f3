"""Judges a case of a target: fine, crash, hang or loss."""

import collections
import contextlib
import hashlib
import json
import os
import pathlib
import resource
import signal
import traceback
from typing import Any

from gemma_sft import errors

# CPU time; a case takes milliseconds.
SECONDS = 3.0
# Beyond the size of the process after all imports.
_MORE_BYTES = 1 << 30


class Loss(Exception):
  """A part of the input was silently lost or changed."""


@contextlib.contextmanager
def may_refuse(place: str = ''):
  """Accepts a `UserError` that names the place."""
  try:
    yield
  except errors.UserError as error:
    if place not in error.got:
      raise AssertionError(f'no place in {error.got!r}') from error


def parse(case: bytes) -> Any:
  """Returns a JSON document, None for other bytes."""
  with contextlib.suppress(ValueError):
    return json.loads(case)


def dump(document: Any) -> bytes:
  """Returns the case that has a document."""
  return json.dumps(document).encode()


class _Hang(BaseException):
  """The case takes too long."""


@contextlib.contextmanager
def _limit(seconds):
  def stop(*_):
    raise _Hang

  before = signal.signal(signal.SIGPROF, stop)
  signal.setitimer(signal.ITIMER_PROF, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def bound_memory() -> None:
  """Limits the memory that this process can take from now on."""
  with open('/proc/self/statm', encoding='ascii') as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (size + _MORE_BYTES,) * 2)


def judge(target, case: bytes, folder: str) -> tuple[str, str, str]:
  """Returns ('', '', '') or (kind, a short description, traceback)."""
  try:
    with _limit(SECONDS):
      target.check(case, folder)
  except Loss as error:
    return 'loss', f'loss: {str(error):.60}', traceback.format_exc()
  except _Hang as error:
    return 'hang', f'hang in {_place(error)}', traceback.format_exc()
  except (Exception, SystemExit) as error:
    return ('crash', f'{type(error).__name__} in {_place(error)}',
            traceback.format_exc())
  return '', '', ''


def _place(error):
  """Returns the innermost line of the project in a traceback."""
  frames = traceback.extract_tb(error.__traceback__)
  ours = [f for f in frames if f'{os.sep}gemma_sft{os.sep}' in f.filename]
  frame = (ours or frames)[-1]
  return f'{os.path.basename(frame.filename)}:{frame.lineno}'


class Session:
  """Judges cases and counts the failures.

  `counts` has the number of cases as `n`, and those of each kind of failure.
  `places` has [number, file, bytes] of each kind and place of a failure; the
  file has the shortest case.
  """

  def __init__(self, target, folder: str, failures: str):
    """Takes the target, a scratch folder and where to write failing cases."""
    self._target, self._folder = target, folder
    self._failures = pathlib.Path(failures)
    self.counts = collections.Counter()
    self.places: dict[str, list] = {}

  def run(self, case: bytes) -> None:
    """Judges one case."""
    # If the whole process dies, this was the case.
    (self._failures / 'last').write_bytes(case)
    self.counts['n'] += 1
    kind, what, story = judge(self._target, case, self._folder)
    if not kind:
      return
    self.counts[kind] += 1
    entry = self.places.setdefault(what, [0, '', 1 << 62])
    entry[0] += 1
    if len(case) < entry[2]:
      name = f'{kind}-{hashlib.sha256(what.encode()).hexdigest()[:8]}'
      entry[1:] = [name, len(case)]
      (self._failures / name).write_bytes(case)
      (self._failures / f'{name}.txt').write_text(
          story, errors='backslashreplace')
