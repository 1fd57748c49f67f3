"""The judge of Blop: the real compiler on typical answers of models."""

import pathlib
import stat

import conftest
import pytest

from gemma_sft.inputs import records
from gemma_sft.tasks.blop import task
from gemma_sft.tasks.chat import task as chat_task

needs_compiler = pytest.mark.skipif(
    bool(task.compiler_problem()), reason=task.compiler_problem())

_GOOD = "def Hi(attributes) {\n  <p>'hi'</p>\n}"
_FRAGMENT = "<p>'hi'</p>"
_DATA = sorted((conftest.ROOT / 'data' / 'blop').glob('*.txt'))


def _record(answer: str, prompt: str = 'Write it.') -> records.Record:
  return records.Record({'prompt': prompt, 'completion': answer}, 'x.txt:1')


def _verdict(code: str) -> tuple[bool, bool, bool]:
  row, = task.compile_snippets([code])
  return row['strict'], row['wrapped'], row['parses']


@pytest.mark.parametrize('answer, code', [
    (f'```blop\n{_GOOD}\n```', _GOOD),
    (f'Sure!\n```\n{_GOOD}\n```\nThat is it.', _GOOD),
    (f'```js \n{_GOOD}', _GOOD),  # Cut off before the fence closes.
    (f'```blop\n{_GOOD}\n```\nor\n```blop\nx = 1\n```', _GOOD),
    (f'\n{_GOOD}\n\n', _GOOD),
    ('', ''), ('Just `inline` code.', 'Just `inline` code.'),
])
def test_fences_are_stripped(answer, code):
  assert task.extract_code(answer) == code


@needs_compiler
@pytest.mark.parametrize('code, verdict', [
    (_GOOD, (True, True, True)),
    ('x = 1', (True, True, True)),
    ("import { a } from './a.blop'", (True, True, True)),
    (_FRAGMENT, (False, True, True)),  # Fine inside a function.
    # The compiler alone would accept these as a file with an expression.
    ('', (False, False, False)),
    ('hello', (False, False, False)),
    ("'one string'", (False, False, False)),
    (f'`{_GOOD}`', (False, False, False)),
    ('Blop is a small language.', (False, False, False)),
    # What a model that knows React writes.
    ('const x = 1;', (False, False, False)),
    ('x = 1;', (False, False, False)),
    ('function Hi() { return <p>hi</p>; }', (False, False, False)),
    ('def Hi() {\n  return (\n    <p>{name}</p>\n  )\n}',
     (False, False, False)),
    # The grammar accepts it; the name is not defined.
    ('def Hi() {\n  <p>missing</p>\n}', (False, False, True)),
])
def test_verdicts(code, verdict):
  assert _verdict(code) == verdict


@needs_compiler
def test_errors_have_line_and_column():
  bad, undefined = task.compile_snippets(
      ["def A() {\n  x = 1;\n}", "def A() {\n\n  <p>nope</p>\n}"])
  assert (bad['stage'], bad['line']) == ('tokenize', 2)
  assert bad['column'] >= 7 and ';' in bad['message']
  assert (undefined['stage'], undefined['line']) == ('semantic', 3)
  assert 'nope' in undefined['message']


@needs_compiler
def test_judge_counts_the_prompts_that_ask_for_code_alone():
  reference = [_record(_GOOD), _record(_GOOD), _record(_GOOD),
               _record('Blop is a language.', 'What is Blop?')]
  answers = [f'```blop\n{_GOOD}\n```', _FRAGMENT, 'I cannot.', 'x = 1']
  judged = task.judge(reference, answers)
  assert judged.note == ''
  assert judged.metrics == {
      'strict': 1 / 3, 'wrapped': 2 / 3, 'parses': 2 / 3, 'reach': 1 / 3,
      'fallback': 0.0, 'component': 1 / 3, 'same_tags': 1 / 3, 'knows': 0.0,
      'n': 3}
  assert [row.get('strict') for row in judged.rows] == [
      True, False, False, None]


