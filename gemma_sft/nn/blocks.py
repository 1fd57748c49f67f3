"""The official blocks as training runs them: adapted, scanned, recomputed.

The library runs its blocks one after the other, so a program for 26 layers
holds 26 copies of a block. Here one block is compiled and `lax.scan` runs it
over the layers, whose weights are stacked along a leading axis L:

    per layer (the library's, and all that the rest of the project sees)
        layer_0/attn/q_einsum/w (N, D, H), layer_1/attn/q_einsum/w, ...
    stacked
        layers/attn/q_einsum/w (L, N, D, H)

Local and global layers differ only in their window and their rotary
frequencies, so each has a flag, scanned along with the weights. Gemma 4 keeps
the library's loop: its global layers have wider heads than its local ones and
cannot be stacked with them, and its last layers read the keys of earlier ones.

A Flax interceptor, `Forward`, changes what the library's modules do. It knows
them by the name of their class, because Gemma 4 has classes of its own:

    Einsum       dequantises the weight, adds the adapters' update
    Attention    runs a kernel of `attention` instead of building all logits
    FeedForward  has our `gated_gelu` between its products
    Block        is recomputed in the backward pass

The code below is for weights in bfloat16 or float32. Weights in float16 need
other products: `float16.HalfOperations` replaces the class `Operations`.
"""

from collections.abc import Callable
import dataclasses
import sys
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from gemma_sft import shapes
from gemma_sft.adapters import lora
from gemma_sft.nn import attention
from gemma_sft.nn import gelu
from gemma_sft.nn import quantize

Params = Any


@dataclasses.dataclass(frozen=True)
class Execution:
  """How the training forward runs; nothing here changes what it computes.

  `remat` says what the backward pass recomputes: 'none'; 'elementwise', all but
  the results of matrix products and of attention; 'block', all of a block from
  its input.
  """

  layers: str = 'loop'  # The library's, or 'scan' over stacked layers.
  attention: str = 'einsum'  # Of `attention.KERNELS`; Gemma 4 has its own.
  remat: str = 'none'
  mesh: jax.sharding.Mesh | None = None  # For kernels and activations.


PLAIN = Execution()


class Operations:
  """The operations of a forward pass that depend on the weights' dtype."""

  def prepare(self, params: Params) -> Params:
    """Returns the weights as the other operations expect them."""
    return params

  def encode(
      self, next_fun: Callable[..., jax.Array], embedder: nn.Module,
      tokens_BT: jax.Array) -> jax.Array:
    """Returns the embeddings; `next_fun` is the library's `encode`."""
    del embedder
    return next_fun(tokens_BT)

  def project(
      self, next_fun: Callable[..., jax.Array], module: nn.Module,
      equation: str, x: jax.Array, add_update: Callable[..., jax.Array]
  ) -> jax.Array:
    """Returns a projection of `x`, adapters included.

    `next_fun` is the `__call__` of `module`, the library's Einsum; `add_update`
    maps (x, y) to y with the adapters' updates added.
    """
    weight = module.get_variable('params', module.weight_name)
    if isinstance(weight, quantize.Quantized):
      return add_update(x, quantize.einsum(equation, x, weight))
    return add_update(x, next_fun(equation, x))

  def attend(
      self, module: nn.Module, *arrays: Any, **settings: Any) -> jax.Array:
    """Returns `attention.attend` of queries, keys and values."""
    del module
    return attention.attend(*arrays, **settings)


# Stacking --------------------------------------------------------------------


def stack(params: Params) -> Params:
  """Returns a tree with its `layer_<i>` stacked along a leading axis L.

  A tree that is stacked already is returned as it is. Leaves may be
  `jax.ShapeDtypeStruct`s.
  """
  if 'layers' in params:
    return params

  def join(*leaves):
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
      return leaves[0].update(shape=(len(leaves), *leaves[0].shape))
    return jnp.stack(leaves)

  rest = {k: v for k, v in params.items() if not k.startswith('layer_')}
  layers = [params[f'layer_{i}'] for i in range(len(params) - len(rest))]
  return rest | {'layers': jax.tree.map(join, *layers)}


def unstack(params: Params) -> Params:
  """Undoes `stack`; a tree that is per layer is returned as it is."""
  if 'layers' not in params:
    return params
  rest = dict(params)
  layers = rest.pop('layers')
  return rest | {
      f'layer_{i}': jax.tree.map(lambda leaf, i=i: leaf[i], layers)
      for i in range(jax.tree.leaves(layers)[0].shape[0])}


# The forward pass ------------------------------------------------------------


