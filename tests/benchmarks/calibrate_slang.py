"""Prints the judge's scores of real and of broken slang answers.

    python tests/benchmarks/calibrate_slang.py --data=data/slang/test.csv \\
        --training=data/slang/train.csv

Each row of the table has one answer per record, made from the records alone and
the same every time. '-' means that a metric does not apply (no examples, no
contexts or no acronyms).
"""

import random
import re

from absl import app
from absl import flags

from gemma_sft import pages
from gemma_sft.inputs import records as records_lib
from gemma_sft.tasks.slang import task

_DATA = flags.DEFINE_string('data', None, 'Records.', required=True)
_TRAINING = flags.DEFINE_string('training', '', 'Their training records.')
_METRICS = ('good', 'format', 'in_example', 'novel', 'first', 'copied',
            'on_topic', 'spelled', 'acronym_gap', 'distinct1', 'distinct2')


def _lines(row):
  return [f'{name.capitalize()}: {row[name]}'
          for name in ('slang', 'description', 'example') if row[name]]


def _text(row):
  return '\n'.join(_lines(row))


def _with_term(row, term):
  """Returns a row with another term, in its example as well."""
  example = re.sub(re.escape(row['slang']), lambda _: term, row['example'],
                   flags=re.IGNORECASE)
  return {**row, 'slang': term, 'example': example}


def answers(rows, training, rng) -> dict[str, list[str]]:
  """Returns {what was changed: an answer for each row}."""
  order = list(range(len(rows)))
  rng.shuffle(order)
  moved = dict(zip(order, order[1:] + order[:1]))  # No row keeps its place.
  others = [rows[moved[i]] for i in range(len(rows))]
  kinds = {
      'real': [_text(r) for r in rows],
      "another row's answer": [_text(o) for o in others],
      "another row's term": [
          _text({**r, 'slang': o['slang']}) for r, o in zip(rows, others)],
      'lines reversed': ['\n'.join(_lines(r)[::-1]) for r in rows],
      'last line cut off': ['\n'.join(_lines(r)[:-1]) for r in rows],
      'goes on after it': [f'{_text(r)}\n{_text(o)}'
                           for r, o in zip(rows, others)],
      'the first answer, always': [_text(rows[0])] * len(rows)}
  if all(r['example'] for r in rows):
    kinds["another row's example"] = [
        _text({**r, 'example': o['example']}) for r, o in zip(rows, others)]
  if all(r['context'] for r in rows):
    kinds['a word of the context as the term'] = [
        _text({**r, 'slang': word, 'example': f'{word}: {r["example"]}'})
        for r in rows for word in [rng.choice(
            [w for w in r['context'].split() if w.isalpha()])]]
  if training:
    copies = [rng.choice(training) for _ in rows]
    kinds |= {
        'a training row': [_text(c) for c in copies],
        'a training row, a letter added to its term': [
            _text(_with_term(c, f'{c["slang"]}x')) for c in copies],
        'a training row with the real term': [
            _text(_with_term(c, r['slang'])) for r, c in zip(rows, copies)]}
  return kinds


def main(_):
  records = records_lib.read(_DATA.value)
  training = records_lib.read(_TRAINING.value) if _TRAINING.value else []
  rows = [task.columns(r) for r in records]
  kinds = answers(
      rows, [task.columns(r) for r in training], random.Random(0))
  n_with = {k: sum(bool(row[k]) for row in rows) for k in rows[0]}
  print(f'{len(rows)} records ({n_with["example"]} with an example,'
        f' {n_with["context"]} with a context), {len(training)} for training;'
        f' check_answers finds {len(task.check_answers(records))}\n')
  metrics = {name: task.judge(records, texts, training).metrics
             for name, texts in kinds.items()}
  print(pages.table(('answers', *_METRICS), [
      (name, *(f'{row[m]:.2f}' if m in row else '-' for m in _METRICS))
      for name, row in metrics.items()]))


if __name__ == '__main__':
  app.run(main)
