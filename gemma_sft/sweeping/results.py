"""The results of finished runs, read from their workdirs."""

import dataclasses
import json
import os
from typing import Any
from typing import Mapping
from typing import Sequence

from gemma_sft.evaluation import report
from gemma_sft.monitor import metrics
from gemma_sft.monitor import record as record_lib
from gemma_sft.sweeping import runs

LOSSES = frozenset(
    {'loss', 'perplexity', 'bits_per_byte', 'bits_per_character'})
Lines = list[dict[str, Any]]  # Of a metrics.jsonl.


@dataclasses.dataclass(frozen=True)
class RunResult:
  """The result of a finished run: that of its best checkpoint."""

  run: runs.PlannedRun
  scores: Mapping[str, float]  # {'loss': 2.1, 'judge/good': 0.4, ...}.
  # {'judge/good': {record: value}} of metrics that are means of records.
  rows: Mapping[str, Mapping[str, float]]
  headline: str  # The metric that says how good the run is.
  lower: frozenset[str]  # Metrics that are better when lower.
  train: list[tuple[int, float]]  # Step and loss.
  validation: list[tuple[int, float]]
  steps: int
  seconds: float  # Of training, over all starts.
  evaluating: float  # Seconds of answering afterwards.
  peak_bytes: int  # Of a device, or of the process on a CPU.
  tokens_per_second: float | None  # Median; a short run has none.
  trained_weights: int
  starts: int  # How often training was started.

  @property
  def total_seconds(self) -> float:
    """Of training and answering."""
    return self.seconds + self.evaluating


def read(run: runs.PlannedRun) -> RunResult | None:
  """Returns the result of a run; None if it is not finished."""
  if run.state() != runs.FINISHED:
    return None
  record = record_lib.read(run.workdir)
  lines = metrics.read_jsonl(os.path.join(run.workdir, 'metrics.jsonl'))
  rows, evaluating, lower, end = {}, 0.0, set(LOSSES), record['end']
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
  return RunResult(
      run=run, scores=scores, rows=rows,
      headline=headline if headline in scores else 'loss',
      lower=frozenset(lower),
      train=[(r['step'], r['loss']) for r in lines if 'loss' in r],
      validation=evaluations(lines, 'loss'),
      steps=end['step'], seconds=end['seconds'], evaluating=evaluating,
      peak_bytes=end['peak_bytes'], tokens_per_second=end['tokens_per_second'],
      trained_weights=record['trained_weights'], starts=len(record['starts']))


def evaluations(lines: Lines, metric: str) -> list[tuple[int, float]]:
  """Returns [(step, value)] of the evaluations in a metrics.jsonl."""
  key = f'eval/{metric}'
  return [(line['step'], line[key]) for line in lines if key in line]


def best_scores(lines: Lines, metric: str, mode: str) -> dict[str, float]:
  """Returns the validation scores of the best checkpoint of a metrics.jsonl.

  As in `log.Tracker`, step 0 does not count, because the untouched weights are
  no checkpoint, and ties go to the later step.
  """
  key = f'eval/{metric}'
  found = [line for line in reversed(lines) if line['step'] and key in line]
  choose = min if mode == 'min' else max
  best = choose(found, key=lambda line: line[key], default={})
  return {name.removeprefix('eval/'): value for name, value in best.items()
          if name.startswith('eval/')}


# How long a run takes --------------------------------------------------------


def estimate_seconds(
    run: runs.PlannedRun, finished: Sequence[RunResult]) -> float | None:
  """Returns the time that an unfinished run still takes; None if unknown.

  A finished run of the same cell takes as long. The time of others is scaled by
  the number of updates, if known: config.train.steps, or as many per epoch as
  another run had on the same batches.
  """
  known = [(r.total_seconds, r.steps) for r in finished
           if r.run.cell.name == run.cell.name]
  known = known or [
      (r.evaluating + r.seconds * steps / r.steps, steps) for r in finished
      if (steps := _updates(run.leaves, r))]
  if not known:
    return None
  mean = sum(seconds for seconds, _ in known) / len(known)
  return mean * max(0.0, 1 - run.step() / max(1, known[0][1]))


def _updates(leaves, result):
  """Returns the updates of a run, judging by another one; 0 if unknown."""
  if leaves['train.steps']:
    return leaves['train.steps']
  other = result.run.leaves
  same_batches = all(leaves[k] == other[k] for k in leaves if k.startswith(
      ('data.', 'train.gradient_accumulation_steps')))
  if not same_batches or other['train.steps']:
    return 0
  return round(result.steps * leaves['train.epochs'] / other['train.epochs'])
