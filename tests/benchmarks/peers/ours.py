"""This project's `train_step`, and Tunix's default loss over its model.

The only module of the benchmark that imports the package's parts.
"""

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
  config, shape = default.get_config(), spec.dimensions
  config.model.update(
      name='gemma3_270m' if spec.shape == '270m' else 'custom',
      vocab_size=shape.vocab, num_layers=shape.layers, embed_dim=shape.width,
      hidden_dim=shape.hidden, num_heads=shape.heads,
      num_kv_heads=shape.kv_heads, head_dim=shape.head_dim,
      sliding_window=shape.window, dtype=spec.dtype, layers=spec.layers,
      attention=spec.kernel)
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
  n = 0
  for layer, name, a_RI in common.load_adapters(spec):
    factors = adapters[f'layer_{layer}']['attn'][modules[name]][name]
    factors['a'] = jnp.array(a_RI.T.reshape(factors['a'].shape), copy=True)
    n += 1
  assert 2 * n == len(jax.tree.leaves(adapters))
  return adapters


def make_batch(spec: common.Spec, ids_BT: np.ndarray) -> dict[str, np.ndarray]:
  """Returns a batch as `batches.Batches` gives it, of one microbatch."""
  rows, length = ids_BT.shape
  targets = np.zeros_like(ids_BT)
  targets[:, :-1] = ids_BT[:, 1:]
  mask = np.zeros((rows, length), bool)
  mask[:, :-1] = common.labels(spec, ids_BT)[:, 1:] >= 0
  return {name: array[None] for name, array in {
      'tokens': ids_BT, 'targets': targets, 'loss_mask': mask,
      'positions': np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
      'segment_ids': np.ones_like(ids_BT),
      'rows': np.arange(rows, dtype=np.int32)}.items()}


def own_step(program):
  """Returns (state, base, batch) -> (state, loss)."""
  def step(state, base, batch):
    state, metrics = train.train_step(
        state, base, batch, optimizer=program.optimizer,
        settings=program.settings, max_trained=program.max_trained)
    return state, metrics['loss']

  return step


def tunix_step(program):
  """Returns the same with the default loss of Tunix 0.1.7's PeftTrainer.

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
  def step(state, base, batch):
    batch = {name: array[0] for name, array in batch.items()}
    value, grads = jax.value_and_grad(loss)(state.trainable, base, batch)
    updates, opt_state = program.optimizer.update(
        grads, state.opt_state, state.trainable)
    trainable = jax.tree.map(jnp.add, state.trainable, updates)
    return state_lib.TrainState(
        step=state.step + 1, trainable=trainable, opt_state=opt_state), value

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
  place = sharding.batch_sharding(mesh)
  batches = [
      {name: jax.device_put(array, place)
       for name, array in make_batch(spec, ids_BT).items()}
      for ids_BT in common.load_ids(spec)]
  update = (own_step if spec.peer == 'ours' else tunix_step)(program)
  jax.block_until_ready((base, state, batches))

  def step(i):
    nonlocal state
    state, loss = update(state, base, batches[i])
    return float(loss)

  meter.measure(
      spec, library_tree, step,
      sum(x.size for x in jax.tree.leaves(state.trainable)),
      execution=f'layers {execution.layers}, attention {execution.attention},'
      f' remat {execution.remat}')


if __name__ == '__main__':
  main()
