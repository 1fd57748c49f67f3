"""Measures time, memory and losses of one peer's steps."""

import dataclasses
import gc
import json
import pathlib
import time
from typing import Callable

from peers import common


def _status(field: str) -> int:
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith(field + ':'):
      return int(line.split()[1]) * 1024
  return 0


def _reset_peak() -> None:
  # Linux: sets VmHWM back to VmRSS.
  pathlib.Path('/proc/self/clear_refs').write_text('5')


class Meter:
  """Call `begin` with the weights in memory, and `tick` after every step.

  The time of a step is everything since the last tick, whoever drives the loop.
  A tick comes after the loss was read, so nothing still runs on the device.
  """

  def __init__(self, spec: common.Spec):
    self._spec = spec
    self._losses: list[float] = []
    self._cpu: list[float] = []
    self._wall: list[float] = []

  def begin(self) -> None:
    """Marks the moment before the first step."""
    gc.collect()
    self._resident = _status('VmRSS')
    _reset_peak()
    self._begun = time.process_time()

  def tick(self, loss: float) -> None:
    """Marks the end of a step."""
    self._cpu.append(time.process_time())
    self._wall.append(time.time())
    self._losses.append(float(loss))
    if len(self._losses) == common.WARM_UP:
      self._peak_first = _status('VmHWM')
      _reset_peak()

  def finish(
      self,
      product: Callable[[int], float],
      versions: dict[str, str],
      device_bytes: int | None = None,
      **more: object,
  ) -> None:
    """Prints the result as one line of JSON.

    Args:
      product: n -> runs an (n, n) by (n, n) product in the dtype, and waits.
      versions: Of the libraries.
      device_bytes: On a GPU, the peak above its memory before the steps.
      **more: Added to the result.
    """
    peak_steps = _status('VmHWM')
    clock = self._wall if self._spec.gpu else self._cpu
    n = common.WARM_UP
    seconds = [b - a for a, b in zip(clock[n - 1:], clock[n:])]
    size = 8192 if self._spec.gpu else 2048
    product(size)
    best = min(self._time(product, size) for _ in range(5))
    result = dict(
        spec=dataclasses.asdict(self._spec),
        losses=self._losses,
        step_s=seconds,
        cold_cpu_s=self._cpu[0],
        first_step_cpu_s=self._cpu[0] - self._begun,
        cold_wall_s=self._wall[0] - self._spec.started,
        peak_first_bytes=self._peak_first - self._resident,
        peak_steps_bytes=peak_steps - self._resident,
        resident_bytes=self._resident,
        device_bytes=device_bytes,
        product_gflops=2 * size**3 / best / 1e9,
        versions=versions,
        **more)
    print(json.dumps(result), flush=True)

  def _time(self, product, size):
    clock = time.perf_counter if self._spec.gpu else time.process_time
    start = clock()
    product(size)
    return clock() - start
