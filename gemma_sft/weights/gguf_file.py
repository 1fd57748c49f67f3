"""Reads a Gemma GGUF: metadata, dimensions and dequantised tensors."""

from collections.abc import Mapping
import dataclasses
import math
import mmap
import os
import pathlib
import struct
from typing import Any

import numpy as np

from gemma_sft import errors
from gemma_sft.weights import names

# Elements that are dequantised together, which limits gguf's scratch memory.
_CHUNK_ELEMENTS = 1 << 22
_ROPE_FREQS = 'rope_freqs.weight'  # Which pairs of a head Gemma 4 rotates.
# Value types of the format and their bytes.
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4  # Of ggml.


@dataclasses.dataclass(frozen=True)
class GgufFile:
  """An open GGUF.

  Attributes:
    path: The file.
    metadata: All keys and values of the header, arrays as lists.
    layout: The library's paths and shapes of this model.
  """

  path: pathlib.Path
  metadata: Mapping[str, Any]
  layout: names.WeightLayout
  _tensors: Mapping[str, Any]

  @property
  def shapes(self) -> dict[str, names.Shape]:
    """Tensor name -> shape, in numpy's axis order."""
    return {name: _shape(tensor) for name, tensor in self._tensors.items()}

  def type_of(self, name: str) -> Any:
    """Returns the `gguf.GGMLQuantizationType` of a tensor."""
    return self._tensors[name].tensor_type

  def read(self, name: str) -> np.ndarray:
    """Returns one tensor dequantised to f32, in numpy's axis order."""
    from gguf import quants

    tensor = self._tensors[name]
    shape = _shape(tensor)
    # In chunks of rows, because `dequantize` holds its result twice.
    data = tensor.data.reshape(-1, tensor.data.shape[-1])
    array = np.empty((data.shape[0], shape[-1]), np.float32)
    n_rows = max(1, _CHUNK_ELEMENTS // shape[-1])
    for start in range(0, len(data), n_rows):
      chunk = data[start : start + n_rows]
      try:
        array[start : start + n_rows] = quants.dequantize(
            chunk, tensor.tensor_type)
      except NotImplementedError as error:
        raise errors.UserError(
            f'{self.path}: tensor {name} has type {tensor.tensor_type.name}',
            'a type that the gguf package can dequantise',
            'use a Q8_0, Q4_K_M, F16, BF16 or F32 file of this model'
        ) from error
    return array.reshape(shape)


def open_gguf(
    path: str | os.PathLike, layout: names.WeightLayout | None = None
) -> GgufFile:
  """Opens a Gemma GGUF and checks it before any tensor is read.

  Reading the header of a 262144-token vocabulary takes about 15 seconds.

  The file must have the tensors of `layout`. Without a layout it must be a
  Gemma 1, 2 or 3 and have the tensors that its metadata announce.

  Raises:
    UserError: The file is not a GGUF, is cut short, has another architecture,
      or does not have the tensors that it must have.
  """
  import gguf

  path = pathlib.Path(path)
  if not path.is_file():
    raise errors.UserError(
        f'{path}: no such file', 'a GGUF file', 'correct the path')
  try:
    check_header(path)
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()
                if not key.startswith('GGUF.')}
  except Exception as error:  # The reader raises whatever numpy raises.
    raise errors.UserError(
        f'{path}: cannot be read as GGUF ({error}); it has'
        f' {path.stat().st_size} bytes',
        'a complete GGUF file',
        'download or copy it again: it is cut short, damaged or another format'
    ) from error
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  if layout is None:
    layout = _announced_layout(path, metadata, len(tensors))
  else:
    tensors.pop(_ROPE_FREQS, None)
  file = GgufFile(path, metadata, layout, tensors)
  names.check_shapes(
      file.shapes, names.file_shapes(layout, 'gguf'), str(path))
  return file


def _shape(tensor) -> tuple[int, ...]:
  return tuple(int(size) for size in reversed(tensor.shape))


