"""Low-rank adapters on the projections, as a tree of their own.

A projection W becomes W + scale * A B, with A (in, R) random and B (R, out)
zero at the start, so that the first step sees exactly the base model (Hu et al.
2021, arXiv 2106.09685).

The library fuses projections: one `kv_einsum` for k and v, one `qkv_einsum`
where there are as many key-value heads as query heads, one `gating_einsum` for
the MLP's gate and up. The adapters are not fused, so that they can be exported
to PEFT:

    base                            adapters
    layer_0/attn/q_einsum/w         layer_0/attn/q_einsum/q/{a_DR, b_RNH}
    layer_0/attn/kv_einsum/w        layer_0/attn/kv_einsum/k/{a_DR, b_RKH}
                                    layer_0/attn/kv_einsum/v/{a_DR, b_RKH}
    layer_0/attn/attn_vec_einsum/w  layer_0/attn/attn_vec_einsum/o/{a_NHR, b_RD}
    layer_0/mlp/gating_einsum       layer_0/mlp/gating_einsum/gate/{a_DR, b_RF}
                                    layer_0/mlp/gating_einsum/up/{a_DR, b_RF}
    layer_0/mlp/linear              layer_0/mlp/linear/down/{a_FR, b_RD}
"""

from collections.abc import Callable
import dataclasses
import math
import re
from typing import Any
import zlib

import flax.traverse_util
import jax
import jax.numpy as jnp

from gemma_sft import errors
from gemma_sft.adapters import dora
from gemma_sft.adapters import projections

Params = Any


@dataclasses.dataclass(frozen=True)
class Dropout:
  """Dropout on the adapters' inputs.

  Each row has a PRNG key that is a function of (seed, step, global row), so
  that the mask depends neither on the mesh nor on the microbatches.
  """

  rate: float  # Share of inputs set to zero.
  keys_B: jax.Array
  layer: int | jax.Array = 0


def make_dropout(
    rate: float, seed: int, step: jax.Array, rows_B: jax.Array
) -> Dropout | None:
  """Returns the dropout of a step, or None at a rate of 0.

  `rows_B` are the rows' numbers in the whole run.
  """
  if not rate:
    return None
  key = jax.random.fold_in(jax.random.key(seed), step)
  return Dropout(rate, jax.vmap(jax.random.fold_in, (None, 0))(key, rows_B))


def scale(rank: int, alpha: float, use_rslora: bool) -> float:
  """Returns alpha / R, or alpha / sqrt(R) for rsLoRA (arXiv 2312.03732)."""
  return alpha / (math.sqrt(rank) if use_rslora else rank)


def _without_w(path):
  return path[:-1] if path[-1] == 'w' else path


def _weights(params: Params) -> dict[tuple[str, ...], Any]:
  """Returns {path without a trailing 'w': leaf} of the adaptable weights."""
  flat = flax.traverse_util.flatten_dict(params)
  named = {_without_w(path): leaf for path, leaf in flat.items()}
  return {p: leaf for p, leaf in named.items() if p[-1] in projections.BY_LAYER}


def init_adapters(
    params: Params, *, rank: int, targets: str, transposed_gating: bool,
    seed: int, unused: frozenset[str] = frozenset()) -> Params:
  """Returns fresh f32 adapters for the projections that `targets` matches.

  A is uniform in +-1/sqrt(fan_in), PEFT's kaiming_uniform(a=sqrt(5)); B is
  zero. Each A is a function of (seed, its path) alone. `params` are the base
  weights or their shapes; `targets` is a regular expression searched for in
  paths such as 'layer_3/attn/kv_einsum/v'; `unused` weights get no adapter.

  Raises:
    UserError: if no projection matches.
  """
  pattern = re.compile(targets)
  adapters, paths = {}, []
  for path, weight in _weights(params).items():
    if '/'.join(path) in unused:
      continue
    for projection in projections.BY_LAYER[path[-1]]:
      full = (*path, projection.name)
      paths.append('/'.join(full))
      if not pattern.search(paths[-1]):
        continue
      shape = weight.shape if projection.index is None else weight.shape[1:]
      a_shape, b_shape = projections.oriented(
          path[-1], projection, transposed_gating).factor_shapes(shape, rank)
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


def stack(adapters: Params, num_layers: int) -> Params:
  """Returns the adapters of all layers stacked along a leading axis L.

  A layer that lacks an adapter which another one has gets zeros, which add
  nothing, and NaN as DoRA's magnitude, which `dora.factor` ignores. Adapters
  that are stacked already ({'layers': ...}) are returned without that key.
  """
  if 'layers' in adapters:
    return adapters['layers']
  layers = [
      flax.traverse_util.flatten_dict(adapters.get(f'layer_{i}', {}))
      for i in range(num_layers)]
  like = {path: leaf for layer in layers for path, leaf in layer.items()}
  return flax.traverse_util.unflatten_dict({
      path: jnp.stack([
          layer.get(path, jnp.full_like(
              leaf, jnp.nan if path[-1] == 'm' else 0)) for layer in layers])
      for path, leaf in like.items()})


