"""Other runtimes render the prompts that the model was tuned on."""

import re

import conftest
import jinja2
import jinja2.sandbox
import pytest
import sentencepiece

from gemma_sft import chat
from gemma_sft import errors
from gemma_sft.exports import templates

_GENERATIONS = (1, 2, 3, 4)
_CONVERSATIONS = {
    'one': [('user', 'Hi there')],
    'three': [
        ('user', 'Hi'), ('model', 'Hello, you.'), ('user', 'Two\n\nlines?')],
    'system': [('system', 'Be brief.'), ('user', 'in <b>bold</b>: {{ x }}')],
    'system_three': [
        ('system', 'Be "brief".\nNo lists.'), ('user', 'a\nb'),
        ('model', "It's  `so`."), ('user', 'caf\u00e9 \U0001f600')],
}


def _messages(name, answer='', pad=''):
  pairs = _CONVERSATIONS[name] + ([('model', answer)] if answer else [])
  return [chat.Message(r, f'{pad}{c}{pad}') for r, c in pairs]


def _raise(message):
  raise jinja2.TemplateError(message)


def _jinja(generation, messages, *, trim=True, prompt=False):
  # transformers compiles with both trims on, others with Jinja's defaults.
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=trim, lstrip_blocks=trim)
  environment.globals['raise_exception'] = _raise
  return environment.from_string(templates.jinja(generation)).render(
      messages=messages, bos_token='<bos>', add_generation_prompt=prompt)


def _hf(messages, model='assistant'):
  return [{'role': model if m.role == 'model' else m.role,
           'content': m.content} for m in messages]


def _encode(tokenizer, text):
  """Text with tags as a runtime encodes it: the tags are single pieces."""
  processor = sentencepiece.SentencePieceProcessor()
  processor.LoadFromSerializedProto(tokenizer.proto)
  return processor.EncodeAsIds(text)


@pytest.mark.parametrize('pad', ['', ' \n\t'])
@pytest.mark.parametrize('trim', [True, False])
@pytest.mark.parametrize('name', _CONVERSATIONS)
@pytest.mark.parametrize('generation', _GENERATIONS)
def test_jinja_renders_what_chat_tokenises(generation, name, trim, pad):
  tokenizer = conftest.make_tokenizer(generation)
  for role in ('assistant', 'model'):
    # Training: all of it, to the newline after the last turn.
    messages = _messages(name, 'An answer.', pad)
    text = _jinja(generation, _hf(messages, role), trim=trim)
    assert text.startswith('<bos>') and text.endswith('\n')
    assert [tokenizer.bos_id, *_encode(tokenizer, text[5:])] == (
        chat.render(messages, tokenizer).tokens.tolist())
    # Serving: up to and with the newline after 'model'.
    messages = _messages(name, pad=pad)
    text = _jinja(generation, _hf(messages, role), trim=trim, prompt=True)
    assert [tokenizer.bos_id, *_encode(tokenizer, text[5:])] == (
        chat.render_prompt(messages, tokenizer))


def test_pinned_text():
  messages = [{'role': 'system', 'content': ' S '},
              {'role': 'user', 'content': 'U'}]
  assert _jinja(3, messages, prompt=True) == (
      '<bos><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\n')
  assert _jinja(4, messages, prompt=True) == (
      '<bos><|turn>system\nS<turn|>\n<|turn>user\nU<turn|>\n<|turn>model\n')


@pytest.mark.parametrize('generation', _GENERATIONS)
@pytest.mark.parametrize('roles', [
    '', 's', 'm', 'uu', 'umm', 'su?su', 'us', 'sm', 't', 'ust',
])
def test_jinja_refuses_the_wrong_order(generation, roles):
  prompt = '?' in roles
  names = {'s': 'system', 'u': 'user', 'm': 'assistant', 't': 'tool'}
  messages = [{'role': names[role], 'content': 'x'}
              for role in roles.replace('?', '')]
  with pytest.raises(jinja2.TemplateError):
    _jinja(generation, messages, prompt=prompt)


@pytest.mark.parametrize('content', [
    ' \n', '', None, [{'type': 'text', 'text': 'x'}]])
@pytest.mark.parametrize('generation', _GENERATIONS)
@pytest.mark.parametrize('empty', [0, 1, 2])
def test_jinja_refuses_what_is_no_text(generation, empty, content):
  messages = [{'role': role, 'content': 'x'}
              for role in ('system', 'user', 'assistant')]
  _jinja(generation, messages)
  messages[empty]['content'] = content
  with pytest.raises(jinja2.TemplateError, match='empty or no text'):
    _jinja(generation, messages)


@pytest.mark.parametrize('build', [templates.jinja, templates.ollama])
def test_unknown_generation(build):
  with pytest.raises(errors.UserError, match='generation 5'):
    build(5)


