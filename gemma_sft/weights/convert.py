"""Converts a GGUF once into an Orbax checkpoint and a tokenizer in a cache."""

from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

from absl import logging
import jax
import numpy as np

from gemma_sft.weights import gguf_file
from gemma_sft.weights import names
from gemma_sft.weights import tokenizer_file

# Part of the cache's folder name: a change of the conversion converts again.
_VERSION = 2
# A chunk is decoded beside the array that it becomes part of: in one chunk,
# the embedding would be held twice whenever it is read.
_CHUNK_BYTES = 1 << 26
_CHILD = (
    'import sys; from gemma_sft.weights import convert;'
    ' convert.save_arrays(*sys.argv[1:])'
)


def file_sha256(path: str | os.PathLike) -> str:
  """Returns the hex SHA-256 of a file."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def tree_digest(params: Mapping[str, Any]) -> str:
  """Returns the hex SHA-256 of a tree: names, dtypes, shapes and bytes."""
  flat = dict(sorted(flatten(params).items()))
  digest = hashlib.sha256()
  for path, array in flat.items():
    array = np.ascontiguousarray(array)
    digest.update(f'{path} {array.dtype} {array.shape}\n'.encode())
    digest.update(array.view(np.uint8).data)
  return digest.hexdigest()


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns path -> leaf of nested dicts, the path joined by '/'."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat.update(flatten(value, f'{prefix}{key}/'))
    else:
      flat[prefix + key] = value
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Inverts `flatten`."""
  tree = {}
  for path, value in flat.items():
    *parents, leaf = path.split('/')
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[leaf] = value
  return tree


@contextlib.contextmanager
def locked(cache_dir: pathlib.Path) -> Iterator[None]:
  """Holds the cache for one process of this machine at a time."""
  cache_dir.mkdir(parents=True, exist_ok=True)
  with open(cache_dir / '.lock', 'w') as file:
    # Released by the kernel when the process ends, however it ends.
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def folder(cache_dir: pathlib.Path, sha256: str) -> pathlib.Path:
  """Returns where the conversion of a source with this hash belongs."""
  return cache_dir / f'gguf-v{_VERSION}-{sha256[:20]}'


def read_meta(path: pathlib.Path) -> dict[str, Any]:
  """Returns the conversion's meta.json."""
  return json.loads((path / 'meta.json').read_text())


def is_intact(path: pathlib.Path, sha256: str) -> bool:
  """Tells whether a conversion is whole; logs what is wrong when not."""
  if not path.exists():
    return False
  try:
    meta = read_meta(path)
    if meta['source_sha256'] != sha256:
      raise ValueError('it belongs to another file')
    if not {'source', 'metadata'} <= meta.keys():
      raise ValueError('its meta.json is incomplete')
    if meta['files'] != _sizes(path):
      raise ValueError('files are missing or have other sizes')
  except (OSError, ValueError, KeyError, TypeError) as error:
    logging.warning('Cache %s is damaged (%s): rebuilding it.', path, error)
    return False
  return True


def convert(source: pathlib.Path, sha256: str, target: pathlib.Path) -> None:
  """Writes params/, tokenizer.model and meta.json of a GGUF to `target`.

  The folder appears whole or not at all. Peak memory is about three times
  the model in f32. Call it under `locked`.

  Args:
    source: The GGUF.
    sha256: Its hash, for meta.json.
    target: The folder to make; a damaged one is replaced.
  """
  # What a killed conversion left; the lock says that nobody is at work.
  for leftover in target.parent.glob('*.partial'):
    logging.warning('Removing the unfinished conversion %s.', leftover)
    shutil.rmtree(leftover)
  partial = target.with_name(target.name + '.partial')
  partial.mkdir(parents=True)
  logging.info('Converting %s once into %s.', source, target)
  file = gguf_file.open_gguf(source)
  tokenizer = tokenizer_file.from_gguf(file.metadata, str(source))
  (partial / 'tokenizer.model').write_bytes(tokenizer)
  params = unflatten(dict(names.to_library(file.layout, 'gguf', file.read)))
  meta = {
      'source': str(source),
      'source_sha256': sha256,
      'n_tensors': file.n_tensors,
      'tree_sha256': tree_digest(params),
      'metadata': {
          key: value
          for key, value in file.metadata.items()
          if not isinstance(value, list)
      },
  }
  del file  # The parsed vocabulary takes hundreds of MB.
  _save(params, partial / 'params')
  meta['files'] = _sizes(partial)
  (partial / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n')
  if target.exists():
    shutil.rmtree(target)
  partial.rename(target)


def _sizes(path: pathlib.Path) -> dict[str, int]:
  return {
      str(file.relative_to(path)): file.stat().st_size
      for file in sorted(path.rglob('*'))
      if file.is_file() and file.name != 'meta.json'
  }


def _save(params: Mapping[str, Any], path: pathlib.Path) -> None:
  from orbax import checkpoint as ocp

  if jax.process_count() > 1:
    # Of numpy arrays Orbax writes those of process 0 alone, while each host
    # converts for itself: a process that knows of no other does the saving.
    arrays = path.with_suffix('.npz')
    np.savez(arrays, **flatten(params))
    subprocess.run(
        [sys.executable, '-c', _CHILD, arrays, path],
        env=os.environ | {'JAX_PLATFORMS': 'cpu'},
        check=True,
    )
    arrays.unlink()
    return
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(
        path.absolute(), params, save_args=jax.tree.map(
            lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params))
    checkpointer.wait_until_finished()


def save_arrays(arrays: str, path: str) -> None:
  """Saves an .npz of library paths as a checkpoint; the child of `_save`."""
  with np.load(arrays) as npz:
    _save(unflatten(dict(npz)), pathlib.Path(path))
