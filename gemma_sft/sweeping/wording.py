"""What is said of a comparison: numbers, gains, sentences."""

import math
from typing import Any
from typing import Mapping
from typing import Sequence

from gemma_sft.monitor import metrics
from gemma_sft.sweeping import grid
from gemma_sft.sweeping import pictures
from gemma_sft.sweeping import significance


def show(metric: str, value: float | None, digits: int = 4) -> str:
  """Returns '45.2 %' for a judge's share, '2.134' for a loss, '-' for none."""
  if value is None or math.isnan(value):
    return '-'
  if metric.startswith('judge/'):
    return f'{100 * value:.1f} %'
  return f'{value:.{digits}g}'


def show_gain(metric: str, d: significance.Difference | None) -> str:
  """Returns '+5.1 (95 %: +1.2 to +9.0)', points for a judge's share."""
  if d is None:
    return '-'
  factor, form = (100, '+.1f') if metric.startswith('judge/') else (1, '+.3g')
  text = format(factor * d.mean, form)
  if d.low is None:
    return text
  return (f'{text} (95 %: {format(factor * d.low, form)} to'
          f' {format(factor * d.high, form)})')


def show_p(d: significance.Difference | None) -> str:
  """Returns the adjusted p and what it says."""
  if d is None or d.adjusted is None:
    return '-'
  shown = '< 0.001' if d.adjusted < 0.001 else f'{d.adjusted:.3f}'
  return f'{shown} beyond chance' if d.beyond_chance else shown


def sentences(
    grouped: Mapping[str, significance.Results],
    rows: Sequence[significance.Row],
    metric: str,
    lower: bool,
    baseline: str,
    costs: Sequence[Mapping[str, Any]],
) -> list[str]:
  """Says which cell is best, and whether that is beyond chance.

  Args:
    grouped: Of `significance.by_cell`.
    rows: Of `significance.compare`, of the metric.
    metric: The headline.
    lower: Whether less of it is better.
    baseline: Name of a cell.
    costs: Of `significance.costs`.
  """
  best = significance.best_cell(rows, lower)
  if best is None:
    return ['No run is finished.']
  n = len(best.values)
  numbers = f'{pictures.label(metric)} {show(metric, best.mean)}'
  numbers += (f' (standard deviation {show(metric, best.spread, 2)} over'
              f' {n} seeds)' if n > 1 else ' (one seed)')
  compared = [r for r in rows if r.difference and r.difference.p is not None]
  said = []
  if best.cell == baseline:
    said.append(f'The baseline, {best.cell}, is the best cell: {numbers}.'
                f' None of the {len(rows) - 1} others is better.')
  else:
    d, text = best.difference, f'The best cell is {best.cell}: {numbers}'
    if d is None:
      text += f'; it shares no finished seed with the baseline, {baseline}.'
    else:
      unit = ' points' if metric.startswith('judge/') else ''
      text += (f', a gain over the baseline ({baseline}) of'
               f' {show_gain(metric, d).replace(" (", unit + " (", 1)}'
               + (unit if d.low is None else ''))
      if d.adjusted is None:
        text += ('. One seed has no interval: whether it is chance is not'
                 ' known; run more with --seeds=3.')
      elif d.beyond_chance:
        text += (f'. This is beyond chance (p {_equals(d.adjusted)}'
                 f'{_holm(compared)}).')
      else:
        text += (f'. This is not beyond chance (p {_equals(d.adjusted)}'
                 f'{_holm(compared)}).')
    said.append(text)
  if n == 1 and (best.difference is None or best.difference.low is not None):
    said.append('Each cell has one seed: intervals speak of other questions,'
                ' not of other seeds. Run more with --seeds=3.')
  alike = significance.alike(grouped, metric, best.cell)
  if alike and len(rows) > 2:
    cheap = min((c for c in costs if c['cell'] in (*alike, best.cell)),
                key=lambda c: c['seconds'])
    said.append(
        f'Not told apart from the best: {"; ".join(alike)}. The quickest of'
        f' them{" all" if cheap["cell"] == best.cell else ""} is'
        f' {cheap["cell"]} ({metrics.duration(cheap["seconds"])} a run).')
  return said


def _equals(p):
  return '< 0.001' if p < 0.001 else f'= {p:.3f}'


def _holm(compared):
  n = len(compared)
  return f', adjusted for {n} comparisons' if n > 1 else ''


def effects(found: Sequence[significance.Effect], metric: str) -> list[str]:
  """Says which factors matter, whatever the others are.

  Args:
    found: Of `significance.effects`; none with one factor.
    metric: What they are effects on.
  """
  sure = [e for e in found if e.difference.beyond_chance]
  if not found:
    return []
  if not sure:
    return ['No factor has an effect beyond chance over the settings of the'
            ' others.']
  unit = ' points' if metric.startswith('judge/') else ''
  return ['Over all settings of the other factors: ' + '; '.join(
      f'{e.factor} {grid.show_value(e.value)} instead of'
      f' {grid.show_value(e.than)} '
      + ('gains ' if e.difference.mean > 0 else 'loses ')
      + show_gain(metric, e.difference).partition(' ')[0].lstrip('+-') + unit
      for e in sure) + ' (each beyond chance).']
