"""Prints the table of what fits where, in gemma_sft/planning/README.md.

    bash launch/libtpu.sh
    python tests/benchmarks/plan_table.py            # what the cache has
    python tests/benchmarks/plan_table.py --compile  # compiles what is missing

LoRA and QLoRA of rank 16 on q, k, v and o, rows of 2,048 tokens of which a
quarter are trained, blocks recomputed in the backward pass. A cell shows the
peak memory of a device with --rows=1 on it and the most rows that fit; ~ marks
an estimate. Where replicated weights do not fit, they are sharded (fsdp). Each
compilation takes one to four minutes of a core and is cached. Below the table,
compiled peaks stand beside the estimates of the same cells.
"""

import os
import resource

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from absl import app
from absl import flags

from configs import default
from gemma_sft import train
from gemma_sft.planning import compile_step
from gemma_sft.planning import estimate
from gemma_sft.planning import hardware
from gemma_sft.planning import suggest

_COMPILE = flags.DEFINE_bool('compile', False, 'Compile what is not cached.')
_ONLY = flags.DEFINE_list(
    'only', [], 'Only these models, such as gemma3_270m.')
_ROWS = flags.DEFINE_integer('rows', 1, 'Rows on each device.', lower_bound=1)
_LENGTH, _SHARE = 2048, 0.25

_MODELS = ('gemma3_270m', 'gemma3_1b', 'gemma3_4b', 'gemma3_12b', 'gemma2_2b',
           'gemma2_9b')
_METHODS = {'LoRA': '', 'QLoRA int8': 'int8', 'QLoRA nf4': 'nf4'}
_TARGETS = ('v5e-1', 'v5e-8', 'v6e-8', 'v5p-8', 'kaggle-t4x2')
# These twelve are compiled; the rest is estimated.
_COMPILED = {
    ('gemma3_270m', 'LoRA'): ('v5e-1', 'v5e-8'),
    ('gemma3_1b', 'LoRA'): ('v5e-1', 'v5e-8'),
    ('gemma3_4b', 'LoRA'): ('v5e-1', 'v5e-8'),
    ('gemma3_4b', 'QLoRA nf4'): ('v5e-1',),
    ('gemma3_12b', 'LoRA'): ('v5e-8',),
    ('gemma3_12b', 'QLoRA nf4'): ('v5e-1',),
    ('gemma2_2b', 'LoRA'): ('v5e-1',),
    ('gemma2_9b', 'LoRA'): ('v5e-8',),
    ('gemma2_9b', 'QLoRA nf4'): ('v5e-1',)}


def _cell(model: str, method: str, name: str, comparisons: list[str]) -> str:
  """Returns '4.1 GB; ~24 rows', with fsdp if the weights had to be sharded.

  If the cell was compiled, a line about the estimate joins the comparisons.
  """
  target = hardware.parse(name)
  n, limit = target.n_devices, target.chip.memory
  max_trained = round(_LENGTH * _SHARE) * _ROWS.value
  for fsdp in (1, n) if n > 1 else (1,):
    config = suggest.changed(default.get_config(), {
        'model.name': model, 'model.weights': 'random',
        'model.quantization': _METHODS[method], 'data.train': 'none',
        'data.max_length': _LENGTH, 'data.batch_size': n * _ROWS.value,
        'train.remat': 'block', 'lora.targets': 'attn/',
        'mesh.fsdp': fsdp, 'mesh.data': n // fsdp})
    program = compile_step.make_program(
        config, hardware.absent_devices(target), max_trained=max_trained)
    memory = estimate.memory(program, limit)
    if memory.fits:
      break
  if name in _COMPILED.get((model, method), ()):
    program = compile_step.make_program(
        config, hardware.devices_of(target, analytic=False),
        max_trained=max_trained)
    if _COMPILE.value or compile_step.is_cached(program, target):
      memory = estimate.memory(program, limit, *compile_step.cached(
          train.train_step, program, target, compiled=True))
      estimated = estimate.memory(program, limit).peak
      comparisons.append(
          f'{model}, {method}, {name}: compiled {memory.peak / 1e9:.2f} GB,'
          f' estimated {estimated / 1e9:.2f}'
          f' ({estimated / memory.peak - 1:+.0%})')
  mark = '' if memory.compiler else '~'
  split = f', fsdp {fsdp}' if fsdp > 1 else ''
  if not memory.fits:
    return f'no: {mark}{memory.peak / 1e9:.1f} GB{split}'
  rows = suggest.largest(program, memory, None).batch_size // n
  return f'{mark}{memory.peak / 1e9:.1f} GB{split}; ~{rows} rows'


def main(_):
  heads = [f'{name} ({hardware.parse(name).chip.memory / 1e9:.1f} GB)'
           for name in _TARGETS]
  print('| | ' + ' | '.join(heads) + ' |')
  print('|---' * (len(_TARGETS) + 1) + '|', flush=True)
  comparisons = []
  for model in _ONLY.value or _MODELS:
    for method in _METHODS:
      cells = [_cell(model, method, name, comparisons) for name in _TARGETS]
      print(f'| {model}, {method} | ' + ' | '.join(cells) + ' |', flush=True)
  print('', *comparisons, sep='\n')
  used = resource.getrusage(resource.RUSAGE_SELF)
  print(f'\n{used.ru_utime + used.ru_stime:.0f} CPU-seconds,'
        f' {used.ru_maxrss / 1e6:.1f} GB')


if __name__ == '__main__':
  app.run(main)
