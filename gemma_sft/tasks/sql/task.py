"""Questions about a database, judged by running the queries on SQLite.

Queries are untrusted text: they run in the process of `cage`, which can only
read, within limits on steps, time and memory.
"""

import collections
import contextlib
import functools
import os
import re
import sqlite3
from typing import Any
from typing import Sequence

from gemma_sft import chat
from gemma_sft import errors
from gemma_sft import tasks
from gemma_sft.inputs import readers
from gemma_sft.inputs import records as records_lib
from gemma_sft.tasks.sql import cage
from gemma_sft.tasks.sql import result
from gemma_sft.tasks.sql import worker

HEADLINE = 'execution'
LOWER_IS_BETTER = frozenset()
FIELDS = ('question', 'schema')

_PROMPT = '{schema}\n\nQuestion: {question}\nWrite the SQLite query.'
_SHOWN_ROWS = 5
_SHOWN_CHARS = 120  # Of each row, or of an error.
_TABLES = ("SELECT name, sql FROM sqlite_master WHERE type = 'table' AND name"
           " NOT LIKE 'sqlite_%' ORDER BY rowid")


def to_messages(record: records_lib.Record) -> Sequence[chat.Message]:
  """Returns a prompt of schema and question, and the query.

  Reads Spider's {db_id, question, query}, with the databases beside the file
  as `database/<db_id>/<db_id>.sqlite` or, as text, `.sql`;
  create-table-context's {context, question, answer}; and a form's {question,
  schema}, whose query is ''. Context and schema are CREATE TABLE statements,
  and INSERT may follow.

  Raises:
    UserError: if a column or the database is missing.
  """
  fields = record.fields
  question, query = fields.get('question'), _gold(record)
  is_form = fields.keys() <= set(FIELDS)
  if not _is_text(question) or not (query or is_form):
    raise tasks.wrong_columns(
        record, 'question and query, and db_id or context', 'query=sql')
  schema = '' if is_form and not fields.get('schema') else schema_text(record)
  return [
      chat.Message('user', _PROMPT.format(
          schema=schema, question=' '.join(question.split())).lstrip('\n')),
      chat.Message('model', query)]


def _gold(record):
  """Returns the record's query on one line, '' if it has none."""
  query = record.fields.get('query', record.fields.get('answer'))
  return ' '.join(query.split()).rstrip('; ') if _is_text(query) else ''


def _is_text(value):
  return isinstance(value, str) and bool(value.strip())


def to_form(record: records_lib.Record) -> dict[str, str]:
  """Returns the question, and its tables as CREATE TABLE statements."""
  with contextlib.closing(connect(record)) as connection:
    tables = connection.execute(_TABLES).fetchall()
  return {'question': record.fields['question'],
          'schema': ';\n'.join(sql for _, sql in tables) + ';'}


def schema_text(record: records_lib.Record) -> str:
  """Returns the schema that a question is about, one table per line.

  A table is `singer(Singer_ID int, Name text)`; foreign keys follow as
  `song.Singer_ID = singer.Singer_ID`.
  """
  with contextlib.closing(connect(record)) as connection:
    lines, keys = [], []
    for table, _ in connection.execute(_TABLES).fetchall():
      quoted = _quoted(table)
      columns = ', '.join(
          f'{_name(name)} {_type(kind)}'.strip() for _, name, kind, *_ in
          connection.execute(f'PRAGMA table_info({quoted})'))
      lines.append(f'{_name(table)}({columns})')
      for _, _, other, here, there, *_ in connection.execute(
          f'PRAGMA foreign_key_list({quoted})'):
        keys.append(f'{_name(table)}.{_name(here)} = '
                    f'{_name(other)}.{_name(there or here)}')
  return '\n'.join(lines + keys)


def _name(name):
  return name if re.fullmatch(r'\w+', name) else f'"{name}"'


def _type(kind):
  """Returns int, real or text, as SQLite's rules of affinity (3.1) do."""
  kind = kind.upper()
  if 'INT' in kind:
    return 'int'
  if any(word in kind for word in ('CHAR', 'CLOB', 'TEXT')):
    return 'text'
  if any(word in kind for word in ('REAL', 'FLOA', 'DOUB', 'NUM', 'DEC')):
    return 'real'
  return kind.lower()


def connect(record: records_lib.Record) -> sqlite3.Connection:
  """Opens the record's database for reading: its context, else its db_id.

  Raises:
    UserError: if the record names no database, the file does not exist, or
      SQLite refuses the script, in which only CREATE TABLE, INDEX, VIEW and
      INSERT of values are allowed.
  """
  place = _database(record)
  try:
    connection = _open(*place)
    # SQLite reads the file only now, and reports one that is no database.
    connection.execute('SELECT count(*) FROM sqlite_master')
    return connection
  # ValueError: a script with a NUL.
  except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
    raise errors.UserError(
        f'{record.where}: SQLite refuses its database: {error}',
        'a database file, or CREATE TABLE and INSERT INTO ... VALUES',
        'correct or remove it') from None


def _has_database(record):
  return any(record.fields.get(name) for name in ('context', 'schema', 'db_id'))


def referenced_files(records: Sequence[records_lib.Record]) -> list[str]:
  """Returns the files of the databases that records name by their db_id."""
  paths = dict.fromkeys(
      _database_file(r) for r in records
      if not r.fields.get('context') and not r.fields.get('schema'))
  return [path for path in paths if path]


def _database_stem(record):
  """Returns (db_id, the path of its database without the ending)."""
  name = str(record.fields.get('db_id', ''))
  folder = os.path.dirname(re.sub(r'(:\d+|\[\d+\])$', '', record.where))
  return name, os.path.join(folder, 'database', name, name)


