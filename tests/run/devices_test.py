"""What a config asks for meets what model and device have."""

import conftest
import jax.numpy as jnp
import pytest

from configs import slang as slang_config
from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft import sharding
from gemma_sft import train
from gemma_sft.inputs import splits
from gemma_sft.run import base
from gemma_sft.run import devices


def _model(generation):
  return model_lib.make_model(
      'custom', generation=generation, **conftest.DIMENSIONS)


def _attention(name, model):
  return devices.choose_attention(
      name, model, sharding.single_device_mesh(), dtype=jnp.float32, length=64,
      packed=True)


def test_rows_beyond_the_models_positions_are_refused():
  for model, limit in ((model_lib.make_model('gemma2_2b'), 8192),
                       (model_lib.make_model('gemma3_1b'), 32768)):
    base.check_length(limit, model)
    with pytest.raises(errors.UserError) as caught:
      base.check_length(limit + 1, model)
    assert str(limit) in caught.value.expected


def test_a_run_with_such_rows_stops_before_the_data(run_config, tmp_path):
  run_config.data.update(max_length=40_000, train='no such file')
  with pytest.raises(errors.UserError, match='max_length is 40000'):
    train.main(run_config, str(tmp_path / 'w'))


def test_layers_are_scanned_where_they_are_alike():
  assert devices.choose_layers('auto', _model(3))[0] == 'scan'
  assert devices.choose_layers('loop', _model(3))[0] == 'loop'
  assert devices.choose_layers('auto', _model(4))[0] == 'loop'
  with pytest.raises(errors.UserError, match='scan for a Gemma 4'):
    devices.choose_layers('scan', _model(4))


def test_a_kernel_that_the_device_lacks_is_named_with_what_auto_takes():
  with pytest.raises(errors.UserError) as caught:
    _attention('splash', _model(3))
  assert 'splash' in caught.value.got and 'TPU' in caught.value.got
  assert 'chunked' in caught.value.fix
  assert _attention('auto', _model(2))[0] == 'chunked'


def test_gemma_4_has_the_librarys_attention():
  assert _attention('auto', _model(4))[0] == 'einsum'
  with pytest.raises(errors.UserError, match='chunked for a Gemma 4'):
    _attention('chunked', _model(4))


def test_bfloat16_on_a_cpu_is_advised_against():
  dtype, why = devices.choose_dtype('bfloat16')
  assert dtype == jnp.bfloat16 and 'float32 is no slower' in why
  assert devices.choose_dtype('auto')[0] == jnp.float32


def test_the_first_attempt_of_the_slang_seed(monkeypatch):
  monkeypatch.chdir(conftest.ROOT)
  config = slang_config.get_config('attempt1')
  train = splits.read_split(config.data, 'train')
  assert len(train) == 150
  assert all(set(r.fields) == {'Slang', 'Description'} for r in train)
  # The limit is the training split's alone.
  whole = slang_config.get_config()
  assert len(splits.read_split(config.data, 'test')) == len(
      splits.read_split(whole.data, 'test'))
