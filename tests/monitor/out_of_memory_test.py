"""A step that does not fit ends in one message."""

import conftest
import jax
import jax.numpy as jnp
import pytest

from configs import tiny
from gemma_sft import errors
from gemma_sft import train
from gemma_sft.evaluation import during_training
from gemma_sft.monitor import out_of_memory


def _exhaust():
  """Raises what XLA raises."""
  jnp.zeros((2**45,), jnp.int8).block_until_ready()


def test_the_message_names_buffers_and_what_to_change():
  held = jnp.zeros((1234, 5678))
  with (pytest.raises(errors.UserError) as caught,
        out_of_memory.explained(tiny.get_config())):
    _exhaust()
  for part in ('out of memory', 'float32[1234, 5678] (28.03 MB)',
               'no room for 35184.37 GB more'):
    assert part in str(caught.value)
  first, second, third = map(
      caught.value.fix.index, ('remat=block', 'quantization', 'max_length=384'))
  assert first < second < third
  del held


def test_what_is_done_already_is_not_proposed():
  config = tiny.get_config()
  config.train.update(remat='block', gradient_accumulation_steps=8)
  config.model.quantization = 'nf4'
  config.mesh.fsdp = 8
  fix = out_of_memory.explain(RuntimeError('RESOURCE_EXHAUSTED'), config).fix
  for done in ('remat', 'gradient_accumulation_steps', 'quantization', 'fsdp'):
    assert done not in fix
  # Buffers that a TPU's compiler lists are passed on.
  text = ('RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\n'
          '  1. Size: 2.25G\n     Operator: op_name="jit(x)"\n'
          '     Shape: f32[4,9,2048]{2,1,0}\n')
  message = str(out_of_memory.explain(RuntimeError(text), tiny.get_config()))
  assert 'f32[4,9,2048]{2,1,0} (2.25G)' in message


def test_other_errors_are_left_alone():
  with (pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'),
        out_of_memory.explained(tiny.get_config())):
    raise jax.errors.JaxRuntimeError('INTERNAL: no such thing')


def test_training_says_it(run_config, tmp_path, monkeypatch):
  monkeypatch.setattr(during_training, 'evaluate', lambda *_: _exhaust())
  with pytest.raises(errors.UserError, match='out of memory'):
    train.main(run_config, str(tmp_path / 'w'))
  assert conftest.losses(tmp_path / 'w') == {}
