"""When a run ends before its last step."""

import signal
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np


class StopRequest:
  """SIGTERM, SIGINT or the deadline: save and end after the step at hand.

  A context manager: it takes the signals while it is entered.
  """

  def __init__(self, deadline_minutes: float):
    """Starts the clock.

    Args:
      deadline_minutes: From now; 0 for none.
    """
    self._signal = None
    self._before: dict[int, Any] = {}
    self._deadline = (
        time.monotonic() + 60 * deadline_minutes if deadline_minutes else None)

  def __enter__(self) -> 'StopRequest':
    # Python takes signals in the main thread alone; a notebook may run us in
    # another, which then has the deadline.
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._on_signal)
    return self

  def __exit__(self, *exception: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _on_signal(self, number, frame):
    del frame
    if self._signal is not None:  # A second one ends at once.
      raise KeyboardInterrupt
    self._signal = signal.Signals(number).name

  def requested(self) -> bool:
    """Whether any host is asked to stop. All hosts call it at the same step."""
    here = self._signal is not None or (
        self._deadline is not None and time.monotonic() > self._deadline)
    if jax.process_count() == 1:
      return here
    return bool(multihost_utils.process_allgather(np.asarray(here)).any())

  @property
  def cause(self) -> str:
    """'signal', to any host, or 'deadline'."""
    deadline = self._deadline is not None and time.monotonic() > self._deadline
    return 'deadline' if deadline and self._signal is None else 'signal'

  def reason(self, step: int, total: int) -> str:
    """Returns why the run ended before its last step."""
    cause = self._signal or 'the deadline (config.deadline_minutes)'
    return (f'stopped by {cause} after {step} of {total} updates; the same'
            ' command goes on from here')
