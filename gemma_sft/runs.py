"""Everything that a training run is made of, built from its config."""

import dataclasses
import functools
import json
import time
from typing import Any
from typing import Sequence

import jax
import jax.numpy as jnp
import optax

from gemma_sft import blocks
from gemma_sft import chat
from gemma_sft import checkpoint as checkpoint_lib
from gemma_sft import config as config_lib
from gemma_sft import data
from gemma_sft import distributed
from gemma_sft import errors
from gemma_sft import loading
from gemma_sft import lora
from gemma_sft import model as model_lib
from gemma_sft import optimizer as optimizer_lib
from gemma_sft import records as records_lib
from gemma_sft import sharding
from gemma_sft import state as state_lib
from gemma_sft import tasks
from gemma_sft import weights


@dataclasses.dataclass(frozen=True)
class StepSettings:
  """What a step's program depends on besides its arrays."""

  lora_enabled: bool
  lora_scale: float
  dropout: float
  seed: int
  compute_dtype: Any
  execution: blocks.Execution
  loss_chunk: int
  groups: int
  mesh: jax.sharding.Mesh


@dataclasses.dataclass(frozen=True)
class Run:
  """A prepared run.

  Attributes:
    config: The whole config.
    workdir: Its folder.
    mesh: Over all devices.
    model: The architecture.
    tokenizer: Its tokenizer.
    task: A module of `gemma_sft.tasks`.
    splits: train and, where set, validation.
    source: Batches of train.
    validation: Batches of validation, or None.
    total_steps: Updates of the whole run.
    base: The frozen weights, or None when all weights are trained.
    base_hash: Content hash of the base weights.
    data_hash: Content hash of the training records.
    settings: For `train.train_step`.
    schedule: step -> learning rate.
    optimizer: Optax's.
    initial_state: The state before the first update, per layer.
    started: When its preparation began, in seconds since 1970.
  """

  config: Any
  workdir: str
  mesh: jax.sharding.Mesh
  model: model_lib.Model
  tokenizer: chat.Tokenizer
  task: Any
  splits: dict[str, loading.Split]
  source: data.Batches
  validation: data.Batches | None
  total_steps: int
  base: Any
  base_hash: str
  data_hash: str
  settings: StepSettings
  schedule: optax.Schedule
  optimizer: optax.GradientTransformation
  initial_state: state_lib.TrainState
  started: float

  def merged(self, trainable: Any) -> Any:
    """Returns weights for generation, adapters merged in if they can be."""
    if not self.settings.lora_enabled:
      return jax.tree.map(
          lambda leaf: leaf.astype(self.settings.compute_dtype), trainable)
    merged = model_lib.merge(
        self.model, self.base, trainable, self.settings.lora_scale)
    if jax.default_backend() == 'cpu':
      # There a layer is copied out of the stack for each token: 8 rows of 32
      # tokens of the 270M take 8.5 CPU-seconds so, and 5.9 per layer. An
      # accelerator may not have the room for the copy.
      merged = model_lib.per_layer(merged)
    return merged

  def enter(self, state: state_lib.TrainState) -> state_lib.TrainState:
    """Returns a state in the form that steps run on."""
    if self.settings.lora_enabled and self.settings.execution.layers == 'scan':
      state = state_lib.stack_layers(state, self.model.config.num_layers)
    return jax.device_put(state, sharding.tree_shardings(state, self.mesh))

  def leave(self, state: state_lib.TrainState) -> state_lib.TrainState:
    """Returns a state of steps in the form of checkpoints, per layer."""
    if self.settings.lora_enabled and self.settings.execution.layers == 'scan':
      state = state_lib.unstack_layers(state, self.initial_state)
    return state

  def meta(self, step: int, data_state: Any, chain: str, **more: Any
           ) -> checkpoint_lib.Meta:
    """Returns what a checkpoint of this run says besides its arrays."""
    return checkpoint_lib.Meta(
        step=step, data=data_state, chain=chain,
        config=dict(config_lib.leaves(self.config)), base=self.base_hash,
        data_hash=self.data_hash, **more)


