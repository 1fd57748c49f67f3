"""What an evaluation says: table, gains with intervals, sentence, pages."""

import itertools
import json
import os
from typing import Any
from typing import Mapping

import numpy as np

from gemma_sft import pages
from gemma_sft.evaluation import intervals
from gemma_sft.monitor import metrics

# Over their counts, these are shares and get an interval.
_COUNT = 'judge/n'

Results = Mapping[str, Mapping[str, Any]]


def read_results(folder: str, split: str) -> dict[str, dict[str, Any]]:
  """Returns {'base': ..., 'few:4': ..., 'tuned': ...} as `evaluate` kept them.

  The untouched model comes first, then what examples in the prompt make of it,
  then the tuned one, then its export.
  """
  results = {}
  names = os.listdir(folder) if os.path.isdir(folder) else []
  for file_name in names:
    if file_name.startswith(f'{split}-') and file_name.endswith('.json'):
      with open(os.path.join(folder, file_name), encoding='utf-8') as file:
        result = json.load(file)
      name = result.get('name', file_name[len(split) + 1:-len('.json')])
      results[name] = result
  return dict(sorted(results.items(), key=lambda item: _rank(item[0])))


def _rank(name):
  kinds = ('base', 'few', 'rag', 'tuned', 'llama.cpp')
  kind, _, n = name.partition(':')
  return (kinds.index(kind) if kind in kinds else len(kinds), int(n or 0), name)


def is_current(path: str, identity: str) -> bool:
  """Whether a file of scores is there and of this identity."""
  if not os.path.exists(path):
    return False
  with open(path, encoding='utf-8') as file:
    return json.load(file).get('identity') == identity


# Intervals -------------------------------------------------------------------


def _decoding(result):
  """How the answers were made: only like is compared with like."""
  return tuple(result.get(name) for name in (
      'temperature', 'repetition_penalty', 'max_new_tokens'))


def row_values(result: Mapping[str, Any], key: str) -> dict[str, float]:
  """Returns {record: value} of a judged metric that is a mean over records.

  Args:
    result: Of `read_results`.
    key: Such as judge/strict. Empty for totals that are no such mean (BLEU
      over a corpus), and for losses.
  """
  name = key.removeprefix('judge/')
  if name == key:
    return {}
  values = {
      row['where']: float(row['verdict'][name])
      for row in result.get('answers', ())
      if isinstance(row['verdict'].get(name), (bool, int, float))}
  total = result['scores'].get(key)
  if not values or total is None or abs(
      sum(values.values()) / len(values) - total) > 1e-6:
    return {}
  return values


def interval_of(result: Mapping[str, Any], key: str
                ) -> tuple[int, tuple[float, float]] | None:
  """Returns (n, 95 % interval) of a metric, or None where it has none.

  Rates of yes and no get Wilson's, means the bootstrap's.
  """
  if values := row_values(result, key):
    n, scores = len(values), list(values.values())
    if set(scores) <= {0.0, 1.0}:
      return n, intervals.wilson(sum(scores) / n, n)
    return n, intervals.bootstrap(scores)
  n, value = int(result['scores'].get(_COUNT, 0)), result['scores'].get(key)
  has_rows = any(key.removeprefix('judge/') in row['verdict']
                 for row in result.get('answers', ()))
  if (key.startswith('judge/') and not has_rows and not result.get('answers')
      and abs(value * n - round(value * n)) <= 1e-6):
    return n, intervals.wilson(value, n)
  return None


