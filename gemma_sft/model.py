"""The official Gemma models, and the one way this project runs them.

The model is made of the library's public classes. Only this module (for the
import and for small models of Gemma 4) and `nn/blocks.py` use its internals.
`tests/model_test.py` compares every generation with the library's own
`__call__`, so it fails first when the library changes.
"""

import dataclasses
import functools
import importlib
import importlib.machinery
import sys
import types
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from gemma_sft import errors
from gemma_sft import shapes
from gemma_sft.adapters import lora
from gemma_sft.adapters import projections
from gemma_sft.nn import blocks
from gemma_sft.nn import float16
from gemma_sft.nn import quantize

Params = Any  # Nested dicts of arrays, named as the official library does.


@functools.cache
def import_gemma() -> types.ModuleType:
  """Returns `gemma.gm` without importing TensorFlow.

  Two modules would import it: `gm.ckpts._policy` names a `kd.train.TrainState`
  in an annotation, and `kauldron.typing` reads `tf.Tensor`. Both get stand-ins.
  This loses `gm.ckpts.AnchoredPolicyLoader`, `gm.data` and `gm.evals`, which
  this project does not use.
  """
  policy = 'gemma.gm.ckpts._policy'
  if policy not in sys.modules:
    module = types.ModuleType(policy)
    module.AnchoredPolicyLoader = type('AnchoredPolicyLoader', (), {})
    sys.modules[policy] = module
  if sys.modules.get('tensorflow') is None:
    stand_in = types.ModuleType('tensorflow')
    stand_in.Tensor = type('Tensor', (), {})
    stand_in.__spec__ = importlib.machinery.ModuleSpec('tensorflow', None)
    sys.modules['tensorflow'] = stand_in
    try:
      importlib.import_module('kauldron.typing')
    finally:
      # Left there, etils would take it for TensorFlow.
      del sys.modules['tensorflow']
  from gemma import gm

  return gm


@dataclasses.dataclass(frozen=True)
class Model:
  """A Gemma architecture, without weights."""

  name: str  # Of `PRESETS`, or 'custom'.
  generation: int  # 1 to 4; decides the chat template and the weights' names.
  transformer: nn.Module  # Of the official library.

  @property
  def config(self) -> Any:
    """The library's frozen `TransformerConfig`."""
    return self.transformer.config

  @property
  def transposed_gating(self) -> bool:
    """Whether `gating_einsum` is (2, F, D) rather than (2, D, F)."""
    return self.generation == 4 or self.config.transpose_gating_einsum

  @property
  def unused_weights(self) -> frozenset[str]:
    """Paths of weights that the forward never reads.

    The last layers of some Gemma 4 take keys and values from earlier layers,
    but the library keeps weights for their own.
    """
    if self.generation != 4:
      return frozenset()
    n_layers = self.config.num_layers
    return frozenset(
        f'layer_{layer}/attn/{name}'
        for layer in range(n_layers - n_shared_layers(self.config), n_layers)
        for name, slots in projections.BY_LAYER.items()
        if any(projection.name == 'k' for projection in slots))


def n_shared_layers(config: Any) -> int:
  """Returns how many layers of a Gemma 4 use keys and values of earlier ones.

  It rounds like `gemma4._config.create_kv_cache_sharing_patterns`.
  """
  if config.kv_cache_sharing_config is None:
    return 0
  n_layers = config.num_layers
  shared = config.kv_cache_sharing_config.frac_shared_layers * n_layers
  return n_layers - int(n_layers - shared)


# name: generation. 'gemma2_2b' is the library's `gm.nn.Gemma2_2B`, and so on;
# it has no class for Gemma 1, but its Transformer can be configured as one.
PRESETS = {name: int(name.removeprefix('gemma')[0]) for name in (
    'gemma1_2b', 'gemma1_7b', 'gemma2_2b', 'gemma2_9b', 'gemma2_27b',
    'gemma3_270m', 'gemma3_1b', 'gemma3_4b', 'gemma3_12b', 'gemma3_27b',
    'gemma4_e2b', 'gemma4_e4b', 'gemma4_31b')}
_WITH_VISION = ('gemma3_4b', 'gemma3_12b', 'gemma3_27b', 'gemma4_e2b',
                'gemma4_e4b', 'gemma4_31b')


