"""A text -> the same text without what the web and its encodings did to it.

Every function leaves a clean text as it is.
"""

import functools
import unicodedata

import ftfy
import regex
from selectolax import lexbor

# Scripts in which a joiner chooses the form of a letter.
_JOINING = (
    '[\\p{Devanagari}\\p{Bengali}\\p{Gurmukhi}\\p{Gujarati}\\p{Oriya}\\p{Tamil}'
    '\\p{Telugu}\\p{Kannada}\\p{Malayalam}\\p{Sinhala}\\p{Arabic}'
    '\\p{Mongolian}]')
_VIRAMA = '[\u094d\u09cd\u0a4d\u0acd\u0b4d\u0bcd\u0c4d\u0ccd\u0d4d\u0dca]'
_JOINERS = regex.compile('([\u200c\u200d])\\1*')
# Zero-width space, word joiner, byte order mark, soft hyphen.
_INVISIBLE = regex.compile('[\u200b\u2060\ufeff\u00ad]')
_BEFORE_JOINER = regex.compile(f'{_JOINING}$')
_AFTER_VIRAMA = regex.compile(f'{_VIRAMA}$')
_JOINED = regex.compile(_JOINING)
_EMOJI = regex.compile('\\p{Extended_Pictographic}')
_AFTER_EMOJI = regex.compile(
    '[\\p{Extended_Pictographic}\ufe0f\U0001f3fb-\U0001f3ff]$')

# Unicode excludes these letters from composition, so NFC takes them apart; a
# transliterator, and many a font, knows them only in one piece.
_NUKTA = {
    unicodedata.normalize('NFC', letter): letter
    for letter in map(chr, range(0x900, 0xD80))
    if len(unicodedata.normalize('NFC', letter)) == 2}
_NUKTA_PAIR = regex.compile('|'.join(_NUKTA))
_NUKTA_SIGN = '[\u093c\u09bc\u0a3c\u0b3c]'
# Typed twice, or after the vowel sign of its letter: in one file of 520
# ghazals twelve lines have it so.
_MISPLACED_NUKTA = regex.compile(
    f'(\\p{{L}})({_NUKTA_SIGN}?)'
    f'((?:(?!{_NUKTA_SIGN}|{_VIRAMA})\\p{{M}})*)({_NUKTA_SIGN})')

_FTFY = ftfy.TextFixerConfig(
    # The default turns ， into a comma; full width is right in Chinese.
    fix_character_width=False,
    uncurl_quotes=False,
    unescape_html=False,  # `strip_html` does it.
    normalization=None,  # `compose_nukta` does it.
    explain=False)

_BLOCK = ('address article aside blockquote center dd div dl dt figcaption'
          ' footer form h1 h2 h3 h4 h5 h6 header hr li main nav ol option p pre'
          ' section table tbody tfoot thead tr ul').split()
_HIDDEN = ('canvas', 'iframe', 'noscript', 'object', 'script', 'style', 'svg',
           'template', 'title')
_INLINE = ('a abbr b bdi bdo big body button caption cite code col colgroup'
           ' data del details dfn em embed fieldset figure font head html i img'
           ' input ins kbd label legend link map mark marquee meta nobr param'
           ' picture q rp rt ruby s samp select small source span strike strong'
           ' sub summary sup td textarea th time title track tt u var video'
           ' wbr').split()
_SWITCHES = ('async|checked|compact|controls|defer|disabled|hidden|multiple'
             '|noshade|nowrap|open|readonly|required|selected')
# A name that HTML has, with what can be attributes: 'x <b and c> d' is prose.
_TAG = regex.compile(
    rf'<(?P<close>/?)(?P<name>br|{"|".join((*_BLOCK, *_HIDDEN, *_INLINE))})\b'
    r'(?:\s+[\w:-]+\s*=\s*(?:"[^"]*"|\'[^\']*\'|[^\s"\'<>=]+)'
    rf'|\s+(?:{_SWITCHES})\b)*+\s*/?>'
    r'|<!--(?:(?!-->).)*-->|<!doctype\b[^<>]*>|<!\[CDATA\[|\]\]>',
    regex.IGNORECASE | regex.DOTALL)
_ENTITY = regex.compile(r'&(?:#\d+|#x[0-9a-f]+|[a-z]\w*);', regex.IGNORECASE)


def strip_html(text: str) -> str:
  """Returns the text that a browser would show, its line breaks kept.

  Signs of prose stay: 'I <3 you & 3 > 2', 'a<b'. Escaped markup (&lt;br&gt;)
  counts as markup, as pages that were scraped twice have it.
  """
  while True:
    stripped = _strip_once(text)
    if stripped == text:
      return text
    text = stripped


