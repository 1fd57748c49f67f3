"""Files of ratings, damaged or of other programs; a case is the file."""

import contextlib
import functools
import os
import pathlib
import sqlite3
import tempfile

from hypothesis import strategies as st

from fuzz import judging
from fuzz import mutation
from gemma_sft.serving import ratings

_RUNS = ('w/a', 'w/b')
_ITEMS = ('x', 'y')


def check(case: bytes, folder: str) -> None:
  """Opens a file, summarises it, adds a rating and undoes it."""
  path = pathlib.Path(folder, 'ratings.sqlite')
  for file in path.parent.iterdir():
    file.unlink()
  path.write_bytes(case)
  with judging.may_refuse('ratings.sqlite'):
    store = ratings.Store(path)
    found = store.ratings()
    if any(r.choice not in ratings.CHOICES or r.shown_first not in (
        ratings.SIDES) for r in found):
      raise judging.Loss('an invalid rating is counted')
    ratings.report(ratings.summarise(found, _ITEMS), _RUNS)
    rating = ratings.Rating('Bo', 'y', 'b', 'tie', {('a', 'style'): 2})
    if (store.add(rating, runs=_RUNS, place='t:1')
        and store.undo('Bo', _ITEMS) != rating):
      raise judging.Loss('a rating that was added is gone')
  if extra := set(os.listdir(folder)) - {'ratings.sqlite'}:
    raise judging.Loss(f'files were left behind: {extra}')


@functools.cache
def seeds() -> list[bytes]:
  """Returns a file with three ratings, and one of another program."""
  with tempfile.TemporaryDirectory() as folder:
    paths = [pathlib.Path(folder, name) for name in ('a.sqlite', 'b.sqlite')]
    store = ratings.Store(paths[0])
    for rater, item, choice in (
        ('Ana', 'x', 'a'), ('Bo', 'x', 'tie'), ('Ana', 'y', 'b')):
      store.add(ratings.Rating(
          rater, item, 'a', choice, {('a', 'style'): 4, ('b', 'style'): 1}),
                runs=_RUNS, place='t:1')
    with contextlib.closing(sqlite3.connect(paths[1])) as other:
      other.executescript(
          'CREATE TABLE t (a); CREATE VIEW ratings AS SELECT * FROM t;')
    return [path.read_bytes() for path in paths]


# Tables of the right names and version, with other things in them.
_PARTS = st.lists(st.sampled_from((
    'CREATE TABLE ratings (id, time, rater, run_a, run_b, item, place,'
    ' shown_first, choice, undone)',
    'CREATE TABLE marks (rating, side, criterion, mark)',
    "INSERT INTO ratings VALUES (1, 0, 'Ana', 0, 0, 'x', 0, 'a', 'c', 0)",
    "INSERT INTO ratings VALUES (2, 0, NULL, 0, 0, 'x', 0, 7, 'a', 0)",
    "INSERT INTO ratings VALUES (3, 0, x'ff', 0, 0, x'00', 0, 'a', 'a', 0)",
    "INSERT INTO ratings VALUES (4, 0, CAST(x'ff' AS TEXT), 0, 0, 'x', 0, 'a',"
    " 'a', 0)",
    "INSERT INTO marks VALUES (1, 'a', 'style', 'five')",
    "INSERT INTO marks VALUES (1, 'c', 'beauty', 1e300)",
    "INSERT INTO marks VALUES (NULL, NULL, NULL, NULL)",
    'CREATE VIEW marks AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i'
    ' + 1 FROM n) SELECT i AS rating, i AS side, i AS criterion, i AS mark'
    ' FROM n',
    'CREATE TRIGGER t AFTER INSERT ON ratings BEGIN DELETE FROM ratings; END',
    'PRAGMA user_version = 1')), max_size=7)


def _build(statements):
  with contextlib.closing(sqlite3.connect(':memory:')) as connection:
    connection.execute('PRAGMA user_version = 1')
    for statement in statements:
      with contextlib.suppress(sqlite3.Error):
        connection.execute(statement)
    connection.commit()
    return connection.serialize()


STRATEGY = (_PARTS.map(_build) | st.binary(max_size=200)
            | mutation.strategy(lambda: seeds()[:1]))
