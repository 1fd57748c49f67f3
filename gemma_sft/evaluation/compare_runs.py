"""Compares finished (or stopped) runs: config, origin and result."""

import collections
import dataclasses
import json
import os
import statistics
from typing import Any
from typing import Mapping
from typing import Sequence

from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft import progress
from gemma_sft.evaluation import report
from gemma_sft.monitor import metrics
from gemma_sft.monitor import record as record_lib

_SPLITS = ('test', 'validation', 'train')
# Names that have a meaning of their own in `report`.
_RESERVED = ('base', 'tuned', 'llama.cpp')
UNKNOWN = '-'


@dataclasses.dataclass(frozen=True)
class FinishedRun:
  """What a workdir holds of a run; whatever is missing is empty or None."""

  name: str
  flat: dict[str, Any]  # The config; missing keys have their defaults.
  record: dict[str, Any] | None  # From `record.read`.
  rows: list[dict[str, Any]]  # Of metrics.jsonl.
  scores: dict[str, dict[str, Any]]  # {split: 'tuned' of `read_results`}.


@dataclasses.dataclass(frozen=True)
class Comparison:
  """The differences between the first run and the others.

  A table has one column of row names, then one column for each run.
  """

  names: list[str]
  sentences: list[str]  # What differs, and whether the result does.
  notes: list[str]  # What could not be compared, and why.
  config: list[list[str]]  # Keys that differ and affect the result.
  free: list[list[str]]  # Keys that differ and do not affect it.
  origin: list[list[str]]  # Data, base, code, packages and devices.
  results: list[list[str]]  # Updates, losses, time and memory.
  split: str  # Of the scores, or ''.
  scores: list[list[str]]  # `report.cells`, header first, or [].
  gains: list[dict[str, Any]]  # `report.gains` over the first run, with 'run'.


def names(workdirs: Sequence[str]) -> list[str]:
  """Returns the names of the folders, or their paths if two names are equal."""
  last = [os.path.basename(os.path.abspath(path)) for path in workdirs]
  return [name if last.count(name) == 1 and name not in _RESERVED
          else os.path.join('.', path) for name, path in zip(last, workdirs)]


def load(
    workdir: str, name: str, defaults: Mapping[str, Any]) -> FinishedRun:
  """Reads a run's workdir; `defaults` fills in config keys that are newer."""
  record = record_lib.read(workdir)
  rows = metrics.read_jsonl(os.path.join(workdir, 'metrics.jsonl'))
  saved = record['config'] if record else {}
  path = os.path.join(workdir, 'config.json')
  if os.path.exists(path):
    with open(path, encoding='utf-8') as file:
      try:
        saved = json.load(file)
      except ValueError as error:
        raise errors.UserError(
            f'{path}: {error}', 'the config that training wrote',
            'start the run again: it rewrites its config') from None
  if not saved:
    what = ('has no config.json' if os.path.isdir(workdir)
            else 'is not a folder')
    raise errors.UserError(
        f'{workdir} {what}', 'the workdir of a training run',
        'name the folder that was given to gemma_sft.train as --workdir')
  folder = os.path.join(workdir, 'evaluation')
  scores = {split: report.read_results(folder, split).get('tuned')
            for split in _SPLITS}
  flat = {key: list(value) if isinstance(value, tuple) else value
          for key, value in {**defaults, **saved}.items()}
  return FinishedRun(
      name, flat, record, rows, {k: v for k, v in scores.items() if v})


def compare(runs: Sequence[FinishedRun]) -> Comparison:
  """Compares runs with the first of them."""
  decisive, free = _config_rows(runs)
  split = _shared_split(runs)
  notes = [
      f'{run.name} has no run.json, as it is older: its data, base, code,'
      ' packages and devices are not known'
      for run in runs if run.record is None]
  notes += [f'{run.name} has not ended, or was killed: its results so far'
            for run in runs if run.record and not run.record['end']]
  gains, sentences = [], []
  for other in runs[1:]:
    paired, note = _pair(runs[0], other, split)
    gains += [{'run': other.name, **row} for row in paired]
    if note:
      notes.append(note)
    sentences.append(
        f'{_what_differs(runs[0], other)} {_outcome(runs[0], other, paired)}')
  scored = {run.name: run.scores[split] for run in runs if split in run.scores}
  return Comparison(
      [run.name for run in runs], sentences, notes, decisive, free,
      _origin_rows(runs), _result_rows(runs), split,
      report.cells(scored, split) if scored else [], gains)


