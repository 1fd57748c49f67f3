"""Which cell is better, by how much, and whether that is beyond chance.

Runs of two cells are compared seed by seed. Where the judge has a verdict on
each record, two runs have a difference d for each seed s and record r. Both are
samples: of the seeds that could have been drawn, and of the questions that
could have been asked. With

    d_sr = mean + seed_s + record_r + residual_sr

independent and crossed, the variance of the mean over S seeds and R records is
estimated by var(means of the seeds) / S + var(means of the records) / R -
var(residual) / (S R), the last because both of the others contain it. It has
Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946; the two-way
random model, Searle, Casella and McCulloch, Variance Components, 1992).
Intervals over seeds or records alone would ignore the other, and a bootstrap of
three seeds underestimates the variance by a third. Losses, of which only totals
are kept, get the t interval of the seeds' differences.

With several cells there are several chances to beat the baseline by luck, so p
values are adjusted by Holm (Scandinavian Journal of Statistics 6, 1979);
intervals are not.
"""

import dataclasses
import math
from typing import Any
from typing import Mapping
from typing import Sequence

import numpy as np

from gemma_sft.sweeping import grid
from gemma_sft.sweeping import results as results_lib

ALPHA = 0.05


@dataclasses.dataclass(frozen=True)
class Difference:
  """How much better one cell is than another on the same seeds."""

  mean: float  # Above 0 is better, also where a lower metric is better.
  low: float | None  # Of the 95 % interval.
  high: float | None
  p: float | None  # Two-sided; None without an interval.
  n_seeds: int  # That both have.
  # That all of these runs answered; 0 if the metric is no mean over records.
  n_records: int
  adjusted: float | None = None  # p, by `adjust`.

  @property
  def beyond_chance(self) -> bool:
    """Whether the adjusted p is below 5 %."""
    return self.adjusted is not None and self.adjusted < ALPHA


Results = Sequence[results_lib.RunResult]
Grouped = Mapping[str, Results]  # {cell: its finished runs}.


def difference(
    pairs: Sequence[tuple[Results, Results]], metric: str) -> Difference | None:
  """Returns by how much a metric differs; None if no seed is shared.

  A pair holds the finished runs of a cell and of the one that it is compared
  with. Several pairs are averaged, seed by seed and record by record.
  """
  runs = [tuple({r.run.seed: r for r in found if metric in r.scores}
                for found in pair) for pair in pairs]
  seeds = sorted(set.intersection(*(
      a.keys() & b.keys() for a, b in runs))) if runs else []
  if not seeds:
    return None
  sign = -1 if metric in runs[0][0][seeds[0]].lower else 1
  rows = [by_seed[s].rows.get(metric, {}) for pair in runs for by_seed in pair
          for s in seeds]
  records = sorted(set.intersection(*map(set, rows)))
  if len(records) > 1:
    return crossed(sign * np.mean(
        [[[a[s].rows[metric][r] - b[s].rows[metric][r] for r in records]
          for s in seeds] for a, b in runs], axis=0))
  return paired(sign * np.mean(
      [[a[s].scores[metric] - b[s].scores[metric] for s in seeds]
       for a, b in runs], axis=0))


def paired(d_S: np.ndarray) -> Difference:
  """Returns the t interval of differences, one per seed."""
  n = len(d_S)
  if n < 2:
    return Difference(float(d_S[0]), None, None, None, 1, 0)
  return _interval(d_S, d_S.var(ddof=1) / n, n - 1, n, 0)


def crossed(d_SR: np.ndarray) -> Difference:
  """Returns the interval of differences, one per seed and record.

  With one seed it covers the records alone.
  """
  n_seeds, n_records = d_SR.shape
  by_record = d_SR.mean(axis=0).var(ddof=1) / n_records
  if n_seeds == 1:
    return _interval(d_SR, by_record, n_records - 1, 1, n_records)
  by_seed = d_SR.mean(axis=1).var(ddof=1) / n_seeds
  residual_SR = (d_SR - d_SR.mean(axis=0) - d_SR.mean(axis=1, keepdims=True)
                 + d_SR.mean())
  n_residual = (n_seeds - 1) * (n_records - 1)
  both = (residual_SR ** 2).sum() / n_residual / d_SR.size
  variance = by_seed + by_record - both
  parts = [(by_seed, n_seeds - 1), (by_record, n_records - 1),
           (both, n_residual)]
  if variance < max(by_seed, by_record):
    # A sum below one of its parts is noise.
    variance, parts = max((by_seed, parts[:1]), (by_record, parts[1:2]),
                          key=lambda pair: pair[0])
  freedom = 1.0
  if variance > 0:
    freedom = variance ** 2 / sum(v ** 2 / n for v, n in parts)
  return _interval(d_SR, variance, freedom, n_seeds, n_records)


def _interval(d, variance, freedom, n_seeds, n_records):
  from scipy import stats

  mean, error = float(d.mean()), math.sqrt(variance)
  if error <= 1e-12 * max(1.0, abs(mean)):
    # No spread: p is the chance that so many signs agree.
    p = 1.0 if mean == 0 else 2.0 ** (1 - max(n_seeds, n_records))
    return Difference(mean, mean, mean, p, n_seeds, n_records)
  half = float(stats.t.ppf(0.975, freedom)) * error
  p = float(2 * stats.t.sf(abs(mean) / error, freedom))
  return Difference(mean, mean - half, mean + half, p, n_seeds, n_records)


