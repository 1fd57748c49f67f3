"""Runs untrusted SQL on SQLite: read-only, and within limits on steps and time.

As a script this file answers jobs in a process of its own (`worker`), where
memory is limited too; that is why it imports only the standard library.
"""

import json
import resource
import signal
import sqlite3
import sys
import urllib.parse

# Instructions of SQLite's virtual machine, about 40 million a second. The
# slowest reference query of ten of Spider's databases takes 15 thousand.
MAX_STEPS = 20_000_000
MAX_ROWS = 20_000
MAX_RESULT_CHARS = 2_000_000
READY = 'ready'
_MAX_VALUE_BYTES = 1_000_000
_MAX_SCRIPT_VALUE_BYTES = 100_000
_MAX_SCRIPT_PAGES = 16_384  # 64 MiB.
_MAX_HEAP_BYTES = 256 * 2**20
_MAX_ADDRESS_BYTES = 2 * 2**30
_CPU_SECONDS = 2
_STEPS_PER_CALL = 10_000
_MAX_OPEN_DATABASES = 16

# Leaves out functions that read files, load code or are random (a query has one
# answer), and printf, which can pad to any width in a single step.
_FUNCTIONS = frozenset('''
    abs avg ceil ceiling char coalesce concat concat_ws count cume_dist
    current_date current_time current_timestamp date datetime dense_rank exp
    first_value floor glob group_concat hex ifnull iif instr json
    json_array json_array_length json_extract json_object json_type json_valid
    julianday lag last_value lead length like ln log log10 log2 lower ltrim
    max min mod nth_value ntile nullif percent_rank pi pow power quote
    rank replace round row_number rtrim sign soundex sqrt strftime string_agg
    substr substring sum time timediff total trim trunc typeof unicode
    unixepoch upper -> ->>'''.split())
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: _MAX_VALUE_BYTES,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_COLUMN: 500,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 50,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 200,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 100,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 0,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
_READING = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ,
            sqlite3.SQLITE_RECURSIVE)
# What a script may do, besides reading the table that it is creating.
_SCRIPT = (sqlite3.SQLITE_CREATE_TABLE, sqlite3.SQLITE_CREATE_INDEX,
           sqlite3.SQLITE_CREATE_VIEW, sqlite3.SQLITE_INSERT,
           sqlite3.SQLITE_SELECT, sqlite3.SQLITE_TRANSACTION,
           sqlite3.SQLITE_REINDEX)
# The first two read the schema; serialize() needs the last.
_PRAGMAS = ('table_info', 'foreign_key_list', 'page_count')


def build(script: str) -> sqlite3.Connection:
  """Returns a read-only connection to the database that a script creates.

  The script may CREATE TABLE, INDEX and VIEW and INSERT ... VALUES. PRAGMA,
  with which dumps begin, is skipped.

  Raises:
    sqlite3.Error: for any other statement, or too much work or data.
  """
  connection = sqlite3.connect(':memory:')
  connection.execute(f'PRAGMA max_page_count = {_MAX_SCRIPT_PAGES}')
  _bound(connection)
  # Functions such as instr() take time proportional to the product of two
  # lengths in a single step, and a script runs outside of the caged process.
  connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_SCRIPT_VALUE_BYTES)
  connection.set_authorizer(_ScriptAuthorizer())
  try:
    _with_steps(connection, lambda: connection.executescript(script))
    connection.commit()
  except BaseException:
    connection.close()
    raise
  return guard(connection)


def open_file(path: str) -> sqlite3.Connection:
  """Returns a read-only connection to a database file."""
  # Immutable needs no lock and no journal, so it works on a read-only disk.
  connection = sqlite3.connect(
      f'file:{urllib.parse.quote(path)}?mode=ro&immutable=1', uri=True)
  return guard(connection)


def guard(connection: sqlite3.Connection) -> sqlite3.Connection:
  """Makes a connection read-only and returns it."""
  _bound(connection)
  connection.set_authorizer(_authorize_reading)
  return connection


def run(connection: sqlite3.Connection, query: str) -> list[list]:
  """Returns the rows of one SELECT; a blob is {'blob': hexadecimal digits}.

  Raises:
    sqlite3.Error: for an error in SQLite, for a query that is no SELECT or
      several statements, and beyond MAX_STEPS, MAX_ROWS or MAX_RESULT_CHARS.
  """
  if not query.lstrip().upper().startswith(('SELECT', 'VALUES', 'WITH')):
    raise sqlite3.ProgrammingError('not a SELECT')
  return _with_steps(connection, lambda: _fetch(connection.execute(query)))


def _fetch(cursor):
  rows, chars = [], 0
  for row in cursor:
    values = [{'blob': v.hex()} if isinstance(v, bytes) else v for v in row]
    # A value may have a megabyte, so rows alone are no limit.
    chars += sum(len(v) if isinstance(v, str) else 8 for v in values)
    rows.append(values)
    if len(rows) > MAX_ROWS or chars > MAX_RESULT_CHARS:
      raise sqlite3.DataError('the result is too large')
  return rows