# Ollama -------------------------------------------------------------------


class _Go:
  """The part of Go's text/template that the templates use."""

  def __init__(self, text, data):
    self._data, self._variables = data, {'$': data}
    # Text and actions in turn; a dash eats the white space on its side.
    parts = re.split(r'(\s*\{\{-\s|\{\{)(.*?)(\s-\}\}\s*|\}\})', text)
    assert '{{' not in ''.join(parts[::4])
    self._parts = [(kind, part) for i in range(0, len(parts), 4)
                   for kind, part in (('text', parts[i]),
                                      ('action', parts[i + 2].strip()
                                       if i + 2 < len(parts) else None))
                   if part]
    self._at, self._out = 0, []

  def run(self):
    self._list(self._data, True)
    assert self._at == len(self._parts)
    return ''.join(self._out)

  def _list(self, dot, live):
    """Runs up to the closing else or end, which it returns."""
    while self._at < len(self._parts):
      kind, part = self._parts[self._at]
      self._at += 1
      if kind == 'text':
        self._out.append(part if live else '')
      elif part == 'end' or part.startswith('else'):
        return part
      elif part.startswith('if '):
        self._if(part, dot, live)
      elif part.startswith('range '):
        self._range(part, dot, live)
      elif match := re.fullmatch(r'(\$\w+) (:?=) (.*)', part):
        name, sign, value = match.groups()
        assert sign == ':=' or name in self._variables
        if live:
          self._variables[name] = self._value(value, dot)
      elif live:
        value = self._value(part, dot)
        assert isinstance(value, str)
        self._out.append(value)

  def _if(self, part, dot, live):
    done = False
    while True:
      test = part.removeprefix('else ').removeprefix('if ')
      now = live and not done and (part == 'else' or self._truth(test, dot))
      done = done or now
      part = self._list(dot, now)
      if part == 'end':
        return

  def _truth(self, test, dot):
    return bool(self._value(test, dot))

  def _range(self, part, dot, live):
    index, element, value = re.fullmatch(
        r'range (\$\w+), (\$\w+) := (.*)', part).groups()
    start = self._at
    for i, item in enumerate(self._value(value, dot)):
      self._at = start
      self._variables |= {index: i, element: item}
      assert self._list(item, live) == 'end'

  def _value(self, text, dot):
    tokens = re.findall(r'"[^"]*"|[()]|[^\s()]+', text)
    value = self._call(tokens, dot)
    assert not tokens
    return value

  def _call(self, tokens, dot):
    values = []
    while tokens and tokens[0] != ')':
      values.append(self._operand(tokens, dot))
    function, *arguments = values
    if not callable(function):
      assert not arguments
      return function
    return function(*arguments)

  def _operand(self, tokens, dot):
    token = tokens.pop(0)
    functions = {
        'eq': lambda a, b: a == b, 'ne': lambda a, b: a != b,
        'and': lambda a, b: a and b, 'not': lambda a: not a, 'len': len,
        'slice': lambda a, start: a[start:]}
    if token == '(':
      value = self._call(tokens, dot)
      assert tokens.pop(0) == ')'
      return value
    if token in functions:
      return functions[token]
    if token.startswith('"'):
      return token[1:-1]
    if token.isdigit():
      return int(token)
    name, _, field = token.partition('.')
    value = self._variables[name] if name else dot
    return value[field] if field else value


def _ollama(generation, messages):
  """Renders as Ollama does, which gathers the system texts first."""
  data = {
      'System': '\n\n'.join(m.content for m in messages if m.role == 'system'),
      'Messages': [{'Role': m['role'], 'Content': m['content']}
                   for m in _hf(messages)]}
  return _Go(templates.ollama(generation), data).run()


@pytest.mark.parametrize('name', _CONVERSATIONS)
@pytest.mark.parametrize('generation', _GENERATIONS)
def test_ollama_renders_the_prompt(generation, name):
  tokenizer = conftest.make_tokenizer(generation)
  messages = _messages(name)
  text = _ollama(generation, messages)
  assert text == _jinja(generation, _hf(messages), prompt=True)[5:]
  assert [tokenizer.bos_id, *_encode(tokenizer, text)] == chat.render_prompt(
      messages, tokenizer)


@pytest.mark.parametrize('name', _CONVERSATIONS)
@pytest.mark.parametrize('generation', _GENERATIONS)
def test_ollama_leaves_a_begun_answer_open(generation, name):
  messages = _messages(name, 'So far')
  closed = _jinja(generation, _hf(messages))[5:]
  end = chat.TURN_TAGS[generation][1]
  assert _ollama(generation, messages) == closed.removesuffix(f'{end}\n')
