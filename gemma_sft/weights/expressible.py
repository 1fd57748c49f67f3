"""What Hugging Face and llama.cpp can express of a model's architecture.

The library can compute more than either format can express. A model that a
format cannot express is refused here; nothing is left out silently.
"""

from collections.abc import Sequence
import math
from typing import Any

from gemma_sft import errors
from gemma_sft import model as model_lib

LOCAL, GLOBAL = 'sliding_attention', 'full_attention'  # As in transformers.
ACTIVATION = 'gelu_pytorch_tanh'  # The library's approximate GELU.
EPSILON = 1e-6  # Fixed in the library's RMSNorm.
# llama.cpp recognises the 27B models by their number of blocks.
_BLOCKS_OF_27B = {2: 46, 3: 62}


# Layers ----------------------------------------------------------------------


def layer_types(config: Any) -> list[str]:
  """Returns `LOCAL` or `GLOBAL` for each layer."""
  kinds = {'LOCAL_SLIDING': LOCAL, 'GLOBAL': GLOBAL}
  return [kinds[kind.name] for kind in config.attention_types]


def periodic_types(n_layers: int, period: int) -> list[str]:
  """Returns layer types of which every p-th is global."""
  return [LOCAL if (i + 1) % period else GLOBAL for i in range(n_layers)]


def _short(types: Sequence[str]) -> str:
  """Returns 'LLG' for two local layers and a global one."""
  return ''.join('L' if kind == LOCAL else 'G' for kind in types)


def global_period(config: Any) -> int:
  """Returns the number of the first global layer, counted from 1.

  Without global layers it is the number of layers plus 1.
  """
  return [*layer_types(config), GLOBAL].index(GLOBAL) + 1


def has_period(config: Any, period: int) -> bool:
  """Whether exactly every p-th layer is global."""
  types = layer_types(config)
  return types == periodic_types(len(types), period)


# Values of a file ------------------------------------------------------------


def same(got: Any, want: Any) -> bool:
  """Whether two values of a file and a config are equal, numbers nearly."""
  numbers = (int, float)
  if isinstance(got, numbers) and isinstance(want, numbers):
    # GGUF stores f32, and the numbers of a JSON may have been f32 before.
    try:
      return math.isclose(got, want, rel_tol=1e-6)
    except OverflowError:  # An integer that is too large for a float.
      return False
  return got == want


def check_same(where: str, key: str, got: Any, want: Any) -> None:
  """Raises a `UserError` if a file's value contradicts the config's."""
  if not same(got, want):
    raise contradiction(where, key, got, want)


def contradiction(
    where: str, key: str, got: Any, want: Any
) -> errors.UserError:
  """Returns the error for a file whose value contradicts the config."""
  return errors.UserError(
      f'{where}: {key} is {got!r}',
      f'{want!r}, as in the configured model',
      'choose the model that these weights belong to, or other weights')


def check_objects(values: Any, where: str, path: str = '') -> None:
  """Raises a `UserError` if a part of a `config.json` is not an object.

  The parts are the file itself, `text_config`, `rope_scaling`, and
  `rope_parameters` with its own parts; each may be null.
  """
  if values is None:
    return
  if not isinstance(values, dict):
    raise errors.UserError(
        f'{where}: {path or "the file"} is {values!r:.40}', 'an object',
        "use the folder's own config.json")
  for key in ('text_config', 'rope_parameters', 'rope_scaling', GLOBAL, LOCAL):
    check_objects(values.get(key), where, f'{path}.{key}'.strip('.'))


# Refusals --------------------------------------------------------------------


def check_hf(config: Any, generation: int) -> None:
  """Raises a `UserError` for what transformers cannot express or run."""
  if generation == 4:
    _check_hf4(config)
    return
  check_generation(config, generation)
  _check_rope(config, generation)
  n_local = layer_types(config).count(LOCAL)
  if generation == 1:
    _check_no_caps(config, generation)
    _refuse(n_local, f'{n_local} sliding-window layers', 'none in Gemma 1')
    _check_scale(config, config.head_dim, 'Gemma 1 in transformers')
    return
  scale = config.query_pre_attn_scalar()
  # transformers 5 accepts whole numbers only. The library's number is the
  # square root of a double, exact to 16 digits.
  _refuse(not math.isclose(scale**-2, round(scale**-2), rel_tol=1e-9),
          f'a query scale of {scale}', '1 / sqrt(n) with a whole n')
  _refuse(config.embed_dim % config.num_heads,
          f'a width of {config.embed_dim} with {config.num_heads} heads',
          'a width that is divisible by the heads, as transformers 5 requires')
  _refuse(n_local and not config.sliding_window_size,
          'sliding-window layers without a window', 'a window')


