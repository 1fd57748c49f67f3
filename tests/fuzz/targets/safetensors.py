"""Hugging Face folders: config.json, an index and .safetensors files.

A case is a kind, a line feed and the content of one file: `model` for the
tensors, `index` for the list of shards, or `config`. The other files are good.
"""

import functools
import json
import os
import pathlib
import shutil
import struct

from hypothesis import strategies as st
import ml_dtypes
import numpy as np

from fuzz import judging
from fuzz import mutation
from gemma_sft import errors
from gemma_sft.weights import architecture
from gemma_sft.weights import safetensors_file

_DTYPES = {'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16,
           'F64': np.float64, 'I64': np.int64, 'I32': np.int32, 'I16': np.int16,
           'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_, 'U16': np.uint16,
           'U32': np.uint32, 'U64': np.uint64, 'C64': np.complex64}
_INDEX = {'weight_map': {'model.norm.weight': 'a.safetensors',
                         'model.embed_tokens.weight': 'a.safetensors'}}


def _file(tensors):
  """Returns a file of {name: (dtype, shape)} with increasing bytes."""
  header, data = {'__metadata__': {'format': 'pt'}}, b''
  for name, (dtype, shape) in tensors.items():
    size = int(np.prod(shape)) * np.dtype(_DTYPES[dtype]).itemsize
    header[name] = {'dtype': dtype, 'shape': shape,
                    'data_offsets': [len(data), len(data) + size]}
    data += bytes(i % 120 for i in range(size))
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  return struct.pack('<Q', len(text)) + text + data


_GOOD = _file({'model.norm.weight': ('F32', [4]),
               'model.embed_tokens.weight': ('BF16', [6, 4])})


@functools.cache
def _model():
  from gemma_sft import model

  return model.make_model(
      'custom', generation=3, vocab_size=8, num_layers=2, embed_dim=8,
      hidden_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, sliding_window=4)


@functools.cache
def _config():
  return json.dumps(architecture.hf_config(
      _model().config, 3, vocab_size=8, dtype='float32', eos_ids=[1],
      bos_id=2, pad_id=0))


def check(case: bytes, folder: str) -> None:
  """Opens the folder, reads its tensors and compares its config."""
  kind, _, data = case.partition(b'\n')
  parts = {'config.json': _config().encode(), 'a.safetensors': _GOOD}
  name = {b'index': safetensors_file.INDEX, b'config': 'config.json'}.get(
      kind, 'a.safetensors')
  parts[name] = data
  inside = pathlib.Path(folder, 'hf', 'model')
  shutil.rmtree(inside, ignore_errors=True)
  inside.mkdir(parents=True)
  # A file outside the folder, which must not be read.
  (inside.parent / 'other.safetensors').write_bytes(_GOOD)
  for file, content in parts.items():
    (inside / file).write_bytes(content)
  try:
    opened = safetensors_file.open_folder(inside)
    arrays = {name: opened.read(name) for name in opened.shapes}
  except errors.UserError as error:
    judging.check_place(error, 'hf/model')
    return
  files = {os.path.dirname(file) for file, _ in opened._sources.values()}
  if files - {str(inside)}:
    raise judging.Loss(f'read outside of the folder: {files}')
  _compare(arrays, _read(parts['a.safetensors']))
  try:
    architecture.check_hf_config(
        opened.config, _model().config, 3, 'hf/model/config.json')
  except errors.UserError as error:
    judging.check_place(error, 'hf/model')


def _read(data):
  """Returns {name: array}, read as the format is described."""
  n, = struct.unpack('<Q', data[:8])
  header = json.loads(data[8:8 + n])
  header.pop('__metadata__', None)
  arrays = {}
  for name, entry in header.items():
    start, end = entry['data_offsets']
    arrays[name] = np.frombuffer(
        data[8 + n:][start:end], _DTYPES[entry['dtype']]).reshape(
            entry['shape'])
  return arrays


def _compare(arrays, wanted):
  for name, array in wanted.items():
    if name not in arrays:
      if name.startswith(('lm_head', 'model.language', 'language')) or any(
          tower in name for tower in safetensors_file._NOT_TEXT):
        continue
      raise judging.Loss(f'{name} is missing')
    if array.tobytes() != arrays[name].tobytes() or (
        array.shape != arrays[name].shape):
      raise judging.Loss(f'{name} has other values')


def seeds() -> list[bytes]:
  """Returns good files of each kind."""
  towers = _file({'language_model.model.norm.weight': ('F16', [2, 2]),
                  'vision_tower.x': ('F32', [1])})
  wrapped = {'model_type': 'gemma3', 'text_config': json.loads(_config())}
  return [b'model\n' + _GOOD, b'model\n' + towers,
          b'index\n' + json.dumps(_INDEX).encode(),
          b'config\n' + _config().encode(),
          b'config\n' + json.dumps(wrapped).encode()]


_NUMBERS = st.sampled_from(
    [0, 1, 2, 7, 8, 16, 99_999_999, 2**31, 2**32, 2**62, 2**63, 2**64 - 1])
_DIMENSIONS = st.lists(st.integers(-1, 6) | _NUMBERS, max_size=4)


@st.composite
def _headers(draw):
  """A file whose header is JSON of roughly the right form."""
  names = st.sampled_from((
      'model.norm.weight', 'model.embed_tokens.weight', 'lm_head.weight',
      'language_model.model.norm.weight', '__metadata__', '../x', 'é'))
  entries = st.fixed_dictionaries({
      'dtype': st.sampled_from((*_DTYPES, 'F8_E4M3', 'F4', '', 3)),
      'shape': _DIMENSIONS | st.none(),
      'data_offsets': st.lists(
          st.integers(0, 64) | _NUMBERS, min_size=1, max_size=3)})
  text = json.dumps(draw(st.dictionaries(
      names, entries | st.text(max_size=3), max_size=3))).encode()
  length = len(text) if draw(st.integers(0, 3)) else draw(_NUMBERS)
  return b'model\n' + struct.pack('<Q', length) + text + draw(
      st.binary(max_size=64))


def _mutated(kind, text):
  return st.integers(0, 2**32).map(
      lambda seed: kind + b'\n' + mutation.mutate(text, 20_000, seed))


STRATEGY = st.one_of(
    _headers(), _mutated(b'index', json.dumps(_INDEX).encode()),
    st.deferred(lambda: _mutated(b'config', _config().encode())),
    st.deferred(lambda: _mutated(
        b'config', seeds()[-1].partition(b'\n')[2])),
    st.sampled_from((
        '../other.safetensors', '/etc/passwd', '', '.', '..', 'a.safetensors/',
        './a.safetensors', 'a\0', '\ud800')).map(
            lambda name: b'index\n' + json.dumps(
                {'weight_map': {'model.norm.weight': name}}).encode()))