def make_model(name: str, **dimensions: Any) -> Model:
  """Returns a model of `PRESETS`; for 'custom' see `_make_custom`.

  Raises:
    UserError: for an unknown name, or for the mixture of experts.
  """
  if name == 'custom':
    return _make_custom(**dimensions)
  if name == 'gemma4_26b_a4b':
    raise errors.UserError(
        'config.model.name is gemma4_26b_a4b, a mixture of experts',
        'a dense model: its experts are not Einsum layers, so adapters on the'
        ' MLP would be left out without a word',
        'use gemma4_e2b, gemma4_e4b or gemma4_31b')
  if name not in PRESETS:
    raise errors.UserError(
        f'config.model.name is {name!r}',
        f'one of {", ".join(PRESETS)}, or custom',
        f'{errors.nearest(name, tuple(PRESETS))}Set --config.model.name.')
  if PRESETS[name] == 1:
    # Dimensions of google/gemma-2b and -7b; 256128 rows as in the Flax files.
    width, hidden, heads, kv_heads, layers = {
        'gemma1_2b': (2048, 16384, 8, 1, 18),
        'gemma1_7b': (3072, 24576, 16, 16, 28),
    }[name]
    return _make_custom(
        generation=1, vocab_size=256128, num_layers=layers, embed_dim=width,
        hidden_dim=hidden, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=256, name=name)
  text_only = {'text_only': True} if name in _WITH_VISION else {}
  make_transformer = getattr(import_gemma().nn, name.title())
  return Model(name, PRESETS[name], make_transformer(**text_only))


def _make_custom(
    *,
    generation: int,
    vocab_size: int,
    num_layers: int,
    embed_dim: int,
    hidden_dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    sliding_window: int = 512,
    local_layers_per_global: int = 5,
    per_layer_input_dim: int = 0,
    shared_kv_layers: int = 0,
    name: str = 'custom',
) -> Model:
  """Builds a model of any size with the structure of a generation.

  It has the norms, caps, rope and layer pattern of the generation. As many
  key-value heads as heads fuse q, k and v (Gemma 1 7B). Only Gemma 3 and 4 vary
  `local_layers_per_global`. `per_layer_input_dim` is the width of Gemma 4's
  inputs per layer, 0 for none; its last `shared_kv_layers` reuse keys and
  values.

  Raises:
    UserError: if the generation is unknown or the heads do not divide.
  """
  if generation not in (1, 2, 3, 4):
    raise errors.UserError(
        f'config.model.generation is {generation}', '1, 2, 3 or 4',
        'set --config.model.generation')
  if num_kv_heads < 1 or num_heads % num_kv_heads:
    raise errors.UserError(
        f'{num_heads} query heads and {num_kv_heads} key-value heads',
        'a number of query heads that the key-value heads divide',
        'change --config.model.num_heads or --config.model.num_kv_heads')
  gm = import_gemma()
  config_lib, make_transformer = gm.nn.config, gm.nn.Transformer
  kind, n_local = gm.nn.AttentionType, local_layers_per_global
  specific: dict[str, Any] = dict(
      use_post_attn_norm=True, use_post_ffw_norm=True,
      sliding_window_size=sliding_window, final_logit_softcap=None)
  if generation == 1:
    n_local = 0
    specific = dict(use_post_attn_norm=False, use_post_ffw_norm=False,
                    final_logit_softcap=None)
  elif generation == 2:
    n_local = 1
    specific |= dict(final_logit_softcap=30.0, attn_logits_soft_cap=50.0)
  elif generation == 3:
    specific |= dict(use_qk_norm=True, transpose_gating_einsum=True,
                     global_base_frequency=1_000_000)
  else:
    from gemma.gm.nn.gemma4 import _config as config_lib
    from gemma.gm.nn.gemma4 import _modules as modules
    from gemma.gm.nn.gemma4 import _transformer as transformer

    kind, make_transformer = modules.AttentionType, transformer.Transformer
    specific |= dict(
        final_logit_softcap=30.0, global_key_size=2 * head_dim,
        global_rope_proportion=0.25, local_rope_proportion=1.0,
        global_base_frequency=1_000_000,
        per_layer_input_dim=per_layer_input_dim)
    if shared_kv_layers:
      specific['kv_cache_sharing_config'] = config_lib.KVCacheSharingConfig(
          shared_kv_layers / num_layers, True, True)
  config = config_lib.TransformerConfig(
      num_embed=vocab_size, embed_dim=embed_dim, hidden_dim=hidden_dim,
      num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
      attention_types=config_lib.make_attention_layers_types(
          (kind.LOCAL_SLIDING,) * n_local + (kind.GLOBAL,),
          num_layers=num_layers),
      **specific)
  return Model(name, generation, make_transformer(config=config))


def abstract_params(model: Model) -> Params:
  """Returns the parameter tree as `jax.ShapeDtypeStruct`s in f32."""
  return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32),
      _init_shapes(model))


@functools.cache  # Tracing all layers takes seconds.
def _init_shapes(model):
  tokens = jnp.zeros((1, 8), jnp.int32)
  return jax.eval_shape(
      functools.partial(model.transformer.init, method=blocks.run_library),
      jax.random.key(0), tokens, jnp.zeros_like(tokens),
      jnp.ones((1, 8, 8), bool), None)['params']


def count_params(params: Params) -> int:
  """Returns the number of parameters in a tree."""
  return sum(
      leaf.size for leaf in jax.tree.leaves(params, is_leaf=_is_quantized))


