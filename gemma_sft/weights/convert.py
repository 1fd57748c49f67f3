"""Converts a GGUF once to an Orbax checkpoint and a tokenizer in the cache."""

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
from flax import traverse_util
import jax
import numpy as np

from gemma_sft import progress
from gemma_sft.weights import gguf_file
from gemma_sft.weights import names
from gemma_sft.weights import tokenizer_file

# Part of the folder's name, so that a changed conversion runs again.
_VERSION = 2
# Reading holds a decoded chunk and the whole array. If the embedding were one
# chunk, it would be in memory twice.
_CHUNK_BYTES = 1 << 26
_CHILD = ('import sys; from gemma_sft.weights import convert;'
          ' convert.save_arrays(*sys.argv[1:])')


def file_sha256(path: str | os.PathLike) -> str:
  """Returns the hex SHA-256 of a file."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


@contextlib.contextmanager
def locked(cache_dir: pathlib.Path) -> Iterator[None]:
  """Locks the cache against all other processes of this machine."""
  cache_dir.mkdir(parents=True, exist_ok=True)
  with open(cache_dir / '.lock', 'w') as file:
    # The kernel releases it when the process ends, even if it is killed.
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def folder(cache_dir: pathlib.Path, sha256: str) -> pathlib.Path:
  """Returns the folder for the conversion of a source with this hash."""
  return cache_dir / f'gguf-v{_VERSION}-{sha256[:20]}'


def read_meta(path: pathlib.Path) -> dict[str, Any]:
  """Returns the meta.json of a conversion."""
  return json.loads((path / 'meta.json').read_text())


def is_intact(path: pathlib.Path, sha256: str) -> bool:
  """Whether a conversion is complete; logs what is wrong if it is not."""
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


def convert_gguf(
    source: pathlib.Path, sha256: str, target: pathlib.Path
) -> None:
  """Writes params/, tokenizer.model and meta.json of a GGUF to `target`.

  The folder appears when it is complete and replaces a damaged one. Peak memory
  is about three times the model in f32. Call it under `locked`.
  """
  # Left by killed processes: under the lock nobody else writes.
  for leftover in target.parent.glob('*.partial'):
    logging.warning('Removing the unfinished conversion %s.', leftover)
    if leftover.is_dir():
      shutil.rmtree(leftover)
    else:
      leftover.unlink()
  partial = target.with_name(target.name + '.partial')
  partial.mkdir(parents=True)
  print(f'converting {source} once into {target}', flush=True)
  file = gguf_file.open_gguf(source)
  tokenizer = tokenizer_file.from_gguf(file.metadata, str(source))
  (partial / 'tokenizer.model').write_bytes(tokenizer)
  show = progress.Progress(len(file.layout.shapes), 'arrays')
  arrays = {}
  for path, array in names.to_library(file.layout, 'gguf', file.read):
    arrays[path] = array
    show(len(arrays))
  params = traverse_util.unflatten_dict(arrays, sep='/')
  meta = {
      'source': str(source),
      'source_sha256': sha256,
      'n_tensors': len(file.shapes),
      'metadata': {key: value for key, value in file.metadata.items()
                   if not isinstance(value, list)},
  }
  del file  # The parsed vocabulary takes hundreds of MB.
  _save(params, partial / 'params')
  meta['files'] = _sizes(partial)
  (partial / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n')
  if target.exists():
    shutil.rmtree(target)
  partial.rename(target)


def _sizes(path: pathlib.Path) -> dict[str, int]:
  return {str(file.relative_to(path)): file.stat().st_size
          for file in sorted(path.rglob('*'))
          if file.is_file() and file.name != 'meta.json'}


def _save(params: Mapping[str, Any], path: pathlib.Path) -> None:
  from orbax import checkpoint as ocp

  if jax.process_count() > 1:
    # Orbax writes numpy arrays on process 0 only, but each host needs its own
    # conversion. A child process that is not distributed therefore saves them.
    arrays = path.with_suffix('.npz')
    np.savez(arrays, **traverse_util.flatten_dict(params, sep='/'))
    subprocess.run(
        [sys.executable, '-c', _CHILD, arrays, path],
        env=os.environ | {'JAX_PLATFORMS': 'cpu'}, check=True)
    arrays.unlink()
    return
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(
        path.absolute(), params, save_args=jax.tree.map(
            lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params))
    checkpointer.wait_until_finished()


def save_arrays(arrays: str, path: str) -> None:
  """Saves an .npz of library paths as a checkpoint, as the child of `_save`."""
  with np.load(arrays) as npz:
    _save(traverse_util.unflatten_dict(dict(npz), sep='/'), pathlib.Path(path))
