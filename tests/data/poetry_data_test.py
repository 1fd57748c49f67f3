"""The poems in data/poetry: each passes its judge, none is there twice."""

import collections
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys

import pytest

from gemma_sft.inputs import records
from gemma_sft.tasks.poetry import task

_ROOT = pathlib.Path(__file__).parents[2]
_FOLDER = _ROOT / 'data' / 'poetry'
_SPLITS = ('train', 'validation', 'test')


def _read():
  return {s: records.read(str(_FOLDER / f'{s}.jsonl')) for s in _SPLITS}


def _all():
  return [r for split in _read().values() for r in split]


def _pairs(text):
  return {line[i:i + 2] for line in task.split_lines(text)
          for i in range(len(line) - 1)}


def test_every_poem_keeps_form_rhyme_and_tones():
  rows = _all()
  assert task.check_answers(rows) == []
  judged = task.judge(rows, [r.fields['text'] for r in rows])
  assert [judged.metrics[k] for k in ('form', 'rhyme', 'tone')] == [1, 1, 1]
  assert judged.metrics['repeated'] == 0


def test_sizes():
  splits = _read()
  assert sum(map(len, splits.values())) >= 200
  for split, least in (('train', 150), ('validation', 20), ('test', 30)):
    assert len(splits[split]) >= least
    forms = collections.Counter(r.fields['form'] for r in splits[split])
    assert forms.keys() == task.FORMS.keys()
    # More quatrains than octaves, but of each enough to tell something.
    assert min(forms.values()) >= len(splits[split]) / 10


def test_one_style():
  for record in _all():
    assert list(record.fields) == ['title', 'form', 'text']
    title, text = record.fields['title'], record.fields['text']
    for couplet in text.split('\n'):
      assert re.fullmatch(r'\w{5}，\w{5}。|\w{7}，\w{7}。', couplet), record
    # Asked for, and written, in traditional characters.
    assert task.to_messages(record)[0].content.startswith('請以')
    assert task.to_traditional(title + text) == title + text


def test_no_title_and_no_line_is_there_twice():
  rows = _all()
  titles = [r.fields['title'] for r in rows]
  lines = [x for r in rows for x in task.split_lines(r.fields['text'])]
  assert len(set(titles)) == len(titles)
  assert len(set(lines)) == len(lines)


def test_splits_are_apart():
  # Of pairs of characters no two poems share more than a few: at 0.15 two
  # quatrains of 20 characters would have five of their 16 in common.
  splits = _read()
  train = [(r.where, _pairs(r.fields['text'])) for r in splits['train']]
  for record in splits['validation'] + splits['test']:
    pairs = _pairs(record.fields['text'])
    for where, other in train:
      assert len(pairs & other) / len(pairs | other) < 0.15, (
          record.where, where)


def test_rhymes_vary():
  judged = task.judge(_all(), [r.fields['text'] for r in _all()])
  rhymes = collections.Counter(row['rhymes'] for row in judged.rows)
  assert len(rhymes) >= 25  # Of the book's 30.
  assert max(rhymes.values()) < 0.1 * len(judged.rows)


def test_broken_poems_do_not_pass():
  # Of lines drawn from all poems 2 % of quatrains pass, of octaves none.
  rng = random.Random(0)
  for form in task.FORMS:
    texts = [r.fields['text'] for r in _all() if r.fields['form'] == form]
    lines = [line for t in texts for line in task.split_lines(t)]
    rng.shuffle(lines)
    count = int(form[2])
    mixed = ['，'.join(lines[i:i + count])
             for i in range(0, len(lines), count)]
    judged = task.judge(
        [records.Record({'title': '題', 'form': form}, '')] * len(mixed), mixed)
    assert judged.metrics['form'] == 1
    assert judged.metrics['rhyme'] < 0.1 and judged.metrics['tone'] < 0.1


def test_tfds_builder(tmp_path):
  pytest.importorskip('tensorflow_datasets')
  source, out = tmp_path / 'source', tmp_path / 'out'
  source.mkdir()
  for split in _SPLITS:
    shutil.copy(_FOLDER / f'{split}.jsonl', source)
  code = f"""
import json, runpy, sys
from gemma_sft.inputs import records
sys.argv = ['builder', {f'--source={source}'!r}, {f'--out={out}'!r}]
runpy.run_path({str(_FOLDER / 'poetry_dataset_builder.py')!r},
               run_name='__main__')
found = records.read({str(out / 'poetry' / '1.0.0')!r}, split='test')
assert 'tensorflow' not in sys.modules
print('FOUND' + json.dumps([r.fields for r in found]))
"""
  done = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, check=False,
      env={**os.environ, 'PYTHONPATH': str(_ROOT)})
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.partition('FOUND')[2])
  expected = {f'test.jsonl:{i}': r.fields
              for i, r in enumerate(_read()['test'], 1)}
  # TFDS writes them in an order of its own.
  assert {f.pop('id'): f for f in found} == expected
  row = records.Record(found[0] | {'id': 'test.jsonl:1'}, 'x')
  assert task.to_messages(row)[1].content == found[0]['text']
