"""The judge of Blop: the real compiler on typical answers of models."""

import conftest
import pytest

from gemma_sft.inputs import records
from gemma_sft.tasks.blop import task
from gemma_sft.tasks.chat import task as chat_task

needs_compiler = pytest.mark.skipif(
    bool(task.compiler_problem()), reason=task.compiler_problem())

_GOOD = "def Hi(attributes) {\n  <p>'hi'</p>\n}"
_FRAGMENT = "<p>'hi'</p>"
_CODE = [_GOOD, _FRAGMENT, 'x = 1', 'items := [1, 2]', 'class A extends B {\n}',
         "import 'a'", 'for i, x in list {\n}', 'if a == b {\n}',
         'while true {\n}', '() => 1', 'async def a() {\n}',
         '{ a, b } = attributes', 'A component:\n```blop\nfoo()\n```']
_PROSE = ['Blop is a small language for the web.',
          'Use the for keyword: for x in list, then braces.',
          'You write <p> tags inside a def.', 'An if needs no parentheses.',
          'It compiles to JavaScript.', '',
          'A variable is made with = and changed with :=.',
          'No: there are no classes besides class Name { }.']


def _record(answer: str, prompt: str = 'Write it.') -> records.Record:
  return records.Record({'prompt': prompt, 'completion': answer}, 'x.txt:1')


@pytest.mark.parametrize('answer, code', [
    (f'```blop\n{_GOOD}\n```', _GOOD),
    (f'Sure!\n```\n{_GOOD}\n```\nThat is it.', _GOOD),
    (f'```js \n{_GOOD}', _GOOD),  # Cut off before the fence closes.
    (f'```blop\n{_GOOD}\n```\nor\n```blop\nx = 1\n```', _GOOD),
    (f'\n{_GOOD}\n\n', _GOOD), ('', ''),
    ('Just `inline` code.', 'Just `inline` code.')])
def test_fences_are_stripped(answer, code):
  assert task.extract_code(answer) == code


@needs_compiler
@pytest.mark.parametrize('code, verdict', [
    *((code, (True, True, True)) for code in (
        _GOOD, 'x = 1', "import { a } from './a.blop'")),
    (_FRAGMENT, (False, True, True)),  # Fine inside a function.
    *((code, (False, False, False)) for code in (
        # The compiler alone would accept these as a file with an expression.
        '', 'hello', "'one string'", f'`{_GOOD}`', 'Blop is a small language.',
        # What a model that knows React writes.
        'const x = 1;', 'x = 1;', 'function Hi() { return <p>hi</p>; }',
        'def Hi() {\n  return (\n    <p>{name}</p>\n  )\n}',
        # Odd line breaks, and what overflows the parser.
        'def a\u2028b() {}', 'a\x85b = ( ', '(' * 3000)),
    # The grammar accepts it; the name is not defined.
    ('def Hi() {\n  <p>missing</p>\n}', (False, False, True))],
                         ids=lambda value: ascii(value)[:40])
def test_verdicts(code, verdict):
  row, = task.compile_snippets([code])
  assert (row['strict'], row['wrapped'], row['parses']) == verdict


@needs_compiler
def test_errors_and_totals():
  bad, undefined = task.compile_snippets(
      ["def A() {\n  x = 1;\n}", "def A() {\n\n  <p>nope</p>\n}"])
  assert (bad['stage'], bad['line']) == ('tokenize', 2)
  assert bad['column'] >= 7 and ';' in bad['message']
  assert (undefined['stage'], undefined['line']) == ('semantic', 3)
  assert 'nope' in undefined['message']
  line, = task.check_answers([
      records.Record({'prompt': 'a', 'completion': answer}, f'a.txt:{line}')
      for line, answer in ((1, _GOOD), (9, 'def B() {\n  x = 1;\n}'),
                           (20, 'It is small.'))])
  assert line.startswith(
      'a.txt:9: the answer does not compile (tokenize, line 2')
  # Only the prompts that ask for code count.
  reference = [_record(_GOOD), _record(_GOOD), _record(_GOOD),
               _record('Blop is a language.', 'What is Blop?')]
  answers = [f'```blop\n{_GOOD}\n```', _FRAGMENT, 'I cannot.', 'x = 1']
  judged = task.judge(reference, answers)
  assert judged.note == ''
  assert judged.metrics == {'strict': 1 / 3, 'wrapped': 2 / 3, 'parses': 2 / 3,
                            'reach': 1 / 3, 'fallback': 0.0, 'component': 1 / 3,
                            'same_tags': 1 / 3, 'knows': 0.0, 'n': 3}
  assert [row.get('strict') for row in judged.rows] == [
      True, False, False, None]
  # No prompt asks for code.
  judged = task.judge([_record('Prose.', 'What?')], ['x = 1'])
  assert judged.metrics['n'] == 0 and judged.metrics['strict'] == 0


@pytest.mark.parametrize('text', _CODE + _PROSE)
def test_code_looks_like_code(text):
  assert task.looks_like_code(text) == (text in _CODE)


@needs_compiler
def test_what_is_not_called_code_does_not_compile_either():
  for split in ('train', 'validation', 'test'):
    rows = records.read(str(conftest.ROOT / 'data' / 'blop' / f'{split}.txt'))
    prose = [answer for answer in map(chat_task.answer, rows)
             if not task.looks_like_code(answer)]
    assert not any(row['strict'] for row in task.compile_snippets(prose))
    assert 0 < len(prose) < len(rows) / 2


@pytest.mark.parametrize('has_node, has_compiler, note', [
    (False, False, 'no Node.js'), (True, False, 'bash launch/blop_compiler.sh'),
    (True, True, 'broken')])
def test_no_compiler(monkeypatch, tmp_path, has_node, has_compiler, note):
  monkeypatch.setenv('PATH', str(tmp_path))
  monkeypatch.setenv('GEMMA_SFT_CACHE', str(tmp_path))
  if has_node:
    node = tmp_path / 'node'
    node.write_text('#!/bin/sh\necho broken >&2; exit 1\n')
    node.chmod(0o755)
  if has_compiler:
    (tmp_path / 'blop' / 'node_modules' / 'blop-language').mkdir(parents=True)
  judged = task.judge([_record(_GOOD)], [_GOOD])
  assert judged.metrics == {} and judged.rows == [{}]
  assert note in judged.note
  assert task.check_answers([_record('def ;')]) == []
