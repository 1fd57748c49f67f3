"""Explains an out-of-memory error: what is in memory, and what to change."""

import contextlib
import math
import re
from typing import Any

import jax

from gemma_sft import errors

_SHOWN = 5


@contextlib.contextmanager
def explained(config: Any):
  """Turns a device's out-of-memory error into a `UserError`."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise explain(error, config) from None


def explain(error: Exception, config: Any) -> errors.UserError:
  """Returns a message with the largest buffers and what to change."""
  wanted = re.search(r'allocat\w* (?:of )?([\d,]+) ?bytes', str(error))
  held = sorted(
      jax.live_arrays(), key=lambda array: -_local_bytes(array))[:_SHOWN]
  device = jax.local_devices()[0]
  text = f'out of memory on {device.device_kind}'
  if limit := (device.memory_stats() or {}).get('bytes_limit'):
    text += f' of {_size(limit)}'
  if wanted:
    text += f': no room for {_size(int(wanted[1].replace(",", "")))} more'
  text += '; the largest arrays held are ' + ', '.join(
      f'{array.dtype}{list(array.shape)} ({_size(_local_bytes(array))})'
      for array in held)
  # The buffers that a TPU's compiler lists in its error.
  listed = re.findall(r'Size: ([\d.]+\w)\s+(?:Operator: .*?\s+)?Shape: (\S+)',
                      str(error))[:_SHOWN]
  if listed:
    text += '; the largest buffers of the step would be ' + ', '.join(
        f'{shape} ({size})' for size, shape in listed)
  return errors.UserError(text, 'a step that fits', 'in this order: '
                          + '; '.join(_remedies(config)))


def _remedies(config):
  """Yields what to change; what costs least comes first."""
  rows, A = config.data.batch_size, config.train.gradient_accumulation_steps
  if config.train.remat == 'none':
    yield '--config.train.remat=elementwise'
  if config.train.remat != 'block':
    yield '--config.train.remat=block'
  if rows // A > jax.device_count():
    yield (f'--config.train.gradient_accumulation_steps={2 * A} (the same'
           ' updates from smaller microbatches)')
  if not config.lora.enabled:
    yield '--config.lora.enabled=true'
  elif not config.model.quantization:
    yield '--config.model.quantization=int8, or nf4'
  if jax.device_count() > 1 and config.mesh.fsdp == 1:
    yield (f'--config.mesh.fsdp={jax.device_count()} --config.mesh.data=1 (each'
           ' device keeps its share of the weights)')
  yield f'--config.data.max_length={config.data.max_length // 2}'
  if config.eval.judged or config.eval.prompts:
    yield f'--config.eval.batch_size={max(1, config.eval.batch_size // 2)}'


def _local_bytes(array: jax.Array) -> int:
  """Returns the bytes of the part of an array on one device."""
  shape = array.sharding.shard_shape(array.shape)
  return array.dtype.itemsize * math.prod(shape)


def _size(n: int) -> str:
  return f'{n / 1e9:.2f} GB' if n >= 1e8 else f'{n / 1e6:.2f} MB'
