"""Reads the data sets in data/ and compares their texts."""

import collections

import conftest

from gemma_sft.inputs import records

FOLDER = conftest.ROOT / 'data'
SPLITS = ('train', 'validation', 'test')


def read(name: str, suffix: str) -> dict[str, list[records.Record]]:
  """Returns the records of each split of a folder in data/."""
  return {split: records.read(str(FOLDER / name / f'{split}{suffix}'))
          for split in SPLITS}


def judge(task, records, *train):
  """Judges the answers of the records themselves, which the judge accepts."""
  assert task.check_answers(records) == []
  return task.judge(
      records, [task.to_messages(r)[-1].content for r in records], *train)


def ngrams(text: str, n: int = 5) -> set[str]:
  """Returns the character n-grams of a text."""
  return {text[i:i + n] for i in range(max(1, len(text) - n + 1))}


def assert_unlike(found, others, limit: float):
  """Compares (place, set) pairs by the Jaccard similarity of the sets."""
  for place, a in found:
    for other, b in others:
      assert len(a & b) < limit * len(a | b), f'{place} and {other}'


def assert_unique(values):
  """Checks that no value stands twice."""
  twice = [v for v, n in collections.Counter(values).items() if n > 1]
  assert not twice
