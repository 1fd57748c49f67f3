"""Ratings of two models' answers by people: an SQLite file and a summary."""

import collections
import contextlib
import dataclasses
import datetime
import functools
import itertools
import os
import sqlite3
from typing import Any
from typing import Collection
from typing import Mapping
from typing import Sequence

import krippendorff

from gemma_sft import errors
from gemma_sft.evaluation import intervals

CRITERIA = ('style', 'meaning', 'fluency')
SIDES = ('a', 'b')
# An ordinal scale: a tie lies between the two other choices.
CHOICES = ('a', 'tie', 'b')
_SCORE = {'a': 1.0, 'tie': 0.5, 'b': 0.0}

_VERSION = 1
# A rating that was undone stays in the file, marked as such.
_SCHEMA = """
CREATE TABLE ratings (
  id INTEGER PRIMARY KEY,
  time TEXT NOT NULL,
  rater TEXT NOT NULL,
  run_a TEXT NOT NULL,
  run_b TEXT NOT NULL,
  item TEXT NOT NULL,
  place TEXT NOT NULL,
  shown_first TEXT NOT NULL CHECK (shown_first IN ('a', 'b')),
  choice TEXT NOT NULL CHECK (choice IN ('a', 'tie', 'b')),
  undone INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX one_a_rater ON ratings (rater, item) WHERE NOT undone;
CREATE TABLE marks (
  rating INTEGER NOT NULL REFERENCES ratings (id),
  side TEXT NOT NULL CHECK (side IN ('a', 'b')),
  criterion TEXT NOT NULL,
  mark INTEGER NOT NULL CHECK (mark BETWEEN 1 AND 5),
  PRIMARY KEY (rating, side, criterion)
);
"""


@dataclasses.dataclass(frozen=True)
class Rating:
  """One person's rating of one pair of answers."""

  rater: str
  item: str  # See `pairs.AnswerPair`.
  shown_first: str  # 'a' or 'b'.
  choice: str  # The better answer, one of `CHOICES`.
  # {('a', 'style'): 4, ...}, from 1 to 5, without those left out.
  marks: Mapping[tuple[str, str], int] = dataclasses.field(default_factory=dict)


