"""The training step without its weights, its data or its devices.

Shapes, dtypes and shardings are made by the functions that a run is made by
(`runs`, `sharding`, `model`), so what is traced and compiled here is the
program that would run; nothing is read and nothing is allocated. TPUs are
compiled for by libtpu, which needs no TPU.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
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
  """A step that can be traced and compiled.

  Attributes:
    config: The whole config.
    model: The architecture.
    settings: For `train.train_step`.
    optimizer: Optax's.
    base: Shapes of the frozen weights in their shards, or None.
    state: Of the state, in the form that steps run on.
    batch: Of the arrays of a batch.
    max_trained: See `head.masked_nll`.
  """

  config: Any
  model: model_lib.Model
  settings: state_lib.StepSettings
  optimizer: Any
  base: Any
  state: state_lib.TrainState
  batch: dict[str, jax.ShapeDtypeStruct]
  max_trained: int

  @property
  def mesh(self) -> jax.sharding.Mesh:
    return self.settings.mesh

  @property
  def rows(self) -> int:
    """Rows of a microbatch on one device."""
    A, B, _ = self.batch['tokens'].shape
    del A
    return B // self.settings.groups

  @property
  def length(self) -> int:
    return self.batch['tokens'].shape[2]

  @property
  def n_embedding(self) -> int:
    """Weights of the tied embedding."""
    return self.weights['embedder']['input_embedding'].size

  @property
  def weights(self) -> Any:
    """All weights of the model: the base, or what is trained."""
    return self.base if self.base is not None else self.state.trainable


def row_length(config: Any) -> int:
  """Returns the tokens of the longest row of a batch."""
  return max((config.data.max_length, *config.data.buckets))


def make_program(
    config: Any, devices: Sequence[Any], *, max_trained: int) -> Program:
  """Returns the step of a config on devices, which need not be there.

  Args:
    config: Validated.
    devices: Of JAX, of a topology, or `hardware.AbsentDevice`s.
    max_trained: Bound on the trained tokens of a device, see `batches.Batches`.

  Raises:
    UserError: for a mesh, batch or kernel that the devices cannot have.
  """
  mesh = sharding.make_mesh(
      data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor,
      devices=devices)
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

  def fresh(params):
    state = build.make_state(config, model, optimizer, dtype, params)
    if stacked:
      state = state_lib.stack_layers(state, model.config.num_layers)
    return state

  state = _placed(jax.eval_shape(fresh, base), mesh)
  A, B, T = layout.microbatches, layout.batch_size, row_length(config)
  place = sharding.batch_sharding(mesh)
  batch = {
      name: jax.ShapeDtypeStruct((A, B // A, T), kind, sharding=place)
      for name, kind in (('tokens', jnp.int32), ('targets', jnp.int32),
                         ('positions', jnp.int32), ('segment_ids', jnp.int32),
                         ('loss_mask', jnp.bool))}
  batch['rows'] = jax.ShapeDtypeStruct((A, B // A), jnp.int32, sharding=place)
  return Program(
      config=config, model=model,
      settings=build.make_settings(config, model, mesh, dtype, execution),
      optimizer=optimizer, base=_placed(base, mesh) if adapted else None,
      state=state, batch=batch, max_trained=max_trained)


def _base_shapes(model, dtype, quantization, stacked):
  """Returns the shapes of what `base.load_base` loads."""
  params = model_lib.abstract_params(model)

  def of(path, leaf):
    name = '/'.join(str(p.key) for p in path)
    if quantization and quantize.is_quantized(name):
      return _quantized_shape(leaf.shape, quantization)
    return jax.ShapeDtypeStruct(leaf.shape, dtype)

  params = jax.tree_util.tree_map_with_path(of, params)
  return blocks.stack(params) if stacked else params


def _quantized_shape(shape, kind):
  """Returns the `quantize.Quantized` of shapes; blocks lie along the last axis,
  so one row of zeros tells them."""
  row = quantize.quantize(np.zeros(shape[-1:], np.float32), kind)
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((*shape[:-1], *x.shape), x.dtype), row)


def _placed(tree, mesh):
  return jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=place),
      tree, sharding.tree_shardings(tree, mesh))


def local_bytes(tree: Any) -> int:
  """Returns the bytes of a tree of placed shapes on one device."""
  return sum(
      int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
      * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# Tracing and compiling -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Traced:
  """What a program's trace tells, over all devices.

  Attributes:
    flops: Of the matrix products of a step, recomputed ones counted again.
    kept: Bytes that the forward pass of a microbatch leaves for the backward
      one; 0 where layers are not scanned.
  """

  flops: float
  kept: int


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of a step, in bytes on one device.

  Attributes:
    arguments: State, base and batch, as they lie on the device.
    temporaries: Besides them, while the step runs.
    peak: Most that is in use at a time; where the step does not fit, what it
      would need.
    added: What a step needs above what lies there before it.
    available: What the compiler has; 0 if it knows no bound.
    fits: Whether the compiler took the program.
    seconds: CPU time of the compilation.
    compiler: Its name and version.
  """

  arguments: int
  temporaries: int
  peak: int
  added: int
  available: int
  fits: bool
  seconds: float
  compiler: str


