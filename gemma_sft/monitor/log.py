"""What a run says and writes: one object for the loop of `train`."""

import functools
import textwrap
from typing import Any
from typing import Callable
from typing import ContextManager
from typing import Mapping

import jax

from gemma_sft import errors
from gemma_sft.monitor import meter
from gemma_sft.monitor import metrics
from gemma_sft.monitor import overflow
from gemma_sft.monitor import record as record_lib
from gemma_sft.monitor import stop as stop_lib
from gemma_sft.monitor import tracking
from gemma_sft.run import checkpoint as checkpoint_lib
from gemma_sft.run import hosts
from gemma_sft.run import prepare

say = hosts.say


class Log:
  """Prints progress and keeps the files of a run.

  It writes metrics.jsonl, TensorBoard files, run.json and, if configured, the
  copy at Weights & Biases. `best` is the best evaluation so far.
  """

  def __init__(
      self, run: prepare.Run, meta: checkpoint_lib.Meta | None, step_fn: Any,
      gradient_sums: Callable[..., Any]):
    """Opens the files.

    `meta` is of the checkpoint that the run resumes from; the functions are
    those of `train`.
    """
    step = meta.step if meta else 0
    self._run = run
    self._record = record_lib.RunRecord(run, step, resumed=meta is not None)
    self.best = Best(run.config.eval, meta)
    self._writer = metrics.Writer(
        run.workdir, resume_step=step if meta else -1,
        active=jax.process_index() == 0,
        mirror=tracking.start(run.config.track.wandb, self._record))
    self._meter = meter.Meter(run, self._writer, functools.partial(
        overflow.explain, run, gradient_sums))
    self._programs = meter.Programs(step_fn)
    self.paused, self.read = self._meter.paused, self._meter.read
    self.dispatched = self._meter.dispatched

  def watched(self, batch: Any) -> ContextManager[None]:
    """Checks that the step inside compiles once per shape of a batch."""
    return self._programs.watched(
        batch['tokens'].shape, int(batch['max_trained']))

  def evaluated(self, step: int, scores: Mapping[str, float]) -> None:
    """Writes the scores of an evaluation."""
    self._writer.write(step, {f'eval/{k}': v for k, v in scores.items()})
    self.best.update(step, scores)

  def end(self, step: int, chain: str, stopped: stop_lib.StopRequest | None
          ) -> None:
    """Closes the files and says why the run ended.

    `stopped` is what stopped the run before its last step, or None.
    """
    total = self._run.total_steps
    self._record.end(step, 'finished' if step == total else
                     stopped.cause if stopped else 'patience')
    self._writer.close()
    say((stopped.reason(step, total) if stopped else '')
        or self.best.reason(step)
        or f'finished {total} updates; batches {chain[:16]}')
    say(f'best: {self.best.describe()}; checkpoints in {self._run.workdir}')


def check_metric(section: Any, scores: Mapping[str, float]) -> None:
  """Raises if scores lack config.eval.metric although its source was there.

  Without validation data, or with a judge that cannot run here, no evaluation
  is the best, and the latest checkpoint counts.
  """
  source = section.metric.partition('/')[0]
  if section.metric not in scores and scores and (source != 'judge' or any(
      k.startswith('judge/') for k in scores)):
    raise errors.UserError(
        f'config.eval.metric is {section.metric!r}',
        f'one of {", ".join(scores)}',
        errors.nearest(section.metric, list(scores))
        + 'Set --config.eval.metric, and --config.eval.judged=-1 for the'
        " judge's.")


class Best:
  """Follows one metric over the evaluations of a run.

  Attributes:
    found: {'step', 'value', 'metric', 'mode'} of the best evaluation, or {}.
    stale: Evaluations since the value last improved.
  """

  def __init__(self, section: Any, meta: checkpoint_lib.Meta | None):
    """Takes `config.eval`, and the checkpoint that the run resumes from.

    The checkpoint's best does not count if it is of another metric or mode.
    """
    self._section = section
    self._metric, self._mode = section.metric, section.mode
    self._patience = section.patience
    self.found, self.stale = {}, 0
    if meta and (meta.best.get('metric'), meta.best.get('mode')) == (
        self._metric, self._mode):
      self.found, self.stale = dict(meta.best), meta.stale

  def update(self, step: int, scores: Mapping[str, float]) -> None:
    """Takes in an evaluation, as `check_metric`. Ties go to the later step."""
    check_metric(self._section, scores)
    if self._metric not in scores:
      return
    value = scores[self._metric]
    sign = 1 if self._mode == 'max' else -1
    if self.found and sign * value < sign * self.found['value']:
      self.stale += 1
      return
    improved = not self.found or value != self.found['value']
    self.found = {'step': step, 'value': value, 'metric': self._metric,
                  'mode': self._mode}
    self.stale = 0 if improved else self.stale + 1

  @property
  def exhausted(self) -> bool:
    """Whether patience has run out."""
    return bool(self._patience) and self.stale >= self._patience

  def reason(self, step: int) -> str:
    """Returns why the run stopped early, or ''."""
    if not self.exhausted:
      return ''
    return (f'stopped early after {step} updates: {self._metric} has not'
            f' improved for {self.stale} evaluations')

  def describe(self) -> str:
    """Returns 'loss 1.234 after 60 updates'."""
    if not self.found:
      return 'the latest (nothing was evaluated)'
    return (f'{self._metric} {self.found["value"]:.4g} after'
            f' {self.found["step"]} updates')


_QUOTED_LINES = 16


def quote(prompt: str, answer: str) -> str:
  """Returns a prompt and its answer's first lines, set off from the log."""
  lines = answer.strip().splitlines() or ['(nothing)']
  if len(lines) > _QUOTED_LINES:
    lines[_QUOTED_LINES:] = [f'... ({len(lines) - _QUOTED_LINES} more lines)']
  body = textwrap.indent('\n'.join(lines), '  | ', lambda line: True)
  return f'  > {prompt}\n{body}'
