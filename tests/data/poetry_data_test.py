"""The poems in data/poetry: the judge passes each, and none is there twice."""

import collections
import random
import re

import reading

from gemma_sft.inputs import records
from gemma_sft.tasks.poetry import task

_SPLITS = reading.read('poetry', '.jsonl')
_ALL = [r for split in _SPLITS.values() for r in split]


def test_every_poem_keeps_form_rhyme_and_tones():
  judged = reading.judge(task, _ALL)
  assert [judged.metrics[k] for k in ('form', 'rhyme', 'tone')] == [1, 1, 1]
  assert judged.metrics['repeated'] == 0
  rhymes = collections.Counter(row['rhymes'] for row in judged.rows)
  assert len(rhymes) >= 25  # Of the book's 30.
  assert max(rhymes.values()) < 0.1 * len(judged.rows)


def test_splits_and_style():
  assert len(_ALL) >= 200
  for split, least in (('train', 150), ('validation', 20), ('test', 30)):
    assert len(_SPLITS[split]) >= least
    forms = collections.Counter(r.fields['form'] for r in _SPLITS[split])
    assert forms.keys() == task.FORMS.keys()
    # There are more quatrains than octaves, but a fair number of each.
    assert min(forms.values()) >= len(_SPLITS[split]) / 10
  for record in _ALL:
    assert list(record.fields) == ['title', 'form', 'text']
    title, text = record.fields['title'], record.fields['text']
    for couplet in text.split('\n'):
      assert re.fullmatch(r'\w{5}，\w{5}。|\w{7}，\w{7}。', couplet), record
    # Prompt and poem are in traditional characters.
    assert task.to_messages(record)[0].content.startswith('請以')
    assert task.to_traditional(title + text) == title + text
  reading.assert_unique(r.fields['title'] for r in _ALL)
  reading.assert_unique(
      line for r in _ALL for line in task.split_lines(r.fields['text']))
  # Two quatrains of 20 characters with a similarity of 0.15 share five of their
  # 16 pairs of characters.
  train, *held_out = (
      [(r.where, {line[i:i + 2] for line in task.split_lines(r.fields['text'])
                  for i in range(len(line) - 1)}) for r in records]
      for records in _SPLITS.values())
  reading.assert_unlike(sum(held_out, []), train, 0.15)


def test_broken_poems_do_not_pass():
  # Of poems made of lines of other poems, 2 % of quatrains pass and no octaves.
  rng = random.Random(0)
  for form in task.FORMS:
    texts = [r.fields['text'] for r in _ALL if r.fields['form'] == form]
    lines = [line for t in texts for line in task.split_lines(t)]
    rng.shuffle(lines)
    count = int(form[2])
    mixed = ['，'.join(lines[i:i + count])
             for i in range(0, len(lines), count)]
    judged = task.judge(
        [records.Record({'title': '題', 'form': form}, '')] * len(mixed), mixed)
    assert judged.metrics['form'] == 1
    assert judged.metrics['rhyme'] < 0.1 and judged.metrics['tone'] < 0.1
