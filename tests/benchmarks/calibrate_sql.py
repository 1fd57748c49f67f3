"""Prints the judge's scores of right and of broken queries.

    python tests/benchmarks/calibrate_sql.py --data=data/sql/test.jsonl

Each row of the table judges the data's own queries, broken in one way, as
answers to its questions. Shares are of the records that `execution` counts.
Queries with nothing to break (one table, no condition) are left out.
"""

import random
import re

from absl import app
from absl import flags

from gemma_sft import pages
from gemma_sft.inputs import records as records_lib
from gemma_sft.tasks.sql import task

_DATA = flags.DEFINE_string('data', None, 'Records.', required=True)
_WORDS = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|\w+(?:\.\w+)?|[^\w\s]+")


def _spelled_otherwise(record, *_):
  """Swaps upper and lower case outside of strings, and adds a fence."""
  parts = re.split(r"('(?:[^']|'')*'|\"[^\"]*\")", record.fields['query'])
  query = ''.join(p if i % 2 else p.swapcase() for i, p in enumerate(parts))
  return f'```sql\n{query};\n```\nThis answers it.'


def _another_question(record, records, rng):
  others = [r.fields['query'] for r in records
            if r.fields['db_id'] == record.fields['db_id']
            and r.fields['query'].lower() != record.fields['query'].lower()]
  return rng.choice(others) if others else None


def _no_condition(record, *_):
  query = re.sub(
      r' WHERE .*?(?= GROUP BY| ORDER BY| INTERSECT| EXCEPT| UNION|\)|$)', '',
      record.fields['query'], count=1, flags=re.IGNORECASE)
  return query if query != record.fields['query'] else None


def _wrong_table(record, _, rng):
  tables = re.findall(r'^(\w+)\(', task.schema_text(record), re.MULTILINE)
  query = record.fields['query']
  used = [t for t in tables
          if re.search(rf'\b(?:from|join) {t}\b', query, re.IGNORECASE)]
  left = [t for t in tables if t not in used]
  if not used or not left:
    return None
  return re.sub(rf'\b{rng.choice(used)}\b', rng.choice(left), query,
                flags=re.IGNORECASE)


def _shuffled(record, _, rng):
  words = _WORDS.findall(record.fields['query'])
  return 'SELECT ' + ' '.join(rng.sample(words[1:], len(words) - 1))


_BROKEN = {
    'the own query': lambda record, *_: record.fields['query'],
    'spelled otherwise, in a fence': _spelled_otherwise,
    'without its first condition': _no_condition,
    'another query of the database': _another_question,
    'from a wrong table': _wrong_table, 'words shuffled': _shuffled}


def main(_):
  records, rows = records_lib.read(_DATA.value), []
  for name, broken in _BROKEN.items():
    rng = random.Random(0)
    pairs = [(r, answer) for r in records
             if (answer := broken(r, records, rng)) is not None]
    judged = task.judge(*zip(*pairs)) if pairs else task.judge([], [])
    counted = [row['execution'] for row in judged.rows if 'execution' in row]
    execution, valid, exact = (
        f'{judged.metrics.get(name, 0):.3f}'
        for name in ('execution', 'valid', 'exact'))
    rows.append((name, len(pairs), len(counted),
                 f'{execution} ({sum(counted)}/{len(counted)})', valid, exact))
  print(pages.table(
      ('answers', 'n', 'counted', 'execution', 'valid', 'exact'), rows))


if __name__ == '__main__':
  app.run(main)
