"""The finished comparison: sweep.json, report.md and sweep.html."""

import dataclasses
import json
import os
from typing import Any
from typing import Mapping
from typing import Sequence

from gemma_sft import pages
from gemma_sft import progress
from gemma_sft.sweeping import grid
from gemma_sft.sweeping import pictures
from gemma_sft.sweeping import results as results_lib
from gemma_sft.sweeping import runs
from gemma_sft.sweeping import significance
from gemma_sft.sweeping import wording

_METHOD = (
    'Mean and standard deviation (sd) over the seeds. A gain compares runs of'
    ' the same seed and, where the judge has a verdict on each record, of the'
    ' same records; above 0 is better, also where a lower metric is better.'
    ' Intervals (95 %): for judged means, seeds and records as crossed random'
    " effects with Satterthwaite's degrees of freedom, so that they cover other"
    " seeds and other questions; for losses, Student's t over the seeds. p is"
    " adjusted by Holm's method for the number of cells, intervals are not.")
_TEST_SPLIT = (
    ' The best of several cells was chosen on the test split, so its score'
    ' there is too high: to publish it, choose with --evaluate=validation.')


@dataclasses.dataclass(frozen=True)
class Block:
  """A part of the page: a table or pictures, titles and PNGs."""

  title: str
  header: Sequence[str] = ()
  rows: Sequence[Sequence[str]] = ()
  # {index of a row: best or failed}.
  marks: Mapping[int, str] = dataclasses.field(default_factory=dict)
  pictures: Sequence[tuple[str, bytes]] = ()
  note: str = ''


def write(
    sweep: grid.Sweep, planned: Sequence[runs.PlannedRun],
    messages: Mapping[str, str], workdir: str, config: str) -> dict[str, Any]:
  """Writes and prints a comparison; returns the content of sweep.json.

  Args:
    planned: All runs of the sweep, those of other hosts too.
    messages: {workdir: why a run is not finished}.
    config: The config file, for the subtitle.
  """
  results = {run.workdir: results_lib.read(run) for run in planned}
  finished = [r for r in results.values() if r]
  grouped = significance.by_cell(finished, sweep.cells)
  metric = finished[0].headline if finished else 'loss'
  lower = finished[0].lower if finished else results_lib.LOSSES
  names = dict.fromkeys((metric, 'loss', *(
      name for r in finished for name in r.scores if name != 'judge/n')))
  tables = {name: significance.compare(grouped, name, sweep.baseline)
            for name in names}
  costs = significance.costs(grouped, metric, metric in lower)
  effects = significance.effects(
      grouped, sweep.cells, sweep.factors, metric, sweep.baseline)
  sentences = wording.sentences(
      grouped, tables[metric], metric, metric in lower, sweep.baseline, costs
  ) + wording.effects(effects, metric)
  missing = len(planned) - len(finished)
  if missing:
    sentences.insert(
        0, f'Unfinished: {missing} of {len(planned)} runs are missing.')
  summary = {
      'complete': not missing, 'sentences': sentences, 'headline': metric,
      'lower_is_better': sorted(set(lower) & set(names)),
      'split': planned[0].split or 'validation', 'baseline': sweep.baseline,
      'factors': list(sweep.factors), 'seeds': list(sweep.seeds),
      'cells': {c.name: dict(c.changes) for c in sweep.cells},
      'metrics': {name: [significance.to_json(scores) for scores in table]
                  for name, table in tables.items()},
      'effects': [dataclasses.asdict(e) for e in effects], 'costs': costs,
      'runs': [_run_summary(run, results[run.workdir], messages, workdir)
               for run in planned]}
  shown = {name: tables.pop(name) for name in dict.fromkeys((metric, 'loss'))}
  blocks = [
      _comparison(shown, summary, metric in lower),
      Block('Quality against cost',
            pictures=pictures.fronts(costs, metric, metric in lower),
            note='Filled: no other cell is both better and cheaper. Numbers'
            ' are those of the comparison. Time is that of training and'
            ' answering; memory is the most of a device, or of the process on a'
            ' CPU. Both are means over the seeds.'),
      _effects(effects, metric),
      Block('Metric against factor', pictures=[
          picture for name in shown for picture in pictures.factors(
              [(r.run.cell.changes, r.scores[name]) for r in finished
               if name in r.scores], sweep.factors, name)],
            note='A dot is a run; a line is one setting of the other factors.'),
      Block('Loss curves', pictures=pictures.curves(grouped),
            note='Mean over the seeds, and their range.'),
      Block('Other metrics', ['cell', *map(wording.label, tables)],
            [[cells[0].cell, *(wording.show(name, cell.mean)
                               for name, cell in zip(tables, cells))]
             for cells in zip(*tables.values())]),
      _runs(summary['runs'], metric)]
  n_seeds = len(sweep.seeds)
  write_files(
      workdir, subtitle=f'{config}: {len(sweep.cells)} cells, {n_seeds}'
      f' seed{"s" if n_seeds > 1 else ""}, judged on the {summary["split"]}'
      ' split', blocks=blocks, summary=summary)
  return summary


