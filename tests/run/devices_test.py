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


@pytest.mark.parametrize('info, auto, why', (
    ('model name : X\nflags\t\t: sse amx_bf16 avx512_bf16\n', jnp.bfloat16,
     'this CPU has amx_bf16'),
    ('flags : avx2 avx512_bf16\nflags : avx2\n', jnp.bfloat16, 'avx512_bf16'),
    ('Features\t: asimd i8mm bf16 sve\n', jnp.bfloat16, 'has bf16'),
    ('flags : avx2 avx512f not_bf16\n', jnp.float32, 'no bfloat16'),
    ('', jnp.float32, 'no bfloat16'), (b'flags : \xff bf16', jnp.float32, 'no'),
    (None, jnp.float32, 'no bfloat16')))
def test_a_cpu_takes_bfloat16_if_it_has_instructions_for_it(
    tmp_path, monkeypatch, info, auto, why):
  path = tmp_path / 'cpuinfo'
  monkeypatch.setattr(devices, '_CPU_INFO', path)
  if info is not None:
    path.write_bytes(info if isinstance(info, bytes) else info.encode())
  dtype, reason = devices.choose_dtype('auto')
  assert dtype == auto and why in reason
  dtype, reason = devices.choose_dtype('bfloat16')
  assert dtype == jnp.bfloat16
  assert ('warning: this CPU has no' in reason) == (auto == jnp.float32)


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
