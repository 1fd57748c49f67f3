"""The training step, traced and compiled without weights, data or devices.

Shapes, dtypes and shardings come from the functions that build a real run
(`run.build`, `sharding`, `model`), so the program is the one that would run.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import re
import time
from typing import Any
from typing import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemma_sft import cache
from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft import sharding
from gemma_sft import state as state_lib
from gemma_sft.nn import blocks
from gemma_sft.nn import quantize
from gemma_sft.planning import flops as flops_lib
from gemma_sft.planning import hardware
from gemma_sft.run import base as base_lib
from gemma_sft.run import build
from gemma_sft.run import devices as devices_lib


@dataclasses.dataclass(frozen=True)
class Program:
  """A step on shapes with shardings, which can be traced and compiled."""

  config: Any
  model: model_lib.Model
  settings: state_lib.StepSettings
  optimizer: Any
  base: Any  # The frozen weights; None if all are trained.
  state: state_lib.TrainState  # In the form that steps run on.
  batch: dict[str, jax.ShapeDtypeStruct]
  max_trained: int  # Of a device; see `head.masked_nll`.

  @property
  def mesh(self) -> jax.sharding.Mesh:
    return self.settings.mesh

  @property
  def rows(self) -> int:
    """Rows of a microbatch on one device."""
    return self.batch['tokens'].shape[1] // self.settings.groups

  @property
  def length(self) -> int:
    """Tokens of a row."""
    return self.batch['tokens'].shape[2]

  @property
  def weights(self) -> Any:
    """All weights of the model: the base, or what is trained."""
    return self.base if self.base is not None else self.state.trainable

  @property
  def n_embedding(self) -> int:
    """Weights of the tied embedding."""
    return self.weights['embedder']['input_embedding'].size


def row_length(config: Any) -> int:
  """Returns the tokens of the longest row of a batch."""
  return max((config.data.max_length, *config.data.buckets))


def make_program(
    config: Any, devices: Sequence[Any], *, max_trained: int) -> Program:
  """Returns the step of a validated config on devices, which need not exist.

  Raises:
    UserError: for a mesh, batch or kernel that the devices do not support.
  """
  mesh = sharding.make_mesh(**config.mesh, devices=devices)
  layout = build.make_layout(config, mesh)
  model = base_lib.load_model(config.model)
  base_lib.check_length(config.data.max_length, model)
  dtype, _ = devices_lib.choose_dtype(config.model.dtype, devices[0])
  execution, _ = build.make_execution(
      config, model, mesh, dtype, tried=False)
  _, optimizer = build.make_optimizer(config, total_steps=1000)
  adapted = config.lora.enabled
  stacked = adapted and execution.layers == 'scan'
  base = _base_shapes(
      model, dtype if adapted else jnp.dtype('float32'),
      config.model.quantization, stacked)

  def initial_state(params):
    state = build.make_state(config, model, optimizer, dtype, params)
    if stacked:
      state = state_lib.stack_layers(state, model.config.num_layers)
    return state

  state = _with_shardings(jax.eval_shape(initial_state, base), mesh)
  A, B, T = layout.microbatches, layout.batch_size, row_length(config)
  rows = sharding.batch_sharding(mesh)
  batch = {
      name: jax.ShapeDtypeStruct(
          (A, B // A, T), jnp.bool if name == 'loss_mask' else jnp.int32,
          sharding=rows) for name in (
              'tokens', 'targets', 'positions', 'segment_ids', 'loss_mask')}
  batch['rows'] = jax.ShapeDtypeStruct((A, B // A), jnp.int32, sharding=rows)
  return Program(
      config=config, model=model,
      settings=build.make_settings(config, model, mesh, dtype, execution),
      optimizer=optimizer,
      base=_with_shardings(base, mesh) if adapted else None,
      state=state, batch=batch, max_trained=max_trained)


def _base_shapes(model, dtype, quantization, stacked):
  """Returns the shapes of the weights that `base.load_base` loads."""
  params = model_lib.abstract_params(model)

  def shape_of(path, leaf):
    name = '/'.join(str(p.key) for p in path)
    if quantization and quantize.is_quantized(name):
      return _quantized_shape(leaf.shape, quantization)
    return jax.ShapeDtypeStruct(leaf.shape, dtype)

  params = jax.tree_util.tree_map_with_path(shape_of, params)
  return blocks.stack(params) if stacked else params


def _quantized_shape(shape, kind):
  # Blocks lie along the last axis, so quantising a row of zeros gives shapes.
  row = quantize.quantize(np.zeros(shape[-1:], np.float32), kind)
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((*shape[:-1], *x.shape), x.dtype), row)


def _with_shardings(tree, mesh):
  return jax.tree.map(
      lambda leaf, leaf_sharding: jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=leaf_sharding),
      tree, sharding.tree_shardings(tree, mesh))


def local_bytes(tree: Any) -> int:
  """Returns the bytes on one device of a tree of shapes with shardings."""
  return sum(
      int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
      * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# Tracing and compiling -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Traced:
  """What the trace of a step shows, over all devices."""

  flops: float  # `flops.product_flops`.
  residuals: int  # `flops.residual_bytes` of a microbatch.


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of a step, in bytes on one device."""

  arguments: int  # State, base and batch.
  temporaries: int
  peak: int  # Or what a step that does not fit would need.
  added: int  # The most in use above the arguments.
  available: int  # The compiler's limit; 0 if it has none.
  fits: bool  # Whether the compiler accepted the program.
  seconds: float  # CPU time of the compilation.
  compiler: str


