"""What Hugging Face and llama.cpp can say about a model's architecture.

Both can say less than the library can compute. What a format has no word for
is refused here, never left out.
"""

from collections.abc import Sequence
import math
from typing import Any

from gemma_sft import errors

_GENERATIONS = (1, 2, 3)
# llama.cpp takes the 27B models for such by their number of blocks.
_BLOCKS_OF_27B = {2: 46, 3: 62}


def check_hf(config: Any, generation: int) -> None:
  """Raises a `UserError` for what transformers cannot express."""
  check_generation(config, generation)
  _check_rope(config, generation)
  if generation == 1:
    _check_no_caps(config, generation)
  n_local = layer_types(config).count('sliding_attention')
  if generation == 1:
    if n_local:
      raise _inexpressible(
          f'{n_local} sliding-window layers', 'none in Gemma 1')
    _check_scale(config, config.head_dim, 'Gemma 1 in transformers')
    return
  scalar = config.query_pre_attn_scalar() ** -2
  # transformers 5 takes whole numbers only. The library's is a double's square
  # root, exact to 16 digits.
  if not math.isclose(scalar, round(scalar), rel_tol=1e-9):
    raise _inexpressible(
        f'a query scale of {config.query_pre_attn_scalar()}',
        '1 / sqrt(n) with a whole n')
  if config.embed_dim % config.num_heads:
    raise _inexpressible(
        f'a width of {config.embed_dim} with {config.num_heads} heads',
        'a width that the heads divide, as transformers 5 asks')
  if n_local and not config.sliding_window_size:
    raise _inexpressible('sliding-window layers without a window', 'a window')


def check_gguf(config: Any, generation: int) -> None:
  """Raises a `UserError` for what llama.cpp cannot express.

  GGUF has no key for the scale of the queries: llama.cpp computes it from the
  sizes, and for the 27B models, which it knows by their number of blocks, in
  another way.
  """
  check_generation(config, generation)
  _check_rope(config, generation)
  # Its Gemma 3 has no softcaps that work with a window, its Gemma 2 none that
  # can be switched off.
  if generation != 2:
    _check_no_caps(config, generation)
  elif not (config.attn_logits_soft_cap and config.final_logit_softcap):
    raise _inexpressible('not both softcaps', 'both in Gemma 2')
  n_blocks = len(config.attention_types)
  scalar = config.head_dim
  if n_blocks == _BLOCKS_OF_27B.get(generation):
    scalar = config.embed_dim // config.num_heads
  _check_scale(
      config, scalar, f'a Gemma {generation} of {n_blocks} blocks in llama.cpp')
  period = {1: 1, 2: 2, 3: global_period(config)}[generation]
  if not has_period(config, period):
    raise _inexpressible(
        f'sliding-window layers {_short(layer_types(config))}',
        f'layers {_short(periodic_types(n_blocks, period))}, as in every'
        f' Gemma {generation} of llama.cpp')
  if generation > 1 and not config.sliding_window_size:
    raise _inexpressible('no sliding window', f'one in Gemma {generation}')


def global_period(config: Any) -> int:
  """Returns p where every p-th layer is global, if the first shows it."""
  types = layer_types(config)
  if 'full_attention' not in types:
    return len(types) + 1
  return types.index('full_attention') + 1


def has_period(config: Any, period: int) -> bool:
  """Returns whether the layers are all but every p-th sliding."""
  types = layer_types(config)
  return types == periodic_types(len(types), period)


def check_generation(config: Any, generation: int) -> None:
  """Raises unless this module knows the generation and the config is of it."""
  # Gemma 4 has a config class with other attributes: its own branch, here and
  # wherever this is called.
  if generation not in _GENERATIONS:
    raise errors.UserError(
        f'a model of Gemma {generation}', 'Gemma 1, 2 or 3',
        'choose one of these')
  got = (config.use_post_attn_norm, config.use_post_ffw_norm,
         config.use_qk_norm)
  want = (generation > 1, generation > 1, generation == 3)
  if got != want:
    raise _inexpressible(
        f'norms after attention, after the MLP, of queries and keys: {got}',
        f'{want}, those of Gemma {generation}')


def _check_rope(config: Any, generation: int) -> None:
  if generation == 3 and config.local_scale_factor != 1:
    raise _inexpressible(
        f'rope of the local layers scaled by {config.local_scale_factor}',
        '1: files scale that of the global layers only')
  local = config.local_base_frequency, config.local_scale_factor
  everywhere = config.global_base_frequency, config.global_scale_factor
  if generation < 3 and 'sliding_attention' in layer_types(config) and (
      local != everywhere):
    raise _inexpressible(
        f'rope base and scale {local} in local layers, {everywhere} in global'
        ' ones', f'one of both in Gemma {generation}')


def _check_no_caps(config: Any, generation: int) -> None:
  for where, cap in (('on the logits', config.final_logit_softcap),
                     ('in attention', config.attn_logits_soft_cap)):
    if cap is not None:
      raise _inexpressible(
          f'a softcap of {cap} {where}', f'none in Gemma {generation}')


def _check_scale(config: Any, scalar: int, reader: str) -> None:
  want = scalar**-0.5
  if not math.isclose(config.query_pre_attn_scalar(), want, rel_tol=1e-9):
    raise _inexpressible(
        f'a query scale of {config.query_pre_attn_scalar()}',
        f'{want}, the one of {reader}')


def _inexpressible(got: str, expected: str) -> errors.UserError:
  return errors.UserError(
      f'the model has {got}', f'{expected}; the format has no word for another',
      'use the dimensions of a preset, or another format')


def layer_types(config: Any) -> list[str]:
  """Returns the layers' kinds in the words of transformers."""
  return [
      {'LOCAL_SLIDING': 'sliding_attention', 'GLOBAL': 'full_attention'}[t.name]
      for t in config.attention_types
  ]


def periodic_types(n_layers: int, period: int) -> list[str]:
  """Returns layers of which every p-th is global."""
  return ['sliding_attention' if (i + 1) % period else 'full_attention'
          for i in range(n_layers)]


def _short(types: Sequence[str]) -> str:
  return ''.join('L' if t == 'sliding_attention' else 'G' for t in types)
