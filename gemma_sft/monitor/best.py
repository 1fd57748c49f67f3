"""Which evaluation is the best so far, and whether to stop early."""

from typing import Any
from typing import Mapping

from gemma_sft import errors


class Best:
  """Follows one metric over the evaluations of a run.

  Attributes:
    found: {'step', 'value', 'metric', 'mode'} of the best evaluation, or {}.
    stale: Evaluations since the value last improved.
  """

  def __init__(
      self,
      metric: str,
      mode: str,
      patience: int,
      *,
      found: Mapping[str, Any],
      stale: int,
  ):
    """Continues from a checkpoint, or begins with empty `found` and 0 `stale`.

    Args:
      metric: Key of the scores, such as 'loss' or 'judge/strict'.
      mode: 'min' or 'max'.
      patience: Evaluations without improvement before `exhausted`; 0 for never.
      found: Ignored if it is of another metric or mode.
      stale: See the class.
    """
    self._metric, self._mode, self._patience = metric, mode, patience
    if (found.get('metric'), found.get('mode')) != (metric, mode):
      found, stale = {}, 0
    self.found, self.stale = dict(found), stale

  def update(self, step: int, scores: Mapping[str, float]) -> None:
    """Takes in an evaluation. Ties go to the later step.

    Raises:
      UserError: if the scores lack the metric although its source was there.
    """
    if self._metric not in scores:
      # Without validation data, or with a judge that cannot work here, there is
      # no best: the latest checkpoint counts.
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
