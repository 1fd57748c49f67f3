"""Rendered examples as flat arrays, and a cache of them between runs.

A million examples are a handful of arrays instead of millions of objects. On
disk each array is a `.npy` file that NumPy maps into memory, so the system
decides which parts of it stay in memory.
"""

import collections.abc
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any
from typing import Iterable
from typing import Sequence

from absl import logging
import numpy as np

from gemma_sft import chat

_VERSION = b'gemma_sft tokens 3'
_MAX_BYTES = 2 * 10**9
# `tokens` and `loss_mask` have one entry per token: example i is
# starts[i]:starts[i + 1]. `where_bytes` has one per byte of the examples'
# places, split by `where_starts`. The others have one per example.
_ARRAYS = ('tokens', 'loss_mask', 'starts', 'target_bytes', 'target_characters',
           'where_bytes', 'where_starts', 'digests', 'prompt_keys')


def example_digest(example: chat.Example) -> bytes:
  """Returns the SHA-256 of an example's tokens and loss mask."""
  return hashlib.sha256(
      example.tokens.tobytes() + example.loss_mask.tobytes()).digest()


def prompt_key(prompt: str) -> bytes:
  """Returns a hash of a prompt, 16 bytes."""
  return hashlib.sha256(prompt.encode()).digest()[:16]


@dataclasses.dataclass(frozen=True, eq=False)
class Examples(collections.abc.Sequence):
  """Rendered examples in flat arrays; indexing returns views of them."""

  arrays: dict[str, np.ndarray]  # By the names in `_ARRAYS`.

  def __len__(self) -> int:
    return len(self.arrays['starts']) - 1

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    i = range(len(self))[index]
    arrays = self.arrays
    span = slice(*arrays['starts'][i:i + 2])
    where = slice(*arrays['where_starts'][i:i + 2])
    return chat.Example(
        arrays['tokens'][span], arrays['loss_mask'][span],
        int(arrays['target_bytes'][i]), int(arrays['target_characters'][i]),
        arrays['where_bytes'][where].tobytes().decode())

  @property
  def prompt_keys(self) -> np.ndarray:
    """A hash of each prompt, V16 (n,); empty if `make` was given none."""
    return self.arrays['prompt_keys']

  def lengths(self) -> np.ndarray:
    """Returns the number of input tokens of each example, int64 (n,)."""
    return np.diff(self.arrays['starts']) - 1

  def trained(self) -> np.ndarray:
    """Returns the number of trained targets of each example, int64 (n,)."""
    mask = self.arrays['loss_mask']
    starts = self.arrays['starts'][:-1]
    # An example's first token is never a target.
    return np.add.reduceat(mask, starts, dtype=np.int64) - mask[starts]

  def digest(self, i: int) -> bytes:
    """Returns `example_digest` of example i."""
    return self.arrays['digests'][i].tobytes()

  def target_bytes(self) -> int:
    """Returns the UTF-8 bytes of all trained text."""
    return int(self.arrays['target_bytes'].sum())

  def target_characters(self) -> int:
    """Returns the code points of all trained text."""
    return int(self.arrays['target_characters'].sum())


def make(
    examples: Sequence[chat.Example], prompt_keys: Sequence[bytes] = ()
) -> Examples:
  """Returns examples as flat arrays, unchanged if they are already."""
  if isinstance(examples, Examples):
    return examples
  wheres = [e.where.encode() for e in examples]

  def flat(parts, dtype):
    return np.concatenate([np.zeros(0, dtype), *parts], dtype=dtype)

  return Examples(dict(
      tokens=flat([e.tokens for e in examples], np.int32),
      loss_mask=flat([e.loss_mask for e in examples], bool),
      starts=_starts(len(e.tokens) for e in examples),
      target_bytes=np.asarray([e.target_bytes for e in examples], np.int64),
      target_characters=np.asarray(
          [e.target_characters for e in examples], np.int64),
      where_bytes=np.frombuffer(b''.join(wheres), np.uint8),
      where_starts=_starts(map(len, wheres)),
      digests=np.frombuffer(b''.join(map(example_digest, examples)), 'V32'),
      prompt_keys=np.frombuffer(b''.join(prompt_keys), 'V16')))


