"""Measures time, memory and losses of one peer's steps."""

import dataclasses
import gc
import importlib.metadata
import json
import pathlib
import time
import timeit
from typing import Any
from typing import Callable

from peers import common


def resident_bytes(*, peak: bool = False) -> int:
  """Returns the resident memory of this process, now or at its peak."""
  field = 'VmHWM:' if peak else 'VmRSS:'
  words = pathlib.Path('/proc/self/status').read_text().split()
  return int(words[words.index(field) + 1]) * 1024


def reset_peak() -> None:
  """Sets the peak of the resident memory to what it is now (Linux)."""
  pathlib.Path('/proc/self/clear_refs').write_text('5')


class Meter:
  """Call `begin` with the weights in memory, and `tick` after every step.

  The time of a step is everything since the last tick, whoever drives the loop.
  A tick comes after the loss was read, so nothing still runs on the device.
  """

  def __init__(self, spec: common.Spec, library: Any):
    """Takes the module of the peer: `library_tree` or `torch_model`."""
    self._spec, self._library = spec, library
    self._losses, self._cpu, self._wall = [], [], []

  def begin(self) -> None:
    """Marks the moment before the first step."""
    gc.collect()
    self._held = self._library.device_bytes(self._spec, peak=False)
    self._resident = resident_bytes()
    reset_peak()
    self._begun = time.process_time()

  def tick(self, loss: float) -> None:
    """Marks the end of a step."""
    self._cpu.append(time.process_time())
    self._wall.append(time.time())
    self._losses.append(float(loss))
    if len(self._losses) == common.WARM_UP:
      self._peak_first = resident_bytes(peak=True)
      reset_peak()

  def finish(self, trainable: int, *libraries: str, **more: object) -> None:
    """Prints the result, and `more`, as one line of JSON.

    It has the number of trained weights, and the versions of `libraries`.
    """
    spec = self._spec
    peak_steps = resident_bytes(peak=True)
    device_bytes = None
    if spec.gpu:
      device_bytes = self._library.device_bytes(spec, peak=True) - self._held
    clock = self._wall if spec.gpu else self._cpu
    n = common.WARM_UP
    size = 8192 if spec.gpu else 2048
    product = self._library.product(spec, size)
    product()
    best = min(timeit.repeat(
        product, number=1,
        timer=time.perf_counter if spec.gpu else time.process_time))
    print(json.dumps(dict(
        spec=dataclasses.asdict(spec), losses=self._losses,
        step_s=[b - a for a, b in zip(clock[n - 1:], clock[n:])],
        cold_cpu_s=self._cpu[0],
        first_step_cpu_s=self._cpu[0] - self._begun,
        cold_wall_s=self._wall[0] - spec.started,
        peak_first_bytes=self._peak_first - self._resident,
        peak_steps_bytes=peak_steps - self._resident,
        resident_bytes=self._resident, device_bytes=device_bytes,
        product_gflops=2 * size**3 / best / 1e9,
        versions={name: importlib.metadata.version(name)
                  for name in (*self._library.LIBRARIES, *libraries)},
        trainable=trainable, **more)), flush=True)


def measure(
    spec: common.Spec, library: Any, step: Callable[[int], float],
    trainable: int, **more: object) -> None:
  """Takes the steps and prints the measurements; see `Meter`.

  `step` takes the index of a batch and returns the loss, once it is read.
  """
  meter = Meter(spec, library)
  meter.begin()
  for i in range(spec.steps):
    meter.tick(step(i % common.N_BATCHES))
  meter.finish(trainable, **more)
