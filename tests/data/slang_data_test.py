"""The examples in data/slang: terms, examples and contexts as promised."""

import re

import reading

from gemma_sft.tasks.slang import task
from gemma_sft.tasks.slang import terms

_SPLITS = reading.read('slang', '.csv')
_ALL = [r for split in _SPLITS.values() for r in split]
_ROWS = [(r.where, task.columns(r)) for r in _ALL]


def test_sizes_and_header():
  assert [len(split) for split in _SPLITS.values()] == [354, 44, 55]
  for record in _ALL:
    assert list(record.fields) == ['Slang', 'Description', 'Example', 'Context']
    assert all(cell == cell.strip() and cell for cell in record.fields.values())
  # Acronyms are a fifth of each split, and spelled.
  for split, found in _SPLITS.items():
    rows = [task.columns(r) for r in found]
    acronyms = [r for r in rows
                if terms.is_acronym(r['slang'], r['description'])]
    assert 0.19 <= len(acronyms) / len(rows) <= 0.23, split
    for row in acronyms:
      assert terms.spells(row['slang'], row['description']), row['slang']


def test_rows():
  for where, row in _ROWS:
    assert 12 <= len(row['example'].split()) <= 35, where
    assert 6 <= len(row['context'].split()) <= 40, where
    # One sentence, with a full stop at its end.
    assert re.fullmatch(r'[A-Z"][^.!?]*\.', row['description']), where
    assert row['example'][-1] in '.?!', where
    # Stricter than the judge: the whole term as it is written, in any case. The
    # context must not contain it.
    pattern = re.compile(rf'(?<!\w){re.escape(row["slang"])}(?!\w)',
                         re.IGNORECASE)
    assert pattern.search(row['example']), where
    assert not pattern.search(row['context']), where
  keys = [terms.key(row['slang']) for _, row in _ROWS]
  reading.assert_unique(keys)
  for i, a in enumerate(keys):
    for b in keys[:i]:
      assert len(a) < 5 or len(b) < 5 or not terms.is_close(a, b), (a, b)
  for name in ('context', 'example', 'description'):
    reading.assert_unique(row[name].lower() for _, row in _ROWS)
  # Two sentences with a higher similarity of character 5-grams say the same.
  for name in ('context', 'example'):
    found = [(where, reading.ngrams(row[name].lower())) for where, row in _ROWS]
    for i, one in enumerate(found):
      reading.assert_unlike([one], found[:i], 0.3)


def test_the_judge_gives_the_answers_full_marks():
  for split in ('validation', 'test'):
    judged = reading.judge(task, _SPLITS[split], _SPLITS['train'])
    assert judged.metrics['good'] == 1, [
        row for row in judged.rows if not row['good']]
    # Chance is 0.5; not every answer repeats words of its context.
    assert judged.metrics['on_topic'] > 0.8
  assert not task.check_answers(_SPLITS['train'])
