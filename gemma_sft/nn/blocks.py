"""The official blocks as training runs them: adapted, scanned, rematerialised.

The library runs its blocks one by one, so a program for 26 layers holds 26
copies of a block. Here one block is compiled and `lax.scan` runs it over the
layers, whose weights are stacked along a leading axis L:

    per layer (the library's, and all that the rest of the project sees)
        layer_0/attn/q_einsum/w (N, D, H), layer_1/attn/q_einsum/w, ...
    stacked
        layers/attn/q_einsum/w (L, N, D, H)

Local and global layers differ in their window and in their rotary frequencies
alone, so a flag per layer that is scanned along with the weights tells them
apart. Gemma 4 keeps the library's loop: its global layers have wider heads than
its local ones, its last layers read the keys of earlier ones, and arrays of
unlike shapes cannot be stacked.

What is changed inside a block is changed by interceptors, by the class's name
because Gemma 4 has classes of its own:

    Einsum     adapters added; quantised weights dequantised; see `float16`
    Attention  a kernel of `attention` in the place of the full square
    Block      rematerialised
    Embedder   f32 activations where weights are float16
"""

import dataclasses
import functools
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
from gemma_sft.nn import float16
from gemma_sft.nn import quantize

Params = Any


@dataclasses.dataclass(frozen=True)
class Execution:
  """How the training forward runs; none of it changes what is computed.

  Attributes:
    layers: 'scan' over stacked layers, or 'loop', the library's.
    attention: A kernel of `attention.KERNELS`. Gemma 4 has its own.
    remat: What the backward pass makes again: 'none'; 'elementwise', all but
      the results of matrix products and of attention; 'block', all of a block
      from its input.
    mesh: The mesh of the arrays, for kernels and activations; None on one
      device.
  """

  layers: str = 'loop'
  attention: str = 'einsum'
  remat: str = 'none'
  mesh: jax.sharding.Mesh | None = None


PLAIN = Execution()

# Stacking --------------------------------------------------------------------


def is_stacked(params: Params) -> bool:
  """Returns whether the layers of a tree are stacked."""
  return 'layers' in params


def stack(params: Params) -> Params:
  """Returns a tree with its `layer_<i>` stacked along a leading axis L.

  A tree that is stacked already is returned as it is. Leaves may be
  `jax.ShapeDtypeStruct`s.
  """
  if is_stacked(params):
    return params

  def join(*leaves):
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
      return leaves[0].update(shape=(len(leaves), *leaves[0].shape))
    return jnp.stack(leaves)

  rest = {k: v for k, v in params.items() if not k.startswith('layer_')}
  layers = [params[f'layer_{i}'] for i in range(len(params) - len(rest))]
  return rest | {'layers': jax.tree.map(join, *layers)}


def unstack(params: Params) -> Params:
  """Returns a tree with a subtree `layer_<i>` for each layer; see `stack`."""
  if not is_stacked(params):
    return params
  layers = params['layers']
  n_layers = jax.tree.leaves(layers)[0].shape[0]
  rest = {k: v for k, v in params.items() if k != 'layers'}
  return rest | {
      f'layer_{i}': jax.tree.map(lambda leaf, i=i: leaf[i], layers)
      for i in range(n_layers)}


# The forward -----------------------------------------------------------------


