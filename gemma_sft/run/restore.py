"""Loads the weights of a run to score, sample from or export them."""

import dataclasses
from typing import Any

import jax

from gemma_sft import batches
from gemma_sft import chat
from gemma_sft import model as model_lib
from gemma_sft import sharding
from gemma_sft import tasks
from gemma_sft.inputs import splits
from gemma_sft.nn import blocks
from gemma_sft.run import base as base_lib
from gemma_sft.run import build
from gemma_sft.run import checkpoint as checkpoint_lib
from gemma_sft.run import devices
from gemma_sft.run import resume
from gemma_sft.weights import load


@dataclasses.dataclass(frozen=True)
class Served:
  """Weights to score or to sample from, with all that they need."""

  config: Any
  mesh: jax.sharding.Mesh
  model: model_lib.Model
  tokenizer: chat.Tokenizer
  task: Any
  params: Any  # With the adapters merged in, see `model.merge`.
  execution: blocks.Execution
  description: str  # Which weights these are, for people.
  identity: str  # The same for comparing: that of `Chosen`, and the dtype.

  def split(self, name: str) -> splits.Split:
    """Returns an audited split."""
    return splits.load_splits(
        self.config.data, (name,), self.task, self.tokenizer)[name]

  def source(self, examples: list[chat.Example]) -> batches.Batches:
    """Returns the batches of examples, in order."""
    layout = dataclasses.replace(
        build.make_layout(self.config, self.mesh), repeat=1)
    return batches.Batches(
        examples, layout, seed=None, shards=sharding.local_shards(self.mesh))


@dataclasses.dataclass(frozen=True)
class Chosen:
  """Weights that were found and checked, but not read yet."""

  config: Any
  model: model_lib.Model
  tokenizer: chat.Tokenizer
  resolved: load.Resolved  # The base weights.
  # None, 0 and None for the untouched base.
  checkpoints: checkpoint_lib.Checkpoints | None
  step: int
  meta: checkpoint_lib.Meta | None
  description: str  # Which weights these are, for people.
  # The same for comparing: hash of the base and digest of the checkpoint.
  identity: str


def choose_weights(
    config: Any, workdir: str, *, base: bool, step: int) -> Chosen:
  """Finds a run's checkpoint and base before gigabytes are read.

  `base` takes the untouched base model, `step` is for `checkpoint.choose_step`.
  Raises `UserError` if there is no such checkpoint, or it is of another base.
  """
  model = base_lib.load_model(config.model)
  checkpoints = None
  if not base:
    checkpoints = checkpoint_lib.Checkpoints(workdir, read_only=True)
    step = checkpoint_lib.choose_step(checkpoints, step)
  resolved = base_lib.resolve_weights(config.model)
  tokenizer = base_lib.load_tokenizer(config.model, resolved, model.generation)
  base_lib.check_vocabulary(tokenizer, model)
  identity = base_lib.base_hash(resolved, config.seed)
  if checkpoints is None:
    return Chosen(
        config, model, tokenizer, resolved, None, 0, None,
        f'{config.model.name}, untouched', identity)
  meta = checkpoints.explained_meta(step)
  resume.check_weights(config, identity, meta, f'the checkpoint in {workdir}')
  return Chosen(
      config, model, tokenizer, resolved, checkpoints, step, meta,
      f'{config.model.name}, tuned {step} updates in {workdir}',
      f'{identity} {meta.digest or meta.chain}')


def load_weights(
    config: Any, workdir: str, *, base: bool, step: int, dtype: str = ''
) -> Served:
  """Loads the base and, unless `base`, merges a run's checkpoint into it.

  The arguments are those of `choose_weights`; `dtype`, if given, replaces
  config.model.dtype.
  """
  devices.enable_compilation_cache()
  mesh = sharding.make_mesh(
      data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
  dtype, _ = devices.choose_dtype(dtype or config.model.dtype)
  chosen = choose_weights(config, workdir, base=base, step=step)
  model = chosen.model
  kernel, _ = devices.choose_attention(
      config.model.attention, model, mesh, dtype=dtype,
      length=config.data.max_length, packed=config.data.packing)
  trainable = None
  if chosen.checkpoints is not None:
    trainable, _ = chosen.checkpoints.restore_trainable(chosen.step)
  params = base_lib.load_base(
      model, chosen.resolved, mesh, dtype=dtype, seed=config.seed,
      quantization=config.model.quantization)
  if trainable is not None and config.lora.enabled:
    params = model_lib.merge(model, params, trainable, build.lora_scale(config))
  elif trainable is not None:
    params = jax.tree.map(
        lambda leaf, like: jax.device_put(leaf.astype(dtype), like.sharding),
        trainable, params)
  return Served(
      config, mesh, model, chosen.tokenizer, tasks.load(config.task), params,
      blocks.Execution(attention=kernel, mesh=mesh), chosen.description,
      f'{chosen.identity} {dtype.name}')
