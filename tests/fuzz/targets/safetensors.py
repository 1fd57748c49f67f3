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
from safetensors import numpy as safetensors_numpy

from fuzz import judging
from fuzz import mutation
from fuzz import targets
from gemma_sft.weights import architecture
from gemma_sft.weights import safetensors_file

_DTYPES = {'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16,
           'F64': np.float64, 'I64': np.int64, 'I32': np.int32, 'I16': np.int16,
           'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_, 'U16': np.uint16,
           'U32': np.uint32, 'U64': np.uint64, 'C64': np.complex64}
_INDEX = {'weight_map': {'model.norm.weight': 'a.safetensors',
                         'model.embed_tokens.weight': 'a.safetensors'}}

_GOOD = safetensors_numpy.save({
    'model.norm.weight': np.arange(4, dtype=np.float32),
    'model.embed_tokens.weight': np.arange(24).reshape(6, 4).astype(
        ml_dtypes.bfloat16)}, {'format': 'pt'})


@functools.cache
def _config():
  return architecture.hf_config(
      targets.model().config, 3, vocab_size=8, dtype='float32', eos_ids=[1],
      bos_id=2, pad_id=0)


def _case(kind, document):
  return kind + b'\n' + json.dumps(document).encode()


def check(case: bytes, folder: str) -> None:
  """Opens the folder, reads its tensors and compares its config."""
  kind, _, data = case.partition(b'\n')
  name = {b'index': safetensors_file.INDEX, b'config': 'config.json'}.get(
      kind, 'a.safetensors')
  # ../other.safetensors is outside of the folder and must not be read.
  parts = dict.fromkeys(('a.safetensors', '../other.safetensors'), _GOOD) | {
      'config.json': json.dumps(_config()).encode()} | {name: data}
  inside = pathlib.Path(folder, 'hf', 'model')
  shutil.rmtree(inside, ignore_errors=True)
  inside.mkdir(parents=True)
  for file, content in parts.items():
    (inside / file).write_bytes(content)
  arrays = None
  with judging.may_refuse('hf/model'):
    opened = safetensors_file.open_folder(inside)
    arrays = {name: opened.read(name) for name in opened.shapes}
  if arrays is None:
    return
  files = {os.path.dirname(file) for file, _ in opened._sources.values()}
  if files - {str(inside)}:
    raise judging.Loss(f'read outside of the folder: {files}')
  _compare(arrays, _read(parts['a.safetensors']))
  with judging.may_refuse('hf/model'):
    architecture.check_hf_config(
        opened.config, targets.model().config, 3, 'hf/model/config.json')


def _read(data):
  """Returns {name: array}, read as the format is described."""
  n, = struct.unpack('<Q', data[:8])
  header = json.loads(data[8:8 + n])
  header.pop('__metadata__', None)
  return {name: np.frombuffer(
      data[8 + n:][slice(*entry['data_offsets'])], _DTYPES[entry['dtype']]
  ).reshape(entry['shape']) for name, entry in header.items()}


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
  towers = safetensors_numpy.save({
      'language_model.model.norm.weight': np.ones((2, 2), np.float16),
      'vision_tower.x': np.ones(1, np.float32)})
  wrapped = {'model_type': 'gemma3', 'text_config': _config()}
  return [b'model\n' + _GOOD, b'model\n' + towers, _case(b'index', _INDEX),
          _case(b'config', _config()), _case(b'config', wrapped)]


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


def _mutate(case, max_size, seed):
  kind, _, text = case.partition(b'\n')
  return kind + b'\n' + mutation.mutate(text, max_size, seed)


STRATEGY = st.one_of(
    _headers(), mutation.strategy(lambda: seeds()[2:], _mutate),
    st.sampled_from((
        '../other.safetensors', '/etc/passwd', '', '.', '..', 'a.safetensors/',
        './a.safetensors', 'a\0', '\ud800')).map(
            lambda name: _case(b'index', {
                'weight_map': {'model.norm.weight': name}})))
