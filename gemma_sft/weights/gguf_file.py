"""Reads a Gemma GGUF: metadata, dimensions and dequantised tensors."""

from collections.abc import Mapping
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from gemma_sft import errors
from gemma_sft.weights import gguf_header
from gemma_sft.weights import names

# Dequantised at once; bounds the scratch memory of gguf.quants.
_CHUNK_ELEMENTS = 1 << 22
# Which pairs Gemma 4 does not rotate.
_NO_WEIGHTS = ('rope_freqs.weight',)


@dataclasses.dataclass(frozen=True)
class GgufFile:
  """An opened GGUF.

  Attributes:
    architecture: A key of `names.ARCHITECTURES`.
    metadata: Every key of the header with its value, arrays as lists.
    layout: The library's paths and shapes of this model.
  """

  path: pathlib.Path
  architecture: str
  metadata: Mapping[str, Any]
  layout: names.Layout
  _tensors: Mapping[str, Any]

  @property
  def n_tensors(self) -> int:
    return len(self._tensors)

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
    # Row chunks, because `dequantize` holds every result twice.
    data = tensor.data.reshape(-1, tensor.data.shape[-1])
    array = np.empty((data.shape[0], shape[-1]), np.float32)
    n_rows = max(1, _CHUNK_ELEMENTS // shape[-1])
    for start in range(0, len(data), n_rows):
      chunk = data[start : start + n_rows]
      try:
        array[start : start + n_rows] = quants.dequantize(
            chunk, tensor.tensor_type
        )
      except NotImplementedError as error:
        raise errors.UserError(
            f'{self.path}: tensor {name} has type {tensor.tensor_type.name}',
            'a type that the gguf package can dequantise',
            'use a Q8_0, Q4_K_M, F16, BF16 or F32 file of this model',
        ) from error
    return array.reshape(shape)


def open_gguf(
    path: str | os.PathLike, layout: names.Layout | None = None
) -> GgufFile:
  """Opens a Gemma GGUF and checks it before any tensor is read.

  Reading the header of a 262144-token vocabulary takes about 15 seconds.

  Args:
    path: The file.
    layout: What it has to hold, tensors that are no weights aside. Without it
      the metadata tell, which they do for Gemma 1 to 3.

  Raises:
    UserError: Not a GGUF, cut short, another architecture, or its tensors are
      not those that its own metadata announce.
  """
  import gguf

  path = pathlib.Path(path)
  if not path.is_file():
    raise errors.UserError(
        f'{path}: no such file', 'a GGUF file', 'correct the path'
    )
  try:
    gguf_header.check(path)
    reader = gguf.GGUFReader(path)
    metadata = {
        key: field.contents()
        for key, field in reader.fields.items()
        if not key.startswith('GGUF.')
    }
  except Exception as error:  # The reader raises whatever numpy raises.
    raise errors.UserError(
        f'{path}: cannot be read as GGUF ({error}); it has'
        f' {path.stat().st_size} bytes',
        'a complete GGUF file',
        'download or copy it again: it is cut short, damaged or another format',
    ) from error
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  architecture = metadata.get('general.architecture')
  if layout is not None:
    return _checked(GgufFile(path, architecture, metadata, layout, {
        name: tensor for name, tensor in tensors.items()
        if name not in _NO_WEIGHTS}))
  if not isinstance(architecture, str) or (
      architecture not in names.ARCHITECTURES
  ):
    raise errors.UserError(
        f'{path}: general.architecture is {architecture!r}',
        f'one of {", ".join(names.ARCHITECTURES)}',
        'use a GGUF of Gemma 1, 2 or 3 (text)',
    )
  layout = _layout(path, architecture, metadata, len(tensors))
  return _checked(GgufFile(path, architecture, metadata, layout, tensors))


def _checked(file: GgufFile) -> GgufFile:
  names.check_shapes(
      file.shapes, names.file_shapes(file.layout, 'gguf'), str(file.path)
  )
  return file


def _shape(tensor) -> tuple[int, ...]:
  return tuple(int(size) for size in reversed(tensor.shape))


def _layout(
    path: pathlib.Path,
    architecture: str,
    metadata: Mapping[str, Any],
    n_tensors: int,
) -> names.Layout:
  def value(key, kind=int):
    if not isinstance(metadata.get(key), kind):
      got = repr(metadata[key])[:40] if key in metadata else 'missing'
      raise errors.UserError(
          f'{path}: metadata key {key} is {got}',
          'the keys that llama.cpp writes for Gemma',
          'use a GGUF made by llama.cpp or by this project',
      )
    return metadata[key]

  layers = value(f'{architecture}.block_count')
  if not 0 < layers <= n_tensors:  # Each layer has some.
    raise errors.UserError(
        f'{path}: {architecture}.block_count is {layers}, with {n_tensors}'
        ' tensors',
        'the number of its layers',
        'use a GGUF made by llama.cpp or by this project',
    )
  generation = names.ARCHITECTURES[architecture]
  return names.make_layout(
      generation=generation,
      layers=layers,
      vocab=len(value('tokenizer.ggml.tokens', list)),
      embed=value(f'{architecture}.embedding_length'),
      hidden=value(f'{architecture}.feed_forward_length'),
      heads=value(f'{architecture}.attention.head_count'),
      kv_heads=value(f'{architecture}.attention.head_count_kv'),
      head_dim=value(f'{architecture}.attention.key_length'),
      # The file does not say: the layout is the library's own choice per
      # model, (2, D, F) in Gemma 1 and in Gemma 2 2B (26 layers) only.
      transposed_gating=generation == 3 or (generation == 2 and layers != 26),
  )


def check_config(metadata: Mapping[str, Any], config: Any, where: str) -> None:
  """Compares a GGUF's metadata with a `gm.nn.config.TransformerConfig`.

  Shapes alone cannot tell a window, a rope base or a softcap. llama.cpp's
  defaults stand in for the keys that a file may leave out.

  Args:
    metadata: The GGUF's metadata; arrays are not needed.
    config: The config of a Gemma 1, 2 or 3.
    where: The file, for the message.

  Raises:
    UserError: Names the first key that differs.
  """
  architecture = metadata['general.architecture']
  generation = names.ARCHITECTURES[architecture]
  is_2 = generation == 2
  # Key: (llama.cpp's default, the config's value).
  expected = {
      'block_count': (None, len(config.attention_types)),
      'embedding_length': (None, config.embed_dim),
      'feed_forward_length': (None, config.hidden_dim),
      'attention.head_count': (None, config.num_heads),
      'attention.head_count_kv': (None, config.num_kv_heads),
      'attention.key_length': (None, config.head_dim),
      'attention.value_length': (None, config.head_dim),
      # The library's RMSNorm has no other.
      'attention.layer_norm_rms_epsilon': (None, 1e-6),
      'rope.freq_base': (1e4, config.global_base_frequency),
      'rope.scaling.factor': (1.0, config.global_scale_factor),
      'attn_logit_softcapping': (
          50.0 if is_2 else None, config.attn_logits_soft_cap
      ),
      'final_logit_softcapping': (
          30.0 if is_2 else None, config.final_logit_softcap
      ),
      'attention.sliding_window': (
          4096 if is_2 else None, config.sliding_window_size
      ),
  }
  if generation == 3:
    expected['rope.freq_base_swa'] = (1e4, config.local_base_frequency)
  if config.use_qk_norm != (generation == 3) or (
      config.use_post_attn_norm != (generation > 1)
  ):
    raise errors.UserError(
        f'{where}: general.architecture is {architecture}',
        'the generation of the configured model',
        'choose the model that these weights belong to, or other weights',
    )
  for key, (default, want) in expected.items():
    got = metadata.get(f'{architecture}.{key}', default)
    # Headers hold f32, configs hold doubles.
    if got != want and not (
        isinstance(got, (int, float))
        and want is not None
        and np.isclose(got, want, 1e-6, 0)
    ):
      raise errors.UserError(
          f'{where}: {architecture}.{key} is {got}',
          f'{want}, as in the configured model',
          'choose the model that these weights belong to, or other weights',
      )
