"""Stops a run before its last step, on a signal or at its deadline."""

import signal
import threading
import time
from typing import Any

from gemma_sft.run import hosts

# Exit status of a run that the same command resumes (EX_TEMPFAIL of
# sysexits.h).
UNFINISHED = 75
_GO_ON, _DEADLINE, _SIGNAL = range(3)
_SECONDS = 5.0  # Between comparisons of several processes.


class StopRequest:
  """A request to save and end, from SIGTERM, SIGINT or the deadline.

  It handles the signals while it is entered as a context manager. A signal to
  one of several processes stops all of them, after the same step.
  """

  def __init__(self, deadline_minutes: float):
    """Starts the clock; a deadline of 0 minutes is none."""
    self._signal: str | None = None
    self._interrupts = 0
    self._agreed = _GO_ON
    self._calls = 0  # Since the last agreement, and until the next.
    self._interval = 1
    self._looked = time.monotonic()
    self._before: dict[int, Any] = {}
    self._deadline = (
        time.monotonic() + 60 * deadline_minutes if deadline_minutes else None)

  def __enter__(self) -> 'StopRequest':
    # Python handles signals in the main thread only. In another thread, such as
    # a notebook may use, only the deadline counts.
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._on_signal)
    return self

  def __exit__(self, *exception: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _on_signal(self, number, frame):
    del frame
    # A second SIGINT comes from a person who does not want to wait. A second
    # SIGTERM does not end the save: launcher and system may both send one.
    self._interrupts += number == signal.SIGINT
    if self._interrupts > 1:
      raise KeyboardInterrupt
    self._signal = self._signal or signal.Signals(number).name

  def requested(self) -> bool:
    """Whether any process is asked to stop; all call it at the same step.

    Several processes compare their answers about every `_SECONDS`, because each
    comparison makes the faster ones wait. They also agree on the number of
    calls until the next one, so that all of them take part in it.
    """
    if hosts.count() == 1:
      self._agreed = self._here()
      return self._agreed != _GO_ON
    self._calls += 1
    if self._agreed == _GO_ON and self._calls >= self._interval:
      now = time.monotonic()
      answers = hosts.gather([self._here(), (now - self._looked) / self._calls])
      self._agreed = max(cause for cause, _ in answers)
      slowest = max(seconds for _, seconds in answers)
      self._interval = max(1, min(
          2 * self._interval, int(_SECONDS / max(slowest, 1e-6))))
      self._calls, self._looked = 0, time.monotonic()
    return self._agreed != _GO_ON

  def _here(self):
    if self._signal is not None:
      return _SIGNAL
    late = self._deadline is not None and time.monotonic() > self._deadline
    return _DEADLINE if late else _GO_ON

  @property
  def cause(self) -> str:
    """'signal', to any process, or 'deadline'."""
    return 'deadline' if self._agreed == _DEADLINE else 'signal'

  def reason(self, step: int, total: int) -> str:
    """Returns why the run ended before its last step."""
    cause = ('the deadline (config.deadline_minutes)'
             if self.cause == 'deadline' else
             self._signal or 'a signal to another process')
    return (f'stopped by {cause} after {step} of {total} updates; the same'
            ' command resumes from here')
