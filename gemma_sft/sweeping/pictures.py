"""Figures of a sweep: each a title and a PNG."""

import collections
from typing import Any
from typing import Mapping
from typing import Sequence

import numpy as np

from gemma_sft import pages
from gemma_sft.sweeping import grid
from gemma_sft.sweeping import significance
from gemma_sft.sweeping import wording

Picture = tuple[str, bytes]
_BLUE, _ORANGE, _GREY = '#1f4e8c', '#c25b1e', '#aaaaaa'
# A legend has at most so many entries. Names longer than this are numbers in a
# figure, and take a line of the legend each.
_MAX_LEGEND, _LONG_NAME = 16, 20


def _scaled(metric: str, value: float) -> float:
  """Returns a judge's share in per cent, anything else unchanged."""
  return 100 * value if metric.startswith('judge/') else value


def _axis_label(metric: str) -> str:
  """Returns 'good (%)' or 'loss'."""
  return wording.label(metric) + (
      ' (%)' if metric.startswith('judge/') else '')


def _are_numbers(values):
  return all(isinstance(v, (int, float)) and not isinstance(v, bool)
             for v in values)


def _use_log_scale(values):
  """Returns whether numbers span at least a factor of ten."""
  sizes = [abs(v) for v in values]
  return min(sizes) > 0 and max(sizes) / min(sizes) >= 10


def _colors(names: Sequence[str]) -> dict[str, Any]:
  """Returns {cell: colour}, the same in all figures."""
  import matplotlib

  if len(names) <= 10:
    return dict(zip(names, matplotlib.colormaps['tab10'].colors))
  return dict(zip(names, matplotlib.colormaps['turbo'](
      np.linspace(0.05, 0.95, len(names)))))


def curves(grouped: significance.Grouped) -> list[Picture]:
  """Draws each cell's training and validation loss: mean and range of seeds."""
  finished = {name: results for name, results in grouped.items() if results}
  colors, pictures = _colors(list(finished)), []
  for kind in ('train', 'validation'):
    if not any(getattr(r, kind) for rs in finished.values() for r in rs):
      continue
    has_legend = len(finished) <= _MAX_LEGEND
    columns = 1 if max(map(len, finished)) > _LONG_NAME else 2
    figure, (axis,) = pages.make_figure(
        height=3.5 + (0.2 * len(finished) / columns if has_legend else 0))
    for name, results in finished.items():
      losses = collections.defaultdict(list)
      for result in results:
        for step, loss in getattr(result, kind):
          losses[step].append(loss)
      steps = sorted(losses)
      axis.plot(
          steps, [np.mean(losses[s]) for s in steps], color=colors[name],
          linewidth=1.4, label=name,
          marker='o' if kind == 'validation' else None, markersize=3)
      if len(results) > 1:
        axis.fill_between(
            steps, [min(losses[s]) for s in steps],
            [max(losses[s]) for s in steps], color=colors[name], alpha=0.15,
            linewidth=0)
    axis.set(xlabel='updates', ylabel='loss (nats per trained token)')
    if has_legend:
      figure.legend(frameon=False, fontsize='small', ncols=columns,
                    loc='outside lower center')
    pictures.append((f'{kind} loss', pages.to_png(figure)))
  return pictures


