"""The judge of SQL: what models answer, and queries that must not run."""

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys

import conftest
import pytest

from gemma_sft import errors
from gemma_sft import train
from gemma_sft.inputs import records as records_lib
from gemma_sft.inputs import splits
from gemma_sft.tasks.sql import cage
from gemma_sft.tasks.sql import result
from gemma_sft.tasks.sql import task
from gemma_sft.tasks.sql import text as text_lib
from gemma_sft.tasks.sql import worker

_TABLES = """
    CREATE TABLE singer (id INTEGER PRIMARY KEY, Name TEXT, age INTEGER,
        fee REAL);
    CREATE TABLE song (id INTEGER, singer_id INTEGER REFERENCES singer(id),
        title TEXT);
"""
_SCRIPT = _TABLES + """
    INSERT INTO singer VALUES (1, 'Ada', 30, 1.5), (2, 'Bo', 40, 2.5),
        (3, 'Cy', 40, 0.1), (4, NULL, 20, 0.2);
    INSERT INTO song VALUES (1, 1, 'x'), (2, 1, 'y'), (3, 2, 'x');
"""
_Q = {'question': 'q'}
_SQL = {'query': 'SELECT 1'}
_NAMES = frozenset('singer song id name age fee singer_id title'.split())


_EQUAL = [
    ('select NAME from Singer', 'SELECT name FROM singer'),
    ('SELECT  count( * ) FROM song', 'select COUNT(*) from song'),
    ('SELECT T1.name FROM singer AS T1 JOIN song AS T2 ON T1.id = T2.singer_id',
     'SELECT singer.name FROM singer INNER JOIN song'
     ' ON singer.id = song.singer_id'),
    ('SELECT s.name FROM singer s', 'SELECT name FROM singer'),
    ('SELECT singer.name FROM singer ORDER BY age ASC',
     'SELECT name FROM singer ORDER BY age'),
    ('SELECT name FROM singer WHERE age <> 3',
     'SELECT name FROM singer WHERE age != 3'),
    ('SELECT count(*) AS n FROM song', 'SELECT count(*) FROM song'),
    ('SELECT id FROM singer WHERE "name" = "Ada"',
     "SELECT id FROM singer WHERE name = 'Ada'"),
    # The inner T1 is another table than the outer.
    ('SELECT T1.name FROM singer AS T1 WHERE T1.id IN (SELECT T1.singer_id'
     ' FROM song AS T1)',
     'SELECT name FROM singer WHERE id IN (SELECT singer_id FROM song)')]
_DIFFERENT = [
    ('SELECT name FROM singer', 'SELECT age FROM singer'),
    ('SELECT name FROM singer', 'SELECT DISTINCT name FROM singer'),
    ("SELECT id FROM singer WHERE name = 'Ada'",
     "SELECT id FROM singer WHERE name = 'ada'"),
    ('SELECT name FROM singer ORDER BY age',
     'SELECT name FROM singer ORDER BY age DESC'),
    ('SELECT count(*) AS n FROM song GROUP BY id ORDER BY n',
     'SELECT count(*) FROM song GROUP BY id ORDER BY id'),
    # A self join: which of the two is asked for matters.
    ('SELECT a.name FROM singer AS a JOIN singer AS b ON a.id = b.age',
     'SELECT b.name FROM singer AS a JOIN singer AS b ON a.id = b.age'),
    ('SELECT age AS id FROM singer ORDER BY id',
     'SELECT age FROM singer ORDER BY id'),
    ('SELECT id FROM singer WHERE "name" = 1',
     "SELECT id FROM singer WHERE 'name' = 1")]
_MANY = [[i % 2 if j % 2 else 1 - i % 2 for j in range(40)] for i in range(6)]
_ENDLESS = ('WITH RECURSIVE a(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM a)'
            ' SELECT {} FROM a')
_LONG = ("r(x) AS (SELECT 'aaaaaaaaaa' UNION ALL SELECT x || x FROM r"
         ' LIMIT 16), n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n'
         ' LIMIT 20000)')