def gains(results: Results, name: str = 'tuned') -> list[dict[str, Any]]:
  """Returns how much better one result is than each other, metric by metric.

  Each: metric, than, gain (above 0 is better, whichever way the metric runs),
  low and high (95 %, bootstrap of the differences on the same records), n.
  Metrics that are no mean over records have a gain without an interval. Results
  whose answers were made at another temperature, penalty or length are left
  out: score them again.
  """
  rows = []
  if name not in results:
    return rows
  mine = results[name]
  lower = {f'judge/{k}' for k in mine.get('lower_is_better', ())} | {
      'loss', 'perplexity', 'bits_per_byte', 'bits_per_character'}
  for other, theirs in results.items():
    if other in (name, 'llama.cpp') or _decoding(theirs) != _decoding(mine):
      continue
    for key, value in mine['scores'].items():
      if key == _COUNT or key not in theirs['scores']:
        continue
      sign = -1 if key in lower else 1
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
  """Says in plain words whether tuning beats prompting, and by how much.

  '' where there is nothing to compare, or the judge could not work.
  """
  if 'tuned' not in results or not results['tuned'].get('headline'):
    return ''
  name = results['tuned']['headline']
  key = f'judge/{name}'
  sign = -1 if name in results['tuned']['lower_is_better'] else 1
  others = {k: r for k, r in results.items()
            if k not in ('tuned', 'llama.cpp') and key in r['scores']
            and _decoding(r) == _decoding(results['tuned'])}
  if not others or key not in results['tuned']['scores']:
    return ''
  best = max(others, key=lambda k: sign * others[k]['scores'][key])
  row = next(r for r in gains(results) if r['metric'] == key
             and r['than'] == best)
  what = ('the untouched model' if best == 'base' else
          f'the best prompting ({best})')
  numbers = (f'{_label(key)} {results["tuned"]["scores"][key]:.1%} against'
             f' {others[best]["scores"][key]:.1%}')
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
  """Returns the table's rows, the first one its head."""
  keys = list(dict.fromkeys(
      k for r in results.values() for k in r['scores'] if k != _COUNT))
  gained = {(r['metric'], r['than']): r for r in gains(results)}
  against = [n for n in results if n not in ('tuned', 'llama.cpp')
             and _decoding(results[n]) == _decoding(results.get('tuned', {}))]
  best = _best(results, against)
  head = [f'{split} split', *results]
  if best:
    head.append(f'gain over {best}')
  rows = [head]
  for key in keys:
    row = [_label(key), *(_cell(r, key) for r in results.values())]
    if best:
      row.append(_gain_cell(gained.get((key, best)), key))
    rows.append(row)
  rows.append(['records', *(str(r['records']) for r in results.values())])
  rows.append(['weights', *(r['weights'] for r in results.values())])
  if len(set(map(_decoding, results.values()))) > 1:
    rows.append(['decoding', *(
        f'temperature {r.get("temperature")}, penalty'
        f' {r.get("repetition_penalty")}, {r.get("max_new_tokens")} tokens'
        for r in results.values())])
  for row in rows:
    row += [''] * (len(head) - len(row))
  return rows


def _best(results, against):
  """Returns what tuning has to beat: the best of them by the headline."""
  if 'tuned' not in results or not against:
    return ''
  key = f'judge/{results["tuned"].get("headline", "")}'
  sign = -1 if key.removeprefix('judge/') in results['tuned'].get(
      'lower_is_better', ()) else 1
  scored = [n for n in against if key in results[n]['scores']]
  return max(scored, key=lambda n: sign * results[n]['scores'][key],
             default=against[0])


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
  if abs(value * n - round(value * n)) > 1e-6:  # A mean, not a rate.
    return f'{value:.1%} (95 %: {low:.0%} to {high:.0%})'
  return (f'{value:.1%} ({round(value * n)} of {n};'
          f' 95 %: {low:.0%} to {high:.0%})')


def _gain_cell(row, key):
  if row is None:
    return '-'
  if not key.startswith('judge/'):
    return f'{row["gain"]:+.4g}'
  text = f'{100 * row["gain"]:+.1f}'
  if 'low' in row:
    text += f' (95 %: {100 * row["low"]:+.0f} to {100 * row["high"]:+.0f})'
  return text


# The pages -------------------------------------------------------------------


def write(workdir: str, split: str) -> str:
  """Writes eval.json, report.md, report.html and training.png.

  Returns:
    The path of the page, workdir/report/report.html.
  """
  folder = os.path.join(workdir, 'report')
  os.makedirs(folder, exist_ok=True)
  evaluation = os.path.join(workdir, 'evaluation')
  results = read_results(evaluation, split)
  name = os.path.basename(os.path.normpath(workdir))
  pages.write(os.path.join(evaluation, 'eval.json'), json.dumps(
      summary(results, split), indent=1, ensure_ascii=False))
  image = picture(workdir)
  lines = [f'# {name}', '', sentence(results), '', table(evaluation, split),
           '']
  if image:
    pages.write(os.path.join(folder, 'training.png'), image)
    lines += ['![Loss and judged metrics during training](training.png)', '']
  for label, result in results.items():
    for sample in result['samples']:
      fence = '````'
      lines += [f'**{label}**: {sample["prompt"]}', '', fence,
                sample['answer'].strip(), fence, '']
  pages.write(os.path.join(folder, 'report.md'), '\n'.join(lines))
  path = os.path.join(folder, 'report.html')
  pages.write(path, page(results, split, name, image))
  return path