def unstack(stacked: Params, like: Params) -> Params:
  """Returns stacked adapters per layer, those that `like` has."""
  flat = flax.traverse_util.flatten_dict(stacked)
  return flax.traverse_util.unflatten_dict({
      path: flat[path[1:]][int(path[0].removeprefix('layer_'))]
      for path in flax.traverse_util.flatten_dict(like)})


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
    *,
    weight: Callable[[], jax.Array] | None = None,
    transposed_gating: bool = True,
    einsum: Callable[[str, jax.Array, jax.Array], jax.Array] | None = None,
) -> jax.Array:
  """Returns a projection's output `y` of input `x` with its updates added.

  `adapters` are those of one layer: {'attn': {'q_einsum': {'q': {'a', 'b'}}}},
  and `path` names the library's weight in it: ('attn', 'q_einsum', 'w'). Fused
  slots of `y` are on axis 0 (k, v) or -2 (gate, up). For DoRA `weight`
  returns the frozen weight, whose layout is `transposed_gating`. The default
  `einsum` multiplies in the dtype of `x` (B, T, ...), so that the residual
  stream keeps the dtype of the base.
  """
  einsum = einsum or _einsum
  path = _without_w(path)
  here = _lookup(adapters, path)
  if not here:
    return y
  for projection in projections.BY_LAYER[path[-1]]:
    factors = here.get(projection.name)
    if factors is None:
      continue
    slot = projection.at
    if path[-1] == 'gating_einsum':
      slot = (..., projection.index, slice(None))
    inputs = x
    if dropout is not None:
      name = '/'.join((*path, projection.name))
      inputs = _drop(x, dropout, zlib.crc32(name.encode()))
    update = einsum(
        projection.up, einsum(projection.down, inputs, factors['a']),
        factors['b'])
    update = (scaling * update).astype(y.dtype)
    if 'm' in factors:
      factor = dora.factor(
          projections.oriented(path[-1], projection, transposed_gating),
          projection.slot(weight()), **factors, scaling=scaling).astype(y.dtype)
      y = y.at[slot].set((y[slot] + update) * factor[None, None])
    else:
      y = y.at[slot].add(update)
  return y


def _einsum(equation, x, factor):
  return jnp.einsum(equation, x, factor.astype(x.dtype))


def _drop(x: jax.Array, dropout: Dropout, salt: int) -> jax.Array:
  keep = 1 - dropout.rate

  def draw(key):
    key = jax.random.fold_in(jax.random.fold_in(key, salt), dropout.layer)
    return jax.random.bernoulli(key, keep, x.shape[1:])

  return jnp.where(jax.vmap(draw)(dropout.keys_B), x / keep, 0).astype(x.dtype)


def merge(
    params: Params, adapters: Params, scaling: float, *, transposed_gating: bool
) -> Params:
  """Returns base weights with the updates added in f32, then cast back.

  `params` may be stacked (`blocks.stack`). Leaves without an adapter are not
  copied.
  """
  flat = flax.traverse_util.flatten_dict(params)
  merged = dict(flat)
  stacked = {}
  if 'layers' in params:
    n_layers = jax.tree.leaves(params['layers'])[0].shape[0]
    stacked = {'layers': stack(adapters, n_layers)}
  for path, weight in flat.items():
    short = _without_w(path)
    here = _lookup(stacked or adapters, short)
    if short[-1] not in projections.BY_LAYER or not here:
      continue

    def add(weight_and_factors, name=short[-1]):
      return _add_to_weight(
          *weight_and_factors, name, scaling, transposed_gating)

    # Layer by layer, so that only one has an f32 copy.
    merged[path] = (jax.lax.map(add, (weight, here)) if stacked
                    else add((weight, here)))
  return flax.traverse_util.unflatten_dict(merged)


def _add_to_weight(weight, factors, name, scaling, transposed_gating):
  """Returns one layer's library weight with its updates added."""
  total = weight.astype(jnp.float32)
  for projection in projections.BY_LAYER[name]:
    if projection.name not in factors:
      continue
    here = factors[projection.name]
    projection = projections.oriented(name, projection, transposed_gating)
    share = total[projection.at] + projections.update(
        projection, here['a'], here['b'], scaling)
    if 'm' in here:
      share = dora.rescale_weight(projection, share, here['m'])
    total = total.at[projection.at].set(share)
  return total.astype(weight.dtype)


def add_magnitudes(
    adapters: Params, params: Params, *, transposed_gating: bool) -> Params:
  """Returns the adapters with the magnitudes 'm' of DoRA added.

  They are those of the base weights `params`, per layer and dequantised.
  """
  flat = flax.traverse_util.flatten_dict(adapters)
  weights = _weights(params)
  for *path, name in {p[:-1] for p in flat}:
    projection = next(
        p for p in projections.BY_LAYER[path[-1]] if p.name == name)
    flat[(*path, name, 'm')] = dora.norm(
        projections.oriented(path[-1], projection, transposed_gating),
        projection.slot(weights[tuple(path)]))
  return flax.traverse_util.unflatten_dict(flat)
