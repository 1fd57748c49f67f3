"""Says how far a stage is and how long it will still take."""

from collections.abc import Callable
import sys
import time
from typing import TextIO

_SECONDS = 10.0  # Between two lines.


class Progress:
  """Prints a line every ten seconds: nothing for a stage that is quick.

  On a terminal the line is overwritten; in a log each has a line of its own.
  """

  def __init__(
      self, total: float, unit: str, *, file: TextIO | None = None,
      clock: Callable[[], float] = time.monotonic):
    """Starts the stage; `total` counts units, such as 'answers'."""
    self._total, self._unit = total, unit
    self._file, self._clock = file or sys.stdout, clock
    self._start = self._shown = clock()
    self._overwritten = self._file.isatty()

  def __call__(self, done: float) -> None:
    """Takes how much is done, which may be a fraction of a unit."""
    now = self._clock()
    ended = done >= self._total
    was_shown = self._shown > self._start
    if now - self._shown < _SECONDS and not (ended and was_shown):
      return
    self._shown = now
    elapsed = now - self._start
    left = (duration(elapsed) if ended else
            f'{duration(elapsed * (self._total / done - 1))} left'
            if done else f'{duration(elapsed)} so far')
    self._file.write(
        ('\r' if self._overwritten else '')
        + f'  {int(done)}/{int(self._total)} {self._unit} | {left}'
        + ('    ' if self._overwritten and not ended else '\n'))
    self._file.flush()


def duration(seconds: float) -> str:
  """Returns '2 h 05 m', '3 m 20 s' or '12 s'."""
  seconds = round(seconds)
  if seconds >= 3600:
    return f'{seconds // 3600} h {seconds % 3600 // 60:02d} m'
  if seconds >= 60:
    return f'{seconds // 60} m {seconds % 60:02d} s'
  return f'{seconds} s'
