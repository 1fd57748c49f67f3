"""The official Gemma models, and the one way this project runs them.

The library's public classes carry the model. Some of its internals are
reached, here and in `blocks` and nowhere else:

* its import, which would pull in TensorFlow for two type annotations;
* Gemma 4's private config classes, for small models;
* what stands between the embedding and the logits, see `blocks`.

`tests/model_test.py` compares every generation with the library's own
`__call__`, so a change of the library is seen there first.
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
from gemma_sft.nn import blocks
from gemma_sft.nn import float16
from gemma_sft.nn import quantize

Params = Any  # Nested dicts of arrays, named as the official library does.


@functools.cache
def import_gemma() -> types.ModuleType:
  """Returns `gemma.gm` without importing TensorFlow.

  Two modules ask for it while they load: `gm.ckpts._policy` names a
  `kd.train.TrainState` in an annotation, and `kauldron.typing` reads
  `tf.Tensor`. Stand-ins satisfy both. What is lost is what this project does
  not use: `gm.ckpts.AnchoredPolicyLoader`, `gm.data`, `gm.evals`.
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
      # etils takes a module of that name for the real one, so it must not
      # outlive the import.
      del sys.modules['tensorflow']
  from gemma import gm

  return gm


@dataclasses.dataclass(frozen=True)
class Model:
  """A Gemma architecture: what to run, not its weights.

  Attributes:
    name: The preset's name, or 'custom'.
    generation: 1 to 4; decides the chat template and the weights' names.
    transformer: The official library's linen module.
  """

  name: str
  generation: int
  transformer: nn.Module

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
    """Paths of weights that no forward reads: adapters there would do nothing.

    The last layers of some Gemma 4 take keys and values from earlier ones; the
    library keeps weights for them all the same.
    """
    if self.generation != 4:
      return frozenset()
    n_layers = self.config.num_layers
    return frozenset(
        f'layer_{layer}/attn/{name}'
        for layer in range(n_layers - n_shared_layers(self.config), n_layers)
        for name in ('k_einsum', 'kv_einsum', 'qkv_einsum'))


def n_shared_layers(config: Any) -> int:
  """Returns how many layers of a Gemma 4 use keys and values of earlier ones.

  Rounded as in `gemma4._config.create_kv_cache_sharing_patterns`.
  """
  if config.kv_cache_sharing_config is None:
    return 0
  n_layers = config.num_layers
  shared = config.kv_cache_sharing_config.frac_shared_layers * n_layers
  return n_layers - int(n_layers - shared)


# name: (generation, class in gm.nn). Gemma 1 is not in the library any more;
# it is a configuration of its Transformer.
PRESETS = {
    'gemma1_2b': (1, None),
    'gemma1_7b': (1, None),
    'gemma2_2b': (2, 'Gemma2_2B'),
    'gemma2_9b': (2, 'Gemma2_9B'),
    'gemma2_27b': (2, 'Gemma2_27B'),
    'gemma3_270m': (3, 'Gemma3_270M'),
    'gemma3_1b': (3, 'Gemma3_1B'),
    'gemma3_4b': (3, 'Gemma3_4B'),
    'gemma3_12b': (3, 'Gemma3_12B'),
    'gemma3_27b': (3, 'Gemma3_27B'),
    'gemma4_e2b': (4, 'Gemma4_E2B'),
    'gemma4_e4b': (4, 'Gemma4_E4B'),
    'gemma4_31b': (4, 'Gemma4_31B'),
}


