"""Writes GGUF models, quantised tensor by tensor, and LoRA adapters.

The types and bytes are those of llama.cpp's own quantiser without an importance
matrix, for a dense model with a tied output head.
"""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import dataclasses
import os
import pathlib
import re
from typing import Any

import gguf
from gguf import quants
import numpy as np

from gemma_sft import errors
from gemma_sft.weights import adapters as adapters_lib
from gemma_sft.weights import names

# Elements that are quantised and written together: 4 MiB as f32. gguf's numpy
# kernels need about ten times as much.
_CHUNK_ELEMENTS = 1 << 20

_Type = gguf.GGMLQuantizationType
_K_TYPES = (_Type.Q4_K, _Type.Q5_K, _Type.Q6_K)
# llama.cpp's types for rows that cannot be divided into blocks of 256.
_FALLBACKS = {
    _Type.Q4_K: _Type.Q5_0, _Type.Q5_K: _Type.Q5_1, _Type.Q6_K: _Type.Q8_0
}
_VALUE_TYPES = {
    str: gguf.GGUFValueType.STRING,
    bool: gguf.GGUFValueType.BOOL,
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT32,
}
# Bounds on ||dequantise(quantise(w)) - w|| / ||w|| (Frobenius): half a unit in
# the last place for the floating-point types, for the others 1.5 times the
# largest error measured on normal, uniform, Laplace and Student-t (4 degrees)
# draws and on all matrices of Gemma 3 270M. They hold for bell-shaped weights
# with a standard deviation of at least 0.001 (Gemma: 0.01 to 0.04); below that,
# the f16 scales of the blocks lose digits. For a tensor of the wrong layer or
# axis order the number is about 1.4.
MAX_RELATIVE_ERROR = {
    _Type.F32: 0.0,
    _Type.F16: 2**-11,
    _Type.BF16: 2**-8,
    _Type.Q8_0: 0.011,  # Measured: 0.0073.
    _Type.Q6_K: 0.034,  # 0.0228
    _Type.Q5_K: 0.066,  # 0.0439
    _Type.Q5_1: 0.072,  # 0.0477
    _Type.Q5_0: 0.087,  # 0.0579
    _Type.Q4_K: 0.137,  # 0.0909
    _Type.Q4_0: 0.229,  # 0.1522
}
_EMBEDDINGS = ('token_embd.weight', 'per_layer_token_embd.weight')


@dataclasses.dataclass(frozen=True)
class Quantization:
  """The value of `general.file_type` and the types of a file's matrices."""

  file_type: int
  matrix: _Type
  sensitive: _Type  # Of attn_v and ffn_down in half of the layers.
  embedding: _Type  # Of the embedding, which is also the output head.


def _plain(file_type, matrix):
  return Quantization(file_type, matrix, matrix, matrix)


QUANTIZATIONS: Mapping[str, Quantization] = {
    'f32': _plain(0, _Type.F32),
    'f16': _plain(1, _Type.F16),
    'bf16': _plain(32, _Type.BF16),
    'q8_0': _plain(7, _Type.Q8_0),
    'q4_0': Quantization(2, _Type.Q4_0, _Type.Q4_0, _Type.Q6_K),
    'q4_k_m': Quantization(15, _Type.Q4_K, _Type.Q6_K, _Type.Q6_K),
    'q5_k_m': Quantization(17, _Type.Q5_K, _Type.Q6_K, _Type.Q6_K),
    'q6_k': _plain(18, _Type.Q6_K),
}


def tensor_types(
    shapes: Mapping[str, names.Shape], quantization: str, n_layers: int
) -> dict[str, _Type]:
  """Returns name -> GGML type of every tensor, as llama.cpp chooses them.

  If rows cannot be divided into blocks of 256, Q4_K becomes Q5_0, Q5_K Q5_1 and
  Q6_K Q8_0; if not into blocks of 32 either, F16.

  Raises:
    UserError: The quantization is none of `QUANTIZATIONS`.
  """
  if quantization not in QUANTIZATIONS:
    raise errors.UserError(
        f'quantization {quantization!r}',
        f'one of {", ".join(QUANTIZATIONS)}',
        f'{errors.nearest(quantization, tuple(QUANTIZATIONS))}choose one of'
        ' these')
  mix = QUANTIZATIONS[quantization]
  # llama.cpp counts only the layers that have an attn_v: not those that use
  # their keys as values.
  values = sorted(map(_layer, filter(_is_value, shapes)))
  types = {}
  for name, shape in shapes.items():
    wanted = mix.matrix
    if not _is_quantized(name, shape):
      wanted = _Type.F32
    elif name in _EMBEDDINGS:
      wanted = mix.embedding
    elif _is_value(name):
      if _is_sensitive(values.index(_layer(name)), len(values)):
        wanted = mix.sensitive
    elif name.endswith('.ffn_down.weight'):
      if _is_sensitive(_layer(name), n_layers):
        wanted = mix.sensitive
    types[name] = _fitting(wanted, shape[-1])
  return types


