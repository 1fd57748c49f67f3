"""Low-rank adapters on the projections, as a tree of their own.

A projection W is used as W + scale * A B, with A (in, R) random and B (R, out)
zero at the start, so that the first step sees the base model exactly
(Hu et al. 2021, arXiv 2106.09685). The base is never touched.

The library fuses projections: one `kv_einsum` for k and v, one `qkv_einsum`
where there are as many key-value heads as query heads, one `gating_einsum` for
the MLP's gate and up. The adapters stay apart, each with an A of its own, as
PEFT has them, so that they can be exported as PEFT adapters:

    base                            adapters
    layer_0/attn/q_einsum/w         layer_0/attn/q_einsum/q/{a_DR, b_RNH}
    layer_0/attn/kv_einsum/w        layer_0/attn/kv_einsum/k/{a_DR, b_RKH}
                                    layer_0/attn/kv_einsum/v/{a_DR, b_RKH}
    layer_0/attn/attn_vec_einsum/w  layer_0/attn/attn_vec_einsum/o/{a_NHR, b_RD}
    layer_0/mlp/gating_einsum       layer_0/mlp/gating_einsum/gate/{a_DR, b_RF}
                                    layer_0/mlp/gating_einsum/up/{a_DR, b_RF}
    layer_0/mlp/linear              layer_0/mlp/linear/down/{a_FR, b_RD}
"""

import dataclasses
import math
import re
from typing import Any
import zlib

import flax.traverse_util
import jax
import jax.numpy as jnp

from gemma_sft import errors

Params = Any


@dataclasses.dataclass(frozen=True)
class _Projection:
  """How one adapter meets its share of a library weight.

  Attributes:
    name: What the adapter is called.
    index: Its slot where the library fuses several, else None.
    down: Einsum of the layer's input with A.
    up: Einsum of that with B.
    update: Einsum of A with B into the layout of the weight (of the slot).
  """

  name: str
  index: int | None
  down: str
  up: str
  update: str


_Q = dict(down='BTD,DR->BTR', up='BTR,RNH->BTNH', update='DR,RNH->NDH')
_GATE = dict(down='BTD,DR->BTR', up='BTR,RF->BTF', update='DR,RF->FD')

# By the tail of the weight's path. Keys and values have K heads where N stands.
_PROJECTIONS = {
    'q_einsum': (_Projection('q', None, **_Q),),
    'k_einsum': (_Projection('k', None, **_Q),),  # Gemma 4 31B: v is k.
    'kv_einsum': (_Projection('k', 0, **_Q), _Projection('v', 1, **_Q)),
    'qkv_einsum': (_Projection('q', 0, **_Q), _Projection('k', 1, **_Q),
                   _Projection('v', 2, **_Q)),
    'attn_vec_einsum': (_Projection(
        'o', None, 'BTNH,NHR->BTR', 'BTR,RD->BTD', 'NHR,RD->NHD'),),
    'gating_einsum': (_Projection('gate', 0, **_GATE),
                      _Projection('up', 1, **_GATE)),
    'linear': (_Projection(
        'down', None, 'BTF,FR->BTR', 'BTR,RD->BTD', 'FR,RD->FD'),),
}


@dataclasses.dataclass(frozen=True)
class Dropout:
  """Dropout on the adapters' inputs.

  Attributes:
    rate: Share of inputs set to zero.
    keys_B: One PRNG key a row, a function of (seed, step, global row), so that
      the drawn mask depends neither on the mesh nor on the microbatches.
  """

  rate: float
  keys_B: jax.Array


def scale(rank: int, alpha: float, rank_stabilised: bool) -> float:
  """Returns alpha / R, or alpha / sqrt(R) for rsLoRA (arXiv 2312.03732)."""
  return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def _weights(params: Params) -> dict[tuple[str, ...], Any]:
  """Returns {path without a trailing 'w': leaf} of the adaptable weights."""
  flat = flax.traverse_util.flatten_dict(params)
  named = {p[:-1] if p[-1] == 'w' else p: leaf for p, leaf in flat.items()}
  return {p: leaf for p, leaf in named.items() if p[-1] in _PROJECTIONS}