def make_model(name: str, **dimensions: Any) -> Model:
  """Returns a preset, or a model of free dimensions when `name` is 'custom'.

  Args:
    name: A key of `PRESETS`, or 'custom'.
    **dimensions: For 'custom' only, see `_make_custom`.

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
        'use gemma4_e2b, gemma4_e4b or gemma4_31b',
    )
  if name not in PRESETS:
    raise errors.UserError(
        f'config.model.name is {name!r}',
        f'one of {", ".join(PRESETS)}, or custom',
        f'{errors.nearest(name, tuple(PRESETS))}Set --config.model.name.',
    )
  gm = import_gemma()
  generation, class_name = PRESETS[name]
  if class_name is None:
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
  return Model(name, generation, getattr(gm.nn, class_name)(**text_only))


_WITH_VISION = ('gemma3_4b', 'gemma3_12b', 'gemma3_27b', 'gemma4_e2b',
                'gemma4_e4b', 'gemma4_31b')


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
  """Builds a model of a generation's kind at any size.

  Args:
    generation: Whose norms, caps, rope and layer pattern to use.
    vocab_size: Rows of the embedding.
    num_layers: Number of blocks.
    embed_dim: Model width D.
    hidden_dim: MLP width F.
    num_heads: Query heads N.
    num_kv_heads: Key-value heads K; equal to N fuses q, k and v (Gemma 1 7B).
    head_dim: Head width H.
    sliding_window: Window of the local layers (generations 2 to 4).
    local_layers_per_global: 1 in Gemma 2, 5 in Gemma 3.
    per_layer_input_dim: Width of Gemma 4's per-layer inputs, 0 for none.
    shared_kv_layers: Last layers of Gemma 4 that reuse earlier keys, values.
    name: What to call it.

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
  common = dict(
      num_embed=vocab_size, embed_dim=embed_dim, hidden_dim=hidden_dim,
      num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
  if generation == 4:
    from gemma.gm.nn.gemma4 import _config as config4
    from gemma.gm.nn.gemma4 import _modules as modules4
    from gemma.gm.nn.gemma4 import _transformer as transformer4

    kind = modules4.AttentionType
    config = config4.TransformerConfig(
        **common,
        attention_types=config4.make_attention_layers_types(
            (kind.LOCAL_SLIDING,) * local_layers_per_global + (kind.GLOBAL,),
            num_layers=num_layers),
        final_logit_softcap=30.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        sliding_window_size=sliding_window,
        global_key_size=2 * head_dim,
        global_rope_proportion=0.25,
        local_rope_proportion=1.0,
        global_base_frequency=1_000_000,
        per_layer_input_dim=per_layer_input_dim,
        kv_cache_sharing_config=config4.KVCacheSharingConfig(
            shared_kv_layers / num_layers, True, True)
        if shared_kv_layers else None,
    )
    return Model(name, 4, transformer4.Transformer(config=config))
  kind = gm.nn.AttentionType
  if generation == 1:
    specific = dict(
        attention_types=(kind.GLOBAL,) * num_layers,
        final_logit_softcap=None,
        use_post_attn_norm=False, use_post_ffw_norm=False)
  elif generation == 2:
    specific = dict(
        attention_types=gm.nn.config.make_attention_layers_types(
            (kind.LOCAL_SLIDING, kind.GLOBAL), num_layers=num_layers),
        final_logit_softcap=30.0, attn_logits_soft_cap=50.0,
        use_post_attn_norm=True, use_post_ffw_norm=True,
        sliding_window_size=sliding_window)
  else:
    specific = dict(
        attention_types=gm.nn.config.make_attention_layers_types(
            (kind.LOCAL_SLIDING,) * local_layers_per_global + (kind.GLOBAL,),
            num_layers=num_layers),
        final_logit_softcap=None,
        use_post_attn_norm=True, use_post_ffw_norm=True, use_qk_norm=True,
        sliding_window_size=sliding_window, transpose_gating_einsum=True,
        global_base_frequency=1_000_000)
  config = gm.nn.config.TransformerConfig(**common, **specific)
  return Model(name, generation, gm.nn.Transformer(config=config))


def abstract_params(model: Model) -> Params:
  """Returns the parameter tree as `jax.ShapeDtypeStruct`s in f32."""
  tokens = jnp.zeros((1, 8), jnp.int32)
  variables = jax.eval_shape(
      functools.partial(
          model.transformer.init, method=blocks.run_library),
      jax.random.key(0), tokens, jnp.zeros_like(tokens),
      jnp.ones((1, 8, 8), bool), None)
  return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32),
      variables['params'])


def count_params(params: Params) -> int:
  """Returns the number of parameters in a tree."""
  return sum(leaf.size for leaf in _leaves(params))


def _leaves(params):
  """Returns the leaves; a quantised weight is one."""
  return jax.tree.leaves(
      params, is_leaf=lambda leaf: isinstance(leaf, quantize.Quantized))


# The training forward --------------------------------------------------------


