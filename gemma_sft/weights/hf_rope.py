"""Rope in `config.json`, as transformers 4 and 5 spell it.

Version 4 reads rope_theta, rope_scaling and rope_local_base_freq and ignores
rope_parameters without a word; version 5 prefers rope_parameters and falls back
on the older keys.
"""

from collections.abc import Callable
from collections.abc import Mapping
import math
from typing import Any

from gemma_sft import errors


def spell(config: Any, generation: int) -> dict[str, Any]:
  """Returns the keys of both versions."""
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
        'full_attention': rope['rope_parameters'],
        'sliding_attention': {'rope_type': 'default', 'rope_theta': local},
    }
  return rope


def check_objects(values: Any, where: str, path: str = '') -> None:
  """Raises a `UserError` where a `config.json` holds keys in no object.

  Those are the file itself, `text_config`, `rope_scaling`, and
  `rope_parameters` with its parts; each may be null.
  """
  if values is None:
    return
  if not isinstance(values, dict):
    raise errors.UserError(
        f'{where}: {path or "the file"} is {values!r:.40}', 'an object',
        "use the folder's own config.json")
  for key in ('text_config', 'rope_parameters', 'rope_scaling',
              'full_attention', 'sliding_attention'):
    check_objects(values.get(key), where, f'{path}.{key}'.strip('.'))


def check(
    text: Mapping[str, Any],
    config: Any,
    defaults: Mapping[str, Any],
    differ: Callable[[str, Any, Any], errors.UserError],
) -> None:
  """Checks every spelling that the file has: which one counts, readers decide.

  Args:
    text: The parsed file, or its `text_config`.
    config: The model's `gm.nn.config.TransformerConfig`.
    defaults: The bases that a file may leave out.
    differ: Makes the error of (key, value in the file, value in the config).

  Raises:
    UserError: the one of `differ`.
  """
  bases = {'rope_theta': config.global_base_frequency}
  parts = {'full_attention': 'rope_theta'}
  if 'rope_local_base_freq' in defaults:
    bases['rope_local_base_freq'] = config.local_base_frequency
    parts['sliding_attention'] = 'rope_local_base_freq'
  parameters = text.get('rope_parameters')
  older = {}
  for key, want in bases.items():
    older[key] = text.get(key)
    if older[key] is None:
      older[key] = defaults[key]
    # Beside rope_parameters a left-out key means nothing.
    if (key in text or not parameters) and not same(older[key], want):
      raise differ(key, older[key], want)
  factor = config.global_scale_factor
  if 'rope_scaling' in text or not parameters:
    _check_scaling('rope_scaling', text.get('rope_scaling'), factor, differ)
  if not parameters:
    return
  nested = bool(set(parameters) & {'full_attention', 'sliding_attention'})
  for part, key in parts.items():
    path = f'rope_parameters.{part}' if nested else 'rope_parameters'
    if nested:
      values = parameters.get(part) or {}
    else:  # Without parts it is about the full attention.
      values = parameters if part == 'full_attention' else {}
    theta = values.get('rope_theta', older[key])
    if not same(theta, bases[key]):
      raise differ(f'{path}.rope_theta', theta, bases[key])
    _check_scaling(
        path, values, factor if part == 'full_attention' else 1, differ)


def _check_scaling(path, values, want, differ) -> None:
  values = values or {}
  kind = values.get('rope_type', values.get('type', 'default'))
  if kind not in ('default', 'linear'):
    raise differ(f'{path}.rope_type', kind, 'linear')
  factor = values.get('factor', 1) if kind == 'linear' else 1
  if not same(factor, want):
    raise differ(f'{path}.factor', factor, want)


def same(got: Any, want: Any) -> bool:
  """Returns whether two values of `config.json` mean the same."""
  numbers = (int, float)
  if isinstance(got, numbers) and isinstance(want, numbers):
    # JSON may have been through f32.
    try:
      return math.isclose(got, want, rel_tol=1e-6)
    except OverflowError:  # An integer beyond all floats.
      return False
  return got == want
