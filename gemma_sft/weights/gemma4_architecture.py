"""What is different in the model files of Gemma 4, see `architecture`.

Only dense text models are supported: gemma4_text of Hugging Face, gemma4 of
llama.cpp.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_sft import model
from gemma_sft.weights import expressible

_LOCAL, _GLOBAL = expressible.LOCAL, expressible.GLOBAL
# llama.cpp divides the angle of a pair that is not rotated by this number: the
# quotient has no effect at any position.
_UNROTATED = 1e30
_DEFAULT_ROPE = {  # Of Gemma4TextConfig in transformers 5.23.
    _LOCAL: {'rope_type': 'default', 'rope_theta': 10_000.0},
    _GLOBAL: {'rope_type': 'proportional', 'partial_rotary_factor': 0.25,
              'rope_theta': 1_000_000.0},
}


# Hugging Face ----------------------------------------------------------------


def hf_fields(config: Any) -> dict[str, Any]:
  """Returns the keys that follow from the config, except heads and rope."""
  return {
      'hidden_size': config.embed_dim,
      'intermediate_size': config.hidden_dim,
      'num_hidden_layers': config.num_layers,
      'num_attention_heads': config.num_heads,
      'num_key_value_heads': config.num_kv_heads,
      'head_dim': config.head_dim,
      'hidden_activation': expressible.ACTIVATION,
      'rms_norm_eps': expressible.EPSILON,
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


def hf_heads_and_rope(config: Any) -> dict[str, Any]:
  """Returns the keys of heads and rope, which `hf_fields` leaves out."""
  return {
      'global_head_dim': _head_dims(config)[-1],
      'num_global_key_value_heads': config.num_global_kv_heads,
      'rope_parameters': {
          _LOCAL: {
              'rope_type': 'default',
              'rope_theta': float(config.local_base_frequency),
          },
          _GLOBAL: {
              'rope_type': 'proportional',
              'partial_rotary_factor': config.global_rope_proportion,
              'rope_theta': float(config.global_base_frequency),
          },
      },
      # In the library it is 'vision', for image tokens; a text has none.
      'use_bidirectional_attention': None,
  }


def check_hf_heads_and_rope(
    values: Mapping[str, Any],
    config: Any,
    compare: Callable[[str, Any, Any], None],
) -> None:
  """Compares heads and rope; `hf_fields` must have been compared before.

  Args:
    values: The file's keys and the defaults of transformers.
    config: The library's `TransformerConfig`.
    compare: Raises unless the file's value of a key is the config's.
  """
  head_dims, kv_heads = _hf_heads(values)
  compare('head_dim of each layer', head_dims, _head_dims(config))
  compare('num_key_value_heads of each layer', kv_heads, _kv_heads(config))
  rope = values.get('rope_parameters')
  rope = _DEFAULT_ROPE if rope is None else rope
  for kind, want in hf_heads_and_rope(config)['rope_parameters'].items():
    got = rope.get(kind) or {}
    for key in ('rope_type', 'rope_theta', 'partial_rotary_factor', 'factor'):
      fallback = {'partial_rotary_factor': 1.0, 'factor': 1.0}.get(key)
      compare(f'rope_parameters.{kind}.{key}', got.get(key, fallback),
              want.get(key, fallback))


def _hf_heads(values: Mapping[str, Any]) -> tuple[list[int], list[int]]:
  """Returns the head widths and the numbers of key-value heads of all layers.

  Google's files have one key for all global layers. Files that transformers 5
  has saved have `per_layer_config` too, and transformers then reads only that.
  """
  by_layer = values.get('per_layer_config')
  if by_layer is None:
    overrides = {'head_dim': values['global_head_dim']}
    kv_heads = values.get('num_global_key_value_heads')
    if values['attention_k_eq_v'] and kv_heads is not None:
      overrides['num_key_value_heads'] = kv_heads
    by_layer = {str(i): overrides
                for i, kind in enumerate(values['layer_types'])
                if kind == _GLOBAL}
  layers = [by_layer.get(str(i), {})
            for i in range(values['num_hidden_layers'])]
  return tuple([layer.get(key, values[key]) for layer in layers]
               for key in ('head_dim', 'num_key_value_heads'))


# GGUF ------------------------------------------------------------------------


def gguf_fields(config: Any) -> dict[str, Any]:
  """Returns the metadata that follow from the config, without their prefix."""
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
      'attention.layer_norm_rms_epsilon': expressible.EPSILON,
      'attention.sliding_window': config.sliding_window_size,
      'attention.sliding_window_pattern': [
          kind == _LOCAL for kind in expressible.layer_types(config)],
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
  return ((config.num_layers - n_shared) * [config.hidden_dim]
          + n_shared * [shared])


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
