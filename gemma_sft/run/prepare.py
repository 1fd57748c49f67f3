"""Reads what a training run needs and stops at the first mistake."""

import dataclasses
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gemma_sft import batches
from gemma_sft import chat
from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft import sharding
from gemma_sft import state as state_lib
from gemma_sft import tasks
from gemma_sft.inputs import splits as splits_lib
from gemma_sft.run import base as base_lib
from gemma_sft.run import build
from gemma_sft.run import checkpoint as checkpoint_lib
from gemma_sft.run import devices
from gemma_sft.run import hosts


@dataclasses.dataclass(frozen=True)
class Run:
  """A prepared run."""

  config: Any
  workdir: str
  mesh: jax.sharding.Mesh
  model: model_lib.Model
  tokenizer: chat.Tokenizer
  task: Any
  splits: dict[str, splits_lib.Split]  # train; validation and test if set.
  source: batches.Batches  # Of the train split.
  validation: batches.Batches | None
  total_steps: int  # Updates of the whole run.
  eval_every: int  # Updates between evaluations.
  save_every: int  # Updates between checkpoints.
  base: Any  # The frozen weights; None when all weights are trained.
  base_hash: str  # Of the content of the base weights.
  data_hash: str  # Of the content of the training records.
  settings: state_lib.StepSettings
  schedule: optax.Schedule  # step -> learning rate.
  optimizer: optax.GradientTransformation
  initial_state: state_lib.TrainState  # Before the first update, per layer.
  started: float  # When the preparation began, in seconds since 1970.

  def merged(self, trainable: Any) -> Any:
    """Returns weights for generation, adapters merged in if they can be."""
    if not self.settings.lora_enabled:
      dtype = self.settings.compute_dtype
      return jax.tree.map(lambda leaf: leaf.astype(dtype), trainable)
    merged = model_lib.merge(
        self.model, self.base, trainable, self.settings.lora_scale)
    if jax.default_backend() == 'cpu':
      # On a CPU a stacked layer is copied out of the stack for each token: 8
      # rows of 32 tokens of the 270M take 8.5 CPU-seconds so, and 5.9 with
      # separate layers. An accelerator may lack the memory for the copy.
      merged = model_lib.per_layer(merged)
    return merged

  def enter(self, state: state_lib.TrainState) -> state_lib.TrainState:
    """Returns a state in the form that `train_step` takes."""
    if self._stacked:
      state = state_lib.stack_layers(state, self.model.config.num_layers)
    return jax.device_put(state, sharding.tree_shardings(state, self.mesh))

  def leave(self, state: state_lib.TrainState) -> state_lib.TrainState:
    """Returns a state of `train_step` in the form of checkpoints, per layer."""
    if self._stacked:
      state = state_lib.unstack_layers(state, self.initial_state)
    return state

  @property
  def _stacked(self) -> bool:
    return self.settings.lora_enabled and (
        self.settings.execution.layers == 'scan')

  def meta(self, step: int, data_state: Any, chain: str, **more: Any
           ) -> checkpoint_lib.Meta:
    """Returns what a checkpoint of this run contains besides its arrays."""
    return checkpoint_lib.Meta(
        step=step, data=data_state, chain=chain,
        config=dict(config_lib.leaves(self.config)), base=self.base_hash,
        data_hash=self.data_hash, **more)


