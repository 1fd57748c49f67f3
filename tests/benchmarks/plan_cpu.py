"""Memory of a training step on this machine: `plan` against measurement.

    python tests/benchmarks/plan_cpu.py --config=configs/slang.py \
        --config.data.batch_size=2 --config.data.max_length=512

Prepares the run as `train` does, takes a few steps and prints their peak above
resident memory beside what `gemma_sft.plan --topology=cpu` says. Compiling
takes memory too, which a plan does not cover: it is measured apart.
"""

import tempfile

from absl import app
import jax
from ml_collections import config_flags
from peers import meter

from gemma_sft import config as config_lib
from gemma_sft import pages
from gemma_sft import sharding
from gemma_sft import train
from gemma_sft.planning import compile_step
from gemma_sft.planning import estimate
from gemma_sft.planning import hardware
from gemma_sft.run import prepare

_CONFIG = config_flags.DEFINE_config_file(
    'config', 'configs/slang.py', 'Of the run.')
_STEPS = 3


def main(_):
  config = _CONFIG.value
  config_lib.validate(config)
  target = hardware.parse('cpu')
  devices = hardware.devices_of(target, analytic=False)
  with tempfile.TemporaryDirectory() as folder:
    run = prepare.prepare(config, folder)
    batch = run.source[0]
    max_trained = int(batch['max_trained'])
    arrays = sharding.put_batch(batch, run.mesh)
    state = run.enter(run.initial_state)
    jax.block_until_ready((state, arrays, run.base))
    meter.reset_peak()
    before = meter.resident_bytes()
    step = train.train_step.lower(
        state, run.base, arrays, optimizer=run.optimizer,
        settings=run.settings, max_trained=max_trained).compile()
    compiling = meter.resident_bytes(peak=True) - before
    compiled = meter.resident_bytes()
    meter.reset_peak()
    for _ in range(_STEPS):
      state, _ = step(state, run.base, arrays)
    jax.block_until_ready(state)
    peak = meter.resident_bytes(peak=True)
  program = compile_step.make_program(config, devices, max_trained=max_trained)
  planned = estimate.memory(program, 0, *compile_step.cached(
      train.train_step, program, target, compiled=True)).added
  estimated = estimate.memory(
      program, 0, compile_step.trace(train.train_step, program)[1]).added
  print(f'{config.model.name}, {config.data.batch_size} x'
        f' {config.data.max_length}, {jax.devices()[0].device_kind}')
  print(pages.table(('', 'MB', 'plan is'), [
      *((name, f'{n / 1e6:,.0f}', f'{planned / n - 1:+.1%}') for name, n in (
          ('measured: peak of steps above resident before compiling',
           peak - before),
          ('measured: the same above resident after compiling',
           peak - compiled),
          ('measured: compiling, temporarily', compiling))),
      ('plan, compiled', f'{planned / 1e6:,.0f}', ''),
      ('plan, --analytic', f'{estimated / 1e6:,.0f}',
       f'{estimated / planned - 1:+.1%} of compiled')]))


if __name__ == '__main__':
  app.run(main)
