"""Builds the parts of a run from its config; touches no file."""

import dataclasses
import functools
from typing import Any
from typing import Sequence

import jax
import jax.numpy as jnp
import optax

from gemma_sft import batches
from gemma_sft import model as model_lib
from gemma_sft import optimizer as optimizer_lib
from gemma_sft import sharding
from gemma_sft import state as state_lib
from gemma_sft.adapters import lora
from gemma_sft.inputs import splits as splits_lib
from gemma_sft.nn import blocks
from gemma_sft.run import devices


def make_settings(
    config: Any, model: model_lib.Model, mesh: jax.sharding.Mesh, dtype: Any,
    execution: blocks.Execution) -> state_lib.StepSettings:
  """Returns what `train.train_step` depends on besides its arrays."""
  return state_lib.StepSettings(
      model=model, lora_enabled=config.lora.enabled,
      lora_scale=lora_scale(config),
      dropout=config.lora.dropout if config.lora.enabled else 0.0,
      seed=config.seed, compute_dtype=dtype, execution=execution,
      loss_chunk=config.train.loss_chunk,
      groups=sharding.batch_groups(mesh), mesh=mesh)


# Equal settings give the same objects, so that a second run in one process does
# not compile the step again.
_make_schedule = functools.cache(optimizer_lib.make_schedule)
_make_optimizer = functools.cache(optimizer_lib.make_optimizer)


def make_optimizer(config: Any, total_steps: int
                   ) -> tuple[optax.Schedule, optax.GradientTransformation]:
  """Returns (step -> learning rate, the optimizer)."""
  schedule = _make_schedule(
      learning_rate=config.optimizer.learning_rate,
      schedule=config.optimizer.schedule,
      warmup_ratio=config.optimizer.warmup_ratio,
      final_share=config.optimizer.final_share, total_steps=total_steps)
  return schedule, _make_optimizer(
      schedule, b1=config.optimizer.b1, b2=config.optimizer.b2,
      eps=config.optimizer.eps, weight_decay=config.optimizer.weight_decay,
      max_grad_norm=config.optimizer.max_grad_norm,
      b_ratio=config.lora.loraplus_lr_ratio if config.lora.enabled else 1.0)


def make_execution(
    config: Any, model: model_lib.Model, mesh: jax.sharding.Mesh, dtype: Any,
    *, tried: bool = True,
) -> tuple[blocks.Execution, str]:
  """Returns how the forward pass runs, and a line that says why.

  `tried=False` chooses the attention kernel without running it first, for
  devices that are absent.
  """
  layers, why_layers = devices.choose_layers(config.model.layers, model)
  kernel, why_kernel = devices.choose_attention(
      config.model.attention, model, mesh, dtype=dtype,
      length=config.data.max_length, packed=config.data.packing, tried=tried)
  execution = blocks.Execution(
      layers=layers, attention=kernel, remat=config.train.remat, mesh=mesh)
  return execution, (
      f'forward: layers by {layers} ({why_layers}); attention {kernel}'
      f' ({why_kernel}); recomputed in the backward pass:'
      f' {config.train.remat}')


def lora_scale(config: Any) -> float:
  """Returns the factor of the adapters' update."""
  return lora.scale(config.lora.rank, config.lora.alpha, config.lora.use_rslora)


def make_layout(config: Any, mesh: jax.sharding.Mesh) -> batches.Layout:
  """Returns the layout of training batches."""
  return batches.Layout(
      batch_size=config.data.batch_size, max_length=config.data.max_length,
      packing=config.data.packing, buckets=tuple(config.data.buckets),
      repeat=config.data.repeat,
      microbatches=config.train.gradient_accumulation_steps,
      groups=sharding.batch_groups(mesh))


def make_source(
    config: Any, split: splits_lib.Split, layout: batches.Layout, *,
    epochs: int | None, shuffle: bool = True,
    shards: Sequence[int] | None = None) -> batches.Batches:
  """Returns this host's rows of the batches of a split."""
  if not shuffle:
    layout = dataclasses.replace(layout, repeat=1)
  return batches.Batches(
      split.examples, layout, seed=config.seed if shuffle else None,
      epochs=epochs, shards=shards)


def initial_state(
    config: Any, model: model_lib.Model, base: Any,
    optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh,
    dtype: Any) -> state_lib.TrainState:
  """Returns the state before the first update, created in its shards."""
  make = functools.partial(make_state, config, model, optimizer, dtype)
  shardings = sharding.tree_shardings(jax.eval_shape(make, base), mesh)
  return jax.jit(make, out_shardings=shardings)(base)


def make_state(
    config: Any, model: model_lib.Model,
    optimizer: optax.GradientTransformation, dtype: Any, params: Any
) -> state_lib.TrainState:
  """Returns the state before the first update, given the base weights."""
  scaled = dtype == jnp.float16
  if not config.lora.enabled:
    return state_lib.make_state(params, optimizer, scaled=scaled)
  adapters = lora.init_adapters(
      model_lib.abstract_params(model), rank=config.lora.rank,
      targets=config.lora.targets, seed=config.seed,
      transposed_gating=model.transposed_gating,
      unused=model.unused_weights)
  if config.lora.use_dora:
    adapters = lora.add_magnitudes(
        adapters, blocks.unstack(model_lib.dense(params)),
        transposed_gating=model.transposed_gating)
  return state_lib.make_state(adapters, optimizer, scaled=scaled)
