"""Memory of a training step on this machine: `plan` against measurement.

    python tests/benchmarks/plan_cpu.py --config=configs/slang.py \
        --config.data.batch_size=2 --config.data.max_length=512

Prepares the run as `train` does (with the base's weights), notes the resident
memory, takes a few steps and prints their peak above it beside what
`gemma_sft.plan --topology=cpu` says that a step needs above resident memory.
Compiling takes memory too, which a plan does not cover: it is measured apart.
"""

import pathlib
import tempfile

from absl import app
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    'config', 'configs/slang.py', 'Of the run.')
_STEPS = 3


def _status(key: str) -> int:
  """Returns VmRSS or VmHWM of this process in bytes."""
  for line in pathlib.Path('/proc/self/status').read_text().splitlines():
    if line.startswith(key):
      return int(line.split()[1]) * 1024
  raise KeyError(key)


def _reset_peak() -> None:
  # Linux: sets VmHWM back to VmRSS.
  pathlib.Path('/proc/self/clear_refs').write_text('5')


def main(_):
  import jax

  from gemma_sft import config as config_lib
  from gemma_sft import sharding
  from gemma_sft import train
  from gemma_sft.planning import compile_step
  from gemma_sft.planning import estimate
  from gemma_sft.planning import hardware
  from gemma_sft.run import prepare

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
    _reset_peak()
    before = _status('VmRSS')
    static = dict(optimizer=run.optimizer,
                  settings=run.settings, max_trained=max_trained)
    step = train.train_step.lower(state, run.base, arrays, **static).compile()
    compiling = _status('VmHWM') - before
    compiled = _status('VmRSS')
    _reset_peak()
    for _ in range(_STEPS):
      state, _ = step(state, run.base, arrays)
    jax.block_until_ready(state)
    peak = _status('VmHWM')
  program = compile_step.make_program(config, devices, max_trained=max_trained)
  planned = estimate.memory(program, 0, *compile_step.cached(
      train.train_step, program, target, compiled=True))
  estimated = estimate.memory(
      program, 0, compile_step.trace(train.train_step, program)[1])
  print(f'{config.model.name}, {config.data.batch_size} x'
        f' {config.data.max_length}, {jax.devices()[0].device_kind}')
  print('| | MB | plan is |')
  print('|---|---|---|')
  for name, n in (
      ('measured: peak of steps above resident before compiling',
       peak - before),
      ('measured: the same above resident after compiling', peak - compiled),
      ('measured: compiling, temporarily', compiling)):
    print(f'| {name} | {n / 1e6:,.0f} | {planned.added / n - 1:+.1%} |')
  print(f'| plan, compiled | {planned.added / 1e6:,.0f} | |')
  print(f'| plan, --analytic | {estimated.added / 1e6:,.0f} |'
        f' {estimated.added / planned.added - 1:+.1%} of compiled |')


if __name__ == '__main__':
  app.run(main)