def _database_file(record):
  """Returns the path of the database that db_id names, '' without a file."""
  name, stem = _database_stem(record)
  if re.fullmatch(r'\w+', name):
    for ending in ('.sqlite', '.sql'):
      if os.path.isfile(stem + ending):
        return stem + ending
  return ''


def _database(record):
  """Returns (path of a database, '') or ('', script that creates one)."""
  for name in ('context', 'schema'):
    if record.fields.get(name):
      return '', record.fields[name]
  if path := _database_file(record):
    return (path, '') if path.endswith('.sqlite') else (
        '', _script(path, os.stat(path).st_mtime_ns))
  name, stem = _database_stem(record)
  raise errors.UserError(
      f'{record.where}: db_id is {name!r}, and there is neither {stem}.sqlite'
      ' nor .sql',
      'a database beside the file, or a context column with CREATE TABLE',
      'copy the database folder there')


@functools.lru_cache(maxsize=64)
def _script(path, changed_ns):
  """Returns the text of a script; reads it again if the file has changed."""
  del changed_ns
  return readers.read_text(path)


@functools.lru_cache(maxsize=64)
def _names(path, script):
  """Returns the tables and columns of a database, in lower case."""
  with contextlib.closing(_open(path, script)) as connection:
    tables = [row[0] for row in connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table'")]
    return frozenset(
        [t.lower() for t in tables]
        + [row[1].lower() for t in tables for row in connection.execute(
            f'PRAGMA table_info({_quoted(t)})')])


def _quoted(name):
  return '"' + name.replace('"', '""') + '"'


def _open(path, script):
  if path:
    return cage.open_file(path)
  connection = sqlite3.connect(':memory:')
  connection.deserialize(_image(script))
  return cage.guard(connection)


@functools.lru_cache(maxsize=64)
def _image(script):
  """Returns the bytes of the database that a script creates."""
  with contextlib.closing(cage.build(script)) as connection:
    return connection.serialize()


def judge(
    records: Sequence[records_lib.Record],
    completions: Sequence[str],
    training: Sequence[records_lib.Record] = (),
) -> tasks.Judged:
  """Runs the queries of answers and records, and compares their rows.

  Metrics, as shares:

    execution: the query gives the same rows as the record's query; the order of
      rows counts only if the record's query ends in ORDER BY, the order of
      columns never.
    valid: the query runs.
    exact: the query is the record's except for spelling (`text.normal_form`).
    execution_easy to execution_extra: execution by Spider's hardness of the
      record's query.

  Execution is not counted if it would say nothing: if the database has no rows
  (create-table-context), or the record's own query gives no rows or does not
  run. The note says how often.
  """
  del training
  # Imports sqlglot, which takes a second and which only judging needs.
  from gemma_sft.tasks.sql import text as text_lib

  extracted = [text_lib.extract(completion) for completion in completions]
  jobs: dict[tuple[str, str, str], int] = {}
  for record, (query, problem) in zip(records, extracted):
    if _has_database(record):
      for text in (_gold(record), '' if problem else query):
        if text:
          jobs.setdefault((*_database(record), text), len(jobs))
  answers = _run([*jobs])
  rows, left_out = [], collections.Counter()
  for record, (query, problem) in zip(records, extracted):
    row = {'query': query}
    rows.append(row)
    if not _has_database(record):
      continue
    database, gold = _database(record), _gold(record)
    got = answers[jobs[*database, query]] if query and not problem else {
        'error': problem or 'no query'}
    row |= _valid(got)
    if not gold:
      continue
    row |= text_lib.compare(query, gold, _names(*database))
    wanted = answers[jobs[*database, gold]]
    if reason := _why_not_counted(wanted):
      row['not_counted'] = reason
      left_out[reason] += 1
      continue
    row['expected'] = _shown(wanted['rows'])
    row['execution'] = 'rows' in got and result.same(
        wanted['rows'], got['rows'], text_lib.is_ordered(gold))
    if row.get('hardness'):
      row[f'execution_{row["hardness"]}'] = row['execution']
  note = ''.join(f'{n} of {len(rows)} not counted in execution: {reason}. '
                 for reason, n in left_out.items()).strip()
  names = [HEADLINE, 'valid', 'exact',
           *(f'execution_{level}' for level in text_lib.HARDNESS)]
  return tasks.Judged(tasks.means(rows, names) | {'n': len(rows)}, rows, note)


def _run(jobs) -> list[dict[str, Any]]:
  return worker.run_all([
      {'path': path, 'query': query} if path else
      {'script': script, 'query': query} for path, script, query in jobs])


def _valid(got):
  if 'error' in got:
    return {'valid': False, 'error': got['error'][:_SHOWN_CHARS]}
  return {'valid': True, 'result': _shown(got['rows'])}


def _why_not_counted(wanted):
  if 'error' in wanted:
    return "the record's query does not run"
  if not wanted['filled']:
    return 'the database has no rows'
  return "the record's query gives no rows" if result.is_empty(
      wanted['rows']) else ''


def _shown(rows):
  """Returns the first few rows as text."""
  lines = [' | '.join('NULL' if v is None else str(v) for v in row)[
      :_SHOWN_CHARS] for row in rows[:_SHOWN_ROWS]]
  if len(rows) > _SHOWN_ROWS:
    lines.append(f'... {len(rows)} rows')
  return '\n'.join(lines)


def check_answers(records: Sequence[records_lib.Record]) -> list[str]:
  """Returns a line for each record whose query does not run."""
  asked = [r for r in records if _gold(r) and _has_database(r)]
  answers = _run([(*_database(r), _gold(r)) for r in asked])
  return [f'{record.where}: the query does not run: {answer["error"]}'
          for record, answer in zip(asked, answers) if 'error' in answer]
