"""Rendered examples as flat arrays, and a file that keeps them between runs.

A million examples are a handful of arrays instead of millions of objects. A
file is mapped, not read: what of it is in memory, the system decides.
"""

import collections.abc
import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any
from typing import Iterable
from typing import Sequence

from absl import logging
import numpy as np

from gemma_sft import chat

_MAGIC = b'gemma_sft tokens 2\n'
_MAX_BYTES = 2 * 10**9
# name: dtype. One entry an example but for tokens and loss_mask, one a token,
# and where_bytes; example i is starts[i]:starts[i + 1] of those.
_ARRAYS = dict(
    tokens='int32', loss_mask='bool', starts='int64', target_bytes='int64',
    target_characters='int64',
    where_bytes='uint8', where_starts='int64', digests='V32',
    prompt_keys='V16')


def example_digest(example: chat.Example) -> bytes:
  """Returns SHA-256 over what of an example reaches the model."""
  return hashlib.sha256(
      example.tokens.tobytes() + example.loss_mask.tobytes()).digest()


def prompt_key(prompt: str) -> bytes:
  """Returns 16 bytes that equal prompts share."""
  return hashlib.sha256(prompt.encode()).digest()[:16]


class Examples(collections.abc.Sequence):
  """Rendered examples in flat arrays; each is made on access, a view."""

  def __init__(self, arrays: dict[str, np.ndarray]):
    """Takes the arrays of `make` or of a file."""
    self._arrays = arrays
    self._starts = arrays['starts']

  def __len__(self) -> int:
    return len(self._starts) - 1

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    i = range(len(self))[index]
    arrays = self._arrays
    span = slice(self._starts[i], self._starts[i + 1])
    where = slice(*arrays['where_starts'][i:i + 2])
    return chat.Example(
        arrays['tokens'][span], arrays['loss_mask'][span],
        int(arrays['target_bytes'][i]),
        int(arrays['target_characters'][i]),
        arrays['where_bytes'][where].tobytes().decode())

  @property
  def arrays(self) -> dict[str, np.ndarray]:
    """The flat arrays, for a file."""
    return self._arrays

  @property
  def prompt_keys(self) -> np.ndarray:
    """A hash of each prompt, V16 (n,); empty if `make` was given none."""
    return self._arrays['prompt_keys']

  def lengths(self) -> np.ndarray:
    """Returns the input tokens of each, int64 (n,)."""
    return np.diff(self._starts) - 1

  def trained(self) -> np.ndarray:
    """Returns the trained targets of each, int64 (n,)."""
    mask = self._arrays['loss_mask']
    starts = self._starts[:-1]
    # The first token is no target.
    return np.add.reduceat(mask, starts, dtype=np.int64) - mask[starts]

  def digest(self, i: int) -> bytes:
    """Returns `example_digest` of one."""
    return self._arrays['digests'][i].tobytes()

  def target_bytes(self) -> int:
    """Returns the UTF-8 bytes of all trained text."""
    return int(self._arrays['target_bytes'].sum())

  def target_characters(self) -> int:
    """Returns the code points of all trained text."""
    return int(self._arrays['target_characters'].sum())


def make(
    examples: Sequence[chat.Example], prompt_keys: Sequence[bytes] = ()
) -> Examples:
  """Returns examples as flat arrays; those that are already come back as they
  are."""
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
class Kept:
  """What a file holds: examples, and whatever small was stored with them."""

  examples: Examples
  facts: dict[str, Any]


def make_key(
    *parts: str | bytes | int | float,
    sources: Iterable[str | os.PathLike] = ()) -> str:
  """Returns a hash over everything that decides the examples.

  Args:
    *parts: In this order.
    sources: Files of code, whose content decides too.
  """
  digest = hashlib.sha256(_MAGIC)
  for part in (*parts, *(pathlib.Path(s).read_bytes() for s in sources)):
    data = part if isinstance(part, bytes) else str(part).encode()
    digest.update(f'{len(data)} '.encode() + data)
  return digest.hexdigest()


def save(
    folder: pathlib.Path,
    key: str,
    kept: Kept,
    *,
    max_bytes: int = _MAX_BYTES,
) -> None:
  """Writes a file for `load`; then drops the files longest unused.

  A disk that is full or read-only is told on one line and costs only time.

  Args:
    folder: Of the files.
    key: From `make_key`.
    kept: What to keep.
    max_bytes: Of all files together; the new one stays in any case.
  """
  arrays = {name: np.ascontiguousarray(kept.examples.arrays[name], dtype)
            for name, dtype in _ARRAYS.items()}
  body = hashlib.sha256()
  for array in arrays.values():
    body.update(array.view(np.uint8))
  header = json.dumps(dict(
      key=key, facts=kept.facts, sha256=body.hexdigest(),
      sizes={name: len(array) for name, array in arrays.items()})).encode()
  # Arrays begin at multiples of 8, or each access of a view would be unaligned.
  header += b' ' * (-(len(_MAGIC) + 8 + len(header)) % 8)
  path = folder / f'{key}.tokens'
  temporary = ''
  try:
    folder.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, suffix='.unfinished')
    with os.fdopen(handle, 'wb') as file:
      file.write(_MAGIC + len(header).to_bytes(8, 'little') + header)
      for array in arrays.values():
        file.write(array.view(np.uint8))
        file.write(bytes(-array.nbytes % 8))
    os.replace(temporary, path)
    _drop_oldest(folder, path, max_bytes)
  except OSError as error:
    logging.warning('Tokens are not kept in %s: %s', folder, error)
    if temporary:
      pathlib.Path(temporary).unlink(missing_ok=True)


def load(folder: pathlib.Path, key: str) -> Kept | None:
  """Returns what `save` wrote under the key; None if there is nothing whole.

  A damaged file is told on one line.
  """
  path = folder / f'{key}.tokens'
  if not path.exists():
    return None
  try:
    kept = _open(path, key)
    os.utime(path)  # Used now: the last to be dropped.
    return kept
  except (OSError, ValueError, KeyError, TypeError) as error:
    logging.warning(
        'Kept tokens %s are damaged (%s): making them again.', path, error)
    return None


def _open(path, key):
  # A plain array over the mapping: its slices are cheaper than a memmap's.
  data = np.asarray(np.memmap(path, np.uint8, mode='r'))
  at = len(_MAGIC) + 8
  if data[:len(_MAGIC)].tobytes() != _MAGIC:
    raise ValueError('another format')
  n = int.from_bytes(data[len(_MAGIC):at].tobytes(), 'little')
  header = json.loads(data[at:at + n].tobytes())
  at += n
  if header['key'] != key:
    raise ValueError('of another key')
  arrays, body = {}, hashlib.sha256()
  for name, dtype in _ARRAYS.items():
    n_bytes = header['sizes'][name] * np.dtype(dtype).itemsize
    if at + n_bytes > len(data):
      raise ValueError('cut off')
    arrays[name] = data[at:at + n_bytes].view(dtype)
    body.update(arrays[name].view(np.uint8))
    at += n_bytes + -n_bytes % 8
  if body.hexdigest() != header['sha256']:
    raise ValueError('its hash is another')
  return Kept(Examples(arrays), header['facts'])


def _drop_oldest(folder, newest, max_bytes):
  files = {path: path.stat() for path in folder.glob('*.tokens')}
  total = sum(stat.st_size for stat in files.values())
  for path in sorted(files, key=lambda p: files[p].st_mtime):
    if total <= max_bytes:
      break
    if path != newest:
      path.unlink(missing_ok=True)
      total -= files[path].st_size
