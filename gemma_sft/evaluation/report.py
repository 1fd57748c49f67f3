"""The report of an evaluation: scores with intervals, gains, and pages."""

import itertools
import json
import os
import pathlib
from typing import Any
from typing import Mapping
from typing import Sequence

import numpy as np

from gemma_sft import pages
from gemma_sft.evaluation import intervals
from gemma_sft.monitor import metrics

# The number of judged records, which is not a metric.
_COUNT = 'judge/n'
_KINDS = ('base', 'few', 'rag', 'tuned', 'llama.cpp')
# Losses that stand beside the judge's metrics; less is better.
_LOSSES = ('loss', 'perplexity', 'bits_per_byte', 'bits_per_character')
# Only results whose answers were decoded with equal settings are compared.
DECODING = ('temperature', 'repetition_penalty', 'max_new_tokens')

Results = Mapping[str, Mapping[str, Any]]


def read_results(folder: str, split: str) -> dict[str, dict[str, Any]]:
  """Returns what `evaluate` wrote, by name, in the order of `_KINDS`."""
  results = {}
  for path in pathlib.Path(folder).glob(f'{split}-*.json'):
    result = json.loads(path.read_text('utf-8'))
    results[result.get('name', path.stem[len(split) + 1:])] = result
  return dict(sorted(results.items(), key=lambda item: _rank(item[0])))


def _rank(name):
  kind, _, n = name.partition(':')
  return (*_KINDS, kind).index(kind), int(n or 0), name


def _decoding(result):
  return tuple(result.get(name) for name in DECODING)


def _sign(result, key):
  """Returns 1 where more is better, -1 where less is."""
  lower = key in _LOSSES or (
      key.removeprefix('judge/') in result.get('lower_is_better', ()))
  return -1 if lower else 1


def _baselines(results):
  """Returns the results that the tuned one can be compared with."""
  return {name: result for name, result in results.items()
          if name not in ('tuned', 'llama.cpp')
          and _decoding(result) == _decoding(results.get('tuned', {}))}


def row_values(result: Mapping[str, Any], key: str) -> dict[str, float]:
  """Returns {record: value} of a metric such as judge/strict.

  Empty unless the metric is a mean over the records. Losses and totals such as
  BLEU over a corpus are not.
  """
  kind, _, name = key.partition('/')
  values = {
      row['where']: float(row['verdict'][name])
      for row in result.get('answers', ())
      if isinstance(row['verdict'].get(name), (bool, int, float))}
  total = result['scores'].get(key)
  is_mean = kind == 'judge' and values and total is not None and abs(
      sum(values.values()) / len(values) - total) <= 1e-6
  return values if is_mean else {}


def interval_of(
    result: Mapping[str, Any], key: str
) -> tuple[int, tuple[float, float]] | None:
  """Returns (n, 95 % interval) of a metric, or None if it has none.

  Wilson's interval for rates of yes and no, a bootstrap for other means.
  """
  scores = list(row_values(result, key).values())
  n = len(scores)
  if set(scores) <= {0.0, 1.0}:
    return (n, intervals.wilson(sum(scores) / n, n)) if scores else None
  return n, intervals.bootstrap(scores)


def gains(results: Results) -> list[dict[str, Any]]:
  """Returns how much better tuning is than each baseline, metric by metric.

  A row has metric, than (the baseline) and gain, which is above 0 if tuning is
  better, whether more or less of the metric is good. If the metric is a mean
  over records, the row also has n and a 95 % interval from low to high, a
  bootstrap of the differences on the same records. Results decoded with other
  settings are left out.
  """
  rows = []
  mine = results.get('tuned', {'scores': {}})
  for other, theirs in _baselines(results).items():
    for key, value in mine['scores'].items():
      if key == _COUNT or key not in theirs['scores']:
        continue
      sign = _sign(mine, key)
      row = dict(metric=key, than=other,
                 gain=sign * (value - theirs['scores'][key]))
      a, b = row_values(mine, key), row_values(theirs, key)
      if shared := sorted(a.keys() & b.keys()):
        differences = [sign * (a[w] - b[w]) for w in shared]
        low, high = intervals.bootstrap(differences)
        row |= dict(gain=float(np.mean(differences)), low=low, high=high,
                    n=len(shared))
      rows.append(row)
  return rows


