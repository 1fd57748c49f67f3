"""The trained weights of a run, one array at a time, with adapters merged in.

`weights/arrays.py` reads base weights array by array; this module puts the
run's checkpoint on top of them. Nothing here holds more than one array, so that
a host can write a model that fits only into the memory of a whole TPU slice.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from gemma_sft import errors
from gemma_sft.adapters import lora
from gemma_sft.nn import quantize
from gemma_sft.run import build
from gemma_sft.run import checkpoint as checkpoint_lib
from gemma_sft.run import restore
from gemma_sft.weights import arrays as arrays_lib
from gemma_sft.weights import load
from gemma_sft.weights import names


@dataclasses.dataclass(frozen=True)
class Arrays:
  """The weights of a model to be written."""

  layout: names.WeightLayout  # Its `file_vocab` is that of the tokenizer.
  # From a library path to the array as trained: float32 if adapters are merged
  # in or the base is quantised, else in the dtype of its source.
  read: Callable[[str], np.ndarray]
  # The same of the untouched base, dequantised if it is quantised.
  read_base: Callable[[str], np.ndarray]
  adapters: Any  # The trained tree, or None.


def open_arrays(chosen: restore.Chosen) -> Arrays:
  """Opens the weights that `restore.choose_weights` has found.

  Raises:
    UserError: The base or the checkpoint is damaged or has another shape.
  """
  config, model = chosen.config, chosen.model
  layout = load.weight_layout(model, file_vocab=chosen.tokenizer.vocab_size)
  load.check_config(chosen.resolved, model)
  read_base = arrays_lib.open_arrays(
      chosen.resolved, layout.shapes, layout=layout, seed=config.seed)
  if config.model.quantization:
    read_base = _as_quantized(read_base, config.model.quantization)
  if chosen.checkpoints is None:
    return Arrays(layout, read_base, read_base, None)
  if not config.lora.enabled:
    return Arrays(layout, _open_trained(chosen, layout), read_base, None)
  adapters, _ = chosen.checkpoints.restore_trainable(chosen.step)
  scale = build.lora_scale(config)

  def read(path):
    with _on_host():
      merged = lora.merge(
          traverse_util.unflatten_dict(
              {path: jnp.asarray(read_base(path), jnp.float32)}, sep='/'),
          adapters, scale, transposed_gating=model.transposed_gating)
    return np.asarray(traverse_util.flatten_dict(merged, sep='/')[path])

  adapted = _adapted(layout, adapters)
  return Arrays(
      layout, lambda path: read(path) if path in adapted else read_base(path),
      read_base, adapters)


def _on_host():
  # The memory of an accelerator may not hold the embedding.
  return jax.default_device(jax.local_devices(backend='cpu')[0])


def _as_quantized(read, kind):
  """Returns a reader of the base as in training: quantised, then in float32."""
  dequantize = jax.jit(quantize.dequantize, static_argnums=1)

  def read_rounded(path):
    array = read(path)
    if not quantize.is_quantized(path):
      return array
    with _on_host():
      return np.asarray(
          dequantize(quantize.quantize(array, kind), jnp.float32))

  return read_rounded


def _adapted(layout, adapters):
  """Returns the library paths of the weights that have an adapter."""
  heads = {path.rpartition('/')[0].rpartition('/')[0]
           for path in traverse_util.flatten_dict(adapters, sep='/')}
  return {path for path in layout.shapes if path.removesuffix('/w') in heads}


def _open_trained(chosen, layout):
  read = arrays_lib.open_checkpoint(
      chosen.checkpoints.state_path(chosen.step), layout.shapes, ('trainable',))
  tree = traverse_util.unflatten_dict({
      path: lambda path=path: read(path) for path in layout.shapes}, sep='/')
  if checkpoint_lib.tree_digest(tree) != chosen.meta.trainable_digest:
    raise errors.UserError(
        f'checkpoint {chosen.step}: its bytes have changed on disk',
        'the checkpoint as it was saved', 'choose another with --step')
  return read