@needs_compiler
def test_judge_of_no_code_prompts():
  judged = task.judge([_record('Prose.', 'What?')], ['x = 1'])
  assert judged.metrics['n'] == 0 and judged.metrics['strict'] == 0


@needs_compiler
def test_check_answers_reports_the_wrong_ones_with_their_place():
  rows = [
      records.Record({'prompt': 'a', 'completion': _GOOD}, 'a.txt:1'),
      records.Record({'prompt': 'b', 'completion': 'def B() {\n  x = 1;\n}'},
                     'a.txt:9'),
      records.Record({'prompt': 'c', 'completion': 'It is small.'}, 'a.txt:20')]
  line, = task.check_answers(rows)
  assert line.startswith(
      'a.txt:9: the answer does not compile (tokenize, line 2')


@pytest.mark.parametrize('text', [
    _GOOD, _FRAGMENT, 'x = 1', 'items := [1, 2]', 'class A extends B {\n}',
    "import 'a'", 'for i, x in list {\n}', 'if a == b {\n}', 'while true {\n}',
    '() => 1', 'async def a() {\n}', '{ a, b } = attributes',
    'A component:\n```blop\nfoo()\n```'])
def test_code_looks_like_code(text):
  assert task.looks_like_code(text)


@pytest.mark.parametrize('text', [
    'Blop is a small language for the web.',
    'Use the for keyword: for x in list, then braces.',
    'You write <p> tags inside a def.',
    'An if needs no parentheses.', 'It compiles to JavaScript.', '',
    'A variable is made with = and changed with :=.',
    'No: there are no classes besides class Name { }.'])
def test_prose_does_not(text):
  assert not task.looks_like_code(text)


@needs_compiler
@pytest.mark.parametrize('path', _DATA, ids=lambda p: p.stem)
def test_every_answer_of_the_data_is_code_that_compiles_or_prose(path):
  rows = records.read(str(path))
  answers = [chat_task.answer(r) for r in rows]
  assert not task.check_answers(rows)
  # What is not called code must not compile either, or it would not count.
  prose = [a for a in answers if not task.looks_like_code(a)]
  assert not any(row['strict'] for row in task.compile_snippets(prose))
  assert len(prose) < len(answers) / 2


def test_without_node_the_judge_says_so(monkeypatch, tmp_path):
  monkeypatch.setenv('PATH', str(tmp_path))
  judged = task.judge([_record(_GOOD)], [_GOOD])
  assert judged.metrics == {} and judged.rows == [{}]
  assert 'no Node.js' in judged.note
  assert task.check_answers([_record('def ;')]) == []


def test_without_the_compiler_the_judge_says_how(monkeypatch, tmp_path):
  node = tmp_path / 'node'
  node.write_text('#!/bin/sh\nexit 1\n')
  node.chmod(node.stat().st_mode | stat.S_IEXEC)
  monkeypatch.setenv('PATH', str(tmp_path))
  monkeypatch.setenv('GEMMA_SFT_CACHE', str(tmp_path))
  judged = task.judge([_record(_GOOD)], [_GOOD])
  assert 'bash launch/blop_compiler.sh' in judged.note


def test_a_compiler_that_fails_is_a_note(monkeypatch, tmp_path):
  node = tmp_path / 'node'
  node.write_text('#!/bin/sh\necho broken >&2; exit 1\n')
  node.chmod(node.stat().st_mode | stat.S_IEXEC)
  pathlib.Path(tmp_path, 'blop', 'node_modules', 'blop-language').mkdir(
      parents=True)
  monkeypatch.setenv('PATH', str(tmp_path))
  monkeypatch.setenv('GEMMA_SFT_CACHE', str(tmp_path))
  assert 'broken' in task.judge([_record(_GOOD)], [_GOOD]).note


@needs_compiler
@pytest.mark.parametrize('code', ['def a\u2028b() {}', 'a\x85b = ( '],
                         ids=ascii)
def test_odd_line_breaks_in_an_answer(code):
  assert _verdict(code) == (False, False, False)


@needs_compiler
def test_an_answer_that_overflows_the_parser():
  assert _verdict('(' * 3000) == (False, False, False)
