"""Repairs texts: markup, encoding errors, invisible characters, white space.

Every function leaves a clean text unchanged.
"""

import unicodedata

import ftfy
import regex
from selectolax import lexbor

# Scripts in which a joiner selects the form of a letter.
_JOINING = (
    r'[\p{Devanagari}\p{Bengali}\p{Gurmukhi}\p{Gujarati}\p{Oriya}\p{Tamil}'
    r'\p{Telugu}\p{Kannada}\p{Malayalam}\p{Sinhala}\p{Arabic}\p{Mongolian}]')
_VIRAMA = '[\u094d\u09cd\u0a4d\u0acd\u0b4d\u0bcd\u0c4d\u0ccd\u0d4d\u0dca]'
# Zero-width space, word joiner, byte order mark, soft hyphen.
_INVISIBLE = regex.compile('[\u200b\u2060\ufeff\u00ad]')
# ZWNJ and ZWJ matter after a virama and between letters of these scripts, ZWJ
# also between emoji (of which a variation or skin tone may be part).
_USELESS_JOINER = regex.compile(
    f'(?!(?<={_VIRAMA})|(?<={_JOINING}).(?={_JOINING})'
    '|(?<=[\\p{Extended_Pictographic}\ufe0f\U0001f3fb-\U0001f3ff])\u200d'
    '(?=\\p{Extended_Pictographic}))[\u200c\u200d]')

# Unicode excludes these letters from composition, so NFC decomposes them; the
# transliterator and many fonts know only the composed form.
_NUKTA = {
    pair: letter for letter in map(chr, range(0x900, 0xD80))
    if len(pair := unicodedata.normalize('NFC', letter)) == 2}
_NUKTA_PAIR = regex.compile('|'.join(_NUKTA))
_NUKTA_SIGN = '[\u093c\u09bc\u0a3c\u0b3c]'
# Typed twice, or after the vowel sign of its letter, as in twelve lines of one
# file of 520 ghazals.
_MISPLACED_NUKTA = regex.compile(
    f'(\\p{{L}})({_NUKTA_SIGN}?)'
    f'((?:(?!{_NUKTA_SIGN}|{_VIRAMA})\\p{{M}})*)({_NUKTA_SIGN})')

# The default turns ， into a comma, but Chinese uses full width. Entities are
# left to `strip_html`, normalisation to `compose_nukta`.
_FTFY = ftfy.TextFixerConfig(
    fix_character_width=False, uncurl_quotes=False, unescape_html=False,
    normalization=None, explain=False)

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
# A tag name of HTML with valid attributes; 'x <b and c> d' is prose.
_TAG = regex.compile(
    rf'<(?P<close>/?)(?P<name>br|{"|".join((*_BLOCK, *_HIDDEN, *_INLINE))})\b'
    r'(?:\s+[\w:-]+\s*=\s*(?:"[^"]*"|\'[^\']*\'|[^\s"\'<>=]+)'
    rf'|\s+(?:{_SWITCHES})\b)*+\s*/?>'
    r'|<!--(?:(?!-->).)*-->|<!doctype\b[^<>]*>|<!\[CDATA\[|\]\]>',
    regex.IGNORECASE | regex.DOTALL)
_ENTITY = regex.compile(r'&(?:#\d+|#x[0-9a-f]+|[a-z]\w*);', regex.IGNORECASE)


def strip_html(text: str) -> str:
  """Returns the text that a browser would show, and keeps its line breaks.

  '<', '>' and '&' in prose stay: 'I <3 you & 3 > 2', 'a<b'. Escaped markup
  (&lt;br&gt;) counts as markup: pages that were scraped twice contain it.
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
    is_line_open = bool(prose.rpartition('\n')[2].strip()) or (
        is_line_open and '\n' not in prose)
    end = tag.end()
    name = (tag['name'] or '').lower()
    if name == 'br' or name in _BLOCK and tag['close']:
      # A line break of the source right after the tag is not a second one.
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
  """Escapes prose so that only complete entities are decoded."""
  prose = regex.sub(r'&(?!(?:#\d+|#x[0-9a-f]+|[a-z]\w*);)', '&amp;', prose,
                    flags=regex.IGNORECASE)
  return prose.replace('<', '&lt;')


def repair_encoding(text: str) -> str:
  """Undoes mojibake and removes control characters (ftfy)."""
  return ftfy.fix_text(text, _FTFY)


def compose_nukta(text: str) -> str:
  """Composes each Indic letter and its nukta into one character.

  A nukta after the vowel sign moves to its letter; a second nukta is removed.
  """
  text = unicodedata.normalize('NFC', text)
  while (moved := _MISPLACED_NUKTA.sub(
      lambda m: m[1] + (m[2] or m[4]) + m[3], text)) != text:
    text = moved
  text = unicodedata.normalize('NFC', text)
  return _NUKTA_PAIR.sub(lambda pair: _NUKTA[pair[0]], text)


def remove_invisible(text: str) -> str:
  """Removes zero-width characters, except joiners that change a letter.

  Direction marks stay.
  """
  text = _INVISIBLE.sub('', text)
  text = regex.sub('([\u200c\u200d])\\1+', r'\1', text)
  return _USELESS_JOINER.sub('', text)


def regular_whitespace(text: str) -> str:
  """Leaves single spaces and at most one blank line in a row."""
  text = regex.sub(r'\r\n?|[\v\f\x85\u2028\u2029]', '\n', text)
  text = regex.sub(r'[^\S\n]+', ' ', text)
  text = regex.sub(r' ?\n ?', '\n', text)
  return regex.sub(r'\n{3,}', '\n\n', text).strip()


def lower(text: str) -> str:
  """Returns the text in lower case, in NFC."""
  return compose_nukta(text.lower())


def capitals_inside(text: str) -> float:
  """Returns the share of Latin words with a capital after a lower-case letter.

  In prose these are a few names (iPhone); in ITRANS, HK and SLP1, where a
  capital is another sound, at least a fifth of the words.
  """
  latin = regex.findall(r'\p{Latin}[\p{Latin}\p{M}]+', text)
  mixed = [w for w in latin if regex.search(r'\p{Ll}\p{Lu}', w)]
  return len(mixed) / len(latin) if latin else 0.0
