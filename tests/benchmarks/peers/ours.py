"""This project's `train_step`, and Tunix's default loss over its model.

The only module of the benchmark that imports the package's parts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from configs import default
from gemma_sft import model as model_lib
from gemma_sft import optimizer as optimizer_lib
from gemma_sft import sharding
from gemma_sft import state as state_lib
from gemma_sft import train
from gemma_sft.adapters import lora
from gemma_sft.nn import blocks
from gemma_sft.run import devices
from peers import common
from peers import library_tree
from peers import meter

_SCALE = lora.scale(common.RANK, common.ALPHA, False)


def make_model(spec: common.Spec) -> model_lib.Model:
  """Returns the architecture."""
  if spec.shape == '270m':
    return model_lib.make_model('gemma3_270m')
  shape = spec.dimensions
  return model_lib.make_model(
      'custom', generation=3, vocab_size=shape.vocab, num_layers=shape.layers,
      embed_dim=shape.width, hidden_dim=shape.hidden, num_heads=shape.heads,
      num_kv_heads=shape.kv_heads, head_dim=shape.head_dim,
      sliding_window=shape.window)


def make_execution(
    spec: common.Spec, model: model_lib.Model, mesh: jax.sharding.Mesh
) -> blocks.Execution:
  """Returns what a run with default settings would choose here."""
  layers, _ = devices.choose_layers(spec.layers, model)
  kernel, _ = devices.choose_attention(
      spec.kernel, model, mesh, dtype=jnp.dtype(spec.dtype),
      length=spec.length, packed=False)
  return blocks.Execution(
      layers=layers, attention=kernel, mesh=mesh,
      remat=default.get_config().train.remat)


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


def own_step(spec, model, mesh, optimizer, execution):
  """Returns (state, base, batch) -> (state, loss)."""
  settings = state_lib.StepSettings(
      model=model, lora_enabled=True, lora_scale=_SCALE, dropout=0.0, seed=0,
      compute_dtype=jnp.dtype(spec.dtype), execution=execution,
      loss_chunk=1024, groups=sharding.batch_groups(mesh), mesh=mesh)

  def step(state, base, batch):
    state, metrics = train.train_step(
        state, base, batch, optimizer=optimizer,
        settings=settings, max_trained=spec.rows * spec.n_trained)
    return state, metrics['loss']

  return step


def tunix_step(model, optimizer, execution):
  """Returns the same with the default loss of Tunix 0.1.7's PeftTrainer.

  All logits, and their log-softmax times f32 one-hot targets, written from its
  description; model, adapters and optimizer are ours.
  """

  def loss(adapters, base, batch):
    x_BTD = model_lib.hidden_states(
        model, base, batch['tokens'], batch['positions'],
        batch['segment_ids'], adapters=adapters, lora_scale=_SCALE,
        execution=execution)
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
    updates, opt_state = optimizer.update(
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
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  model = make_model(spec)
  execution = make_execution(spec, model, mesh)
  base = library_tree.load(spec)
  if execution.layers == 'scan':
    base = blocks.stack(base)
  base = jax.tree.map(
      jax.device_put, base, sharding.tree_shardings(base, mesh))
  settings = dict(common.OPTIMIZER)
  rate = settings.pop('learning_rate')
  optimizer = optimizer_lib.make_optimizer(
      lambda step: rate, max_grad_norm=0.0, **settings)
  state = state_lib.make_state(make_adapters(spec, model), optimizer)
  if execution.layers == 'scan':  # As `prepare.Run.enter`.
    state = state_lib.stack_layers(state, model.config.num_layers)
  state = jax.device_put(state, sharding.tree_shardings(state, mesh))
  place = sharding.batch_sharding(mesh)
  batches = [
      {name: jax.device_put(array, place)
       for name, array in make_batch(spec, ids_BT).items()}
      for ids_BT in common.load_ids(spec)]
  update = (own_step(spec, model, mesh, optimizer, execution)
            if spec.peer == 'ours'
            else tunix_step(model, optimizer, execution))
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
