"""A cache of answers on disk.

Decoding is most of what an evaluation costs. From the cache, a changed judge
scores the answers in seconds, and a killed evaluation continues.
"""

import hashlib
import json
import os
from typing import Callable
from typing import Sequence

from gemma_sft import cache
from gemma_sft.monitor import metrics


class Answers:
  """A JSON-lines file of {key, answer}; half a line at its end is dropped."""

  def __init__(self, path: str = ''):
    """Reads the file if there is one; '' caches in memory only."""
    self._path = path
    self._answers = {
        row['key']: row['answer'] for row in metrics.read_jsonl(path)}
    self._file = None

  def add(self, key: str, answer: str) -> None:
    """Adds an answer, which is on disk when this returns."""
    self._answers[key] = answer
    if not self._path:
      return
    if self._file is None:
      # Rewritten first: a kill may have left half a line at the end.
      os.makedirs(os.path.dirname(self._path), exist_ok=True)
      with cache.replacing(self._path) as partial:
        partial.write_text(''.join(
            _line(*item) for item in self._answers.items()), 'utf-8')
      self._file = open(self._path, 'a', encoding='utf-8')
      return
    self._file.write(_line(key, answer))
    self._file.flush()

  def complete(
      self,
      keys: Sequence[str],
      answer_fn: Callable[..., None],
      progress: Callable[[float], None] = lambda n: None,
  ) -> list[str]:
    """Returns the answers under the keys, after making those that are missing.

    Args:
      keys: May repeat; a key is answered once.
      answer_fn: Called, if an answer is missing, with the indices of the keys
        to answer, a function that takes each index and its answer, and one that
        takes how many of them are answered, also in fractions.
      progress: Called with the number of keys answered.
    """
    missing = sorted({key: i for i, key in reversed(list(enumerate(keys)))
                      if key not in self._answers}.values())
    if missing:
      answer_fn(
          missing, lambda i, answer: self.add(keys[i], answer),
          lambda done: progress(len(keys) - len(missing) + done))
    return [self._answers[key] for key in keys]

  def close(self) -> None:
    if self._file is not None:
      self._file.close()


def _line(key, answer):
  return json.dumps({'key': key, 'answer': answer}, ensure_ascii=False) + '\n'


def make_key(
    weights: str, prompt: Sequence[int] | str, *settings: object) -> str:
  """Returns a hash of the weights' hash, the prompt's tokens and settings."""
  parts = [weights, repr(prompt if isinstance(prompt, str) else [
      int(t) for t in prompt]), *map(repr, settings)]
  return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:32]