def run_scan(
    transformer: nn.Module, params: Params, tokens_BT: shapes.TokensBT,
    forward: 'Forward') -> shapes.HiddenBTD:
  """Runs the blocks of a Gemma 1 to 3 under `lax.scan`, to the final norm.

  Weights that come per layer are stacked first, which copies them.
  """
  config = transformer.config
  params = forward.operations.prepare(stack(params))
  L = config.num_layers
  # Any block will do: whether a layer is local comes from the flags.
  block = transformer.bind({}).blocks[0].clone(parent=None, name=None)
  kinds = [_is_local(kind) for kind in config.attention_types]
  forward = forward.with_rope()

  def body(x_BTD, layer):
    weights, layer_adapters, is_local, number = layer
    if len(set(kinds)) == 1:
      is_local = kinds[0]
    with nn.intercept_methods(dataclasses.replace(
        forward, adapters=layer_adapters, layer=number, is_local=is_local)):
      # `Forward.attend` builds the mask.
      _, x_BTD = block.apply(
          {'params': weights}, _constrain(x_BTD, forward.execution.mesh),
          forward.positions_BT, None, None)
    return x_BTD, None

  with nn.intercept_methods(forward):
    x_BTD = transformer.apply(
        {'params': {'embedder': params['embedder']}}, tokens_BT,
        method=lambda t, tokens: t.embedder.encode(tokens))
  adapters = forward.adapters
  x_BTD, _ = jax.lax.scan(
      _recomputed(body, forward.execution.remat), x_BTD,
      (params['layers'], lora.stack(adapters, L) if adapters else None,
       jnp.asarray(kinds), jnp.arange(L)))
  return transformer.apply(
      {'params': {'final_norm': params['final_norm']}}, x_BTD,
      method=lambda t, x: t.final_norm(x))


def run_loop(
    transformer: nn.Module, params: Params, tokens_BT: shapes.TokensBT,
    mask_BTS: jax.Array, cache: Params | None, forward: 'Forward',
) -> tuple[shapes.HiddenBTD, Params]:
  """Runs the library's own loop over its blocks, to the final norm.

  Returns (hidden states, the new cache). See `model.decode` for the mask and
  the cache.
  """
  params = forward.operations.prepare(params)
  if forward.adapters:
    forward = dataclasses.replace(forward, adapters=unstack(forward.adapters))
  with nn.intercept_methods(forward.with_rope()):
    return transformer.apply(
        {'params': unstack(params)}, tokens_BT, forward.positions_BT, mask_BTS,
        cache, method=run_library)


def run_library(
    transformer: nn.Module, tokens_BT: shapes.TokensBT,
    positions_BT: shapes.PositionsBT, mask_BTS: jax.Array, cache: Params | None
) -> tuple[shapes.HiddenBTD, Params]:
  """What the library's `__call__` does before the logits, as a linen method.

  `__call__` itself is wrapped in `nn.jit`, whose cached traces ignore
  interceptors, and ends in logits that training does not need.
  """
  inputs = transformer._encode_and_get_inputs(
      tokens=tokens_BT, positions=positions_BT, attention_mask=mask_BTS)
  return transformer._apply_attention(inputs, cache)


