"""What people say of two models' answers: kept in SQLite, and summed up."""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import os
import sqlite3
from typing import Mapping
from typing import Sequence

from gemma_sft import errors
from gemma_sft.evaluation import intervals

CRITERIA = ('style', 'meaning', 'fluency')
SIDES = ('a', 'b')
# In order: an ordinal scale, on which a tie is nearer to either than they are
# to each other.
CHOICES = ('a', 'tie', 'b')
_SCORE = {'a': 1.0, 'tie': 0.5, 'b': 0.0}

_VERSION = 1
# One that was taken back stays in the file, marked as such.
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
  """One person's word on one pair of answers.

  Attributes:
    rater: The person's name.
    item: The pair, see `web.pairs`.
    shown_first: 'a' or 'b': which answer stood first.
    choice: Of `CHOICES`: the better one.
    marks: {('a', 'style'): 4, ...}, from 1 to 5; those that were given.
  """

  rater: str
  item: str
  shown_first: str
  choice: str
  marks: Mapping[tuple[str, str], int] = dataclasses.field(
      default_factory=dict)


class Store:
  """The file of ratings; each call is a transaction of its own."""

  def __init__(self, path: str):
    """Opens the file, or makes it.

    Raises:
      UserError: if it is another kind of file, or cannot be written.
    """
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
        # Into damaged pages SQLite writes what it does not find again.
        whole = connection.execute('PRAGMA integrity_check(1)').fetchone()[0]
        if whole != 'ok':
          raise sqlite3.DatabaseError(whole)
    # ValueError: names that are not UTF-8.
    except (sqlite3.Error, OSError, ValueError) as error:
      raise errors.UserError(
          f'{path}: {error}', 'a file of ratings, or a place to make one',
          'choose another --out') from None
    # Views and triggers are programs, and somebody else's.
    if version != _VERSION or found != _ours():
      raise errors.UserError(
          f'{path} is an SQLite file of another program or version',
          f'ratings of version {_VERSION}', 'choose another --out')

  @contextlib.contextmanager
  def _open(self):
    # Handlers run on many threads, a connection belongs to one.
    with contextlib.closing(
        sqlite3.connect(self.path, timeout=10)) as connection:
      connection.execute('PRAGMA foreign_keys = ON')
      connection.execute('PRAGMA trusted_schema = OFF')
      with connection:
        yield connection

  @contextlib.contextmanager
  def _told(self):
    """Tells of a file that was damaged, or of a full disk, in our words."""
    try:
      yield
    except sqlite3.IntegrityError:
      raise
    except (sqlite3.Error, ValueError) as error:
      raise errors.UserError(
          f'{self.path}: {error}', 'a file of ratings that is whole',
          'restore it from a copy, or choose another --out') from None

  def add(
      self, rating: Rating, *, runs: tuple[str, str], place: str) -> bool:
    """Keeps a rating; returns False if the rater's is there already.

    Args:
      rating: What was said.
      runs: The names of a and b.
      place: The record, as 'test.csv:12', for people who read the file.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    try:
      with self._told(), self._open() as connection:
        number = connection.execute(
            'INSERT INTO ratings (time, rater, run_a, run_b, item, place,'
            ' shown_first, choice) VALUES (?, ?, ?, ?, ?, ?, ?, ?)',
            (now.isoformat(timespec='seconds'), rating.rater, *runs,
             rating.item, place, rating.shown_first, rating.choice)).lastrowid
        connection.executemany(
            'INSERT INTO marks VALUES (?, ?, ?, ?)',
            [(number, *key, mark) for key, mark in rating.marks.items()])
    except sqlite3.IntegrityError as error:
      if 'ratings.rater' in str(error):
        return False
      raise
    return True

  def undo(self, rater: str, items: Sequence[str]) -> Rating | None:
    """Takes back a rater's last rating of these items, and returns it."""
    mine = [(number, rating) for number, rating in self._read()
            if rating.rater == rater and rating.item in set(items)]
    if not mine:
      return None
    number, rating = mine[-1]
    with self._told(), self._open() as connection:
      connection.execute(
          'UPDATE ratings SET undone = 1 WHERE id = ?', (number,))
    return rating

  def ratings(self) -> list[Rating]:
    """Returns all ratings that stand, in the order in which they came."""
    return [rating for _, rating in self._read()]

  def _read(self):
    with self._told(), self._open() as connection:
      marks = {}
      for number, side, criterion, mark in connection.execute(
          'SELECT rating, side, criterion, mark FROM marks'):
        _check_row(side in SIDES and isinstance(criterion, str)
                   and mark in range(1, 6), 'mark', number)
        marks.setdefault(number, {})[side, criterion] = mark
      rows = []
      for number, rater, item, first, choice in connection.execute(
          'SELECT id, rater, item, shown_first, choice FROM ratings'
          ' WHERE NOT undone ORDER BY id'):
        _check_row(isinstance(rater, str) and isinstance(item, str)
                   and first in SIDES and choice in CHOICES, 'rating', number)
        rows.append((number, Rating(
            rater, item, first, choice, marks.get(number, {}))))
      return rows


