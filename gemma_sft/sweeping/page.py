"""The finished comparison: sweep.json, report.md and one HTML page."""

import dataclasses
import json
import math
import os
from typing import Any
from typing import Mapping
from typing import Sequence

from gemma_sft import pages
from gemma_sft.monitor import metrics
from gemma_sft.sweeping import grid
from gemma_sft.sweeping import pictures
from gemma_sft.sweeping import results as results_lib
from gemma_sft.sweeping import runs
from gemma_sft.sweeping import significance
from gemma_sft.sweeping import wording

_METHOD = (
    'Mean and standard deviation over the seeds. Gains are of runs of the same'
    ' seed and, where the judge has a verdict on each record, of the same'
    ' records; above 0 is better, whichever way the metric runs. Intervals'
    ' (95 %): for judged means, seeds and records as crossed random effects'
    " with Satterthwaite's degrees of freedom, so that they speak of other"
    " seeds and other questions; for losses, Student's t over the seeds. p is"
    " adjusted by Holm's method for the cells compared, intervals are not.")
_FLATTERED = (
    ' The best of several cells on the test split is flattered by having been'
    ' chosen there: to publish its number, choose with --evaluate=validation.')


@dataclasses.dataclass(frozen=True)
class Block:
  """A part of the page: a table, pictures or a note.

  Attributes:
    title: Above it.
    head: Of the table.
    rows: Of the table, texts.
    classes: Of its rows: '', best or failed.
    pictures: Titles and PNGs.
    note: Below it.
  """

  title: str
  head: Sequence[str] = ()
  rows: Sequence[Sequence[str]] = ()
  classes: Sequence[str] = ()
  pictures: Sequence[tuple[str, str]] = ()
  note: str = ''


# The comparison --------------------------------------------------------------


def summarise(
    sweep: grid.Sweep,
    plan: Sequence[runs.Run],
    found: Sequence[results_lib.Result],
    messages: Mapping[str, str],
    workdir: str,
) -> dict[str, Any]:
  """Returns all that sweep.json says.

  Args:
    sweep: What was asked for.
    plan: All of its runs, those of other hosts too.
    found: The results of those that are finished.
    messages: {workdir: why a run is not finished}.
    workdir: Of the sweep.
  """
  grouped = significance.by_cell(found, sweep.cells)
  headline = found[0].headline if found else 'loss'
  lower = found[0].lower if found else results_lib.LOSSES
  names = dict.fromkeys((headline, 'loss', *(
      k for r in found for k in r.scores if k != 'judge/n')))
  tables = {name: significance.compare(grouped, name, sweep.baseline)
            for name in names}
  costs = significance.costs(grouped, headline, headline in lower)
  by_workdir = {r.run.workdir: r for r in found}
  missing = len(plan) - len(found)
  said = wording.sentences(
      grouped, tables[headline], headline, headline in lower, sweep.baseline,
      costs)
  effects = significance.effects(
      grouped, sweep.cells, sweep.factors, headline, sweep.baseline)
  said += wording.effects(effects, headline)
  if missing:
    said.insert(0, f'Unfinished: {missing} of {len(plan)} runs are missing.')
  return {
      'complete': not missing, 'sentences': said, 'headline': headline,
      'lower_is_better': sorted(set(lower) & set(names)),
      'split': plan[0].split or 'validation', 'baseline': sweep.baseline,
      'factors': list(sweep.factors), 'seeds': list(sweep.seeds),
      'cells': {c.name: dict(c.changes) for c in sweep.cells},
      'metrics': {name: [significance.to_json(row) for row in rows]
                  for name, rows in tables.items()},
      'effects': [dataclasses.asdict(e) for e in effects], 'costs': costs,
      'runs': [_run(run, by_workdir.get(run.workdir), messages, workdir)
               for run in plan]}