def has_rows(connection: sqlite3.Connection) -> bool:
  """Whether any table has a row; without rows a result says nothing."""
  tables = connection.execute(
      "SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
  for name, in tables:
    quoted = name.replace('"', '""')
    # The name is quoted, and the connection is read-only.
    query = f'SELECT 1 FROM "{quoted}" LIMIT 1'  # nosec B608
    if not name.startswith('sqlite_') and connection.execute(query).fetchone():
      return True
  return False


def _bound(connection):
  connection.set_authorizer(None)
  connection.execute('PRAGMA trusted_schema = OFF')
  connection.execute('PRAGMA temp_store = MEMORY')
  for category, limit in _LIMITS.items():
    connection.setlimit(category, limit)
  # Public databases contain text that is not UTF-8.
  connection.text_factory = lambda data: data.decode(errors='replace')


def _with_steps(connection, work):
  """Runs work() within MAX_STEPS, which do not depend on the machine."""
  left = MAX_STEPS // _STEPS_PER_CALL

  def count():
    nonlocal left
    left -= 1
    return left < 0

  connection.set_progress_handler(count, _STEPS_PER_CALL)
  try:
    return work()
  except sqlite3.OperationalError:
    if left < 0:
      raise sqlite3.OperationalError(
          f'stopped after {MAX_STEPS} steps') from None
    raise
  except MemoryError:
    raise sqlite3.OperationalError('out of memory') from None
  finally:
    connection.set_progress_handler(None, 0)


def _authorize_reading(action, first, second, *_):
  if action == sqlite3.SQLITE_FUNCTION:
    fine = second.lower() in _FUNCTIONS
  elif action == sqlite3.SQLITE_PRAGMA:
    fine = first.lower() in _PRAGMAS  # `run` itself refuses PRAGMA.
  else:
    fine = action in _READING
  return sqlite3.SQLITE_OK if fine else sqlite3.SQLITE_DENY


class _ScriptAuthorizer:
  """Lets a script create tables and fill them from literals.

  SQLite reports VALUES as a SELECT and the columns of a CHECK as READ. Only the
  table that is being created may be read, so a script cannot multiply its data:
  the database grows no larger than the script.
  """

  def __init__(self):
    self._created = None

  def __call__(self, action, first, second, *_):
    if action == sqlite3.SQLITE_PRAGMA:
      return sqlite3.SQLITE_IGNORE
    if action == sqlite3.SQLITE_FUNCTION:
      fine = second.lower() in _FUNCTIONS
    elif action == sqlite3.SQLITE_READ:
      fine = first == self._created or first == 'sqlite_master'
    elif action == sqlite3.SQLITE_UPDATE:  # Part of CREATE TABLE.
      fine = first == 'sqlite_master'
    else:
      fine = action in _SCRIPT
    if action == sqlite3.SQLITE_CREATE_TABLE:
      self._created = first
    elif action == sqlite3.SQLITE_CREATE_INDEX:
      self._created = second
    elif action == sqlite3.SQLITE_SELECT or (
        action == sqlite3.SQLITE_INSERT and first != 'sqlite_master'):
      self._created = None
    return sqlite3.SQLITE_OK if fine else sqlite3.SQLITE_DENY


def _answer(job, databases):
  path, script = key = job.get('path'), job.get('script')
  if key not in databases:
    while len(databases) >= _MAX_OPEN_DATABASES:
      databases.pop(next(iter(databases))).close()
    databases[key] = open_file(path) if path else build(script)
  return {'rows': run(databases[key], job['query']),
          'filled': has_rows(databases[key])}


def main() -> None:
  """Answers jobs, one JSON object per line, within limits on the process."""
  for kind, limit in ((resource.RLIMIT_AS, _MAX_ADDRESS_BYTES),
                      (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
    try:
      resource.setrlimit(kind, (limit, limit))
    except (ValueError, OSError):  # macOS cannot limit the address space.
      pass
  # The heap limit holds for the whole process, so `run` does not set it.
  sqlite3.connect(':memory:').execute(
      f'PRAGMA hard_heap_limit = {_MAX_HEAP_BYTES}')
  signal.signal(signal.SIGPROF, signal.SIG_DFL)
  print(READY, flush=True)
  databases = {}
  for line in sys.stdin:
    # A single step may be long (GLOB over a long text). Then the signal ends
    # this process, and `worker` starts another.
    signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)
    try:
      answer = _answer(json.loads(line), databases)
    # sqlite3 may raise Warning for several statements.
    except (sqlite3.Error, sqlite3.Warning, MemoryError) as error:
      answer = {'error': str(error) or type(error).__name__}
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  main()
