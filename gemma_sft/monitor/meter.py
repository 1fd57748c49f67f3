"""Measures steps: their metrics, their speed, and that none compiles twice."""

import contextlib
import math
import time
from typing import Any
from typing import Callable

import jax

from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft import progress
from gemma_sft.monitor import metrics
from gemma_sft.run import hosts


class Meter:
  """Reads the metrics of steps, writes them and prints a progress line."""

  def __init__(
      self, run: Any, writer: metrics.Writer, explain: Callable[..., str]):
    """Starts the clock.

    `explain` takes a state, a step and a batch in float16, and says where the
    numbers stopped being finite.
    """
    self._run, self._writer, self._explain = run, writer, explain
    params = run.base if run.base is not None else run.initial_state.trainable
    self._embedding = model_lib.embedding(params).size
    self._body = model_lib.count_params(params) - self._embedding
    self._pending = None  # The step that may still be running on the device.
    self._clock = self._done = time.monotonic()
    self._tokens = self._trained = self._steps = 0
    self._first = True

  @contextlib.contextmanager
  def paused(self):
    """Excludes the time spent inside from the tokens per second."""
    start = time.monotonic()
    yield
    self._clock += time.monotonic() - start

  def dispatched(
      self, step: int, on_device: Any, batch: Any, chain: str) -> None:
    """Notes update `step`, just dispatched, whose metrics are `on_device`."""
    # A CPU may run a step before the dispatch returns. What counts is when a
    # step was done, not when it was asked for.
    done = time.monotonic() if on_device['loss'].is_ready() else None
    self._pending = step, on_device, batch, chain, done

  def read(self, state: Any) -> None:
    """Waits for the step dispatched last and takes in its metrics.

    `state` is the newest, for `explain`. Raises `UserError` if the loss or the
    gradient is not finite; in float16, if no loss scale makes them finite.
    """
    if self._pending is None:
      return
    step, on_device, batch, chain, done = self._pending
    self._pending = None
    values = {k: float(v) for k, v in jax.device_get(on_device).items()}
    if values.get('skipped'):
      self._check_scale(step, values, batch, state)
    else:
      self._check_finite(step, values)
    self._steps += 1
    self._tokens += int(batch['n_tokens'])
    self._trained += values['n_trained']
    self._done = done or time.monotonic()
    elapsed = self._done - self._clock
    values['learning_rate'] = float(self._run.schedule(step - 1))
    if self._first:
      # Mostly compilation: reported, and left out of the speed.
      self._first = False
      values['first_step_seconds'] = elapsed
      hosts.say(f'first step, with compilation: {progress.duration(elapsed)}')
      self._restart()
    config, total = self._run.config, self._run.total_steps
    if self._steps and (step % config.train.log_every == 0 or step == total):
      flops = metrics.step_flops(
          body_params=self._body, embedding_params=self._embedding,
          n_tokens=self._tokens, n_trained=self._trained,
          frozen_base=config.lora.enabled)
      values['tokens_per_second'] = self._tokens / elapsed
      hosts.say(metrics.progress_line(
          step=step, total_steps=total, loss=values['loss'],
          grad_norm=values['grad_norm'],
          tokens_per_second=self._tokens / elapsed,
          flops_per_second=flops / elapsed,
          seconds_left=(total - step) * elapsed / self._steps))
      self._restart()
    if values.get('skipped'):
      del values['grad_norm']  # JSON has no such number.
    self._writer.write(step, {**values, 'chain': chain})

  def _restart(self):
    self._clock = self._done
    self._tokens = self._trained = self._steps = 0

  def _check_finite(self, step, values):
    bad = [k for k in ('loss', 'grad_norm') if not math.isfinite(values[k])]
    if bad:
      raise errors.UserError(
          f'step {step}: ' + ', '.join(f'{k} is {values[k]}' for k in bad),
          'finite numbers',
          'the last checkpoint is from before: start from it in a new'
          f' --workdir with --config.init_from={self._run.workdir} and a lower'
          ' --config.optimizer.learning_rate; keep'
          ' --config.optimizer.max_grad_norm above 0, or compute in'
          ' --config.model.dtype=float32')

  def _check_scale(self, step, values, batch, state):
    """Reports a skipped update, or stops the run where no scale is left."""
    if values['loss_scale']:
      hosts.say(
          f'step {step}: the gradient was not finite in float16, so its update'
          f' was skipped; loss scale {values["loss_scale"]:.0f}')
      return
    got = ('the gradient is not finite at the smallest loss scale'
           if math.isfinite(values['loss']) else f'loss is {values["loss"]}')
    where = self._explain(state, step - 1, batch)
    raise errors.UserError(
        f'step {step}: {got} in float16' + (f'; {where}' if where else ''),
        'numbers that float16 can hold, up to 65504',
        'nothing of this step was kept; start from the last checkpoint in a'
        f' new --workdir with --config.init_from={self._run.workdir} and'
        ' --config.model.dtype=float32, or a lower'
        ' --config.optimizer.learning_rate')


class Programs:
  """Checks that a step neither compiles again nor waits for the host.

  Every shape of a batch is one program. If a shape compiles a second time,
  something else changes from step to step (a sharding, a Python number), which
  would cost minutes each time. An array that crosses from the host within a
  step stalls the device each time.
  """

  def __init__(self, step_fn: Any):
    self._step_fn = step_fn
    self._seen: set[Any] = set()

  @contextlib.contextmanager
  def watched(self, *shape: Any):
    """Surrounds a step; raises if a shape seen before compiles again."""
    before = self._step_fn._cache_size()
    with jax.transfer_guard('disallow'):
      yield
    if self._step_fn._cache_size() > before and shape in self._seen:
      raise RuntimeError(
          f'the step for batches of {shape} was compiled a second time')
    self._seen.add(shape)