def _run(run, result, messages, workdir):
  row = {'cell': run.cell.name, 'seed': run.seed, 'identity': run.identity,
         'folder': os.path.relpath(run.workdir, workdir),
         'state': run.state(), 'message': messages.get(run.workdir, '')}
  if row['message']:
    row['state'] = 'failed' if row['state'] != 'finished' else row['state']
  if result is not None:
    row |= {'scores': dict(result.scores), 'steps': result.steps,
            'seconds': result.seconds, 'evaluating': result.evaluating,
            'peak_bytes': result.peak_bytes, 'starts': result.starts,
            'tokens_per_second': result.tokens_per_second}
  return row


def write(
    sweep: grid.Sweep,
    plan: Sequence[runs.Run],
    messages: Mapping[str, str],
    workdir: str,
    config: str,
) -> dict[str, Any]:
  """Writes sweep.json, report.md and sweep.html; returns what they say.

  Args:
    sweep: What was asked for.
    plan: All of its runs.
    messages: {workdir: why a run is not finished}.
    workdir: Of the sweep.
    config: The config file, for the title.
  """
  found = [r for run in plan if (r := results_lib.read(run))]
  summary = summarise(sweep, plan, found, messages, workdir)
  grouped = significance.by_cell(found, sweep.cells)
  metric = summary['headline']
  tables = {name: significance.compare(grouped, name, sweep.baseline)
            for name in (metric, 'loss')}
  blocks = [
      _table(tables, summary),
      Block('Quality against cost', pictures=pictures.fronts(
          summary['costs'], metric, metric in summary['lower_is_better']),
            note='Filled: no other cell is better and cheaper. Numbers are'
            ' those of the comparison. Time is that of'
            ' training and answering, memory the most of a device, or of the'
            ' process on a CPU; means over the seeds.'),
      _effects(sweep, grouped, metric),
      Block('Metric against factor', pictures=[
          p for name in dict.fromkeys((metric, 'loss'))
          for p in pictures.factors(grouped, sweep.factors, name)],
            note='A dot a run, a line a setting of the other factors.'),
      Block('Loss curves', pictures=pictures.curves(grouped),
            note='Mean over the seeds, and their range.'),
      _other_metrics(summary), _runs(summary)]
  write_files(
      workdir, name=os.path.basename(os.path.abspath(workdir)),
      subtitle=f'{config}: {len(sweep.cells)} cells, {len(sweep.seeds)}'
      f' seed{"s" if len(sweep.seeds) > 1 else ""}, judged on the'
      f' {summary["split"]} split', sentences=summary['sentences'],
      blocks=blocks, summary=summary)
  return summary


def _table(tables, summary):
  metric = summary['headline']
  names = list(tables)
  head = ['cell', 'seeds']
  for name in names:
    head += [pictures.label(name), 'sd', f'gain in {pictures.label(name)}',
             'p (Holm)']
  head += ['time a run', 'memory', 'trained weights']
  costs = {c['cell']: c for c in summary['costs']}
  best = significance.best_cell(
      tables[metric], metric in summary['lower_is_better'])
  rows, classes = [], []
  for i, row in enumerate(tables[metric]):
    is_base = row.cell == summary['baseline']
    line = [f'{i + 1}: {row.cell}' + (' (baseline)' if is_base else ''),
            str(len(row.values))]
    for name in names:
      of = tables[name][i]
      line += [wording.show(name, of.mean), wording.show(name, of.spread, 2),
               wording.show_gain(name, of.difference),
               wording.show_p(of.difference)]
    cost = costs.get(row.cell)
    line += ['-'] * 3 if cost is None else [
        metrics.duration(cost['seconds'])
        + (' (front)' if cost['on_time'] else ''),
        f'{cost["gigabytes"]:.2f} GB'
        + (' (front)' if cost['on_memory'] else ''),
        f'{cost["trained_weights"]:,}']
    rows.append(line)
    classes.append('best' if best and row.cell == best.cell else '')
  note = _METHOD + (_FLATTERED if summary['split'] == 'test' else '')
  return Block('Comparison', head, rows, classes, note=note)


