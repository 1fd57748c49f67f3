"""The training step compiles for a slice of eight v5e, with libtpu alone.

What the kernel computes is tested in `attention_test`, by interpreting it.
"""

import jax
from jax.experimental import pallas
import jax.numpy as jnp
import pytest

from configs import tiny
from gemma_sft import errors
from gemma_sft import train
from gemma_sft.nn import attention
from gemma_sft.nn import quantize
from gemma_sft.planning import compile_step
from gemma_sft.planning import hardware

_PLACE = hardware.parse('v5e:2x4')


@pytest.fixture(scope='module')
def devices():
  try:
    return hardware.devices_of(_PLACE, analytic=False)
  except errors.UserError as error:
    pytest.skip(f'NOTHING IS COMPILED FOR TPUS: {error}')


def _program(devices, generation, **changes):
  config = tiny.get_config(str(generation)).unlock()
  # Splash takes heads of a multiple of 128; a window that cuts something off.
  config.model.update(embed_dim=128, hidden_dim=256, num_heads=2,
                      num_kv_heads=1, head_dim=128, sliding_window=128)
  config.data.update(max_length=256, batch_size=16)
  config.update_from_flattened_dict(changes)
  return compile_step.make_program(config, devices, max_trained=128)


def _compile(lowered):
  return compile_step.compile_step(lowered, hardware.compiler_name(_PLACE))


@pytest.mark.parametrize('generation, changes', [
    (1, {'train.remat': 'none'}),
    (2, {'mesh.fsdp': 8, 'mesh.data': 1}),  # Its logits are capped.
    (3, {'model.quantization': 'nf4', 'train.remat': 'block'}),
    (3, {'model.quantization': 'int8', 'mesh.fsdp': 4, 'mesh.data': 2,
         'train.gradient_accumulation_steps': 2}),
], ids=['gemma1', 'gemma2 fsdp', 'gemma3 nf4', 'gemma3 int8 fsdp'])
def test_the_step_compiles_with_splash_attention(devices, generation, changes):
  program = _program(devices, generation, **changes)
  assert program.settings.execution.attention == 'splash'
  traced, facts = compile_step.trace(train.train_step, program)
  lowered = traced.lower()
  # Forward, and backward for queries and for keys: else it was not the kernel.
  assert lowered.as_text().count('tpu_custom_call') >= 3
  compiled = _compile(lowered)
  assert compiled.fits and compiled.peak > 0
  assert facts.flops > 0 and facts.residuals > 0


def test_a_broken_kernel_is_seen(devices, monkeypatch):
  # The kernel traces, and computes where it is interpreted; a TPU's compiler
  # has no sort.
  def sorts(x_ref, out_ref):
    out_ref[...] = jnp.sort(x_ref[...])

  make = attention._splash_kernel

  def broken(*args):
    return lambda q, *rest: make(*args)(q, *rest) + jax.lax.stop_gradient(
        pallas.pallas_call(sorts, jax.ShapeDtypeStruct(q.shape, q.dtype))(
            jax.lax.stop_gradient(q)))

  monkeypatch.setattr(attention, '_splash_kernel', broken)
  traced, _ = compile_step.trace(train.train_step, _program(devices, 3, **{
      'lora.rank': 3}))
  with pytest.raises(NotImplementedError, match='sort'):
    _compile(traced.lower())


def _shape(devices, *dims, dtype):
  return jax.ShapeDtypeStruct(
      dims, dtype, sharding=jax.sharding.SingleDeviceSharding(devices[0]))


def test_what_cannot_fit_is_a_result(devices):
  x = _shape(devices, 2**16, 2**18, dtype=jnp.float32)
  compiled = _compile(jax.jit(lambda x: x * 2).lower(x))
  assert not compiled.fits
  assert compiled.available == _PLACE.chip.memory
  assert compiled.peak >= 2 * 2**36


def test_packed_codes_are_not_all_held_twice(devices):
  """The stack of each of two weights, 67 MB, is laid out anew at most once:
  147 MB beside them; 247 without `quantize`'s constraint of their layout."""
  L, T, D, F = 8, 512, 2048, 8192
  weights = [quantize.Quantized(
      _shape(devices, L, F, D // 2, dtype=jnp.uint8),
      _shape(devices, L, F, D // 64, dtype=jnp.bfloat16), 'nf4')] * 2

  def loss(x_TD, weights):
    def mlp(x_TD, layer):
      h_TF = jax.nn.gelu(quantize.einsum('TD,FD->TF', x_TD, layer[0]))
      return x_TD + quantize.einsum('TF,FD->TD', h_TF, layer[1]), None

    x_TD, _ = jax.lax.scan(jax.checkpoint(mlp), x_TD, weights)
    return x_TD.astype(jnp.float32).sum()

  compiled = jax.jit(jax.grad(loss)).lower(
      _shape(devices, T, D, dtype=jnp.bfloat16), weights).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 200e6
