"""Memory of a real training step on a TPU slice, measured without a TPU.

    pip install --target .libtpu --no-deps 'libtpu==0.0.50.*'
    TPU_LIBRARY_PATH=.libtpu/libtpu/libtpu.so \
        python tests/benchmarks/tpu_memory.py --cases=gemma3_1b:v5e:2x4:4

Compiles `train.train_step` ahead of time with the compiler that PyPI ships
(libtpu), for a slice, and prints the memory of a chip: LoRA of rank 16 on q, k,
v and o, a quarter of the positions trained, bfloat16. A case is
model:chip:topology:rows a chip[:length[:remat[:mesh[:attention]]]], with mesh
such as fsdp8. The step is compiled but not run, so there are no times.
"""

import os
import resource
import sys
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')

from absl import app
from absl import flags
import jax
from jax.experimental import topologies

from configs import default
from gemma_sft import train
from gemma_sft.planning import compile_step as planning

_CASES = flags.DEFINE_list('cases', [
    'gemma3_1b:v5e:2x4:4:2048:block',
    'gemma3_1b:v5e:2x4:4:2048:elementwise',
    'gemma2_2b:v5e:2x4:4:2048:block',
    'gemma2_9b:v5e:2x4:1:2048:block:fsdp8',
], 'What to compile; see above.')
_SHARE = flags.DEFINE_float('share', 0.25, 'Share of trained positions.')


def compile_step(
    name: str, topology: str, rows: int, length: int, remat: str,
    axes: dict[str, int], kernel: str) -> jax.stages.Compiled:
  """Returns the compiled step of a preset on a slice.

  Args:
    name: A preset.
    topology: Such as 'v5e:2x4'.
    rows: Rows of each chip.
    length: Tokens of a row.
    remat: See `blocks.Execution`.
    axes: Sizes of the mesh's axes; data takes the rest.
    kernel: Of the attention.
  """
  devices = topologies.get_topology_desc(
      platform='tpu', topology_name=topology).devices
  config = default.get_config()
  config.model.update(name=name, weights='random', dtype='bfloat16',
                      layers='scan', attention=kernel)
  config.data.update(
      max_length=length,
      batch_size=rows * len(devices) // axes.get('tensor', 1))
  config.train.remat = remat
  config.mesh.update(axes)
  program = planning.make_program(
      config, devices, max_trained=int(_SHARE.value * rows * length))
  traced, _ = planning.trace(train.train_step, program)
  return traced.lower().compile()


def main(argv):
  del argv
  print('| model | slice | rows a chip x length | attention, recomputed |'
        ' arguments GB | temporaries GB | peak GB | compile CPU-s |')
  print('|---|---|---|---|---|---|---|---|', flush=True)
  for case in _CASES.value:
    name, chip, slices, rows, *rest = case.split(':')
    length, remat, axes, kernel = (
        *rest, *('2048', 'block', '', 'splash')[len(rest):])
    start = time.process_time()
    sizes = {axis: int(axes.removeprefix(axis)) for axis in ('fsdp', 'tensor')
             if axes.startswith(axis)}
    try:
      compiled = compile_step(
          name, f'{chip}:{slices}', int(rows), int(length), remat, sizes,
          kernel)
    except jax.errors.JaxRuntimeError as error:
      line = next((line for line in str(error).splitlines()
                   if 'xceeded' in line or 'memory' in line), str(error))
      print(f'| {name} | {chip} {slices} {axes} | {rows} x {length} | {kernel},'
            f' {remat} | {line[:200]} | | | |', flush=True)
      continue
    memory = compiled.memory_analysis()
    gigabytes = [f'{n / 1e9:.2f}' for n in (
        memory.argument_size_in_bytes, memory.temp_size_in_bytes,
        memory.peak_memory_in_bytes)]
    print(f'| {name} | {chip} {slices} {axes} | {rows} x {length} | {kernel},'
          f' {remat} | ' + ' | '.join(gigabytes)
          + f' | {time.process_time() - start:.0f} |', flush=True)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
  import importlib.metadata

  version = importlib.metadata.version('jax')
  print(f'jax {version}; compiler of {os.environ.get("TPU_LIBRARY_PATH")};'
        f' this process took {peak:.1f} GB', file=sys.stderr)


if __name__ == '__main__':
  app.run(main)
