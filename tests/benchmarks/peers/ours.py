"""This project's `train_step`, and Tunix's default loss over its model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from configs import default
from gemma_sft import model as model_lib
from gemma_sft import sharding
from gemma_sft import state as state_lib
from gemma_sft import train
from gemma_sft.adapters import lora
from gemma_sft.nn import blocks
from gemma_sft.planning import compile_step
from gemma_sft.run import devices
from peers import common
from peers import library_tree
from peers import meter


def make_program(spec: common.Spec) -> compile_step.Program:
  """Returns the step of a run with default settings."""
  config = default.get_config()
  config.model.update(dtype=spec.dtype, **common.MODELS[spec.shape])
  config.data.update(
      max_length=spec.length, batch_size=spec.rows, packing=False)
  config.lora.update(rank=common.RANK, alpha=common.ALPHA, targets='attn/')
  config.optimizer.update(
      schedule='constant', warmup_ratio=0.0, max_grad_norm=0.0,
      **common.OPTIMIZER)
  return compile_step.make_program(
      config, jax.devices(), max_trained=spec.rows * spec.n_trained)


def make_adapters(spec: common.Spec, model: model_lib.Model):
  """Returns the package's adapters with the common A."""
  adapters = lora.init_adapters(
      model_lib.abstract_params(model), rank=common.RANK, targets='attn/',
      transposed_gating=model.transposed_gating, seed=0)
  modules = {'q': 'q_einsum', 'k': 'kv_einsum', 'v': 'kv_einsum',
             'o': 'attn_vec_einsum'}
  given = list(common.load_adapters(spec))
  for layer, name, a_RI in given:
    factors = adapters[f'layer_{layer}']['attn'][modules[name]][name]
    factors['a'] = jnp.array(a_RI.T.reshape(factors['a'].shape), copy=True)
  assert 2 * len(given) == len(jax.tree.leaves(adapters))
  return adapters


def make_batch(spec: common.Spec, ids_BT: np.ndarray) -> dict[str, np.ndarray]:
  """Returns a batch as `batches.Batches` gives it, of one microbatch."""
  labels_BT = np.full_like(ids_BT, -100)
  labels_BT[:, :-1] = common.labels(spec, ids_BT)[:, 1:]
  rows, length = (np.arange(n, dtype=np.int32) for n in ids_BT.shape)
  return {name: array[None] for name, array in {
      'tokens': ids_BT, 'targets': np.roll(ids_BT, -1, axis=1),
      'loss_mask': labels_BT >= 0, 'rows': rows,
      'positions': np.broadcast_to(length, ids_BT.shape),
      'segment_ids': np.ones_like(ids_BT)}.items()}


def tunix_step(program):
  """Returns `train_step` with the default loss of Tunix 0.1.7's PeftTrainer.

  All logits, and their log-softmax times f32 one-hot targets, written from its
  description; model, adapters and optimizer are ours.
  """

  def loss(adapters, base, batch):
    x_BTD = model_lib.hidden_states(
        program.model, base, batch['tokens'], batch['positions'],
        batch['segment_ids'], adapters=adapters,
        lora_scale=program.settings.lora_scale,
        execution=program.settings.execution)
    logits_BTV = jnp.einsum(
        'BTD,VD->BTV', x_BTD, model_lib.embedding(base))[:, :-1]
    one_hot_BTV = jax.nn.one_hot(
        batch['targets'][:, :-1], logits_BTV.shape[-1])
    mask_BT = batch['loss_mask'][:, :-1].astype(one_hot_BTV.dtype)
    one_hot_BTV = one_hot_BTV * mask_BT[..., None]
    return -jnp.sum(
        jax.nn.log_softmax(logits_BTV) * one_hot_BTV) / jnp.sum(mask_BT)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, base, batch):  # Of one microbatch.
    batch = {name: array[0] for name, array in batch.items()}
    value, grads = jax.value_and_grad(loss)(state.trainable, base, batch)
    updates, opt_state = program.optimizer.update(
        grads, state.opt_state, state.trainable)
    trainable = jax.tree.map(jnp.add, state.trainable, updates)
    return state_lib.TrainState(
        step=state.step + 1, trainable=trainable,
        opt_state=opt_state), {'loss': value}

  return step


def main() -> None:
  """Trains and prints the measurements."""
  spec = common.read_spec()
  if spec.peer == 'ours':
    devices.enable_compilation_cache()
  program, base = make_program(spec), library_tree.load(spec)
  execution, mesh = program.settings.execution, program.mesh
  state = state_lib.make_state(
      make_adapters(spec, program.model), program.optimizer)
  if execution.layers == 'scan':  # As `prepare.Run.enter`.
    base = blocks.stack(base)
    state = state_lib.stack_layers(state, program.model.config.num_layers)
  base, state = (
      jax.device_put(tree, sharding.tree_shardings(tree, mesh))
      for tree in (base, state))
  batches = [sharding.put_batch(make_batch(spec, ids_BT), mesh)
             for ids_BT in common.load_ids(spec)]
  update = tunix_step(program)
  if spec.peer == 'ours':
    update = functools.partial(
        train.train_step, optimizer=program.optimizer,
        settings=program.settings, max_trained=program.max_trained)
  jax.block_until_ready((base, state, batches))

  def step(i):
    nonlocal state
    state, metrics = update(state, base, batches[i])
    return float(metrics['loss'])

  meter.measure(
      spec, library_tree, step,
      sum(x.size for x in jax.tree.leaves(state.trainable)),
      execution=f'layers {execution.layers}, attention {execution.attention},'
      f' remat {execution.remat}')


if __name__ == '__main__':
  main()