def _objects(connection):
  """Returns what a file holds but for SQLite's own, as {(type, name, sql)}."""
  return {
      row for row in connection.execute(
          'SELECT type, name, sql FROM sqlite_master')
      if not row[1].startswith('sqlite_')}


@functools.cache
def _ours():
  with contextlib.closing(sqlite3.connect(':memory:')) as connection:
    connection.executescript(_SCHEMA)
    return _objects(connection)


def _check_row(good, what, number):
  # Our tables check their values themselves; a damaged file does not.
  if not good:
    raise ValueError(f'the {what} {number} is none')


# Statistics ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Marks:
  """One criterion: means over the pairs whose answers both have a mark.

  `gain` is a's mean less b's, with its 95 % bootstrap interval over the pairs;
  `alpha` the raters' agreement, None if there is nothing to tell it from.
  """

  criterion: str
  n: int
  a: float
  b: float
  gain: float
  gain_interval: tuple[float, float]
  alpha: float | None


@dataclasses.dataclass(frozen=True)
class Summary:
  """What the ratings of two runs say.

  Attributes:
    n_items: Pairs there are.
    n_rated: Pairs that anybody has rated.
    raters: Name -> number of pairs rated.
    counts: Choice -> number of ratings.
    win_rate: Of a over b, see `win_rate`; None without ratings.
    win_interval: Its 95 % interval.
    agreement: Share of pairs of raters who chose the same, over all pairs
      rated by two; None without any.
    alpha: Krippendorff's, of the choices as an ordinal scale.
    marks: One a criterion that was marked.
    shown_first: Share of ratings without a tie that chose the first answer:
      far from a half, the raters look at the place.
  """

  n_items: int
  n_rated: int
  raters: Mapping[str, int]
  counts: Mapping[str, int]
  win_rate: float | None
  win_interval: tuple[float, float]
  agreement: float | None
  alpha: float | None
  marks: Sequence[Marks]
  shown_first: float | None


def summarise(ratings: Sequence[Rating], items: Sequence[str]) -> Summary:
  """Sums up the ratings of these items; others are left out."""
  known = set(items)
  ratings = [r for r in ratings if r.item in known]
  by_item: dict[str, list[Rating]] = {}
  for rating in ratings:
    by_item.setdefault(rating.item, []).append(rating)
  raters: dict[str, int] = {}
  for rating in ratings:
    raters[rating.rater] = raters.get(rating.rater, 0) + 1
  rate, interval = win_rate([[r.choice for r in group]
                             for group in by_item.values()])
  decided = [r for r in ratings if r.choice != 'tie']
  pairs = [x.choice == y.choice for group in by_item.values()
           for x, y in itertools.combinations(group, 2)]
  return Summary(
      n_items=len(known), n_rated=len(by_item), raters=raters,
      counts={c: sum(r.choice == c for r in ratings) for c in CHOICES},
      win_rate=rate, win_interval=interval,
      agreement=sum(pairs) / len(pairs) if pairs else None,
      alpha=krippendorff_alpha([
          [CHOICES.index(r.choice) for r in group]
          for group in by_item.values()]),
      marks=[m for c in CRITERIA
             if (m := _marks(c, list(by_item.values()))) is not None],
      shown_first=sum(r.choice == r.shown_first for r in decided)
      / len(decided) if decided else None)


