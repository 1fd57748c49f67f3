"""What a Gemma 4 is beside its tensors, in the files' own words.

The dense text model only. The library's `TransformerConfig` of Gemma 4 against
Hugging Face's `config.json` (gemma4_text), the metadata of a GGUF (gemma4) and
the one tensor of a GGUF that is no weight. What a format cannot say is refused,
never left out.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_sft import errors
from gemma_sft import model
from gemma_sft.weights import expressible
from gemma_sft.weights import hf_rope

_ACTIVATION = 'gelu_pytorch_tanh'  # The library's approximate GELU.
_EPSILON = 1e-6  # The library's RMSNorm has no other.
_LOCAL, _GLOBAL = 'sliding_attention', 'full_attention'
# Divides the angle of a pair that is not rotated; 1 / 1e30 is 0 in every
# product with a position. llama.cpp knows no other spelling.
_UNROTATED = 1e30
# Gemma4TextConfig of transformers 5.23, for keys that a file leaves out.
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
# Token types of GGUF, which are those of SentencePiece.


def context_length(config: Any) -> int:
  """Returns the positions that a model of this kind was trained on.

  The library has no such number; these are those of Google's model cards:
  131072 for E2B and E4B, which are those with per-layer inputs, and 262144 for
  the others.
  """
  return 131_072 if config.per_layer_input_dim else 262_144


# Hugging Face ----------------------------------------------------------------


def hf_config(
    config: Any,
    *,
    vocab_size: int,
    dtype: str,
    eos_ids: Sequence[int],
    bos_id: int,
    pad_id: int,
) -> dict[str, Any]:
  """Returns `config.json` of a Gemma4ForCausalLM, for transformers 5.

  Args:
    config: The library's `gemma4._config.TransformerConfig`.
    vocab_size: Rows of both embeddings in the file.
    dtype: Of the tensors in the file, such as 'bfloat16'.
    eos_ids: Ids that end an answer.
    bos_id: Id that begins a text.
    pad_id: Id that fills up.

  Raises:
    UserError: see `check_hf_exportable`.
  """
  check_hf_exportable(config)
  return {
      'architectures': ['Gemma4ForCausalLM'],
      'model_type': 'gemma4_text',
      'vocab_size': vocab_size,
      'vocab_size_per_layer_input': vocab_size,
      'max_position_embeddings': context_length(config),
      **_hf_fields(config),
      'global_head_dim': _head_dims(config)[-1],
      'num_global_key_value_heads': config.num_global_kv_heads,
      'rope_parameters': _hf_rope(config),
      # The library's 'vision' is about image tokens, of which a text has none.
      'use_bidirectional_attention': None,
      'attention_dropout': 0.0,
      'bos_token_id': bos_id,
      'eos_token_id': list(eos_ids),
      'pad_token_id': pad_id,
      'dtype': dtype,
  }


def check_hf_config(hf: Mapping[str, Any], config: Any, where: str) -> None:
  """Compares a `config.json` with the library's config.

  The defaults of transformers stand in for keys that are left out. The
  vocabulary is not compared: files differ in rows that belong to no token.

  Args:
    hf: The parsed file; of a multimodal Gemma 4 the `text_config` is read.
    config: The library's `gemma4._config.TransformerConfig`.
    where: The file, for the message.

  Raises:
    UserError: Names the first key that contradicts the config.
  """
  check_hf_exportable(config)
  prefix, text = '', hf

  def compare(key: str, got: Any, want: Any) -> None:
    if not hf_rope.same(got, want):
      raise errors.UserError(
          f'{where}: {prefix}{key} is {got!r}',
          f'{want!r}, as in the configured model',
          'choose the model that these weights belong to, or other weights',
      )

  if hf.get('model_type') == 'gemma4':
    compare('tie_word_embeddings', hf.get('tie_word_embeddings', True), True)
    prefix, text = 'text_config.', hf.get('text_config') or {}
  else:
    compare('model_type', hf.get('model_type'), 'gemma4_text')
  compare('quantization_config', hf.get('quantization_config'), None)
  values = _HF_DEFAULTS | dict(text)
  compare('num_hidden_layers', values['num_hidden_layers'],
          _hf_fields(config)['num_hidden_layers'])
  if text.get('layer_types') is None:
    values['layer_types'] = expressible.periodic_types(
        values['num_hidden_layers'], 6)
  if values['rope_parameters'] is None:
    values['rope_parameters'] = _HF_DEFAULTS['rope_parameters']
  for key, want in _hf_fields(config).items():
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


def check_hf_exportable(config: Any) -> None:
  """Raises a `UserError` for what transformers cannot express or run."""
  _check(config)
  types = expressible.layer_types(config)
  if types[-1] != _GLOBAL:
    raise _inexpressible(
        f'layers {_short(types)}', 'a global layer at the end (transformers'
        ' makes the last one global whatever the file says)')
  if config.num_global_kv_heads not in (None, config.num_kv_heads) and (
      not config.k_eq_v_global):
    raise _inexpressible(
        f'{config.num_global_kv_heads} key-value heads in global layers with'
        ' values of their own',
        f'{config.num_kv_heads}, or values that are the keys')
  if model.n_shared_layers(config) and not config.per_layer_input_dim:
    raise _inexpressible(
        'layers that share keys and values, and no per-layer inputs',
        'both or neither: transformers 5.23 ends in a TypeError on the one'
        ' without the other')
  override = config.override_kv_shared_ffw_hidden
  if model.n_shared_layers(config) and override not in (
      None, config.hidden_dim, 2 * config.hidden_dim):
    raise _inexpressible(
        f'an MLP width of {override} in layers that share keys and values',
        f'{config.hidden_dim} or twice that')


def _hf_fields(config: Any) -> dict[str, Any]:
  """Returns the keys that follow from the config, but for heads and rope."""
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
  """Returns the head widths and the key-value heads of a file's layers.

  Google's files name those of the global layers once; transformers 5 saves
  them again layer by layer, and then reads nothing else.
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


