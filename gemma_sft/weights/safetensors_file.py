"""Reads Hugging Face safetensors folders lazily and writes them by shards."""

from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
import re
from typing import Any

import ml_dtypes
import numpy as np

from gemma_sft import errors
from gemma_sft.weights import names

INDEX = 'model.safetensors.index.json'
DTYPES = {
    'float32': np.dtype(np.float32),
    'float16': np.dtype(np.float16),
    'bfloat16': np.dtype(ml_dtypes.bfloat16),
}
# Prefixes in multimodal checkpoints: of transformers 4, then of 5.
_TEXT_PREFIXES = ('language_model.', 'model.language_model.')
_NOT_TEXT = (
    'vision_tower.', 'multi_modal_projector.', 'audio_tower.', 'embed_vision.',
    'embed_audio.',
)
_HEAD = 'lm_head.weight'


@dataclasses.dataclass(frozen=True)
class Folder:
  """An open folder; tensors have their names in a text-only model."""

  path: pathlib.Path
  config: Mapping[str, Any]
  shapes: Mapping[str, names.Shape]
  _sources: Mapping[str, tuple[pathlib.Path, str]]

  def read(self, name: str) -> np.ndarray:
    """Returns one tensor in the dtype of the file."""
    from safetensors import safe_open

    file, key = self._sources[name]
    with safe_open(file, 'np') as opened:
      return opened.get_tensor(key)


def is_folder(path: str | os.PathLike) -> bool:
  """Whether a path is a folder of safetensors."""
  path = pathlib.Path(path)
  return path.is_dir() and (
      (path / INDEX).exists() or any(path.glob('*.safetensors')))


def open_folder(path: str | os.PathLike) -> Folder:
  """Opens a folder of one or more .safetensors and reads their headers.

  Of a multimodal checkpoint only the text model is read.

  Raises:
    UserError: config.json or a shard is missing or damaged, or the output head
      is not the embedding.
  """
  path = pathlib.Path(path)
  config = _read_json(path / 'config.json')
  if (path / INDEX).exists():
    index = _weight_map(path)
    files = sorted({path / name for name in index.values()})
  else:
    index, files = None, sorted(path.glob('*.safetensors'))
  shapes, sources = {}, {}
  for file in files:
    for key, shape in _header(file).items():
      name = _text_name(key)
      if name is None:
        continue
      if name in sources:
        raise errors.UserError(
            f'{path}: tensor {key} is in {sources[name][0].name} and in'
            f' {file.name}',
            'each tensor in one file',
            'remove the files that do not belong to this model')
      shapes[name], sources[name] = shape, (file, key)
  for key in index or ():
    name = _text_name(key)
    if name is not None and name not in shapes:
      raise errors.UserError(
          f'{path}: {INDEX} lists {key} in {index[key]}, which lacks it',
          'every tensor of the index', 'download or copy the folder again')
  folder = Folder(path, config, shapes, sources)
  _check_tied(folder)
  shapes.pop(_HEAD, None)
  return folder


def _weight_map(path: pathlib.Path) -> dict[str, str]:
  """Returns tensor -> file of the index; all files are in the folder."""
  index = _read_json(path / INDEX).get('weight_map')
  if not isinstance(index, dict) or not index:
    raise errors.UserError(
        f'{path / INDEX}: it has no weight_map',
        'an object of tensors and their files',
        'download or copy the folder again')
  for name in index.values():
    # A downloaded index must not refer to other files of this machine.
    if not isinstance(name, str) or not re.fullmatch(
        r'[\w.-]+\.safetensors', name, re.ASCII):
      raise errors.UserError(
          f'{path / INDEX}: it lists the file {name!r:.80}',
          'names of .safetensors files in the same folder',
          'download the original folder again')
  return index


def _text_name(key: str) -> str | None:
  """Returns a tensor's name in a text-only model; None if it has none."""
  if key.removeprefix('model.').startswith(_NOT_TEXT):
    return None
  for prefix in _TEXT_PREFIXES:
    if key.startswith(prefix):
      rest = key.removeprefix(prefix)
      if rest.startswith(('model.', 'lm_head.')):
        return rest
      return f'model.{rest}'
  return key


