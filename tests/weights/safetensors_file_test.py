"""Hugging Face folders: intact ones are read, others are refused."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from gemma_sft import errors
from gemma_sft.weights import safetensors_file

_SHAPES = {'model.embed_tokens.weight': (6, 4), 'model.norm.weight': (4,),
           'model.layers.0.mlp.down_proj.weight': (4, 8)}


def _arrays(seed=0):
  rng = np.random.default_rng(seed)
  return {name: rng.normal(size=shape).astype(np.float32)
          for name, shape in _SHAPES.items()}


def _write(folder, arrays, *, dtype='float32', max_bytes=1_000_000):
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text('{"model_type": "gemma3_text"}')
  safetensors_file.write_model(
      folder, iter(arrays.items()), {n: a.shape for n, a in arrays.items()},
      dtype=dtype, max_bytes=max_bytes)
  return folder


def _refused(folder, message):
  with pytest.raises(errors.UserError, match=message):
    safetensors_file.open_folder(folder)


def _open(path, arrays, **options):
  return safetensors_file.open_folder(_write(path / 'm', arrays, **options))


@pytest.mark.parametrize('max_bytes, files', [
    (1_000_000, ['model.safetensors']),
    # 96, 16 and 128 bytes: the first two share a file.
    (128, ['model-00001-of-00002.safetensors',
           'model-00002-of-00002.safetensors']),
    (1, [f'model-0000{i}-of-00003.safetensors' for i in (1, 2, 3)])])
def test_round_trip_in_shards(tmp_path, max_bytes, files):
  arrays = _arrays()
  folder = _write(tmp_path / 'm', arrays, max_bytes=max_bytes)
  assert sorted(p.name for p in folder.glob('*.safetensors')) == files
  opened = safetensors_file.open_folder(folder)
  assert opened.shapes == _SHAPES
  for name, array in arrays.items():
    np.testing.assert_array_equal(opened.read(name), array)
  if len(files) > 1:
    index = json.loads((folder / safetensors_file.INDEX).read_text())
    assert index['metadata']['total_size'] == 4 * (24 + 4 + 32)
    assert set(index['weight_map']) == set(_SHAPES)


@pytest.mark.parametrize('dtype', safetensors_file.DTYPES)
def test_dtypes(tmp_path, dtype):
  arrays = _arrays()
  opened = _open(tmp_path, arrays, dtype=dtype)
  for name, array in arrays.items():
    found = opened.read(name)
    assert found.dtype == safetensors_file.DTYPES[dtype]
    np.testing.assert_array_equal(found, array.astype(found.dtype))
  assert safetensors_file.DTYPES['bfloat16'] == ml_dtypes.bfloat16


@pytest.mark.parametrize('prefix', ['language_model.', 'model.language_model.'])
def test_the_text_model_of_a_multimodal_checkpoint(tmp_path, prefix):
  arrays = _arrays()
  inner = 'model.' if prefix.startswith('model.') else ''
  renamed = {prefix + n.removeprefix(inner): a for n, a in arrays.items()}
  for tower in ('vision_tower.x.weight', 'model.vision_tower.x.weight',
                'multi_modal_projector.mm_input_projection_weight'):
    renamed[tower] = np.zeros(3, np.float32)
  opened = _open(tmp_path, renamed)
  assert opened.shapes == _SHAPES
  np.testing.assert_array_equal(
      opened.read('model.norm.weight'), arrays['model.norm.weight'])


def test_a_tied_head_is_ignored_and_another_one_refused(tmp_path):
  arrays = _arrays()
  arrays['lm_head.weight'] = arrays['model.embed_tokens.weight'].copy()
  assert _open(tmp_path / 'a', arrays).shapes == _SHAPES
  arrays['lm_head.weight'][5, 3] += 1
  _refused(_write(tmp_path / 'b', arrays), 'lm_head.weight is not the emb')


_WHOLE = safetensors_numpy.save(_arrays(), {'format': 'pt'})


@pytest.mark.parametrize('data, message', [
    *((_WHOLE[:keep], f'it has {keep} bytes') for keep in (0, 4, 40, 200)),
    # A header of an absurd size, which is not allocated.
    (b'\xff' * 7 + b'\x7f' + b'{}', 'cannot be read')])
def test_damaged_file(tmp_path, data, message):
  folder = _write(tmp_path / 'm', _arrays())
  (folder / 'model.safetensors').write_bytes(data)
  _refused(folder, message)


def test_missing_shard_config_and_listed_tensor(tmp_path):
  folder = _write(tmp_path / 'm', _arrays(), max_bytes=1)
  index = folder / safetensors_file.INDEX
  listed = json.loads(index.read_text())
  listed['weight_map']['model.extra.weight'] = (
      'model-00001-of-00003.safetensors')
  index.write_text(json.dumps(listed))
  _refused(folder, 'lists model.extra.weight')
  (folder / 'model-00002-of-00003.safetensors').unlink()
  _refused(folder, 'it has 0 bytes')
  (folder / 'config.json').unlink()
  _refused(folder, 'config.json')


def test_a_tensor_in_two_files(tmp_path):
  folder = _write(tmp_path / 'm', _arrays())
  safetensors_file.write_file(
      folder / 'old.safetensors', {'model.norm.weight': np.zeros(4)})
  _refused(folder, r'model\.safetensors and in old')


def test_tensors_out_of_order_are_not_written(tmp_path):
  arrays = _arrays()
  (tmp_path / 'm').mkdir()
  with pytest.raises(ValueError, match='got model'):
    safetensors_file.write_model(
        tmp_path / 'm', iter(reversed(arrays.items())), _SHAPES,
        dtype='float32', max_bytes=1_000_000)


def test_a_file_has_the_permissions_of_other_files(tmp_path):
  other, ours = tmp_path / 'other', tmp_path / 'a.safetensors'
  other.touch()
  safetensors_file.write_file(ours, {'a': np.zeros(2, np.float32)})
  assert ours.stat().st_mode == other.stat().st_mode
