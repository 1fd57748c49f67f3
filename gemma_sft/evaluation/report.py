"""The report of an evaluation: scores with intervals, gains, and pages."""

import itertools
import json
import os
import pathlib
from typing import Any
from typing import Mapping

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
  """Returns {'base': ..., 'few:4': ..., 'tuned': ...} as `evaluate` wrote them.

  In order: the untouched model, the same with examples in the prompt, the tuned
  model, its export.
  """
  results = {}
  for path in pathlib.Path(folder).glob(f'{split}-*.json'):
    result = json.loads(path.read_text('utf-8'))
    results[result.get('name', path.stem[len(split) + 1:])] = result
  return dict(sorted(results.items(), key=lambda item: _rank(item[0])))


def _rank(name):
  kind, _, n = name.partition(':')
  return (_KINDS.index(kind) if kind in _KINDS else len(_KINDS), int(n or 0),
          name)


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

  Empty if the metric is not a mean over the records: losses, and totals such as
  BLEU over a corpus.
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
  """Returns (n, 95 % interval) of a metric, or None if it has none.

  Wilson's interval for rates of yes and no, a bootstrap for other means.
  """
  if values := row_values(result, key):
    n, scores = len(values), list(values.values())
    if set(scores) <= {0.0, 1.0}:
      return n, intervals.wilson(sum(scores) / n, n)
    return n, intervals.bootstrap(scores)
  n, value = int(result['scores'].get(_COUNT, 0)), result['scores'].get(key)
  if (key.startswith('judge/') and not result.get('answers')
      and abs(value * n - round(value * n)) <= 1e-6):
    return n, intervals.wilson(value, n)
  return None


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
  """Returns whether tuning beats prompting, and by how much, in words.

  '' if there is nothing to compare, or the judge could not work.
  """
  tuned = results.get('tuned', {})
  key = f'judge/{tuned.get("headline", "")}'
  row = next((row for row in gains(results) if row['metric'] == key
              and row['than'] == _best(results)), None)
  if row is None:
    return ''
  best = row['than']
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


def _best(results):
  """Returns the baseline that is best by the headline, or ''."""
  if 'tuned' not in results:
    return ''
  against = _baselines(results)
  key = f'judge/{results["tuned"].get("headline", "")}'
  sign = _sign(results['tuned'], key)
  scored = [name for name in against if key in against[name]['scores']]
  return max(scored, key=lambda name: sign * against[name]['scores'][key],
             default=next(iter(against), ''))


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
  if abs(value * n - round(value * n)) > 1e-6:  # Not a rate of yes and no.
    return f'{value:.1%} (95 %: {low:.0%} to {high:.0%})'
  return (f'{value:.1%} ({round(value * n)} of {n};'
          f' 95 %: {low:.0%} to {high:.0%})')


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
  """Writes eval.json, report.md, training.png and report.html.

  Returns the path of the last, workdir/report/report.html.
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
  """Returns the content of eval.json: scores, intervals, gains, sentence."""
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
  """Returns the report of run `name` as one self-contained HTML page.

  The image is the PNG of `picture`.
  """
  return pages.render(
      'evaluation/report_page.html', name=name, split=split,
      sentence=sentence(results), cells=cells(results, split), image=image,
      examples=_examples(results),
      samples=[{'name': n, **s} for n, r in results.items()
               for s in r['samples']])


def _examples(results):
  """Returns one entry for each record: prompt, reference and all answers."""
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
  # Rates often coincide: with different dashes and widths all remain visible.
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
