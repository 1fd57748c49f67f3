"""Measures lines of verse in any script.

A script is the first word of a letter's Unicode name ('DEVANAGARI LETTER KA'),
so no list of scripts is needed.
"""

import collections
from collections.abc import Sequence
import os
import re
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


def scripts(text: str) -> collections.Counter[str]:
  """Returns the number of letters of a text in each script."""
  # Vowel signs do not count, because each follows a letter of its script.
  # Scripts share modifier letters (Lm), such as the ʼ of romanised Arabic.
  return collections.Counter(
      unicodedata.name(c, '').partition(' ')[0] for c in text
      if unicodedata.category(c) in ('Lo', 'Ll', 'Lu', 'Lt'))


def script(text: str) -> str:
  """Returns the script of most letters of a text, '' if it has none."""
  counts = scripts(text)
  return max(counts, key=counts.get, default='')


def script_share(text: str, expected: str) -> float:
  """Returns the share of a text's letters in a script, 0 without letters."""
  counts = scripts(text)
  return counts[expected] / max(1, counts.total())


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

  These are the last syllable (ना) or, if its final a is silent, its end (ाम).
  """
  text = key(line)
  return text[-3:] if script(text[-3:]) == 'LATIN' else text[-2:]


def rhyme(opening: Sequence[str], rest: Sequence[str]) -> float:
  """Returns the share of lines of `rest` that end like a line near them.

  A repeated line does not rhyme with itself.
  """
  together = [*opening, *rest]
  found = [(ending(line), key(line)) for line in together]
  rhymed = 0
  for i in range(len(opening), len(together)):
    near = found[max(0, i - _RHYME_DISTANCE):i + _RHYME_DISTANCE + 1]
    rhymed += any(end == found[i][0] and line != found[i][1]
                  for end, line in near)
  return rhymed / max(1, len(rest))


def length_match(opening: Sequence[str], rest: Sequence[str]) -> float:
  """Returns how close the lines' lengths are to the opening's, from 0 to 1.

  The mean of shorter / longer, compared with the mean length of the opening.
  """
  wanted = sum(map(syllables, opening)) / max(1, len(opening))
  ratios = []
  for line in rest:
    shorter, longer = sorted((syllables(line), wanted))
    ratios.append(shorter / longer if longer else 1.0)
  return sum(ratios) / max(1, len(ratios))


def repeats(opening: Sequence[str], rest: Sequence[str]) -> float:
  """Returns the share of `rest` that repeats an earlier line or the opening."""
  seen, repeated = {key(line) for line in opening}, 0
  for line in map(key, rest):
    repeated += line in seen
    seen.add(line)
  return repeated / max(1, len(rest))


def refrain(
    opening: Sequence[str], rest: Sequence[str]) -> re.Pattern | None:
  """Returns a pattern for the part of an opening that returns in the rest.

  It matches keys of whole lines if any returns (a mukhda, a tek), else those of
  lines with the longest ending that both opening lines and at least a third of
  the rest share (a ghazal's radif ends every second line).
  """
  keys = [key(line) for line in opening]
  if returning := {*keys} & {*map(key, rest)} - {''}:
    return re.compile('|'.join(map(re.escape, sorted(returning))))
  shared = os.path.commonprefix([line.split()[::-1] for line in keys])[::-1]
  for i in range(len(shared) if len(keys) > 1 else 0):
    found = re.compile(rf'(.* )?{re.escape(" ".join(shared[i:]))}')
    if len(_gaps(found, rest)) >= len(rest) / 3:
      return found
  return None


def _gaps(pattern, lines):
  """Returns the distances in lines between a refrain's returns."""
  places = [i for i, line in enumerate(map(key, lines), 1)
            if pattern.fullmatch(line)]
  return [b - a for a, b in zip([0, *places], places)]


def returns(
    pattern: re.Pattern, rest: Sequence[str], reference: Sequence[str]
) -> float:
  """Returns how well a refrain returns as in the reference: F1 of the gaps.

  With gaps instead of positions one extra line costs only one return. A gap may
  differ by a quarter: 3 to 5 lines for 4, but exactly 2 for a radif.
  """
  wanted, got = _gaps(pattern, reference), _gaps(pattern, rest)
  left, matched = list(got), 0
  for gap in wanted:
    near = min(left, key=lambda g: abs(g - gap), default=None)
    if near is not None and abs(near - gap) <= gap // 4:
      left.remove(near)
      matched += 1
  return 2 * matched / max(1, len(wanted) + len(got))
