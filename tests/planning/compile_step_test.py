"""The abstract step is the step that training runs."""

import pathlib

import jax
import pytest

from gemma_sft import errors
from gemma_sft import sharding
from gemma_sft import train
from gemma_sft.planning import compile_step
from gemma_sft.planning import hardware
from gemma_sft.run import prepare


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('GEMMA_SFT_CACHE', str(tmp_path / 'cache'))


@pytest.mark.parametrize('changes', [
    {'train.gradient_accumulation_steps': 2, 'data.batch_size': 16},
    {'model.quantization': 'nf4', 'mesh.fsdp': 4, 'mesh.data': 2},
    {'lora.enabled': False, 'mesh.tensor': 2},
], ids=['lora', 'quantised', 'all weights'])
def test_the_program_is_that_of_a_run(run_config, tmp_path, changes):
  # As many updates as `make_program` assumes: they are in the schedule.
  run_config.train.steps = 1000
  run_config.update_from_flattened_dict(changes)
  run = prepare.prepare(run_config, str(tmp_path / 'w'))
  batch = run.source[0]
  max_trained = int(batch['max_trained'])
  real = train.train_step.trace(
      run.enter(run.initial_state), run.base,
      sharding.put_batch(batch, run.mesh), optimizer=run.optimizer,
      settings=run.settings, max_trained=max_trained).lower().as_text()
  program = compile_step.make_program(
      run_config, jax.devices(), max_trained=max_trained)
  assert program.settings == run.settings
  traced, _ = compile_step.trace(train.train_step, program)
  assert traced.lower().as_text() == real


def _local_bytes(config, name, topology, quantization=''):
  config.data.max_length = 512
  config.model.update(
      name=name, weights='random', quantization=quantization)
  program = compile_step.make_program(
      config, hardware.absent_devices(hardware.parse(topology)), max_trained=64)
  assert program.settings.execution.attention == 'splash'
  return compile_step.local_bytes(program.base['layers'])


def test_nothing_of_the_largest_is_allocated(config):
  # 10.76 G weights in bfloat16, without the embedding, on every device.
  assert _local_bytes(config, 'gemma3_12b', 'v5e-8') == pytest.approx(
      21.5e9, rel=0.01)
  assert all(array.nbytes < 1e8 for array in jax.live_arrays())


def test_a_quantised_base_has_the_bytes_of_its_kind(config):
  dense, int8, nf4 = (_local_bytes(config, 'gemma3_1b', 'v5e-1', kind)
                      for kind in ('', 'int8', 'nf4'))
  # Bits a weight, from quantize's table.
  assert int8 == pytest.approx(dense * 8.125 / 16, rel=1e-3)
  assert nf4 == pytest.approx(dense * 4.25 / 16, rel=1e-3)


def test_results_are_cached_and_a_change_is_seen(config, monkeypatch, tmp_path):
  config.data.batch_size, rank = 8, config.lora.rank
  target = hardware.parse('cpu')

  def program_of(**changes):
    config.update_from_flattened_dict(changes)
    return compile_step.make_program(config, jax.devices()[:1], max_trained=64)

  program = program_of()
  assert not compile_step.is_cached(program, target)
  first = compile_step.cached(train.train_step, program, target, compiled=True)
  assert first[1].peak > first[1].arguments > 0
  assert compile_step.is_cached(program, target)
  # From the cache: there is no step to compile any more.
  assert compile_step.cached(None, program, target, compiled=True) == first
  # What changes no program is no new one; what does is.
  assert compile_step.is_cached(program_of(**{'train.log_every': 7}), target)
  assert not compile_step.is_cached(program_of(**{'lora.rank': 2}), target)
  # An edit of the package is seen, but costs no compilation if the program is
  # the same as before.
  program = program_of(**{'lora.rank': rank})
  assert compile_step.is_cached(program, target)
  files = compile_step._source_files()
  package = pathlib.Path(train.__file__).parent
  assert {package / 'train.py', package / 'nn/float16.py'} < set(files)
  edited = tmp_path / 'edited.py'
  edited.write_bytes(files[-1].read_bytes() + b'#')
  monkeypatch.setattr(
      compile_step, '_source_files', lambda: [*files[:-1], edited])
  assert not compile_step.is_cached(program, target)
  monkeypatch.setattr(compile_step, 'compile_step', None)
  assert compile_step.cached(
      train.train_step, program, target, compiled=True) == first


def test_a_refusal_is_a_result():
  # Word for word libtpu 0.0.50.1's.
  message = (
      'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM,'
      ' the total memory required for HLO temporaries (18.00G) exceeds'
      ' available HBM (15.75G). HLO module: jit_f.')
  assert compile_step._overflow(message) == (18 * 2**30, int(15.75 * 2**30))
  with pytest.raises(errors.UserError, match='refuses the step'):
    compile_step._overflow('INTERNAL: Mosaic failed to compile TPU kernel')
