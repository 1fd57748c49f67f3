"""Answers that a run's weights have given, kept on disk.

Decoding is most of what an evaluation costs. With its answers kept, a judge
that has changed scores them again in seconds, and a killed evaluation goes on
where it was.
"""

import hashlib
import json
import os
from typing import Sequence

from gemma_sft.monitor import metrics


class Answers:
  """A JSON-lines file of {key, answer}; half a line at its end is dropped."""

  def __init__(self, path: str):
    """Reads what there is.

    Args:
      path: Of the file; made with its folder at the first `add`.
    """
    self._path = path
    self._answers = {row['key']: row['answer']
                     for row in metrics.read_jsonl(path)}
    self._file = None

  def find(self, key: str) -> str | None:
    """Returns the answer under a key, or None."""
    return self._answers.get(key)

  def add(self, key: str, answer: str) -> None:
    """Keeps an answer, on disk before this returns."""
    self._answers[key] = answer
    if self._file is None:
      # Anew: a kill may have left half a line at the end.
      os.makedirs(os.path.dirname(self._path), exist_ok=True)
      with open(self._path + '.tmp', 'w', encoding='utf-8') as file:
        file.writelines(_line(*item) for item in self._answers.items())
      os.replace(self._path + '.tmp', self._path)
      self._file = open(self._path, 'a', encoding='utf-8')
      return
    self._file.write(_line(key, answer))
    self._file.flush()

  def close(self) -> None:
    if self._file is not None:
      self._file.close()


def _line(key, answer):
  return json.dumps({'key': key, 'answer': answer}, ensure_ascii=False) + '\n'


def make_key(weights: str, prompt: Sequence[int] | str, *settings: object
             ) -> str:
  """Returns a hash of what decides an answer.

  Args:
    weights: Which weights: a content hash.
    prompt: Tokens, or text.
    *settings: Of the decoding.
  """
  parts = [weights, repr(prompt if isinstance(prompt, str) else [
      int(t) for t in prompt]), *map(repr, settings)]
  return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:32]
