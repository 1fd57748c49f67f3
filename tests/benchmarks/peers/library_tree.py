"""The weights as the official library's parameter tree, for the JAX peers."""

from typing import Any
from typing import Callable

from flax import traverse_util
import jax
import jax.numpy as jnp
from safetensors import numpy as safetensors_numpy

from gemma_sft.weights import load as load_lib
from gemma_sft.weights import names
from peers import common

LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'gemma')


def load(spec: common.Spec) -> dict[str, Any]:
  """Returns the nested parameters as arrays on the device, in the dtype."""
  weights = safetensors_numpy.load_file(f'{spec.work}/model.safetensors')
  layout = load_lib.weight_layout(spec.make_model())
  # Copies: on a CPU an aligned numpy array may be used in place.
  params = {
      path: jax.block_until_ready(jnp.array(array, spec.dtype, copy=True))
      for path, array in names.to_library(layout, 'hf', weights.pop)}
  if weights:
    raise ValueError(f'left over: {sorted(weights)}')
  return traverse_util.unflatten_dict(params, sep='/')


def product(spec: common.Spec, n: int) -> Callable[[], Any]:
  """Returns a call that multiplies two (n, n) matrices and waits."""
  multiply = jax.jit(jnp.matmul)
  x = jax.block_until_ready(
      jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(spec.dtype)))
  return lambda: multiply(x, x).block_until_ready()


def device_bytes(spec: common.Spec, *, peak: bool) -> int:
  """Returns the allocated bytes, now or at their peak; 0 on a CPU."""
  del spec
  return (jax.devices()[0].memory_stats() or {}).get(
      'peak_bytes_in_use' if peak else 'bytes_in_use', 0)
