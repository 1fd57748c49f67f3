"""Checks that a run's gradient does not depend on how the batch is split.

The gradient of one global batch is computed in one microbatch and in many,
packed and padded, on the mesh and on one device. All are the same sum.
"""

import dataclasses
import json
import os
from typing import Any
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gemma_sft import batches
from gemma_sft import errors
from gemma_sft import pages
from gemma_sft import sharding
from gemma_sft.run import hosts
from gemma_sft.run import prepare

# Largest norm of the difference of a leaf's gradient, relative to the leaf's
# norm. In float32 the order of the sums differs; bfloat16 has 8 bits of
# mantissa; float16 has 11, and fewer in its smallest numbers. Norms count
# because single entries of a bfloat16 gradient differ by more.
LIMITS = {'float32': 1e-5, 'bfloat16': 2e-2, 'float16': 1e-2}


def check(
    run: prepare.Run, gradient_sums: Callable[..., Any]) -> dict[str, float]:
  """Returns {variant: largest relative difference}; prints and records it.

  Dropout is off, because its masks are drawn per row and packing changes rows.
  Raises `UserError` if a variant differs by more than the limit of its dtype.
  """
  if jax.process_count() > 1:
    raise errors.UserError(
        f'--self_test in a run of {jax.process_count()} processes',
        'one process, which sees all gradients',
        'start it on one host with JAX_NUM_PROCESSES=1, and then without it')
  groups = run.settings.groups
  rows = 8 * groups  # One for each of eight microbatches on each shard.
  trainable = _perturbed(run.initial_state.trainable)
  layouts = {
      f'1x{rows}, packed': (1, True, run.mesh),
      f'8x{groups}, packed': (8, True, run.mesh),
      f'1x{rows}, padded': (1, False, run.mesh),
  }
  if jax.device_count() > 1:
    layouts[f'1x{rows}, packed, one device'] = (
        1, True, sharding.single_device_mesh())
  examples = run.splits['train'].examples
  examples = examples[:min(rows, len(examples))]
  results = {
      name: _gradient(run, gradient_sums, trainable, examples, rows, *layout)
      for name, layout in layouts.items()}
  reference_name = next(iter(results))
  reference, n_reference = results[reference_name]
  largest = {
      name: _difference(reference, gradient)
      for name, (gradient, n) in results.items() if name != reference_name}
  counts = {name: n for name, (_, n) in results.items()}
  limit = LIMITS[run.settings.compute_dtype.name]
  for name, difference in largest.items():
    hosts.say(f'self-test: gradient of {name} differs from {reference_name} by'
             f' {difference:.2e} (limit {limit:.0e})')
  pages.write(os.path.join(run.workdir, 'self_test.json'), json.dumps(
      {'limit': limit, 'largest_difference': largest,
       'trained_tokens': counts}, indent=2))
  if len(set(counts.values())) > 1 or not all(
      d <= limit for d in largest.values()):
    raise errors.UserError(
        f'self-test: the gradient depends on how the batch is split: {largest},'
        f' trained tokens {counts}',
        f'differences of at most {limit:.0e} and equal counts',
        'nothing was trained; report this with self_test.json from the workdir')
  return largest


def _perturbed(trainable):
  """Moves B away from zero, so that every leaf has a gradient."""
  leaves, tree = jax.tree.flatten(trainable)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  return tree.unflatten([
      leaf + 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)
      for key, leaf in zip(keys, leaves)])


def _gradient(
    run, gradient_sums, trainable, examples, rows, microbatches, packing, mesh):
  layout = batches.Layout(
      batch_size=rows, max_length=run.config.data.max_length, packing=packing,
      microbatches=microbatches, groups=sharding.batch_groups(mesh))
  source = batches.Batches(examples, layout, seed=None)
  assert source.batches_per_epoch == 1  # As many rows as examples, or more.
  batch = source[0]
  settings = dataclasses.replace(
      run.settings, dropout=0.0, groups=layout.groups, mesh=mesh,
      execution=dataclasses.replace(run.settings.execution, mesh=mesh))
  base, loss_scale = run.base, run.initial_state.loss_scale
  if mesh is not run.mesh:
    one = sharding.replicated(mesh)
    trainable, base, loss_scale = jax.device_put(
        (trainable, base, loss_scale), one)
  gradient, _, n = jax.jit(
      gradient_sums, static_argnames=('settings', 'max_trained'))(
          trainable, base, sharding.put_batch(batch, mesh), jnp.int32(0),
          loss_scale, settings=settings, max_trained=int(batch['max_trained']))
  return jax.tree.map(np.asarray, jax.device_get(gradient)), float(n)


def _difference(reference, gradient):
  """Returns the largest relative norm of the difference over all leaves."""
  return max(
      float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-30))
      for a, b in zip(jax.tree.leaves(reference), jax.tree.leaves(gradient)))