def trace(step_fn: Any, program: Program) -> tuple[Any, Traced]:
  """Returns (JAX's traced step, its counts)."""
  traced = step_fn.trace(
      program.state, program.base, program.batch,
      optimizer=program.optimizer, settings=program.settings,
      max_trained=program.max_trained)
  kinds = [kind.name for kind in program.model.config.attention_types]
  local = kinds.count('LOCAL_SLIDING') / len(kinds)
  # The step's only cond with two branches: global layers, local layers.
  return traced, Traced(
      flops_lib.product_flops(traced.jaxpr, branch_shares=(1 - local, local)),
      flops_lib.residual_bytes(
          traced.jaxpr, program.model.config.num_layers))


def compile_step(lowered: Any, compiler: str) -> Compiled:
  """Compiles a lowered step; a step that does not fit is a result, no error.

  Raises:
    UserError: if the compiler refuses the step for another reason than memory.
  """
  start = time.process_time()
  try:
    memory = lowered.compile().memory_analysis()
  except jax.errors.JaxRuntimeError as error:
    needed, available = _overflow(str(error))
    return Compiled(0, 0, needed, 0, available, False,
                    time.process_time() - start, compiler)
  added = (memory.temp_size_in_bytes + memory.output_size_in_bytes
           - memory.alias_size_in_bytes)
  peak = memory.peak_memory_in_bytes
  if compiler.startswith('XLA'):
    # On a CPU, XLA's peak leaves out the arguments, or is 0.
    peak = memory.argument_size_in_bytes + added
  return Compiled(
      memory.argument_size_in_bytes, memory.temp_size_in_bytes, peak, added, 0,
      True, time.process_time() - start, compiler)


def _overflow(message: str) -> tuple[int, int]:
  """Returns (needed, available) bytes from a compiler's message."""
  found = re.search(
      r'\(([\d.]+)([KMGT]?)B?\) exceeds available \w+ \(([\d.]+)([KMGT]?)B?\)',
      message)
  if found is None:
    lines = [line for line in message.splitlines() if line.strip()]
    raise errors.UserError(
        'the compiler refuses the step: ' + ' '.join(lines[:2])[:600],
        'a step that compiles for these devices',
        'try --config.model.attention=chunked; if that helps, an attention'
        ' kernel does not work there')
  sizes = found.groups()
  needed, available = (
      int(float(size) * 1024 ** ' KMGT'.index(unit or ' '))
      for size, unit in zip(sizes[::2], sizes[1::2]))
  return needed, available


# The cache of results --------------------------------------------------------

def cached(
    step_fn: Any, program: Program, target: hardware.Slice, *, compiled: bool
) -> tuple[Traced, Compiled | None]:
  """Returns the results of tracing and compiling, from the cache if possible.

  A result is stored under a hash of config, devices, versions and this package.
  A compilation is also stored under a hash of the program itself, so that an
  edit of the package that leaves the program as it is costs none.
  """
  compiler = hardware.compiler_name(target) if compiled else ''
  key = _key(program, target, compiler)
  if known := _read(key):
    return known
  traced, counts = trace(step_fn, program)
  result = None
  if compiled:
    lowered = traced.lower()
    by_program = hashlib.sha256(
        f'{target.topology} {program.mesh.size} {compiler}\n'.encode()
        + lowered.as_text().encode()).hexdigest()
    known = _read(by_program)
    result = known[1] if known else compile_step(lowered, compiler)
    _write(by_program, counts, result)
  _write(key, counts, result)
  return counts, result


def is_cached(program: Program, target: hardware.Slice) -> bool:
  """Returns whether `cached` would return a compilation at once."""
  key = _key(program, target, hardware.compiler_name(target))
  return _read(key) is not None


def _source_files() -> list[pathlib.Path]:
  return sorted(pathlib.Path(__file__).parents[1].rglob('*.py'))


def _key(program, target, compiler):
  sources = hashlib.sha256(b''.join(
      path.read_bytes() for path in _source_files())).hexdigest()
  config = {
      key: value for key, value in config_lib.leaves(program.config)
      if key.startswith(('model.', 'lora.', 'mesh.', 'optimizer.', 'train.',
                         'data.batch_size', 'data.max_length', 'data.packing',
                         'data.buckets'))
      and key not in ('model.weights', 'model.tokenizer',
                      'model.weights_sha256', 'train.log_every',
                      'train.epochs', 'train.steps')}
  versions = {name: importlib.metadata.version(name)
              for name in ('jax', 'jaxlib', 'gemma', 'flax', 'optax')}
  return hashlib.sha256(json.dumps([
      sources, config, versions, compiler, target.topology, program.mesh.size,
      program.mesh.devices.flat[0].device_kind, program.max_trained,
      program.length], sort_keys=True).encode()).hexdigest()


def _read(key):
  try:
    known = json.loads(_path(key).read_text('utf-8'))
  except (OSError, json.JSONDecodeError):
    return None
  return Traced(**known['traced']), (
      known['compiled'] and Compiled(**known['compiled']))


def _write(key, traced, compiled):
  path = _path(key)
  path.parent.mkdir(parents=True, exist_ok=True)
  with cache.replacing(path) as partial:
    partial.write_text(json.dumps({
        'traced': dataclasses.asdict(traced),
        'compiled': compiled and dataclasses.asdict(compiled)}), 'utf-8')


def _path(key):
  return cache.folder('plan', f'{key}.json')