# Inside a block --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Forward:
  """One forward pass: intercepts the calls of the library's modules.

  Without `segment_ids_BT` (decoding, Gemma 4) the attention is the library's;
  with them it is a kernel of `attention`. In a scan, `adapters`, `layer` and
  `is_local` are those of the layer at hand. In the loop `layer` is None, and
  the paths of modules begin with 'layer_<i>'.
  """

  config: Any  # The library's.
  operations: Operations
  positions_BT: jax.Array
  segment_ids_BT: jax.Array | None = None
  execution: Execution = PLAIN
  adapters: Params | None = None
  lora_scale: float = 1.0
  dropout: lora.Dropout | None = None
  rope: dict[str, Any] | None = None
  layer: jax.Array | None = None
  is_local: bool | jax.Array | None = None

  def with_rope(self) -> 'Forward':
    """Returns the pass with the tables that `attend` needs, computed once."""
    if self.segment_ids_BT is None:
      return self
    return dataclasses.replace(
        self, rope=_rope_tables(self.config, self.positions_BT))

  def __call__(self, next_fun, args, kwargs, context):
    module, kind = context.module, type(context.module).__name__
    if kind == 'Embedder' and context.method_name == 'encode':
      return self.operations.encode(next_fun, module, *args)
    if context.method_name != '__call__':
      return next_fun(*args, **kwargs)
    if kind == 'Einsum':
      return self.project(next_fun, module, *args)
    if kind == 'FeedForward':
      return feed_forward(module, *args)
    if kind == 'Attention' and self.segment_ids_BT is not None:
      return None, self.attend(module, args[0])
    if kind == 'Block' and self.layer is None:
      return _recomputed(
          lambda args, kwargs: next_fun(*args, **kwargs),
          self.execution.remat)(args, kwargs)
    return next_fun(*args, **kwargs)

  def project(self, next_fun, module, equation, x):
    """Runs the library's Einsum with adapters, on weights of any kind."""
    path, layer = (*module.path, module.weight_name), self.layer
    adapters = self.adapters
    if layer is None and path[0].startswith('layer_'):
      layer = int(path[0].removeprefix('layer_'))
      adapters, path = (adapters or {}).get(path[0]), path[1:]

    def add_update(x, y, **options):
      if not adapters:
        return y
      return lora.add_update(
          adapters, path, x, y, self.lora_scale,
          self.dropout and dataclasses.replace(self.dropout, layer=layer),
          weight=lambda: quantize.dense(module.get_variable(
              'params', module.weight_name), jnp.float32),
          # Gemma 4's config has no such key: all of its are transposed.
          transposed_gating=getattr(
              self.config, 'transpose_gating_einsum', True), **options)

    return checkpoint_name(self.operations.project(
        next_fun, module, equation, x, add_update), _SAVED)

  def attend(self, module, x_BTD):
    """Runs the library's Attention with one of our kernels in its middle."""
    if module.use_qkv_einsum:
      q_BTNH, k_BTKH, v_BTKH = module.qkv_einsum('BTD,SNDH->SBTNH', x_BTD)
    else:
      q_BTNH = module.q_einsum('BTD,NDH->BTNH', x_BTD)
      k_BTKH, v_BTKH = module.kv_einsum('BSD,CKDH->CBSKH', x_BTD)
    if module.use_qk_norm:
      q_BTNH = module._query_norm(q_BTNH)
      k_BTKH = module._key_norm(k_BTKH)
    is_local = self.is_local
    if self.layer is None:
      is_local = _is_local(module.attn_type)
    if isinstance(is_local, bool):
      angles = self.rope['local' if is_local else 'global']
    else:
      angles = jax.tree.map(
          lambda a, b: jnp.where(is_local, a, b), self.rope['local'],
          self.rope['global'])
    out_BTNH = self.operations.attend(
        module, _rotate(q_BTNH, angles) * module.query_pre_attn_scalar,
        _rotate(k_BTKH, angles), v_BTKH, self.positions_BT,
        self.segment_ids_BT, is_local, window=module.sliding_window_size,
        softcap=module.attn_logits_soft_cap, kernel=self.execution.attention,
        mesh=self.execution.mesh)
    return module.attn_vec_einsum(
        'BTNH,NHD->BTD', checkpoint_name(out_BTNH, _SAVED))


def feed_forward(module: nn.Module, x: jax.Array) -> jax.Array:
  """Runs the library's FeedForward with our GELU between its two Einsums."""
  # Gemma 4's has no such attribute: its weights are all transposed.
  transposed = getattr(module, 'transpose_gating_einsum', True)
  sizes = module.hidden_dim, module.features
  # Gemma 4 has an Einsum of its own.
  layers = sys.modules[type(module).__module__]._layers

  def einsum(name, shape):
    made = layers.Einsum(shape=shape, weight_name=name)
    nn.share_scope(module, made)
    return made

  gating = einsum('gating_einsum', (2, *(sizes if transposed else sizes[::-1])))
  gate_up = gating('...F,NHF->...NH' if transposed else '...F,NFH->...NH', x)
  return einsum('linear', sizes)('...H,HF->...F', gelu.gated_gelu(gate_up))


def _rope_tables(config, positions_BT):
  """Returns {'local', 'global'}: (sin, cos) (B, T, 1, H / 2) in f32.

  Rotary positions as in arXiv 2104.09864, the halves split as the library does
  (`gm.math._positional_embeddings`).
  """
  exponents = (2.0 / config.head_dim) * jnp.arange(
      config.head_dim // 2, dtype=jnp.float32)

  def angles(base, factor):
    timescale = (base**exponents)[None, None]
    angle = (positions_BT[:, :, None] / timescale)[:, :, None] / factor
    return jnp.sin(angle), jnp.cos(angle)

  return {
      'local': angles(config.local_base_frequency, config.local_scale_factor),
      'global': angles(
          config.global_base_frequency, config.global_scale_factor)}


def _rotate(x_BTNH, angles):
  sin, cos = angles
  first, second = jnp.split(x_BTNH, 2, axis=-1)
  return jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin],
      axis=-1).astype(x_BTNH.dtype)


def _is_local(kind) -> bool:
  return kind.name == 'LOCAL_SLIDING'


# Recomputing and sharding ----------------------------------------------------

_SAVED = 'saved'  # What `remat='elementwise'` does not recompute.


def _recomputed(function, remat: str):
  """Returns a function whose backward pass recomputes what `remat` says."""
  if remat == 'none':
    return function
  policy = None
  if remat == 'elementwise':
    policy = jax.checkpoint_policies.save_only_these_names(_SAVED)
  return jax.checkpoint(function, policy=policy)


def _constrain(x_BTD, mesh):
  """Keeps rows on their devices: the partitioner may choose worse."""
  if mesh is None or mesh.size == 1:
    return x_BTD
  return jax.lax.with_sharding_constraint(
      x_BTD, NamedSharding(mesh, PartitionSpec(('data', 'fsdp'))))