def _run_summary(run, result, messages, workdir):
  state, message = run.state(), messages.get(run.workdir, '')
  summary = {
      'cell': run.cell.name, 'seed': run.seed, 'identity': run.identity,
      'folder': os.path.relpath(run.workdir, workdir), 'message': message,
      'state': 'failed' if message and state != runs.FINISHED else state}
  if result is not None:
    summary |= {'scores': dict(result.scores)} | {
        name: getattr(result, name) for name in (
            'steps', 'seconds', 'evaluating', 'peak_bytes', 'starts',
            'tokens_per_second')}
  return summary


def _comparison(tables, summary, lower):
  header = ['cell', 'seeds']
  for name in tables:
    header += [wording.label(name), 'sd', f'gain in {wording.label(name)}',
               'p (Holm)']
  header += ['time per run', 'memory', 'trained weights']
  costs = {c['cell']: c for c in summary['costs']}
  headline, *_ = tables.values()
  best = significance.best_cell(headline, lower)
  rows = []
  for i, cells in enumerate(zip(*tables.values()), 1):
    cell = cells[0].cell
    baseline = ' (baseline)' if cell == summary['baseline'] else ''
    row = [f'{i}: {cell}{baseline}', str(len(cells[0].values))]
    for name, scores in zip(tables, cells):
      row += [wording.show(name, scores.mean),
              wording.show(name, scores.spread, 2),
              wording.show_gain(name, scores.difference),
              wording.show_p(scores.difference)]
    if cost := costs.get(cell):
      row += [progress.duration(cost['seconds'])
              + (' (front)' if cost['on_time'] else ''),
              f'{cost["gigabytes"]:.2f} GB'
              + (' (front)' if cost['on_memory'] else ''),
              f'{cost["trained_weights"]:,}']
    else:
      row += ['-'] * 3
    rows.append(row)
  marks = {headline.index(best): 'best'} if best else {}
  note = _METHOD + (_TEST_SPLIT if summary['split'] == 'test' else '')
  return Block('Comparison', header, rows, marks, note=note)


def _effects(effects, metric):
  rows = [[e.factor, grid.show_value(e.value), grid.show_value(e.than),
           wording.show_gain(metric, e.difference),
           wording.show_p(e.difference)] for e in effects]
  return Block(
      'Effects of the factors',
      ['factor', 'value', 'against', f'gain in {wording.label(metric)}',
       'p (Holm)'], rows,
      note='Each effect is the mean over all settings of the other factors, and'
      ' therefore more precise than the difference of two cells. p is adjusted'
      ' for the number of effects in this table.')


def _runs(summaries, metric):
  rows = [[
      run['cell'], str(run['seed']), run['state'],
      wording.show(metric, run.get('scores', {}).get(metric)),
      str(run.get('steps', '-')),
      progress.duration(run['seconds'] + run['evaluating'])
      if 'seconds' in run else '-',
      str(run.get('starts', '-')), run['folder'], run['message']]
          for run in summaries]
  return Block(
      'Runs', ['cell', 'seed', 'state', wording.label(metric), 'updates',
               'time', 'starts', 'folder', ''],
      rows, {i: 'failed' for i, run in enumerate(summaries)
             if run['state'] == 'failed'})


# Files -----------------------------------------------------------------------


def write_files(
    workdir: str, *, subtitle: str, blocks: Sequence[Block],
    summary: Mapping[str, Any]) -> None:
  """Writes the three files, and prints the sentences of the summary.

  Several hosts may do so at the same time.
  """
  name = os.path.basename(os.path.abspath(workdir))
  # JSON has no NaN.
  plain = json.loads(json.dumps(summary), parse_constant=lambda _: None)
  pages.write(os.path.join(workdir, 'sweep.json'),
              json.dumps(plain, indent=1, ensure_ascii=False))
  lines = [f'# {name}', '', subtitle, '']
  for sentence in summary['sentences']:
    lines += [sentence, '']
  for block in blocks:
    if block.rows:
      lines += [f'## {block.title}', '', pages.table(block.header, block.rows),
                '']
      lines += [block.note, ''] if block.note else []
  pages.write(os.path.join(workdir, 'report.md'), '\n'.join(lines))
  pages.write(os.path.join(workdir, 'sweep.html'), pages.render(
      'sweeping/sweep_page.html', name=name, subtitle=subtitle,
      sentences=summary['sentences'],
      blocks=[b for b in blocks if b.rows or b.pictures]))
  print('', *summary['sentences'], sep='\n')
