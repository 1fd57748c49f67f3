"""What a model is beside its tensors and tokenizer, in the files' own words.

The library's `TransformerConfig` as Hugging Face's `config.json` and as the
metadata of a GGUF, and a `config.json` against it.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from gemma_sft import errors
from gemma_sft.weights import expressible
from gemma_sft.weights import gemma4_architecture
from gemma_sft.weights import hf_rope
from gemma_sft.weights import names

_ACTIVATION = 'gelu_pytorch_tanh'  # The library's approximate GELU.
_EPSILON = 1e-6  # The library's RMSNorm has no other.
# Of llama.cpp, where a Gemma 3 file does not say.
_GEMMA3_PERIOD = 6


@dataclasses.dataclass(frozen=True)
class _Kind:
  """A generation in `transformers`.

  Attributes:
    model_type: Of `config.json`.
    class_name: Of the model.
    defaults: What it assumes for keys that `config.json` leaves out.
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
  """Returns the positions that a model of this kind was trained on.

  The library has no such number; these are those of Google's model cards:
  8192 for Gemma 1 and 2, 32768 for Gemma 3 270M and 1B, 131072 for the larger
  ones, which are those with scaled rope.
  """
  if generation == 4:
    return gemma4_architecture.context_length(config)
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
  """Returns `config.json` for transformers 4 and 5.

  Rope and dtype stand there in the spellings of both.

  Args:
    config: The `gm.nn.config.TransformerConfig`.
    generation: 1 to 4.
    vocab_size: Rows of the embedding in the file.
    dtype: Of the tensors in the file, such as 'bfloat16'.
    eos_ids: Ids that end an answer.
    bos_id: Id that begins a text.
    pad_id: Id that fills up.

  Raises:
    UserError: see `expressible.check_hf`.
  """
  if generation == 4:
    return gemma4_architecture.hf_config(
        config, vocab_size=vocab_size, dtype=dtype, eos_ids=eos_ids,
        bos_id=bos_id, pad_id=pad_id)
  expressible.check_hf(config, generation)
  kind = _KINDS[generation]
  return {
      'architectures': [kind.class_name],
      'model_type': kind.model_type,
      'vocab_size': vocab_size,
      'max_position_embeddings': context_length(config, generation),
      **_hf_fields(config, generation),
      **hf_rope.spell(config, generation),
      'attention_dropout': 0.0,
      'bos_token_id': bos_id,
      'eos_token_id': list(eos_ids),
      'pad_token_id': pad_id,
      'dtype': dtype,
      'torch_dtype': dtype,
  }


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
    temperature: Of sampling; 0 for the likeliest token each time.
    repetition_penalty: 1 for none.
    eos_ids: Ids that end an answer, the end of turn among them: without it the
      model talks on as the user.
    bos_id: Id that begins a text.
    pad_id: Id that fills up.
  """
  values = {
      'bos_token_id': bos_id,
      'eos_token_id': list(eos_ids),
      'pad_token_id': pad_id,
      'do_sample': temperature > 0,
      'repetition_penalty': repetition_penalty,
  }
  if temperature > 0:  # transformers refuses to save one without sampling.
    values['temperature'] = temperature
  return values


def check_hf_config(
    hf: Mapping[str, Any], config: Any, generation: int, where: str
) -> None:
  """Compares a `config.json` with the library's config.

  Shapes alone cannot tell a window, a rope base or a softcap. The defaults of
  transformers stand in for keys that are left out. The vocabulary is not
  compared: files differ in rows that belong to no token.

  Args:
    hf: The parsed file; of a multimodal Gemma 3 the `text_config` is read.
    config: The model's `gm.nn.config.TransformerConfig`.
    generation: 1 to 4.
    where: The file, for the message.

  Raises:
    UserError: Names the first key that contradicts the config.
  """
  hf_rope.check_objects(hf, where)
  if generation == 4:
    gemma4_architecture.check_hf_config(hf, config, where)
    return
  expressible.check_hf(config, generation)
  kind, prefix, text = _KINDS[generation], '', hf

  def differ(key: str, got: Any, want: Any) -> errors.UserError:
    return errors.UserError(
        f'{where}: {prefix}{key} is {got!r}',
        f'{want!r}, as in the configured model',
        'choose the model that these weights belong to, or other weights',
    )

  if hf.get('model_type') == 'gemma3' and generation == 3:
    prefix, text = 'text_config.', hf.get('text_config') or {}
    if hf.get('tie_word_embeddings') is False:
      raise errors.UserError(
          f'{where}: tie_word_embeddings is False',
          'an output head that is the embedding', 'use other weights')
  elif hf.get('model_type') != kind.model_type:
    raise differ('model_type', hf.get('model_type'), kind.model_type)
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
        raise differ('sliding_window_pattern', period, 'a number of layers')
      # Their number was compared before.
      got = expressible.periodic_types(len(want), period)
    elif got is None and key not in text:
      got = kind.defaults.get(key)
    if key in ('hidden_act', 'hidden_activation') and generation == 1:
      # Files of Gemma 1 name one of the two, the early ones by 'gelu' although
      # the weights were trained with the approximation.
      got = _ACTIVATION if got in (None, 'gelu') else got
    if not hf_rope.same(got, want):
      raise differ(key, got, want)
  if text.get('use_bidirectional_attention'):
    raise differ('use_bidirectional_attention', True, False)
  hf_rope.check(text, config, kind.defaults, differ)


def _hf_fields(config: Any, generation: int) -> dict[str, Any]:
  """Returns the keys that follow from the config, but for rope."""
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
    fields['hidden_act'] = _ACTIVATION  # The one that transformers 5 reads.
    return fields
  return fields | {
      'query_pre_attn_scalar': round(config.query_pre_attn_scalar() ** -2),
      'sliding_window': config.sliding_window_size,
      'layer_types': expressible.layer_types(config),
      'attn_logit_softcapping': config.attn_logits_soft_cap,
      'final_logit_softcapping': config.final_logit_softcap,
  }


# GGUF ------------------------------------------------------------------------


def gguf_metadata(
    config: Any, generation: int, *, name: str, context_length: int
) -> tuple[str, dict[str, Any]]:
  """Returns the architecture and the metadata of a model's GGUF.

  Whole numbers are uint32 in the file, the others float32. Missing are
  `general.architecture`, which is the first value returned, and what belongs
  to the tensors' types and to the tokenizer.

  Args:
    config: The `gm.nn.config.TransformerConfig`.
    generation: 1 to 4.
    name: For people, `general.name`.
    context_length: Positions that the model is good for.

  Raises:
    UserError: see `expressible.check_gguf`.
  """
  if generation == 4:
    return gemma4_architecture.gguf_metadata(
        config, name=name, context_length=context_length)
  expressible.check_gguf(config, generation)
  architecture = {g: a for a, g in names.ARCHITECTURES.items()}[generation]
  values = {
      'context_length': context_length,
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
  if generation > 1:
    values['attention.sliding_window'] = config.sliding_window_size
  if generation == 2:
    values['attn_logit_softcapping'] = float(config.attn_logits_soft_cap)
    values['final_logit_softcapping'] = float(config.final_logit_softcap)
  if generation == 3:
    values['rope.freq_base_swa'] = float(config.local_base_frequency)
    # Left out where it is llama.cpp's own: not every reader knows the key.
    if not expressible.has_period(config, _GEMMA3_PERIOD):
      period = expressible.global_period(config)
      values['attention.sliding_window_pattern'] = period
  if config.global_scale_factor != 1:
    values['rope.scaling.type'] = 'linear'
    values['rope.scaling.factor'] = float(config.global_scale_factor)
  return architecture, {
      'general.type': 'model',
      'general.name': name,
      **{f'{architecture}.{key}': value for key, value in values.items()},
  }


def extra_gguf_tensors(config: Any, generation: int) -> dict[str, np.ndarray]:
  """Returns the tensors of a GGUF that are no weights of the model."""
  if generation == 4:
    return gemma4_architecture.extra_gguf_tensors(config)
  return {}
