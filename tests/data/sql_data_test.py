"""The queries in data/sql run, have one answer, and share a style."""

import collections
import contextlib
import re

import pytest
import reading
import sqlglot
from sqlglot import exp

from gemma_sft.tasks.sql import task
from gemma_sft.tasks.sql import text

_RECORDS = reading.read('sql', '.jsonl')
_ALL = [r for split in _RECORDS.values() for r in split]
_DATABASES = sorted({r.fields['db_id'] for r in _ALL})


@pytest.mark.parametrize('split', _RECORDS)
def test_every_query_is_its_own_answer(split):
  # No result is empty, so every query is counted.
  judged = reading.judge(task, _RECORDS[split])
  assert judged.note == ''
  assert {k: v for k, v in judged.metrics.items() if k != 'n'} == dict.fromkeys(
      ['execution', 'valid', 'exact',
       *(f'execution_{h}' for h in text.HARDNESS)], 1.0)


def test_sizes_and_that_nothing_stands_twice():
  assert len(_ALL) >= 420 and len(_DATABASES) == 8
  for split, least in (('train', 300), ('validation', 45), ('test', 90)):
    assert len(_RECORDS[split]) >= least, split
    counts = collections.Counter(  # A rate by hardness needs a few of each.
        text.hardness(r.fields['query']) for r in _RECORDS[split])
    for level in text.HARDNESS:
      assert counts[level] >= 8, (split, level)
  names = [{r.fields['db_id'] for r in split} for split in _RECORDS.values()]
  assert len(set.union(*names)) == sum(map(len, names))
  # Two databases may have the same question.
  for field in ('question', 'query'):
    reading.assert_unique(
        (r.fields['db_id'], r.fields[field].lower()) for r in _ALL)


@pytest.mark.parametrize('name', _DATABASES)
def test_databases(name):
  records = [r for r in _ALL if r.fields['db_id'] == name]
  with contextlib.closing(task.connect(records[0])) as connection:
    tables = [row[0] for row in connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table'")]
    assert 3 <= len(tables) <= 5
    for table in tables:
      n, = connection.execute(f'SELECT count(*) FROM {table}').fetchone()
      assert 5 <= n <= 60, table
      # Foreign keys point at rows (the connection does not allow the PRAGMA
      # foreign_key_check).
      for _, _, other, here, there, *_ in connection.execute(
          f'PRAGMA foreign_key_list({table})').fetchall():
        lost = connection.execute(
            f'SELECT count(*) FROM {table} WHERE {here} NOT IN'
            f' (SELECT {there} FROM {other})').fetchone()
        assert lost == (0,), (table, here)
    asked = ' '.join(r.fields['query'].lower() for r in records)
    for table in tables:
      assert re.search(rf'\b{table.lower()}\b', asked), table


def test_order_and_limit_leave_no_choice():
  # With equal sort keys SQLite may return either row, and the judge might call
  # a right answer wrong.
  for record in _ALL:
    tree = sqlglot.parse_one(record.fields['query'], read='sqlite')
    order, limit = tree.args.get('order'), tree.args.get('limit')
    if order is None:
      assert limit is None, record.where
      continue
    assert isinstance(tree, exp.Select), record.where
    offset = tree.args.get('offset')
    start = int(offset.expression.name) if offset else 0
    keyed = tree.copy()
    keyed.set('limit', None)
    keyed.set('offset', None)
    for key in order.expressions:
      keyed = keyed.select(key.this.copy())
    with contextlib.closing(task.connect(record)) as connection:
      rows = connection.execute(keyed.sql('sqlite')).fetchall()
    n = len(order.expressions)
    end = start + int(limit.expression.name) if limit else len(rows)
    for i in range(max(0, start - 1), min(end, len(rows) - 1)):
      a, b = rows[i], rows[i + 1]
      assert a[-n:] != b[-n:] or a[:-n] == b[:-n], (record.where, a, b)


def test_house_style():
  keywords = re.compile(  # A small model learns from a consistent style.
      r'\b(select|from|where|group by|order by|having|limit|join|on|as|and|or'
      r'|not|in|like|between|is|null|distinct|union|intersect|except|desc)\b')
  others = re.compile(
      r'\b(COUNT|SUM|AVG|MIN|MAX)\b|"|;|  |<>|\bASC\b|LEFT|INNER')
  for record in _ALL:
    query = re.sub(r"'(?:[^']|'')*'", "''", record.fields['query'])
    assert not keywords.search(query), record.where
    assert not others.search(query), record.where
    assert query == query.strip() and query.startswith('SELECT ')
    question = record.fields['question']
    assert question[-1] in '.?' and question[0].isupper(), record.where
    for select in sqlglot.parse_one(query, read='sqlite').find_all(exp.Select):
      tables = [t for t in select.find_all(exp.Table)
                if t.find_ancestor(exp.Select) is select]
      aliases = [t.alias for t in tables]
      expected = [f'T{i + 1}' for i in range(len(tables))]
      assert aliases == (expected if len(tables) > 1 else ['']), record.where
