"""What finished runs say, read from their workdirs."""

import dataclasses
import json
import os
from typing import Any
from typing import Mapping

from gemma_sft.evaluation import report
from gemma_sft.monitor import metrics
from gemma_sft.monitor import record as record_lib
from gemma_sft.sweeping import runs

LOSSES = frozenset(
    {'loss', 'perplexity', 'bits_per_byte', 'bits_per_character'})


@dataclasses.dataclass(frozen=True)
class Result:
  """A finished run.

  Attributes:
    run: What was planned.
    scores: {'loss': 2.1, 'judge/good': 0.4, ...} of the best checkpoint.
    rows: {'judge/good': {record: value}} of metrics that are means of records.
    headline: The metric that says how good the run is.
    lower: Metrics that are better when lower.
    train: [(step, loss)].
    validation: [(step, loss)].
    steps: Updates.
    seconds: Of training, all starts.
    evaluating: Seconds of answering afterwards.
    peak_bytes: The most memory of a device, or of the process on a CPU.
    tokens_per_second: Median; None for runs too short to say.
    trained_weights: Their number.
    starts: How often training was started.
  """

  run: runs.Run
  scores: Mapping[str, float]
  rows: Mapping[str, Mapping[str, float]]
  headline: str
  lower: frozenset[str]
  train: list[tuple[int, float]]
  validation: list[tuple[int, float]]
  steps: int
  seconds: float
  evaluating: float
  peak_bytes: int
  tokens_per_second: float | None
  trained_weights: int
  starts: int

  @property
  def timing(self) -> runs.Timing:
    """For the estimates of runs to come."""
    return runs.Timing(
        self.run.cell.name, self.run.leaves, self.steps, self.seconds,
        self.evaluating)


def read(run: runs.Run) -> Result | None:
  """Returns the result of a run, None unless it is finished."""
  if run.state() != runs.FINISHED:
    return None
  record = record_lib.read(run.workdir)
  lines = metrics.read_jsonl(os.path.join(run.workdir, 'metrics.jsonl'))
  rows, evaluating, lower = {}, 0.0, set(LOSSES)
  if run.split:
    with open(run.evaluation, encoding='utf-8') as file:
      evaluation = json.load(file)
    scores = evaluation['scores']
    headline = f'judge/{evaluation["headline"]}'
    lower |= {f'judge/{name}' for name in evaluation['lower_is_better']}
    rows = {key: values for key in scores
            if (values := report.row_values(evaluation, key))}
    evaluating = evaluation['generation_seconds']
  else:
    headline = run.leaves['eval.metric']
    scores = best_scores(lines, headline, run.leaves['eval.mode'])
    if run.leaves['eval.mode'] == 'min':
      lower.add(headline)
  end = record['end']
  return Result(
      run=run, scores=scores, rows=rows,
      headline=headline if headline in scores else 'loss',
      lower=frozenset(lower),
      train=[(r['step'], r['loss']) for r in lines if 'loss' in r],
      validation=[
          (r['step'], r['eval/loss']) for r in lines if 'eval/loss' in r],
      steps=end['step'], seconds=end['seconds'], evaluating=evaluating,
      peak_bytes=end['peak_bytes'],
      tokens_per_second=end['tokens_per_second'],
      trained_weights=record['trained_weights'], starts=len(record['starts']))


def evaluations(
    lines: list[dict[str, Any]], metric: str) -> list[tuple[int, float]]:
  """Returns [(step, value)] of the evaluations of a metrics.jsonl."""
  key = f'eval/{metric}'
  return [(line['step'], line[key]) for line in lines if key in line]


def best_scores(
    lines: list[dict[str, Any]], metric: str, mode: str) -> dict[str, float]:
  """Returns the validation scores of the best checkpoint that training found.

  The untouched weights of step 0 are no checkpoint, as for `log.Tracker`.

  Args:
    lines: Of metrics.jsonl.
    metric: config.eval.metric.
    mode: min or max.
  """
  # The later one of equals, as there.
  found = [line for line in reversed(lines)
           if line['step'] and f'eval/{metric}' in line]
  if not found:
    return {}
  choose = min if mode == 'min' else max
  best = choose(found, key=lambda line: line[f'eval/{metric}'])
  return {key.removeprefix('eval/'): value for key, value in best.items()
          if key.startswith('eval/')}