def _is_quantized(name: str, shape: names.Shape) -> bool:
  # Gemma 4's per_layer_model_proj is small, and every layer's input needs it.
  return (len(shape) > 1 and name.endswith('weight')
          and '_norm.weight' not in name
          and 'per_layer_model_proj' not in name)


def _is_value(name: str) -> bool:
  return name.endswith('.attn_v.weight')


def _layer(name: str) -> int:
  return int(re.match(r'blk\.(\d+)\.', name)[1])


def _is_sensitive(index: int, count: int) -> bool:
  """Whether a layer is in the first or last eighth, or a third of the rest."""
  eighth = count // 8
  return (index < eighth or index >= 7 * count // 8
          or (index - eighth) % 3 == 2)


def _fitting(wanted: _Type, n_columns: int) -> _Type:
  if n_columns % gguf.GGML_QUANT_SIZES[wanted][0]:
    wanted = _FALLBACKS.get(wanted, wanted)
  if n_columns % gguf.GGML_QUANT_SIZES[wanted][0]:
    return _Type.F16
  return wanted


def n_bytes(
    shapes: Mapping[str, names.Shape], quantization: str, n_layers: int
) -> int:
  """Returns the bytes of all tensors in the file, with their padding.

  The metadata are not included: about 7 MB for a vocabulary of 262144.

  Raises:
    UserError: The quantization is unknown.
  """
  types = tensor_types(shapes, quantization, n_layers)
  return sum(
      gguf.GGUFWriter.ggml_pad(
          _tensor_bytes(shape, types[name]), gguf.GGUF_DEFAULT_ALIGNMENT)
      for name, shape in shapes.items())


def _tensor_bytes(shape: names.Shape, kind: _Type) -> int:
  return int(np.prod(quants.quant_shape_to_byte_shape(shape, kind), dtype=int))


def write_model(
    path: str | os.PathLike,
    *,
    architecture: str,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, names.Shape],
    tensors: Iterator[tuple[str, np.ndarray]],
    quantization: str,
    n_layers: int,
) -> None:
  """Writes a model, holding one tensor and a few MiB at a time.

  Args:
    path: The file to write; it is removed if writing fails.
    architecture: A key of `names.ARCHITECTURES`.
    metadata: Key -> str, bool, int (uint32), float (float32) or a list of one
      of these (int32 for int). `general.file_type` and the like are added.
    shapes: GGUF name -> shape in numpy's order (`names.file_shapes`).
    tensors: (name, array of any float type), in the order of `shapes`.
    quantization: A key of `QUANTIZATIONS`.
    n_layers: The number of blocks.

  Raises:
    UserError: The quantization is unknown or needs a missing package, or a
      weight is not finite or too large for F16.
    ValueError: The tensors are not those of `shapes`.
  """
  types = tensor_types(shapes, quantization, n_layers)
  if not set(_K_TYPES).isdisjoint(types.values()):
    _import_libgguf()  # Before the first byte is written.
  own = {'general.type': 'model',
         'general.file_type': QUANTIZATIONS[quantization].file_type}
  _write(path, architecture, metadata, own, shapes, types, tensors)


def write_adapter(
    path: str | os.PathLike,
    *,
    architecture: str,
    alpha: float,
    adapters: Iterable[adapters_lib.TensorAdapter],
) -> None:
  """Writes a LoRA adapter for `llama-server --lora`, in f32.

  llama.cpp adds alpha / r * b @ a to a weight. For rank-stabilised LoRA pass
  alpha * sqrt(r), because the file has no key for it.

  Raises:
    UserError: A weight is not finite.
  """
  tensors = {f'{adapter.name}.lora_{side}': getattr(adapter, side)
             for adapter in adapters for side in 'ab'}
  if not tensors:
    raise ValueError('an adapter without tensors')
  own = {
      'general.type': 'adapter',
      'general.file_type': QUANTIZATIONS['f32'].file_type,
      'adapter.type': 'lora',
      'adapter.lora.alpha': float(alpha),
  }
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  types = dict.fromkeys(tensors, _Type.F32)
  _write(path, architecture, {}, own, shapes, types, tensors.items())


