"""Measures lines of verse in any script.

A script is the first word of a letter's Unicode name ('DEVANAGARI LETTER KA'),
so no list of scripts is needed.
"""

import collections
from collections.abc import Sequence
import dataclasses
import unicodedata

# Joiners change only how letters are drawn.
_JOINERS = dict.fromkeys(map(ord, '\u200b\u200c\u200d\ufeff'))
_VIRAMA = 9  # Canonical combining class: joins two consonants into one akshara.
# In romanised verse y is a consonant: bhaiyā has two syllables.
_VOWELS = frozenset('aeiou')
# A line may rhyme with one up to this many lines away: the other line of its
# couplet, the second line of the next couplet (a ghazal), the last of a stanza.
_RHYME_DISTANCE = 3


def lines(text: str) -> list[str]:
  """Returns the lines that are not blank."""
  return [line.strip() for line in text.split('\n') if line.strip()]


def key(line: str) -> str:
  """Returns the form in which lines are compared: words in lower case, NFC.

  A composed nukta letter equals the letter followed by a nukta.
  """
  text = unicodedata.normalize('NFC', line.translate(_JOINERS)).casefold()
  return ' '.join(''.join(
      ' ' if unicodedata.category(c)[0] in 'PSZC' else c for c in text).split())


def script(text: str) -> str:
  """Returns the script of most letters of a text, '' if it has none."""
  counts = collections.Counter(_scripts(text))
  return counts.most_common(1)[0][0] if counts else ''


def script_share(text: str, expected: str) -> float:
  """Returns the share of a text's letters in a script, 0 without letters.

  Vowel signs do not count, because each follows a letter of its script.
  """
  found = _scripts(text)
  return sum(s == expected for s in found) / len(found) if found else 0.0


def _scripts(text):
  # Scripts share modifier letters (Lm), such as the ʼ of romanised Arabic.
  return [unicodedata.name(c, '').partition(' ')[0] for c in text
          if unicodedata.category(c) in ('Lo', 'Ll', 'Lu', 'Lt')]


def syllables(line: str) -> int:
  """Returns the number of aksharas, Latin vowel groups or Arabic letters.

  Comparable only within one script: Arabic does not write short vowels.
  """
  total, previous = 0, ''
  for c in unicodedata.normalize('NFD', line.translate(_JOINERS)).casefold():
    category = unicodedata.category(c)
    if category[0] == 'L':
      if unicodedata.name(c, '').startswith('LATIN'):
        total += c in _VOWELS and previous not in _VOWELS
      else:
        total += not (previous and unicodedata.combining(previous) == _VIRAMA)
    # A Latin accent (Mn) does not end a vowel group, a nukta not a conjunct.
    if category != 'Mn' or unicodedata.combining(c) == _VIRAMA:
      previous = c
  return total


def ending(line: str) -> str:
  """Returns the part of a line that rhymes: its last 2 characters, 3 in Latin.

  As consonant and vowel sign are two characters, that is the last syllable
  (ना), or the vowel and consonant of one whose final a is silent (ाम).
  """
  text = key(line)
  return text[-3:] if script(text[-3:]) == 'LATIN' else text[-2:]


def rhyme(opening: Sequence[str], rest: Sequence[str]) -> float:
  """Returns the share of lines of `rest` that end like a line near them.

  A repeated line does not rhyme with itself.
  """
  together = [*opening, *rest]
  keys, ends = [key(line) for line in together], [ending(t) for t in together]
  rhymed = 0
  for i in range(len(opening), len(together)):
    near = range(max(0, i - _RHYME_DISTANCE),
                 min(len(together), i + _RHYME_DISTANCE + 1))
    rhymed += any(ends[j] == ends[i] and keys[j] != keys[i] for j in near)
  return rhymed / len(rest) if rest else 0.0


def length_match(opening: Sequence[str], rest: Sequence[str]) -> float:
  """Returns how close the lines' lengths are to the opening's, from 0 to 1.

  The mean of shorter / longer, compared with the mean length of the opening.
  """
  wanted = sum(map(syllables, opening)) / max(1, len(opening))
  ratios = [_ratio(syllables(line), wanted) for line in rest]
  return sum(ratios) / len(ratios) if ratios else 0.0


def repeats(opening: Sequence[str], rest: Sequence[str]) -> float:
  """Returns the share of `rest` that repeats an earlier line or the opening."""
  seen, repeated = {key(line) for line in opening}, 0
  for line in map(key, rest):
    repeated += line in seen
    seen.add(line)
  return repeated / len(rest) if rest else 0.0


@dataclasses.dataclass(frozen=True)
class Refrain:
  """The part of an opening that returns in the song.

  Attributes:
    lines: Keys of whole lines that return (a mukhda, a tek).
    ending: The words at the end of lines that return (a ghazal's radif), if no
      whole line does.
  """

  lines: frozenset[str] = frozenset()
  ending: str = ''

  def gaps(self, rest: Sequence[str]) -> list[int]:
    """Returns the distances in lines between the refrain's returns."""
    places = [i for i, line in enumerate(rest, 1) if self._is_in(key(line))]
    return [b - a for a, b in zip([0, *places], places)]

  def _is_in(self, line):
    if self.lines:
      return line in self.lines
    return f' {line}'.endswith(f' {self.ending}')

  def score(self, rest: Sequence[str], reference: Sequence[str]) -> float:
    """Returns how well the refrain returns as in the reference: F1 of the gaps.

    Compares gaps and not positions, so that one extra line costs one return and
    not all that follow. A gap may differ by a quarter: 3 to 5 lines for 4, but
    exactly 2 for a radif.
    """
    wanted, got = self.gaps(reference), self.gaps(rest)
    left, matched = list(got), 0
    for gap in wanted:
      near = [g for g in left if abs(g - gap) <= gap // 4]
      if near:
        left.remove(min(near, key=lambda g: abs(g - gap)))
        matched += 1
    return 2 * matched / max(1, len(wanted) + len(got))


def refrain(opening: Sequence[str], rest: Sequence[str]) -> Refrain | None:
  """Returns the part of an opening that returns in the rest, or None.

  Whole lines if any returns; else the most words that end both opening lines
  and at least a third of the rest (a radif ends every second line).
  """
  keys = [key(line) for line in opening]
  returning = frozenset(keys) & {key(line) for line in rest} - {''}
  if returning:
    return Refrain(lines=returning)
  shared = _common_ending(keys) if len(keys) > 1 else []
  for i in range(len(shared)):
    found = Refrain(ending=' '.join(shared[i:]))
    if len(found.gaps(rest)) >= len(rest) / 3:
      return found
  return None


def _common_ending(keys):
  words, *others = [k.split() for k in keys]
  n = 0
  while n < len(words) and all(
      n < len(o) and o[-1 - n] == words[-1 - n] for o in others):
    n += 1
  return words[len(words) - n:]


def _ratio(a: float, b: float) -> float:
  """Returns the smaller over the larger; 1 if both are 0."""
  return min(a, b) / max(a, b) if max(a, b) else 1.0
