"""Reads a Modelfile by the rules of Ollama's parser/parser.go."""

import re
from typing import NamedTuple

from gemma_sft.exports import modelfile

_COMMANDS = (
    'from', 'license', 'template', 'system', 'adapter', 'draft', 'renderer',
    'parser', 'parameter', 'message', 'requires')
_INTEGER = r'[+-]?\d+'
_FLOAT = r'[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?'
# The options of Ollama's api/types.go. It silently drops old ones, such as
# mirostat: unknown here.
_PARAMETERS = {
    **dict.fromkeys((
        'num_ctx', 'num_batch', 'num_gpu', 'main_gpu', 'num_thread', 'num_keep',
        'num_predict', 'draft_num_predict', 'seed', 'top_k', 'repeat_last_n',
    ), _INTEGER),
    **dict.fromkeys((
        'temperature', 'top_p', 'min_p', 'typical_p', 'repeat_penalty',
        'presence_penalty', 'frequency_penalty'), _FLOAT),
    'use_mmap': '1|t|T|TRUE|true|True|0|f|F|FALSE|false|False',
    'stop': r'[\s\S]+'}


class Command(NamedTuple):
  """One command; the name of a parameter or message is 'parameter NAME'."""

  line: int
  name: str
  value: str


class Malformed(ValueError):
  """What `ollama create` refuses or silently changes."""

  def __init__(self, line, problem):
    super().__init__(f'line {line}: {problem}')


def parse(text):
  """Returns the commands of a Modelfile as Ollama reads them."""
  commands, lines, at = [], text.split('\n'), 0
  while at < len(lines):
    number, line = at + 1, lines[at].lstrip(' \t\r')
    at += 1
    if not line or line.startswith('#'):
      continue
    match = re.match(r'([A-Za-z]+)[ \t](.*)', line, re.DOTALL)
    if not match or match[1].lower() not in _COMMANDS:
      raise Malformed(number, 'no command with a value')
    name, value = match[1].lower(), match[2]
    if name in ('parameter', 'message'):
      match = re.match(r'(\w*)[ \t](.*)', value, re.ASCII | re.DOTALL)
      if not match:
        raise Malformed(number, 'a name without a value')
      name, value = f'{name} {match[1]}', match[2]
    while (unquoted := _unquote(value)) is None:
      if at == len(lines):
        raise Malformed(number, 'quotes do not close')
      value += '\n' + lines[at]
      at += 1
    for offset, part in enumerate(value.split('\n')):
      for character in part:
        if character not in '\t\r' and not modelfile.is_printable(character):
          raise Malformed(number + offset, f'U+{ord(character):04X} is dropped')
    commands.append(Command(number, name, unquoted))
  return commands


def _unquote(text):
  """Returns the value, or None where its quotes have not closed yet."""
  text = text.strip()
  for quotes in ('"""', '"'):
    if text.startswith(quotes):
      closed = len(text) >= 2 * len(quotes) and text.endswith(quotes)
      return text[len(quotes):-len(quotes)] if closed else None
  return text


def check(text):
  """Raises `Malformed`; returns the commands."""
  commands = parse(text)
  if not any(name == 'from' for _, name, _ in commands):
    raise Malformed(1, 'no FROM')
  for line, name, value in commands:
    kind, _, name = name.partition(' ')
    if kind == 'from' and not value:
      raise Malformed(line, 'FROM without a value')
    if kind == 'parameter':
      if name not in _PARAMETERS:
        raise Malformed(line, f'unknown parameter {name!r}')
      if not re.fullmatch(_PARAMETERS[name], value):
        raise Malformed(line, f'{name} of {value!r}')
    if kind == 'message' and name not in ('system', 'user', 'assistant'):
      raise Malformed(line, f'role {name!r}')
    if kind == 'template':
      _check_template(line, value)
  return commands


_STRING = r'"(?:[^"\\\n]|\\.)*"|`[^`]*`'
_ACTION = re.compile(
    rf'\{{\{{(?:-\s)?((?:{_STRING}|.)*?)(?:\s-)?\}}\}}', re.DOTALL)


def _check_template(first_line, template):
  """Checks that actions, blocks, strings and brackets of a template close."""
  at, blocks = 0, []
  while (start := template.find('{{', at)) >= 0:
    line = first_line + template.count('\n', 0, start)
    match = _ACTION.match(template, start)
    if not match:
      raise Malformed(line, 'an action without }}')
    at, body = match.end(), match[1].strip()
    if body.startswith('/*'):
      continue
    code = re.sub(_STRING, '', body)
    word = re.match(r'\w*', code)[0]
    brackets = re.sub(r'[^()]', '', code)
    while '()' in brackets:
      brackets = brackets.replace('()', '')
    if not body or brackets or any(c in code for c in '"`{'):
      raise Malformed(line, f'the action {match[0]}')
    if word in ('if', 'range', 'with', 'define', 'block'):
      blocks.append(line)
    elif word in ('else', 'end') and not blocks:
      raise Malformed(line, f'{match[0]} outside a block')
    elif word == 'end':
      blocks.pop()
  if blocks:
    raise Malformed(blocks[-1], 'a block without {{ end }}')