def check_gguf(config: Any, generation: int) -> None:
  """Raises a `UserError` for what llama.cpp cannot express.

  GGUF has no key for the scale of the queries of Gemma 1 to 3: llama.cpp
  computes it from the dimensions, with another formula for the 27B models.
  """
  if generation == 4:
    _check_gguf4(config)
    return
  check_generation(config, generation)
  _check_rope(config, generation)
  # llama.cpp's Gemma 3 has no softcaps that work together with a window; those
  # of its Gemma 2 cannot be switched off.
  if generation != 2:
    _check_no_caps(config, generation)
  else:
    _refuse(not (config.attn_logits_soft_cap and config.final_logit_softcap),
            'not both softcaps', 'both in Gemma 2')
  n_blocks = len(config.attention_types)
  scalar = config.head_dim
  if n_blocks == _BLOCKS_OF_27B.get(generation):
    scalar = config.embed_dim // config.num_heads
  _check_scale(
      config, scalar, f'a Gemma {generation} of {n_blocks} blocks in llama.cpp')
  period = {1: 1, 2: 2, 3: global_period(config)}[generation]
  _refuse(not has_period(config, period),
          f'sliding-window layers {_short(layer_types(config))}',
          f'layers {_short(periodic_types(n_blocks, period))}, as in every'
          f' Gemma {generation} of llama.cpp')
  _refuse(generation > 1 and not config.sliding_window_size,
          'no sliding window', f'one in Gemma {generation}')


def check_generation(config: Any, generation: int) -> None:
  """Raises a `UserError` unless the config is of this generation, 1 to 3."""
  if generation not in (1, 2, 3):
    raise errors.UserError(
        f'a model of Gemma {generation}', 'Gemma 1, 2 or 3',
        'choose one of these')
  got = (config.use_post_attn_norm, config.use_post_ffw_norm,
         config.use_qk_norm)
  want = (generation > 1, generation > 1, generation == 3)
  _refuse(got != want,
          f'norms after attention, after the MLP, of queries and keys: {got}',
          f'{want}, those of Gemma {generation}')


def _check_hf4(config: Any) -> None:
  _check_gguf4(config)
  types = layer_types(config)
  _refuse(types[-1] != GLOBAL, f'layers {_short(types)}',
          'a global layer at the end (transformers always makes the last one'
          ' global)')
  _refuse(config.num_global_kv_heads not in (None, config.num_kv_heads)
          and not config.k_eq_v_global,
          f'{config.num_global_kv_heads} key-value heads in global layers whose'
          ' values are not their keys',
          f'{config.num_kv_heads}, or values that are the keys')
  if not model_lib.n_shared_layers(config):
    return
  _refuse(not config.per_layer_input_dim,
          'layers that share keys and values, and no per-layer inputs',
          'both or neither: transformers 5.23 ends in a TypeError on the one'
          ' without the other')
  width, hidden = config.override_kv_shared_ffw_hidden, config.hidden_dim
  _refuse(width not in (None, hidden, 2 * hidden),
          f'an MLP width of {width} in layers that share keys and values',
          f'{hidden} or twice that')


def _check_gguf4(config: Any) -> None:
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
    _refuse(condition, got, want)
  n_shared = model_lib.n_shared_layers(config)
  sharing, types = config.kv_cache_sharing_config, layer_types(config)
  # The layers that share use the keys and values of the layers before: in the
  # library of the last two, in transformers of the last of each kind.
  _refuse(n_shared and not (
      sharing.share_global and sharing.share_local
      and types[:-n_shared][-2:] == [LOCAL, GLOBAL]),
          f'layers {_short(types)} of which the last {n_shared} share keys and'
          ' values',
          'a local and a global layer before those, shared with all of them')


def _check_rope(config: Any, generation: int) -> None:
  _refuse(generation == 3 and config.local_scale_factor != 1,
          f'rope of the local layers scaled by {config.local_scale_factor}',
          '1: files scale the rope of the global layers only')
  local = config.local_base_frequency, config.local_scale_factor
  everywhere = config.global_base_frequency, config.global_scale_factor
  _refuse(generation < 3 and LOCAL in layer_types(config)
          and local != everywhere,
          f'rope base and scale {local} in local layers, {everywhere} in global'
          ' ones', f'the same for both in Gemma {generation}')


def _check_no_caps(config: Any, generation: int) -> None:
  for where, cap in (('on the logits', config.final_logit_softcap),
                     ('in attention', config.attn_logits_soft_cap)):
    _refuse(cap is not None, f'a softcap of {cap} {where}',
            f'none in Gemma {generation}')


def _check_scale(config: Any, scalar: int, reader: str) -> None:
  got, want = config.query_pre_attn_scalar(), scalar**-0.5
  _refuse(not math.isclose(got, want, rel_tol=1e-9),
          f'a query scale of {got}', f'{want}, the scale of {reader}')


def _refuse(condition: Any, got: str, expected: str) -> None:
  """Raises the error for a model that a format cannot express."""
  if condition:
    raise errors.UserError(
        f'the model has {got}',
        f'{expected}; the format cannot express anything else',
        'use the dimensions of a preset, or another format')