def sentence(results: Results) -> str:
  """Returns in words whether tuning beats prompting, or '' if unknown."""
  tuned, best = results.get('tuned', {}), _best(results)
  key = f'judge/{tuned.get("headline", "")}'
  row = next((row for row in gains(results)
              if (row['metric'], row['than']) == (key, best)), None)
  if row is None:
    return ''
  what = ('the untouched model' if best == 'base' else
          f'the best prompting ({best})')
  numbers = (f'{_label(key)} {tuned["scores"][key]:.1%} against'
             f' {results[best]["scores"][key]:.1%}')
  if 'low' not in row:
    return f'Tuning against {what}: {numbers}; no interval for this metric.'
  numbers += (f', a gain of {100 * row["gain"]:.1f} points (95 %:'
              f' {100 * row["low"]:.1f} to {100 * row["high"]:.1f}) on'
              f' {row["n"]} records')
  if row['low'] > 0:
    return f'Tuning beats {what}: {numbers}.'
  if row['high'] < 0:
    return f'{what[0].upper()}{what[1:]} beats tuning: {numbers}.'
  return f'Tuning and {what} cannot be told apart: {numbers}.'


# The table -------------------------------------------------------------------


def table(folder: str, split: str) -> str:
  """Returns the Markdown table of a split's scores, base beside tuned."""
  header, *rows = cells(read_results(folder, split), split)
  return pages.table(header, rows)


def cells(results: Results, split: str) -> list[list[str]]:
  """Returns the rows of the table of scores, the header first."""
  keys = list(dict.fromkeys(
      k for r in results.values() for k in r['scores'] if k != _COUNT))
  gained = {(r['metric'], r['than']): r for r in gains(results)}
  best = _best(results)
  rows = [[f'{split} split', *results]]
  for key in keys:
    rows.append([_label(key), *(_cell(r, key) for r in results.values())])
  if best:
    rows[0].append(f'gain over {best}')
    for key, row in zip(keys, rows[1:]):
      row.append(_gain_cell(gained.get((key, best)), key))
  for name in ('records', 'weights'):
    rows.append([name, *(str(r[name]) for r in results.values())])
  if len(set(map(_decoding, results.values()))) > 1:
    rows.append(['decoding', *(
        f'temperature {r.get("temperature")}, penalty'
        f' {r.get("repetition_penalty")}, {r.get("max_new_tokens")} tokens'
        for r in results.values())])
  return [row + [''] * (len(rows[0]) - len(row)) for row in rows]


def _best(results):
  """Returns the baseline that is best by the headline, or ''."""
  if 'tuned' not in results:
    return ''
  against = _baselines(results)
  key = f'judge/{results["tuned"].get("headline", "")}'
  scores = {name: _sign(results['tuned'], key) * result['scores'][key]
            for name, result in against.items() if key in result['scores']}
  return max(scores, key=scores.get, default=next(iter(against), ''))


def _label(key):
  return key.removeprefix('judge/').replace('_', ' ')


def _cell(result, key):
  if key not in result['scores']:
    return '-'
  value = result['scores'][key]
  if not key.startswith('judge/'):
    return f'{value:.4g}'
  found = interval_of(result, key)
  if found is None:
    return f'{value:.1%}'
  n, (low, high) = found
  count = f'{round(value * n)} of {n}; '
  if abs(value * n - round(value * n)) > 1e-6:  # Not a rate of yes and no.
    count = ''
  return f'{value:.1%} ({count}95 %: {low:.0%} to {high:.0%})'


def _gain_cell(row, key):
  if row is None:
    return '-'
  if not key.startswith('judge/'):
    return f'{row["gain"] + 0:+.4g}'  # Adding 0 turns -0 into 0.
  text = f'{100 * row["gain"]:+.1f}'
  if 'low' in row:
    text += f' (95 %: {100 * row["low"]:+.0f} to {100 * row["high"]:+.0f})'
  return text


# The pages -------------------------------------------------------------------


def write(workdir: str, split: str) -> str:
  """Writes eval.json and the report; returns the path of report.html."""
  folder = os.path.join(workdir, 'report')
  os.makedirs(folder, exist_ok=True)
  evaluation = os.path.join(workdir, 'evaluation')
  results = read_results(evaluation, split)
  name = os.path.basename(os.path.normpath(workdir))
  pages.write(os.path.join(evaluation, 'eval.json'), json.dumps({
      'split': split, 'sentence': sentence(results),
      'results': {n: _summary(r) for n, r in results.items()},
      'gains': gains(results)}, indent=1, ensure_ascii=False))
  samples = [{'name': label, **sample} for label, result in results.items()
             for sample in result['samples']]
  image = picture(workdir)
  lines = [f'# {name}', '', sentence(results), '', table(evaluation, split),
           '']
  if image:
    pages.write(os.path.join(folder, 'training.png'), image)
    lines += ['![Loss and judged metrics during training](training.png)', '']
  fence = '````'
  for sample in samples:
    lines += [f'**{sample["name"]}**: {sample["prompt"]}', '', fence,
              sample['answer'].strip(), fence, '']
  pages.write(os.path.join(folder, 'report.md'), '\n'.join(lines))
  path = os.path.join(folder, 'report.html')
  pages.write(path, pages.render(
      'evaluation/report_page.html', name=name, split=split,
      sentence=sentence(results), cells=cells(results, split), image=image,
      examples=_examples(results), samples=samples))
  return path


