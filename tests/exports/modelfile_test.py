"""Ollama reads from the Modelfile what was written to it."""

from exports import modelfile_parser
import pytest

from gemma_sft import errors
from gemma_sft.exports import modelfile
from gemma_sft.exports import templates

_VALUES = dict(
    gguf='./gguf/model-q8_0.gguf', template='{{ .Prompt }}', temperature=0.2,
    repetition_penalty=1.1, top_k=64, top_p=0.95,
    stops=('<end_of_turn>', '<eos>'), context_length=2048,
    license='Gemma\nterms')


def _render(**changes):
  return modelfile.render(**(_VALUES | changes))


def _values(text, name):
  return [v for command, v in modelfile_parser.parse(text) if command == name]


def test_pinned_text():
  assert _render() == (
      'FROM ./gguf/model-q8_0.gguf\nTEMPLATE """{{ .Prompt }}"""\n'
      'PARAMETER temperature 0.2\nPARAMETER repeat_penalty 1.1\n'
      'PARAMETER top_k 64\nPARAMETER top_p 0.95\nPARAMETER num_ctx 2048\n'
      'PARAMETER stop <end_of_turn>\nPARAMETER stop <eos>\n'
      'LICENSE """Gemma\nterms"""\n')
  modelfile_parser.parse(_render())
  for template in map(templates.ollama, (1, 2, 3, 4)):
    assert _values(_render(template=template), 'template') == [template]


@pytest.mark.parametrize('text', [
    'x', '"', '""', '"quoted"', '\n', '\n\n', 'a\nb', 'a"\nb', '"a"\n"b"',
    ' a ', '\ta', 'a # b', '# a', 'FROM x', "it's", '\\n', '{{ x',
    'three """ inside', '"""a', 'caf\u00e9 \u65e5\u672c', 'ends in "'])
def test_every_value_comes_back(text):
  out = _render(stops=(text, 'x'), license=text)
  assert _values(out, 'parameter stop') == [text, 'x']
  assert _values(out, 'license') == [text]


@pytest.mark.parametrize('text, message', [
    ('a """\nb', 'line 1 of the value ends in three quotes'),
    ('a\nb """  \nc', 'line 2 of the value'), ('"""\nb', 'line 1 of the value'),
    ('a\u00a0b', r'U\+00A0'), ('a\rb', r'U\+000D'), ('a\x0cb', r'U\+000C'),
    ('a\u200db', r'U\+200D'), ('', 'an empty value')])
def test_what_cannot_be_written_is_refused(text, message):
  for change in (dict(stops=(text,)), dict(license=text)):
    with pytest.raises(errors.UserError, match=message):
      _render(**change)


def test_paths_and_numbers():
  assert _values(_render(gguf='my models/a b.gguf'), 'from') == [
      'my models/a b.gguf']
  assert _values(_render(temperature=1e-5), 'parameter temperature') == [
      '1e-05']
  with pytest.raises(errors.UserError, match='PARAMETER temperature nan'):
    _render(temperature=float('nan'))


@pytest.mark.parametrize('text, message', [
    ('# FROM x\nLICENSE y', 'no FROM'), ('FROM x\nTEMPLAT y', 'no command'),
    ('FROM x\nLICENSE', 'no command with a value'), ('FROM: x', 'no command'),
    ('FROM \nLICENSE y', "from of ''"),
    ('FROM x\n\nPARAMETER temprature 1', 'no command'),
    *((f'FROM x\nPARAMETER {text}', message) for text, message in (
        (' top_k 1', 'no command'), ('top_k', 'no command'),
        ('top_k many', "top_k of 'many'"), ('top_k 2.5', "top_k of '2.5'"),
        ('num_ctx None', "num_ctx of 'None'"), ('top_p 1,5', "top_p of '1,5'"),
        ('temperature nan', 'temperature of'), ('stop ""', "stop of ''"))),
    *((f'FROM x\nLICENSE {text}', 'quotes do not close')
      for text in ('"""a\nb\n', '"a\nb', '"""a\nb"""c')),
    ('FROM x\nLICENSE """a\nb\u200dc"""', r'U\+200D')])
def test_the_parser_refuses_bad_files(text, message):
  for good in ('from x\n', '# c\n\n  FROM x y\n', 'FROM x\r\nLICENSE y\r\n',
               'FROM "x"\nPARAMETER stop "a\nb"\nPARAMETER temperature .5'):
    modelfile_parser.parse(good)
  with pytest.raises(modelfile_parser.Malformed, match=message):
    modelfile_parser.parse(text)
