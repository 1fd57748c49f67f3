"""Rows of a collection, the steps on them, and the account of what they did."""

import collections
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import copy
import dataclasses
from typing import Any

import regex

from gemma_sft import errors
from gemma_sft.curation import words

# At the end of a sentence or a line of verse, by script; Latin elsewhere.
_FINAL = {'Devanagari': '।', 'Bengali': '।', 'Gurmukhi': '।', 'Oriya': '।',
          'Han': '。', 'Hiragana': '。', 'Katakana': '。', 'Arabic': '۔'}
_PLAIN, _COMMAS = frozenset('.।॥。۔'), frozenset(',;，、；،؛')
# A mark, then what may close after it.
_CLOSING = '["\'”’»)\\]」』）]*$'
_ENDS = regex.compile('[.!?…।॥。！？۔؟,;，、；،؛]' + _CLOSING)
# What a mark can follow: not a dash or a colon, after which the text goes on.
_BARE = regex.compile(r'[\p{L}\p{M}\p{N}]' + _CLOSING)


@dataclasses.dataclass
class Row:
  """A row: where it stood, what was read there and what it is now."""

  where: str
  read: dict[str, Any]
  fields: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    self.fields = self.fields or copy.deepcopy(self.read)


@dataclasses.dataclass(frozen=True)
class Change:
  """One cell that a step changed; `before` is None in an added column."""

  where: str
  column: str
  step: str
  before: Any
  after: Any
  why: str


@dataclasses.dataclass(frozen=True)
class Removal:
  """One row that a step took out, as it was read."""

  where: str
  step: str
  why: str
  fields: dict[str, Any]


@dataclasses.dataclass
class Account:
  """What the steps did, and what they have to say.

  `steps` has them in their order, True for those that are on.
  """

  steps: dict[str, bool] = dataclasses.field(default_factory=dict)
  changes: list[Change] = dataclasses.field(default_factory=list)
  removals: list[Removal] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)

  def begin(self, step: str, is_on: bool = True):
    """Lists a step, whether or not it will find anything to do."""
    self.steps[step] = is_on

  def change(self, row: Row, column: str, step: str, after: Any, why: str):
    """Sets a cell and notes it, if that changes anything."""
    before = row.fields.get(column)
    if before != after:
      row.fields[column] = after
      self.changes.append(
          Change(row.where, column, step, before, after, why))

  def remove(self, row: Row, step: str, why: str):
    """Notes a row that a step leaves out."""
    self.removals.append(Removal(row.where, step, why, row.read))


def as_text(value: Any) -> str:
  """Returns a cell as text: a list of lines as lines, a missing one as ''."""
  if isinstance(value, list):
    return '\n'.join(as_text(item) for item in value)
  return '' if value is None else str(value)


def is_text(value: Any) -> bool:
  """Whether a cell is a text or a list of lines."""
  return isinstance(value, str) or (
      isinstance(value, list) and bool(value)
      and all(isinstance(item, str) for item in value))


def is_missing(value: Any) -> bool:
  """Whether a cell holds nothing, or white space alone."""
  return value is None or isinstance(value, (str, list)) and not (
      as_text(value).strip())


def columns(rows: Sequence[Row]) -> list[str]:
  """Returns the names of all columns, in the order of their first row."""
  return list(dict.fromkeys(name for row in rows for name in row.fields))


def require_columns(key: str, names: Sequence[str], rows: Sequence[Row]):
  """Raises a UserError that names the config's key for an unknown column."""
  known = columns(rows)
  for name in names:
    if name not in known:
      raise errors.UserError(
          f'config.{key}: the data has no column {name!r}',
          f'one of {", ".join(map(repr, known))}',
          f'{errors.nearest(name, known)}Set --config.{key}')


def apply_text(
    rows: Sequence[Row], account: Account, step: str,
    names: Sequence[str], function: Callable[[str], str], why: str) -> None:
  """Applies a function of texts to columns; lists of lines stay lists."""
  for row in rows:
    for name in names:
      value = row.fields.get(name)
      if not is_text(value):
        continue
      before = as_text(value)
      after = function(before)
      if after != before:
        account.change(
            row, name, step,
            after.split('\n') if isinstance(value, list) else after, why)


def fill_missing(
    rows: Sequence[Row], account: Account, sources: Mapping[str, str]) -> None:
  """Fills missing cells from other rows of the same group.

  Args:
    rows: Changed in place.
    account: Of the changes; a group whose rows disagree is noted, not filled.
    sources: {'poet': 'song'}: a missing poet is that of the same song.
  """
  for column, by in sources.items():
    known = collections.defaultdict(dict)
    for row in rows:
      key, value = as_text(row.fields.get(by)), row.fields.get(column)
      if key.strip() and not is_missing(value):
        known[_fold(key)].setdefault(as_text(value), (value, row.where))
    for row in rows:
      key = _fold(as_text(row.fields.get(by)))
      if not is_missing(row.fields.get(column)) or key not in known:
        continue
      if len(known[key]) > 1:
        account.notes.append(
            f'fill: {row.where} has no {column}, and the rows of its {by}'
            f' disagree: {", ".join(sorted(known[key]))}')
        continue
      value, where = next(iter(known[key].values()))
      account.change(row, column, 'fill', copy.deepcopy(value),
                     f'from {where}, of the same {by}')