def _effects(sweep, grouped, metric):
  rows = [[e.factor, grid.show_value(e.value), grid.show_value(e.than),
           wording.show_gain(metric, e.difference),
           wording.show_p(e.difference)]
          for e in significance.effects(
              grouped, sweep.cells, sweep.factors, metric, sweep.baseline)]
  return Block(
      'Effects of the factors', ['factor', 'value', 'against',
                                 f'gain in {pictures.label(metric)}',
                                 'p (Holm)'], rows, [''] * len(rows),
      note='Each the mean over all settings of the other factors, and so surer'
      ' than the difference of two cells; p adjusted for the effects in this'
      ' table.')


def _other_metrics(summary):
  names = [n for n in summary['metrics'] if n not in (
      summary['headline'], 'loss')]
  rows = [[cell, *(
      wording.show(n, next(r for r in summary['metrics'][n]
                   if r['cell'] == cell)['mean']) for n in names)]
          for cell in summary['cells']]
  return Block('Other metrics', ['cell', *map(pictures.label, names)],
               rows if names else [], [''] * len(rows))


def _runs(summary):
  metric = summary['headline']
  rows, classes = [], []
  for run in summary['runs']:
    scores = run.get('scores', {})
    rows.append([
        run['cell'], str(run['seed']), run['state'],
        wording.show(metric, scores.get(metric)), str(run.get('steps', '-')),
        metrics.duration(run['seconds'] + run['evaluating'])
        if 'seconds' in run else '-',
        str(run.get('starts', '-')), run['folder'], run['message']])
    classes.append('failed' if run['state'] == 'failed' else '')
  return Block('Runs', ['cell', 'seed', 'state', pictures.label(metric),
                        'updates', 'time', 'starts', 'folder', ''],
               rows, classes)


# Files -----------------------------------------------------------------------


def write_files(
    workdir: str,
    *,
    name: str,
    subtitle: str,
    sentences: Sequence[str],
    blocks: Sequence[Block],
    summary: Mapping[str, Any],
) -> None:
  """Writes the three files, each at once: hosts may do it at the same time.

  Args:
    workdir: Of the sweep.
    name: The title.
    subtitle: Below it.
    sentences: What came of it, in plain words.
    blocks: Tables and pictures.
    summary: For sweep.json.
  """
  _replace(os.path.join(workdir, 'sweep.json'), json.dumps(
      _without_nan(summary), indent=1, ensure_ascii=False))
  lines = [f'# {name}', '', subtitle, '']
  for text in sentences:
    lines += [text, '']
  for block in blocks:
    if block.rows:
      lines += [f'## {block.title}', '', markdown(block), '']
      lines += [block.note, ''] if block.note else []
  _replace(os.path.join(workdir, 'report.md'), '\n'.join(lines))
  _replace(os.path.join(workdir, 'sweep.html'), html(
      name, subtitle, sentences, blocks))


def markdown(block: Block) -> str:
  """Returns a block's table in Markdown."""
  table = [[cell.replace('|', r'\|') for cell in row]
           for row in (block.head, *block.rows)]
  widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
  lines = ['| ' + ' | '.join(c.ljust(w) for c, w in zip(row, widths)) + ' |'
           for row in table]
  lines.insert(1, '|' + '|'.join('-' * (w + 2) for w in widths) + '|')
  return '\n'.join(lines)


def html(name: str, subtitle: str, sentences: Sequence[str],
         blocks: Sequence[Block]) -> str:
  """Returns the page, without outside parts; see `write_files`."""
  return pages.render(
      'sweeping/sweep_page.html', name=name, subtitle=subtitle,
      sentences=sentences, blocks=[b for b in blocks if b.rows or b.pictures])


def _without_nan(value):
  """JSON has no NaN; browsers and jq refuse it."""
  if isinstance(value, float) and not math.isfinite(value):
    return None
  if isinstance(value, Mapping):
    return {k: _without_nan(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_without_nan(v) for v in value]
  return value


def _replace(path, text):
  temporary = f'{path}.{os.getpid()}.tmp'
  with open(temporary, 'w', encoding='utf-8') as file:
    file.write(text)
  os.replace(temporary, path)
