"""Questions about a database, judged by running the queries on SQLite.

Queries are untrusted text: they run in the process of `cage`.
"""

import collections
import contextlib
import functools
import os
import re
import sqlite3
from typing import Any
from typing import Sequence

from gemma_sft import errors
from gemma_sft import tasks
from gemma_sft.inputs import readers
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


def to_messages(record: tasks.Record) -> tasks.Conversation:
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
  prompt = _PROMPT.format(schema=schema, question=' '.join(question.split()))
  return tasks.conversation(prompt.lstrip('\n'), query)


def _gold(record):
  """Returns the record's query on one line, '' if it has none."""
  query = record.fields.get('query', record.fields.get('answer'))
  return ' '.join(query.split()).rstrip('; ') if _is_text(query) else ''


def _is_text(value):
  return isinstance(value, str) and bool(value.strip())


def to_form(record: tasks.Record) -> dict[str, str]:
  """Returns the question, and its tables as CREATE TABLE statements."""
  with contextlib.closing(connect(record)) as connection:
    tables = connection.execute(_TABLES).fetchall()
  return {'question': record.fields['question'],
          'schema': ';\n'.join(sql for _, sql in tables) + ';'}


def schema_text(record: tasks.Record) -> str:
  """Returns the schema that a question is about, one table per line.

  A table is `singer(Singer_ID int, Name text)`; foreign keys follow as
  `song.Singer_ID = singer.Singer_ID`.
  """
  lines, keys = [], []
  with contextlib.closing(connect(record)) as connection:
    for table, _ in connection.execute(_TABLES).fetchall():
      columns = ', '.join(
          f'{_name(name)} {_type(kind)}'.strip()
          for _, name, kind, *_ in _pragma(connection, 'table_info', table))
      lines.append(f'{_name(table)}({columns})')
      keys += [f'{_name(table)}.{_name(here)} = '
               f'{_name(other)}.{_name(there or here)}'
               for _, _, other, here, there, *_ in _pragma(
                   connection, 'foreign_key_list', table)]
  return '\n'.join(lines + keys)


def _pragma(connection, name, table):
  quoted = table.replace('"', '""')
  return connection.execute(f'PRAGMA {name}("{quoted}")').fetchall()


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


def connect(record: tasks.Record) -> sqlite3.Connection:
  """Opens the record's database for reading: its context, else its db_id.

  Raises:
    UserError: if the record names no database, the file does not exist, or
      SQLite refuses the script (`cage.build`).
  """
  place = _database(record)  # Reports a missing file itself.
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


def referenced_files(records: tasks.Records) -> list[str]:
  """Returns the files of the databases that records name by their db_id."""
  paths = dict.fromkeys(
      _database_file(r)[0] for r in records
      if not r.fields.get('context') and not r.fields.get('schema'))
  return [path for path in paths if path]


def _database_file(record):
  """Returns the file that db_id names, '' if missing, and it without ending."""
  name = str(record.fields.get('db_id', ''))
  folder = os.path.dirname(re.sub(r'(:\d+|\[\d+\])$', '', record.where))
  stem = os.path.join(folder, 'database', name, name)
  # A name with a slash would leave the folder.
  endings = ('.sqlite', '.sql') if re.fullmatch(r'\w+', name) else ()
  found = (stem + ending for ending in endings if os.path.isfile(stem + ending))
  return next(found, ''), stem


def _database(record):
  """Returns (path of a database, '') or ('', script that creates one)."""
  fields = record.fields
  if script := fields.get('context') or fields.get('schema'):
    return '', script
  path, stem = _database_file(record)
  if path.endswith('.sqlite'):
    return path, ''
  if path:
    return '', _script(path, os.stat(path).st_mtime_ns)
  name = str(fields.get('db_id', ''))
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
    columns = [row[1] for table in tables
               for row in _pragma(connection, 'table_info', table)]
  return frozenset(map(str.lower, tables + columns))


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
    records: tasks.Records, completions: Sequence[str],
    training: tasks.Records = ()) -> tasks.Judged:
  """Runs the queries of answers and records, and compares their rows.

  Metrics, as shares:

    execution: the query gives the same rows as the record's query, in any order
      unless that ends in ORDER BY, with columns in any order.
    valid: the query runs.
    exact: the query is the record's except for spelling (`text.normal_form`).
    execution_easy to execution_extra: execution by Spider's hardness of the
      record's query.

  Execution is not counted, and a note says so, if it would say nothing: if the
  database has no rows (create-table-context), or the record's own query gives
  none or does not run.
  """
  # Imports sqlglot, which takes a second and which only judging needs.
  from gemma_sft.tasks.sql import text as text_lib

  extracted = [text_lib.extract(completion) for completion in completions]
  jobs = dict.fromkeys(
      (*_database(record), text)
      for record, (query, problem) in zip(records, extracted)
      if _has_database(record)
      for text in (_gold(record), '' if problem else query) if text)
  answers = dict(zip(jobs, _run(jobs)))
  rows, left_out = [], collections.Counter()
  for record, (query, problem) in zip(records, extracted):
    row = {'query': query}
    rows.append(row)
    if not _has_database(record):
      continue
    database, gold = _database(record), _gold(record)
    got = answers[*database, query] if query and not problem else {
        'error': problem or 'no query'}
    row['valid'] = 'rows' in got
    if row['valid']:
      row['result'] = _shown(got['rows'])
    else:
      row['error'] = got['error'][:_SHOWN_CHARS]
    if not gold:
      continue
    row |= text_lib.compare(query, gold, _names(*database))
    wanted = answers[*database, gold]
    if reason := _why_not_counted(wanted):
      row['not_counted'] = reason
      left_out[reason] += 1
      continue
    row['expected'] = _shown(wanted['rows'])
    row['execution'] = row['valid'] and result.same(
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


def check_answers(records: tasks.Records) -> list[str]:
  """Returns a line for each record whose query does not run."""
  asked = [r for r in records if _gold(r) and _has_database(r)]
  answers = _run([(*_database(r), _gold(r)) for r in asked])
  return [f'{record.where}: the query does not run: {answer["error"]}'
          for record, answer in zip(asked, answers) if 'error' in answer]