def _starts(lengths: Iterable[int]) -> np.ndarray:
  lengths = np.fromiter(lengths, np.int64)
  return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


@dataclasses.dataclass(frozen=True)
class CachedSplit:
  """One entry of the cache: a split's examples and its audit's counts."""

  examples: Examples
  facts: dict[str, Any]


def make_key(
    *parts: str | bytes | int | float,
    sources: Iterable[str | os.PathLike] = ()) -> str:
  """Returns a hash of values, in their order, and of the sources' content."""
  digest = hashlib.sha256(_VERSION)
  for part in (*parts, *(pathlib.Path(s).read_bytes() for s in sources)):
    data = part if isinstance(part, bytes) else str(part).encode()
    digest.update(f'{len(data)} '.encode() + data)
  return digest.hexdigest()


def save(
    folder: pathlib.Path, key: str, split: CachedSplit, *,
    max_bytes: int = _MAX_BYTES) -> None:
  """Writes an entry for `load`, then removes the entries unused for longest.

  The new entry stays even if it exceeds `max_bytes` by itself. A full or
  read-only disk only causes a warning.
  """
  path = folder / key
  facts = np.frombuffer(json.dumps(split.facts).encode(), np.uint8)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder, suffix='.unfinished') as unfinished:
      partial = pathlib.Path(unfinished, key)
      partial.mkdir()
      for name, array in {**split.examples.arrays, 'facts': facts}.items():
        np.save(partial / f'{name}.npy', array)
      (partial / 'index.json').write_text(json.dumps(
          {'key': key, 'sha256': _hashes(partial)}), 'utf-8')
      shutil.rmtree(path, ignore_errors=True)  # An entry that is damaged.
      partial.rename(path)
    _remove_oldest(folder, path, max_bytes)
  except OSError as error:
    logging.warning('Tokens are not cached in %s: %s', folder, error)


def load(folder: pathlib.Path, key: str) -> CachedSplit | None:
  """Returns the entry of a key, or None if it is missing or damaged."""
  path = folder / key
  if not path.exists():
    return None
  try:
    split = _open(path, key)
    os.utime(path)  # `_remove_oldest` goes by the time of the last use.
    return split
  except (OSError, ValueError, LookupError, TypeError) as error:
    logging.warning(
        'Cached tokens %s are damaged (%s): rendering them again.', path, error)
    return None


def _open(path, key):
  index = json.loads((path / 'index.json').read_text('utf-8'))
  if index['key'] != key:
    raise ValueError('it belongs to another key')
  for name, found in _hashes(path).items():
    if found != index['sha256'][name]:
      raise ValueError(f'the hash of {name}.npy differs')
  # A plain array over the mapping: its slices are cheaper than a memmap's.
  arrays = {name: np.asarray(np.load(path / f'{name}.npy', mmap_mode='r'))
            for name in (*_ARRAYS, 'facts')}
  facts = json.loads(arrays.pop('facts').tobytes())
  return CachedSplit(Examples(arrays), facts)


def _hashes(path):
  """Returns the SHA-256 of each array's file."""
  hashes = {}
  for name in (*_ARRAYS, 'facts'):
    with open(path / f'{name}.npy', 'rb') as file:
      hashes[name] = hashlib.file_digest(file, 'sha256').hexdigest()
  return hashes


def _remove_oldest(folder, newest, max_bytes):
  entries = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
  sizes = {path: _size(path) for path in entries}
  total = sum(sizes.values())
  for path, size in sizes.items():
    if total > max_bytes and path != newest:
      total -= size
      if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
      else:
        path.unlink(missing_ok=True)  # A file of an earlier version.


def _size(path):
  return sum(file.stat().st_size for file in (path, *path.rglob('*')))
