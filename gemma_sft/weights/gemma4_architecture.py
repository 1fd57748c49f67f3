"""What is different in the model files of Gemma 4, see `architecture`.

Only dense text models are supported: gemma4_text of Hugging Face, gemma4 of
llama.cpp. A model that a format cannot express is refused; nothing is left out
silently.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_sft import model
from gemma_sft.weights import expressible

_LOCAL, _GLOBAL = expressible.LOCAL, expressible.GLOBAL
_ACTIVATION = 'gelu_pytorch_tanh'  # The library's approximate GELU.
_EPSILON = 1e-6  # Fixed in the library's RMSNorm.
# llama.cpp divides the angle of a pair that is not rotated by this number: the
# quotient has no effect at any position.
_UNROTATED = 1e30
# Defaults of Gemma4TextConfig in transformers 5.23.
_HF_DEFAULTS = {
    'hidden_size': 2304,
    'intermediate_size': 9216,
    'num_hidden_layers': 30,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'head_dim': 256,
    'global_head_dim': 512,
    'hidden_activation': _ACTIVATION,
    'rms_norm_eps': 1e-6,
    'tie_word_embeddings': True,
    'attention_bias': False,
    'sliding_window': 512,
    'final_logit_softcapping': None,
    'hidden_size_per_layer_input': 256,
    'attention_k_eq_v': False,
    'num_kv_shared_layers': 0,
    'use_double_wide_mlp': False,
    'enable_moe_block': False,
    'rope_parameters': {
        _LOCAL: {'rope_type': 'default', 'rope_theta': 10_000.0},
        _GLOBAL: {
            'rope_type': 'proportional',
            'partial_rotary_factor': 0.25,
            'rope_theta': 1_000_000.0,
        },
    },
}


# Hugging Face ----------------------------------------------------------------


def check_hf(config: Any) -> None:
  """Raises a `UserError` for what transformers cannot express or run."""
  check_gguf(config)
  types = expressible.layer_types(config)
  if types[-1] != _GLOBAL:
    raise expressible.inexpressible(
        f'layers {expressible.short_types(types)}',
        'a global layer at the end (transformers always makes the last one'
        ' global)')
  if config.num_global_kv_heads not in (None, config.num_kv_heads) and (
      not config.k_eq_v_global):
    raise expressible.inexpressible(
        f'{config.num_global_kv_heads} key-value heads in global layers whose'
        ' values are not their keys',
        f'{config.num_kv_heads}, or values that are the keys')
  if not model.n_shared_layers(config):
    return
  if not config.per_layer_input_dim:
    raise expressible.inexpressible(
        'layers that share keys and values, and no per-layer inputs',
        'both or neither: transformers 5.23 ends in a TypeError on the one'
        ' without the other')
  override = config.override_kv_shared_ffw_hidden
  if override not in (None, config.hidden_dim, 2 * config.hidden_dim):
    raise expressible.inexpressible(
        f'an MLP width of {override} in layers that share keys and values',
        f'{config.hidden_dim} or twice that')


def hf_config_fields(config: Any) -> dict[str, Any]:
  """Returns the keys of `config.json` that follow from the config."""
  return {
      **_hf_fields(config),
      'global_head_dim': _head_dims(config)[-1],
      'num_global_key_value_heads': config.num_global_kv_heads,
      'rope_parameters': _hf_rope(config),
      # In the library it is 'vision', for image tokens; a text has none.
      'use_bidirectional_attention': None,
  }


def check_hf_config(hf: Mapping[str, Any], config: Any, where: str) -> None:
  """Compares a `config.json` with the config, see `architecture`."""
  check_hf(config)
  prefix, text = '', hf

  def compare(key, got, want):
    expressible.check_same(where, f'{prefix}{key}', got, want)

  if hf.get('model_type') == 'gemma4':
    compare('tie_word_embeddings', hf.get('tie_word_embeddings', True), True)
    prefix, text = 'text_config.', hf.get('text_config') or {}
  else:
    compare('model_type', hf.get('model_type'), 'gemma4_text')
  compare('quantization_config', hf.get('quantization_config'), None)
  values = _HF_DEFAULTS | dict(text)
  fields = _hf_fields(config)
  # The number of layers comes first: values of each layer depend on it.
  compare('num_hidden_layers', values['num_hidden_layers'],
          fields['num_hidden_layers'])
  if text.get('layer_types') is None:
    values['layer_types'] = expressible.periodic_types(
        values['num_hidden_layers'], 6)
  if values['rope_parameters'] is None:
    values['rope_parameters'] = _HF_DEFAULTS['rope_parameters']
  for key, want in fields.items():
    compare(key, values[key] or None, want or None)
  if values.get('use_bidirectional_attention') == 'all':
    compare('use_bidirectional_attention', 'all', None)
  head_dims, kv_heads = _hf_heads(values)
  compare('head_dim of each layer', head_dims, _head_dims(config))
  compare('num_key_value_heads of each layer', kv_heads, _kv_heads(config))
  for kind, want in _hf_rope(config).items():
    got = values['rope_parameters'].get(kind) or {}
    for key in ('rope_type', 'rope_theta', 'partial_rotary_factor', 'factor'):
      fallback = {'partial_rotary_factor': 1.0, 'factor': 1.0}.get(key)
      compare(f'rope_parameters.{kind}.{key}', got.get(key, fallback),
              want.get(key, fallback))


def _hf_fields(config: Any) -> dict[str, Any]:
  """Returns the keys that follow from the config, except heads and rope."""
  return {
      'hidden_size': config.embed_dim,
      'intermediate_size': config.hidden_dim,
      'num_hidden_layers': config.num_layers,
      'num_attention_heads': config.num_heads,
      'num_key_value_heads': config.num_kv_heads,
      'head_dim': config.head_dim,
      'hidden_activation': _ACTIVATION,
      'rms_norm_eps': _EPSILON,
      'tie_word_embeddings': True,
      'attention_bias': False,
      'sliding_window': config.sliding_window_size,
      'layer_types': expressible.layer_types(config),
      'final_logit_softcapping': config.final_logit_softcap,
      'hidden_size_per_layer_input': config.per_layer_input_dim,
      'attention_k_eq_v': config.k_eq_v_global,
      'num_kv_shared_layers': model.n_shared_layers(config),
      'use_double_wide_mlp': _hidden_dims(config)[-1] != config.hidden_dim,
      'enable_moe_block': False,
  }


def _hf_rope(config: Any) -> dict[str, dict[str, Any]]:
  return {
      _LOCAL: {
          'rope_type': 'default',
          'rope_theta': float(config.local_base_frequency),
      },
      _GLOBAL: {
          'rope_type': 'proportional',
          'partial_rotary_factor': config.global_rope_proportion,
          'rope_theta': float(config.global_base_frequency),
      },
  }


def _hf_heads(values: Mapping[str, Any]) -> tuple[list[int], list[int]]:
  """Returns the head widths and the numbers of key-value heads of all layers.

  Google's files have one key for all global layers. Files that transformers 5
  has saved have `per_layer_config` too, and transformers then reads only that.
  """
  kv_heads = None
  if values['attention_k_eq_v']:
    kv_heads = values.get('num_global_key_value_heads')
  by_layer = values.get('per_layer_config')
  if by_layer is None:
    overrides = {'head_dim': values['global_head_dim']}
    if kv_heads is not None:
      overrides['num_key_value_heads'] = kv_heads
    by_layer = {str(i): overrides
                for i, kind in enumerate(values['layer_types'])
                if kind == _GLOBAL}
  layers = [by_layer.get(str(i), {})
            for i in range(values['num_hidden_layers'])]
  return tuple(
      [layer.get(key, values[key]) for layer in layers]
      for key in ('head_dim', 'num_key_value_heads'))


# GGUF ------------------------------------------------------------------------


def check_gguf(config: Any) -> None:
  """Raises a `UserError` for what llama.cpp cannot express."""
  for condition, got, want in (
      (config.enable_moe, 'experts', 'a dense model'),
      (not config.qk_norm_with_scale, 'norms of queries without a scale',
       'scales'),
      (not (config.use_post_attn_norm and config.use_post_ffw_norm),
       'no norm after attention or the MLP', 'both norms'),
      (config.attn_logits_soft_cap is not None, 'a softcap in attention',
       'none'),
      (not config.sliding_window_size, 'no sliding window', 'one'),
      (config.local_rope_proportion != 1,
       f'local layers that rotate {config.local_rope_proportion} of the head',
       'the whole head'),
      ((config.local_scale_factor, config.global_scale_factor) != (1, 1),
       'scaled rope', 'rope without a scale'),
  ):
    if condition:
      raise expressible.inexpressible(got, want)
  n_shared = model.n_shared_layers(config)
  sharing = config.kv_cache_sharing_config
  types = expressible.layer_types(config)
  # The layers that share use the keys and values of the layers before: in the
  # library of the last two, in transformers of the last of each kind.
  if n_shared and not (
      sharing.share_global and sharing.share_local
      and types[:-n_shared][-2:] == [_LOCAL, _GLOBAL]):
    raise expressible.inexpressible(
        f'layers {expressible.short_types(types)} of which the last {n_shared}'
        ' share keys and values',
        'a local and a global layer before those, shared with all of them')


def gguf_fields(config: Any) -> dict[str, Any]:
  """Returns the metadata that follow from the config, without their prefix.

  Raises:
    UserError: llama.cpp cannot express the model.
  """
  check_gguf(config)
  global_dim = config.global_key_size or config.head_dim
  return {
      'embedding_length': config.embed_dim,
      'block_count': config.num_layers,
      'feed_forward_length': _uniform(_hidden_dims(config)),
      'attention.head_count': config.num_heads,
      'attention.head_count_kv': _uniform(_kv_heads(config)),
      'attention.key_length': global_dim,
      'attention.value_length': global_dim,
      'attention.key_length_swa': config.head_dim,
      'attention.value_length_swa': config.head_dim,
      'attention.layer_norm_rms_epsilon': _EPSILON,
      'attention.sliding_window': config.sliding_window_size,
      'attention.sliding_window_pattern': [
          kind == _LOCAL for kind in expressible.layer_types(config)
      ],
      'attention.shared_kv_layers': model.n_shared_layers(config),
      'embedding_length_per_layer_input': config.per_layer_input_dim,
      # The whole head, even where `rope_freqs` stops part of the rotation.
      'rope.dimension_count': global_dim,
      'rope.dimension_count_swa': config.head_dim,
      'rope.freq_base': float(config.global_base_frequency),
      'rope.freq_base_swa': float(config.local_base_frequency),
      # 0 means none; llama.cpp's default is 30.
      'final_logit_softcapping': float(config.final_logit_softcap or 0),
  }


def gguf_tensors(config: Any) -> dict[str, np.ndarray]:
  """Returns the f32 tensors of a GGUF that the library has no array for.

  `rope_freqs` (H / 2 of the global layers) divides the angle of each pair of a
  head. Gemma 4 rotates only the first quarter of the pairs of a global head,
  with the frequencies that they have if all are rotated. llama.cpp has no key
  for this.
  """
  if _GLOBAL not in expressible.layer_types(config):
    return {}  # llama.cpp refuses tensors that it does not need.
  head_dim = config.global_key_size or config.head_dim
  freqs = np.full(head_dim // 2, _UNROTATED, np.float32)
  # Rounded as in `gemma.gm.math._positional_embeddings.apply_rope`.
  freqs[:int(config.global_rope_proportion * head_dim // 2)] = 1
  return {'rope_freqs.weight': freqs}


# Both ------------------------------------------------------------------------


def _hidden_dims(config: Any) -> list[int]:
  """Returns the width of the MLP in each layer."""
  n_shared = model.n_shared_layers(config)
  shared = config.override_kv_shared_ffw_hidden or config.hidden_dim
  return (config.num_layers - n_shared) * [config.hidden_dim] + (
      n_shared * [shared])


def _head_dims(config: Any) -> list[int]:
  return _by_kind(config, config.global_key_size, config.head_dim)


def _kv_heads(config: Any) -> list[int]:
  return _by_kind(config, config.num_global_kv_heads, config.num_kv_heads)


def _by_kind(config: Any, of_global: int | None, of_local: int) -> list[int]:
  return [(of_global or of_local) if kind == _GLOBAL else of_local
          for kind in expressible.layer_types(config)]


def _uniform(values: Sequence[int]) -> int | list[int]:
  """Returns one number if all layers have the same."""
  return values[0] if len(set(values)) == 1 else list(values)
