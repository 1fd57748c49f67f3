"""Removes logins and private paths from files that others will read."""

import functools
import os
import re
from typing import Any
from typing import Mapping
from typing import Sequence

REMOVED = '[removed]'

# Hugging Face's tokens (and those of organisations), Kaggle's new ones, and its
# old keys: 32 hexadecimal digits. Content hashes here have 64, commits 40.
_TOKEN = re.compile(
    r'\bhf_[A-Za-z0-9]{16,}|\bapi_org_[A-Za-z0-9]{16,}|\bKGAT_\w{8,}'
    r'|(?<![0-9A-Fa-f])[0-9a-f]{32}(?![0-9A-Fa-f])'
    r'|(?<=Bearer )\S+|(?<=Basic )[\w+/=]{8,}')
_SECRET_KEY = re.compile(
    r'(^|[._-])((hf|hub|api|access|auth|kaggle|wandb|bearer)[._-]?(token|key)'
    r'|password|secret|authorization)$|(^|\.)token$', re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r'(TOKEN|KEY|SECRET|PASSWORD)$')
_LOGINS = ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'KAGGLE_KEY',
           'KAGGLE_API_TOKEN')
# An absolute path: two names at least, and not the middle of a URL, of a
# relative path or of a config's regular expression.
_ABSOLUTE = re.compile(
    r'''(?:(?<![\w/.~)\]*+?|-])|(?<=file://))/(?:[^\s/:"'`<>|,;()\\]+/)+'''
    r'''([^\s/:"'`<>|,;()\\]*)''')


def scrub(
    value: Any, secrets: Sequence[str] = (), *, paths: bool = True) -> Any:
  """Returns a copy without logins and private paths, at any depth.

  Removed: values that look like a token, values of keys named like one, and
  the values of `secrets` and of this process's variables such as HF_TOKEN.
  Paths below the working directory become relative, those below home begin
  with ~, of other absolute ones the last name stays; `paths=False` keeps all.
  """
  return _walk(value, functools.partial(
      _scrub_text, secrets=secrets, paths=paths))


def _walk(value, change):
  """Applies `change` to all texts of a value, keys among them."""
  if isinstance(value, Mapping):
    return {
        change(str(key)): REMOVED
        if _SECRET_KEY.search(str(key)) and isinstance(item, str) and item
        else _walk(item, change) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_walk(item, change) for item in value]
  return change(value) if isinstance(value, str) else value


def _scrub_text(text, secrets, paths):
  # The longest first: one secret may contain another.
  for secret in sorted({*secrets, *_own_secrets()}, key=len, reverse=True):
    text = text.replace(secret, REMOVED)
  text = _TOKEN.sub(REMOVED, text)
  if not paths:
    return text
  # One may lie in the other.
  for folder in sorted((os.getcwd(), _home()), key=len, reverse=True):
    if folder in ('', '/', '~'):
      continue
    text = re.sub(
        rf'(?<![\w.~]){re.escape(folder)}(/|(?![\w.-]))',
        functools.partial(_short, home=folder == _home()), text)
  return _ABSOLUTE.sub(_last_name, text)


def _home():
  return os.path.expanduser('~').rstrip('/')


def _short(match, home):
  return '~' + match[1] if home else '' if match[1] else '.'


def _last_name(match):
  last = match[1] or match[0].rstrip('/').rpartition('/')[2]
  # A folder such as /scratch/NAME is called as its owner is.
  return '.../' + (REMOVED if last == os.path.basename(_home()) else last)


def _own_secrets():
  # Shorter values of any such variable are words like `true`.
  return {value for name, value in os.environ.items()
          if name in _LOGINS and len(value) >= 6
          or _SECRET_VARIABLE.search(name) and len(value) >= 16}