def run_scan(
    transformer: nn.Module,
    params: Params,
    tokens_BT: shapes.TokensBT,
    positions_BT: shapes.PositionsBT,
    segment_ids_BT: shapes.SegmentsBT,
    *,
    adapters: Params | None,
    lora_scale: float,
    dropout: lora.Dropout | None,
    execution: Execution,
    watch: dict[str, jax.Array] | None = None,
) -> shapes.HiddenBTD:
  """Runs the blocks of a Gemma 1 to 3 under `lax.scan`, to the final norm.

  Args:
    transformer: The library's linen module.
    params: Stacked or not; those of one layer after the other are stacked
      first, which copies them.
    tokens_BT: Token ids.
    positions_BT: Position of each token in its segment.
    segment_ids_BT: 0 for padding.
    adapters: Per layer, or None.
    lora_scale: From `lora.scale`.
    dropout: Or None.
    execution: Without its `layers`.
    watch: Takes the largest magnitude of each tensor inside, in the order of
      computation, as 'layer_0/attn/q_einsum'; what is rounded to float16
      there ends in `IN_FLOAT16`. Without rematerialisation only.
  """
  config = transformer.config
  params, half = stack(params), float16.is_used(params)
  if half:
    params = float16.with_float32_scales(params)
  L = config.num_layers
  # Whose flags say local or global does not matter: `_attend` is told.
  block = transformer.bind({}).blocks[0].clone(parent=None, name=None)
  is_local_L = jnp.asarray([_is_local(kind) for kind in config.attention_types])
  same = len(set(config.attention_types)) == 1
  rope = _rope_tables(config, positions_BT)
  names = []  # Of what is watched in a layer.

  def body(x_BTD, layer):
    seen = None if watch is None else {}
    x_BTD = _constrain(x_BTD, execution.mesh)
    weights, layer_adapters, is_local, number = layer
    if same:
      is_local = _is_local(config.attention_types[0])
    with _interceptors(
        config, layer_adapters, lora_scale, dropout, execution, positions_BT,
        segment_ids_BT, rope, is_local, number, half, seen):
      # The mask is `_attend`'s affair.
      _, x_BTD = block.apply(
          {'params': weights}, x_BTD, positions_BT, None, None)
    names[:] = seen or ()
    return x_BTD, tuple((seen or {}).values())

  if half:
    x_BTD = _embed(params['embedder']['input_embedding'], tokens_BT)
  else:
    x_BTD = transformer.apply(
        {'params': {'embedder': params['embedder']}}, tokens_BT,
        method=lambda t, tokens: t.embedder.encode(tokens))
  _see(watch, 'embedding', x_BTD)
  x_BTD, seen_nL = jax.lax.scan(
      _rematerialised(body, execution.remat), x_BTD,
      (params['layers'], lora.stack(adapters, L) if adapters else None,
       is_local_L, jnp.arange(L)))
  if watch is not None:
    watch |= {f'layer_{i}/{name}': seen_L[i] for i in range(L)
              for name, seen_L in zip(names, seen_nL)}
  x_BTD = transformer.apply(
      {'params': {'final_norm': params['final_norm']}}, x_BTD,
      method=lambda t, x: t.final_norm(x))
  _see(watch, 'final_norm' + IN_FLOAT16, x_BTD)
  return x_BTD


def run_loop(
    transformer: nn.Module,
    params: Params,
    tokens_BT: shapes.TokensBT,
    positions_BT: shapes.PositionsBT,
    mask_BTS: jax.Array,
    cache: Params | None,
    *,
    adapters: Params | None = None,
    lora_scale: float = 1.0,
    dropout: lora.Dropout | None = None,
    execution: Execution = PLAIN,
    segment_ids_BT: shapes.SegmentsBT | None = None,
    watch: dict[str, jax.Array] | None = None,
) -> tuple[shapes.HiddenBTD, Params]:
  """Runs the library's own loop over its blocks, to the final norm.

  Args:
    transformer: The library's linen module.
    params: Stacked or not.
    tokens_BT: Token ids.
    positions_BT: Position of each token in its segment.
    mask_BTS: Which of the S keys each token may see.
    cache: Of the library, or None.
    adapters: Per layer, or None.
    lora_scale: From `lora.scale`.
    dropout: Or None.
    execution: Without its `layers`.
    segment_ids_BT: With them the attention is a kernel of `attention`; without
      (decoding with a cache, Gemma 4) it is the library's.
    watch: See `run_scan`.

  Returns:
    (hidden states, the new cache).
  """
  rope, half = None, float16.is_used(params)
  if half:
    params = float16.with_float32_scales(params)
  if adapters and is_stacked(adapters):
    adapters = unstack(adapters)
  if segment_ids_BT is not None:
    rope = _rope_tables(transformer.config, positions_BT)

  with _interceptors(
      transformer.config, adapters, lora_scale, dropout, execution,
      positions_BT, segment_ids_BT, rope, None, None, half, watch):
    with nn.intercept_methods(_remat_blocks(execution.remat)):
      x_BTD, cache = transformer.apply(
          {'params': unstack(params)}, tokens_BT, positions_BT, mask_BTS,
          cache, method=run_library)
  _see(watch, 'final_norm' + IN_FLOAT16, x_BTD)
  return x_BTD, cache


