"""Compares a slang term with a text, with other terms and with initials."""

import re
import unicodedata

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_ENDINGS = ('s', "'s", "'d", 'ly', 'ness')
# Endings that double a final consonant or replace a final e.
_VOWEL_ENDINGS = ('ed', 'ing', 'er', 'ers', 'y')
_MAX_ACRONYM = 8
# Selectors that draw a sign as text or as an emoji.
_VARIATIONS = '\ufe0e\ufe0f'


def words(text: str) -> list[str]:
  """Returns the words in lower case; don't is one, e-boy and L+ratio are two.

  G.O.A.T loses its dots and is one word.
  """
  text = text.replace('’', "'").casefold()
  text = re.sub(r'\b(?:\w\.){2,}\w?', lambda m: m[0].replace('.', ''), text)
  return _WORD.findall(text)


def key(term: str) -> str:
  """Returns a form that spellings of a term share, as glow-up and Glow up do.

  It is in lower case, without punctuation and white space. Emoji stay, without
  their variation selectors.
  """
  return ''.join(
      c for c in term.casefold()
      if c == '\u200d'  # Joins several emoji into one.
      or unicodedata.category(c)[0] not in 'PZC' and c not in _VARIATIONS)


def occurs(term: str, text: str, inflected: bool = True) -> bool:
  """Whether a text contains the term as separate words.

  If `inflected`, each word may have an ending: -s, -ed, -ing, -er and the like,
  with a final consonant doubled (bopping), a final e dropped (vibing) or y as i
  (parties). Other forms (took for take) and parts of longer words do not count.
  A term without letters or digits, such as an emoji, must appear as it is.
  """
  wanted = words(term)
  if not wanted:
    return bool(key(term)) and key(term) in key(text)
  found = words(text)
  return any(
      all(f == w or inflected and _is_form(f, w)
          for f, w in zip(found[i:], wanted))
      for i in range(len(found) - len(wanted) + 1))


def _is_form(found: str, word: str) -> bool:
  last = word[-1]
  if last == 'y' and found in {word[:-1] + e for e in ('ies', 'ied', 'ier')}:
    return True
  if last == 'e' and found in {word[:-1] + e for e in _VOWEL_ENDINGS}:
    return True
  if len(word) > 2 and found in {word + last + e for e in _VOWEL_ENDINGS}:
    return True
  if last in 'sxzho' and found == word + 'es':
    return True
  return found in {word + e for e in (*_ENDINGS, *_VOWEL_ENDINGS)}


def is_close(a: str, b: str) -> bool:
  """Whether at most one insertion, deletion or replacement separates two keys.
  """
  if len(a) > len(b):
    a, b = b, a
  i = 0
  while i < len(a) and a[i] == b[i]:
    i += 1
  # If the lengths differ by more than one, neither can be equal.
  return a[i:] == b[i + 1:] or a[i + 1:] == b[i + 1:]


def is_acronym(term: str, description: str = '') -> bool:
  """Whether a term is an acronym: FOMO, G.O.A.T, ELI5, or iykyk if spelled out.

  An acronym is one word of two to eight capitals and digits. In small letters
  it needs at least three, and a description that spells it out.
  """
  letters = re.sub(r"[.'’/&-]", '', term.strip())
  if not 2 <= len(letters) <= _MAX_ACRONYM or not letters.isalnum():
    return False
  if letters.isupper():
    return True
  return len(letters) > 2 and spells(letters, description)


def spells(term: str, description: str) -> bool:
  """Whether an acronym's letters are initials of consecutive words."""
  initials = ''.join(word[0] for word in words(description))
  return bool(key(term)) and key(term) in initials
