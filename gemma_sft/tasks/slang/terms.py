"""What a slang term is alike to: its use in a text, other terms, initials."""

import re
import unicodedata

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_ENDINGS = ('s', "'s", "'d", 'ly', 'ness')
# Those that double a final consonant or take the place of a final e.
_AFTER_VOWEL = ('ed', 'ing', 'er', 'ers', 'y')
_MOST_LETTERS = 8
# Whether a sign is drawn as text or as an emoji.
_VARIATIONS = '\ufe0e\ufe0f'


def words(text: str) -> list[str]:
  """Returns the words in lower case; don't is one, e-boy and L+ratio are two.

  The dots of G.O.A.T go, so that it is one word too.
  """
  text = text.replace('’', "'").casefold()
  text = re.sub(r'\b(?:\w\.){2,}\w?', lambda m: m[0].replace('.', ''), text)
  return _WORD.findall(text)


def key(term: str) -> str:
  """Returns what two spellings of a term share: glow-up is Glow up.

  Lower case, without punctuation and white space. Emoji stay, whichever way
  they are to be drawn.
  """
  return ''.join(
      c for c in term.casefold()
      if c == '\u200d'  # Joins emoji to one.
      or unicodedata.category(c)[0] not in 'PZC' and c not in _VARIATIONS)


def occurs(term: str, text: str, inflected: bool = True) -> bool:
  """Whether a text has the term as words of its own, inflected or not.

  If `inflected`, each word may take an ending: -s, -ed, -ing, -er and the
  like, with a final consonant doubled (bopping), a final e dropped (vibing) or
  y as i (parties). Other forms (took for take) do not count, nor does a part of
  a longer word. A term without letters or digits, an emoji, has to stand there
  as it is.
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
  if last == 'e' and found in {word[:-1] + e for e in _AFTER_VOWEL}:
    return True
  if len(word) > 2 and found in {word + last + e for e in _AFTER_VOWEL}:
    return True
  if last in 'sxzho' and found == word + 'es':
    return True
  return found in {word + e for e in (*_ENDINGS, *_AFTER_VOWEL)}


def is_close(a: str, b: str) -> bool:
  """Whether one insertion, deletion or replacement at most parts two keys."""
  if len(a) > len(b):
    a, b = b, a
  i = 0
  while i < len(a) and a[i] == b[i]:
    i += 1
  # Of lengths further apart neither can hold.
  return a[i:] == b[i + 1:] or a[i + 1:] == b[i + 1:]


def is_acronym(term: str, description: str = '') -> bool:
  """Whether a term is initials: FOMO, G.O.A.T, ELI5, or iykyk if spelled out.

  By its shape: one word of two to eight capitals, with digits among them. In
  small letters only if the description spells it out, three letters or more.
  """
  letters = re.sub(r"[.'’/&-]", '', term.strip())
  if not 2 <= len(letters) <= _MOST_LETTERS or not letters.isalnum():
    return False
  if letters.isupper():
    return True
  return len(letters) > 2 and spells(letters, description)


def spells(term: str, description: str) -> bool:
  """Whether the letters of an acronym are initials of words in a row."""
  initials = ''.join(word[0] for word in words(description))
  return bool(key(term)) and key(term) in initials