def run_library(
    transformer: nn.Module,
    tokens_BT: shapes.TokensBT,
    positions_BT: shapes.PositionsBT,
    mask_BTS: jax.Array,
    cache: Params | None,
) -> tuple[shapes.HiddenBTD, Params]:
  """What the library's `__call__` does before the logits, as a linen method.

  `__call__` itself is wrapped in `nn.jit`, whose cached traces ignore
  interceptors, and ends in logits that training never wants.
  """
  inputs = transformer._encode_and_get_inputs(
      tokens=tokens_BT, positions=positions_BT, attention_mask=mask_BTS)
  return transformer._apply_attention(inputs, cache)


# Inside a block --------------------------------------------------------------


def _interceptors(
    config, adapters, lora_scale, dropout, execution, positions_BT,
    segment_ids_BT, rope, is_local, number, half, seen):
  """Returns the context in which Einsum and Attention layers are ours.

  Args:
    config: The library's.
    adapters: Of the whole model, or in a scan of one layer.
    lora_scale: From `lora.scale`.
    dropout: Or None.
    execution: See `Execution`.
    positions_BT: Of the tokens.
    segment_ids_BT: Or None to leave the attention to the library.
    rope: From `_rope_tables`.
    is_local: In a scan, whether this layer is local.
    number: In a scan, which layer this is; None for paths that begin with it.
    half: Whether products are in float16.
    seen: Takes the magnitudes of `run_scan`'s `watch`, or None.
  """

  def see(module, name, array):
    _see(seen, '/'.join((*module.path, *name)), array)

  def intercept(next_fun, args, kwargs, context):
    module, kind = context.module, type(context.module).__name__
    if half and kind == 'Embedder' and context.method_name == 'encode':
      return _embed(module.get_variable('params', 'input_embedding'), *args)
    if context.method_name != '__call__':
      return next_fun(*args, **kwargs)
    if kind == 'Einsum':
      return einsum(next_fun, module, *args)
    if kind == 'Attention' and segment_ids_BT is not None:
      local = is_local if number is not None else _is_local(module.attn_type)
      return None, _attend(
          module, args[0], positions_BT, segment_ids_BT, rope, local, execution,
          half, functools.partial(see, module))
    out = next_fun(*args, **kwargs)
    if kind in ('RMSNorm', 'Block'):
      see(module, ('residual',) if kind == 'Block' else (),
          out[1] if kind == 'Block' else out)
    return out

  def einsum(next_fun, module, equation, x):
    path = (*module.path, module.weight_name)
    layer, here = number, adapters
    if number is None and path[0].startswith('layer_'):
      layer = int(path[0].removeprefix('layer_'))
      here, path = (adapters or {}).get(path[0]), path[1:]
    weight = module.get_variable('params', module.weight_name)
    factor_BT = None
    own = () if module.weight_name == 'w' else (module.weight_name,)
    if half and (*module.path, *own)[-1] in _BOUNDED:
      see(module, (*own, 'input' + IN_FLOAT16), x)
    elif half:
      see(module, (*own, 'input'), x)
      x, factor_BT = float16.fit(x)
    if isinstance(weight, quantize.Quantized):
      y = quantize.einsum(equation, x, weight, half)
    elif half:
      y = float16.einsum(equation, x, weight)
      # Gemma 4 has it on one.
      y = y if getattr(module, 'w_scale', None) is None else y * module.w_scale
    else:
      y = next_fun(equation, x)
    if here:
      y = lora.add_update(
          here, path, x, y, lora_scale,
          dropout and dataclasses.replace(dropout, layer=layer),
          weight=lambda: quantize.dense(weight, jnp.float32),
          # All of Gemma 4's are.
          transposed_gating=getattr(config, 'transpose_gating_einsum', True),
          einsum=float16.einsum if half else None)
    if factor_BT is not None:
      y = float16.unfit(y, factor_BT)
    see(module, own, y)
    # What remat 'elementwise' keeps.
    return checkpoint_name(y, _KEPT)

  return nn.intercept_methods(intercept)