def segment_mask(
    segment_ids_BT: shapes.SegmentsBT) -> jax.Array:
  """Returns the attention mask (B, T, S) of packed rows.

  A token sees itself and what came before it in its own segment; segment 0 is
  padding, which nothing sees. The local layers' window is added by the library
  from the positions.
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
    watch: dict[str, jax.Array] | None = None,
) -> shapes.HiddenBTD:
  """Runs the model up to its final norm.

  The compute dtype is that of `params`; see `float16` for what that one means.
  The logits are left to `loss`, which makes only those of trained tokens.

  Args:
    model: From `make_model`.
    params: The base weights, per layer or stacked, or an `Adapted`.
    tokens_BT: Token ids; 0 pads.
    positions_BT: Position in its segment of each token.
    segment_ids_BT: 1, 2, ... for the examples of a row, 0 for padding.
    adapters: A tree from `lora.init_adapters`, or None for the base alone.
    lora_scale: From `lora.scale`.
    dropout: Rate and keys of the adapters' dropout, or None.
    execution: How to run it; not what.
    watch: Takes the largest magnitudes inside, see `blocks.run_scan`.
  """
  if isinstance(params, Adapted):
    params, adapters, lora_scale = params.base, params.adapters, params.scale
  settings = dict(adapters=adapters, lora_scale=lora_scale, dropout=dropout,
                  execution=execution, watch=watch)
  if model.generation == 4:
    return blocks.run_loop(
        model.transformer, params, tokens_BT, positions_BT,
        segment_mask(segment_ids_BT), None, **settings)[0]
  if execution.layers == 'scan':
    return blocks.run_scan(
        model.transformer, params, tokens_BT, positions_BT, segment_ids_BT,
        **settings)
  return blocks.run_loop(
      model.transformer, params, tokens_BT, positions_BT,
      segment_mask(segment_ids_BT), None, segment_ids_BT=segment_ids_BT,
      **settings)[0]


@flax.struct.dataclass
class Adapted:
  """Weights to generate with where the adapters cannot be merged.

  Those of a quantised base: merged, they would take the memory that was saved.

  Attributes:
    base: The quantised base.
    adapters: From `lora.init_adapters`.
    scale: From `lora.scale`.
  """

  base: Params
  adapters: Params
  scale: float = flax.struct.field(pytree_node=False)


def merge(
    model: Model, params: Params, adapters: Params, lora_scale: float
) -> Params:
  """Returns weights to generate with: merged, or an `Adapted` if quantised."""
  if any(isinstance(leaf, quantize.Quantized) for leaf in _leaves(params)):
    return Adapted(params, adapters, lora_scale)
  return lora.merge(
      params, adapters, lora_scale, transposed_gating=model.transposed_gating)


def per_layer(params: Params) -> Params:
  """Returns weights to generate with, their layers no longer stacked."""
  if isinstance(params, Adapted):
    return params.replace(base=blocks.unstack(params.base),
                          adapters=blocks.unstack(params.adapters))
  return blocks.unstack(params)


def dense(params: Params) -> Params:
  """Returns a tree with its quantised weights as f32 arrays."""
  return jax.tree.map(
      lambda leaf: quantize.dense(leaf, jnp.float32)
      if isinstance(leaf, quantize.Quantized) else leaf, params,
      is_leaf=lambda leaf: isinstance(leaf, quantize.Quantized))


def embedding(params: Params) -> shapes.EmbeddingVD:
  """Returns the tied embedding, which is also the output head."""
  params = params.base if isinstance(params, Adapted) else params
  return params['embedder']['input_embedding']


# Decoding with a cache -------------------------------------------------------


def init_cache(
    model: Model, batch_size: int, length: int, dtype: Any) -> Params:
  """Returns an empty key-value cache of `length` positions a row."""
  return model.config.init_cache(
      batch_size=batch_size, dtype=dtype, cache_length=length)


def decode(
    model: Model,
    params: Params,
    tokens_BT: shapes.TokensBT,
    positions_BT: shapes.PositionsBT,
    mask_BTS: jax.Array,
    cache: Params,
) -> tuple[jax.Array, Params]:
  """Runs T more tokens against the cache.

  Args:
    model: From `make_model`.
    params: Weights with the adapters merged in, or an `Adapted`.
    tokens_BT: The new tokens; every row's go to the same cache slots.
    positions_BT: Their positions (which need not be the slots: rows may be
      padded on the left).
    mask_BTS: Which of the S cache slots each new token may see.
    cache: From `init_cache` or the last call.

  Returns:
    (logits_BV of the last new token in f32, the new cache).
  """
  adapted = {}
  if isinstance(params, Adapted):
    adapted = dict(adapters=params.adapters, lora_scale=params.scale)
  x_BTD, cache = blocks.run_loop(
      model.transformer, params.base if adapted else params, tokens_BT,
      positions_BT, mask_BTS, cache, **adapted)
  return logits(model, params, x_BTD[:, -1]), cache


def logits(model: Model, params: Params, x: jax.Array) -> jax.Array:
  """Returns f32 logits (..., V) of hidden states (..., D)."""
  out = jnp.einsum(
      '...D,VD->...V', float16.operand(x, embedding(params)), embedding(params),
      preferred_element_type=jnp.float32)
  cap = model.config.final_logit_softcap
  return out if cap is None else jnp.tanh(out / cap) * cap
