"""A Modelfile says what was meant, by Ollama's own rules."""

import re

import pytest

from gemma_sft import errors
from gemma_sft.exports import modelfile
from gemma_sft.exports import templates

_VALUES = dict(
    gguf='./gguf/model-q8_0.gguf', template='{{ .Prompt }}', temperature=0.2,
    repetition_penalty=1.1, top_k=64, top_p=0.95,
    stops=('<end_of_turn>', '<eos>'), context_length=2048)


def _render(**changes):
  return modelfile.render(**(_VALUES | changes))


def _values(text, name):
  return [c.value for c in modelfile.parse(text) if c.name == name]


def test_pinned_text():
  assert _render(license='Gemma\nterms', system=' Be brief. \n') == (
      'FROM ./gguf/model-q8_0.gguf\n'
      'TEMPLATE """{{ .Prompt }}"""\n'
      'PARAMETER temperature 0.2\n'
      'PARAMETER repeat_penalty 1.1\n'
      'PARAMETER top_k 64\n'
      'PARAMETER top_p 0.95\n'
      'PARAMETER num_ctx 2048\n'
      'PARAMETER stop <end_of_turn>\n'
      'PARAMETER stop <eos>\n'
      'SYSTEM """Be brief."""\n'
      'LICENSE """Gemma\nterms"""\n')


@pytest.mark.parametrize('generation', [1, 2, 3, 4])
def test_the_template_survives(generation):
  template = templates.ollama(generation)
  assert _values(_render(template=template), 'template') == [template]


@pytest.mark.parametrize('text', [
    'x', '"', '""', '"quoted"', '\n', '\n\n', 'a\nb', 'a"\nb', '"a"\n"b"',
    ' a ', '\ta', 'a # b', '# a', 'FROM x', "it's", '\\n', '{{ x',
    'three """ inside', '"""a', 'caf\u00e9 \u65e5\u672c', 'ends in "',
])
def test_every_value_comes_back(text):
  out = _render(stops=(text, 'x'), license=text)
  assert _values(out, 'parameter stop') == [text, 'x']
  assert _values(out, 'license') == [text]


@pytest.mark.parametrize('text, message', [
    ('a """\nb', 'line 1 of the value ends in three quotes'),
    ('a\nb """  \nc', 'line 2 of the value'),
    ('"""\nb', 'line 1 of the value'),
    ('a\u00a0b', r'U\+00A0'),
    ('a\rb', r'U\+000D'),
    ('a\x0cb', r'U\+000C'),
    ('a\u200db', r'U\+200D'),
    ('', 'an empty value'),
])
def test_what_cannot_be_written_is_refused(text, message):
  with pytest.raises(errors.UserError, match=message):
    _render(stops=(text,))
  if text:
    with pytest.raises(errors.UserError, match=message):
      _render(license=text)


def test_a_path_with_spaces():
  assert _values(_render(gguf='my models/a b.gguf'), 'from') == [
      'my models/a b.gguf']


@pytest.mark.parametrize('key, value, message', [
    ('temperature', float('nan'), 'line 3: PARAMETER temperature'),
    ('top_k', 2.5, 'line 5: PARAMETER top_k'),
    ('context_length', None, 'line 7: PARAMETER num_ctx'),
])
def test_numbers(key, value, message):
  with pytest.raises(errors.UserError, match=message):
    _render(**{key: value})
  assert _values(_render(temperature=1e-5), 'parameter temperature') == [
      '1e-05']


@pytest.mark.parametrize('text', [
    'FROM x', 'from x\n', '# c\n\n  FROM x y\n', 'FROM x\r\nSYSTEM y\r\n',
    'FROM "x"\nMESSAGE user hi\nMESSAGE assistant """a\nb"""',
    'FROM x\nPARAMETER stop "a\nb"\nPARAMETER use_mmap false',
    'FROM x\nTEMPLATE """{{- if .System }}{{ "}}" }}{{ end }}{{/* { */}}"""',
    'FROM x\nTEMPLATE {{ range $i, $m := .Messages }}{{ .Content }}{{ end }}',
    'FROM x\nPARAMETER temperature .5\nPARAMETER seed -1',
])
def test_good_files(text):
  modelfile.check(text)


@pytest.mark.parametrize('text, line, message', [
    ('FROM x\nTEMPLAT y', 2, "Did you mean 'template'"),
    ('FROM x\nSYSTEM', 2, 'no command with a value'),
    ('FROM: x', 1, 'no command'),
    ('FROM \nSYSTEM y', 1, 'FROM without a value'),
    ('FROM x\n\nPARAMETER temprature 1', 3, "Did you mean 'temperature'"),
    ('FROM x\nPARAMETER mirostat 1', 2, 'mirostat'),
    ('FROM x\nPARAMETER  top_k 1', 2, "PARAMETER ''"),
    ('FROM x\nPARAMETER top_k', 2, 'a name and a value'),
    ('FROM x\nPARAMETER top_k many', 2, 'a whole number'),
    ('FROM x\nPARAMETER top_p 1,5', 2, 'a number'),
    ('FROM x\nPARAMETER use_mmap yes', 2, 'true or false'),
    ('FROM x\nPARAMETER stop ""', 2, 'some text'),
    ('FROM x\nMESSAGE model hi', 2, "role 'model'"),
    ('FROM x\nSYSTEM """a\nb\n', 2, 'do not close'),
    ('FROM x\nSYSTEM "a\nb', 2, 'do not close'),
    ('FROM x\nLICENSE """a\nb"""c', 2, 'do not close'),
    ('FROM x\nLICENSE """a\nb\u200dc"""', 3, r'U\+200D'),
    ('FROM x\nTEMPLATE """a\n{{ .x """', 3, 'an action without }}'),
    ('FROM x\nTEMPLATE """a\n{{ if .x }}\nb"""', 3, 'without {{ end }}'),
    ('FROM x\nTEMPLATE {{ end }}', 2, 'without a block'),
    ('FROM x\nTEMPLATE {{ else }}', 2, 'without a block'),
    ('FROM x\nTEMPLATE {{ if (eq .x 1 }}{{ end }}', 2, 'brackets'),
    ('FROM x\nTEMPLATE {{ if eq .x 1) }}{{ end }}', 2, 'brackets'),
    ('FROM x\nTEMPLATE {{ eq .x "a }}', 2, 'closed strings'),
    ('FROM x\nTEMPLATE {{ }}', 2, 'the action'),
])
def test_bad_files(text, line, message):
  with pytest.raises(errors.UserError, match=f'line {line}: ') as info:
    modelfile.check(text)
  assert re.search(message, str(info.value))


def test_no_from():
  with pytest.raises(errors.UserError, match='no FROM'):
    modelfile.check('# FROM x\nSYSTEM y')
