"""Divides rows into train, validation and test, by whole groups."""

import collections
from collections.abc import Hashable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.cluster import hierarchy

from gemma_sft.curation import duplicates
from gemma_sft.curation import table
from gemma_sft.curation import words

NAMES = ('train', 'validation', 'test')
# Openings of fewer characters are common: 'Oh, my love'.
_MIN_OPENING = 12


class Leak(NamedTuple):
  """Two rows in different splits that belong together."""

  where: str
  split: str
  other: str
  other_split: str
  why: str


def opening(row: table.TableRow, names: Sequence[str], num_lines: int) -> str:
  """Returns the first lines of a row's text, or '' if they are very short.

  A text of one line gives its first six words for each of `num_lines`.
  """
  lines = table.full_lines(table.joined(row, names))
  if len(lines) == 1:
    start = ' '.join(words.words(lines[0])[:6 * num_lines])
  else:
    start = '\n'.join(lines[:num_lines])
  return start if len(words.aksharas(start)) >= _MIN_OPENING else ''


def groups(
    rows: table.Rows, columns: Sequence[str],
    openings: Sequence[tuple[int, int, float]] = ()) -> list[list[int]]:
  """Returns the groups of rows that must stay together, as lists of indices.

  Two rows are in one group if they share the value of a column (ignoring case
  and spaces), or are a pair of `openings`, or both belong to a third row.
  """
  sets = hierarchy.DisjointSet(range(len(rows)))
  first: dict[Hashable, int] = {}
  for i, row in enumerate(rows):
    for column in columns:
      if key := table.fold(row.fields.get(column)):
        sets.merge(first.setdefault((column, key), i), i)
  for i, j, _ in openings:
    sets.merge(i, j)
  return sorted(map(sorted, sets.subsets()))


def split(
    rows: table.Rows, members: Sequence[Sequence[int]],
    fractions: Sequence[float], balance: str, seed: int
) -> dict[str, list[int]]:
  """Returns {'train': indices, ...} with whole groups and balanced styles.

  Groups are dealt from the largest to the smallest, in random order among equal
  sizes. Each goes to the split where it most reduces the distance to the wanted
  number of rows of every style (value of the column `balance`) and of all rows.
  Every split with a fraction above 0 gets a group if there are enough.
  """
  used = [s for s, part in enumerate(fractions) if part > 0]
  styles = [
      table.fold(row.fields.get(balance)) if balance else '' for row in rows]
  known = sorted(set(styles))
  # The last column counts all rows and weighs as much as all styles together.
  counts = np.zeros((len(members), len(known) + 1))
  for g, group in enumerate(members):
    for i in group:
      counts[g, [known.index(styles[i]), -1]] += 1
  total = counts.sum(0)
  target = np.outer(fractions, total)
  weight = np.append(np.ones(len(known)), len(known)) / total
  order = np.random.default_rng([seed, 0x5B117]).permutation(len(members))
  order = sorted(order, key=lambda g: -counts[g, -1])
  filled = np.zeros_like(target)
  dealt: list[list[int]] = [[] for _ in NAMES]
  for left, g in zip(range(len(order), 0, -1), order):
    change = (((filled + counts[g] - target) ** 2 - (filled - target) ** 2)
              * weight).sum(1)
    empty = [s for s in used if not dealt[s]]
    best = min(empty if left <= len(empty) else used, key=change.__getitem__)
    filled[best] += counts[g]
    dealt[best] += members[g]
  return {name: sorted(part) for name, part in zip(NAMES, dealt)}


def leaks(
    parts: Mapping[str, table.Rows], columns: Sequence[str],
    names: Sequence[str], num_lines: int, threshold: float, n: int
) -> list[Leak]:
  """Returns rows in different splits that share a group or an opening.

  Looks at the finished splits only, so that it also finds what `groups` missed.
  """
  rows = [row for part in parts.values() for row in part]
  places = [(row.where, name) for name, part in parts.items() for row in part]
  found = []
  for column in columns:
    seen: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for row, (where, name) in zip(rows, places):
      if key := table.fold(row.fields.get(column)):
        seen[key].setdefault(name, where)
    for key, by_split in seen.items():
      (name, where), *others = by_split.items()
      found += [Leak(where, name, other, other_name,
                     f'{column} is {key!r} in both')
                for other_name, other in others]
  if num_lines and threshold:
    starts = [opening(row, names, num_lines) for row in rows]
    for i, j, similarity in duplicates.similar_pairs(starts, threshold, n):
      if places[i][1] != places[j][1]:
        found.append(Leak(*places[i], *places[j],
                          f'openings are {similarity:.0%} the same'))
  return found
