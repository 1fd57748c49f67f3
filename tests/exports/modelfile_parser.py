"""Reads a Modelfile by the rules of Ollama's parser/parser.go.

The text of a template is read by templates_test.
"""

import re

from gemma_sft.exports import modelfile

_NUMBER = r'[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?'
# Options of Ollama's api/types.go; it silently drops unknown ones.
_OPTIONS = {
    'num_ctx': r'\d+', 'top_k': r'\d+', 'temperature': _NUMBER,
    'top_p': _NUMBER, 'repeat_penalty': _NUMBER, 'stop': r'[\s\S]+'}


class Malformed(ValueError):
  """What `ollama create` refuses or silently changes."""


def parse(text):
  """Returns (command, value) pairs; a parameter's command has its name."""
  commands, lines = [], text.split('\n')
  while lines:
    line = lines.pop(0).lstrip(' \t\r')
    if not line or line.startswith('#'):
      continue
    match = re.match(
        rf'(from|license|template|parameter (?:{"|".join(_OPTIONS)}))[ \t](.*)',
        line, re.ASCII | re.DOTALL | re.IGNORECASE)
    if not match:
      raise Malformed(f'no command with a value: {line!r}')
    name, value = match[1].lower(), match[2]
    while (unquoted := _unquote(value)) is None:
      if not lines:
        raise Malformed(f'quotes do not close: {name}')
      value += '\n' + lines.pop(0)
    dropped = [c for c in value
               if c not in '\n\t\r' and not modelfile.is_printable(c)]
    if dropped:
      raise Malformed(f'{name}: U+{ord(dropped[0]):04X} is dropped')
    allowed = _OPTIONS.get(name.partition(' ')[2], r'[\s\S]+')
    if not re.fullmatch(allowed, unquoted):
      raise Malformed(f'{name} of {unquoted!r}')
    commands.append((name, unquoted))
  if 'from' not in dict(commands):
    raise Malformed('no FROM')
  return commands


def _unquote(text):
  """Returns the value, or None where its quotes have not closed yet."""
  text = text.strip()
  for quotes in ('"""', '"'):
    if text.startswith(quotes):
      closed = len(text) >= 2 * len(quotes) and text.endswith(quotes)
      return text[len(quotes):-len(quotes)] if closed else None
  return text
