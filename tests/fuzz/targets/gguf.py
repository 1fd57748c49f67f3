"""GGUF files with their arrays and tokenizer.

A case is the file. The result must be that of an independent reader, written
here from the description of the format.
"""

import functools
import io
import os
import pathlib
import struct
import tempfile
import types

import gguf
from hypothesis import strategies as st
import numpy as np

from fuzz import judging
from gemma_sft import errors
from gemma_sft.weights import architecture
from gemma_sft.weights import gguf_file
from gemma_sft.weights import names
from gemma_sft.weights import tokenizer_file

_SIZES = {'block_count': 1, 'embedding_length': 8, 'feed_forward_length': 8,
          'attention.head_count': 2, 'attention.head_count_kv': 1,
          'attention.key_length': 4, 'attention.value_length': 4,
          'attention.sliding_window': 4}
# What `check_gguf_metadata` compares with.
_CONFIG = types.SimpleNamespace(
    attention_types=[None], embed_dim=8, hidden_dim=8, num_heads=2,
    num_kv_heads=1, head_dim=4, global_base_frequency=1e6,
    local_base_frequency=1e4, global_scale_factor=1.0,
    attn_logits_soft_cap=None, final_logit_softcap=None, sliding_window_size=4,
    use_qk_norm=True, use_post_attn_norm=True)
_SCALARS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?',
            10: 'Q', 11: 'q', 12: 'd'}
_STRING, _ARRAY = 8, 9


def check(case: bytes, folder: str) -> None:
  """Opens, reads all tensors and rebuilds the tokenizer."""
  path = os.path.join(folder, 'case.gguf')
  with open(path, 'wb') as file:
    file.write(case)
  try:
    opened = gguf_file.open_gguf(path)
    arrays = {name: opened.read(name) for name in opened.shapes}
  except errors.UserError as error:
    judging.check_place(error, 'case.gguf')
    return
  wanted = _read(case)
  if arrays.keys() != wanted.keys():
    raise judging.Loss(f'{sorted(wanted)} became {sorted(arrays)}')
  for name, array in wanted.items():
    if array is not None and not np.array_equal(
        array, arrays[name], equal_nan=True):
      raise judging.Loss(f'{name} has other values')
  dict(names.to_library(opened.layout, 'gguf', arrays.__getitem__))
  for use in (
      lambda: tokenizer_file.from_gguf(opened.metadata, path),
      lambda: architecture.check_gguf_metadata(
          opened.metadata, _CONFIG, path)):
    try:
      use()
    except errors.UserError as error:
      judging.check_place(error, 'case.gguf')


def _read(data):
  """Returns {name: array}, with None for types that are not decoded here."""
  stream = io.BytesIO(data)

  def take(kind):
    return struct.unpack('<' + kind, stream.read(struct.calcsize(kind)))[0]

  def text():
    return stream.read(take('Q')).decode()

  def value(kind):
    if kind == _STRING:
      return text()
    if kind == _ARRAY:
      inner, n = take('I'), take('Q')
      return [value(inner) for _ in range(n)]
    return take(_SCALARS[kind])

  stream.read(8)
  n_tensors, n_keys = take('Q'), take('Q')
  metadata = {text(): value(take('I')) for _ in range(n_keys)}
  infos = []
  for _ in range(n_tensors):
    name = text()
    shape = [take('Q') for _ in range(take('I'))]
    infos.append((name, shape[::-1], take('I'), take('Q')))
  alignment = metadata.get('general.alignment', 32)
  start = -(-stream.tell() // alignment) * alignment
  return {name: _decode(data[start + offset:], shape, kind)
          for name, shape, kind, offset in infos}


def _decode(data, shape, kind):
  n = int(np.prod(shape))
  if kind in (0, 1):
    dtype = (np.float32, np.float16)[kind]
    return np.frombuffer(data, dtype, n).reshape(shape).astype(np.float32)
  if kind == 8:  # Blocks of 32: a scale in f16, then the integers.
    blocks = np.frombuffer(
        data, [('d', '<f2'), ('q', 'i1', 32)], n // 32)
    values = blocks['d'].astype(np.float32)[:, None] * blocks['q']
    return values.reshape(shape)
  return None


def _write(kind, generation=3, embed=8):
  architecture = {v: k for k, v in names.ARCHITECTURES.items()}[generation]
  sizes = _SIZES | {
      'embedding_length': embed, 'feed_forward_length': embed,
      'attention.key_length': embed // 2, 'attention.value_length': embed // 2}
  writer = gguf.GGUFWriter(None, architecture)
  for key, value in sizes.items():
    writer.add_uint32(f'{architecture}.{key}', value)
  writer.add_float32(f'{architecture}.attention.layer_norm_rms_epsilon', 1e-6)
  writer.add_float32(f'{architecture}.rope.freq_base', 1e6)
  pieces = ['<pad>', '<eos>', '<bos>', '<unk>', '<end_of_turn>', 'é']
  writer.add_string('tokenizer.ggml.model', 'llama')
  writer.add_array('tokenizer.ggml.tokens', pieces)
  writer.add_array('tokenizer.ggml.scores', [-1.0] * len(pieces))
  writer.add_array('tokenizer.ggml.token_type', [3, 3, 3, 2, 4, 1])
  for i, name in enumerate(('padding', 'eos', 'bos', 'unknown')):
    writer.add_uint32(f'tokenizer.ggml.{name}_token_id', i)
  layout = names.make_weight_layout(
      generation=generation, layers=1, vocab=len(pieces), embed=embed,
      hidden=embed, heads=2, kv_heads=1, head_dim=embed // 2,
      transposed_gating=True)
  rng = np.random.default_rng(0)
  for name, shape in names.file_shapes(layout, 'gguf').items():
    array = rng.normal(size=shape).astype(np.float32)
    stored = kind if array.ndim > 1 else gguf.GGMLQuantizationType.F32
    writer.add_tensor(
        name, gguf.quants.quantize(array, stored), raw_dtype=stored)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, 'a.gguf')
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@functools.cache
def seeds() -> list[bytes]:
  """Returns tiny models of two generations, one of them quantised."""
  kinds = gguf.GGMLQuantizationType
  return [_write(kinds.F16), _write(kinds.F16, generation=1),
          _write(kinds.Q8_0, embed=32)]


_NUMBERS = st.sampled_from(
    [0, 1, 2, 7, 8, 31, 32, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
     2**40, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1])


@st.composite
def _damaged(draw):
  """A good file with numbers, bytes or its end changed."""
  data = bytearray(draw(st.sampled_from(seeds())))
  for _ in range(draw(st.integers(1, 3))):
    if len(data) < 2:
      break
    at = draw(st.integers(0, len(data) - 1) | st.integers(0, min(
        len(data) - 1, 700)))
    choice = draw(st.integers(0, 4))
    if choice == 0:
      data[at:at + 8] = struct.pack('<Q', draw(_NUMBERS))
    elif choice == 1:
      data[at:at + 4] = struct.pack('<I', draw(_NUMBERS) % 2**32)
    elif choice == 2:
      data[at:at + 1] = draw(st.binary(min_size=1, max_size=2))
    elif choice == 3:
      del data[at:at + draw(st.integers(1, 64))]
    else:
      del data[max(at, 1):]
  return bytes(data)


STRATEGY = _damaged()
