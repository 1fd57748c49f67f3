"""Rows of a collection, the steps on them, and the log of what they changed."""

import collections
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import copy
import dataclasses
from typing import Any

import regex

from gemma_sft import errors
from gemma_sft.curation import words

# The mark at the end of a sentence or verse line, by script; '.' elsewhere.
_FINAL = {'Devanagari': '।', 'Bengali': '।', 'Gurmukhi': '।', 'Oriya': '।',
          'Han': '。', 'Hiragana': '。', 'Katakana': '。', 'Arabic': '۔'}
_PLAIN, _COMMAS = frozenset('.।॥。۔'), frozenset(',;，、；،؛')
# Quotes and brackets that may close after a mark.
_CLOSING = '["\'”’»)\\]」』）]*$'
_ENDS = regex.compile('[.!?…।॥。！？۔؟,;，、；،؛]' + _CLOSING)
# A line end without a mark. After a dash or a colon the sentence continues.
_BARE = regex.compile(r'[\p{L}\p{M}\p{N}]' + _CLOSING)


@dataclasses.dataclass
class TableRow:
  """A row: its place in the source, its columns as read and as they are now."""

  where: str
  read: dict[str, Any]
  fields: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    self.fields = self.fields or copy.deepcopy(self.read)


Rows = Sequence[TableRow]


@dataclasses.dataclass(frozen=True)
class Change:
  """A cell that a step changed; `before` is None in a new column."""

  where: str
  column: str
  step: str
  before: Any
  after: Any
  why: str


@dataclasses.dataclass(frozen=True)
class Removal:
  """A row that a step removed, as it was read."""

  where: str
  step: str
  why: str
  fields: dict[str, Any]


@dataclasses.dataclass
class ChangeLog:
  """All changes and removals, notes, and {step: whether it is on} in order."""

  steps: dict[str, bool] = dataclasses.field(default_factory=dict)
  changes: list[Change] = dataclasses.field(default_factory=list)
  removals: list[Removal] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)

  def begin(self, step: str, setting: Any = True) -> bool:
    """Lists a step, which is on if its setting is true; returns that."""
    self.steps[step] = bool(setting)
    return self.steps[step]

  def change(self, row: TableRow, column: str, step: str, after: Any, why: str):
    """Sets a cell and logs the change, if there is one."""
    before = row.fields.get(column)
    if before != after:
      row.fields[column] = after
      self.changes.append(Change(row.where, column, step, before, after, why))

  def remove(self, row: TableRow, step: str, why: str):
    """Logs the removal of a row."""
    self.removals.append(Removal(row.where, step, why, row.read))


def as_text(value: Any) -> str:
  """Returns a cell as text: a list of lines joined, a missing cell as ''."""
  if isinstance(value, list):
    return '\n'.join(as_text(item) for item in value)
  return '' if value is None else str(value)


def joined(row: TableRow, names: Sequence[str]) -> str:
  """Returns the texts of columns, one below the other."""
  return '\n'.join(as_text(row.fields.get(name)) for name in names)


def full_lines(text: str) -> list[str]:
  """Returns the lines that are not blank."""
  return [line for line in text.split('\n') if line.strip()]


def is_text(value: Any) -> bool:
  """Whether a cell is a text or a list of lines."""
  return isinstance(value, str) or (
      isinstance(value, list) and bool(value)
      and all(isinstance(item, str) for item in value))


def is_missing(value: Any) -> bool:
  """Whether a cell is empty or only white space."""
  return value is None or isinstance(value, (str, list)) and not (
      as_text(value).strip())


def columns(rows: Rows) -> list[str]:
  """Returns the names of all columns, in order of appearance."""
  return list(dict.fromkeys(name for row in rows for name in row.fields))


def text_cells(
    rows: Rows, names: Sequence[str]) -> Iterator[tuple[TableRow, str, Any]]:
  """Yields (row, column, cell) of each text or list of lines."""
  for row in rows:
    for name in names:
      if is_text(row.fields.get(name)):
        yield row, name, row.fields[name]


def applied(function: Callable[..., str], value: Any, *arguments: Any) -> Any:
  """Returns function(text, *arguments) of a cell; a list of lines stays one."""
  text = function(as_text(value), *arguments)
  return text.split('\n') if isinstance(value, list) else text


def require_columns(key: str, names: Sequence[str], known: Sequence[str]):
  """Raises a UserError that names the config key of an unknown column."""
  for name in names:
    if name not in known:
      raise errors.UserError(
          f'config.{key}: the data has no column {name!r}',
          f'one of {", ".join(map(repr, known))}',
          f'{errors.nearest(name, known)}Set --config.{key}')


