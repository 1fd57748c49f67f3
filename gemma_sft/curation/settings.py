"""Checks the settings of configs/curation.py before any data is read."""

import math
from typing import Any

import regex

from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft.curation import augment
from gemma_sft.curation import romanise

_LISTS_OF_TEXT = (
    'text', 'punctuation', 'required', 'lists', 'groups', 'augment',
    'augment_templates', 'augment_keep', 'romanise')
_SHARES = ('punctuation_share', 'max_missing', 'duplicates', 'augment_share')


def validate(config: Any) -> None:
  """Raises a UserError for the first value that is out of its range."""

  def check(key, good, expected, fix=''):
    if not good(config[key]):
      raise errors.UserError(f'config.{key} is {config[key]!r}', expected,
                             fix or f'set --config.{key}')

  def is_share(value):
    return isinstance(value, (int, float)) and 0 <= value <= 1

  check('source', bool, 'the file or pattern of the raw collection')
  for key in _LISTS_OF_TEXT:
    check(key, lambda v: all(isinstance(item, str) and item for item in v),
          'texts', f"set --config.{key}=\"('one','two')\"")
  check('fractions', lambda v: len(v) == 3 and all(map(is_share, v))
        and math.isclose(sum(v), 1, abs_tol=1e-6),
        'three shares from 0 to 1 that add to 1: of train, validation and test',
        "for example --config.fractions='(0.8, 0.1, 0.1)'")
  for key in _SHARES:
    check(key, is_share, 'a share from 0 to 1')
  check('ngram', lambda v: v >= 1, 'at least 1 character')
  check('min_lines', lambda v: v >= 0, '0 or more lines')
  check('opening', lambda v: v >= 0, '0 for none, or a number of lines')
  check('tokens', lambda v: v in ('', 'words', 'aksharas'),
        "words, aksharas or ''")
  for key, others in (('scheme', ()), ('romanised', ('', 'none'))):
    known = (*others, *romanise.SCHEMES)
    check(key, known.__contains__,
          f'one of {", ".join(name or "''" for name in known)}',
          f'{errors.nearest(config[key], known)}Set --config.{key}')
  check('augment', lambda v: set(v) <= set(augment.METHODS),
        f'of {", ".join(augment.METHODS)}')
  if 'paraphrase' in config.augment:
    check('augment_templates', bool, 'at least one for paraphrase',
          "for example --config.augment_templates="
          "\"('description=You say it when {description}',)\"")
  for key in ('rename', 'fill'):
    config_lib.parse_columns(config[key], key)
  try:
    regex.compile(config.symbols)
  except regex.error as error:
    raise errors.UserError(
        f'config.symbols is {config.symbols!r}: {error}',
        "a pattern of the package regex, or ''", 'correct it') from error
