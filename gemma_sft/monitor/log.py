"""What a person sees of a run, and which of its checkpoints is the best."""

import contextlib
import math
import textwrap
import time
from typing import Any
from typing import Callable
from typing import Mapping

import jax

from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft.monitor import metrics


class Meter:
  """Reads the metrics of steps, writes them and prints a line now and then."""

  def __init__(
      self,
      run: Any,
      writer: metrics.Writer,
      explain: Callable[..., str] | None = None,
  ):
    """Starts the clock.

    Args:
      run: `prepare.Run`.
      writer: Where the numbers go.
      explain: Of a state, a step and a batch in float16, says where numbers
        were no longer finite.
    """
    self._run, self._explain = run, explain
    self._writer = writer
    params = run.base if run.base is not None else run.initial_state.trainable
    self._embedding = model_lib.embedding(params).size
    self._body = model_lib.count_params(params) - self._embedding
    self._clock = self._done = time.monotonic()
    self._tokens = self._trained = self._steps = 0
    self._first = True

  @contextlib.contextmanager
  def paused(self):
    """Leaves what happens inside out of the tokens per second."""
    start = time.monotonic()
    yield
    self._clock += time.monotonic() - start

  def pending(self, step: int, on_device: Any, batch: Any, chain: str) -> Any:
    """Returns what `read` takes, of a step that was just dispatched.

    Args:
      step: Updates applied after it.
      on_device: Its metrics.
      batch: Of `batches.Batches`.
      chain: Hash chain of the batches.
    """
    # A CPU may run a step before the dispatch returns; what is timed is when a
    # step was done, not when it was asked for.
    done = time.monotonic() if on_device['loss'].is_ready() else None
    return step, on_device, batch, chain, done

  def read(self, pending: Any, state: Any = None) -> None:
    """Waits for a step and takes its numbers in.

    Args:
      pending: From `pending`, or None.
      state: The newest, for `explain`.

    Raises:
      UserError: if the loss or the gradient is not finite; in float16, if no
        loss scale makes it so.
    """
    if pending is None:
      return
    step, on_device, batch, chain, done = pending
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
      # Mostly compilation: told, and left out of the speed.
      self._first = False
      values['first_step_seconds'] = elapsed
      self._say(f'first step, with compilation: {metrics.duration(elapsed)}')
      self._restart()
    config, total = self._run.config, self._run.total_steps
    if self._steps and (step % config.train.log_every == 0 or step == total):
      flops = metrics.step_flops(
          body_params=self._body, embedding_params=self._embedding,
          n_tokens=self._tokens, n_trained=self._trained,
          frozen_base=config.lora.enabled)
      values['tokens_per_second'] = self._tokens / elapsed
      self._say(metrics.progress_line(
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
          'the last checkpoint is from before: go on from it in a new --workdir'
          f' with --config.init_from={self._run.workdir} and a lower'
          ' --config.optimizer.learning_rate; keep'
          ' --config.optimizer.max_grad_norm above 0, or compute in'
          ' --config.model.dtype=float32')

  def _check_scale(self, step, values, batch, state):
    """Tells of an update that was left out, or stops the run."""
    if values['loss_scale']:
      self._say(f'step {step}: the gradient was not finite in float16, so its'
                f' update was left out; loss scale {values["loss_scale"]:.0f}')
      return
    got = ('the gradient is not finite at the smallest loss scale'
           if math.isfinite(values['loss']) else f'loss is {values["loss"]}')
    where = self._explain(state, step - 1, batch) if self._explain else ''
    raise errors.UserError(
        f'step {step}: {got} in float16' + (f'; {where}' if where else ''),
        'numbers that float16 can hold, up to 65504',
        'nothing of this step was kept; go on from the last checkpoint in a new'
        f' --workdir with --config.init_from={self._run.workdir} and'
        ' --config.model.dtype=float32, or a lower'
        ' --config.optimizer.learning_rate')

  def _say(self, text):
    if jax.process_index() == 0:
      print(text, flush=True)


class Programs:
  """Watches that a step neither compiles again nor waits for the host.

  Every shape of a batch is a program. Once it is compiled, a second
  compilation for it means that something else changes from step to step (a
  sharding, a Python number), which would cost minutes each time; and an array
  that crosses from the host within a step stalls the device each time.
  """

  def __init__(self, step_fn: Any):
    """Takes the jitted function of a step."""
    self._step_fn = step_fn
    self._seen: set[Any] = set()

  @contextlib.contextmanager
  def watch(self, *shape: Any):
    """Runs a step on batches of a shape.

    Raises:
      RuntimeError: if it was compiled again: a fault of this project.
    """
    before = self._step_fn._cache_size()
    with jax.transfer_guard('disallow'):
      yield
    if self._step_fn._cache_size() > before and shape in self._seen:
      raise RuntimeError(
          f'the step for batches of {shape} was compiled a second time')
    self._seen.add(shape)


class Tracker:
  """Follows one metric over the evaluations."""

  def __init__(
      self,
      metric: str,
      mode: str,
      patience: int,
      *,
      best: dict[str, Any],
      stale: int,
  ):
    """Goes on from a checkpoint, or begins with empty `best` and 0 `stale`.

    Args:
      metric: Key of the scores, such as 'loss' or 'judge/strict'.
      mode: 'min' or 'max'.
      patience: Evaluations without a new best before `exhausted`; 0 for never.
      best: {'step', 'value', 'metric', 'mode'} so far; of another metric or
        mode it does not count.
      stale: Evaluations since then.
    """
    self._metric, self._mode, self._patience = metric, mode, patience
    if (best.get('metric'), best.get('mode')) != (metric, mode):
      best, stale = {}, 0
    self.best, self.stale = dict(best), stale

  def update(self, step: int, scores: Mapping[str, float]) -> None:
    """Takes in an evaluation.

    Raises:
      UserError: if the scores lack the metric though its source was there.
    """
    if self._metric not in scores:
      # Without validation data, or a judge that cannot work here, there is no
      # best: the latest counts.
      source = self._metric.partition('/')[0]
      if scores and (source != 'judge' or any(
          k.startswith('judge/') for k in scores)):
        raise errors.UserError(
            f'config.eval.metric is {self._metric!r}',
            f'one of {", ".join(scores)}',
            errors.nearest(self._metric, list(scores))
            + 'Set --config.eval.metric, and --config.eval.judged=-1 for the'
            " judge's.")
      return
    value = scores[self._metric]
    sign = 1 if self._mode == 'max' else -1
    if not self.best or sign * value >= sign * self.best['value']:
      improved = not self.best or value != self.best['value']
      self.best = {'step': step, 'value': value, 'metric': self._metric,
                   'mode': self._mode}
      self.stale = 0 if improved else self.stale + 1
    else:
      self.stale += 1

  @property
  def exhausted(self) -> bool:
    return bool(self._patience) and self.stale >= self._patience

  def reason(self, step: int) -> str:
    """Returns why the run stopped early, or ''."""
    if not self.exhausted:
      return ''
    return (f'stopped early after {step} updates: {self._metric} has not'
            f' improved for {self.stale} evaluations')

  def describe(self) -> str:
    """Returns 'loss 1.234 after 60 updates'."""
    if not self.best:
      return 'the latest (nothing was evaluated)'
    return (f'{self._metric} {self.best["value"]:.4g} after'
            f' {self.best["step"]} updates')


_QUOTED_LINES = 16


def quote(prompt: str, answer: str) -> str:
  """Returns a prompt and its answer's first lines, set off from the log."""
  lines = answer.strip().splitlines() or ['(nothing)']
  if len(lines) > _QUOTED_LINES:
    lines[_QUOTED_LINES:] = [f'... ({len(lines) - _QUOTED_LINES} more lines)']
  body = textwrap.indent('\n'.join(lines), '  | ', lambda line: True)
  return f'  > {prompt}\n{body}'
