"""Finds where a step in float16 overflowed, by running its batch again.

Only a failed step is examined, so the check costs a healthy run nothing. The
forward pass records the largest magnitude of each tensor, in the order of
computation. If all of them are finite, the gradient shows how far the backward
pass came from the last layer down.
"""

import dataclasses
import functools
import re
from typing import Any
from typing import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gemma_sft import model as model_lib
from gemma_sft import sharding
from gemma_sft import state as state_lib
from gemma_sft.adapters import lora
from gemma_sft.nn import blocks
from gemma_sft.nn import float16
from gemma_sft.nn import loss_scale as loss_scale_lib
from gemma_sft.run import prepare


def explain(
    run: prepare.Run, gradient_sums: Callable[..., Any],
    state: state_lib.TrainState, step: int, batch: Any) -> str:
  """Returns a clause that names the first tensor that was not finite.

  `state` still has the weights before the step: an update that is not finite is
  skipped, as are all that follow a scale of 0.
  """
  arrays = sharding.put_batch(batch, run.mesh)
  base, trainable = run.base, state.trainable
  largest = magnitudes(base, trainable, arrays, step, run.settings)
  for name, value in largest.items():
    limit = float16.LARGEST if name.endswith(_ROUNDED) else np.inf
    if not value < limit:
      return ('the first tensor of the forward pass beyond the range of its'
              f' dtype is {name}: {value:.4g}')
  gradient, nll, _ = jax.jit(
      gradient_sums, static_argnames=('settings', 'max_trained'))(
          trainable, base, arrays, jnp.int32(step),
          loss_scale_lib.make_loss_scale().replace(
              scale=jnp.float32(loss_scale_lib.SMALLEST)),
          settings=run.settings, max_trained=int(batch['max_trained']))
  if not np.isfinite(float(nll)):
    return 'the forward pass is finite up to the head, the loss is not'
  name = _last_not_finite(gradient, run)
  if name:
    return ('the forward pass is finite; the first gradient of the backward'
            f' pass that is not is that of {name}')
  return 'computed again, the batch gives finite numbers'


# Ends the names of tensors that are about to be rounded to float16.
_ROUNDED = ', rounded to float16'


class _Watch(float16.HalfOperations):
  """An interceptor of the library's modules that records magnitudes.

  It is entered outside that of `blocks`, so it sees the inputs and outputs of a
  module with its adapters.
  """

  def __init__(self):
    self.largest: dict[str, jax.Array] = {}

  def _record(self, module, name, array):
    self.largest['/'.join((*module.path, *name))] = jnp.max(
        jnp.abs(array.astype(jnp.float32)))

  def attend(self, module, *arrays, **settings):
    for name, array in zip(('queries', 'keys', 'values'), arrays):
      self._record(module, (name + _ROUNDED,), array)
    return super().attend(module, *arrays, **settings)

  def __call__(self, next_fun, args, kwargs, context):
    module, kind = context.module, type(context.module).__name__
    called = context.method_name == '__call__'
    name = ()
    if called and kind == 'Einsum':
      name = () if module.weight_name == 'w' else (module.weight_name,)
      self._record(module, (*name, 'input' + (
          _ROUNDED if float16.is_bounded(module) else '')), args[1])
    out = next_fun(*args, **kwargs)
    if kind == 'Embedder' and context.method_name == 'encode':
      self.largest['embedding'] = jnp.max(jnp.abs(out.astype(jnp.float32)))
    elif called and kind == 'Block':
      self._record(module, ('residual',), out[1])
    elif called and kind in ('Einsum', 'RMSNorm'):
      self._record(module, name, out)
    return out


def watched_hidden_states(
    model: model_lib.Model, params: Any, microbatch: dict[str, jax.Array], *,
    execution: blocks.Execution, **settings: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns (hidden states, {tensor: largest magnitude}) with float16 products.

  The magnitudes are in the order of computation. The layers run in the
  library's loop, not in a scan, which would hide what is inside it.
  """
  watch = _Watch()
  with nn.intercept_methods(watch):
    x_BTD = model_lib.hidden_states(
        model, params, microbatch['tokens'], microbatch['positions'],
        microbatch['segment_ids'], operations=watch,
        execution=dataclasses.replace(execution, layers='loop', remat='none'),
        **settings)
  watch.largest['final_norm' + _ROUNDED] = watch.largest.pop('final_norm')
  return x_BTD, watch.largest


def magnitudes(
    base: Any, trainable: Any, arrays: dict[str, jax.Array], step: int,
    settings: state_lib.StepSettings) -> dict[str, float]:
  """Returns the largest magnitude of each tensor, in order of computation."""
  names = []

  @functools.partial(
      jax.jit, out_shardings=sharding.replicated(settings.mesh))
  def of_batch(base, trainable, arrays, step):
    params, adapters = (base, trainable) if settings.lora_enabled else (
        jax.tree.map(lambda leaf: leaf.astype(settings.compute_dtype),
                     trainable), None)

    def of_microbatch(microbatch):
      _, watched = watched_hidden_states(
          settings.model, params, microbatch, adapters=adapters,
          lora_scale=settings.lora_scale, dropout=lora.make_dropout(
              settings.dropout, settings.seed, step, microbatch['rows']),
          execution=settings.execution)
      names[:] = watched
      return jnp.stack(list(watched.values()))

    return jax.lax.map(of_microbatch, arrays).max(axis=0)

  values = of_batch(base, trainable, arrays, jnp.int32(step))
  return dict(zip(names, map(float, np.asarray(jax.device_get(values)))))


def _last_not_finite(gradient, run):
  """Returns the weight nearest to the loss whose gradient is not finite."""
  @functools.partial(jax.jit, out_shardings=sharding.replicated(run.mesh))
  def finite(gradient):
    if 'layers' in gradient:
      gradient = lora.unstack(gradient['layers'], run.initial_state.trainable)
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), gradient)

  def layer(name):
    found = re.match(r'layer_(\d+)/', name)
    return int(found[1]) if found else -1

  leaves = jax.tree_util.tree_leaves_with_path(finite(gradient))
  bad = [jax.tree_util.keystr(path, simple=True, separator='/')
         for path, fine in leaves if not fine]
  return max(bad, key=layer, default='')