def _summary(result):
  """Returns a result for eval.json: its scores with their intervals."""
  values = {key: {'value': value} for key, value in result['scores'].items()}
  for key, entry in values.items():
    if key != _COUNT and (found := interval_of(result, key)):
      entry |= {'n': found[0], 'low': found[1][0], 'high': found[1][1]}
  return {'records': result['records'], 'weights': result['weights'],
          'metrics': values}


# (Right after tuning, right before) -> state of an example.
_STATES = {(True, True): 'kept', (True, False): 'won',
           (False, True): 'lost', (False, False): 'failed'}


def _examples(results):
  """Returns one entry for each record: prompt, reference and all answers."""
  headline = next((r['headline'] for r in results.values()
                   if r.get('headline')), '')
  examples = {}
  for name, result in results.items():
    for row in result['answers']:
      entry = examples.setdefault(row['where'], dict(
          where=os.path.basename(row['where']), prompt=row.get('prompt', ''),
          reference=row.get('reference', ''), answers=[]))
      verdict = {k: f'{v:.3g}' if isinstance(v, float) else v
                 for k, v in row['verdict'].items()}
      value = row['verdict'].get(headline)
      entry['answers'].append(dict(
          name=name, text=row['answer'], verdict=verdict,
          good=None if value is None else bool(value)))
  for entry in examples.values():
    good = {a['name']: a['good'] for a in entry['answers']}
    others = [v for n, v in good.items() if n not in ('tuned', 'llama.cpp')]
    entry['state'] = _STATES.get((good.get('tuned'), any(others)), 'unjudged')
  return list(examples.values())


def picture(workdir: str) -> bytes | None:
  """Returns a PNG of loss and judged metrics during training, if any."""
  rows = metrics.read_jsonl(os.path.join(workdir, 'metrics.jsonl'))
  if not has_loss(rows):
    return None
  judged = judged_keys(rows)
  figure, axes = pages.make_figure(2 if judged else 1, height=3.4)
  plot(axes[0], rows, 'loss', color='#9db7d5', linewidth=1, label='train')
  plot(axes[0], rows, 'eval/loss', color='#1f4e8c', marker='o', markersize=4,
       label='validation')
  # Rates often coincide: with different dashes and widths all remain visible.
  styles = itertools.cycle(itertools.product(
      ('-', ':', '--'), zip(('#c25b1e', '#2f7d4f', '#7a4fa3', '#555555'),
                            (1.5, 4, 2.5, 1.5))))
  for key, (dashes, (color, width)) in zip(judged, styles):
    plot(axes[1], rows, key, 100, color=color, linestyle=dashes,
         linewidth=width, marker='o', markersize=4,
         label=key.removeprefix('eval/judge/'))
  label_axes(axes, 'Loss', "The judge's verdict")
  axes[0].legend(frameon=False)
  if judged:
    axes[1].legend(frameon=False, fontsize='small', loc='upper left',
                   bbox_to_anchor=(1, 1))
  return pages.to_png(figure)


def has_loss(rows: Sequence[Mapping[str, Any]]) -> bool:
  """Whether rows of metrics.jsonl have a loss to draw."""
  return any('loss' in row or 'eval/loss' in row for row in rows)


def judged_keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns the judge's metrics in rows of metrics.jsonl, sorted."""
  return sorted({key for row in rows for key in row
                 if key.startswith('eval/judge/')} - {f'eval/{_COUNT}'})


def plot(axis: Any, rows: Sequence[Mapping[str, Any]], key: str,
         factor: float = 1, **style: Any) -> None:
  """Draws a value of metrics.jsonl over the updates, where there is one."""
  points = [(row['step'], factor * row[key]) for row in rows if key in row]
  if points:
    axis.plot(*zip(*points), **style)


def label_axes(axes: Sequence[Any], *titles: str) -> None:
  """Labels the axes of a loss and, if there are two, of the judge's rates."""
  values = (dict(ylabel='loss (nats per trained token)', ylim=(0, None)),
            dict(ylabel='% of validation answers', ylim=(0, 100)))
  for axis, title, more in zip(axes, titles, values):
    axis.set(xlabel='updates', title=title, **more)
