"""Which cell is better, by how much, and whether that is beyond chance.

Runs of two cells are compared seed by seed. Where the judge has a verdict on
each record, a difference d of two runs is known for each seed s and record r,
and both are samples: of the seeds that might have been drawn, and of the
questions that might have been asked. With

    d_sr = mean + seed_s + record_r + rest_sr

independent and crossed, the variance of the mean over S seeds and R records is
estimated by var(means of the seeds) / S + var(means of the records) / R -
var(rest) / (S R), the last because both of the others hold it, and has
Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946; the two-way
random model, Searle, Casella and McCulloch, Variance Components, 1992). A t
interval over three seeds alone would leave out that another set of questions
gives another answer, a bootstrap over records alone that another seed does; a
bootstrap of three seeds is too narrow by a third of the variance. Losses, of
which only totals are kept, get the t interval of the seeds' differences.

Several cells against one baseline are several chances to be lucky: p values are
adjusted by Holm (Scandinavian Journal of Statistics 6, 1979), the intervals
are not.
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
  """How much better one cell is than another on the same seeds.

  Attributes:
    mean: Above 0 is better, whichever way the metric runs.
    low: Of the 95 % interval; None without one.
    high: Likewise.
    p: Two-sided; None without an interval.
    n_seeds: Seeds that both have.
    n_records: Records that all of those runs answered; 0 if it is not a mean
      over records.
    adjusted: p after Holm; None until `adjust`.
  """

  mean: float
  low: float | None
  high: float | None
  p: float | None
  n_seeds: int
  n_records: int
  adjusted: float | None = None

  @property
  def beyond_chance(self) -> bool:
    """Whether the adjusted p is below 5 %."""
    return self.adjusted is not None and self.adjusted < ALPHA


Results = Sequence[results_lib.Result]


def difference(
    pairs: Sequence[tuple[Results, Results]], metric: str) -> Difference | None:
  """Compares runs of cells by a metric; None if they share no seed.

  Args:
    pairs: Finished runs of a cell and of the one that it is compared with; of
      several such pairs the mean is taken, seed by seed and record by record.
    metric: Such as judge/good.
  """
  runs = [tuple({r.run.seed: r for r in found if metric in r.scores}
                for found in pair) for pair in pairs]
  seeds = sorted(set.intersection(*(
      a.keys() & b.keys() for a, b in runs))) if runs else []
  if not seeds:
    return None
  sign = -1 if metric in runs[0][0][seeds[0]].lower else 1
  rows = [of[s].rows.get(metric, {}) for pair in runs for of in pair
          for s in seeds]
  records = sorted(set.intersection(*map(set, rows)))
  if len(records) > 1:
    return crossed(sign * np.mean(
        [[[a[s].rows[metric][w] - b[s].rows[metric][w] for w in records]
          for s in seeds] for a, b in runs], axis=0))
  return paired(sign * np.mean(
      [[a[s].scores[metric] - b[s].scores[metric] for s in seeds]
       for a, b in runs], axis=0))


def paired(d_S: np.ndarray) -> Difference:
  """Returns the t interval of differences, one a seed."""
  n = len(d_S)
  if n < 2:
    return Difference(float(d_S[0]), None, None, None, 1, 0)
  return _interval(d_S, d_S.var(ddof=1) / n, n - 1, n, 0)


def crossed(d_SR: np.ndarray) -> Difference:
  """Returns the interval of differences, one a seed and record.

  With one seed it is over the records alone.
  """
  n_seeds, n_records = d_SR.shape
  by_record = d_SR.mean(axis=0).var(ddof=1) / n_records
  if n_seeds == 1:
    return _interval(d_SR, by_record, n_records - 1, 1, n_records)
  by_seed = d_SR.mean(axis=1).var(ddof=1) / n_seeds
  rest = (d_SR - d_SR.mean(axis=0) - d_SR.mean(axis=1, keepdims=True)
          + d_SR.mean())
  n_rest = (n_seeds - 1) * (n_records - 1)
  both = (rest ** 2).sum() / n_rest / d_SR.size
  variance = by_seed + by_record - both
  parts = [(by_seed, n_seeds - 1), (by_record, n_records - 1), (both, n_rest)]
  if variance < max(by_seed, by_record):
    # An estimate below what one of its parts shows alone is noise.
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
    # All alike: the chance that so many signs agree is what can be said.
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
class Row:
  """A cell's line in the table of one metric.

  Attributes:
    cell: Its name.
    values: {seed: value} of finished runs.
    difference: To the baseline; None for the baseline itself.
  """

  cell: str
  values: Mapping[int, float]
  difference: Difference | None

  @property
  def mean(self) -> float:
    """NaN without a finished run."""
    return float(np.mean(list(self.values.values()) or [math.nan]))

  @property
  def spread(self) -> float | None:
    """The standard deviation over seeds; None for fewer than two."""
    if len(self.values) < 2:
      return None
    return float(np.std(list(self.values.values()), ddof=1))


def by_cell(
    found: Sequence[results_lib.Result], cells: Sequence[grid.Cell]
) -> dict[str, list[results_lib.Result]]:
  """Returns {cell: its finished runs}, in the order of the cells."""
  grouped = {cell.name: [] for cell in cells}
  for result in found:
    grouped[result.run.cell.name].append(result)
  return grouped


def compare(
    grouped: Mapping[str, Results],
    metric: str,
    baseline: str,
) -> list[Row]:
  """Returns a row a cell, p values adjusted for their number.

  Args:
    grouped: Of `by_cell`.
    metric: Such as judge/good or loss.
    baseline: Name of a cell.
  """
  differences = adjust([
      None if name == baseline else difference(
          [(found, grouped[baseline])], metric)
      for name, found in grouped.items()])
  return [
      Row(name, {r.run.seed: r.scores[metric] for r in found
                 if metric in r.scores}, d)
      for (name, found), d in zip(grouped.items(), differences)]


@dataclasses.dataclass(frozen=True)
class Effect:
  """What a value of a factor does, whatever the other factors are.

  Attributes:
    factor: Its key.
    value: What is compared...
    than: ...with the baseline's value.
    difference: The mean over all settings of the other factors.
  """

  factor: str
  value: Any
  than: Any
  difference: Difference


def effects(
    grouped: Mapping[str, Results], cells: Sequence[grid.Cell],
    factors: Sequence[str], metric: str, baseline: str) -> list[Effect]:
  """Returns the main effects of a grid, p values adjusted for their number.

  Each is the mean of as many differences as there are settings of the other
  factors, and so surer than a difference of two cells.

  Args:
    grouped: Of `by_cell`.
    cells: Of the sweep.
    factors: Of the sweep; with one alone, its effects are those of the cells.
    metric: Such as judge/good.
    baseline: Name of a cell.
  """
  base = next(c for c in cells if c.name == baseline).changes
  found = []
  for factor in factors if len(factors) > 1 else ():
    settings, values = {}, {}
    for cell in cells:
      if factor in cell.changes and factor in base:
        rest = repr([(k, v) for k, v in cell.changes.items() if k != factor])
        values[repr(cell.changes[factor])] = cell.changes[factor]
        settings.setdefault(rest, {})[repr(cell.changes[factor])] = cell.name
    for key, value in values.items():
      than = base[factor]
      pairs = [(grouped[names[key]], grouped[names[repr(than)]])
               for names in settings.values()
               if key != repr(than) and key in names and repr(than) in names]
      if d := difference(pairs, metric):
        found.append(Effect(factor, value, than, d))
  return [dataclasses.replace(e, difference=d) for e, d in zip(
      found, adjust([e.difference for e in found]))]


def alike(
    grouped: Mapping[str, Results], metric: str, best: str
) -> list[str]:
  """Returns the cells that cannot be told apart from the best.

  Each of them is compared with the best on the same seeds, Holm-adjusted; so is
  one without an interval.
  """
  others = [name for name, found in grouped.items() if name != best and found]
  compared = adjust([
      difference([(grouped[best], grouped[name])], metric) for name in others])
  return [name for name, d in zip(others, compared)
          if d is None or not d.beyond_chance]


def pareto(costs: Sequence[float], qualities: Sequence[float]) -> list[bool]:
  """Returns which points no other beats in both cost and quality.

  Args:
    costs: Lower is better.
    qualities: Higher is better; one a cost.
  """
  points = list(zip(costs, qualities))
  return [not any(
      c <= cost and q >= quality and (c < cost or q > quality)
      for c, q in points) for cost, quality in points]


def costs(
    grouped: Mapping[str, Results],
    metric: str,
    lower: bool,
) -> list[dict[str, Any]]:
  """Returns quality, time and memory of each cell, and who is on a front.

  Args:
    grouped: Of `by_cell`.
    metric: What quality is.
    lower: Whether less of it is better.
  """
  rows = []
  for number, (name, found) in enumerate(grouped.items(), 1):
    known = [r for r in found if metric in r.scores]
    if known:
      rows.append({
          'cell': name, 'number': number,
          'quality': float(np.mean([r.scores[metric] for r in known])),
          'seconds': float(np.mean([r.timing.seconds for r in known])),
          'gigabytes': float(np.mean([r.peak_bytes for r in known])) / 1e9,
          'trained_weights': known[0].trained_weights,
          'tokens_per_second': _mean(
              [r.tokens_per_second for r in known])})
  quality = [(-1 if lower else 1) * row['quality'] for row in rows]
  for cost, front in (('seconds', 'on_time'), ('gigabytes', 'on_memory')):
    for row, best in zip(rows, pareto(
        [row[cost] for row in rows], quality)):
      row[front] = best
  return rows


def _mean(values):
  known = [v for v in values if v is not None]
  return float(np.mean(known)) if known else None


def best_cell(rows: Sequence[Row], lower: bool) -> Row | None:
  """Returns the cell of the best mean; None if nothing is finished.

  Of equal ones the first, which is most often the baseline.
  """
  known = [row for row in rows if row.values]
  return (min if lower else max)(
      known, key=lambda row: row.mean, default=None)


def to_json(row: Row) -> dict[str, Any]:
  """Returns a row as JSON takes it."""
  return {'cell': row.cell, 'n': len(row.values), 'mean': row.mean,
          'sd': row.spread, 'values': {
              str(seed): value for seed, value in row.values.items()},
          'difference': row.difference and dataclasses.asdict(row.difference)}
