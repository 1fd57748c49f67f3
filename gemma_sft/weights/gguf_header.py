"""The sizes that a GGUF's header speaks of, held against the file's own.

The gguf package believes them: a length in a damaged file of a kilobyte lets it
loop over 2^60 elements, or reserve as much memory.
"""

import math
import mmap
import os
import struct

# Value types of the format and their bytes.
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4  # ggml's.


def check(path: str | os.PathLike) -> None:
  """Walks the header; nothing is read of the tensors.

  Source of the layout: github.com/ggml-org/ggml, docs/gguf.md.

  Raises:
    ValueError: A count or size reaches beyond the file's end, tensors overlap,
      or a type is none of the format's.
  """
  if os.path.getsize(path) < 24:
    raise ValueError('it is shorter than any header')
  with open(path, 'rb') as file, mmap.mmap(
      file.fileno(), 0, access=mmap.ACCESS_READ) as data:
    _Walk(data).run()


class _Walk:
  """A position in the header that never leaves the file."""

  def __init__(self, data):
    self._data = data
    self._at = 0
    self._order = '<'

  def run(self):
    if self._data[:4] != b'GGUF':
      raise ValueError('it does not begin with GGUF')
    self._at = 4
    # Of a file of the other byte order the version's low half is 0.
    if not self._number('I') & 0xFFFF:
      self._order = '>'
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
    self._check_places(tensors, -(-self._at // alignment) * alignment)

  def _skip(self, n):
    if self._at + n > len(self._data):
      raise ValueError(
          f'{n} bytes are announced at byte {self._at} of {len(self._data)}')
    self._at += n

  def _number(self, kind):
    start = self._at
    self._skip(4 if kind == 'I' else 8)
    return struct.unpack_from(self._order + kind, self._data, start)[0]

  def _text(self):
    n = self._number('Q')
    start = self._at
    self._skip(n)
    return self._data[start:start + n]

  def _skip_value(self, kind):
    if kind == _STRING:
      self._skip(self._number('Q'))
    elif kind == _ARRAY:
      self._skip_array()
    else:
      self._skip(_size(kind))

  def _skip_array(self):
    kind, n = self._number('I'), self._number('Q')
    if kind != _STRING:  # Of arrays in arrays there are none in any model.
      self._skip(n * _size(kind))
      return
    for _ in range(n):
      self._skip(self._number('Q'))

  def _tensor(self):
    """Returns (name, start, bytes), the start relative to all tensors'."""
    import gguf

    name = self._text()
    n_dimensions = self._number('I')
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

  def _check_places(self, tensors, first):
    end = 0
    for name, start, n_bytes in sorted(tensors, key=lambda t: t[1]):
      if start < end:
        raise ValueError(f'tensor {name!r} begins within another')
      end = start + n_bytes
      if first + end > len(self._data):
        raise ValueError(f'tensor {name!r} ends at byte {first + end} of'
                         f' {len(self._data)}')


def _size(kind):
  if kind not in _SCALARS:
    raise ValueError(f'its header has a value of type {kind}')
  return _SCALARS[kind]