def prepare(config: Any, workdir: str, *, data_only: bool = False
            ) -> Run | None:
  """Builds a run, telling the person what it is; stops at the first mistake.

  Everything that needs no weights comes first: a wrong row or mesh is told
  before gigabytes are read.

  Args:
    config: Validated.
    workdir: The run's folder, locked by the caller.
    data_only: Stop after the audit, the plan printed; returns None.

  Raises:
    UserError: for what the user can mend.
  """
  started = time.time()
  leaves = json.loads(json.dumps(dict(config_lib.leaves(config))))
  for key, value in distributed.from_first(leaves).items():
    if value != leaves[key]:
      raise errors.UserError(
          f'config.{key} is {leaves[key]} on process {distributed.index()} and'
          f' {value} on process 0', 'the same command on all of them',
          'stop them and start them alike')
  loading.enable_compilation_cache()
  task = tasks.load(config.task)
  mesh = sharding.make_mesh(
      data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
  layout = make_layout(config, mesh)
  model = loading.load_model(config.model)
  loading.check_length(config.data.max_length, model)
  dtype, reason = loading.choose_dtype(config.model.dtype)
  say(f'devices: {jax.device_count()} x {jax.devices()[0].device_kind}, all in'
      ' use, mesh ' + ' x '.join(f'{a} {n}' for a, n in mesh.shape.items()))
  say(f'dtype: {dtype.name} for the base and compute ({reason}); adapters, '
      'optimizer and loss float32' + (
          '; loss scaled' if dtype == jnp.float16 else ''))
  execution, why = make_execution(config, model, mesh, dtype)
  say(why)

  resolved = loading.resolve_weights(config.model)
  say(f'base: {config.model.name}, {resolved.description}')
  tokenizer = loading.load_tokenizer(
      config.model, resolved, model.generation)
  loading.check_vocabulary(tokenizer, model)
  splits = loading.load_splits(
      config.data, ('train', 'validation', 'test'), task, tokenizer)
  report_audit(splits, task)
  shards = sharding.local_shards(mesh)
  source = make_source(
      config, splits['train'], layout, epochs=None, shards=shards)
  total_steps = config.train.steps or (
      source.batches_per_epoch * config.train.epochs)
  say(f'plan: {total_steps} updates, {source.batches_per_epoch} an epoch of'
      f' {splits["train"].report.n_examples} examples x {config.data.repeat}'
      f' in rows of {config.data.max_length} tokens')
  most, chunk = source.most_trained(), config.train.loss_chunk
  say(f'loss: at most {most} trained tokens on a device, '
      + (f'in {-(-most // chunk)} chunks' if most > chunk else 'in one chunk: '
         f'config.train.loss_chunk is {chunk}'))
  if data_only:
    return None
  data_hash = records_lib.content_hash(splits['train'].records)
  distributed.check_same(
      'the hash of base weights and training records',
      [base_hash(resolved, config.seed), data_hash],
      'the same on all hosts', 'copy these files from one host to the others')

  base = loading.load_base(
      model, resolved, mesh, seed=config.seed,
      dtype=dtype if config.lora.enabled else jnp.dtype('float32'),
      stacked=execution.layers == 'scan' and config.lora.enabled,
      quantization=config.model.quantization)
  schedule, optimizer = make_optimizer(config, total_steps)
  state = initial_state(config, model, base, optimizer, mesh, dtype)
  say(f'trained: {model_lib.count_params(state.trainable):,} of '
      f'{model_lib.count_params(base):,} weights')
  validation = None
  if 'validation' in splits:
    validation = make_source(config, splits['validation'], layout, epochs=1,
                             shuffle=False, shards=shards)
  return Run(
      config=config, workdir=workdir, mesh=mesh, model=model,
      tokenizer=tokenizer, task=task, splits=splits, source=source,
      validation=validation, total_steps=total_steps,
      base=base if config.lora.enabled else None,
      base_hash=base_hash(resolved, config.seed),
      data_hash=data_hash,
      settings=make_settings(config, mesh, dtype, execution),
      schedule=schedule, optimizer=optimizer, initial_state=state,
      started=started)


def make_settings(
    config: Any, mesh: jax.sharding.Mesh, dtype: Any,
    execution: blocks.Execution) -> StepSettings:
  """Returns what `train.train_step` depends on besides its arrays."""
  return StepSettings(
      lora_enabled=config.lora.enabled,
      lora_scale=lora_scale(config),
      dropout=config.lora.dropout if config.lora.enabled else 0.0,
      seed=config.seed, compute_dtype=dtype, execution=execution,
      loss_chunk=config.train.loss_chunk,
      groups=sharding.batch_groups(mesh), mesh=mesh)


def make_optimizer(
    config: Any, total_steps: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """Returns (step -> learning rate, the optimizer)."""
  schedule = optimizer_lib.make_schedule(
      learning_rate=config.optimizer.learning_rate,
      schedule=config.optimizer.schedule,
      warmup_share=config.optimizer.warmup_share,
      final_share=config.optimizer.final_share, total_steps=total_steps)
  return schedule, optimizer_lib.make_optimizer(
      schedule, b1=config.optimizer.b1, b2=config.optimizer.b2,
      eps=config.optimizer.eps, weight_decay=config.optimizer.weight_decay,
      clip_norm=config.optimizer.clip_norm,
      b_ratio=config.lora.plus_ratio if config.lora.enabled else 1.0)


def make_execution(
    config: Any, model: model_lib.Model, mesh: jax.sharding.Mesh, dtype: Any,
    *, tried: bool = True,
) -> tuple[blocks.Execution, str]:
  """Returns how the forward runs on these devices, and a line that says why.

  Args:
    config: The whole config.
    model: From `make_model`.
    mesh: Of the run.
    dtype: Of compute.
    tried: See `loading.choose_attention`.
  """
  layers, why_layers = loading.choose_layers(config.model.layers, model)
  kernel, why_kernel = loading.choose_attention(
      config.model.attention, model, mesh, dtype=dtype,
      length=config.data.max_length, packed=config.data.packing, tried=tried)
  execution = blocks.Execution(
      layers=layers, attention=kernel, remat=config.train.remat, mesh=mesh)
  return execution, (
      f'forward: layers by {layers} ({why_layers}); attention {kernel}'
      f' ({why_kernel}); rematerialised: {config.train.remat}')


def say(text: str) -> None:
  """Prints a line, on the first host only."""
  if jax.process_index() == 0:
    print(text, flush=True)


def lora_scale(config: Any) -> float:
  """Returns the factor of the adapters' update."""
  return lora.scale(
      config.lora.rank, config.lora.alpha, config.lora.rank_stabilised)


def make_layout(config: Any, mesh: jax.sharding.Mesh) -> data.Layout:
  """Returns the layout of training batches."""
  return data.Layout(
      batch_size=config.data.batch_size, max_length=config.data.max_length,
      packing=config.data.packing, buckets=tuple(config.data.buckets),
      repeat=config.data.repeat, microbatches=config.train.microbatches,
      groups=sharding.batch_groups(mesh))


def make_source(
    config: Any,
    split: loading.Split,
    layout: data.Layout,
    *,
    epochs: int | None,
    shuffle: bool = True,
    shards: Sequence[int] | None = None,
) -> data.Batches:
  """Returns the batches of a split, this host's rows of them."""
  if not shuffle:
    layout = dataclasses.replace(layout, repeat=1)
  return data.Batches(
      split.examples, layout, seed=config.seed if shuffle else None,
      epochs=epochs, shards=shards)


def initial_state(
    config: Any,
    model: model_lib.Model,
    base: Any,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    dtype: Any,
) -> state_lib.TrainState:
  """Returns the state before the first update, born in its shards."""
  make = functools.partial(make_state, config, model, optimizer, dtype)
  shardings = sharding.tree_shardings(jax.eval_shape(make, base), mesh)
  return jax.jit(make, out_shardings=shardings)(base)


def make_state(
    config: Any,
    model: model_lib.Model,
    optimizer: optax.GradientTransformation,
    dtype: Any,
    params: Any,
) -> state_lib.TrainState:
  """Returns the state before the first update, of these base weights."""
  scaled = dtype == jnp.float16
  if not config.lora.enabled:
    return state_lib.make_state(params, optimizer, scaled=scaled)
  adapters = lora.init_adapters(
      model_lib.abstract_params(model), rank=config.lora.rank,
      targets=config.lora.targets, seed=config.seed,
      transposed_gating=model.transposed_gating,
      unused=model.unused_weights)
  if config.lora.dora:
    adapters = lora.add_magnitudes(
        adapters, blocks.unstack(model_lib.dense(params)),
        transposed_gating=model.transposed_gating)
  return state_lib.make_state(adapters, optimizer, scaled=scaled)


_SHOWN = 5


def report_audit(splits: dict[str, loading.Split], task: Any) -> None:
  """Prints the audit, and what the task finds wrong in training answers."""
  for split in splits.values():
    say(f'audit: {split.report}')
  problems = task.check_answers(splits['train'].records)
  for line in problems[:_SHOWN]:
    say(f'warning: {line}')
  if len(problems) > _SHOWN:
    say(f'warning: ... and {len(problems) - _SHOWN} more')
  if problems:
    n = splits['train'].report.n_examples
    say(f'warning: {len(problems)} of {n} training answers are wrong by the'
        " task's own judge; the run goes on and learns from them")


def abstract_state(run: Run) -> Any:
  """Returns shapes and shardings of the state, for restoring."""
  return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=leaf.sharding), run.initial_state)


