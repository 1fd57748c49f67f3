"""The official library's own LoRA loop, with all logits.

The library's transformer with its own adapters, on the attention's projections
only, as all peers here; `gm.nn.LoRA` also adapts the MLP. Keys and values share
one A, so there are fewer adapter weights, and the loss equals the others' only
before the first update.
"""

import functools

import jax
import jax.numpy as jnp
import optax

# Keeps TensorFlow out of the process.
from gemma_sft.model import import_gemma
from peers import common
from peers import library_tree
from peers import meter

gm = import_gemma()

from gemma import peft
from gemma.gm.nn import _lora


def adapted(module):
  """Replaces a module as `gm.nn.LoRA` does: attention only."""
  if not isinstance(module, gm.nn.Einsum) or module.weight_name != 'w':
    return module
  return _lora._LoRAEinsum(
      name=None, rank=common.RANK, dtype=jnp.float32, wrapped=module)


def make_adapters(spec: common.Spec) -> dict:
  """Returns the tree of a and b; the values share the keys' A."""
  c = spec.make_model().config
  tree = {f'layer_{i}': {'attn': {}} for i in range(c.num_layers)}
  outputs = {
      'q': ('q_einsum', (c.num_heads, c.head_dim)),
      'k': ('kv_einsum', (2, c.num_kv_heads, c.head_dim)),
      'o': ('attn_vec_einsum', (c.embed_dim,))}
  for layer, name, a_RI in common.load_adapters(spec):
    if name not in outputs:
      continue
    module, out = outputs[name]
    a = a_RI.T
    if name == 'o':
      a = a.reshape(c.num_heads, c.head_dim, common.RANK)
    tree[f'layer_{layer}']['attn'][module] = {'_LoRAEinsum_0': {'lora': {
        'a': jnp.array(a, copy=True),
        'b': jnp.zeros((common.RANK, *out), jnp.float32)}}}
  return tree


def make_loss_and_grad(model, dtype: str):
  """Returns (adapters, base, ids_BT, labels_BT) -> (mean loss, gradient)."""
  def loss(adapters, base, ids_BT, labels_BT):
    adapters = jax.tree.map(lambda leaf: leaf.astype(dtype), adapters)
    with peft.ModuleInterceptor(adapted):
      logits_BTV = model.apply(
          {'params': peft.merge_params(base, adapters)}, ids_BT).logits
    mask_BT = labels_BT[:, 1:] >= 0
    nll_BT = optax.softmax_cross_entropy_with_integer_labels(
        logits_BTV[:, :-1].astype(jnp.float32),
        jnp.where(mask_BT, labels_BT[:, 1:], 0))
    return jnp.sum(nll_BT * mask_BT) / jnp.sum(mask_BT)

  return jax.value_and_grad(loss)


def main() -> None:
  """Trains and prints the measurements."""
  spec = common.read_spec()
  loss_and_grad = make_loss_and_grad(
      spec.make_model().transformer, spec.dtype)
  base = library_tree.load(spec)
  adapters = make_adapters(spec)
  settings = dict(common.OPTIMIZER)
  optimizer = optax.adamw(settings.pop('learning_rate'), **settings)
  opt_state = optimizer.init(adapters)
  batches = [
      (jnp.array(ids_BT), jnp.array(common.labels(spec, ids_BT)))
      for ids_BT in common.load_ids(spec)]

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(adapters, opt_state, base, ids_BT, labels_BT):
    value, grads = loss_and_grad(adapters, base, ids_BT, labels_BT)
    updates, opt_state = optimizer.update(grads, opt_state, adapters)
    return optax.apply_updates(adapters, updates), opt_state, value

  def step(i):
    nonlocal adapters, opt_state
    adapters, opt_state, value = update(
        adapters, opt_state, base, *batches[i])
    return float(value)

  meter.measure(spec, library_tree, step,
                sum(x.size for x in jax.tree.leaves(adapters)))


if __name__ == '__main__':
  main()