# What differs ----------------------------------------------------------------


def _config_rows(runs):
  """Returns the keys that differ: (those that affect the result, the rest)."""
  table = {key: [run.flat.get(key) for run in runs]
           for key in sorted({key for run in runs for key in run.flat})}
  differing = {key: values for key, values in table.items()
               if any(value != values[0] for value in values)}
  decides = set(config_lib.result_leaves(differing))
  if any(run.record is None for run in runs):
    # Without hashes of the data, another file name may mean other data.
    decides |= {key for key in differing
                if key.startswith(('data.', 'model.weights'))}
  rows = [[key, *map(_value, values)] for key, values in differing.items()]
  return ([row for row in rows if row[0] in decides],
          [row for row in rows if row[0] not in decides])


def _value(value):
  if value is None:
    return UNKNOWN
  return json.dumps(value, ensure_ascii=False) if value == '' or isinstance(
      value, (list, bool)) else str(value)


def _origin(run):
  """Returns {fact: value}; a value lists those of all starts, in order."""
  if run.record is None:
    return {}
  starts = run.record['starts']

  def of_starts(read):
    return ', then '.join(dict.fromkeys(filter(None, map(read, starts))))

  base = run.record['base']
  return {
      **{f'data: {split}': value[:16]
         for split, value in run.record['data'].items()},
      'base': base if ' ' in base else base[:16],
      'code': of_starts(lambda s: s['commit'][:12] + (
          ' with changes' if s['dirty'] else '')),
      'python': of_starts(lambda s: s['python']),
      'devices': of_starts(lambda s: '{count} x {kind}'.format(**s['devices'])),
      'hosts': of_starts(lambda s: str(s['hosts'])),
      **{name: of_starts(lambda s, name=name: s['packages'].get(name))
         for start in starts for name in start['packages']}}


def _origin_rows(runs):
  facts = [_origin(run) for run in runs]
  known = list(filter(None, facts))
  return [
      [key, *(fact.get(key) or UNKNOWN for fact in facts)]
      for key in dict.fromkeys(k for fact in known for k in fact)
      if len({fact.get(key) for fact in known}) > 1]


_NAMED = 4


def _what_differs(first, other):
  decisive, free = _config_rows([first, other])
  origin = _origin_rows([first, other])
  parts = [f'{key} ({a} -> {b})' for key, a, b in decisive[:_NAMED]]
  if len(decisive) > _NAMED:
    parts.append(f'{len(decisive) - _NAMED} more config keys')
  parts += [key for key, _, _ in origin[:_NAMED]]
  if len(origin) > _NAMED:
    parts.append(f'{len(origin) - _NAMED} more of code and devices')
  if parts:
    return f'{other.name} differs from {first.name} in {_list(parts)}.'
  if first.record is None or other.record is None:
    return (f'{other.name} and {first.name} have the same config; their data,'
            ' base and code are not known.')
  alike = f'{other.name} is the same training as {first.name}'
  if free:
    return (f'{alike}: only {_list([row[0] for row in free[:_NAMED]])}'
            f'{" and more" if len(free) > _NAMED else ""} differ'
            f'{"s" if len(free) == 1 else ""}, which does not affect the'
            ' result.')
  return f'{alike}.'


def _list(parts):
  return ', '.join(parts[:-1]) + (' and ' if len(parts) > 1 else '') + parts[-1]


# Results ---------------------------------------------------------------------


def _result_rows(runs):
  columns = [_results(run) for run in runs]
  return [[key, *(column[key] or UNKNOWN for column in columns)]
          for key in columns[0]]


def _results(run):
  """Returns {name of the row: cell}; a cell that is not known is empty."""
  record = run.record or {}
  end = record.get('end') or {}

  def values(key):
    return [row[key] for row in run.rows if key in row]

  losses, eval_losses = values('loss'), values('eval/loss')
  steps, total = values('step'), record.get('total_steps')
  best, trained = best_of(run), record.get('trained_weights')
  if end:
    seconds, speed = end['seconds'], end['tokens_per_second']
  else:
    # From the first line to the last: this leaves out loading and compiling,
    # and includes the time between two starts.
    times, speeds = values('time'), values('tokens_per_second')
    seconds = max(times) - min(times) if times else None
    speed = statistics.median(speeds) if speeds else None
  return {
      'updates': '' if not steps else (
          f'{max(steps)} of {total}' if total else str(max(steps))),
      'ended by': end.get('reason') or '',
      'best': '' if not best else (
          f'{best["metric"]} {best["value"]:.4g} after {best["step"]}'),
      'last loss, train': f'{losses[-1]:.4f}' if losses else '',
      'last loss, validation': f'{eval_losses[-1]:.4f}' if eval_losses else '',
      'time': '' if seconds is None else (
          ('' if end else 'about ') + progress.duration(seconds)),
      'tokens/s, median': f'{speed:,.0f}' if speed else '',
      'peak memory': f'{end["peak_bytes"] / 1e9:.2f} GB'
                     if end.get('peak_bytes') else '',
      'trained weights': f'{trained:,}' if trained else ''}