def gguf_metadata(
    config: Any, *, name: str, context_length: int
) -> tuple[str, dict[str, Any]]:
  """Returns the architecture and the metadata of a model's GGUF.

  Whole numbers are uint32 in the file, the others float32; a list is an array,
  of bool or of int32. Missing are `general.architecture`, which is the first
  value returned, and what belongs to the tensors' types and the tokenizer.

  Args:
    config: The library's `gemma4._config.TransformerConfig`.
    name: For people, `general.name`.
    context_length: Positions that the model is good for.

  Raises:
    UserError: see `check_gguf_exportable`.
  """
  check_gguf_exportable(config)
  global_dim = config.global_key_size or config.head_dim
  values = {
      'context_length': context_length,
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
      # The whole head in both: `rope_freqs` stops the rest of the global ones.
      'rope.dimension_count': global_dim,
      'rope.dimension_count_swa': config.head_dim,
      'rope.freq_base': float(config.global_base_frequency),
      'rope.freq_base_swa': float(config.local_base_frequency),
      # 0 is none; left out it would be llama.cpp's 30.
      'final_logit_softcapping': float(config.final_logit_softcap or 0),
  }
  return 'gemma4', {
      'general.type': 'model',
      'general.name': name,
      **{f'gemma4.{key}': value for key, value in values.items()},
  }


def extra_gguf_tensors(config: Any) -> dict[str, np.ndarray]:
  """Returns the f32 tensors of a GGUF that the library has no array for.

  `rope_freqs` (H / 2 of the global layers) divides the angle of each rotated
  pair. Gemma 4 turns the first quarter of the pairs of a global head and
  spaces their frequencies as if it turned them all, for which llama.cpp has no
  key.
  """
  if _GLOBAL not in expressible.layer_types(config):
    return {}  # llama.cpp refuses a tensor that it does not look for.
  head_dim = config.global_key_size or config.head_dim
  freqs = np.full(head_dim // 2, _UNROTATED, np.float32)
  # Rounded as in `gemma.gm.math._positional_embeddings.apply_rope`.
  freqs[:int(config.global_rope_proportion * head_dim // 2)] = 1
  return {'rope_freqs.weight': freqs}


def check_gguf_exportable(config: Any) -> None:
  """Raises a `UserError` for what llama.cpp cannot express."""
  _check(config)


# Both ------------------------------------------------------------------------


def _check(config: Any) -> None:
  """Raises a `UserError` for what neither format can express."""
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
      raise _inexpressible(got, want)
  n_shared = model.n_shared_layers(config)
  sharing = config.kv_cache_sharing_config
  types = expressible.layer_types(config)
  # The library takes the last but one and the last of the others whatever
  # their kind, transformers the last of each kind.
  if n_shared and not (
      sharing.share_global and sharing.share_local
      and types[:-n_shared][-2:] == [_LOCAL, _GLOBAL]):
    raise _inexpressible(
        f'layers {_short(types)} of which the last {n_shared} share keys and'
        ' values',
        'a local and a global layer before those, shared with all of them')


def _hidden_dims(config: Any) -> list[int]:
  """Returns the MLP's width in each layer."""
  n_shared = model.n_shared_layers(config)
  shared = config.override_kv_shared_ffw_hidden or config.hidden_dim
  return (config.num_layers - n_shared) * [config.hidden_dim] + (
      n_shared * [shared])


def _head_dims(config: Any) -> list[int]:
  wide = config.global_key_size or config.head_dim
  return [wide if kind == _GLOBAL else config.head_dim
          for kind in expressible.layer_types(config)]


def _kv_heads(config: Any) -> list[int]:
  heads = config.num_global_kv_heads or config.num_kv_heads
  return [heads if kind == _GLOBAL else config.num_kv_heads
          for kind in expressible.layer_types(config)]


def _short(types: Sequence[str]) -> str:
  return ''.join('L' if kind == _LOCAL else 'G' for kind in types)


def _uniform(values: Sequence[int]) -> int | list[int]:
  """Returns one number for all layers where one will do."""
  return values[0] if len(set(values)) == 1 else list(values)


def _inexpressible(got: str, expected: str) -> errors.UserError:
  return errors.UserError(
      f'the model has {got}', expected,
      'use the dimensions of a preset, or another format')
