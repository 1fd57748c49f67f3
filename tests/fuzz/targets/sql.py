"""Queries and scripts that try to break out of the SQLite sandbox.

A case is [script, query]. Each takes a process, hence the small share.
"""

import json
import os

from hypothesis import strategies as st

from fuzz import judging
from gemma_sft.tasks.sql import text as text_lib
from gemma_sft.tasks.sql import worker

_GOOD = "CREATE TABLE t (a, b); INSERT INTO t VALUES (1, 'x'), (2, 'y')"
_CONTROL = {'script': _GOOD, 'query': 'SELECT a FROM t ORDER BY a'}


def check(case: bytes, folder: str) -> None:
  """Runs the query between two others, which it must not affect."""
  try:
    script, query = judging.parse(case)
  except (ValueError, TypeError):
    return
  script, query = (str(text).replace('{folder}', folder)
                   for text in (script, query))
  answers = worker.run_all(
      [_CONTROL, {'script': script, 'query': query}, _CONTROL])
  for answer in (answers[0], answers[2]):
    if answer != {'rows': [[1], [2]], 'filled': True}:
      raise judging.Loss(f'another query was answered {answer}')
  if answers[1].keys() not in ({'rows', 'filled'}, {'error'}):
    raise judging.Loss(f'the answer has {list(answers[1])}')
  if len(json.dumps(answers[1])) > 20_000_000:
    raise judging.Loss('a huge result')
  if os.listdir(folder):
    raise judging.Loss(f'it wrote {os.listdir(folder)}')
  # The parser that reads a model's query, too.
  for text in (query, f'```sql\n{query}\n```'):
    taken, _ = text_lib.extract(text)
    text_lib.normal_form(taken, frozenset({'t', 'a', 'b'}))
    text_lib.hardness(taken)


def seeds() -> list[bytes]:
  """Returns a good case and hostile ones."""
  return list(map(judging.dump, (
      [_GOOD, 'SELECT count(*) FROM t GROUP BY b'],
      [_GOOD, "ATTACH '{folder}/x' AS y"],
      ["VACUUM INTO '{folder}/x'", 'SELECT 1'])))


_NAMES = st.sampled_from((
    'a', 'b', 't', 'x', 'rowid', 'sqlite_master', 'sqlite_schema', 'main.t',
    'pragma_table_info', 'dbstat', 'json_each', 'generate_series', '"', '[',
    'fts5', 'sqlite_stat1', 'bytecode', 'sqlite_dbpage', 'temp.x', '*'))
_LITERALS = st.sampled_from((
    '1', '-9223372036854775808', '1e999', "'x'", "x'00ff'", 'NULL', "'%_%'",
    "'{folder}/x'", '?', ':a', '0x7fffffffffffffff', "'a''b'", "'\x00'",
    "'file:{folder}/x?mode=rwc'", "'é'", '900000000', "'" + 'a' * 2000 + "'"))
_FUNCTIONS = st.sampled_from((
    'load_extension', 'readfile', 'writefile', 'randomblob', 'zeroblob',
    'printf', 'format', 'hex', 'replace', 'group_concat', 'json', 'json_each',
    'abs', 'char', 'substr', 'instr', 'quote', 'unicode', 'sum', 'count', 'max',
    'fts3_tokenizer', 'edit', 'random', 'sqlite_version', 'like', 'glob',
    'strftime', 'json_extract', 'ltrim', 'total_changes', 'upper', 'eval'))
_EXPRESSIONS = st.recursive(
    _NAMES | _LITERALS,
    lambda inner: st.builds('{}({}, {})'.format, _FUNCTIONS, inner, inner)
    | st.builds('{}({})'.format, _FUNCTIONS, inner)
    | st.builds('({} {} {})'.format, inner, st.sampled_from((
        '+', '||', 'LIKE', 'GLOB', 'IN', '->>', '<', 'AND', 'MATCH', 'REGEXP',
        'COLLATE')), inner)
    | st.builds('(SELECT {} FROM {})'.format, inner, _NAMES)
    | st.builds('CASE {} WHEN 1 THEN {} END'.format, inner, inner),
    max_leaves=8)
_RECURSIVE = (
    'WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT {} FROM n {}) SELECT {}'
    ' FROM n')
_STATEMENTS = st.one_of(
    st.builds('SELECT {} FROM {} WHERE {}'.format, _EXPRESSIONS, _NAMES,
              _EXPRESSIONS),
    st.builds('SELECT {} FROM t, t AS x, t AS y GROUP BY {} ORDER BY {}'.format,
              _EXPRESSIONS, _EXPRESSIONS, _EXPRESSIONS),
    st.builds(_RECURSIVE.format, st.sampled_from(('i + 1', 'i || i', '1')),
              st.sampled_from(('', 'LIMIT 1000', 'LIMIT 10000000')),
              _EXPRESSIONS | st.sampled_from(('count(*)', 'max(i)', 'i'))),
    st.builds('{} {}'.format, st.sampled_from((
        'ATTACH', 'DETACH', 'PRAGMA', 'VACUUM INTO', 'DROP TABLE', 'EXPLAIN',
        'DELETE FROM', 'CREATE TABLE y AS SELECT', 'CREATE VIRTUAL TABLE v'
        ' USING', 'REINDEX', 'ANALYZE', 'SAVEPOINT', 'BEGIN EXCLUSIVE;',
        'PRAGMA writable_schema = 1;', 'INSERT INTO t VALUES', 'VALUES',
        'CREATE TRIGGER r AFTER INSERT ON t BEGIN SELECT 1; END;',
        'CREATE VIEW w AS SELECT', 'UPDATE t SET a =', 'REPLACE INTO t SELECT'
    )), _EXPRESSIONS), st.text(max_size=12))
_MANY = st.lists(_STATEMENTS, max_size=2).map('; '.join)
STRATEGY = st.tuples(
    st.just(_GOOD) | _MANY | _MANY.map(lambda s: f'{_GOOD}; {s}'),
    _STATEMENTS | _STATEMENTS | _MANY).map(judging.dump)