_HOSTILE = {
    'not a SELECT': [
        'DROP TABLE song', 'DELETE FROM song', "UPDATE singer SET Name = 'x'",
        'INSERT INTO song VALUES (9, 9, 9)', 'CREATE TEMP TABLE t (a)',
        "ATTACH '{path}' AS other", "VACUUM INTO '{path}'",
        'PRAGMA hard_heap_limit = 0'],
    'not authorized': ['WITH a AS (SELECT 1) DELETE FROM song',
                       "SELECT * FROM pragma_table_info('song')"],
    'dbstat': ['SELECT * FROM dbstat'], 'random': ['SELECT random()'],
    'load_extension': ["SELECT load_extension('x')"], 'binding': ['SELECT ?'],
    'readfile': ["SELECT readfile('/etc/hostname')"],
    'writefile': ["SELECT writefile('{path}', 'x')"],
    'fts3_tokenizer': ["SELECT fts3_tokenizer('simple')"],
    'randomblob': ['SELECT hex(randomblob(900000000))'],
    'zeroblob': ['SELECT length(zeroblob(900000000))'],
    'printf': ["SELECT printf('%.*c', 900000000, 'x')"],
    'stopped after 20000000 steps': [
        _ENDLESS.format('count(*)'), 'SELECT count(*) FROM ' + ', '.join(
            f'singer a{i}' for i in range(20))],
    'the result is too large': [_ENDLESS.format('x')],
    'too big': ["SELECT replace(hex(x), '6', '" + 'y' * 100 + "') FROM (WITH"
                f' RECURSIVE {_LONG} SELECT max(x) AS x FROM r)'],
    'out of memory': [f'WITH RECURSIVE {_LONG} SELECT max(x) || i AS y FROM r,'
                      ' n GROUP BY i ORDER BY y'],
    'parser stack overflow': ['SELECT ' + '(' * 900 + '1' + ')' * 900],
    'too large': ['SELECT ' + ' + '.join(['1'] * 2000)],
    'one statement': ['SELECT 1; DROP TABLE song']}


def _record(query='SELECT 1', where='x.jsonl:1', **fields):
  fields = fields or {'context': _SCRIPT}
  return records_lib.Record(
      {'question': 'Which?', 'query': query, **fields}, where)


def _row(gold, answer):
  row, = task.judge([_record(gold)], [answer]).rows
  return row


@pytest.fixture
def folder(tmp_path):
  """A Spider folder with one database in text and one in binary form."""
  for name in ('text', 'binary'):
    (tmp_path / 'database' / name).mkdir(parents=True)
  (tmp_path / 'database' / 'text' / 'text').mkdir()
  _text_file(tmp_path).write_text(_SCRIPT)
  with contextlib.closing(sqlite3.connect(
      tmp_path / 'database' / 'binary' / 'binary.sqlite')) as connection:
    connection.executescript(_SCRIPT)
  return tmp_path


def _text_file(folder):
  return folder / 'database' / 'text' / 'text.sql'


def test_a_database_is_the_same_in_each_form(folder):
  where = str(folder / 'train.jsonl:7')
  forms = [_record(where=where, db_id='text'),
           _record(where=where, db_id='binary'), _record(context=_SCRIPT),
           _record(context=_TABLES), _record(schema=_SCRIPT)]
  prompts = [task.to_messages(r) for r in forms]
  assert all(p == prompts[0] for p in prompts)
  user, model = prompts[0]
  assert user.content == ('singer(id int, Name text, age int, fee real)\n'
                          'song(id int, singer_id int, title text)\n'
                          'song.singer_id = singer.id\n\n'
                          'Question: Which?\nWrite the SQLite query.')
  assert model.content == 'SELECT 1'
  judged = task.judge(forms, ['SELECT 1'] * 5)
  assert [r.get('execution') for r in judged.rows] == [
      True, True, True, None, True]


