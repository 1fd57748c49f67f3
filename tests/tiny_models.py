"""Tiny models of each kind with weights, adapters and rows, for tests."""

import functools

import conftest
import jax
import jax.numpy as jnp
import numpy as np

from gemma_sft import model as model_lib
from gemma_sft.adapters import lora
from gemma_sft.nn import quantize

# Gemma 1 7B fuses q, k and v; Gemma 4 E2B has inputs per layer and last layers
# that reuse keys and values.
KINDS = {
    '1': dict(generation=1),
    '1_fused': dict(generation=1, num_kv_heads=4),
    '2': dict(generation=2),
    '3': dict(generation=3),
    '4': dict(generation=4),
    '4_shared': dict(
        generation=4, num_layers=3, per_layer_input_dim=8, shared_kv_layers=1),
}


@functools.cache
def model(kind: str, **dimensions) -> model_lib.Model:
  """A model with `conftest.DIMENSIONS`, changed by `dimensions`."""
  return model_lib.make_model(
      'custom', **conftest.DIMENSIONS | KINDS[kind] | dimensions)


@functools.cache
def params(kind: str, **dimensions):
  """Random f32 weights."""
  return conftest.make_params(model(kind, **dimensions))


def fresh_adapters(
    kind: str, targets='attn/|mlp/', *, rank=3, seed=0, **dimensions):
  """Adapters before the first step."""
  like = model(kind, **dimensions)
  return lora.init_adapters(
      params(kind, **dimensions), rank=rank, targets=targets, seed=seed,
      transposed_gating=like.transposed_gating, unused=like.unused_weights)


def adapters(kind: str, targets='attn/|mlp/', **dimensions):
  """Adapters as after training: A and B are random."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
      lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32),
      fresh_adapters(kind, targets, **dimensions))


def quantised(tree, quantization: str):
  """Weights whose projections are quantised."""
  def each(path, leaf):
    if not quantize.is_quantized('/'.join(k.key for k in path)):
      return leaf
    return jax.tree.map(
        jnp.asarray, quantize.quantize(np.asarray(leaf), quantization))

  return jax.tree_util.tree_map_with_path(each, tree)


def packed_rows(B: int = 2, T: int = 24):
  """Returns (tokens, positions, segment ids): two examples a row, padding."""
  rng = np.random.default_rng(0)
  tokens_BT = rng.integers(3, 512, (B, T)).astype(np.int32)
  positions_BT = np.zeros((B, T), np.int32)
  segments_BT = np.zeros((B, T), np.int32)
  for row, cut in enumerate((9, 13)):
    positions_BT[row, :cut] = np.arange(cut)
    positions_BT[row, cut:-2] = np.arange(T - 2 - cut)
    segments_BT[row, :cut], segments_BT[row, cut:-2] = 1, 2
  return tuple(map(jnp.asarray, (tokens_BT, positions_BT, segments_BT)))


def assert_close(got, wanted, tolerance: float, least: float = 1e-3):
  """Compares trees, each leaf relative to its largest entry."""
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    g, w = np.asarray(g), np.asarray(w)
    np.testing.assert_allclose(
        g, w, rtol=0, atol=tolerance * max(least, np.abs(w).max()))