def prepare(config: Any, workdir: str, *, data_only: bool = False
            ) -> Run | None:
  """Builds a run and prints what it is; stops at the first mistake.

  Everything that needs no weights comes first, so that a wrong row or mesh is
  reported before gigabytes are read. `data_only` stops there, and returns None.
  The caller has validated the config and locked the workdir.
  """
  started = time.time()
  _check_same_config(config)
  devices.enable_compilation_cache()
  task = tasks.load(config.task)
  mesh = sharding.make_mesh(
      data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
  layout = build.make_layout(config, mesh)
  model = base_lib.load_model(config.model)
  base_lib.check_length(config.data.max_length, model)
  dtype, reason = devices.choose_dtype(config.model.dtype)
  hosts.say(f'devices: {jax.device_count()} x {jax.devices()[0].device_kind},'
            ' all in use, mesh '
            + ' x '.join(f'{a} {n}' for a, n in mesh.shape.items()))
  scaled = '; loss scaled' if dtype == jnp.float16 else ''
  hosts.say(f'dtype: {dtype.name} for the base and compute ({reason});'
            f' adapters, optimizer and loss float32{scaled}')
  execution, why = build.make_execution(config, model, mesh, dtype)
  hosts.say(why)

  resolved = base_lib.resolve_weights(config.model)
  hosts.say(f'base: {config.model.name}, {resolved.description}')
  tokenizer = base_lib.load_tokenizer(config.model, resolved, model.generation)
  base_lib.check_vocabulary(tokenizer, model)
  splits = splits_lib.load_splits(
      config.data, ('train', 'validation', 'test'), task, tokenizer)
  _report_audit(splits, task)
  shards = sharding.local_shards(mesh)
  source = build.make_source(
      config, splits['train'], layout, epochs=None, shards=shards)
  total_steps = config.train.steps or (
      source.batches_per_epoch * config.train.epochs)
  hosts.say(f'plan: {total_steps} updates, {source.batches_per_epoch} an epoch'
            f' of {splits["train"].report.n_examples} examples x'
            f' {config.data.repeat} in rows of {config.data.max_length} tokens')
  most, chunk = source.most_trained(), config.train.loss_chunk
  hosts.say(f'loss: at most {most} trained tokens on a device, '
      + (f'in {-(-most // chunk)} chunks' if most > chunk else 'in one chunk: '
         f'config.train.loss_chunk is {chunk}'))
  if data_only:
    return None
  data_hash = splits['train'].data_hash
  hosts.check_same(
      'the hash of base weights and training records',
      [base_lib.base_hash(resolved, config.seed), data_hash],
      'the same on all hosts', 'copy these files from one host to the others')

  base = base_lib.load_base(
      model, resolved, mesh, seed=config.seed,
      dtype=dtype if config.lora.enabled else jnp.dtype('float32'),
      stacked=execution.layers == 'scan' and config.lora.enabled,
      quantization=config.model.quantization)
  schedule, optimizer = build.make_optimizer(config, total_steps)
  state = build.initial_state(config, model, base, optimizer, mesh, dtype)
  hosts.say(f'trained: {model_lib.count_params(state.trainable):,} of '
      f'{model_lib.count_params(base):,} weights')
  eval_every = config.eval.every or source.batches_per_epoch
  validation = None
  if 'validation' in splits:
    validation = build.make_source(
        config, splits['validation'], layout, epochs=1, shuffle=False,
        shards=shards)
  return Run(
      config=config, workdir=workdir, mesh=mesh, model=model,
      tokenizer=tokenizer, task=task, splits=splits, source=source,
      validation=validation, total_steps=total_steps, eval_every=eval_every,
      save_every=config.checkpoint.every or eval_every,
      base=base if config.lora.enabled else None,
      base_hash=base_lib.base_hash(resolved, config.seed),
      data_hash=data_hash,
      settings=build.make_settings(config, model, mesh, dtype, execution),
      schedule=schedule, optimizer=optimizer, initial_state=state,
      started=started)


_SHOWN = 5


def _report_audit(splits, task):
  """Prints the audit, and the training answers that the task finds wrong."""
  for split in splits.values():
    hosts.say(f'audit: {split.report}')
  problems = task.check_answers(splits['train'].records)
  for line in problems[:_SHOWN]:
    hosts.say(f'warning: {line}')
  if len(problems) > _SHOWN:
    hosts.say(f'warning: ... and {len(problems) - _SHOWN} more')
  if problems:
    n = splits['train'].report.n_examples
    hosts.say(f'warning: {len(problems)} of {n} training answers are wrong by'
              " the task's own judge; the run continues and learns from them")


def _check_same_config(config):
  """Raises where hosts were started with different configs."""
  leaves = json.loads(json.dumps(dict(config_lib.leaves(config))))
  for key, value in hosts.from_first(leaves).items():
    if value != leaves[key]:
      raise errors.UserError(
          f'config.{key} is {leaves[key]} on process {hosts.index()} and'
          f' {value} on process 0', 'the same command on all of them',
          'stop them and start them alike')
