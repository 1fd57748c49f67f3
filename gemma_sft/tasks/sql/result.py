"""Compares the rows of two queries."""

import collections
from collections.abc import Sequence
from typing import Any

Rows = Sequence[Sequence[Any]]

_MAX_TRIES = 10_000


def same(a: Rows, b: Rows, ordered: bool) -> bool:
  """Whether two results have the same rows, in the same order if `ordered`.

  As in Spider's evaluation by execution, columns may be in another order
  (github.com/taoyds/test-suite-sql-eval), and their names do not count. Numbers
  are compared to nine digits, 3 equals 3.0, and text must be identical.
  """
  if len(a) != len(b):
    return False
  if not a:
    return True
  a = [tuple(_normal(v) for v in row) for row in a]
  b = [tuple(_normal(v) for v in row) for row in b]
  if len(a[0]) != len(b[0]):
    return False
  if ordered:
    return collections.Counter(zip(*a)) == collections.Counter(zip(*b))
  return (collections.Counter(a) == collections.Counter(b)
          or _same_with_columns_moved(a, b))


def is_empty(rows: Rows) -> bool:
  """Whether there are no rows, or only NULL in them."""
  return all(value is None for row in rows for value in row)


def _normal(value):
  """Returns a form that equal values share; sums differ in the last digits."""
  if isinstance(value, float):
    value = float(f'{value:.9g}')
    if value.is_integer():
      value = int(value)
  elif isinstance(value, dict):
    value = ('blob', value['blob'])
  return value


def _same_with_columns_moved(a, b):
  """Searches an order of b's columns that gives the rows of a.

  Extends a prefix of columns by one matching column at a time.
  """
  a_columns, b_columns = list(zip(*a)), list(zip(*b))
  counts_a, counts_b = ([*map(collections.Counter, columns)]
                        for columns in (a_columns, b_columns))
  tries = 0

  def place(chosen):
    nonlocal tries
    if (i := len(chosen)) == len(a_columns):
      return True
    wanted = collections.Counter(zip(*a_columns[:i + 1]))
    for j in range(len(b_columns)):
      if j in chosen or tries >= _MAX_TRIES or (
          counts_b[j] != counts_a[i]):
        continue
      tries += 1
      got = collections.Counter(zip(*(b_columns[k] for k in (*chosen, j))))
      if got == wanted and place((*chosen, j)):
        return True
    return False

  return place(())