def init_adapters(
    params: Params,
    *,
    rank: int,
    targets: str,
    transposed_gating: bool,
    seed: int,
    unused: frozenset[str] = frozenset(),
) -> Params:
  """Returns fresh f32 adapters for the projections that `targets` matches.

  A is uniform in +-1/sqrt(fan_in), PEFT's kaiming_uniform(a=sqrt(5)); B is
  zero. Each A is a function of (seed, its path) alone.

  Args:
    params: The base weights, or their `jax.ShapeDtypeStruct`s.
    rank: R.
    targets: Regular expression searched for in paths such as
      'layer_3/attn/kv_einsum/v'.
    transposed_gating: `Model.transposed_gating`.
    seed: Of the run.
    unused: `Model.unused_weights`, which get none.

  Raises:
    UserError: if the rank is below 1 or no projection matches.
  """
  if rank < 1:
    raise errors.UserError(
        f'config.lora.rank is {rank}', 'a rank of at least 1',
        'set --config.lora.rank=16, or --config.lora.enabled=false to train'
        ' all weights')
  pattern = re.compile(targets)
  adapters, paths = {}, []
  for path, weight in _weights(params).items():
    if '/'.join(path) in unused:
      continue
    for projection in _PROJECTIONS[path[-1]]:
      full = (*path, projection.name)
      paths.append('/'.join(full))
      if not pattern.search(paths[-1]):
        continue
      shape = weight.shape if projection.index is None else weight.shape[1:]
      a_shape, b_shape = _factor_shapes(
          path[-1], shape, rank, transposed_gating)
      bound = 1 / math.sqrt(math.prod(a_shape[:-1]))
      key = jax.random.fold_in(
          jax.random.key(seed), zlib.crc32(paths[-1].encode()))
      adapters[(*full, 'a')] = jax.random.uniform(
          key, a_shape, jnp.float32, -bound, bound)
      adapters[(*full, 'b')] = jnp.zeros(b_shape, jnp.float32)
  if not adapters:
    raise errors.UserError(
        f'config.lora.targets is {targets!r}, which matches no projection',
        f'an expression found in one of: {", ".join(paths[:8])} ...',
        "for example --config.lora.targets='attn/' or 'attn/|mlp/'")
  return flax.traverse_util.unflatten_dict(adapters)


def _factor_shapes(layer, shape, rank, transposed_gating):
  if layer == 'attn_vec_einsum':  # (N, H, D)
    return (*shape[:-1], rank), (rank, shape[-1])
  if layer == 'linear':  # (F, D)
    return (shape[0], rank), (rank, shape[1])
  if layer == 'gating_einsum':
    F, D = shape if transposed_gating else shape[::-1]
    return (D, rank), (rank, F)
  N, D, H = shape
  return (D, rank), (rank, N, H)


def _lookup(adapters: Params, path: tuple[str, ...]) -> Params:
  for name in path:
    adapters = adapters.get(name, {})
  return adapters


def add_update(
    adapters: Params,
    path: tuple[str, ...],
    x: jax.Array,
    y: jax.Array,
    scaling: float,
    dropout: Dropout | None,
) -> jax.Array:
  """Returns a projection's output `y` of input `x` with its updates added.

  Masters are f32; the products run in the dtype of `x`, so that the residual
  stream keeps the base's dtype.

  Args:
    adapters: From `init_adapters`.
    path: The library weight, as ('layer_0', 'attn', 'q_einsum', 'w').
    x: The projection's input (B, T, ...).
    y: Its output; fused slots lie on axis 0 (k, v) or -2 (gate, up).
    scaling: From `scale`.
    dropout: Or None.
  """
  path = path[:-1] if path[-1] == 'w' else path
  here = _lookup(adapters, path)
  if not here:
    return y
  for projection in _PROJECTIONS[path[-1]]:
    factors = here.get(projection.name)
    if factors is None:
      continue
    inputs = x
    if dropout is not None:
      name = '/'.join((*path, projection.name))
      inputs = _drop(x, dropout, zlib.crc32(name.encode()))
    update = jnp.einsum(
        projection.up,
        jnp.einsum(projection.down, inputs, factors['a'].astype(x.dtype)),
        factors['b'].astype(x.dtype))
    update = (scaling * update).astype(y.dtype)
    if projection.index is None:
      y = y + update
    elif path[-1] == 'gating_einsum':
      y = y.at[..., projection.index, :].add(update)
    else:
      y = y.at[projection.index].add(update)
  return y


def _drop(x: jax.Array, dropout: Dropout, salt: int) -> jax.Array:
  keep = 1 - dropout.rate

  def draw(key):
    return jax.random.bernoulli(
        jax.random.fold_in(key, salt), keep, x.shape[1:])

  return jnp.where(jax.vmap(draw)(dropout.keys_B), x / keep, 0).astype(x.dtype)


def merge(
    params: Params,
    adapters: Params,
    scaling: float,
    *,
    transposed_gating: bool,
) -> Params:
  """Returns base weights with the updates added, in f32, then cast back.

  Leaves without an adapter are the same arrays, not copies.
  """
  flat = flax.traverse_util.flatten_dict(params)
  merged = dict(flat)
  for path in flat:
    short = path[:-1] if path[-1] == 'w' else path
    here = _lookup(adapters, short)
    if short[-1] not in _PROJECTIONS or not here:
      continue
    weight = flat[path].astype(jnp.float32)
    for projection in _PROJECTIONS[short[-1]]:
      if projection.name not in here:
        continue
      factors = here[projection.name]
      einsum = projection.update
      if short[-1] == 'gating_einsum' and not transposed_gating:
        einsum = 'DR,RF->DF'
      update = scaling * jnp.einsum(einsum, factors['a'], factors['b'])
      if projection.index is None:
        weight = weight + update
      else:
        weight = weight.at[projection.index].add(update)
    merged[path] = weight.astype(flat[path].dtype)
  return flax.traverse_util.unflatten_dict(merged)
