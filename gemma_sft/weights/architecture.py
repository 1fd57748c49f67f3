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

_ACTIVATION = 'gelu_pytorch_tanh'  # The library's approximate GELU.
_EPSILON = 1e-6  # Fixed in the library's RMSNorm.
# llama.cpp's default for Gemma 3.
_GEMMA3_PERIOD = 6


@dataclasses.dataclass(frozen=True)
class _Kind:
  """A generation in `transformers`.

  Attributes:
    model_type: As in `config.json`.
    class_name: The model's class.
    defaults: Its defaults for keys that `config.json` lacks.
  """

  model_type: str
  class_name: str
  defaults: Mapping[str, Any]


_COMMON_DEFAULTS = {
    'head_dim': 256,
    'rms_norm_eps': 1e-6,
    'tie_word_embeddings': True,
    'attention_bias': False,
    'use_bidirectional_attention': False,
    'hidden_activation': _ACTIVATION,
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
# transformers, configuration_gemma{,2,3}.py, the same in 4.57 and 5.23.
_KINDS = {
    1: _Kind('gemma', 'GemmaForCausalLM', _COMMON_DEFAULTS | {
        'hidden_size': 3072,
        'intermediate_size': 24576,
        'num_hidden_layers': 28,
        'num_attention_heads': 16,
        'num_key_value_heads': 16,
    }),
    2: _Kind('gemma2', 'Gemma2ForCausalLM', _GEMMA2_DEFAULTS),
    3: _Kind('gemma3_text', 'Gemma3ForCausalLM', _GEMMA2_DEFAULTS | {
        'sliding_window_pattern': 6,
        'final_logit_softcapping': None,
        'attn_logit_softcapping': None,
        'rope_theta': 1_000_000.0,
        'rope_local_base_freq': 10_000.0,
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

  Args:
    config: The library's `TransformerConfig`.
    generation: 1 to 4.
    vocab_size: Rows of the embedding in the file.
    dtype: Of the tensors in the file, such as 'bfloat16'.
    eos_ids: Ids that end an answer.
    bos_id: Id of BOS.
    pad_id: Id of the padding token.

  Raises:
    UserError: transformers cannot express the model.
  """
  positions = {'max_position_embeddings': context_length(config, generation)}
  if generation == 4:
    gemma4_architecture.check_hf(config)
    class_name, model_type = 'Gemma4ForCausalLM', 'gemma4_text'
    fields = {
        'vocab_size_per_layer_input': vocab_size,
        **positions,
        **gemma4_architecture.hf_config_fields(config),
    }
  else:
    expressible.check_hf(config, generation)
    kind = _KINDS[generation]
    class_name, model_type = kind.class_name, kind.model_type
    fields = {
        **positions,
        **_hf_fields(config, generation),
        **_hf_rope(config, generation),
    }
  values = {
      'architectures': [class_name],
      'model_type': model_type,
      'vocab_size': vocab_size,
      **fields,
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
  """Returns `generation_config.json`.

  Args:
    temperature: Of sampling; 0 for greedy decoding.
    repetition_penalty: 1 for none.
    eos_ids: Ids that end an answer. Without the end of turn among them the
      model goes on with a turn of the user.
    bos_id: Id of BOS.
    pad_id: Id of the padding token.
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
  if generation == 4:
    gemma4_architecture.check_hf_config(hf, config, where)
    return
  expressible.check_hf(config, generation)
  kind, prefix, text = _KINDS[generation], '', hf

  def compare(key, got, want):
    expressible.check_same(where, f'{prefix}{key}', got, want)

  if hf.get('model_type') == 'gemma3' and generation == 3:
    prefix, text = 'text_config.', hf.get('text_config') or {}
    if hf.get('tie_word_embeddings') is False:
      raise errors.UserError(
          f'{where}: tie_word_embeddings is False',
          'an output head that is the embedding', 'use other weights')
  else:
    compare('model_type', hf.get('model_type'), kind.model_type)
  if hf.get('quantization_config'):
    raise errors.UserError(
        f'{where}: quantization_config is set', 'weights in f32, bf16 or f16',
        'use the folder of the unquantised model')
  for key, want in _hf_fields(config, generation).items():
    got = text.get(key)
    if key == 'layer_types' and got is None:
      period = (text.get('sliding_window_pattern')
                or kind.defaults['sliding_window_pattern'])
      if not isinstance(period, int) or period < 1:
        raise expressible.contradiction(
            where, f'{prefix}sliding_window_pattern', period,
            'a number of layers')
      got = expressible.periodic_types(len(want), period)
    elif got is None and key not in text:
      got = kind.defaults.get(key)
    if key in ('hidden_act', 'hidden_activation') and generation == 1:
      # Files of Gemma 1 have one of these keys. Early files say 'gelu',
      # although the weights were trained with the approximation.
      got = _ACTIVATION if got in (None, 'gelu') else got
    compare(key, got, want)
  compare('use_bidirectional_attention',
          bool(text.get('use_bidirectional_attention')), False)
  _check_hf_rope(text, config, kind.defaults, compare)


def _hf_fields(config: Any, generation: int) -> dict[str, Any]:
  """Returns the keys that follow from the config, except those of rope."""
  fields = {
      'hidden_size': config.embed_dim,
      'intermediate_size': config.hidden_dim,
      'num_hidden_layers': len(config.attention_types),
      'num_attention_heads': config.num_heads,
      'num_key_value_heads': config.num_kv_heads,
      'head_dim': config.head_dim,
      'rms_norm_eps': _EPSILON,
      'hidden_activation': _ACTIVATION,
      'attention_bias': False,
      'tie_word_embeddings': True,
  }
  if generation == 1:
    fields['hidden_act'] = _ACTIVATION  # The key that transformers 5 reads.
    return fields
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
    defaults: The defaults of transformers.
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

  Args:
    config: The library's `TransformerConfig`.
    generation: 1 to 4.
    name: `general.name`, for people.
    context_length: The number of positions that the model supports.

  Raises:
    UserError: llama.cpp cannot express the model.
  """
  if generation == 4:
    architecture = 'gemma4'
    fields = gemma4_architecture.gguf_fields(config)
  else:
    fields = _gguf_fields(config, generation)
    architecture = {g: a for a, g in names.ARCHITECTURES.items()}[generation]
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
      'attention.layer_norm_rms_epsilon': _EPSILON,
      'rope.freq_base': float(config.global_base_frequency),
  }


def _gguf_fields(config: Any, generation: int) -> dict[str, Any]:
  expressible.check_gguf(config, generation)
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
    metadata: Mapping[str, Any], config: Any, where: str
) -> None:
  """Compares a GGUF's metadata with the config of a Gemma 1, 2 or 3.

  Shapes do not show the sliding window, the rope base or a softcap. A missing
  key has its default in llama.cpp.

  Args:
    metadata: The GGUF's metadata; arrays are not needed.
    config: The library's `TransformerConfig`.
    where: The file, for the message.

  Raises:
    UserError: Names the first key that contradicts the config.
  """
  architecture = metadata['general.architecture']
  generation = names.ARCHITECTURES[architecture]
  if config.use_qk_norm != (generation == 3) or (
      config.use_post_attn_norm != (generation > 1)
  ):
    raise errors.UserError(
        f'{where}: general.architecture is {architecture}',
        'the generation of the configured model',
        'choose the model that these weights belong to, or other weights',
    )
  want = _gguf_dimensions(config) | {
      'rope.scaling.factor': config.global_scale_factor,
      'attn_logit_softcapping': config.attn_logits_soft_cap,
      'final_logit_softcapping': config.final_logit_softcap,
      'attention.sliding_window': config.sliding_window_size,
  }
  defaults = {'rope.freq_base': 1e4, 'rope.scaling.factor': 1.0}
  if generation == 2:
    defaults |= {
        'attn_logit_softcapping': 50.0,
        'final_logit_softcapping': 30.0,
        'attention.sliding_window': 4096,
    }
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
