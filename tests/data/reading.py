"""Reads the data sets in data/ and compares their texts."""

import conftest

from gemma_sft.inputs import records

FOLDER = conftest.ROOT / 'data'
SPLITS = ('train', 'validation', 'test')


def read(name: str, suffix: str) -> dict[str, list[records.Record]]:
  """Returns the records of each split of a folder in data/."""
  return {split: records.read(str(FOLDER / name / f'{split}{suffix}'))
          for split in SPLITS}


def ngrams(text: str, n: int = 5) -> set[str]:
  """Returns the character n-grams of a text."""
  return {text[i:i + n] for i in range(max(1, len(text) - n + 1))}


def jaccard(a: set[str], b: set[str]) -> float:
  """Returns the Jaccard similarity of two sets."""
  return len(a & b) / len(a | b)
