"""The TFDS data set of each data folder holds the records of its files."""

import json
import os
import subprocess
import sys

import pytest
import reading

from gemma_sft import errors
from gemma_sft import tasks
from gemma_sft.inputs import records

pytest.importorskip('tensorflow_datasets')

# Builder in data/ -> suffix of its files, its data sets and their folders.
_SETS = {'blop': ('.txt', 'blop'),
         'lyrics': ('.jsonl', 'lyrics/hindi', 'lyrics/bengali'),
         'poetry': ('.jsonl', 'poetry'), 'slang': ('.csv', 'slang'),
         'sql': ('.jsonl', 'sql')}


def _prepare(name, sets, out, source=''):
  """Runs a builder; returns {set: {split: [(where, fields)]}}."""
  script = reading.FOLDER / name / f'{name}_dataset_builder.py'
  code = f"""
import json, runpy, sys
from gemma_sft.inputs import records
sys.argv = ['builder', {f'--out={out}'!r}, *{[source] if source else []!r}]
runpy.run_path({str(script)!r}, run_name='__main__')
found = {{name: {{split: [[r.where, r.fields] for r in records.read(
    {str(out)!r} + f'/{{name}}/1.0.0', split=split)]
    for split in {reading.SPLITS!r}}} for name in {sets!r}}}
assert 'tensorflow_datasets' in sys.modules
assert 'tensorflow' not in sys.modules
print('FOUND' + json.dumps(found))
"""
  done = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, check=False,
      env={**os.environ, 'PYTHONPATH': str(reading.FOLDER.parent)})
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.partition('FOUND')[2])


@pytest.mark.parametrize('name', _SETS)
def test_a_data_set_holds_the_records_of_its_files(name, tmp_path):
  task = tasks.load(name)
  suffix, *sets = _SETS[name]
  found = _prepare(name, sets, tmp_path)
  for data_set in sets:
    for split, originals in reading.read(data_set, suffix).items():
      # TFDS writes the records in an order of its own.
      rows = {fields['id']: records.Record(fields, where)
              for where, fields in found[data_set][split]}
      assert len(rows) == len(originals)
      for original in originals:
        line = original.where.rpartition(':')[2]
        row = rows[original.fields.get('id', f'{split}{suffix}:{line}')]
        assert original.fields.items() <= row.fields.items()
        assert task.to_messages(row) == task.to_messages(original)
      if name == 'sql':  # The databases came with the records.
        rows = [*rows.values()]
        judged = task.judge(rows, [r.fields['query'] for r in rows])
        assert judged.metrics['execution'] == 1 and not judged.note


def test_a_second_preparation_keeps_nothing_of_the_first(tmp_path):
  source, out = tmp_path / 'source', tmp_path / 'out'
  source.mkdir()
  for text in ('first ü', 'second'):
    for split in reading.SPLITS:
      (source / f'{split}.txt').write_text(
          f'# INPUT\n{split} {text}\n# OUTPUT\na\n\nb\n', 'utf-8')
    found = _prepare('blop', ['blop'], out, f'--source={source}')
    assert found['blop']['test'] == [['tfds blop:test[0]', {
        'prompt': f'test {text}', 'completion': 'a\n\nb', 'id': 'test.txt:1'}]]
  with pytest.raises(errors.UserError, match="Unknown split 'tset'.*'test'"):
    records.read(str(out / 'blop' / '1.0.0'), split='tset')
  with pytest.raises(errors.UserError, match=(
      rf'without dataset_info.json(.*\n)*.*{out / "blop"}/1\.0\.0')):
    records.read(str(out / 'blop'))