def factors(
    scored: Sequence[tuple[Mapping[str, Any], float]], names: Sequence[str],
    metric: str) -> list[Picture]:
  """Draws a metric against each factor that has more than one value.

  A dot is a run, by its {factor: value} and its score; a line joins the runs
  that differ in this factor alone.
  """
  pictures = []
  for factor in names:
    # By their texts, because a value may be unhashable.
    values = {repr(changes[factor]): changes[factor]
              for changes, _ in scored if factor in changes}
    if len(values) < 2:
      continue
    numbers = _are_numbers(values.values())
    if numbers:
      values = dict(sorted(values.items(), key=lambda item: item[1]))
    x = {key: value if numbers else i
         for i, (key, value) in enumerate(values.items())}
    lines = collections.defaultdict(lambda: collections.defaultdict(list))
    for changes, score in scored:
      if factor in changes:
        others = {k: v for k, v in changes.items() if k != factor}
        lines[repr(others)][repr(changes[factor])].append(
            _scaled(metric, score))
    figure, (axis,) = pages.make_figure()
    few = len(lines) <= 10 and len(lines) < len(scored)
    colors = _colors(list(lines)) if few else {}
    for others, points in lines.items():
      color = colors.get(others, _BLUE)
      keys = [key for key in values if key in points]
      axis.plot([x[key] for key in keys],
                [np.mean(points[key]) for key in keys], color=color,
                linewidth=1)
      for key in keys:
        axis.plot([x[key]] * len(points[key]), points[key], 'o', color=color,
                  markersize=4, alpha=0.7)
    if numbers and _use_log_scale(x.values()):
      axis.set_xscale('log')
    elif not numbers or len(values) <= 6:
      axis.set_xticks(list(x.values()), map(grid.show_value, values.values()))
    pictures.append(_against(metric, factor, axis, figure))
  return pictures


def _against(metric, name, axis, figure, note=''):
  """Labels the axes, and returns the picture of a metric against a name."""
  axis.set(xlabel=name, ylabel=_axis_label(metric) + note)
  return f'{wording.label(metric)} against {name}', pages.to_png(figure)


def fronts(
    costs: Sequence[Mapping[str, Any]], metric: str, lower_is_better: bool
) -> list[Picture]:
  """Draws quality against time and against memory, the fronts as lines."""
  if not costs:
    return []
  cells = [c['cell'] for c in costs]
  colors, pictures, names = _colors(cells), [], {}
  if len(cells) <= 6 and max(map(len, cells)) <= _LONG_NAME:
    names = dict(zip(cells, cells))
  elif len(cells) <= 40:
    names = {c['cell']: str(c['number']) for c in costs}
  for key, on_front, title in (
      ('seconds', 'on_time', 'training and answering (s)'),
      ('gigabytes', 'on_memory', 'peak memory (GB)')):
    points = sorted((c[key], _scaled(metric, c['quality']), c[on_front],
                     c['cell']) for c in costs)
    figure, (axis,) = pages.make_figure()
    for x, y, filled, cell in points:
      axis.plot(x, y, 'o', color=colors[cell], markersize=7,
                markerfacecolor=colors[cell] if filled else 'none')
      if names:
        axis.annotate(names[cell], (x, y), xytext=(5, 4),
                      textcoords='offset points', fontsize=8)
    axis.plot([x for x, _, filled, _ in points if filled],
              [y for _, y, filled, _ in points if filled],
              color='#777777', linewidth=1, linestyle='--', zorder=0)
    axis.margins(0.2, 0.12)
    axis.ticklabel_format(useOffset=False)
    pictures.append(_against(
        metric, title, axis, figure,
        ', lower is better' if lower_is_better else ''))
  return pictures


def trials(
    rows: Sequence[Mapping[str, Any]], metric: str, lower_is_better: bool
) -> list[Picture]:
  """Draws the value of each trial of a search, and the best so far."""
  done = [r for r in rows if r['value'] is not None]
  if not done:
    return []
  (figure, (axis,)), best, numbers = pages.make_figure(), [], []
  for row in done:
    value, complete = _scaled(metric, row['value']), row['state'] == 'complete'
    axis.plot(row['number'], value, 'o', color=_BLUE if complete else _GREY,
              markersize=5)
    if complete:
      best.append((min if lower_is_better else max)([*best[-1:], value]))
      numbers.append(row['number'])
  axis.step(numbers, best, where='post', color=_ORANGE, linewidth=1.2,
            label='best so far')
  axis.legend(frameon=False, fontsize='small')
  axis.set(xlabel='trial (grey: pruned)', ylabel=_axis_label(metric))
  return [('trials', pages.to_png(figure))]
