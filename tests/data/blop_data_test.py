"""The examples in data/blop: verified by the compiler, apart between splits."""

import pathlib
import re

import pytest

from gemma_sft.inputs import records
from gemma_sft.tasks.blop import task
from gemma_sft.tasks.blop import text as text_lib

_FOLDER = pathlib.Path(__file__).parents[2] / 'data' / 'blop'
_SPLITS = ('train', 'validation', 'test')


def _read():
  return {s: records.read(str(_FOLDER / f'{s}.txt')) for s in _SPLITS}


def _shingles(text, n=5):
  text = ' '.join(re.findall(r'\w+|[^\w\s]', text.lower()))
  return {text[i:i + n] for i in range(max(1, len(text) - n + 1))}


def _jaccard(a, b):
  return len(a & b) / len(a | b)


def test_every_code_answer_compiles():
  if task.compiler_problem():
    pytest.skip(task.compiler_problem())
  for split in _read().values():
    assert task.check_answers(split) == []


def test_answers_are_right_by_the_judge():
  # Of validation and test: all 578 take a minute (calibrate_blop.py).
  if task.compiler_problem():
    pytest.skip(task.compiler_problem())
  splits = _read()
  rows = splits['validation'] + splits['test']
  judged = task.judge(rows, [r.fields['completion'] for r in rows])
  assert judged.note == ''
  for name in ('strict', 'component', 'right', 'same_tags', 'knows'):
    assert judged.metrics[name] == 1, name
  told = [row for row in judged.rows if 'right' in row]
  assert len(told) > 0.95 * judged.metrics['n']


def test_no_habits_of_other_languages():
  for split in _read().values():
    for record in split:
      if task.looks_like_code(record.fields['completion']):
        assert not text_lib.habits(record.fields['completion']), record.where


def test_questions_about_blop_have_key_facts_that_their_answers_state():
  splits = _read()
  for record in splits['validation'] + splits['test']:
    answer = record.fields['completion']
    if not task.looks_like_code(answer):
      found = text_lib.knowledge(record.fields['prompt'], answer)
      assert found and found['knows'] == 1, record.where


def test_sizes():
  splits = _read()
  assert sum(len(s) for s in splits.values()) >= 500
  for split, least in (('train', 450), ('validation', 24), ('test', 48)):
    code = [r for r in splits[split]
            if task.looks_like_code(r.fields['completion'])]
    assert len(code) >= least, split


def test_no_near_duplicates_across_splits():
  # Jaccard similarity of character 5-grams: above these, two prompts ask the
  # same or two answers differ in names alone.
  splits = _read()
  train = [(r, _shingles(r.fields['prompt']), _shingles(r.fields['completion']))
           for r in splits['train']]
  for split in ('validation', 'test'):
    for record in splits[split]:
      prompt = _shingles(record.fields['prompt'])
      answer = _shingles(record.fields['completion'])
      for other, other_prompt, other_answer in train:
        places = f'{record.where} and {other.where}'
        assert _jaccard(prompt, other_prompt) < 0.5, places
        assert _jaccard(answer, other_answer) < 0.6, places


def test_house_style():
  # One style throughout: a small model learns from consistency.
  for split in _read().values():
    for record in split:
      code = record.fields['completion']
      if task.looks_like_code(code):
        assert not re.search(r';[ \t]*$', code, re.MULTILINE), record.where
        assert not re.search(r'[ \t]+$', code, re.MULTILINE), record.where