class Store:
  """The file of ratings; each call is a transaction of its own."""

  def __init__(self, path: str):
    """Opens or creates the file; raises `UserError` for one of another kind."""
    self.path = path
    try:
      os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
      with self._open() as connection:
        found = _objects(connection)
        if not found:
          connection.executescript(
              f'BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;')
          found = _objects(connection)
        version = connection.execute('PRAGMA user_version').fetchone()[0]
        # SQLite would write into damaged pages and lose what it wrote.
        state = connection.execute('PRAGMA integrity_check(1)').fetchone()[0]
        if state != 'ok':
          raise sqlite3.DatabaseError(state)
    # ValueError: names that are not UTF-8.
    except (sqlite3.Error, OSError, ValueError) as error:
      raise errors.UserError(
          f'{path}: {error}', 'a file of ratings, or a place to make one',
          'choose another --out') from None
    # Views and triggers that are not ours are programs of somebody else.
    if version != _VERSION or found != _own_objects():
      raise errors.UserError(
          f'{path} is an SQLite file of another program or version',
          f'ratings of version {_VERSION}', 'choose another --out')

  @contextlib.contextmanager
  def _open(self):
    # Requests are handled on many threads; a connection belongs to one.
    with contextlib.closing(
        sqlite3.connect(self.path, timeout=10)) as connection:
      connection.execute('PRAGMA foreign_keys = ON')
      connection.execute('PRAGMA trusted_schema = OFF')
      with connection:
        yield connection

  @contextlib.contextmanager
  def _transaction(self):
    """Yields a connection; a damaged file or a full disk is a `UserError`."""
    try:
      with self._open() as connection:
        yield connection
    except sqlite3.IntegrityError:
      raise
    except (sqlite3.Error, ValueError) as error:
      raise errors.UserError(
          f'{self.path}: {error}', 'an intact file of ratings',
          'restore it from a copy, or choose another --out') from None

  def add(
      self, rating: Rating, *, runs: tuple[str, str], place: str) -> bool:
    """Stores a rating; returns False if this rater has rated the pair already.

    `runs` and `place` are for people who read the file.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    with self._transaction() as connection:
      cursor = connection.execute(
          'INSERT INTO ratings (time, rater, run_a, run_b, item, place,'
          ' shown_first, choice) VALUES (?, ?, ?, ?, ?, ?, ?, ?)'
          ' ON CONFLICT DO NOTHING',
          (now.isoformat(timespec='seconds'), rating.rater, *runs,
           rating.item, place, rating.shown_first, rating.choice))
      added = cursor.rowcount == 1
      if added:
        connection.executemany(
            'INSERT INTO marks VALUES (?, ?, ?, ?)',
            [(cursor.lastrowid, *key, mark)
             for key, mark in rating.marks.items()])
    return added

  def undo(self, rater: str, items: Collection[str]) -> Rating | None:
    """Undoes the rater's last rating of these pairs, and returns it."""
    for rating_id, rating in reversed(self._read()):
      if rating.rater == rater and rating.item in items:
        with self._transaction() as connection:
          connection.execute(
              'UPDATE ratings SET undone = 1 WHERE id = ?', (rating_id,))
        return rating
    return None

  def ratings(self) -> list[Rating]:
    """Returns all ratings that were not undone, in order of arrival."""
    return [rating for _, rating in self._read()]

  def _read(self):
    with self._transaction() as connection:
      marks = collections.defaultdict(dict)
      for rating_id, side, criterion, mark in connection.execute(
          'SELECT rating, side, criterion, mark FROM marks'):
        _check_row(side in SIDES and isinstance(criterion, str)
                   and mark in range(1, 6), 'mark', rating_id)
        marks[rating_id][side, criterion] = mark
      rows = []
      for rating_id, rater, item, first, choice in connection.execute(
          'SELECT id, rater, item, shown_first, choice FROM ratings'
          ' WHERE NOT undone ORDER BY id'):
        _check_row(
            isinstance(rater, str) and isinstance(item, str)
            and first in SIDES and choice in CHOICES, 'rating', rating_id)
        rows.append((rating_id, Rating(
            rater, item, first, choice, marks[rating_id])))
      return rows


def _objects(connection):
  """Returns {(type, name, sql)} of all that is in a file but SQLite's own."""
  return {
      row for row in connection.execute(
          'SELECT type, name, sql FROM sqlite_master')
      if not row[1].startswith('sqlite_')}


@functools.cache
def _own_objects():
  with contextlib.closing(sqlite3.connect(':memory:')) as connection:
    connection.executescript(_SCHEMA)
    return _objects(connection)


def _check_row(is_valid, what, rating_id):
  # The tables check their values on writing; a damaged file may hold others.
  if not is_valid:
    raise ValueError(f'the {what} with id {rating_id} is invalid')


# Statistics ------------------------------------------------------------------


def summarise(
    ratings: Sequence[Rating], items: Collection[str]) -> dict[str, Any]:
  """Summarises the ratings of these pairs; ratings of others are ignored."""
  known = set(items)
  ratings = [r for r in ratings if r.item in known]
  by_item = collections.defaultdict(list)
  for rating in ratings:
    by_item[rating.item].append(rating)
  groups = list(by_item.values())
  rate, interval = win_rate([[r.choice for r in group] for group in groups])
  counts = collections.Counter(r.choice for r in ratings)
  return dict(
      n_items=len(known), n_rated=len(groups),
      raters=dict(collections.Counter(r.rater for r in ratings)),
      counts={choice: counts[choice] for choice in CHOICES},
      win_rate=rate, win_interval=interval,
      # Among all pairs of ratings of the same answers.
      agreement=_share([
          x.choice == y.choice for group in groups
          for x, y in itertools.combinations(group, 2)]),
      alpha=krippendorff_alpha([
          [CHOICES.index(r.choice) for r in group] for group in groups]),
      marks=list(filter(None, (
          _criterion_marks(name, groups) for name in CRITERIA))),
      # Far from a half, the position on the page influences the raters.
      shown_first=_share([
          r.choice == r.shown_first for r in ratings if r.choice != 'tie']))


