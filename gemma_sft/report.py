"""The table base against tuned and exported, and the picture of a run."""

import json
import math
import os
from typing import Any

from gemma_sft import metrics

_NAMES = ('base', 'tuned', 'llama.cpp')
# Over their counts, these are shares and get an interval.
_COUNT = 'judge/n'


def interval(share: float, n: int) -> tuple[float, float]:
  """Returns the 95 % Wilson score interval of a share of n (Wilson 1927)."""
  if n == 0:
    return 0.0, 1.0
  z = 1.959964
  centre = (share + z * z / (2 * n)) / (1 + z * z / n)
  half = z / (1 + z * z / n) * math.sqrt(
      share * (1 - share) / n + z * z / (4 * n * n))
  return max(0.0, centre - half), min(1.0, centre + half)


def read_results(folder: str, split: str) -> dict[str, dict[str, Any]]:
  """Returns {'base': ..., 'tuned': ..., ...} as `evaluate` has kept them."""
  results = {}
  for name in _NAMES:
    path = os.path.join(folder, f'{split}-{name}.json')
    if os.path.exists(path):
      with open(path, encoding='utf-8') as file:
        results[name] = json.load(file)
  return results


def is_current(path: str, identity: str) -> bool:
  """Whether a file of scores is there and of this identity."""
  if not os.path.exists(path):
    return False
  with open(path, encoding='utf-8') as file:
    return json.load(file).get('identity') == identity


def table(folder: str, split: str) -> str:
  """Returns the Markdown table of a split's scores, base beside tuned."""
  results = read_results(folder, split)
  columns = [name for name in _NAMES if name in results]
  scores = {name: results[name]['scores'] for name in columns}
  keys = list(dict.fromkeys(k for s in scores.values() for k in s))
  rows = [[f'{split} split', *columns]]
  for key in keys:
    if key == _COUNT:
      continue
    row = [key.removeprefix('judge/').replace('_', ' ')]
    for name in columns:
      row.append(_cell(key, scores[name]))
    rows.append(row)
  rows.append(['records', *(str(results[c]['records']) for c in columns)])
  rows.append(['weights', *(results[c]['weights'] for c in columns)])
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = ['| ' + ' | '.join(c.ljust(w) for c, w in zip(row, widths)) + ' |'
           for row in rows]
  lines.insert(1, '|' + '|'.join('-' * (w + 2) for w in widths) + '|')
  return '\n'.join(lines)


def _cell(key, scores):
  if key not in scores:
    return '-'
  value = scores[key]
  if not key.startswith('judge/'):
    return f'{value:.4g}'
  n = int(scores.get(_COUNT, 0))
  if abs(value * n - round(value * n)) > 1e-6:  # A mean, not a rate.
    return f'{value:.1%}'
  low, high = interval(value, n)
  return (f'{value:.1%} ({round(value * n)} of {n};'
          f' 95 %: {low:.0%} to {high:.0%})')


def write(workdir: str, split: str) -> str:
  """Writes workdir/report/report.md with its picture; returns its path."""
  folder = os.path.join(workdir, 'report')
  os.makedirs(folder, exist_ok=True)
  evaluation = os.path.join(workdir, 'evaluation')
  results = read_results(evaluation, split)
  lines = [f'# {os.path.basename(os.path.normpath(workdir))}', '',
           table(evaluation, split), '']
  if picture(workdir, os.path.join(folder, 'training.png')):
    lines += ['![loss and judge over the updates](training.png)', '']
  for name, result in results.items():
    for sample in result['samples']:
      fence = '````'
      lines += [f'**{name}**: {sample["prompt"]}', '', fence,
                sample['answer'].strip(), fence, '']
  path = os.path.join(folder, 'report.md')
  with open(path, 'w', encoding='utf-8') as file:
    file.write('\n'.join(lines))
  return path


def picture(workdir: str, path: str) -> bool:
  """Draws loss and judged rates over the updates; False without any metrics."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot as plt

  rows = metrics.read_jsonl(os.path.join(workdir, 'metrics.jsonl'))
  train = [(r['step'], r['loss']) for r in rows if 'loss' in r]
  loss = [(r['step'], r['eval/loss']) for r in rows if 'eval/loss' in r]
  judged = sorted({
      key for r in rows for key in r
      if key.startswith('eval/judge/') and key != f'eval/{_COUNT}'})
  if not train and not loss:
    return False
  figure, axes = plt.subplots(
      1, 2 if judged else 1, figsize=(9 if judged else 5, 3.4), squeeze=False)
  left = axes[0][0]
  if train:
    left.plot(*zip(*train), color='#9db7d5', linewidth=1, label='train')
  if loss:
    left.plot(*zip(*loss), color='#1f4e8c', marker='o', markersize=4,
              label='validation')
  left.set(xlabel='updates', ylabel='loss (nats per trained token)',
           title='Loss', ylim=(0, None))
  left.legend(frameon=False)
  # Rates often coincide: lines of different dashes and widths show through.
  styles = zip(judged, ('#c25b1e', '#2f7d4f', '#7a4fa3', '#555555'),
               ('-', '-', ':', '--'), (1.5, 4, 1.5, 1.5))
  for key, color, dashes, width in styles:
    points = [(r['step'], 100 * r[key]) for r in rows if key in r]
    axes[0][1].plot(*zip(*points), color=color, linestyle=dashes,
                    linewidth=width, marker='o', markersize=4,
                    label=key.removeprefix('eval/judge/'))
  if judged:
    axes[0][1].set(xlabel='updates', ylabel='% of validation answers',
                   title="The judge's verdict", ylim=(0, 100))
    axes[0][1].legend(frameon=False)
  for axis in axes[0]:
    axis.spines[['top', 'right']].set_visible(False)
    axis.grid(alpha=0.25)
  figure.tight_layout()
  figure.savefig(path, dpi=150)
  plt.close(figure)
  return True
