"""Files of ratings, damaged or of other programs; a case is the file."""

import functools
import os
import pathlib
import sqlite3
import struct
import tempfile

from hypothesis import strategies as st

from fuzz import judging
from gemma_sft import errors
from gemma_sft.serving import ratings

_RUNS = ('w/a', 'w/b')
_ITEMS = ('x', 'y')


def check(case: bytes, folder: str) -> None:
  """Opens a file, summarises it, adds a rating and undoes it."""
  path = os.path.join(folder, 'ratings.sqlite')
  for name in os.listdir(folder):
    os.remove(os.path.join(folder, name))
  pathlib.Path(path).write_bytes(case)
  try:
    store = ratings.Store(path)
    found = store.ratings()
    if any(r.choice not in ratings.CHOICES or r.shown_first not in (
        ratings.SIDES) for r in found):
      raise judging.Loss('an invalid rating is counted')
    ratings.report(ratings.summarise(found, _ITEMS), _RUNS)
    rating = ratings.Rating('Bo', 'y', 'b', 'tie', {('a', 'style'): 2})
    if store.add(rating, runs=_RUNS, place='t:1'):
      if store.undo('Bo', _ITEMS) != rating:
        raise judging.Loss('a rating that was added is gone')
  except errors.UserError as error:
    judging.check_place(error, 'ratings.sqlite')
  if extra := set(os.listdir(folder)) - {'ratings.sqlite'}:
    raise judging.Loss(f'files were left behind: {extra}')


@functools.cache
def seeds() -> list[bytes]:
  """Returns a file with three ratings, and one of another program."""
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, 'a.sqlite')
    store = ratings.Store(path)
    for rater, item, choice in (
        ('Ana', 'x', 'a'), ('Bo', 'x', 'tie'), ('Ana', 'y', 'b')):
      store.add(ratings.Rating(
          rater, item, 'a', choice, {('a', 'style'): 4, ('b', 'style'): 1}),
                runs=_RUNS, place='t:1')
    other = os.path.join(folder, 'b.sqlite')
    connection = sqlite3.connect(other)
    connection.executescript(
        'CREATE TABLE t (a); CREATE VIEW ratings AS SELECT * FROM t;')
    connection.close()
    return [pathlib.Path(p).read_bytes() for p in (path, other)]


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
  connection = sqlite3.connect(':memory:')
  connection.execute('PRAGMA user_version = 1')
  for statement in statements:
    try:
      connection.execute(statement)
    except sqlite3.Error:
      pass
  connection.commit()
  data = connection.serialize()
  connection.close()
  return data


def _damage(which, at, value, cut):
  data = bytearray(seeds()[which])
  at %= len(data) - 8
  data[at:at + 4] = struct.pack('>I', value)
  return bytes(data[:len(data) - cut])


STRATEGY = _PARTS.map(_build) | st.binary(max_size=200) | st.builds(
    _damage, st.just(0), st.integers(0, 1 << 20), st.integers(0, 2**32 - 1),
    st.sampled_from((0, 0, 0, 1, 512, 4096)))
