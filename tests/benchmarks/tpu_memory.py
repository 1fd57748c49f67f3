"""Memory of a real training step on a TPU slice, found without a TPU.

    pip install --target .libtpu --no-deps 'libtpu==0.0.50.*'
    TPU_LIBRARY_PATH=.libtpu/libtpu/libtpu.so \
        python tests/benchmarks/tpu_memory.py --cases=gemma3_1b:v5e:2x4:4

Compiles `train.train_step` ahead of time with the compiler that PyPI ships
(libtpu), for the slice named, and prints what it says of memory a chip: LoRA of
rank 16 on q, k, v and o, a quarter of the positions trained, bfloat16. A case
is model:chip:topology:rows a chip[:length[:remat[:mesh[:attention]]]], with
mesh such as fsdp8. Compiled, not run: nothing is said of speed.
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
import jax.numpy as jnp
import numpy as np

from gemma_sft import model as model_lib
from gemma_sft import optimizer as optimizer_lib
from gemma_sft import sharding
from gemma_sft import state as state_lib
from gemma_sft import train
from gemma_sft.adapters import lora
from gemma_sft.nn import blocks

_CASES = flags.DEFINE_list('cases', [
    'gemma3_1b:v5e:2x4:4:2048:block',
    'gemma3_1b:v5e:2x4:4:2048:elementwise',
    'gemma2_2b:v5e:2x4:4:2048:block',
    'gemma2_9b:v5e:2x4:1:2048:block:fsdp8',
], 'What to compile; see above.')
_SHARE = flags.DEFINE_float('share', 0.25, 'Share of trained positions.')


def _shapes(tree, shardings, dtype=None):
  """Returns a tree's shapes in their shards, floats in a dtype."""
  def of(leaf, place):
    cast = dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(
        leaf.shape, dtype if cast else leaf.dtype, sharding=place)
  return jax.tree.map(of, tree, shardings)


def compile_step(
    name: str, topology: str, rows: int, length: int, remat: str,
    axes: dict[str, int], kernel: str) -> jax.stages.Compiled:
  """Returns the compiled step of a model on a slice.

  Args:
    name: A preset.
    topology: Such as 'v5e:2x4'.
    rows: Of each chip.
    length: Of the rows.
    remat: See `blocks.Execution`.
    axes: Sizes of the mesh's axes; data takes what is left.
    kernel: Of the attention.
  """
  devices = np.array(topologies.get_topology_desc(
      platform='tpu', topology_name=topology).devices)
  fsdp, tensor = axes.get('fsdp', 1), axes.get('tensor', 1)
  mesh = jax.sharding.Mesh(
      devices.reshape(-1, fsdp, tensor), sharding.AXES,
      axis_types=(jax.sharding.AxisType.Auto,) * 3)
  model = model_lib.make_model(name)
  abstract = model_lib.abstract_params(model)
  base = blocks.stack(abstract)
  base = _shapes(base, sharding.tree_shardings(base, mesh), jnp.bfloat16)
  optimizer = optimizer_lib.make_optimizer(
      lambda step: 2e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0,
      max_grad_norm=1.0)
  state = jax.eval_shape(lambda: state_lib.stack_layers(state_lib.make_state(
      lora.init_adapters(
          abstract, rank=16, targets='attn/', seed=0,
          transposed_gating=model.transposed_gating), optimizer),
      model.config.num_layers))
  state = _shapes(state, sharding.tree_shardings(state, mesh))
  groups = sharding.batch_groups(mesh)
  B = rows * groups
  place = sharding.batch_sharding(mesh)
  arrays = {
      key: jax.ShapeDtypeStruct((1, B, length), dtype, sharding=place)
      for key, dtype in (('tokens', jnp.int32), ('targets', jnp.int32),
                         ('positions', jnp.int32), ('segment_ids', jnp.int32),
                         ('loss_mask', jnp.bool))}
  arrays['rows'] = jax.ShapeDtypeStruct((1, B), jnp.int32, sharding=place)
  settings = state_lib.StepSettings(
      model=model, lora_enabled=True, lora_scale=1.0, dropout=0.0, seed=0,
      compute_dtype=jnp.bfloat16, loss_chunk=1024, groups=groups, mesh=mesh,
      execution=blocks.Execution(
          layers='scan', attention=kernel, remat=remat, mesh=mesh))
  return train.train_step.lower(
      state, base, arrays, optimizer=optimizer, settings=settings,
      max_trained=int(_SHARE.value * rows * length)).compile()


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