def apply_text(
    rows: Rows, log: ChangeLog, step: str, names: Sequence[str],
    function: Callable[[str], str], why: str) -> None:
  """Applies a function to the texts of columns; lists of lines stay lists."""
  for row, name, cell in text_cells(rows, names):
    after = applied(function, cell)
    # Lines that were joined in a list do not count as a change.
    if as_text(after) != as_text(cell):
      log.change(row, name, step, after, why)


def fill_missing(
    rows: Rows, log: ChangeLog, sources: Mapping[str, str]) -> None:
  """Fills missing cells from other rows of the same group.

  {'poet': 'song'} takes a missing poet from another row of the same song. If
  those rows disagree, the cell stays empty and a note says so.
  """
  for column, by in sources.items():
    known, lacking = collections.defaultdict(dict), []
    for row in rows:
      key, value = fold(row.fields.get(by)), row.fields.get(column)
      if is_missing(value):
        lacking.append((row, key))
      elif key:
        known[key].setdefault(as_text(value), (value, row.where))
    for row, key in lacking:
      if len(known[key]) > 1:
        log.notes.append(
            f'fill: {row.where} has no {column}, and the rows of its {by}'
            f' disagree: {", ".join(sorted(known[key]))}')
      elif known[key]:
        (value, where), = known[key].values()
        log.change(row, column, 'fill', copy.deepcopy(value),
                   f'from {where}, of the same {by}')


def remove_incomplete(
    rows: Rows, log: ChangeLog, *, required: Sequence[str], max_missing: float,
    min_lines: int, text: Sequence[str], known: Sequence[str]
) -> list[TableRow]:
  """Returns the rows that have enough of the columns `known`.

  `max_missing` is the largest share of missing cells, `min_lines` the fewest
  non-blank lines of the longest column of `text`.
  """
  kept = []
  for row in rows:
    missing = [name for name in known if is_missing(row.fields.get(name))]
    lines = max((len(full_lines(as_text(row.fields.get(name))))
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
    log.remove(row, 'missing', why)
  return kept


def repair_punctuation(
    rows: Rows, log: ChangeLog, names: Sequence[str], share: float) -> None:
  """Adds the final mark that a line lacks but most comparable lines have.

  A line lacks a mark if it ends in a letter or number. Couplets often end in a
  comma and then a danda, so the comparable lines of a first (second) line are
  the other first (second) lines of the text. If more than `share` of at least
  three of them end with a mark, the commonest one is added. Otherwise the
  comparable lines of the whole column, of the same script and at least ten,
  decide about final marks. Verse without marks stays unchanged.
  """
  for name in names:
    cells, everywhere = [], collections.defaultdict(list)
    for row, _, cell in text_cells(rows, [name]):
      lines = as_text(cell).split('\n')
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
        place = 'text'
        if not mark and rules[kinds[i]][0] not in _COMMAS:
          (mark, rate), place = rules[kinds[i]], 'column'
        if mark:
          after[i] = line + mark
          why = why or (
              f'{rate} comparable lines of the {place} end with a mark')
      if why:
        is_list = isinstance(row.fields[name], list)
        log.change(row, name, 'punctuation',
                   after if is_list else '\n'.join(after), why)


def _kinds(lines: Sequence[str]) -> list[tuple[str, int]]:
  """Returns each line's script and position in its couplet, -1 if alone."""
  is_alone = len(full_lines('\n'.join(lines))) < 2
  kinds, position = [], 0
  for line in lines:
    kinds.append((words.script(line), -1 if is_alone else position % 2)
                 if line.strip() else ('', -2))
    position = position + 1 if line.strip() else 0  # A new stanza.
  return kinds


def _common_mark(
    lines: Sequence[str], script: str, share: float, at_least: int
) -> tuple[str, str]:
  """Returns the mark that most lines end with, and '9 of 10', or ''."""
  ends = [match[0][0] for line in lines if (match := _ENDS.search(line))]
  for are_commas, default in ((False, _FINAL.get(script, '.')), (True, ',')):
    marks = [end for end in ends if (end in _COMMAS) == are_commas]
    if len(lines) >= at_least and len(marks) > share * len(lines):
      usual = collections.Counter(
          mark for mark in marks if mark in _PLAIN | _COMMAS)
      # Ties go to the script's own mark, then to the lower code point.
      mark = max(sorted(usual), default=default,
                 key=lambda m: (usual[m], m == default))
      return mark, f'{len(marks)} of {len(lines)}'
  return '', ''


def fold(value: Any) -> str:
  """Returns a cell as text for comparison, ignoring case and spaces."""
  return ' '.join(as_text(value).casefold().split())
