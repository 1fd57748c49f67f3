"""Divides texts into words and visible characters, and finds listed words."""

import dataclasses
import pathlib

import regex

from gemma_sft import errors
from gemma_sft.curation import characters

# Written without spaces between words, so that each character is a unit.
_UNSPACED = ('\\p{Han}\\p{Hiragana}\\p{Katakana}\\p{Thai}\\p{Lao}\\p{Khmer}'
             '\\p{Myanmar}\\p{Tibetan}')
# The standard library's re takes vowel signs for punctuation: \w+ breaks तुझे
# into त and झ.
_WORD = regex.compile(
    f'[{_UNSPACED}]\\p{{M}}*'
    f'|(?:(?![{_UNSPACED}])[\\p{{L}}\\p{{M}}\\p{{N}}])+'
    f'(?:[\u200c\u200d\'’_]+(?:(?![{_UNSPACED}])[\\p{{L}}\\p{{M}}\\p{{N}}])+)*')
_SCRIPTS = ('Latin', 'Devanagari', 'Bengali', 'Gurmukhi', 'Gujarati', 'Oriya',
            'Tamil', 'Telugu', 'Kannada', 'Malayalam', 'Sinhala', 'Arabic',
            'Han', 'Hiragana', 'Katakana', 'Hangul', 'Cyrillic', 'Greek',
            'Hebrew', 'Thai')
_LISTS = pathlib.Path(__file__).parent / 'lists'


def words(text: str) -> list[str]:
  """Returns the words; in scripts without spaces each character is a word.

  Vowel signs and joiners belong to their word; a hyphen separates words.
  """
  return _WORD.findall(text)


def aksharas(text: str) -> list[str]:
  """Returns the characters that a reader sees: क्ष, त्रि, य of क्षत्रिय.

  They are Unicode's grapheme clusters (UAX 29, GB9c).
  """
  return [c for c in regex.findall(r'\X', text) if not c.isspace()]


def script(text: str) -> str:
  """Returns the script of most letters, such as 'Devanagari', or ''."""
  counts = {'': 0} | {
      name: len(regex.findall(rf'\p{{{name}}}', text)) for name in _SCRIPTS}
  return max(counts, key=counts.get)


def shingles(text: str, n: int) -> set[str]:
  """Returns the character n-grams of a text, to compare it with others.

  Case, punctuation and line breaks are ignored. A text of fewer than n
  characters is its only n-gram.
  """
  folded = _fold(text)
  spoken = regex.sub(r'[^\p{L}\p{M}\p{N}\s]', '', folded)
  units = aksharas(spoken) or aksharas(folded)  # Of emoji alone, the emoji.
  if not units:
    return set()
  return {''.join(units[i:i + n]) for i in range(max(1, len(units) - n + 1))}


@dataclasses.dataclass(frozen=True)
class Entry:
  """A word or phrase of a list; a prefix matches words that start with it."""

  words: tuple[str, ...]
  is_prefix: bool
  list_name: str


def builtin_lists() -> list[str]:
  """Returns the names of the lists that come with the package."""
  return sorted(path.stem for path in _LISTS.glob('*.txt'))


def load_list(name: str) -> list[Entry]:
  """Reads one of the package's lists by its name, or a file by its path.

  Each line is a word or phrase; `*` at its end makes it a prefix; `#` begins a
  comment.
  """
  path = pathlib.Path(name)
  if not path.is_file() and name in builtin_lists():
    path = _LISTS / f'{name}.txt'
  if not path.is_file():
    raise errors.UserError(
        f'config.lists: no list {name!r}',
        f'one of {", ".join(builtin_lists())}, or a file, one word a line',
        f'{errors.nearest(name, builtin_lists())}Correct the name or path.')
  entries = []
  for line in path.read_text(encoding='utf-8').splitlines():
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
  runs = zip(*(inside[i:] for i in range(len(entry.words))))
  return any(start == exact and (
      end.startswith(last) if entry.is_prefix else end == last)
             for *start, end in runs)