def _check_tied(folder: Folder) -> None:
  embedding = names.HF_EMBEDDING
  if _HEAD in folder.shapes and not (
      embedding in folder.shapes
      and np.array_equal(folder.read(_HEAD), folder.read(embedding))):
    raise errors.UserError(
        f'{folder.path}: {_HEAD} is not the embedding',
        'the tied head of Gemma: no such tensor, or a copy of the embedding',
        'use the checkpoint before its head was untied')


def _read_json(file: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(file.read_text(encoding='utf-8'))
    if not isinstance(value, dict):
      raise ValueError('no JSON object')
    return value
  # RecursionError: thousands of nested brackets.
  except (OSError, ValueError, RecursionError) as error:
    raise errors.UserError(
        f'{file}: {error}', 'a Hugging Face model folder',
        'download or copy the folder again') from None


def _header(file: pathlib.Path) -> dict[str, names.Shape]:
  from safetensors import safe_open
  from safetensors import SafetensorError

  try:
    with safe_open(file, 'np') as opened:
      return {key: tuple(opened.get_slice(key).get_shape())
              for key in opened.keys()}
  except (OSError, SafetensorError) as error:
    size = file.stat().st_size if file.exists() else 0
    raise errors.UserError(
        f'{file}: cannot be read ({error}); it has {size} bytes',
        'a complete .safetensors file', 'download or copy it again') from None


# Writing ---------------------------------------------------------------------


def _plan_shards(shapes, dtype, max_bytes) -> list[list[str]]:
  """Returns the names of the tensors in each file, in order."""
  shards, size = [[]], 0
  for name, shape in shapes.items():
    n = n_bytes(shape, dtype)
    if shards[-1] and size + n > max_bytes:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += n
  return shards


def n_bytes(shape: names.Shape, dtype: str) -> int:
  """Returns the size of a tensor of a dtype in `DTYPES`."""
  return int(np.prod(shape)) * DTYPES[dtype].itemsize


def write_model(
    folder: pathlib.Path,
    tensors: Iterator[tuple[str, np.ndarray]],
    shapes: Mapping[str, names.Shape],
    *,
    dtype: str,
    max_bytes: int,
) -> None:
  """Writes model.safetensors, or numbered shards and their index.

  One shard at a time is in memory.

  Args:
    folder: An existing folder.
    tensors: (name, array), in the order of `shapes`.
    shapes: Tensor name -> shape.
    dtype: A key of `DTYPES`; arrays are cast.
    max_bytes: The largest size of a file, without its header. A larger tensor
      has a file of its own.
  """
  shards = _plan_shards(shapes, dtype, max_bytes)
  weight_map = {}
  for number, shard in enumerate(shards, start=1):
    file = 'model.safetensors'
    if len(shards) > 1:
      file = f'model-{number:05}-of-{len(shards):05}.safetensors'
    arrays = {}
    for expected in shard:
      name, array = next(tensors)
      if (name, array.shape) != (expected, tuple(shapes[expected])):
        raise ValueError(
            f'got {name} {array.shape}, not {expected} {shapes[expected]}')
      arrays[name] = np.ascontiguousarray(array.astype(DTYPES[dtype]))
      weight_map[name] = file
    write_file(folder / file, arrays)
  if len(shards) > 1:
    total = sum(n_bytes(shape, dtype) for shape in shapes.values())
    (folder / INDEX).write_text(json.dumps(
        {'metadata': {'total_size': total}, 'weight_map': weight_map},
        indent=2) + '\n')


def write_file(file: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes one .safetensors, with the metadata that transformers requires."""
  from safetensors.numpy import save_file

  # The library renames a temporary file, which only its owner may read.
  file.touch()
  mode = file.stat().st_mode
  save_file(dict(arrays), file, metadata={'format': 'pt'})
  file.chmod(mode)