def adjust(differences: Sequence[Difference | None]) -> list[Difference | None]:
  """Returns the differences with Holm's adjusted p values, in their order."""
  known = sorted((d.p, i) for i, d in enumerate(differences)
                 if d is not None and d.p is not None)
  adjusted, largest = list(differences), 0.0
  for rank, (p, i) in enumerate(known):
    largest = max(largest, min(1.0, p * (len(known) - rank)))
    adjusted[i] = dataclasses.replace(differences[i], adjusted=largest)
  return adjusted


# All cells -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CellScores:
  """One metric of a cell."""

  cell: str
  values: Mapping[int, float]  # {seed: value} of finished runs.
  difference: Difference | None  # From the baseline.

  @property
  def mean(self) -> float:
    """NaN without a finished run."""
    return float(np.mean(list(self.values.values()) or [math.nan]))

  @property
  def spread(self) -> float | None:
    """The standard deviation over seeds; None for fewer than two."""
    values = list(self.values.values())
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def by_cell(found: Results, cells: Sequence[grid.Cell]) -> dict[str, Results]:
  """Returns {cell: its finished runs}, in the order of the cells."""
  return {cell.name: [r for r in found if r.run.cell.name == cell.name]
          for cell in cells}


def compare(
    grouped: Grouped, metric: str, baseline: str) -> list[CellScores]:
  """Returns the scores of each cell, p values adjusted for their number."""
  differences = adjust([
      None if name == baseline else difference(
          [(found, grouped[baseline])], metric)
      for name, found in grouped.items()])
  return [
      CellScores(name, {r.run.seed: r.scores[metric] for r in found
                        if metric in r.scores}, d)
      for (name, found), d in zip(grouped.items(), differences)]


@dataclasses.dataclass(frozen=True)
class Effect:
  """The main effect of one value of a factor against the baseline's."""

  factor: str
  value: Any
  than: Any
  difference: Difference


def effects(
    grouped: Grouped, cells: Sequence[grid.Cell], factors: Sequence[str],
    metric: str, baseline: str) -> list[Effect]:
  """Returns the main effects of a grid, p values adjusted for their number.

  Each is the mean over all settings of the other factors, and therefore more
  precise than the difference of two cells. With one factor there are none:
  they would be the differences of the cells.
  """
  base = next(c for c in cells if c.name == baseline).changes
  found = []
  for factor in factors if len(factors) > 1 else ():
    settings, values = {}, {}
    for cell in cells:
      if factor in cell.changes and factor in base:
        others = repr([(k, v) for k, v in cell.changes.items() if k != factor])
        values[repr(cell.changes[factor])] = cell.changes[factor]
        settings.setdefault(others, {})[repr(cell.changes[factor])] = cell.name
    base_key = repr(base.get(factor))
    for key, value in values.items():
      pairs = [(grouped[names[key]], grouped[names[base_key]])
               for names in settings.values()
               if key != base_key and key in names and base_key in names]
      if d := difference(pairs, metric):
        found.append(Effect(factor, value, base[factor], d))
  return [dataclasses.replace(e, difference=d) for e, d in zip(
      found, adjust([e.difference for e in found]))]


def alike(grouped: Grouped, metric: str, best: str) -> list[str]:
  """Returns the cells that do not differ from the best beyond chance.

  Each is compared with the best on the same seeds, p adjusted by Holm. A cell
  whose difference has no interval counts as not different.
  """
  others = [name for name, found in grouped.items() if name != best and found]
  compared = adjust([
      difference([(grouped[best], grouped[name])], metric) for name in others])
  return [name for name, d in zip(others, compared)
          if d is None or not d.beyond_chance]


def pareto(costs: Sequence[float], qualities: Sequence[float]) -> list[bool]:
  """Returns whether each point is on the front of low cost, high quality."""
  points = list(zip(costs, qualities))
  return [not any(
      c <= cost and q >= quality and (c < cost or q > quality)
      for c, q in points) for cost, quality in points]


def costs(
    grouped: Grouped, metric: str, lower_is_better: bool
) -> list[dict[str, Any]]:
  """Returns quality, time and memory of each cell, and which are on a front."""
  rows = []
  for number, (name, found) in enumerate(grouped.items(), 1):
    known = [r for r in found if metric in r.scores]
    speeds = [r.tokens_per_second for r in known if r.tokens_per_second]
    if known:
      rows.append({
          'cell': name, 'number': number,
          'quality': float(np.mean([r.scores[metric] for r in known])),
          'seconds': float(np.mean([r.total_seconds for r in known])),
          'gigabytes': float(np.mean([r.peak_bytes for r in known])) / 1e9,
          'trained_weights': known[0].trained_weights,
          'tokens_per_second': float(np.mean(speeds)) if speeds else None})
  quality = [(-1 if lower_is_better else 1) * row['quality'] for row in rows]
  for cost, front in (('seconds', 'on_time'), ('gigabytes', 'on_memory')):
    for row, best in zip(rows, pareto([row[cost] for row in rows], quality)):
      row[front] = best
  return rows


def best_cell(
    scores: Sequence[CellScores], lower_is_better: bool
) -> CellScores | None:
  """Returns the cell with the best mean; None if no run is finished.

  Ties go to the first cell, which is usually the baseline.
  """
  known = [cell for cell in scores if cell.values]
  return (min if lower_is_better else max)(
      known, key=lambda cell: cell.mean, default=None)


def to_json(scores: CellScores) -> dict[str, Any]:
  """Returns a cell's scores as plain JSON values."""
  return {'cell': scores.cell, 'n': len(scores.values), 'mean': scores.mean,
          'sd': scores.spread, 'values': {
              str(seed): value for seed, value in scores.values.items()},
          'difference': scores.difference and dataclasses.asdict(
              scores.difference)}