def test_the_hash_of_the_data_covers_the_databases_it_names(folder):
  where = str(folder / 'a.jsonl:1')
  named = [_record(where=where, db_id=name)
           for name in ('text', 'binary', 'text', 'missing')]
  assert task.referenced_files(named) == [
      str(_text_file(folder)),
      str(folder / 'database' / 'binary' / 'binary.sqlite')]
  before = splits.data_hash(named, task)
  assert 'age int' in task.schema_text(named[0])
  _text_file(folder).write_text(_SCRIPT.replace('age INTEGER', 'age TEXT'))
  assert splits.data_hash(named, task) != before
  assert 'age text' in task.schema_text(named[0])  # The script is read again.
  # A database in the record itself is part of its fields already.
  inside = [_record(where=where, db_id='text', context=_SCRIPT)]
  assert splits.data_hash(inside, task) == records_lib.content_hash(inside)


def test_changed_tables(run_config, folder, tokenizer, tmp_path, monkeypatch):
  rows = [{'question': f'Which {i}?', 'query': f'SELECT {i}', 'db_id': 'text'}
          for i in range(4)]
  path = folder / 'train.jsonl'
  path.write_text('\n'.join(map(json.dumps, rows)))
  run_config.task = 'sql'
  run_config.data.update(train=str(path), validation='', max_length=256)
  run_config.eval.every = 0
  run_config.train.steps = 1
  assert train.main(run_config, str(tmp_path / 'new'), False) == 0
  # A run that began before tables counted.
  shutil.copytree(tmp_path / 'new', tmp_path / 'old')
  records = splits.read_split(run_config.data, 'train')
  for meta in (tmp_path / 'old').glob('checkpoints/*/meta/metadata'):
    meta.write_text(meta.read_text().replace(
        splits.data_hash(records, task), records_lib.content_hash(records)))
  assert train.main(run_config, str(tmp_path / 'old'), False) == 0
  monkeypatch.setenv('GEMMA_SFT_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(splits, '_MIN_SECONDS', -1.0)
  for n_files in (1, 2):
    splits.load_splits(run_config.data, ('train',), task, tokenizer)
    assert len(list((tmp_path / 'cache' / 'tokens').iterdir())) == n_files
    _text_file(folder).write_text(_SCRIPT.replace('age INTEGER', 'age TEXT'))
  for workdir, message in (('new', 'the training records'),
                           ('old', 'cannot be reproduced')):
    with pytest.raises(errors.UserError, match=message):
      train.main(run_config, str(tmp_path / workdir), False)


@pytest.mark.parametrize('fields, schema', [
    ({}, ''), ({'schema': 'CREATE TABLE t (a INT)'}, 't(a int)\n\n')])
def test_a_form_has_no_query(fields, schema):
  user, model = task.to_messages(
      records_lib.Record({'question': 'Who?', **fields}, 'form'))
  assert user.content == f'{schema}Question: Who?\nWrite the SQLite query.'
  assert model.content == ''


@pytest.mark.parametrize('fields, got', [
    (_Q | {'db_id': 'text'}, 'columns question, db_id'),
    (_Q | {'context': _TABLES}, 'columns question, context'),
    (_SQL | {'context': _TABLES}, 'columns query, context'),
    (_SQL | {'question': ' ', 'context': _TABLES}, 'columns'),
    (_SQL | {'question': 7, 'context': _TABLES}, 'columns'),
    (_Q | {'query': None, 'db_id': 'text'}, 'columns'),
    (_Q | _SQL, "db_id is ''"), (_Q | _SQL | {'db_id': 'none'}, 'none.sqlite'),
    # A name is not a path, even if the path exists.
    (_Q | _SQL | {'db_id': 'text/../text'}, 'db_id is'),
    (_Q | _SQL | {'context': 'CREATE TABEL t (a)'}, 'near "TABEL"')])
def test_mistakes_name_the_place(folder, fields, got):
  where = str(folder / 'train.jsonl:3')
  with pytest.raises(errors.UserError, match=rf'train.jsonl:3(.*\n)*.*{got}'):
    task.to_messages(records_lib.Record(fields, where))


@pytest.mark.parametrize('answer, query', [
    ('select a from t ;', 'select a from t'),
    ('```sql\nSELECT a\n\nFROM t;\n```\nIt counts.', 'SELECT a\n\nFROM t'),
    ('```\nSELECT a FROM t\n```\nor\n```\nSELECT b FROM t\n```',
     'SELECT a FROM t'),
    ('```sqlite\nSELECT a\n', 'SELECT a'),  # Cut off.
    ('SQL: SELECT a', 'SELECT a'), ('SQLite query: select a', 'select a'),
    ("The query is:\n\nSELECT a FROM t WHERE b = 'x; y';\n\nIt selects.",
     "SELECT a FROM t WHERE b = 'x; y'"),
    ('To get all, use `SELECT a FROM t`.', 'SELECT a FROM t'),
    ('With pleasure: SELECT 1', 'SELECT 1'),
    ('SELECT a FROM t\n\nQuestion: Next?\nWrite', 'SELECT a FROM t'),
    ('SELECT a\nFROM t\nThis query gives a.', 'SELECT a\nFROM t'),
    ('SELECT a\n\nFROM t\n\nHope it helps', 'SELECT a\n\nFROM t'),
    ("SELECT 'it''s; ok' FROM t; done", "SELECT 'it''s; ok' FROM t"),
    ('SELECT 1; -- done', 'SELECT 1'), *((text, text) for text in (
        'SELECT a FROM t', 'WITH x AS (SELECT 1) SELECT * FROM x',
        'SELECT 1 -- a; b\nFROM t', 'I cannot.', ''))])
def test_the_query_is_found(answer, query):
  assert text_lib.extract(answer) == (query, '')


@pytest.mark.parametrize('answer', [
    'SELECT 1; SELECT 2', 'SELECT 1; DROP TABLE t', 'DROP TABLE t; SELECT 1',
    'SELECT 1;\n/* and */ ; PRAGMA x', '```sql\nSELECT 1;\nselect 2;\n```'])
def test_two_statements_are_refused(answer):
  assert text_lib.extract(answer)[1] == text_lib.SEVERAL
  row = _row('SELECT count(*) FROM song', answer)
  assert (row['valid'], row['execution'], row['error']) == (
      False, False, 'several statements')


@pytest.mark.parametrize('a, b', _EQUAL + _DIFFERENT)
def test_meaning_counts_and_spelling_does_not(a, b):
  form = text_lib.normal_form(a, _NAMES)
  assert form is not None
  assert (form == text_lib.normal_form(b, _NAMES)) == ((a, b) in _EQUAL)


def test_what_cannot_be_parsed_has_no_form():
  for text in ('SELECT FROM WHERE', 'I cannot.', '', 'SELECT ((((', '(' * 3000):
    assert text_lib.normal_form(text) is None
    assert text_lib.hardness(text) is None
  deep = 'SELECT 1 FROM ' + '(SELECT * FROM ' * 120 + 't' + ')' * 120
  assert text_lib.normal_form(deep) is None


# The class that Spider's evaluation.py gives to each, run on these queries.
@pytest.mark.parametrize('query, level', [
    ('SELECT count(*) FROM singer', 'easy'),
    ("SELECT name FROM singer WHERE name LIKE 'a%'", 'medium'),
    ('SELECT name, age FROM singer WHERE age > 3 AND fee < 2', 'medium'),
    ('SELECT name FROM singer ORDER BY age DESC LIMIT 1', 'medium'),
    ('SELECT T1.name, count(*) FROM singer AS T1 JOIN song AS T2 ON T1.id ='
     ' T2.singer_id GROUP BY T1.id', 'medium'),
    ('SELECT T1.name FROM singer AS T1 JOIN song AS T2 ON T1.id = T2.singer_id'
     ' GROUP BY T1.id ORDER BY count(*) DESC LIMIT 1', 'extra'),
    ("SELECT T1.name FROM singer AS T1 JOIN song AS T2 ON T1.id = T2.singer_id"
     " WHERE T2.title = 'x' OR T1.age > 2", 'hard'),
    ('SELECT name FROM singer WHERE age > (SELECT avg(age) FROM singer)',
     'hard'),
    ('SELECT name FROM singer WHERE id NOT IN (SELECT singer_id FROM song)',
     'hard'),
    ('SELECT id FROM singer UNION SELECT id FROM song', 'hard'),
    ('SELECT id, name FROM singer EXCEPT SELECT id, title FROM song', 'extra')])
def test_hardness(query, level):
  assert text_lib.hardness(query) == level


@pytest.mark.parametrize('a, b, ordered, same', [
    *((a, b, False, True) for a, b in (
        ([[1], [2]], [[2], [1]]), ([[0.1 + 0.2]], [[0.3]]), ([[3]], [[3.0]]),
        ([[1, 'a'], [2, 'b']], [['a', 1], ['b', 2]]), ([], []),
        ([[1, 2, 2], [2, 1, 2]], [[2, 1, 2], [2, 2, 1]]))),
    *((a, b, False, False) for a, b in (
        ([[1], [1], [2]], [[1], [2], [2]]),  # Not as sets.
        ([[123456789012]], [[123456789013]]),  # Whole numbers: exact.
        ([[1], [1]], [[1]]), ([[0.3]], [[0.3000001]]), ([[1]], [['1']]),
        ([['a']], [['A']]), ([[None]], [[0]]), ([[{'blob': '41'}]], [['A']]),
        ([[1, 'a'], [2, 'b']], [['b', 1], ['a', 2]]), ([[1, 2]], [[1]]),
        # The same columns as multisets, but not the same rows.
        ([[1, 2], [2, 1]], [[1, 1], [2, 2]]), ([[1]], []))),
    ([[1], [2]], [[2], [1]], True, False), ([], [[1]], True, False),
    ([[1, 'a'], [2, 'b']], [['a', 1], ['b', 2]], True, True),
    # Many equal columns take a short time.
    (_MANY, [row[::-1] for row in _MANY], False, True),
    (_MANY, [row[:-1] + [7] for row in _MANY], False, False)])
def test_same_rows(a, b, ordered, same):
  assert result.same(a, b, ordered) is same
  assert result.same(b, a, ordered) is same


@pytest.mark.parametrize('gold, answer, right', [
    ('SELECT Name, age FROM singer', 'SELECT age, name FROM singer', True),
    ('SELECT age FROM singer', 'SELECT age FROM singer ORDER BY age', True),
    ('SELECT age FROM singer ORDER BY age', 'SELECT age FROM singer', False),
    ('SELECT age FROM singer', 'SELECT DISTINCT age FROM singer', False),
    # The order inside of a subquery is not one of the result.
    ('SELECT id FROM (SELECT id FROM singer ORDER BY age)',
     'SELECT id FROM singer', True),
    ('SELECT sum(fee) FROM singer', 'SELECT 4.3', True),
    ('SELECT id FROM singer UNION SELECT 9 ORDER BY 1',
     'SELECT id FROM singer UNION SELECT 9 ORDER BY 1 DESC', False),
    ('SELECT count(*) FROM song', 'I cannot.', False),
    ('SELECT count(*) FROM song', '', False),
    ('SELECT count(*) FROM song', 'SELECT nope FROM song', False)])
def test_execution(gold, answer, right):
  assert _row(gold, answer)['execution'] is right


def test_judge_counts_queries_that_say_something():
  reference = [
      _record('SELECT Name FROM singer WHERE id = 1'),  # Right.
      _record('SELECT Name FROM singer WHERE id = 2'),  # Runs, and is wrong.
      _record('SELECT Name FROM singer WHERE id = 9'),  # No rows.
      _record('SELECT max(id) FROM song WHERE id = 9'),  # Only NULL.
      _record('SELECT nope FROM singer'),  # Does not run.
      _record('SELECT count(*) FROM song', context=_TABLES),  # Empty tables.
      _record('SELECT age FROM singer WHERE id IN (SELECT singer_id FROM'
              ' song)')]
  answers = [r.fields['query'] for r in reference]
  answers[0] = "```sql\nSELECT name FROM singer WHERE Name = 'Ada';\n```"
  answers[1] = 'SELECT age FROM singer WHERE id = 2'
  answers[-1] = 'SELECT FROM'
  judged = task.judge(reference, answers)
  assert [r.get('execution') for r in judged.rows] == [
      True, False, None, None, None, None, False]
  assert judged.metrics == {
      'execution': 1 / 3, 'valid': 5 / 7, 'exact': 4 / 7,
      'execution_easy': 1 / 2, 'execution_hard': 0, 'n': 7}
  for part in ("2 of 7 not counted in execution: the record's query gives no",
               "1 of 7 not counted in execution: the record's query does not",
               '1 of 7 not counted in execution: the database has no rows'):
    assert part in judged.note
  row = judged.rows[1]
  assert (row['result'], row['expected']) == ('40', 'Bo')
  assert row['hardness'] == 'easy' and row['execution_easy'] is False
  bad, = task.check_answers([
      _record(where='a.jsonl:1'), _record('SELECT nope', where='a.jsonl:2'),
      _record('SELECT count(*) FROM song', where='a.jsonl:3')])
  assert bad == 'a.jsonl:2: the query does not run: no such column: nope'


def test_judge_of_a_form():
  fields = {'question': 'Who?', 'schema': _TABLES}
  judged = task.judge([records_lib.Record(fields, 'form')] * 2,
                      ['SELECT Name FROM singer', 'SELECT nope FROM singer'])
  assert judged.metrics == {'valid': 0.5, 'n': 2}
  assert 'no such column: nope' in judged.rows[1]['error']
  row, = task.judge(
      [records_lib.Record({'question': 'Who?'}, 'form')], ['SELECT 1']).rows
  assert row == {'query': 'SELECT 1'}
  # Rows are JSON, and short.
  judged = task.judge([_record('SELECT Name FROM singer')] * 2, [
      'SELECT * FROM singer a, singer b, singer c, singer d, singer e',
      "SELECT x'00ff'"])
  text = json.dumps(judged.rows)
  assert len(text) < 3000 and '... 1024 rows' in text and '00ff' in text


def test_hostile_queries_are_refused(tmp_path, folder):
  path = tmp_path / 'written'
  database = folder / 'database' / 'binary' / 'binary.sqlite'
  before = database.read_bytes()
  cases = [({**place, 'query': query.replace('{path}', str(path))}, reason)
           for reason, queries in _HOSTILE.items() for query in queries
           for place in ({'path': str(database)}, {'script': _SCRIPT})]
  jobs = []
  for job, _ in cases:
    jobs += [job, {**job, 'query': 'SELECT count(*) FROM song'}]
  answers = worker.run_all(jobs)
  for (job, reason), answer, after in zip(cases, answers[::2], answers[1::2]):
    assert reason in answer['error'], (job['query'], answer)
    assert after == {'rows': [[3]], 'filled': True}  # Nothing was changed.
  assert database.read_bytes() == before and not path.exists()
  assert [p.name for p in database.parent.iterdir()] == ['binary.sqlite']


def test_processes_of_queries(tmp_path, monkeypatch):
  path = tmp_path / 'a.sqlite'  # Its text is not UTF-8.
  with contextlib.closing(sqlite3.connect(path)) as connection:
    connection.execute('CREATE TABLE t (a TEXT)')
    connection.execute("INSERT INTO t VALUES (CAST(x'61ff' AS TEXT))")
    connection.commit()
  job = {'path': str(path), 'query': 'SELECT a FROM t'}
  assert worker.run_all([job])[0]['rows'] == [['a\ufffd']]
  # A query that ends its process, by one long step, does not affect others.
  slow = (f'WITH RECURSIVE {_LONG} SELECT count(*) FROM r a, n, r b'
          " WHERE instr(a.x, b.x || 'b')")
  good = {'script': _SCRIPT, 'query': 'SELECT count(*) FROM singer'}
  first, bad, last = worker.run_all(
      [good, {'script': _SCRIPT, 'query': slow}, good])
  assert first == last == {'rows': [[4]], 'filled': True}
  assert bad == {'error': worker.TOO_LONG}
  # A process that does not start is an error.
  monkeypatch.setattr(sys, 'executable', '/bin/false')
  with pytest.raises(RuntimeError, match='ended with status 1'):
    worker.run_all([{'script': _SCRIPT, 'query': 'SELECT 1'}])


@pytest.mark.parametrize('script, reason', [
    ("VACUUM INTO '{path}'", 'denied'),
    ("CREATE TABLE t (a); INSERT INTO t VALUES (readfile('{path}'))",
     'no such function'),
    ("SELECT load_extension('x')", 'load_extension'),
    ('CREATE TABLE t (a); INSERT INTO t VALUES (zeroblob(900000000))',
     'zeroblob'),
    ("CREATE TABLE t (a DEFAULT (hex(randomblob(900000000)))); INSERT INTO t"
     ' DEFAULT VALUES', 'too big'),
    ("CREATE TABLE t (a DEFAULT (load_extension('x'))); INSERT INTO t DEFAULT"
     ' VALUES', 'load_extension|not authorized|unsafe'),
    *((script, 'not authorized') for script in (
        'CREATE TABLE t (a); DROP TABLE t', 'CREATE TEMP TABLE t (a)',
        'CREATE VIRTUAL TABLE t USING fts5(a)', _ENDLESS.format('count(*)'),
        'CREATE TABLE t (a); CREATE TRIGGER u AFTER INSERT ON t BEGIN'
        ' INSERT INTO t VALUES (1); END', "ATTACH '{path}' AS x")),
    *((f'CREATE TABLE t (a); {rest}', 'prohibited') for rest in (
        # A script cannot multiply its data.
        'INSERT INTO t VALUES (1);INSERT INTO t SELECT a FROM t',
        'CREATE TABLE u AS SELECT a FROM t',
        'SELECT t.a FROM t, t AS u, t AS v'))])
def test_hostile_scripts_are_refused(tmp_path, script, reason):
  path = tmp_path / 'written'
  record = _record(context=script.replace('{path}', str(path)))
  with pytest.raises(errors.UserError, match=reason):
    task.to_messages(record)
  assert not path.exists()


def test_ordinary_scripts_are_accepted():
  # Statements of dumps by SQLite and of other databases' schemas.
  record = _record(context='''
      PRAGMA foreign_keys = OFF; BEGIN TRANSACTION;
      CREATE TABLE IF NOT EXISTS t (a INT CHECK (a > 0) PRIMARY KEY,
          b DATE DEFAULT CURRENT_DATE, c AS (a + length(b)), UNIQUE (a, b));
      INSERT INTO t (a) VALUES (1), (2);
      CREATE INDEX i ON t (b) WHERE a > 1;
      CREATE VIEW v AS SELECT a FROM t;
      COMMIT;''')
  assert task.schema_text(record) == 't(a int, b date)'
  with contextlib.closing(task.connect(record)) as connection:
    assert cage.run(connection, 'SELECT count(a) FROM v') == [[2]]


@pytest.mark.parametrize('name', ['text', 'binary'])
def test_connections_only_read(folder, name):
  record = _record(where=str(folder / 'a.jsonl:1'), db_id=name)
  with contextlib.closing(task.connect(record)) as connection:
    for statement in ('DELETE FROM song', 'DROP TABLE song',
                      "ATTACH ':memory:' AS x", 'PRAGMA query_only = 0'):
      with pytest.raises(sqlite3.DatabaseError, match='not authorized'):
        connection.execute(statement)


@pytest.mark.parametrize('arguments, output', [
    # The cage runs without the package and what the package needs.
    (['-I', '-S', cage.__file__], 'ready\n'),
    # The task imports nothing heavy before it is needed.
    (['-c', f'import sys; sys.path.insert(0, {str(conftest.ROOT)!r});'
      'import gemma_sft.tasks.sql.task; print('
      '{"sqlglot", "jax", "tensorflow"} & set(sys.modules))'], 'set()\n')])
def test_few_modules_are_imported(arguments, output):
  done = subprocess.run([sys.executable, *arguments], cwd='/', input='',
                        text=True, capture_output=True)
  assert (done.stdout, done.stderr) == (output, '')