# The file --------------------------------------------------------------------


def _write(path, architecture, metadata, own, shapes, types, tensors) -> None:
  path = pathlib.Path(path)
  writer = gguf.GGUFWriter(path, architecture)
  own = own | {
      'general.architecture': architecture,
      'general.quantization_version': gguf.GGML_QUANT_VERSION,
  }
  for key, value in (dict(metadata) | own).items():
    if key in own and metadata.get(key, value) != value:
      raise ValueError(f'{key} is {metadata[key]!r} and {value!r}')
    if key != 'general.architecture':  # The writer's constructor adds it.
      writer.add_key_value(key, value, *_value_type(key, value))
  for name, shape in shapes.items():
    writer.add_tensor_info(
        name, shape, np.dtype(np.float32), _tensor_bytes(shape, types[name]),
        raw_dtype=types[name],
    )
  try:
    with contextlib.closing(writer):
      writer.write_header_to_file()
      writer.write_kv_data_to_file()
      writer.write_ti_data_to_file()
      _write_tensors(writer, shapes, types, tensors)
  except BaseException:
    path.unlink(missing_ok=True)  # An incomplete file would look complete.
    raise


def _value_type(key: str, value: Any):
  """Returns the GGUF type of a value, and of its elements."""
  kinds = set(map(type, value if isinstance(value, list) else [value]))
  if len(kinds) != 1 or not kinds <= _VALUE_TYPES.keys():
    raise ValueError(f'{key}: no GGUF type for {sorted(map(str, kinds))}')
  kind = _VALUE_TYPES[kinds.pop()]
  if not isinstance(value, list):
    return kind, None
  if kind == gguf.GGUFValueType.UINT32:
    kind = gguf.GGUFValueType.INT32  # llama.cpp requires it of token types.
  return gguf.GGUFValueType.ARRAY, kind


def _write_tensors(writer, shapes, types, tensors) -> None:
  file = writer.fout[0]
  # `write_tensor_data` would need a whole tensor in memory.
  writer.write_padding(file, file.tell())
  expected = iter(shapes.items())
  for name, array in tensors:
    wanted, shape = next(expected, ('no further tensor', ()))
    if name != wanted or array.shape != tuple(shape):
      raise ValueError(
          f'got {name} of shape {array.shape}, not {wanted} of {tuple(shape)}')
    _write_rows(file, name, array, types[name])
    writer.write_padding(file, _tensor_bytes(shape, types[name]))
    del array  # Or it would be in memory while the next one is made.
  if (missing := next(expected, None)) is not None:
    raise ValueError(f'got no {missing[0]}')


def _write_rows(file, name: str, array: np.ndarray, kind: _Type) -> None:
  rows = array.reshape(-1, array.shape[-1])
  n_rows = max(1, _CHUNK_ELEMENTS // rows.shape[-1])
  for start in range(0, len(rows), n_rows):
    chunk = np.ascontiguousarray(rows[start : start + n_rows], np.float32)
    if not np.isfinite(chunk).all():
      raise errors.UserError(
          f'tensor {name} has values that are not finite',
          'weights that are all finite numbers',
          'export an earlier checkpoint, from before the loss diverged')
    largest, limit = np.abs(chunk).max(), np.finfo(np.float16).max
    if kind == _Type.F16 and largest > limit:
      raise errors.UserError(
          f'tensor {name} has a value of size {largest:g}',
          f'at most {limit:g}, the largest number of f16',
          'export bf16 or f32')
    quantize = (_import_libgguf().quantize_rows if kind in _K_TYPES
                else quants.quantize)
    quantize(chunk, kind).tofile(file)


def _import_libgguf() -> Any:
  """Returns the kernels of the K types, which the gguf package lacks."""
  try:
    import libgguf  # Optional: only some exports need it.
  except ImportError as error:
    raise errors.UserError(
        f'this quantization needs the package libgguf ({error})',
        'libgguf, installed',
        'pip install gemma_sft[export], or choose f32, f16, bf16 or q8_0'
    ) from error
  return libgguf