def trace(step_fn: Any, program: Program) -> tuple[Any, Traced]:
  """Returns (JAX's traced step, what it tells).

  Args:
    step_fn: `train.train_step`.
    program: From `make_program`.
  """
  traced = step_fn.trace(
      program.state, program.base, program.batch,
      optimizer=program.optimizer, settings=program.settings,
      max_trained=program.max_trained)
  kinds = [kind.name for kind in program.model.config.attention_types]
  local = kinds.count('LOCAL_SLIDING') / len(kinds)
  L = program.model.config.num_layers
  # The step's one cond of two branches: global layers, local layers.
  return traced, Traced(
      flops_lib.product_flops(traced.jaxpr, branch_shares=(1 - local, local)),
      flops_lib.kept_bytes(traced.jaxpr, L))


def compile_step(lowered: Any, compiler: str) -> Compiled:
  """Compiles a step; that it does not fit is a result.

  Args:
    lowered: What `trace` returns first, lowered.
    compiler: From `hardware.compiler_name`.
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
    # Of a CPU it is what the temporaries are without the arguments, or 0.
    peak = memory.argument_size_in_bytes + added
  return Compiled(
      memory.argument_size_in_bytes, memory.temp_size_in_bytes, peak, added, 0,
      True, time.process_time() - start, compiler)


_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def _overflow(message: str) -> tuple[int, int]:
  """Returns (needed, available) bytes of a compiler's refusal.

  Raises:
    UserError: if it refused for another reason.
  """
  found = re.search(
      r'\(([\d.]+)([KMGT]?)B?\) exceeds available \w+ \(([\d.]+)([KMGT]?)B?\)',
      message)
  if found is None:
    lines = [line for line in message.splitlines() if line.strip()]
    raise errors.UserError(
        'the compiler refuses the step: ' + ' '.join(lines[:2])[:600],
        'a step that compiles for these devices',
        'try --config.model.attention=chunked; if it helps, a kernel does not'
        ' work there')
  needed, unit, available, unit_2 = found.groups()
  return (int(float(needed) * _UNITS[unit]),
          int(float(available) * _UNITS[unit_2]))


# What was compiled before ----------------------------------------------------

# The modules that decide what a step's program is.
_SOURCES = ('adapters/*.py', 'nn/*.py', 'loss.py', 'model.py', 'optimizer.py',
            'planning/compile_step.py', 'planning/flops.py', 'run/build.py',
            'sharding.py', 'state.py', 'train.py')


def cached(
    step_fn: Any, program: Program, place: hardware.Slice, *, compiled: bool
) -> tuple[Traced, Compiled | None]:
  """Returns trace and compilation, from the cache where they are known.

  A result is kept under a hash of config, devices, versions and the modules of
  the step; and once more under the program itself, so that a change of those
  modules that leaves it the same costs no compilation.

  Args:
    step_fn: `train.train_step`.
    program: From `make_program`.
    place: Of its devices.
    compiled: Or trace it only.
  """
  compiler = hardware.compiler_name(place) if compiled else ''
  key = _key(program, place, compiler)
  if known := _load(key):
    return known
  traced, facts = trace(step_fn, program)
  if not compiled:
    _save(key, facts, None)
    return facts, None
  lowered = traced.lower()
  by_program = hashlib.sha256(
      f'{place.topology} {program.mesh.size} {compiler}\n'.encode()
      + lowered.as_text().encode()).hexdigest()
  known = _load(by_program)
  result = known[1] if known else compile_step(lowered, compiler)
  _save(by_program, facts, result)
  _save(key, facts, result)
  return facts, result


def is_cached(program: Program, place: hardware.Slice) -> bool:
  """Returns whether `cached` would answer at once."""
  compiler = hardware.compiler_name(place)
  return _load(_key(program, place, compiler)) is not None


def _key(program, place, compiler):
  package = pathlib.Path(__file__).parents[1]
  sources = hashlib.sha256(b''.join(
      path.read_bytes() for pattern in _SOURCES
      for path in sorted(package.glob(pattern)))).hexdigest()
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
      sources, config, versions, compiler, place.topology, program.mesh.size,
      program.mesh.devices.flat[0].device_kind, program.max_trained,
      program.length], sort_keys=True).encode()).hexdigest()


def _load(key):
  try:
    kept = json.loads(_path(key).read_text(encoding='utf-8'))
  except (OSError, json.JSONDecodeError):
    return None
  compiled = kept['compiled']
  return Traced(**kept['traced']), compiled and Compiled(**compiled)


def _save(key, traced, compiled):
  path = _path(key)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix(f'.{os.getpid()}')
  partial.write_text(json.dumps({
      'traced': dataclasses.asdict(traced),
      'compiled': compiled and dataclasses.asdict(compiled)}), 'utf-8')
  os.replace(partial, path)


def _path(key):
  return cache.folder('plan', f'{key}.json')