def remove_incomplete(
    rows: Sequence[Row], account: Account, *, required: Sequence[str],
    max_missing: float, min_lines: int, text: Sequence[str],
    known: Sequence[str]) -> list[Row]:
  """Returns the rows that have enough in them.

  Args:
    rows: All rows.
    account: Of the removals.
    required: Columns that every row needs.
    max_missing: Largest share of missing cells, of all columns.
    min_lines: Fewest lines of the longest text column, blank ones not counted.
    text: The columns of text.
    known: All columns.
  """
  kept = []
  for row in rows:
    missing = [name for name in known if is_missing(row.fields.get(name))]
    lines = max((sum(bool(line.strip()) for line in
                     as_text(row.fields.get(name)).split('\n'))
                 for name in text), default=0)
    if lacking := [name for name in required if name in missing]:
      why = f'no {", ".join(lacking)}'
    elif len(missing) > max_missing * len(known):
      why = f'{len(missing)} of {len(known)} columns are missing'
    elif lines < min_lines:
      why = f'{lines} lines, fewer than {min_lines}'
    else:
      kept.append(row)
      continue
    account.remove(row, 'missing', why)
  return kept


def repair_punctuation(
    rows: Sequence[Row], account: Account, names: Sequence[str],
    share: float) -> None:
  """Adds the mark that a line lacks where most lines like it have one.

  A line ends in a letter or number. Verse is often marked by couplets, a comma
  and then a danda: so the lines like it are those of its text that are first,
  or second, in a couplet as it is. If more than `share` of them, three at
  least, end with a mark, the commonest is added. Without that, the final mark
  of such lines in the whole column (of the same script, ten at least). A
  collection of verse without marks is left as it is.
  """
  for name in names:
    cells = []
    everywhere = collections.defaultdict(list)
    for row in rows:
      if is_text(row.fields.get(name)):
        lines = as_text(row.fields[name]).split('\n')
        kinds = _kinds(lines)
        cells.append((row, lines, kinds))
        for line, kind in zip(lines, kinds):
          everywhere[kind].append(line)
    rules = {kind: _common_mark(lines, kind[0], share, at_least=10)
             for kind, lines in everywhere.items()}
    for row, lines, kinds in cells:
      after, why = list(lines), ''
      for i, line in enumerate(lines):
        if not _BARE.search(line):
          continue
        alike = [other for j, other in enumerate(lines)
                 if j != i and kinds[j] == kinds[i]]
        mark, rate = _common_mark(alike, kinds[i][0], share, at_least=3)
        place = 'lines of the text in this place'
        if not mark:
          mark, rate = rules[kinds[i]]
          mark = '' if mark in _COMMAS else mark
          place = 'such lines of the column'
        if mark:
          after[i] = line + mark
          why = why or f'{rate} {place} end with a mark'
      if why:
        is_list = isinstance(row.fields[name], list)
        account.change(row, name, 'punctuation',
                       after if is_list else '\n'.join(after), why)


def _kinds(lines: Sequence[str]) -> list[tuple[str, int]]:
  """Returns each line's script and its place: in a couplet, or -1 if alone."""
  is_alone = sum(bool(line.strip()) for line in lines) < 2
  kinds, place = [], 0
  for line in lines:
    kinds.append((words.script(line), -1 if is_alone else place % 2)
                 if line.strip() else ('', -2))
    place = place + 1 if line.strip() else 0  # A stanza begins anew.
  return kinds


def _common_mark(
    lines: Sequence[str], script: str, share: float, at_least: int
) -> tuple[str, str]:
  """Returns the mark that most lines end with and '9 of 10'; '' without."""
  ends = [match[0][0] for line in lines if (match := _ENDS.search(line))]
  commas = [end for end in ends if end in _COMMAS]
  finals = [end for end in ends if end not in _COMMAS]
  for marks, default in ((finals, _FINAL.get(script, '.')), (commas, ',')):
    if len(lines) >= at_least and len(marks) > share * len(lines):
      usual = collections.Counter(
          mark for mark in marks if mark in _PLAIN | _COMMAS)
      # Ties go to the script's own mark, then to the order of the code points.
      mark = max(sorted(usual), default=default,
                 key=lambda m: (usual[m], m == default))
      return mark, f'{len(marks)} of {len(lines)}'
  return '', ''


def _fold(text: str) -> str:
  return ' '.join(text.casefold().split())
