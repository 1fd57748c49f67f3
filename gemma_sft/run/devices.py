"""Choices that depend on the device: dtype, layers, attention kernel."""

import functools
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp

from gemma_sft import cache
from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft.nn import attention_choice


def enable_compilation_cache() -> None:
  """Keeps compiled programs between runs."""
  jax.config.update('jax_compilation_cache_dir', str(cache.folder('compiled')))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.0)


# The factor is that of the 270M in tests/benchmarks/RESULTS.md.
_EMULATED = ('this CPU has no bfloat16 instructions: a step takes 1.25 times as'
             ' long as in float32')


def choose_dtype(name: str, device: Any = None) -> tuple[Any, str]:
  """Returns the dtype of the frozen base and of compute, and why.

  `name` is config.model.dtype; the device is the first local one unless given.
  Raises `UserError` for bfloat16 on a card that lacks it.
  """
  device = device or jax.local_devices()[0]
  # Libraries call bfloat16 supported where it is emulated.
  capability = compute_capability(device)
  without = 0 < capability < 8.0
  if name == 'bfloat16' and without:
    raise errors.UserError(
        f'config.model.dtype is bfloat16 on {device.device_kind}, whose compute'
        f' capability {capability} lacks it: it would be computed as float32,'
        ' eight times slower than float16', 'float16 or float32 there',
        'set --config.model.dtype=auto, which takes float16')
  cpu = device.platform == 'cpu'
  instructions = cpu_bfloat16() if cpu else ''
  if name != 'auto':
    emulated = name == 'bfloat16' and cpu and not instructions
    return jnp.dtype(name), 'config.model.dtype says so' + (
        f'; warning: {_EMULATED}' if emulated else '')
  if instructions:
    return jnp.dtype('bfloat16'), f'this CPU has {instructions}'
  if cpu:
    return jnp.dtype('float32'), 'no bfloat16 instructions found in this CPU'
  if without:
    return jnp.dtype('float16'), (
        f'compute capability {capability} has no bfloat16: matrix products in'
        ' float16, everything else in float32')
  if device.platform == 'gpu' and not capability:
    return jnp.dtype('float32'), 'its compute capability is not known'
  return jnp.dtype('bfloat16'), f'{device.device_kind} has it'


_CPU_INFO = '/proc/cpuinfo'


def cpu_bfloat16() -> str:
  """Returns the name of this CPU's bfloat16 instructions.

  '' if it has none, or if its features cannot be read (not Linux).
  """
  try:
    text = pathlib.Path(_CPU_INFO).read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError):
    return ''
  line = re.search(r'^(?:flags|Features)\s*:(.*)$', text, re.MULTILINE)
  features = line[1].split() if line else ()
  return next((name for name in (
      'amx_bf16', 'avx512_bf16', 'bf16') if name in features), '')


def choose_layers(name: str, model: model_lib.Model) -> tuple[str, str]:
  """Returns 'scan' or 'loop' for config.model.layers, and why."""
  if model.generation == 4:
    if name == 'scan':
      raise errors.UserError(
          'config.model.layers is scan for a Gemma 4',
          'loop: its layers differ in the width of their heads and share keys,'
          ' so they cannot be stacked', 'set --config.model.layers=auto')
    return 'loop', "Gemma 4's layers differ in shape"
  if name != 'auto':
    return name, 'config.model.layers says so'
  return 'scan', 'one block is compiled for all layers'


def choose_attention(
    name: str, model: model_lib.Model, mesh: jax.sharding.Mesh, *, dtype: Any,
    length: int, packed: bool, tried: bool = True) -> tuple[str, str]:
  """Returns a kernel of `attention.KERNELS` for the mesh's devices, and why.

  `name` is config.model.attention, `length` the tokens of the longest row.
  `tried` runs the kernel first, which absent devices cannot. Raises `UserError`
  if the device lacks the kernel, or it computes something else.
  """
  if model.generation == 4:
    if name not in ('auto', 'einsum'):
      raise errors.UserError(
          f'config.model.attention is {name} for a Gemma 4',
          "einsum: Gemma 4 runs the library's own attention",
          'set --config.model.attention=auto')
    return 'einsum', "the library's own"
  config, device = model.config, mesh.devices.flat[0]
  softcap = config.attn_logits_soft_cap
  check = functools.partial(
      attention_choice.check, N=config.num_heads, K=config.num_kv_heads,
      H=config.head_dim, window=config.sliding_window_size, softcap=softcap,
      dtype=dtype, T=length, mesh=mesh)
  return attention_choice.choose(
      name, check=check if tried else None, platform=device.platform,
      device_kind=device.device_kind,
      compute_capability=compute_capability(device),
      head_dim=config.head_dim, softcap=softcap, packed=packed, dtype=dtype)


def compute_capability(device: jax.Device) -> float:
  """Returns that of an NVIDIA GPU, such as 9.0, and 0 for other devices."""
  return float(getattr(device, 'compute_capability', 0) or 0)
