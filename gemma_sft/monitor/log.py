"""What a run says and writes: one object for the loop of `train`."""

import functools
import textwrap
from typing import Any
from typing import Callable
from typing import ContextManager
from typing import Mapping

import jax

from gemma_sft.monitor import best as best_lib
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
  copy at Weights & Biases.

  Attributes:
    best: The best evaluation so far; its patience stops the run.
  """

  def __init__(
      self,
      run: prepare.Run,
      meta: checkpoint_lib.Meta | None,
      step_fn: Any,
      gradient_sums: Callable[..., Any],
  ):
    """Opens the files.

    Args:
      run: Prepared.
      meta: Of the checkpoint that the run continues from, or None.
      step_fn: `train.train_step`.
      gradient_sums: `train.gradient_sums`.
    """
    step, section = meta.step if meta else 0, run.config.eval
    self._run = run
    self._record = record_lib.RunRecord(run, step, resumed=meta is not None)
    self.best = best_lib.Best(
        section.metric, section.mode, section.patience,
        found=meta.best if meta else {}, stale=meta.stale if meta else 0)
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

  def end(
      self, step: int, chain: str, stopped: stop_lib.StopRequest | None
  ) -> None:
    """Closes the files and says why the run ended.

    Args:
      step: Updates applied.
      chain: Hash chain of the batches.
      stopped: What stopped the run before its last step, if it was stopped.
    """
    total = self._run.total_steps
    self._record.end(step, 'finished' if step == total else
                     stopped.cause if stopped else 'patience')
    self._writer.close()
    say((stopped.reason(step, total) if stopped else '')
        or self.best.reason(step)
        or f'finished {total} updates; batches {chain[:16]}')
    say(f'best: {self.best.describe()}; checkpoints in {self._run.workdir}')


_QUOTED_LINES = 16


def quote(prompt: str, answer: str) -> str:
  """Returns a prompt and its answer's first lines, set off from the log."""
  lines = answer.strip().splitlines() or ['(nothing)']
  if len(lines) > _QUOTED_LINES:
    lines[_QUOTED_LINES:] = [f'... ({len(lines) - _QUOTED_LINES} more lines)']
  body = textwrap.indent('\n'.join(lines), '  | ', lambda line: True)
  return f'  > {prompt}\n{body}'
