"""The Modelfile that `ollama create` reads, and a check of its grammar.

The grammar is that of Ollama's parser/parser.go: commands with a value each,
which goes on over lines until its quotes close. There are no escapes.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import re
import unicodedata

from gemma_sft import errors

_COMMANDS = (
    'from', 'license', 'template', 'system', 'adapter', 'draft', 'renderer',
    'parser', 'parameter', 'message', 'requires',
)
# The options of Ollama's api/types.go with the type of their value. Old ones,
# such as mirostat, are read and dropped there: unknown here.
_PARAMETERS = {
    'num_ctx': int, 'num_batch': int, 'num_gpu': int, 'main_gpu': int,
    'num_thread': int, 'num_keep': int, 'num_predict': int,
    'draft_num_predict': int, 'seed': int, 'top_k': int,
    'repeat_last_n': int, 'temperature': float, 'top_p': float,
    'min_p': float, 'typical_p': float, 'repeat_penalty': float,
    'presence_penalty': float, 'frequency_penalty': float, 'use_mmap': bool,
    'stop': str,
}
_BOOLEANS = ('1', 't', 'T', 'TRUE', 'true', 'True',
             '0', 'f', 'F', 'FALSE', 'false', 'False')
_NUMBER = {int: re.compile(r'[+-]?\d+'),
           float: re.compile(r'[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?')}
_QUOTES = '"""'


def render(
    *,
    gguf: str,
    template: str,
    temperature: float,
    repetition_penalty: float,
    top_k: int,
    top_p: float,
    stops: Sequence[str],
    context_length: int,
    license: str = '',
    system: str = '',
) -> str:
  """Returns the text of a Modelfile, which passes `check`.

  Every number of sampling is written: Ollama's own defaults are others.

  Args:
    gguf: Path of the model, relative to the Modelfile or absolute.
    template: From `templates.ollama`.
    temperature: Of sampling; 0 for the likeliest token each time.
    repetition_penalty: 1 for none.
    top_k: Of sampling; 0 for all tokens.
    top_p: Of sampling; 1 for all tokens.
    stops: Texts that end an answer.
    context_length: Positions to make room for, `num_ctx`.
    license: Text of the licence.
    system: Text before every conversation.

  Raises:
    UserError: if a value cannot be written in the grammar.
  """
  parameters = [
      ('temperature', temperature),
      ('repeat_penalty', repetition_penalty),
      ('top_k', top_k),
      ('top_p', top_p),
      ('num_ctx', context_length),
  ]
  lines = [
      f'FROM {_quote("FROM", gguf)}',
      f'TEMPLATE {_quote("TEMPLATE", template)}',
      *(f'PARAMETER {name} {value}' for name, value in parameters),
      *(f'PARAMETER stop {_quote("PARAMETER stop", stop)}' for stop in stops),
  ]
  # Ollama leaves it as it is; `chat` would strip it.
  if system.strip():
    lines.append(f'SYSTEM {_quote("SYSTEM", system.strip())}')
  if license:
    lines.append(f'LICENSE {_quote("LICENSE", license)}')
  text = '\n'.join(lines) + '\n'
  check(text)
  return text


def _quote(command: str, value: str) -> str:
  """Writes a value so that Ollama reads the same value.

  The value ends at the first line end where three quotes close it, and what Go
  does not call printable is dropped without a word, no-break spaces included.
  """
  if not value:
    raise errors.UserError(
        f'{command}: an empty value', 'some text', 'leave the command out')
  if re.fullmatch(r'[\w./<>|:@-]+', value, re.ASCII):
    return value  # Nothing in it that quotes would keep.
  for character in value:
    if character not in '\n\t' and not _is_printable(character):
      raise errors.UserError(
          f'{command}: U+{ord(character):04X} in {_excerpt(value, character)}',
          'printable characters, spaces, tabs and line feeds: Ollama drops all'
          ' others from a Modelfile, or ends a line there',
          'replace the character')
  quoted = f'{_QUOTES}{value}{_QUOTES}'
  lines = quoted.split('\n')
  for end in range(1, len(lines)):
    if _unquote('\n'.join(lines[:end])) is not None:
      raise errors.UserError(
          f'{command}: line {end} of the value ends in three quotes',
          'a text that does not close its own quotes: Ollama has no escapes',
          f'put another character behind {lines[end - 1][-30:]!r}')
  return quoted


def _excerpt(value: str, character: str) -> str:
  at = value.index(character)
  return repr(value[max(0, at - 15):at + 15])


def _is_printable(character: str) -> bool:
  """Go's strconv.IsPrint."""
  return character == ' ' or unicodedata.category(character)[0] in 'LMNPS'


def _unquote(text: str) -> str | None:
  """Returns the value, or None where its quotes have not closed yet."""
  text = text.strip()
  for quotes in (_QUOTES, '"'):
    if text.startswith(quotes):
      closed = len(text) >= 2 * len(quotes) and text.endswith(quotes)
      return text[len(quotes):-len(quotes)] if closed else None
  return text


@dataclasses.dataclass(frozen=True)
class Command:
  """One command of a Modelfile.

  Attributes:
    line: Where it begins, from 1.
    name: In lower case; of a parameter 'parameter NAME'.
    value: Without its quotes.
  """

  line: int
  name: str
  value: str


