"""The examples in data/blop compile, are right and in one split each."""

import re

import pytest
import reading

from gemma_sft.tasks.blop import task
from gemma_sft.tasks.blop import text as text_lib

_SPLITS = reading.read('blop', '.txt')
_HELD_OUT = _SPLITS['validation'] + _SPLITS['test']
_ALL = _SPLITS['train'] + _HELD_OUT
_CODE = [r for r in _ALL if task.looks_like_code(r.fields['completion'])]

needs_compiler = pytest.mark.skipif(
    bool(task.compiler_problem()), reason=task.compiler_problem())


@needs_compiler
def test_answers_compile_and_are_right_by_the_judge():
  assert task.check_answers(_ALL) == []
  # All 578 answers would take a minute (calibrate_blop.py).
  judged = task.judge(_HELD_OUT, [r.fields['completion'] for r in _HELD_OUT])
  assert judged.note == ''
  for name in ('strict', 'component', 'right', 'same_tags', 'knows'):
    assert judged.metrics[name] == 1, name
  assert sum('right' in r for r in judged.rows) > 0.95 * judged.metrics['n']


def test_style_facts_and_splits():
  for record in _CODE:  # A small model learns from a consistent style.
    code = record.fields['completion']
    assert not text_lib.habits(code), record.where
    assert not re.search(r'[; \t]$', code, re.MULTILINE), record.where
  # Questions about Blop have key facts that their answers state.
  for record in _HELD_OUT:
    answer = record.fields['completion']
    if not task.looks_like_code(answer):
      found = text_lib.knowledge(record.fields['prompt'], answer)
      assert found and found['knows'] == 1, record.where
  assert len(_ALL) >= 500
  for split, least in (('train', 450), ('validation', 24), ('test', 48)):
    assert sum(r in _CODE for r in _SPLITS[split]) >= least, split
  # Jaccard similarity of character 5-grams: above these, two prompts ask the
  # same or two answers differ in names alone.
  for field, limit in (('prompt', 0.5), ('completion', 0.6)):
    train, held_out = (
        [(r.where, reading.ngrams(' '.join(re.findall(
            r'\w+|[^\w\s]', r.fields[field].lower())))) for r in records]
        for records in (_SPLITS['train'], _HELD_OUT))
    reading.assert_unlike(held_out, train, limit)
