"""GGUF files with their arrays and tokenizer.

A case is the file. The result must be that of an independent reader, written
here from the description of the format.
"""

import functools
import io
import pathlib
import struct
import tempfile

import numpy as np

from fuzz import judging
from fuzz import mutation
from fuzz import targets
from gemma_sft import model as model_lib
from gemma_sft.weights import architecture
from gemma_sft.weights import gguf_file
from gemma_sft.weights import gguf_writer
from gemma_sft.weights import load
from gemma_sft.weights import names
from gemma_sft.weights import tokenizer_file

_SCALARS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?',
            10: 'Q', 11: 'q', 12: 'd'}
_STRING, _ARRAY = 8, 9


def check(case: bytes, folder: str) -> None:
  """Opens, reads all tensors and rebuilds the tokenizer."""
  path = pathlib.Path(folder, 'case.gguf')
  path.write_bytes(case)
  arrays = None
  with judging.may_refuse('case.gguf'):
    opened = gguf_file.open_gguf(path)
    arrays = {name: opened.read(name) for name in opened.shapes}
  if arrays is None:
    return
  wanted = _read(case)
  if arrays.keys() != wanted.keys():
    raise judging.Loss(f'{sorted(wanted)} became {sorted(arrays)}')
  for name, array in wanted.items():
    if array is not None and not np.array_equal(
        array, arrays[name], equal_nan=True):
      raise judging.Loss(f'{name} has other values')
  dict(names.to_library(opened.layout, 'gguf', arrays.__getitem__))
  with judging.may_refuse('case.gguf'):
    tokenizer_file.from_gguf(opened.metadata, str(path))
  with judging.may_refuse('case.gguf'):
    architecture.check_gguf_metadata(
        opened.metadata, targets.model(num_layers=1).config, 3, str(path))


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
    infos.append((text(), [take('Q') for _ in range(take('I'))][::-1],
                  take('I'), take('Q')))
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


def _write(quantization, generation=3, embed=8):
  pieces = ['<pad>', '<eos>', '<bos>', '<unk>', '<end_of_turn>', 'é']
  tokenizer = {
      'model': 'llama', 'tokens': pieces, 'scores': [-1.0] * len(pieces),
      'token_type': [3, 3, 3, 2, 4, 1], 'padding_token_id': 0,
      'eos_token_id': 1, 'bos_token_id': 2, 'unknown_token_id': 3}
  model = model_lib.make_model(
      'custom', generation=generation, vocab_size=len(pieces), num_layers=1,
      embed_dim=embed, hidden_dim=embed, num_heads=2, num_kv_heads=1,
      head_dim=embed // 2, sliding_window=4)
  kind, metadata = architecture.gguf_metadata(
      model.config, generation, name='x', context_length=64)
  shapes = names.file_shapes(load.weight_layout(model), 'gguf')
  rng = np.random.default_rng(0)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, 'a.gguf')
    gguf_writer.write_model(
        path, architecture=kind, metadata=metadata
        | {f'tokenizer.ggml.{k}': v for k, v in tokenizer.items()},
        shapes=shapes, quantization=quantization, n_layers=1,
        tensors=((name, rng.normal(size=shape).astype(np.float32))
                 for name, shape in shapes.items()))
    return path.read_bytes()


@functools.cache
def seeds() -> list[bytes]:
  """Returns tiny models of two generations, one of them quantised."""
  return [_write('f16'), _write('f16', generation=1), _write('q8_0', embed=32)]


STRATEGY = mutation.strategy(seeds)
