"""Pictures of a sweep: titles with PNGs in base64."""

import base64
import collections
import io
from typing import Any
from typing import Mapping
from typing import Sequence

import numpy as np

from gemma_sft.sweeping import grid
from gemma_sft.sweeping import results as results_lib

Grouped = Mapping[str, Sequence[results_lib.Result]]
# A title, and a PNG in base64.
Picture = tuple[str, str]
# More lines than this are not told apart by a legend; names longer than this
# are numbers in a picture, and take a line of a legend each.
_NAMED, _LONG = 16, 20


def label(metric: str) -> str:
  """Returns 'acronym gap' for judge/acronym_gap."""
  return metric.removeprefix('judge/').replace('_', ' ')


def scaled(metric: str, value: float) -> float:
  """Returns a judge's share in per cent, anything else as it is."""
  return 100 * value if metric.startswith('judge/') else value


def _plot(height=3.5):
  """Returns a figure and its axis, as wide as a phone can show."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  return plt.subplots(figsize=(5, height), layout='constrained')


def _finish(figure, axis) -> str:
  from matplotlib import pyplot as plt

  axis.spines[['top', 'right']].set_visible(False)
  axis.grid(alpha=0.25)
  buffer = io.BytesIO()
  # No metadata: the same results give the same bytes.
  figure.savefig(buffer, dpi=150, metadata={'Software': None})
  plt.close(figure)
  return base64.b64encode(buffer.getvalue()).decode()


def colors(names: Sequence[str]) -> dict[str, Any]:
  """Returns a colour for each cell, the same in all pictures."""
  import matplotlib

  if len(names) <= 10:
    return dict(zip(names, matplotlib.colormaps['tab10'].colors))
  return dict(zip(names, matplotlib.colormaps['turbo'](
      np.linspace(0.05, 0.95, len(names)))))


def curves(grouped: Grouped) -> list[Picture]:
  """Draws training and validation loss of each cell: mean and range of seeds.

  Args:
    grouped: Of `significance.by_cell`.
  """
  found = {name: rs for name, rs in grouped.items() if rs}
  chosen, pictures = colors(list(found)), []
  for kind in ('train', 'validation'):
    if not any(getattr(r, kind) for rs in found.values() for r in rs):
      continue
    named = len(found) <= _NAMED
    columns = 1 if max(map(len, found)) > _LONG else 2
    figure, axis = _plot(
        3.5 + (0.2 * len(found) / columns if named else 0))
    for name, rs in found.items():
      at = collections.defaultdict(list)
      for result in rs:
        for step, value in getattr(result, kind):
          at[step].append(value)
      steps = sorted(at)
      axis.plot(steps, [np.mean(at[s]) for s in steps], color=chosen[name],
                linewidth=1.4, label=name,
                marker='o' if kind == 'validation' else None, markersize=3)
      if len(rs) > 1:
        axis.fill_between(
            steps, [min(at[s]) for s in steps], [max(at[s]) for s in steps],
            color=chosen[name], alpha=0.15, linewidth=0)
    axis.set(xlabel='updates', ylabel='loss (nats per trained token)')
    if named:
      figure.legend(frameon=False, fontsize='small', ncols=columns,
                    loc='outside lower center')
    pictures.append((f'{kind} loss', _finish(figure, axis)))
  return pictures


def factors(
    grouped: Grouped, names: Sequence[str], metric: str) -> list[Picture]:
  """Draws a metric against each factor: a dot a run, a line a setting.

  Args:
    grouped: Of `significance.by_cell`.
    names: The factors.
    metric: Such as judge/good.

  Returns:
    One picture a factor with more than one value.
  """
  every = [r for rs in grouped.values() for r in rs if metric in r.scores]
  pictures = []
  for factor in names:
    changes = [r.run.cell.changes for r in every]
    values = list(dict.fromkeys(
        repr(c[factor]) for c in changes if factor in c))
    if len(values) < 2:
      continue
    raw = {repr(c[factor]): c[factor] for c in changes if factor in c}
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool)
                  for v in raw.values())
    if numbers:
      values.sort(key=lambda v: raw[v])
    x = {v: raw[v] if numbers else i for i, v in enumerate(values)}
    figure, axis = _plot()
    lines = collections.defaultdict(lambda: collections.defaultdict(list))
    for result in every:
      rest = {k: v for k, v in result.run.cell.changes.items() if k != factor}
      if factor in result.run.cell.changes:
        lines[repr(rest)][repr(result.run.cell.changes[factor])].append(
            scaled(metric, result.scores[metric]))
    for (_, points), color in zip(lines.items(), _cycle(len(lines))):
      at = [v for v in values if v in points]
      axis.plot([x[v] for v in at], [np.mean(points[v]) for v in at],
                color=color, linewidth=1)
      for v in at:
        axis.plot([x[v]] * len(points[v]), points[v], 'o', color=color,
                  markersize=4, alpha=0.7)
    spread = [abs(v) for v in x.values()]
    if numbers and min(spread) > 0 and max(spread) / min(spread) >= 10:
      axis.set_xscale('log')
    elif not numbers or len(values) <= 6:
      axis.set_xticks([x[v] for v in values],
                      [grid.show_value(raw[v]) for v in values])
    axis.set(xlabel=factor, ylabel=axis_label(metric))
    pictures.append(
        (f'{label(metric)} against {factor}', _finish(figure, axis)))
  return pictures


def _cycle(n):
  import matplotlib

  if n <= 10:
    return matplotlib.colormaps['tab10'].colors[:n]
  return ['#1f4e8c'] * n


def axis_label(metric: str) -> str:
  """Returns 'good (%)' or 'loss'."""
  return label(metric) + (' (%)' if metric.startswith('judge/') else '')


def fronts(points: Sequence[Mapping[str, Any]], metric: str, lower: bool
           ) -> list[Picture]:
  """Draws quality against time and against memory, the fronts as lines.

  Args:
    points: Of `significance.costs`.
    metric: What quality is.
    lower: Whether less of it is better.
  """
  cells = [p['cell'] for p in points]
  chosen, pictures, names = colors(cells), [], {}
  if len(cells) <= 6 and max(map(len, cells), default=0) <= _LONG:
    names = dict(zip(cells, cells))
  elif len(cells) <= 40:
    names = {p['cell']: str(p['number']) for p in points}
  for cost, front, name in (
      ('seconds', 'on_time', 'training and answering (s)'),
      ('gigabytes', 'on_memory', 'peak memory (GB)')):
    if not points:
      continue
    figure, axis = _plot()
    for point in points:
      y = scaled(metric, point['quality'])
      axis.plot(point[cost], y, 'o', color=chosen[point['cell']], markersize=7,
                markerfacecolor=chosen[point['cell']] if point[front]
                else 'none')
      if names:
        axis.annotate(names[point['cell']], (point[cost], y), xytext=(5, 4),
                      textcoords='offset points', fontsize=8)
    best = sorted((p for p in points if p[front]), key=lambda p: p[cost])
    axis.plot([p[cost] for p in best],
              [scaled(metric, p['quality']) for p in best],
              color='#777777', linewidth=1, linestyle='--', zorder=0)
    axis.margins(0.2, 0.12)
    axis.ticklabel_format(useOffset=False)
    axis.set(xlabel=name, ylabel=axis_label(metric) + (
        ', lower is better' if lower else ''))
    pictures.append((f'{label(metric)} against {name}', _finish(figure, axis)))
  return pictures


def trials(rows: Sequence[Mapping[str, Any]], metric: str, lower: bool
           ) -> list[Picture]:
  """Draws the value of each trial of a search, and the best so far.

  Args:
    rows: Of `search.rows`.
    metric: Of the values.
    lower: Whether less is better.
  """
  done = [r for r in rows if r['value'] is not None]
  if not done:
    return []
  (figure, axis), best, at = _plot(), [], []
  for row in done:
    complete = row['state'] == 'complete'
    axis.plot(row['number'], scaled(metric, row['value']), 'o',
              color='#1f4e8c' if complete else '#aaaaaa', markersize=5)
    if complete:
      values = best[-1:] + [scaled(metric, row['value'])]
      best.append(min(values) if lower else max(values))
      at.append(row['number'])
  axis.step(at, best, where='post', color='#c25b1e', linewidth=1.2,
            label='best so far')
  axis.legend(frameon=False, fontsize='small')
  axis.set(xlabel='trial (grey: pruned)', ylabel=axis_label(metric))
  return [('trials', _finish(figure, axis))]


def parameters(rows: Sequence[Mapping[str, Any]], metric: str
               ) -> list[Picture]:
  """Draws the value of each complete trial against each parameter.

  Args:
    rows: Of `search.rows`.
    metric: Of the values.
  """
  done = [r for r in rows if r['state'] == 'complete']
  pictures = []
  for name in (done[0]['parameters'] if done else ()):
    values = [r['parameters'][name] for r in done]
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool)
                  for v in values)
    shown = [v if numbers else grid.show_value(v) for v in values]
    figure, axis = _plot()
    axis.plot(shown, [scaled(metric, r['value']) for r in done], 'o',
              color='#1f4e8c', markersize=5)
    if numbers and min(values) > 0 and max(values) / min(values) >= 10:
      axis.set_xscale('log')
    axis.set(xlabel=name, ylabel=axis_label(metric))
    pictures.append((f'{label(metric)} against {name}', _finish(figure, axis)))
  return pictures