def _share(hits: Sequence[bool]) -> float | None:
  return sum(hits) / len(hits) if hits else None


def win_rate(
    choices: Sequence[Sequence[str]]
) -> tuple[float | None, tuple[float, float]]:
  """Returns the share of pairs that a wins, a tie counting half, and a 95 % CI.

  `choices` holds, for each pair, those of its raters. They are not independent,
  so each pair counts once, with their mean, in the Wilson interval. This is
  conservative: halves vary less than zeros and ones. None without ratings.
  """
  scores = [sum(_SCORE[c] for c in group) / len(group) for group in choices]
  if not scores:
    return None, (0.0, 1.0)
  rate = sum(scores) / len(scores)
  return rate, intervals.wilson(rate, len(scores))


def krippendorff_alpha(units: Sequence[Sequence[int]]) -> float | None:
  """Returns the raters' agreement beyond chance: 1 is full, 0 is chance.

  Krippendorff's alpha for ordinal values; a unit lists the values that it
  was given. None if no unit has two values, or all values are the same.
  """
  units = [unit for unit in units if len(unit) > 1]
  values = sorted(set(itertools.chain.from_iterable(units)))
  if len(values) < 2:
    return None
  return float(krippendorff.alpha(
      value_counts=[[unit.count(value) for value in values] for unit in units],
      level_of_measurement='ordinal'))


def _criterion_marks(criterion, groups):
  """Returns the marks of a criterion, or None if no pair has both marks.

  a and b are means over the n pairs with marks on both answers, gain is a - b
  with its 95 % bootstrap interval over pairs, alpha the raters' agreement.
  """
  means, units = [], []
  for group in groups:
    both = [(r.marks['a', criterion], r.marks['b', criterion]) for r in group
            if all((side, criterion) in r.marks for side in SIDES)]
    if both:
      means.append([sum(side) / len(both) for side in zip(*both)])
    units += [[r.marks[side, criterion] for r in group
               if (side, criterion) in r.marks] for side in SIDES]
  if not means:
    return None
  a, b = (sum(side) / len(means) for side in zip(*means))
  return dict(
      criterion=criterion, n=len(means), a=a, b=b, gain=a - b,
      gain_interval=intervals.bootstrap([x - y for x, y in means]),
      alpha=krippendorff_alpha(units))


def report(summary: dict[str, Any], runs: tuple[str, str]) -> str:
  """Returns the summary as text for a terminal."""
  a, b = runs
  raters = ', '.join(f'{name} ({n})' for name, n in summary['raters'].items())
  lines = [f'{summary["n_rated"]} of {summary["n_items"]} pairs rated by'
           f' {len(summary["raters"])}: {raters or "nobody yet"}']
  if summary['win_rate'] is None:
    return lines[0]
  low, high = summary['win_interval']
  lines += [
      f'{a} is better in {summary["counts"]["a"]} ratings, {b} in'
      f' {summary["counts"]["b"]}, {summary["counts"]["tie"]} ties',
      f'win rate of {a}: {summary["win_rate"]:.1%} (95 %: {low:.0%} to'
      f' {high:.0%}; a tie counts half; {summary["n_rated"]} pairs)',
      'agreement: ' + (
          'no pair was rated by two people' if summary['agreement'] is None else
          f'{summary["agreement"]:.1%} of choices the same,'
          f" Krippendorff's alpha {_number(summary['alpha'])}")]
  if summary['shown_first'] is not None:
    lines.append(f'the answer shown first was chosen in'
                 f' {summary["shown_first"]:.0%} of the ratings without a tie')
  for marks in summary['marks']:
    low, high = marks['gain_interval']
    lines.append(
        f'{marks["criterion"]}: {a} {marks["a"]:.2f}, {b} {marks["b"]:.2f},'
        f' difference {marks["gain"]:+.2f} (95 %: {low:+.2f} to {high:+.2f};'
        f' {marks["n"]} pairs; alpha {_number(marks["alpha"])})')
  return '\n'.join(lines)


def _number(value: float | None) -> str:
  return '-' if value is None else f'{value:.2f}'
