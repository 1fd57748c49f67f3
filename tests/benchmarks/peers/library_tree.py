"""The weights as the official library's parameter tree."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peers import common


def load(spec: common.Spec) -> dict[str, Any]:
  """Returns the nested parameters as arrays on the device, in the dtype."""
  shape, weights = spec.dimensions, common.load_weights(spec)
  dtype = jnp.dtype(spec.dtype)

  def put(array):
    # A copy: on a CPU an aligned numpy array may be taken as it is.
    return jax.block_until_ready(jnp.array(
        np.ascontiguousarray(array), dtype=dtype, copy=True))

  def take(name):
    return weights.pop(f'model.{name}.weight')

  def heads(matrix):  # (N H, D) -> (N, D, H)
    return matrix.reshape(
        -1, shape.head_dim, shape.width).transpose(0, 2, 1)

  params = {
      'embedder': {'input_embedding': put(take('embed_tokens'))},
      'final_norm': {'scale': put(take('norm'))}}
  for i in range(shape.layers):
    layer = f'layers.{i}'
    attention = f'{layer}.self_attn'
    params[f'layer_{i}'] = {
        'pre_attention_norm': {'scale': put(take(f'{layer}.input_layernorm'))},
        'post_attention_norm': {
            'scale': put(take(f'{layer}.post_attention_layernorm'))},
        'pre_ffw_norm': {
            'scale': put(take(f'{layer}.pre_feedforward_layernorm'))},
        'post_ffw_norm': {
            'scale': put(take(f'{layer}.post_feedforward_layernorm'))},
        'attn': {
            'q_einsum': {'w': put(heads(take(f'{attention}.q_proj')))},
            'kv_einsum': {'w': put(np.stack([
                heads(take(f'{attention}.k_proj')),
                heads(take(f'{attention}.v_proj'))]))},
            'attn_vec_einsum': {'w': put(take(f'{attention}.o_proj').T.reshape(
                shape.heads, shape.head_dim, shape.width))},
            '_query_norm': {'scale': put(take(f'{attention}.q_norm'))},
            '_key_norm': {'scale': put(take(f'{attention}.k_norm'))}},
        'mlp': {
            'gating_einsum': put(np.stack([
                take(f'{layer}.mlp.gate_proj'), take(f'{layer}.mlp.up_proj')])),
            'linear': put(take(f'{layer}.mlp.down_proj').T)}}
  if weights:
    raise ValueError(f'left over: {sorted(weights)}')
  return params


def product(spec: common.Spec):
  """Returns the product that `Meter.finish` times."""
  multiply = jax.jit(jnp.matmul)
  key = jax.random.key(0)

  def run(n):
    if n not in inputs:
      inputs[n] = jax.block_until_ready(
          jax.random.normal(key, (n, n), jnp.dtype(spec.dtype)))
    multiply(inputs[n], inputs[n]).block_until_ready()

  inputs: dict[int, jax.Array] = {}
  return run


def versions() -> dict[str, str]:
  """Returns those of the JAX peers' libraries."""
  import importlib.metadata

  return {name: importlib.metadata.version(name)
          for name in ('jax', 'jaxlib', 'flax', 'optax', 'gemma')}


def device_bytes(field: str) -> int:
  """Returns a figure of the device's allocator, 0 on a CPU."""
  return (jax.devices()[0].memory_stats() or {}).get(field, 0)