def best_of(run: FinishedRun) -> dict[str, Any] | None:
  """Returns {'metric', 'value', 'step'} of the best evaluation, or None."""
  metric = run.flat['eval.metric']
  sign = 1 if run.flat['eval.mode'] == 'max' else -1
  scored = [(sign * row[f'eval/{metric}'], row['step']) for row in run.rows
            if f'eval/{metric}' in row]
  if not scored:
    return None
  value, step = max(scored)  # Ties go to the later step, as in training.
  return {'metric': metric, 'value': sign * value, 'step': step}


def _shared_split(runs):
  """Returns the split that most runs have scores of, or ''."""
  counts = collections.Counter(split for run in runs for split in run.scores)
  return max(_SPLITS, key=lambda split: counts[split]) if counts else ''


def _pair(first, other, split):
  """Returns (rows of `report.gains`, why some or all are missing or '')."""
  a, b = (run.scores.get(split) for run in (first, other))
  both = f'{other.name} and {first.name}'
  if a is None or b is None:
    missing = ' and '.join(
        run.name for run, has in ((first, a), (other, b)) if has is None)
    return [], (
        f'{both} are not paired: no scores of {split or "any split"} of'
        f' {missing}; python -m gemma_sft.evaluate --workdir=... makes them')
  unlike = [f'{key} {a.get(key)} and {b.get(key)}' for key in report.DECODING
            if a.get(key) != b.get(key)]
  if unlike:
    return [], (f'{both} are not paired: their answers were decoded differently'
                f' ({", ".join(unlike)}); evaluate one of them again')
  a, b = _by_content(a), _by_content(b)
  where = [{row['where'] for row in result['answers']} for result in (a, b)]
  shared = len(where[0] & where[1])
  rows = report.gains({'tuned': b, 'other': a})
  if where[0] == where[1] and shared:
    return rows, ''
  # Means over different records say nothing about the runs.
  return [row for row in rows if 'low' in row], (
      f'{both}: {shared} records of {split} are in both'
      f' ({len(where[0])} and {len(where[1])}); only these are paired')


def _by_content(result):
  """Returns a result whose answers are identified by their records' content.

  Files may hold the same records on other lines, or others on the same lines.
  """
  seen, answers = collections.Counter(), []
  for row in result.get('answers', ()):
    key = json.dumps([row.get('prompt'), row.get('reference')])
    seen[key] += 1
    answers.append({**row, 'where': f'{key} {seen[key]}'})
  return {**result, 'answers': answers}


def _outcome(first, other, paired):
  """Returns a sentence on whether the result differs beyond chance."""
  headline = next((run.scores[s]['headline'] for run in (first, other)
                   for s in _SPLITS if run.scores.get(s, {}).get('headline')),
                  '')
  row = next((row for row in paired if row['metric'] == f'judge/{headline}'
              and 'low' in row), None)
  if row is None:
    a, b = (best_of(run) for run in (first, other))
    text = ('Whether the results differ beyond chance is unknown: there are no'
            ' judged answers to the same records.')
    if a and b and a['metric'] == b['metric']:
      text += (f' Best {a["metric"]} of validation: {b["value"]:.4g} against'
               f' {a["value"]:.4g}.')
    return text
  gain, low, high = (100 * row[key] for key in ('gain', 'low', 'high'))
  numbers = (f'{headline.replace("_", " ")} {gain:+.1f} points (95 %:'
             f' {low:+.1f} to {high:+.1f}; {row["n"]} records)')
  if low > 0 or high < 0:
    better = 'better' if low > 0 else 'worse'
    return f'Its result is {better} beyond chance: {numbers}.'
  return f'Their results cannot be told apart: {numbers}.'
