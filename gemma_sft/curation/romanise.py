"""Writes Indic scripts in Latin letters, by indic-transliteration."""

import functools

from indic_transliteration import sanscript
import regex

from gemma_sft.curation import characters

# In these a capital is another sound than its lower-case letter.
CASED = ('hk', 'itrans', 'optitrans', 'slp1')
SCHEMES = ('iast', 'iso', 'kolkata_v2', 'titus', *CASED)

# Unicode's names of scripts, which the library writes in lower case.
_SCRIPTS = ('Devanagari', 'Bengali', 'Gurmukhi', 'Gujarati', 'Oriya', 'Telugu',
            'Kannada', 'Malayalam')
# Dandas and joiners have no script of their own.
_RUNS = {
    name: regex.compile(
        rf'\p{{{name}}}[\p{{{name}}}\u0964\u0965\u200c\u200d]*')
    for name in _SCRIPTS}
# Bengali goes through Devanagari, whose block has the same layout: ব becomes
# ba, where the library's own table has va. After a virama it is the v of
# svapna.
_BENGALI = {
    code: code - 0x80 for code in range(0x980, 0xA00)} | {
        ord('ৎ'): 'त्', ord('ৰ'): 'र', ord('ৱ'): 'व'}
_BENGALI_V = '্ব', '্ৱ'
INDIC = regex.compile(
    '[' + ''.join(rf'\p{{{name}}}' for name in _SCRIPTS) + ']')
# The library does not know the open vowels of English words (कॉफ़ी) and would
# write the inherent a before them. They pass through it as o and e with a
# private mark, and become ISO 15919's ô and ê.
_OPEN = {'ॉ': 'ो\ue000', 'ऑ': 'ओ\ue000', 'ॅ': 'े\ue000', 'ऍ': 'ए\ue000',
         'ॲ': 'ए\ue000', 'ૉ': 'ો\ue000', 'ઑ': 'ઓ\ue000', 'ૅ': 'ે\ue000',
         'ઍ': 'એ\ue000'}
# The one letter that the library knows only in decomposed form.
_DECOMPOSED = '\u095d', '\u0922\u093c'
_OPEN_LATIN = str.maketrans('oōeē', 'ôôêê')


def romanise(text: str, scheme: str = 'iast') -> str:
  """Returns the text with its Indic letters replaced by Latin ones.

  So is a final a that Hindi does not pronounce (दाम is dāma). Other scripts
  stay, as does Tamil, whose க the library writes as gh. Joiners are removed.
  """
  text = characters.compose_nukta(text)
  for name, run in _RUNS.items():
    text = run.sub(functools.partial(_transliterate, name, scheme), text)
  return text


def leftover(text: str) -> list[str]:
  """Returns the Indic characters that are left in a romanised text."""
  return sorted(set(INDIC.findall(text)))


def _transliterate(name: str, scheme: str, run: regex.Match) -> str:
  native = regex.sub('[\u200c\u200d]', '', run[0])
  if name == 'Bengali':
    name = 'Devanagari'
    native = native.replace(*_BENGALI_V).translate(_BENGALI)
  native = native.replace(*_DECOMPOSED)
  for letter, mark in _OPEN.items():
    native = native.replace(letter, mark)
  latin = sanscript.transliterate(native, name.lower(), scheme)
  if scheme == 'iast':  # A candrabindu, which IAST and ISO write as m̐.
    latin = latin.replace('~', 'm\u0310')
  return regex.sub('([oōeē])\ue000', lambda m: m[1].translate(_OPEN_LATIN),
                   latin).replace('\ue000', '')