def win_rate(
    choices: Sequence[Sequence[str]]
) -> tuple[float | None, tuple[float, float]]:
  """Returns how often a is the better one, ties as half, and its interval.

  Ratings of one pair by several people are not independent: each pair counts
  once, with the mean of its ratings, and the 95 % Wilson interval is that of
  so many pairs. It is rather too wide: halves vary less than ones and zeros.

  Args:
    choices: A list of `CHOICES` a pair.
  """
  scores = [sum(_SCORE[c] for c in group) / len(group) for group in choices]
  if not scores:
    return None, (0.0, 1.0)
  rate = sum(scores) / len(scores)
  return rate, intervals.wilson(rate, len(scores))


def krippendorff_alpha(units: Sequence[Sequence[int]]) -> float | None:
  """Returns how far raters agree beyond chance: 1 fully, 0 not at all.

  Krippendorff's alpha for ordinal values, of any number of raters, each of whom
  may have left units out ("Computing Krippendorff's Alpha-Reliability",
  University of Pennsylvania, 2011, section D).

  Args:
    units: The values that each unit was given, in any order.

  Returns:
    None where no unit has two values, or all values are the same.
  """
  units = [unit for unit in units if len(unit) > 1]
  values = sorted({value for unit in units for value in unit})
  if len(values) < 2:
    return None
  coincidences = {pair: 0.0 for pair in itertools.product(values, values)}
  for unit in units:
    for pair in itertools.permutations(unit, 2):
      coincidences[pair] += 1 / (len(unit) - 1)
  totals = {c: sum(coincidences[c, k] for k in values) for c in values}

  def distance(c, k):
    """Squared number of values between two, their own counted half."""
    low, high = min(c, k), max(c, k)
    between = sum(totals[g] for g in values if low <= g <= high)
    return (between - (totals[c] + totals[k]) / 2) ** 2

  observed = sum(
      n * distance(c, k) for (c, k), n in coincidences.items())
  expected = sum(
      totals[c] * totals[k] * distance(c, k)
      for c, k in itertools.product(values, values))
  return 1 - (sum(totals.values()) - 1) * observed / expected


def _marks(criterion, groups):
  """Returns the `Marks` of a criterion; None if no pair has both marks."""
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
  n = len(means)
  a, b = (sum(side) / n for side in zip(*means))
  return Marks(
      criterion, n, a, b, a - b,
      intervals.bootstrap([x - y for x, y in means]),
      krippendorff_alpha(units))


def report(summary: Summary, runs: tuple[str, str]) -> str:
  """Returns the summary as text for a terminal."""
  a, b = runs
  counts = summary.counts
  lines = [
      f'{summary.n_rated} of {summary.n_items} pairs rated by'
      f' {len(summary.raters)}: '
      + (', '.join(f'{name} ({n})' for name, n in summary.raters.items())
         or 'nobody yet')]
  if summary.win_rate is None:
    return lines[0]
  low, high = summary.win_interval
  lines += [
      f'{a} is better in {counts["a"]} ratings, {b} in {counts["b"]},'
      f' {counts["tie"]} ties',
      f'win rate of {a}: {summary.win_rate:.1%} (95 %: {low:.0%} to'
      f' {high:.0%}; ties as half, {summary.n_rated} pairs)',
      'agreement: ' + (
          'no pair was rated by two people' if summary.agreement is None else
          f'{summary.agreement:.1%} of choices the same,'
          f" Krippendorff's alpha {_number(summary.alpha)}")]
  if summary.shown_first is not None:
    lines.append(f'the answer shown first was chosen in'
                 f' {summary.shown_first:.0%} of the ratings without a tie')
  for marks in summary.marks:
    low, high = marks.gain_interval
    lines.append(
        f'{marks.criterion}: {a} {marks.a:.2f}, {b} {marks.b:.2f}, difference'
        f' {marks.gain:+.2f} (95 %: {low:+.2f} to {high:+.2f}; {marks.n} pairs;'
        f' alpha {_number(marks.alpha)})')
  return '\n'.join(lines)


def _number(value: float | None) -> str:
  return '-' if value is None else f'{value:.2f}'
