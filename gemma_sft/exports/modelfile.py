"""Writes the Modelfile that `ollama create` reads.

The grammar is that of Ollama's parser/parser.go: each command has one value,
which runs over several lines until its quotes close. There are no escapes.
"""

from collections.abc import Sequence
import math
import re
import unicodedata

from gemma_sft import errors

_QUOTES = '"""'


def render(
    *, gguf: str, template: str, temperature: float, repetition_penalty: float,
    top_k: int, top_p: float, stops: Sequence[str], context_length: int,
    license: str) -> str:
  """Returns the text of a Modelfile.

  Every sampling parameter is written, because Ollama's defaults are different.
  The path `gguf` is relative to the Modelfile, or absolute.

  Raises:
    UserError: A value cannot be written in the grammar.
  """
  parameters = {
      'temperature': temperature, 'repeat_penalty': repetition_penalty,
      'top_k': top_k, 'top_p': top_p, 'num_ctx': context_length}
  for name, value in parameters.items():
    if not math.isfinite(value):
      raise errors.UserError(
          f'PARAMETER {name} {value}', 'a number', 'correct the value')
  lines = [
      f'FROM {_quote("FROM", gguf)}',
      f'TEMPLATE {_quote("TEMPLATE", template)}',
      *(f'PARAMETER {name} {value}' for name, value in parameters.items()),
      *(f'PARAMETER stop {_quote("PARAMETER stop", stop)}' for stop in stops),
      f'LICENSE {_quote("LICENSE", license)}',
  ]
  return '\n'.join(lines) + '\n'


def _quote(command: str, value: str) -> str:
  """Writes a value such that Ollama reads the same value.

  Ollama ends the value at the first line that ends in three quotes. It silently
  drops what Go's strconv.IsPrint does not accept, no-break spaces included.
  """
  if not value:
    raise errors.UserError(
        f'{command}: an empty value', 'some text', 'leave the command out')
  if re.fullmatch(r'[\w./<>|:@-]+', value, re.ASCII):
    return value  # Needs no quotes.
  for i, character in enumerate(value):
    if character not in '\n\t' and not is_printable(character):
      raise errors.UserError(
          f'{command}: U+{ord(character):04X} in'
          f' {value[max(0, i - 15):i + 15]!r}',
          'printable characters, spaces, tabs and line feeds: Ollama drops all'
          ' others from a Modelfile, or ends a line there',
          'replace the character')
  quoted = f'{_QUOTES}{value}{_QUOTES}'
  lines = quoted.split('\n')
  for end in range(1, len(lines)):
    beginning = '\n'.join(lines[:end]).strip()
    if beginning.endswith(_QUOTES) and len(beginning) >= 2 * len(_QUOTES):
      raise errors.UserError(
          f'{command}: line {end} of the value ends in three quotes',
          'a text that does not close its own quotes: Ollama has no escapes',
          f'put another character behind {lines[end - 1][-30:]!r}')
  return quoted


def is_printable(character: str) -> bool:
  """Whether Go's strconv.IsPrint accepts a character."""
  return character == ' ' or unicodedata.category(character)[0] in 'LMNPS'
