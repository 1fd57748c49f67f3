"""What people read of a comparison: text, page and picture."""

import base64
import io
from typing import Sequence

from gemma_sft.evaluation import compare_runs
from gemma_sft.evaluation import report

CAVEAT = ('Intervals are over records: what another seed of the same training'
          ' would give is not in them.')


def sections(comparison: compare_runs.Comparison
             ) -> list[tuple[str, list[list[str]]]]:
  """Returns (title, table with its head) of what there is to show."""
  head = comparison.names
  gains = [
      [row['run'], row['metric'].removeprefix('judge/').replace('_', ' '),
       *_gain(row)] for row in comparison.gains]
  tables = (
      ('Config', ['key', *head], comparison.config),
      ('Config that decides nothing but which data and base are read',
       ['key', *head], comparison.free),
      ('Data, base, code and devices', ['', *head], comparison.origin),
      ('Result', ['', *head], comparison.results),
      (f'Scores of {comparison.split}', comparison.scores[:1][0]
       if comparison.scores else [], comparison.scores[1:]),
      (f'Gain over {head[0]}', ['run', 'metric', 'gain', '95 %', 'records'],
       gains))
  return [(title, [first, *rows]) for title, first, rows in tables if rows]


def _gain(row):
  judged = row['metric'].startswith('judge/')
  def number(value):
    # Adding 0 makes 0 of -0.
    return (f'{round(100 * value, 1) + 0:+.1f}' if judged
            else f'{value + 0:+.4g}')
  if 'low' not in row:
    return [number(row['gain']), compare_runs.UNKNOWN, compare_runs.UNKNOWN]
  return [number(row['gain']),
          f'{number(row["low"])} to {number(row["high"])}', str(row['n'])]


def text(comparison: compare_runs.Comparison) -> str:
  """Returns the comparison for a terminal, as Markdown."""
  lines = [*comparison.sentences, '']
  if not comparison.config:
    lines += ['Config: nothing that decides the result differs.', '']
  for title, rows in sections(comparison):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ['| ' + ' | '.join(c.ljust(w) for c, w in zip(row, widths)) + ' |'
             for row in rows]
    table.insert(1, '|' + '|'.join('-' * (w + 2) for w in widths) + '|')
    lines += [title, '', *table, '']
  if comparison.gains:
    lines.append(CAVEAT)
  return '\n'.join([*lines, *(f'note: {note}' for note in comparison.notes)])


def page(comparison: compare_runs.Comparison, image: bytes | None) -> str:
  """Returns the comparison as one HTML page without outside parts.

  Args:
    comparison: From `compare_runs.compare`.
    image: PNG of `picture`, or None.
  """
  return report.render(
      'evaluation/compare_page.html', comparison=comparison,
      sections=sections(comparison), caveat=CAVEAT,
      image=base64.b64encode(image).decode() if image else '')


_COLORS = ('#1f4e8c', '#c25b1e', '#2f7d4f', '#7a4fa3', '#8a6d00', '#555555')


def picture(runs: Sequence[compare_runs.Run]) -> bytes | None:
  """Returns a PNG of losses, and of the first judged rate; None without any."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  if not any('loss' in row or 'eval/loss' in row
             for run in runs for row in run.rows):
    return None
  judged = _judged(runs)
  figure, axes = plt.subplots(
      1, 2 if judged else 1, figsize=(11 if judged else 6, 3.8),
      squeeze=False)
  for i, run in enumerate(runs):
    color = _COLORS[i % len(_COLORS)]
    style = '-' if i < len(_COLORS) else '--'
    _plot(axes[0][0], run, 'loss', 1, color=color, alpha=0.35, linewidth=1)
    _plot(axes[0][0], run, 'eval/loss', 1, color=color, linestyle=style,
          marker='o', markersize=4, label=run.name)
    if judged:
      _plot(axes[0][1], run, judged, 100, color=color, linestyle=style,
            marker='o', markersize=4, label=run.name)
  axes[0][0].set(xlabel='updates', ylabel='loss (nats per trained token)',
                 title='Loss: train (thin) and validation', ylim=(0, None))
  if judged:
    name = judged.removeprefix('eval/judge/').replace('_', ' ')
    axes[0][1].set(xlabel='updates', ylabel='% of validation answers',
                   title=f'Judge: {name}', ylim=(0, 100))
  for axis in axes[0]:
    axis.spines[['top', 'right']].set_visible(False)
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[0]:
      axis.legend(frameon=False, fontsize='small')
  figure.tight_layout()
  buffer = io.BytesIO()
  figure.savefig(buffer, dpi=150, format='png')
  plt.close(figure)
  return buffer.getvalue()


def _judged(runs):
  """Returns the judged metric to draw: what chose the best, or the headline."""
  there = {key for run in runs for row in run.rows for key in row
           if key.startswith('eval/judge/') and key != 'eval/judge/n'}
  wanted = [f'eval/{run.flat["eval.metric"]}' for run in runs] + [
      f'eval/judge/{s.get("headline")}' for run in runs
      for s in run.scores.values()]
  return next((key for key in wanted if key in there),
              min(there, default=''))


def _plot(axis, run, key, factor, **style):
  points = [(row['step'], factor * row[key]) for row in run.rows if key in row]
  if points:
    axis.plot(*zip(*points), **style)
