"""Converts the library's `TransformerConfig` to the metadata of model files.

These are Hugging Face's `config.json` and the metadata of a GGUF. The metadata
of existing files can be compared with a config. `gemma4_architecture` has what
is different in Gemma 4.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from gemma_sft import errors
from gemma_sft.weights import expressible
from gemma_sft.weights import gemma4_architecture
from gemma_sft.weights import names

_GEMMA3_PERIOD = 6  # llama.cpp's default for Gemma 3.


@dataclasses.dataclass(frozen=True)
class _Kind:
  """A generation in `transformers`: its names and defaults of `config.json`."""

  model_type: str
  class_name: str
  defaults: Mapping[str, Any]


_COMMON_DEFAULTS = {
    'head_dim': 256,
    'rms_norm_eps': 1e-6,
    'tie_word_embeddings': True,
    'attention_bias': False,
    'use_bidirectional_attention': False,
    'hidden_activation': expressible.ACTIVATION,
    'rope_theta': 10_000.0,
}
_GEMMA2_DEFAULTS = _COMMON_DEFAULTS | {
    'hidden_size': 2304,
    'intermediate_size': 9216,
    'num_hidden_layers': 26,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'query_pre_attn_scalar': 256,
    'sliding_window': 4096,
    'sliding_window_pattern': 2,
    'final_logit_softcapping': 30.0,
    'attn_logit_softcapping': 50.0,
}
_GEMMA3_DEFAULTS = _GEMMA2_DEFAULTS | {
    'sliding_window_pattern': 6,
    'final_logit_softcapping': None,
    'attn_logit_softcapping': None,
    'rope_theta': 1_000_000.0,
    'rope_local_base_freq': 10_000.0,
}
# transformers, configuration_gemma{,2,3,4}.py, the same in 4.57 and 5.23 where
# both have the generation.
_KINDS = {
    1: _Kind('gemma', 'GemmaForCausalLM', _COMMON_DEFAULTS | {
        'hidden_size': 3072,
        'intermediate_size': 24576,
        'num_hidden_layers': 28,
        'num_attention_heads': 16,
        'num_key_value_heads': 16,
    }),
    2: _Kind('gemma2', 'Gemma2ForCausalLM', _GEMMA2_DEFAULTS),
    3: _Kind('gemma3_text', 'Gemma3ForCausalLM', _GEMMA3_DEFAULTS),
    4: _Kind('gemma4_text', 'Gemma4ForCausalLM', _GEMMA3_DEFAULTS | {
        'num_hidden_layers': 30,
        'global_head_dim': 512,
        'sliding_window': 512,
        'hidden_size_per_layer_input': 256,
        'attention_k_eq_v': False,
        'num_kv_shared_layers': 0,
        'use_double_wide_mlp': False,
        'enable_moe_block': False,
    }),
}


def context_length(config: Any, generation: int) -> int:
  """Returns the number of positions that a model was trained on.

  The library does not have this number. By Google's model cards it is 8192 for
  Gemma 1 and 2 and 32768 for Gemma 3 270M and 1B. It is 131072 for the larger
  Gemma 3, which have scaled rope, and for Gemma 4 E2B and E4B, which have
  per-layer inputs, and 262144 for the other Gemma 4.
  """
  if generation == 4:
    return 131_072 if config.per_layer_input_dim else 262_144
  expressible.check_generation(config, generation)
  if generation < 3:
    return 8192
  return 32768 if config.global_scale_factor == 1 else 131072


# Hugging Face ----------------------------------------------------------------


def hf_config(
    config: Any,
    generation: int,
    *,
    vocab_size: int,
    dtype: str,
    eos_ids: Sequence[int],
    bos_id: int,
    pad_id: int,
) -> dict[str, Any]:
  """Returns `config.json` for transformers 5, and 4 if it knows the model.

  The two versions have different keys for rope and dtype; both are written.
  `vocab_size` is the number of rows of the embedding in the file.

  Raises:
    UserError: transformers cannot express the model.
  """
  expressible.check_hf(config, generation)
  kind = _KINDS[generation]
  values = {
      'architectures': [kind.class_name],
      'model_type': kind.model_type,
      'vocab_size': vocab_size,
  }
  if generation == 4:
    values['vocab_size_per_layer_input'] = vocab_size
    rest = gemma4_architecture.hf_heads_and_rope(config)
  else:
    rest = _hf_rope(config, generation)
  values |= {
      'max_position_embeddings': context_length(config, generation),
      **_hf_fields(config, generation),
      **rest,
      'attention_dropout': 0.0,
      'bos_token_id': bos_id,
      'eos_token_id': list(eos_ids),
      'pad_token_id': pad_id,
      'dtype': dtype,
  }
  if generation < 4:
    values['torch_dtype'] = dtype
  return values


def generation_config(
    *,
    temperature: float,
    repetition_penalty: float,
    eos_ids: Sequence[int],
    bos_id: int,
    pad_id: int,
) -> dict[str, Any]:
  """Returns `generation_config.json`; a temperature of 0 decodes greedily.

  Without the end of turn in `eos_ids` the model would continue with a turn of
  the user.
  """
  values = {
      'bos_token_id': bos_id,
      'eos_token_id': list(eos_ids),
      'pad_token_id': pad_id,
      'do_sample': temperature > 0,
      'repetition_penalty': repetition_penalty,
  }
  if temperature > 0:  # transformers saves no temperature without sampling.
    values['temperature'] = temperature
  return values


def check_hf_config(
    hf: Mapping[str, Any], config: Any, generation: int, where: str
) -> None:
  """Compares a `config.json` with the library's config.

  Shapes do not show the sliding window, the rope base or a softcap. A missing
  key has its default in transformers. The vocabulary is not compared, because
  files differ in rows that belong to no token.

  Args:
    hf: The parsed file; of a multimodal model the `text_config` is compared.
    config: The library's `TransformerConfig`.
    generation: 1 to 4.
    where: The file, for the message.

  Raises:
    UserError: Names the first key that contradicts the config.
  """
  expressible.check_objects(hf, where)
  expressible.check_hf(config, generation)
  kind, prefix, text = _KINDS[generation], '', hf

  def compare(key, got, want):
    expressible.check_same(where, f'{prefix}{key}', got, want)

  if generation > 2 and (
      hf.get('model_type') == kind.model_type.removesuffix('_text')):
    tied = hf.get('tie_word_embeddings', True)
    # Gemma 3's files may leave it null.
    if tied is False or generation == 4 and not tied:
      raise errors.UserError(
          f'{where}: tie_word_embeddings is {tied}',
          'an output head that is the embedding', 'use other weights')
    prefix, text = 'text_config.', hf.get('text_config') or {}
  else:
    compare('model_type', hf.get('model_type'), kind.model_type)
  if hf.get('quantization_config'):
    raise errors.UserError(
        f'{where}: quantization_config is set', 'weights in f32, bf16 or f16',
        'use the folder of the unquantised model')
  values = {**kind.defaults, **text}
  for key, want in _hf_fields(config, generation).items():
    got = values.get(key)
    if key == 'layer_types' and got is None:
      period = (text.get('sliding_window_pattern')
                or kind.defaults['sliding_window_pattern'])
      if not isinstance(period, int) or period < 1:
        raise expressible.contradiction(
            where, f'{prefix}sliding_window_pattern', period,
            'a number of layers')
      values[key] = got = expressible.periodic_types(len(want), period)
    if key in ('hidden_act', 'hidden_activation') and generation == 1:
      # Files of Gemma 1 have one of these keys. Early files say 'gelu',
      # although the weights were trained with the approximation.
      got = expressible.ACTIVATION if got in (None, 'gelu') else got
    if generation == 4:  # Null, 0 and false mean the same.
      got, want = got or None, want or None
    compare(key, got, want)
  bidirectional = values['use_bidirectional_attention']
  if generation == 4:
    # 'vision' is for image tokens, and a text has none.
    bidirectional = bidirectional == 'all' and bidirectional
  compare('use_bidirectional_attention', bidirectional or False, False)
  if generation == 4:
    gemma4_architecture.check_hf_heads_and_rope(values, config, compare)
  else:
    _check_hf_rope(text, config, kind.defaults, compare)


def _hf_fields(config: Any, generation: int) -> dict[str, Any]:
  """Returns the keys that follow from the config, except those of rope."""
  if generation == 4:
    return gemma4_architecture.hf_fields(config)
  fields = {
      'hidden_size': config.embed_dim,
      'intermediate_size': config.hidden_dim,
      'num_hidden_layers': len(config.attention_types),
      'num_attention_heads': config.num_heads,
      'num_key_value_heads': config.num_kv_heads,
      'head_dim': config.head_dim,
      'rms_norm_eps': expressible.EPSILON,
      'hidden_activation': expressible.ACTIVATION,
      'attention_bias': False,
      'tie_word_embeddings': True,
  }
  if generation == 1:  # The key that transformers 5 reads.
    return fields | {'hidden_act': expressible.ACTIVATION}
  return fields | {
      'query_pre_attn_scalar': round(config.query_pre_attn_scalar() ** -2),
      'sliding_window': config.sliding_window_size,
      'layer_types': expressible.layer_types(config),
      'attn_logit_softcapping': config.attn_logits_soft_cap,
      'final_logit_softcapping': config.final_logit_softcap,
  }


def _hf_rope(config: Any, generation: int) -> dict[str, Any]:
  """Returns the keys of rope for transformers 4 and 5.

  Version 4 reads rope_theta, rope_scaling and rope_local_base_freq and silently
  ignores rope_parameters; version 5 prefers rope_parameters and falls back on
  the older keys.
  """
  factor = config.global_scale_factor
  scaling = {'rope_type': 'linear', 'factor': float(factor)}
  if factor == 1:
    scaling = {'rope_type': 'default'}
  theta = float(config.global_base_frequency)
  rope = {
      'rope_theta': theta,
      'rope_scaling': None if factor == 1 else dict(scaling),
      'rope_parameters': {**scaling, 'rope_theta': theta},
  }
  if generation == 3:
    local = float(config.local_base_frequency)
    rope['rope_local_base_freq'] = local
    rope['rope_parameters'] = {
        expressible.GLOBAL: rope['rope_parameters'],
        expressible.LOCAL: {'rope_type': 'default', 'rope_theta': local},
    }
  return rope


def _check_hf_rope(
    text: Mapping[str, Any],
    config: Any,
    defaults: Mapping[str, Any],
    compare: Callable[[str, Any, Any], None],
) -> None:
  """Compares the keys of both versions, because the reader chooses.

  Args:
    text: The parsed file, or its `text_config`.
    config: The library's `TransformerConfig`.
    defaults: Those of transformers.
    compare: Raises unless the file's value of a key is the config's.
  """
  bases = {'rope_theta': config.global_base_frequency}
  parts = {expressible.GLOBAL: 'rope_theta'}
  if 'rope_local_base_freq' in defaults:
    bases['rope_local_base_freq'] = config.local_base_frequency
    parts[expressible.LOCAL] = 'rope_local_base_freq'
  parameters = text.get('rope_parameters')
  older = {}
  for key, want in bases.items():
    older[key] = text.get(key)
    if older[key] is None:
      older[key] = defaults[key]
    # With rope_parameters a missing key does not stand for its default.
    if key in text or not parameters:
      compare(key, older[key], want)
  factor = config.global_scale_factor
  if 'rope_scaling' in text or not parameters:
    _check_hf_scaling(
        'rope_scaling', text.get('rope_scaling'), factor, compare)
  if not parameters:
    return
  nested = bool(set(parameters) & {expressible.GLOBAL, expressible.LOCAL})
  for part, key in parts.items():
    is_global = part == expressible.GLOBAL
    path = f'rope_parameters.{part}' if nested else 'rope_parameters'
    if nested:
      values = parameters.get(part) or {}
    else:  # Without parts they describe the global layers.
      values = parameters if is_global else {}
    compare(
        f'{path}.rope_theta', values.get('rope_theta', older[key]), bases[key])
    _check_hf_scaling(path, values, factor if is_global else 1, compare)


def _check_hf_scaling(path, values, want, compare) -> None:
  values = values or {}
  kind = values.get('rope_type', values.get('type', 'default'))
  if kind != 'default':
    compare(f'{path}.rope_type', kind, 'linear')
  compare(f'{path}.factor', values.get('factor', 1) if kind == 'linear' else 1,
          want)


# GGUF ------------------------------------------------------------------------


def gguf_metadata(
    config: Any, generation: int, *, name: str, context_length: int
) -> tuple[str, dict[str, Any]]:
  """Returns the architecture and the metadata of a model's GGUF.

  Integers are uint32 in the file, other numbers float32; a list is an array of
  bool or int32. The caller adds `general.architecture`, which is the first
  value returned, and the keys of tensor types and tokenizer.

  Raises:
    UserError: llama.cpp cannot express the model.
  """
  expressible.check_gguf(config, generation)
  if generation == 4:
    architecture, fields = 'gemma4', gemma4_architecture.gguf_fields(config)
  else:
    architecture = {g: a for a, g in names.ARCHITECTURES.items()}[generation]
    fields = _gguf_fields(config, generation)
  return architecture, {
      'general.type': 'model',
      'general.name': name,
      f'{architecture}.context_length': context_length,
      **{f'{architecture}.{key}': value for key, value in fields.items()},
  }


def _gguf_dimensions(config: Any) -> dict[str, Any]:
  return {
      'embedding_length': config.embed_dim,
      'block_count': len(config.attention_types),
      'feed_forward_length': config.hidden_dim,
      'attention.head_count': config.num_heads,
      'attention.head_count_kv': config.num_kv_heads,
      'attention.key_length': config.head_dim,
      'attention.value_length': config.head_dim,
      'attention.layer_norm_rms_epsilon': expressible.EPSILON,
      'rope.freq_base': float(config.global_base_frequency),
  }


def _gguf_fields(config: Any, generation: int) -> dict[str, Any]:
  values = _gguf_dimensions(config)
  if generation > 1:
    values['attention.sliding_window'] = config.sliding_window_size
  if generation == 2:
    values['attn_logit_softcapping'] = float(config.attn_logits_soft_cap)
    values['final_logit_softcapping'] = float(config.final_logit_softcap)
  if generation == 3:
    values['rope.freq_base_swa'] = float(config.local_base_frequency)
    # Not every reader knows this key, so llama.cpp's default is left out.
    if not expressible.has_period(config, _GEMMA3_PERIOD):
      period = expressible.global_period(config)
      values['attention.sliding_window_pattern'] = period
  if config.global_scale_factor != 1:
    values['rope.scaling.type'] = 'linear'
    values['rope.scaling.factor'] = float(config.global_scale_factor)
  return values


def check_gguf_metadata(
    metadata: Mapping[str, Any], config: Any, generation: int, where: str
) -> None:
  """Compares the metadata of a GGUF of Gemma 1, 2 or 3 with the config.

  Shapes do not show the sliding window, the rope base or a softcap. A missing
  key has its default in llama.cpp.

  Args:
    metadata: Arrays are not needed.
    config: The library's `TransformerConfig`.
    generation: Of the configured model, 1 to 4.
    where: The file, for the message.

  Raises:
    UserError: Names the first key that contradicts the config.
  """
  architecture = metadata['general.architecture']
  if names.ARCHITECTURES[architecture] != generation:
    raise errors.UserError(
        f'{where}: general.architecture is {architecture}',
        'the generation of the configured model',
        'choose the model that these weights belong to, or other weights')
  want = _gguf_dimensions(config) | {
      'rope.scaling.factor': config.global_scale_factor,
      'attn_logit_softcapping': config.attn_logits_soft_cap,
      'final_logit_softcapping': config.final_logit_softcap,
      'attention.sliding_window': config.sliding_window_size,
  }
  defaults = {'rope.freq_base': 1e4, 'rope.scaling.factor': 1.0}
  if generation == 2:
    defaults |= {'attn_logit_softcapping': 50.0,
                 'final_logit_softcapping': 30.0,
                 'attention.sliding_window': 4096}
  if generation == 3:
    want['rope.freq_base_swa'] = config.local_base_frequency
    defaults['rope.freq_base_swa'] = 1e4
  for key, value in want.items():
    key_of_file = f'{architecture}.{key}'
    expressible.check_same(
        where, key_of_file, metadata.get(key_of_file, defaults.get(key)), value)


def extra_gguf_tensors(config: Any, generation: int) -> dict[str, np.ndarray]:
  """Returns the tensors of a GGUF that are not weights of the model."""
  return gemma4_architecture.gguf_tensors(config) if generation == 4 else {}