def _announced_layout(
    path: pathlib.Path, metadata: Mapping[str, Any], n_tensors: int
) -> names.WeightLayout:
  architecture = metadata.get('general.architecture')
  if not isinstance(architecture, str) or (
      architecture not in names.ARCHITECTURES):
    raise errors.UserError(
        f'{path}: general.architecture is {architecture!r}',
        f'one of {", ".join(names.ARCHITECTURES)}',
        'use a GGUF of Gemma 1, 2 or 3 (text)')

  def value(key, kind=int):
    if not isinstance(metadata.get(key), kind):
      got = repr(metadata[key])[:40] if key in metadata else 'missing'
      raise errors.UserError(
          f'{path}: metadata key {key} is {got}',
          'the keys that llama.cpp writes for Gemma',
          'use a GGUF made by llama.cpp or by this project')
    return metadata[key]

  layers = value(f'{architecture}.block_count')
  if not 0 < layers <= n_tensors:  # A layer has at least one tensor.
    raise errors.UserError(
        f'{path}: {architecture}.block_count is {layers}, with {n_tensors}'
        ' tensors', 'the number of its layers',
        'use a GGUF made by llama.cpp or by this project')
  generation = names.ARCHITECTURES[architecture]
  return names.make_weight_layout(
      generation=generation,
      layers=layers,
      vocab=len(value('tokenizer.ggml.tokens', list)),
      embed=value(f'{architecture}.embedding_length'),
      hidden=value(f'{architecture}.feed_forward_length'),
      heads=value(f'{architecture}.attention.head_count'),
      kv_heads=value(f'{architecture}.attention.head_count_kv'),
      head_dim=value(f'{architecture}.attention.key_length'),
      # Not in the file: the library has chosen the layout for each model. It is
      # (2, D, F) only in Gemma 1 and in Gemma 2 2B (26 layers).
      transposed_gating=generation == 3 or (generation == 2 and layers != 26),
  )


# Header ----------------------------------------------------------------------


def check_header(path: str | os.PathLike) -> None:
  """Checks that all sizes in the header lie within the file.

  The gguf package trusts these sizes: a damaged file of a kilobyte could make
  it loop over 2^60 elements or reserve as much memory. No tensor is read.
  Source of the format: github.com/ggml-org/ggml, docs/gguf.md.

  Raises:
    ValueError: A count or size reaches beyond the end of the file, tensors
      overlap, or the format has no such type.
  """
  if os.path.getsize(path) < 24:
    raise ValueError('it is shorter than any header')
  with open(path, 'rb') as file, mmap.mmap(
      file.fileno(), 0, access=mmap.ACCESS_READ) as data:
    _HeaderReader(data).check()


class _HeaderReader:
  """Reads a header in order and never beyond the end of the file."""

  def __init__(self, data):
    self._data = data
    self._position = 0
    self._byte_order = '<'

  def check(self):
    if self._take(4) != b'GGUF':
      raise ValueError('it does not begin with GGUF')
    # In the other byte order the version's low half is 0.
    if not self._number('I') & 0xFFFF:
      self._byte_order = '>'
    n_tensors, n_keys = self._number('Q'), self._number('Q')
    alignment = 32
    for _ in range(n_keys):
      key, kind = self._text(), self._number('I')
      if key == b'general.alignment' and kind == 4:
        alignment = self._number('I')
      else:
        self._skip_value(kind)
    tensors = [self._tensor() for _ in range(n_tensors)]
    if alignment <= 0 or alignment & (alignment - 1):
      raise ValueError(f'its alignment is {alignment}')
    self._check_tensors(tensors, -(-self._position // alignment) * alignment)

  def _skip(self, n):
    if self._position + n > len(self._data):
      raise ValueError(
          f'{n} bytes are announced at byte {self._position} of'
          f' {len(self._data)}')
    self._position += n

  def _take(self, n):
    start = self._position
    self._skip(n)
    return self._data[start:start + n]

  def _number(self, kind):
    data = self._take(4 if kind == 'I' else 8)
    return struct.unpack(self._byte_order + kind, data)[0]

  def _text(self):
    return self._take(self._number('Q'))

  def _skip_value(self, kind):
    n = 1
    if kind == _ARRAY:  # No model has arrays of arrays.
      kind, n = self._number('I'), self._number('Q')
    if kind == _STRING:
      for _ in range(n):
        self._skip(self._number('Q'))
    elif kind in _SCALARS:
      self._skip(n * _SCALARS[kind])
    else:
      raise ValueError(f'its header has a value of type {kind}')

  def _tensor(self):
    """Returns (name, start, bytes); the first tensor starts at 0."""
    import gguf

    name, n_dimensions = self._text(), self._number('I')
    if not 0 < n_dimensions <= _MAX_DIMENSIONS:
      raise ValueError(f'tensor {name!r} has {n_dimensions} dimensions')
    shape = [self._number('Q') for _ in range(n_dimensions)]
    kind, start = self._number('I'), self._number('Q')
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[
        gguf.GGMLQuantizationType(kind)]
    n = math.prod(shape)
    if not n or shape[0] % per_block:
      raise ValueError(f'tensor {name!r} has the shape {shape[::-1]}')
    return name, start, n // per_block * block_bytes

  def _check_tensors(self, tensors, first):
    end = 0
    for name, start, n_bytes in sorted(tensors, key=lambda t: t[1]):
      if start < end:
        raise ValueError(f'tensor {name!r} begins within another')
      end = start + n_bytes
      if first + end > len(self._data):
        raise ValueError(f'tensor {name!r} ends at byte {first + end} of'
                         f' {len(self._data)}')
