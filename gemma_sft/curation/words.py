"""A text -> its words, its characters as readers count them, listed words."""

import dataclasses
import importlib.resources
import os

import regex

from gemma_sft import errors
from gemma_sft.curation import characters

# Written without spaces between words: there a character is the unit.
_UNSPACED = ('\\p{Han}\\p{Hiragana}\\p{Katakana}\\p{Thai}\\p{Lao}\\p{Khmer}'
             '\\p{Myanmar}\\p{Tibetan}')
# The re of the standard library takes vowel signs for punctuation: \w+ breaks
# तुझे into त and झ.
_WORD = regex.compile(
    f'[{_UNSPACED}]\\p{{M}}*'
    f'|(?:(?![{_UNSPACED}])[\\p{{L}}\\p{{M}}\\p{{N}}])+'
    f'(?:[\u200c\u200d\'’_]+(?:(?![{_UNSPACED}])[\\p{{L}}\\p{{M}}\\p{{N}}])+)*')
_SCRIPTS = ('Latin', 'Devanagari', 'Bengali', 'Gurmukhi', 'Gujarati', 'Oriya',
            'Tamil', 'Telugu', 'Kannada', 'Malayalam', 'Sinhala', 'Arabic',
            'Han', 'Hiragana', 'Katakana', 'Hangul', 'Cyrillic', 'Greek',
            'Hebrew', 'Thai')


def words(text: str) -> list[str]:
  """Returns the words; in scripts without spaces each character is one.

  Vowel signs and joiners belong to their word, hyphens divide.
  """
  return _WORD.findall(text)


def aksharas(text: str) -> list[str]:
  """Returns the characters that a reader sees; spaces are left out.

  In Indic scripts these are aksharas: क्षत्रिय is क्ष, त्रि, य. They are the
  grapheme clusters of Unicode (UAX 29, GB9c).
  """
  return [c for c in regex.findall(r'\X', text) if not c.isspace()]


def script(text: str) -> str:
  """Returns the script of most of the letters, such as 'Devanagari', or ''."""
  counts = {
      name: len(regex.findall(rf'\p{{{name}}}', text)) for name in _SCRIPTS}
  best = max(counts, key=counts.get)
  return best if counts[best] else ''


def shingles(text: str, n: int) -> set[str]:
  """Returns the n-grams of characters of a text, for likeness alone.

  Case, punctuation and the division into lines do not count. A text of fewer
  than n characters is its own only shingle.
  """
  folded = characters.compose_nukta(text.casefold())
  spoken = regex.sub(r'[^\p{L}\p{M}\p{N}\s]', '', folded)
  units = aksharas(spoken) or aksharas(folded)  # Of emoji, the emoji.
  if not units:
    return set()
  return {''.join(units[i:i + n]) for i in range(max(1, len(units) - n + 1))}


@dataclasses.dataclass(frozen=True)
class Entry:
  """A word or phrase of a list; `is_prefix` also finds what begins with it."""

  words: tuple[str, ...]
  is_prefix: bool
  list_name: str


def builtin_lists() -> list[str]:
  """Returns the names of the lists that come with the package."""
  folder = importlib.resources.files('gemma_sft.curation') / 'lists'
  return sorted(f.name.removesuffix('.txt') for f in folder.iterdir()
                if f.name.endswith('.txt'))


def load_list(name: str) -> list[Entry]:
  """Reads a list of the package by its name, or a file of one's own.

  A line holds a word or phrase; `*` at its end finds all words that begin with
  it; `#` begins a comment.

  Raises:
    UserError: if there is neither.
  """
  if os.path.isfile(name):
    with open(name, encoding='utf-8') as file:
      text = file.read()
  elif name in builtin_lists():
    folder = importlib.resources.files('gemma_sft.curation') / 'lists'
    text = (folder / f'{name}.txt').read_text(encoding='utf-8')
  else:
    raise errors.UserError(
        f'config.lists: no list {name!r}',
        f'one of {", ".join(builtin_lists())}, or a file, a word a line',
        f'{errors.nearest(name, builtin_lists())}Correct the name or path.')
  entries = []
  for line in text.splitlines():
    phrase = line.partition('#')[0].strip()
    if found := words(_fold(phrase)):
      entries.append(Entry(tuple(found), phrase.endswith('*'), name))
  return entries


def find_listed(text: str, entries: list[Entry]) -> list[Entry]:
  """Returns the entries that occur in a text as whole words."""
  inside = words(_fold(text))
  return [entry for entry in entries if _occurs(entry, inside)]


def _fold(text: str) -> str:
  return characters.compose_nukta(text.casefold())


def _occurs(entry: Entry, inside: list[str]) -> bool:
  *exact, last = entry.words
  size = len(entry.words)
  for i in range(len(inside) - size + 1):
    *start, end = inside[i:i + size]
    if start == exact and (
        end.startswith(last) if entry.is_prefix else end == last):
      return True
  return False
