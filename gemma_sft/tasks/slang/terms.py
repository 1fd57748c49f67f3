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

  Punctuation, white space and the variation selectors of emoji do not count.
  """
  return ''.join(
      c for c in term.casefold()
      if c == '\u200d'  # Joins several emoji into one.
      or unicodedata.category(c)[0] not in 'PZC' and c not in _VARIATIONS)


def occurs(term: str, text: str, inflected: bool = True) -> bool:
  """Whether a text contains the term as separate words.

  If `inflected`, each word may have an ending such as -s, -ed or -ing, with a
  final consonant doubled (bopping), a final e dropped (vibing) or y as i
  (parties). A term without letters or digits, such as an emoji, must appear as
  it is.
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
  stem, last = word[:-1], word[-1]
  forms = [word + ending for ending in (*_ENDINGS, *_VOWEL_ENDINGS)]
  if last == 'y':
    forms += [stem + ending for ending in ('ies', 'ied', 'ier')]
  if last == 'e':
    forms += [stem + ending for ending in _VOWEL_ENDINGS]
  if len(word) > 2:
    forms += [word + last + ending for ending in _VOWEL_ENDINGS]
  if last in 'sxzho':
    forms.append(word + 'es')
  return found in forms


def is_close(a: str, b: str) -> bool:
  """Whether two keys are at most one insertion, deletion or change apart."""
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
  return letters.isupper() or (
      len(letters) > 2 and spells(letters, description))


def spells(term: str, description: str) -> bool:
  """Whether an acronym's letters are initials of consecutive words."""
  initials = ''.join(word[0] for word in words(description))
  return bool(key(term)) and key(term) in initials