def _strip_once(text: str) -> str:
  if not _TAG.search(text) and not _ENTITY.search(text):
    return text
  pieces, end, is_line_open = [], 0, False
  for tag in _TAG.finditer(text):
    prose = text[end:tag.start()]
    pieces.append(_escape(prose))
    is_line_open = bool((prose.rpartition('\n')[2]).strip()) or (
        is_line_open and '\n' not in prose)
    end = tag.end()
    name = (tag['name'] or '').lower()
    if name == 'br' or name in _BLOCK and tag['close']:
      # The line break of the source after it is the same one.
      end += len(regex.match(r'[ \t]*(?:\r?\n)?', text[end:])[0])
      pieces.append('\n\n' if name == 'p' else '\n')
      is_line_open = False
    elif name in _BLOCK and is_line_open:
      pieces.append('\n')
      is_line_open = False
    if name and name != 'br':
      pieces.append(tag[0])
  pieces.append(_escape(text[end:]))
  tree = lexbor.LexborHTMLParser('<body><div>' + ''.join(pieces))
  tree.strip_tags(list(_HIDDEN))
  return tree.body.text() if tree.body else ''


def _escape(prose: str) -> str:
  """Returns prose in which only whole entities are left to decode."""
  prose = regex.sub(r'&(?!(?:#\d+|#x[0-9a-f]+|[a-z]\w*);)', '&amp;', prose,
                    flags=regex.IGNORECASE)
  return prose.replace('<', '&lt;')


def remove_symbols(text: str, pattern: str) -> str:
  """Returns the text without the matches of a pattern of `regex`."""
  return regex.sub(pattern, '', text)


def repair_encoding(text: str) -> str:
  """Returns the text with mojibake undone and no control characters (ftfy).

  Full-width signs and curly quotes stay.
  """
  return ftfy.fix_text(text, _FTFY)


def compose_nukta(text: str) -> str:
  """Returns the text with each Indic letter and its nukta as one character.

  A nukta that stands after the vowel sign goes to its letter, a second one
  goes.
  """
  text = unicodedata.normalize('NFC', text)
  while (moved := _MISPLACED_NUKTA.sub(
      lambda m: m[1] + (m[2] or m[4]) + m[3], text)) != text:
    text = moved
  text = unicodedata.normalize('NFC', text)
  return _NUKTA_PAIR.sub(lambda pair: _NUKTA[pair[0]], text)


def remove_invisible(text: str) -> str:
  """Returns the text without characters of no width, but for true joiners.

  ZWNJ and ZWJ carry meaning inside a word of an Indic or the Arabic script,
  after a virama, and ZWJ between emoji. Marks of direction are left alone.
  """
  text = _INVISIBLE.sub('', text)

  def keep(joiner):
    before, after = text[:joiner.start()][-1:], text[joiner.end():][:1]
    is_real = (
        _AFTER_VIRAMA.search(before)
        or _BEFORE_JOINER.search(before) and _JOINED.match(after)
        or joiner[1] == '\u200d' and _AFTER_EMOJI.search(before)
        and _EMOJI.match(after))
    return joiner[1] if is_real else ''

  return _JOINERS.sub(keep, text)


def regular_whitespace(text: str) -> str:
  """Returns the text with single spaces and at most one blank line in a row."""
  text = regex.sub(r'\r\n?|[\v\f\x85\u2028\u2029]', '\n', text)
  text = regex.sub(r'[^\S\n]+', ' ', text)
  text = regex.sub(r' ?\n ?', '\n', text)
  return regex.sub(r'\n{3,}', '\n\n', text).strip()


def lower(text: str) -> str:
  """Returns the text in lower case, in NFC."""
  return compose_nukta(text.lower())


@functools.cache
def has_case(letter: str) -> bool:
  """Whether a letter has an upper and a lower case."""
  return letter.lower() != letter.upper()


def capitals_inside(text: str) -> float:
  """Returns the share of Latin words with a capital after a small letter.

  In prose these are a few names (iPhone); in ITRANS, HK or SLP1 a capital is
  another sound than its small letter, and a fifth of the words and more has
  one.
  """
  latin = regex.findall(r'\p{Latin}[\p{Latin}\p{M}]+', text)
  mixed = [w for w in latin if regex.search(r'\p{Ll}\p{Lu}', w)]
  return len(mixed) / len(latin) if latin else 0.0
