"""Arithmetic against what is known: parameters, files, compiled steps."""

import functools

import jax
import pytest

from configs import tiny
from gemma_sft import model as model_lib
from gemma_sft.monitor import metrics
from gemma_sft.planning import compile_step
from gemma_sft.planning import estimate
from gemma_sft.planning import hardware

_PLACE = hardware.parse('v5e-1')


@functools.cache
def _program(name, rows, length, remat='elementwise', quantization=''):
  config = tiny.get_config().unlock()
  config.model.update(name=name, weights='random', quantization=quantization)
  config.data.update(batch_size=rows, max_length=length)
  config.lora.update(rank=16, targets='attn/')
  config.train.remat = remat
  return compile_step.make_program(
      config, hardware.absent_devices(_PLACE), max_trained=rows * length // 4)


# What libtpu 0.0.50.1 made of the same steps on one device of data-parallel
# slices (README, "Memory, found by compiling"): the estimate's promise is 15 %.
@pytest.mark.parametrize('name, quantization, rows, remat, peak', [
    ('gemma3_1b', '', 4, 'block', 3.2e9),
    ('gemma3_1b', '', 4, 'elementwise', 11.1e9),
    ('gemma2_2b', '', 4, 'block', 7.6e9),
    ('gemma3_4b', 'nf4', 1, 'block', 4.8e9),
    ('gemma3_12b', 'nf4', 1, 'block', 12.3e9)])
def test_the_estimate_is_near_what_was_compiled(
    name, quantization, rows, remat, peak):
  program = _program(name, rows, 2048, remat, quantization)
  memory = estimate.memory(program, _PLACE.chip.memory)
  assert memory.peak == pytest.approx(peak, rel=estimate.MARGIN)
  assert memory.fits


def test_a_compiled_peak_is_parted_into_kinds():
  program = _program('gemma3_270m', 2, 512)
  traced = compile_step.Traced(flops=1e12, residuals=300_000_000)

  def memory(peak, *, added, available=0, fits=True):
    return estimate.memory(program, 10e9, traced, compile_step.Compiled(
        10**9, 10**9, int(peak), added, available, fits, 1.0, 'test'))

  found = memory(2e9, added=10**9)
  assert (found.peak, found.activations) == (pytest.approx(2e9), 3e8)
  assert found.rest > 0 and found.fits
  # Less was used than autodiff keeps: no kind is negative.
  small = memory(found.resident + 10**8, added=10**8)
  assert (small.activations, small.logits, small.rest) == (1e8, 0, 0)
  # Refused: what it would need, and the limit that the compiler names.
  refused = memory(20e9, added=0, available=16 * 10**9, fits=False)
  assert not refused.fits and refused.limit == 16e9
  assert refused.peak == pytest.approx(20e9)


def test_flops_needed():
  program = _program('gemma3_270m', 2, 512)
  embedding = 262_144 * 640
  body = model_lib.count_params(program.base) - embedding
  plain = metrics.step_flops(
      body_params=body, embedding_params=embedding, n_tokens=1024,
      n_trained=100, frozen_base=True)
  got = estimate.needed_flops(program, n_tokens=1024, n_trained=100)
  # 18 layers, 4 heads of 256, rows no longer than the window of 512: each token
  # sees 256.5 keys (half a key less in the local layers' formula).
  attention = 12 * 4 * 256 * 18 * 256.5 * 1024
  assert got - plain == pytest.approx(attention, rel=0.01)


def test_time_is_bounded_by_products_and_by_reading_the_weights():
  program = _program('gemma3_1b', 4, 2048, 'block')
  seconds = estimate.step_seconds(program, _PLACE, 197e12)
  assert (seconds.quick, seconds.slow) == (pytest.approx(2), pytest.approx(10))
  # 1.0 G weights of two bytes, forward and backward, at 819 GB/s.
  seconds = estimate.step_seconds(program, _PLACE, 1.0)
  assert seconds.quick == pytest.approx(4e9 / 819e9, rel=0.01)
  # The rate of plain products is measured.
  assert 1e8 < estimate.product_rate('float32', 256) < 1e15


def test_files_have_the_sizes_of_their_arrays(config):
  config.lora.rank = 4
  program = compile_step.make_program(config, jax.devices()[:1], max_trained=64)
  trained = model_lib.count_params(program.state.trainable)
  # Adapters and two moments in float32, and two counters.
  assert estimate.checkpoint_bytes(program) - 12 * trained in (8, 12)
  sizes = estimate.export_bytes(program)
  n = model_lib.count_params(program.base)
  # Norms stay in float32 in a GGUF, so f16 is a little more than half.
  assert sizes['hf'] == 2 * n and sizes['gguf-f16'] >= 2 * n
  assert sizes['peft'] == 4 * trained
  assert sizes['gguf-q8_0'] < sizes['gguf-f16']