def check_resume(run: Run, meta: checkpoint_lib.Meta) -> None:
  """Refuses to go on where the checkpoint's run was another.

  Raises:
    UserError: naming what differs: config, base weights, data or batches.
  """
  saved = meta.config
  different = config_lib.differences(saved, dict(
      config_lib.leaves(run.config)))
  if different:
    raise errors.UserError(
        f'the checkpoint in {run.workdir} is of another config: '
        + '; '.join(different),
        'the config that the run began with',
        'undo the change, or choose another --workdir')
  if meta.base != run.base_hash:
    raise errors.UserError(
        f'the base weights have hash {run.base_hash[:16]}, the checkpoint was'
        f' trained on {meta.base[:16]}', 'the same base weights',
        'point --config.model.weights at those, or choose another --workdir')
  if meta.data_hash != run.data_hash:
    raise errors.UserError(
        f'the training records ({run.config.data.train}) have hash'
        f' {run.data_hash[:16]}, the checkpoint was trained on'
        f' {meta.data_hash[:16]}', 'unchanged training data',
        'restore the file, or choose another --workdir')
  if meta.chain != data.chain_of(run.source, meta.step):
    raise errors.UserError(
        f'the {meta.step} batches before this checkpoint cannot be made again',
        f'hash chain {meta.chain[:16]}',
        'the tokenizer or the packing has changed since; choose another'
        ' --workdir')
  say(f'resuming after {meta.step} updates; batches {meta.chain[:16]} verified')