def parse(text: str) -> list[Command]:
  """Returns the commands of a Modelfile as Ollama reads them.

  Raises:
    UserError: with the line, for what Ollama's parser refuses and for
      characters that it drops.
  """
  return list(_commands(text))


def _commands(text: str) -> Iterator[Command]:
  lines = text.split('\n')
  at = 0
  while at < len(lines):
    number, line = at + 1, lines[at].lstrip(' \t\r')
    at += 1
    if not line or line.startswith('#'):
      continue
    match = re.match(r'([A-Za-z]+)[ \t](.*)', line, re.DOTALL)
    if not match or match[1].lower() not in _COMMANDS:
      word = re.split(r'[ \t]', line)[0]
      raise _wrong(
          number, f'{word!r} is no command with a value',
          f'one of {", ".join(_COMMANDS).upper()} and a space',
          f'{errors.nearest(word.lower(), _COMMANDS)}Mend the line.')
    name, value = match[1].lower(), match[2]
    if name in ('parameter', 'message'):
      match = re.match(r'(\w*)[ \t](.*)', value, re.ASCII | re.DOTALL)
      if not match:
        raise _wrong(
            number, f'{name.upper()} {value}', 'a name and a value',
            'add the value')
      name, value = f'{name} {match[1]}', match[2]
    while (unquoted := _unquote(value)) is None:
      if at == len(lines):
        raise _wrong(
            number, f'the quotes of {name.upper()} do not close',
            'the same quotes at the end of a line', 'add them')
      value += '\n' + lines[at]
      at += 1
    for offset, part in enumerate(value.split('\n')):
      for character in part:
        if character not in '\t\r' and not _is_printable(character):
          raise _wrong(
              number + offset, f'U+{ord(character):04X}, which Ollama drops',
              'printable characters', 'replace it')
    yield Command(number, name, unquoted)


def check(text: str) -> None:
  """Raises a `UserError` with the line for what `ollama create` refuses.

  Also refused are what Ollama would drop without a word, and a template whose
  actions do not balance. Files that it names are not looked for.
  """
  commands = parse(text)
  if not any(command.name == 'from' for command in commands):
    raise errors.UserError(
        'the Modelfile has no FROM', 'a line FROM PATH_OF_GGUF', 'add it')
  for command in commands:
    kind, _, name = command.name.partition(' ')
    if kind == 'from' and not command.value:
      raise _wrong(command.line, 'FROM without a value', 'a path', 'add it')
    elif kind == 'parameter':
      _check_parameter(command, name)
    elif kind == 'message' and name not in ('system', 'user', 'assistant'):
      raise _wrong(command.line, f'MESSAGE of role {name!r}',
                   'system, user or assistant', 'correct the role')
    elif kind == 'template':
      _check_template(command)


def _check_parameter(command: Command, name: str) -> None:
  if name not in _PARAMETERS:
    raise _wrong(
        command.line, f'PARAMETER {name!r}',
        f'one of {", ".join(_PARAMETERS)}',
        f'{errors.nearest(name, tuple(_PARAMETERS))}Correct the name.')
  kind, value = _PARAMETERS[name], command.value
  if kind is bool:
    fine = value in _BOOLEANS
  elif kind is str:
    fine = bool(value)
  else:
    fine = _NUMBER[kind].fullmatch(value) is not None
  if not fine:
    raise _wrong(
        command.line, f'PARAMETER {name} {value!r}',
        {int: 'a whole number', float: 'a number', bool: 'true or false',
         str: 'some text'}[kind], 'correct the value')


_STRING = r'"(?:[^"\\\n]|\\.)*"|`[^`]*`'
_ACTION = re.compile(
    rf'\{{\{{(?:-\s)?((?:{_STRING}|.)*?)(?:\s-)?\}}\}}', re.DOTALL)


def _check_template(command: Command) -> None:
  """Checks that actions, blocks, strings and brackets of a template close."""
  template, at, blocks = command.value, 0, []

  def line(position: int) -> int:
    return command.line + template.count('\n', 0, position)

  while (start := template.find('{{', at)) >= 0:
    match = _ACTION.match(template, start)
    if not match:
      raise _wrong(line(start), 'an action without }}',
                   '{{ and }} in pairs', 'close it')
    at, body = match.end(), match[1].strip()
    if body.startswith('/*'):
      continue
    code = re.sub(_STRING, '', body)
    word = re.match(r'\w*', code)[0]
    if not body or '"' in code or '`' in code or '{' in code or (
        not _brackets_close(code)):
      raise _wrong(line(start), f'the action {match[0]}',
                   'a Go action with closed strings and brackets', 'mend it')
    if word in ('if', 'range', 'with', 'define', 'block'):
      blocks.append((word, start))
    elif word in ('else', 'end') and not blocks:
      raise _wrong(line(start), f'{match[0]} without a block before it',
                   '{{ if }}, {{ range }} or {{ with }}', 'remove it')
    elif word == 'end':
      blocks.pop()
  if blocks:
    word, start = blocks[-1]
    raise _wrong(line(start), f'{{{{ {word} }}}} without {{{{ end }}}}',
                 'one for each block', 'add it')


def _brackets_close(code: str) -> bool:
  depth = 0
  for character in code:
    depth += (character == '(') - (character == ')')
    if depth < 0:
      return False
  return depth == 0


def _wrong(line: int, got: str, expected: str, fix: str) -> errors.UserError:
  return errors.UserError(f'Modelfile, line {line}: {got}', expected, fix)
