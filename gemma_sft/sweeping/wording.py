"""How a comparison is put into words: numbers, gains, sentences."""

import math
from typing import Any
from typing import Mapping
from typing import Sequence

from gemma_sft import progress
from gemma_sft.sweeping import grid
from gemma_sft.sweeping import significance


def label(metric: str) -> str:
  """Returns 'acronym gap' for judge/acronym_gap."""
  return metric.removeprefix('judge/').replace('_', ' ')


def show(metric: str, value: float | None, digits: int = 4) -> str:
  """Returns '45.2 %' for a judge's share, '2.134' for a loss, '-' for none."""
  if value is None or math.isnan(value):
    return '-'
  if metric.startswith('judge/'):
    return f'{100 * value:.1f} %'
  return f'{value:.{digits}g}'


def show_gain(
    metric: str, d: significance.Difference | None, unit: str = '') -> str:
  """Returns '+5.1 (95 %: +1.2 to +9.0)', points for a judge's share."""
  if d is None:
    return '-'
  factor, form = (100, '+.1f') if metric.startswith('judge/') else (1, '+.3g')
  mean = format(factor * d.mean, form) + unit
  if d.low is None:
    return mean
  return (f'{mean} (95 %: {format(factor * d.low, form)} to'
          f' {format(factor * d.high, form)})')


def show_p(d: significance.Difference | None) -> str:
  """Returns the adjusted p, and whether it is beyond chance."""
  if d is None or d.adjusted is None:
    return '-'
  shown = _p(d.adjusted).removeprefix('= ')
  return f'{shown} beyond chance' if d.beyond_chance else shown


def _p(p):
  return '< 0.001' if p < 0.001 else f'= {p:.3f}'


def _unit(metric):
  return ' points' if metric.startswith('judge/') else ''


def sentences(
    grouped: significance.Grouped, scores: Sequence[significance.CellScores],
    metric: str, lower_is_better: bool, baseline: str,
    costs: Sequence[Mapping[str, Any]]) -> list[str]:
  """Says which cell is best, and whether that is beyond chance."""
  best = significance.best_cell(scores, lower_is_better)
  if best is None:
    return ['No run is finished.']
  n = len(best.values)
  value = f'{label(metric)} {show(metric, best.mean)}' + (
      f' (standard deviation {show(metric, best.spread, 2)} over {n} seeds)'
      if n > 1 else ' (one seed)')
  if best.cell == baseline:
    lines = [f'The baseline, {best.cell}, is the best cell: {value}. None of'
             f' the {len(scores) - 1} others is better.']
  else:
    lines = [f'The best cell is {best.cell}: {value}'
             + _gain(metric, best.difference, scores, baseline)]
  if n == 1 and (best.difference is None or best.difference.low is not None):
    lines.append('Each cell has one seed: the intervals cover other questions,'
                 ' not other seeds. Run more with --seeds=3.')
  alike = significance.alike(grouped, metric, best.cell)
  if alike and len(scores) > 2:
    fastest = min((c for c in costs if c['cell'] in (*alike, best.cell)),
                  key=lambda c: c['seconds'])
    everyone = ' all' if fastest['cell'] == best.cell else ''
    lines.append(
        f'Not different from the best beyond chance: {"; ".join(alike)}. The'
        f' fastest of them{everyone} is {fastest["cell"]}'
        f' ({progress.duration(fastest["seconds"])} per run).')
  return lines


def _gain(metric, d, scores, baseline):
  """Continues the sentence about the best cell."""
  if d is None:
    return f'; it shares no finished seed with the baseline, {baseline}.'
  text = (f', a gain over the baseline ({baseline}) of'
          f' {show_gain(metric, d, _unit(metric))}')
  if d.adjusted is None:
    return text + ('. One seed has no interval, so this may be chance; run more'
                   ' with --seeds=3.')
  n = sum(s.difference is not None and s.difference.p is not None
          for s in scores)
  adjusted = f', adjusted for {n} comparisons' if n > 1 else ''
  return (f'{text}. This is {"" if d.beyond_chance else "not "}beyond chance'
          f' (p {_p(d.adjusted)}{adjusted}).')


def effects(found: Sequence[significance.Effect], metric: str) -> list[str]:
  """Says which factors have an effect, whatever the others are."""
  if not found:
    return []
  sure = [e for e in found if e.difference.beyond_chance]
  if not sure:
    return ['No factor has an effect beyond chance, averaged over the settings'
            ' of the others.']
  return ['Over all settings of the other factors: ' + '; '.join(
      f'{e.factor} {grid.show_value(e.value)} instead of'
      f' {grid.show_value(e.than)} '
      + ('gains ' if e.difference.mean > 0 else 'loses ')
      + show_gain(metric, e.difference).partition(' ')[0].lstrip('+-')
      + _unit(metric) for e in sure) + ' (each beyond chance).']
