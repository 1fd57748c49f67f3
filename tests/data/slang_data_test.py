"""The examples in data/slang: what they promise, apart between splits."""

import csv
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from gemma_sft.inputs import records
from gemma_sft.tasks.slang import task
from gemma_sft.tasks.slang import terms

_ROOT = pathlib.Path(__file__).parents[2]
_FOLDER = _ROOT / 'data' / 'slang'
_SPLITS = {'train': 354, 'validation': 44, 'test': 55}
_COLUMNS = ['Slang', 'Description', 'Example', 'Context']


def _read():
  return {s: records.read(str(_FOLDER / f'{s}.csv')) for s in _SPLITS}


def _rows():
  return [(r.where, task.columns(r)) for s in _read().values() for r in s]


def test_sizes_and_header():
  for split, size in _SPLITS.items():
    with open(_FOLDER / f'{split}.csv', encoding='utf-8', newline='') as file:
      header, *rows = csv.reader(file)
    assert header == _COLUMNS
    assert len(rows) == size
    assert all(cell == cell.strip() and cell for row in rows for cell in row)


def test_every_example_has_its_term_literally():
  for where, row in _rows():
    # Stricter than the judge: as it is written, whole, the case of letters
    # aside. And the context does not give it away.
    pattern = re.compile(rf'(?<!\w){re.escape(row["slang"])}(?!\w)',
                         re.IGNORECASE)
    assert pattern.search(row['example']), where
    assert not pattern.search(row['context']), where


def test_lengths():
  for where, row in _rows():
    assert 12 <= len(row['example'].split()) <= 35, where
    assert 6 <= len(row['context'].split()) <= 40, where
    # A sentence: one full stop, at its end.
    assert re.fullmatch(r'[A-Z"][^.!?]*\.', row['description']), where
    assert row['example'][-1] in '.?!', where


def test_terms_and_contexts_are_unique():
  rows = _rows()
  keys = [terms.key(row['slang']) for _, row in rows]
  assert len(set(keys)) == len(keys)
  for i, a in enumerate(keys):
    for b in keys[:i]:
      assert len(a) < 5 or len(b) < 5 or not terms.is_close(a, b), (a, b)
  for name in ('context', 'example', 'description'):
    assert len({row[name].lower() for _, row in rows}) == len(rows), name


def _shingles(text, n=5):
  text = text.lower()
  return {text[i:i + n] for i in range(len(text) - n + 1)}


def test_no_near_duplicates():
  # Jaccard similarity of character 5-grams: two sentences above it are one.
  for name in ('context', 'example'):
    found = [(where, _shingles(row[name])) for where, row in _rows()]
    for i, (where, a) in enumerate(found):
      for other, b in found[:i]:
        assert len(a & b) / len(a | b) < 0.3, f'{where} and {other}'


def test_acronyms_are_a_fifth_of_each_split_and_spelled():
  for split, found in _read().items():
    rows = [task.columns(r) for r in found]
    acronyms = [r for r in rows
                if terms.is_acronym(r['slang'], r['description'])]
    assert 0.19 <= len(acronyms) / len(rows) <= 0.23, split
    for row in acronyms:
      assert terms.spells(row['slang'], row['description']), row['slang']


def test_the_judge_gives_the_answers_full_marks():
  splits = _read()
  for split in ('validation', 'test'):
    answers = [task.to_messages(r)[-1].content for r in splits[split]]
    judged = task.judge(splits[split], answers, splits['train'])
    assert judged.metrics['good'] == 1, [
        row for row in judged.rows if not row['good']]
    # Chance is 0.5; what an answer has of its own context varies.
    assert judged.metrics['on_topic'] > 0.8
  assert not task.check_answers([r for s in splits.values() for r in s])


def test_tfds_builder(tmp_path):
  pytest.importorskip('tensorflow_datasets')
  source, out = tmp_path / 'source', tmp_path / 'out'
  source.mkdir()
  for split in _SPLITS:
    shutil.copy(_FOLDER / f'{split}.csv', source)
  code = f"""
import json, runpy, sys
from gemma_sft.inputs import records
sys.argv = ['builder', {f'--source={source}'!r}, {f'--out={out}'!r}]
runpy.run_path({str(_FOLDER / 'slang_dataset_builder.py')!r},
               run_name='__main__')
found = records.read({str(out / 'slang' / '1.0.0')!r}, split='test')
assert 'tensorflow' not in sys.modules
print('FOUND' + json.dumps([r.fields for r in found]))
"""
  done = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, check=False,
      env={**os.environ, 'PYTHONPATH': str(_ROOT)})
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.partition('FOUND')[2])
  ids = [fields.pop('id') for fields in found]
  assert sorted(ids, key=lambda i: int(i.partition(':')[2]))[0] == 'test.csv:2'
  # TFDS writes them in an order of its own.
  expected = [r.fields for r in _read()['test']]
  assert sorted(map(str, (sorted(f.items()) for f in found))) == sorted(
      map(str, (sorted(f.items()) for f in expected)))