def _attend(module, x_BTD, positions_BT, segment_ids_BT, rope, is_local,
            execution, half, see):
  """The library's Attention with one of our kernels in its middle."""
  if module.use_qkv_einsum:
    q_BTNH, k_BTKH, v_BTKH = module.qkv_einsum('BTD,SNDH->SBTNH', x_BTD)
  else:
    q_BTNH = module.q_einsum('BTD,NDH->BTNH', x_BTD)
    k_BTKH, v_BTKH = module.kv_einsum('BSD,CKDH->CBSKH', x_BTD)
  if module.use_qk_norm:
    q_BTNH = module._query_norm(q_BTNH)
    k_BTKH = module._key_norm(k_BTKH)
  if isinstance(is_local, bool):
    angles = rope['local' if is_local else 'global']
  else:
    angles = jax.tree.map(
        lambda a, b: jnp.where(is_local, a, b), rope['local'], rope['global'])
  q_BTNH = _rotate(q_BTNH, angles) * module.query_pre_attn_scalar
  k_BTKH = _rotate(k_BTKH, angles)
  if half:
    for name, x in (('queries', q_BTNH), ('keys', k_BTKH), ('values', v_BTKH)):
      see((name + IN_FLOAT16,), x)
    q_BTNH, k_BTKH, v_BTKH = (
        x.astype(jnp.float16) for x in (q_BTNH, k_BTKH, v_BTKH))
  out_BTNH = attention.attend(
      q_BTNH, k_BTKH, v_BTKH, positions_BT, segment_ids_BT, is_local,
      window=module.sliding_window_size, softcap=module.attn_logits_soft_cap,
      kernel=execution.attention, mesh=execution.mesh)
  return module.attn_vec_einsum(
      'BTNH,NHD->BTD', checkpoint_name(out_BTNH, _KEPT))


def _rope_tables(config, positions_BT):
  """Returns {'local', 'global'}: (sin, cos) (B, T, 1, H / 2) in f32.

  Made once, not in every layer. Rotary positions as in arXiv 2104.09864, the
  halves split as the library does (`gm.math._positional_embeddings`).
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


def _embed(table_VD, tokens_BT):
  """The library's `encode`, in f32."""
  return table_VD[tokens_BT].astype(jnp.float32) * jnp.sqrt(
      jnp.float32(table_VD.shape[1]))


# Ends the names of tensors that are watched at the end of float16.
IN_FLOAT16 = ', rounded to float16'
# Layers whose inputs float16 holds: what a norm has made, and means of values.
_BOUNDED = ('q_einsum', 'k_einsum', 'kv_einsum', 'qkv_einsum',
            'attn_vec_einsum', 'gating_einsum')


def _see(seen, name, array):
  if seen is not None:
    seen[name] = jnp.max(jnp.abs(array.astype(jnp.float32)))


def _is_local(kind) -> bool:
  return kind.name == 'LOCAL_SLIDING'


# Rematerialisation -----------------------------------------------------------

_KEPT = 'kept'


def _rematerialised(function, remat: str):
  if remat == 'none':
    return function
  policy = None
  if remat == 'elementwise':
    policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
  return jax.checkpoint(function, policy=policy)


def _remat_blocks(remat: str):
  """An interceptor that rematerialises the blocks of the library's loop."""

  def intercept(next_fun, args, kwargs, context):
    if (remat == 'none' or type(context.module).__name__ != 'Block'
        or context.method_name != '__call__'):
      return next_fun(*args, **kwargs)
    return _rematerialised(lambda a, k: next_fun(*a, **k), remat)(args, kwargs)

  return intercept


def _constrain(x_BTD, mesh):
  """Keeps rows on their devices: the partitioner may choose worse."""
  if mesh is None or mesh.size == 1:
    return x_BTD
  return jax.lax.with_sharding_constraint(
      x_BTD, NamedSharding(mesh, PartitionSpec(('data', 'fsdp'))))