def summary(results: Results, split: str) -> dict[str, Any]:
  """Returns what eval.json holds: scores, intervals, gains and the sentence."""
  scores = {}
  for name, result in results.items():
    scores[name] = {'records': result['records'], 'weights': result['weights'],
                    'metrics': {}}
    for key, value in result['scores'].items():
      entry = {'value': value}
      if key != _COUNT and (found := interval_of(result, key)):
        entry |= {'n': found[0], 'low': found[1][0], 'high': found[1][1]}
      scores[name]['metrics'][key] = entry
  return {'split': split, 'sentence': sentence(results), 'results': scores,
          'gains': gains(results)}


def page(results: Results, split: str, name: str, image: bytes | None) -> str:
  """Returns the report as one self-contained HTML page.

  Args:
    results: From `read_results`.
    split: Their split.
    name: Of the run.
    image: PNG from `picture`, or None.
  """
  return pages.render(
      'evaluation/report_page.html', name=name, split=split,
      sentence=sentence(results), cells=cells(results, split), image=image,
      examples=_examples(results),
      samples=[{'name': n, **s} for n, r in results.items()
               for s in r['samples']])


def _examples(results):
  """Returns one entry a record: prompt, reference and who answered what."""
  headline = next((r['headline'] for r in results.values()
                   if r.get('headline')), '')
  examples = {}
  for name, result in results.items():
    for row in result['answers']:
      entry = examples.setdefault(row['where'], dict(
          where=os.path.basename(row['where']), prompt=row.get('prompt', ''),
          reference=row.get('reference', ''), answers=[], state=''))
      verdict = {k: f'{v:.3g}' if isinstance(v, float) else v
                 for k, v in row['verdict'].items()}
      value = row['verdict'].get(headline)
      entry['answers'].append(dict(
          name=name, text=row['answer'], verdict=verdict,
          good=None if value is None else bool(value)))
  for entry in examples.values():
    good = {a['name']: a['good'] for a in entry['answers']}
    others = [v for n, v in good.items() if n not in ('tuned', 'llama.cpp')]
    if good.get('tuned') is None:
      entry['state'] = 'unjudged'
    elif good['tuned']:
      entry['state'] = 'kept' if any(others) else 'won'
    else:
      entry['state'] = 'lost' if any(others) else 'failed'
  return list(examples.values())


def picture(workdir: str) -> bytes | None:
  """Returns a PNG of loss and judged metrics during training, if any."""
  rows = metrics.read_jsonl(os.path.join(workdir, 'metrics.jsonl'))
  train = [(r['step'], r['loss']) for r in rows if 'loss' in r]
  loss = [(r['step'], r['eval/loss']) for r in rows if 'eval/loss' in r]
  judged = sorted({
      key for r in rows for key in r
      if key.startswith('eval/judge/') and key != f'eval/{_COUNT}'})
  if not train and not loss:
    return None
  figure, axes = pages.make_figure(2 if judged else 1, height=3.4)
  left = axes[0]
  if train:
    left.plot(*zip(*train), color='#9db7d5', linewidth=1, label='train')
  if loss:
    left.plot(*zip(*loss), color='#1f4e8c', marker='o', markersize=4,
              label='validation')
  left.set(xlabel='updates', ylabel='loss (nats per trained token)',
           title='Loss', ylim=(0, None))
  left.legend(frameon=False)
  # Rates often coincide: lines of different dashes and widths show through.
  styles = itertools.cycle(itertools.product(
      ('-', ':', '--'), zip(('#c25b1e', '#2f7d4f', '#7a4fa3', '#555555'),
                            (1.5, 4, 2.5, 1.5))))
  for key, (dashes, (color, width)) in zip(judged, styles):
    points = [(r['step'], 100 * r[key]) for r in rows if key in r]
    axes[1].plot(*zip(*points), color=color, linestyle=dashes,
                    linewidth=width, marker='o', markersize=4,
                    label=key.removeprefix('eval/judge/'))
  if judged:
    axes[1].set(xlabel='updates', ylabel='% of validation answers',
                   title="The judge's verdict", ylim=(0, 100))
    axes[1].legend(frameon=False, fontsize='small', loc='upper left',
                      bbox_to_anchor=(1, 1))
  return pages.to_png(figure)
