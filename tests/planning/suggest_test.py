"""The largest that fits, and what is proposed, on memories made by hand."""

import pytest

from configs import tiny
from gemma_sft.planning import compile_step
from gemma_sft.planning import estimate
from gemma_sft.planning import hardware
from gemma_sft.planning import suggest


def _memory(peak, limit=10e9, compiler='test'):
  return estimate.Memory(
      base=2e9, adapters=0, optimizer=0, batch=0, activations=peak - 2e9,
      logits=0, rest=0, limit=limit, fits=peak <= limit, compiler=compiler,
      added=peak - 2e9)


def _config(**changes):
  config = tiny.get_config().unlock()
  config.data.update(batch_size=16, max_length=256)
  config.update_from_flattened_dict(changes)
  return config


def _program(config):
  devices = hardware.absent_devices(hardware.parse('v5e-8'))
  return compile_step.make_program(config, devices, max_trained=64)


def test_the_line_through_two_compilations_is_confirmed():
  config, asked = _config(), []
  program = _program(config)
  assert program.rows == 2

  def measure(changed):
    rows = changed.data.batch_size // 8
    asked.append((rows, changed.data.max_length))
    # 1 GB a row besides 2.5 GB, and 6 MB a token of length.
    return _memory(
        2.5e9 + 1e9 * rows + 6e6 * (changed.data.max_length - 256))

  found = suggest.largest(program, measure(config), measure)
  assert found.confirmed
  assert found.batch_size == 7 * 8  # 9.5 GB; eight rows would be 10.5.
  assert found.length == 1152  # 9.88 GB, in steps of 128.
  assert len(asked) <= 9
  assert (7, 256) in asked and (2, 1152) in asked


def test_without_a_compiler_it_is_extrapolated_and_says_so():
  program = _program(_config())
  found = suggest.largest(program, _memory(4e9), None)
  assert not found.confirmed
  # 2 GB for two rows of 16; 8 GB are free.
  assert found.batch_size == pytest.approx(64, abs=8)


def test_the_cheapest_change_comes_first():
  config = _config(**{'train.remat': 'none'})
  names = [tuple(changes) for changes, _ in suggest.candidates(config, 8, 4)]
  assert names[0] == ('train.gradient_accumulation_steps',)
  first = {key: next(i for i, n in enumerate(names) if key in n) for key in (
      'train.gradient_accumulation_steps', 'train.remat', 'mesh.fsdp',
      'model.quantization')}
  assert list(first) == sorted(first, key=first.get)
  assert len(set(map(str, suggest.candidates(config, 8, 4)))) == len(names)
  # What is so already is not proposed, and a change leaves the first alone.
  done = suggest.changed(
      config, {'train.remat': 'block', 'model.quantization': 'nf4'})
  assert not list(suggest.candidates(done, 1, 1))
  assert (config.train.remat, done.train.remat) == ('none', 'block')


def test_a_proposal_is_confirmed_by_compiling_it():
  config = _config(**{'train.remat': 'elementwise'})
  compiled = []

  def estimated(changed):
    return _memory(9e9 if changed.train.remat == 'block' or (
        changed.mesh.fsdp == 8) else 20e9, compiler='')

  def confirm(changed):
    compiled.append(changed)
    # The estimate was wrong of the first: sharded weights are not enough.
    return _memory(9.9e9 if changed.train.remat == 'block' else 11e9)

  found = suggest.propose(config, 8, 2, estimated, confirm)
  assert found.changes == {'train.remat': 'block'}
  assert found.memory.peak == 9.9e9 and len(compiled) == 3
  assert found.flags == '--config.train.remat=block'
  assert suggest.propose(config, 8, 2, lambda c: _memory(50e9), confirm) is None


def test_what_is_extrapolated_is_what_would_be_estimated():
  # A wide model and few tokens: most of a step's memory is a layer in full.
  config = _config(**{
      'model.quantization': 'nf4', 'data.batch_size': 8, 'data.max_length': 64,
      'model.embed_dim': 512, 'model.hidden_dim': 2048})
  program = _program(config)
  memory = estimate.memory(program, limit=5e8)
  found = suggest.largest(program, memory, None).batch_size
  there = estimate.memory(_program(suggest.changed(
      config, {'data.batch_size': found})), limit=5e8)
  assert 0.9 * 5e8 < there.peak < 1.02 * 5e8, (memory.peak, found)