def _is_quantized(leaf):
  return isinstance(leaf, quantize.Quantized)


# The training forward --------------------------------------------------------


def segment_mask(segment_ids_BT: shapes.SegmentsBT) -> jax.Array:
  """Returns the attention mask (B, T, S) of packed rows.

  A token sees itself and the earlier tokens of its own segment; nothing sees
  segment 0, which is padding. The library adds the local layers' window from
  the positions.
  """
  T = segment_ids_BT.shape[1]
  same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
  filled_BTS = (segment_ids_BT > 0)[:, None, :]
  causal_TS = jnp.tril(jnp.ones((T, T), bool))
  return same_BTS & filled_BTS & causal_TS[None]


def hidden_states(
    model: Model,
    params: Params,
    tokens_BT: shapes.TokensBT,
    positions_BT: shapes.PositionsBT,
    segment_ids_BT: shapes.SegmentsBT,
    *,
    adapters: Params | None = None,
    lora_scale: float = 1.0,
    dropout: lora.Dropout | None = None,
    execution: blocks.Execution = blocks.PLAIN,
    operations: blocks.Operations | None = None,
) -> shapes.HiddenBTD:
  """Runs the model up to its final norm.

  The compute dtype is that of `params` (see `float16` for that one), which are
  the base weights or an `Adapted`. Weights and adapters are per layer or
  stacked. Positions count from the start of a segment; the segments of a row
  are 1, 2, ..., and 0 is padding. Without `operations`, those for the dtype of
  `params` are taken. `nn/head.py` computes the logits of trained tokens.
  """
  if isinstance(params, Adapted):
    params, adapters, lora_scale = params.base, params.adapters, params.scale
  forward = blocks.Forward(
      model.config, operations or float16.operations(params), positions_BT,
      None if model.generation == 4 else segment_ids_BT, execution, adapters,
      lora_scale, dropout)
  if execution.layers == 'scan' and model.generation != 4:
    return blocks.run_scan(model.transformer, params, tokens_BT, forward)
  return blocks.run_loop(
      model.transformer, params, tokens_BT, segment_mask(segment_ids_BT), None,
      forward)[0]


@flax.struct.dataclass
class Adapted:
  """A quantised base and its adapters, to generate with.

  Merging them would need the memory that quantisation saves.
  """

  base: Params
  adapters: Params
  scale: float = flax.struct.field(pytree_node=False)


def merge(
    model: Model, params: Params, adapters: Params, lora_scale: float
) -> Params:
  """Returns weights to generate with: merged, or an `Adapted` if quantised."""
  if any(map(_is_quantized, jax.tree.leaves(params, is_leaf=_is_quantized))):
    return Adapted(params, adapters, lora_scale)
  return lora.merge(
      params, adapters, lora_scale, transposed_gating=model.transposed_gating)


def per_layer(params: Params) -> Params:
  """Returns weights to generate with, per layer instead of stacked."""
  if isinstance(params, Adapted):
    return params.replace(base=blocks.unstack(params.base),
                          adapters=blocks.unstack(params.adapters))
  return blocks.unstack(params)


def dense(params: Params) -> Params:
  """Returns a tree with its quantised weights as f32 arrays."""
  return jax.tree.map(
      lambda leaf: quantize.dequantize(leaf, jnp.float32)
      if _is_quantized(leaf) else leaf, params, is_leaf=_is_quantized)


def embedding(params: Params) -> shapes.EmbeddingVD:
  """Returns the tied embedding, which is also the output head."""
  params = params.base if isinstance(params, Adapted) else params
  return params['embedder']['input_embedding']


# Decoding with a cache -------------------------------------------------------


def decode(
    model: Model, params: Params, tokens_BT: shapes.TokensBT,
    positions_BT: shapes.PositionsBT, mask_BTS: jax.Array, cache: Params
) -> tuple[jax.Array, Params]:
  """Returns (f32 logits_BV after T more tokens, the new cache).

  `params` have the adapters merged in, or are an `Adapted`. All rows write to
  the same cache slots; positions differ from slots where rows are padded on the
  left. The mask says which of the S slots each new token may see.
  """
  base, adapted = params, {}
  if isinstance(params, Adapted):
    base = params.base
    adapted = dict(adapters=params.adapters, lora_scale=params.scale)
  x_BTD, cache = blocks.run_loop(
      model.transformer, base, tokens_BT, mask_BTS, cache, blocks.Forward(
          model.config, float16.operations(base), positions_BT, **adapted))
  return logits(model, params, x_BTD[:, -1]), cache


def logits(model: Model, params: Params, x: jax.Array) -> jax.Array:
  """Returns f32 logits (..., V) of hidden states (..., D)."""
  out = jnp.einsum(
      '...D,VD->...V', float16.operand(x, embedding(params)), embedding(params),
      preferred_element_type=jnp.float32)
  cap = model.config.final_logit_softcap
  return out if cap is None else jnp.tanh(out / cap) * cap
