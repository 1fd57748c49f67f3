"""A comparison of runs as text, as an HTML page and as a picture."""

from typing import Sequence

from gemma_sft import pages
from gemma_sft.evaluation import compare_runs
from gemma_sft.evaluation import report

CAVEAT = ('Intervals cover the choice of records, not the seed of the'
          ' training.')


def sections(
    comparison: compare_runs.Comparison
) -> list[tuple[str, list[str], list[list[str]]]]:
  """Returns (title, header, rows) of each table that has rows."""
  names = comparison.names
  gains = [
      [row['run'], row['metric'].removeprefix('judge/').replace('_', ' '),
       *_gain(row)] for row in comparison.gains]
  tables = (
      ('Config differences that affect the result', ['key', *names],
       comparison.config),
      ('Config differences that do not affect the result', ['key', *names],
       comparison.free),
      ('Data, base, code and devices', ['', *names], comparison.origin),
      ('Result', ['', *names], comparison.results),
      (f'Scores on the {comparison.split} split',
       *(comparison.scores[:1] or [[]]), comparison.scores[1:]),
      (f'Gain over {names[0]}', ['run', 'metric', 'gain', '95 %', 'records'],
       gains))
  return [table for table in tables if table[2]]


def _gain(row):
  judged = row['metric'].startswith('judge/')
  # Adding 0 turns -0 into 0.
  gain, low, high = (
      f'{round(100 * value, 1) + 0:+.1f}' if judged else f'{value + 0:+.4g}'
      for value in (row['gain'], row.get('low', 0), row.get('high', 0)))
  if 'low' not in row:
    return [gain, compare_runs.UNKNOWN, compare_runs.UNKNOWN]
  return [gain, f'{low} to {high}', str(row['n'])]


def text(comparison: compare_runs.Comparison) -> str:
  """Returns the comparison for a terminal, as Markdown."""
  lines = [*comparison.sentences, '']
  if not comparison.config:
    lines += ['Config: no difference affects the result.', '']
  for title, header, rows in sections(comparison):
    lines += [title, '', pages.table(header, rows), '']
  if comparison.gains:
    lines.append(CAVEAT)
  return '\n'.join([*lines, *(f'note: {note}' for note in comparison.notes)])


def page(comparison: compare_runs.Comparison, image: bytes | None) -> str:
  """Returns the comparison, with `picture`, as a self-contained HTML page."""
  return pages.render(
      'evaluation/compare_page.html', comparison=comparison,
      sections=sections(comparison), caveat=CAVEAT, image=image)


_COLORS = ('#1f4e8c', '#c25b1e', '#2f7d4f', '#7a4fa3', '#8a6d00', '#555555')


def picture(runs: Sequence[compare_runs.FinishedRun]) -> bytes | None:
  """Returns a PNG of losses and the first judged metric; None without any."""
  if not any(report.has_loss(run.rows) for run in runs):
    return None
  judged = _judged(runs)
  figure, axes = pages.make_figure(2 if judged else 1, width=5.5, height=3.8)
  for i, run in enumerate(runs):
    color = _COLORS[i % len(_COLORS)]
    style = dict(color=color, linestyle='-' if i < len(_COLORS) else '--',
                 marker='o', markersize=4, label=run.name)
    report.plot(axes[0], run.rows, 'loss', color=color, alpha=0.35, linewidth=1)
    report.plot(axes[0], run.rows, 'eval/loss', **style)
    if judged:
      report.plot(axes[1], run.rows, judged, 100, **style)
  name = judged.removeprefix('eval/judge/').replace('_', ' ')
  report.label_axes(axes, 'Loss: train (thin) and validation', f'Judge: {name}')
  for axis in axes:
    if axis.get_legend_handles_labels()[0]:
      axis.legend(frameon=False, fontsize='small')
  return pages.to_png(figure)


def _judged(runs):
  """Returns the judged metric to draw: that of the best, or the headline."""
  found = report.judged_keys([row for run in runs for row in run.rows])
  wanted = [f'eval/{run.flat["eval.metric"]}' for run in runs] + [
      f'eval/judge/{s.get("headline")}' for run in runs
      for s in run.scores.values()]
  return next((key for key in [*wanted, *found] if key in found), '')
