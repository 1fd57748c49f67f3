"""Other runtimes render the prompts that the model was tuned on."""

import functools
import itertools
import operator
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
        ('model', "It's  `so`."), ('user', 'caf\u00e9 \U0001f600')]}


def _messages(name, answer='', pad=''):
  pairs = _CONVERSATIONS[name] + ([('model', answer)] if answer else [])
  return [chat.Message(r, f'{pad}{c}{pad}') for r, c in pairs]


def _raise(message):
  raise jinja2.TemplateError(message)


@functools.cache
def _compiled(generation, trim):
  # transformers compiles with both trims on, others with Jinja's defaults.
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=trim, lstrip_blocks=trim)
  environment.globals['raise_exception'] = _raise
  return environment.from_string(templates.jinja(generation))


def _jinja(generation, messages, *, trim=True, prompt=False):
  return _compiled(generation, trim).render(
      messages=messages, bos_token='<bos>', add_generation_prompt=prompt)


def _hf(messages, model='assistant'):
  return [{'role': model if m.role == 'model' else m.role,
           'content': m.content} for m in messages]


_tokenizer = functools.cache(conftest.make_tokenizer)


@functools.cache
def _processor(generation):
  return sentencepiece.SentencePieceProcessor(
      model_proto=_tokenizer(generation).proto)


def _encode(generation, text):
  """BOS and a text as a runtime encodes it: tags are single pieces."""
  return [_tokenizer(generation).bos_id,
          *_processor(generation).EncodeAsIds(text)]


@pytest.mark.parametrize('name', _CONVERSATIONS)
@pytest.mark.parametrize('generation', _GENERATIONS)
def test_jinja_renders_what_chat_tokenises(generation, name):
  tokenizer = _tokenizer(generation)
  for role, trim, pad in itertools.product(
      ('assistant', 'model'), (True, False), ('', ' \n\t')):
    # Training: all of it, to the newline after the last turn.
    messages = _messages(name, 'An answer.', pad)
    text = _jinja(generation, _hf(messages, role), trim=trim)
    assert text.startswith('<bos>') and text.endswith('\n')
    assert _encode(generation, text[5:]) == (
        chat.render(messages, tokenizer).tokens.tolist())
    # Serving: up to and with the newline after 'model'.
    messages = _messages(name, pad=pad)
    text = _jinja(generation, _hf(messages, role), trim=trim, prompt=True)
    assert _encode(generation, text[5:]) == (
        chat.render_prompt(messages, tokenizer))


def test_pinned_text():
  messages = [{'role': 'system', 'content': ' S '},
              {'role': 'user', 'content': 'U'}]
  assert _jinja(3, messages, prompt=True) == (
      '<bos><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\n')
  assert _jinja(4, messages, prompt=True) == (
      '<bos><|turn>system\nS<turn|>\n<|turn>user\nU<turn|>\n<|turn>model\n')
  for build in templates.jinja, templates.ollama:
    with pytest.raises(errors.UserError, match='generation 5'):
      build(5)


@pytest.mark.parametrize('generation', _GENERATIONS)
@pytest.mark.parametrize('roles', [
    '', 's', 'm', 'uu', 'umm', 'su?su', 'us', 'sm', 't', 'ust'])
def test_jinja_refuses_the_wrong_order(generation, roles):
  names = {'s': 'system', 'u': 'user', 'm': 'assistant', 't': 'tool'}
  messages = [{'role': names[role], 'content': 'x'}
              for role in roles.replace('?', '')]
  with pytest.raises(jinja2.TemplateError):
    _jinja(generation, messages, prompt='?' in roles)


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


_GO_FUNCTIONS = {
    'eq': operator.eq, 'ne': operator.ne, 'not': operator.not_, 'len': len,
    'and': lambda a, b: a and b, 'slice': lambda a, start: a[start:]}


def _go(template, root):
  """Renders in the part of Go's text/template that the templates use.

  Each text and action becomes a line of Python. `dots` has the name of the
  dot in each open block.
  """
  code, dots = [], ['root']

  def operand(token):
    if token in _GO_FUNCTIONS:
      return f'functions[{token!r}]'
    if token[0] in '"0123456789':
      return token
    name, _, field = token.partition('.')
    value = {'': dots[-1], '$': 'root'}.get(name, name.replace('$', 'var_'))
    return f'{value}[{field!r}]' if field else value

  def call(tokens):
    values = []
    while tokens and (token := tokens.pop(0)) != ')':
      values.append(call(tokens) if token == '(' else operand(token))
    function, *arguments = values
    return f'{function}({", ".join(arguments)})' if arguments else function

  def value(text):
    assert text.count('(') == text.count(')'), text
    tokens = re.findall(r'"[^"]*"|[()]|[^\s()]+', text)
    result = call(tokens)
    assert not tokens, text
    return result

  parts = re.split(r'(?:\s*\{\{-\s|\{\{)(.*?)(?:\s-\}\}\s*|\}\})', template)
  assert '{{' not in ''.join(parts[::2])
  for i, part in enumerate(parts):
    word, _, rest = part.strip().partition(' ')
    inner = None
    if i % 2 == 0:
      line = f'out.append({part!r})'
    elif word == 'end':
      dots.pop()
      line = 'pass'
    elif word == 'else':
      dots.pop()
      test = rest.removeprefix('if ')
      line, inner = f'elif {value(test)}:' if rest else 'else:', dots[-1]
    elif word == 'if':
      line, inner = f'if {value(rest)}:', dots[-1]
    elif word == 'range':
      index, element, items = re.fullmatch(
          r'\$(\w+), \$(\w+) := (.*)', rest).groups()
      line = f'for var_{index}, var_{element} in enumerate({value(items)}):'
      inner = f'var_{element}'
    elif assigned := re.fullmatch(r'\$(\w+) (:?=) (.*)', part.strip()):
      name, sign, new = assigned.groups()
      line = f'var_{name} = {value(new)}'
      if sign == '=':  # The variable must exist.
        line = f'var_{name}; {line}'
    else:
      line = f'out.append({value(part)})'
    code.append(' ' * (len(dots) - 1) + line)
    if inner:
      dots.append(inner)
  assert dots == ['root']
  out = []
  exec('\n'.join(code), {
      'out': out, 'root': root, 'functions': _GO_FUNCTIONS})
  return ''.join(out)


def _ollama(generation, messages):
  """Renders as Ollama does, which gathers the system texts first."""
  return _go(templates.ollama(generation), {
      'System': '\n\n'.join(m.content for m in messages if m.role == 'system'),
      'Messages': [{'Role': m['role'], 'Content': m['content']}
                   for m in _hf(messages)]})


@pytest.mark.parametrize('name', _CONVERSATIONS)
@pytest.mark.parametrize('generation', _GENERATIONS)
def test_ollama_renders_the_prompt(generation, name):
  messages = _messages(name)
  text = _ollama(generation, messages)
  assert text == _jinja(generation, _hf(messages), prompt=True)[5:]
  assert _encode(generation, text) == chat.render_prompt(
      messages, _tokenizer(generation))
  # An answer that has begun stays open.
  messages = _messages(name, 'So far')
  closed = _jinja(generation, _hf(messages))[5:]
  end = chat.TURN_TAGS[generation][1]
  assert _ollama(generation, messages) == closed.removesuffix(f'{end}\n')