def base_hash(resolved: weights.Resolved, seed: int) -> str:
  """Returns the content hash of the base; random weights go by their seed."""
  if resolved.kind == 'random':
    return f'random weights of seed {seed}'
  return resolved.content_hash


def init_from(run: Run, workdir: str) -> state_lib.TrainState:
  """Returns the fresh state with another run's best adapters in it.

  Raises:
    UserError: if that run is of another base, scale or shape of adapters.
  """
  checkpoints = checkpoint_lib.Checkpoints(workdir, read_only=True)
  step = checkpoint_lib.choose_step(checkpoints, -1)
  trainable, meta = checkpoints.restore_trainable(step)
  check_weights(run.config, run.base_hash, meta, f'config.init_from: {workdir}')
  say(f'starting from {workdir}, step {step}')
  fresh = run.initial_state.trainable
  return dataclasses.replace(
      run.initial_state, trainable=jax.tree.map(
          lambda leaf, like: jax.device_put(leaf, like.sharding),
          trainable, fresh))


def check_weights(
    config: Any, base: str, meta: checkpoint_lib.Meta, what: str) -> None:
  """Refuses weights that would mean something else under this config.

  Args:
    config: The config at hand.
    base: From `base_hash`.
    meta: Of the checkpoint.
    what: Begins the message.

  Raises:
    UserError: naming what differs.
  """
  different = [
      line for line in config_lib.differences(
          meta.config, dict(config_lib.leaves(config)))
      if line.startswith(('model.', 'lora.'))
      and not line.startswith('lora.dropout')]
  if meta.base != base:
    different.append(f'base weights: {meta.base[:40]} -> {base[:40]}')
  if different:
    raise errors.UserError(
        f'{what} cannot be taken over: ' + '; '.join(different),
        'the model, the adapters and the base weights that it was trained with',
        "undo the change; without --config the run's own config is taken")
