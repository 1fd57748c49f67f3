"""The mesh, and one table of how each parameter is sharded over it."""

import math
import re
from typing import Any
from typing import Sequence

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from gemma_sft import batches
from gemma_sft import errors

AXES = ('data', 'fsdp', 'tensor')

# (regex over 'layer_0/attn/q_einsum/w', spec). Exactly one rule has to match
# each parameter. An axis that does not divide a dimension is left out of it.
RULES = (
    (r'embedder/input_embedding$', P('tensor', 'fsdp')),           # V D
    (r'embedder/per_layer_embeddings$', P('tensor', None, 'fsdp')),  # V L P
    (r'embedder/per_layer_model_projection/w$', P('fsdp', None, None)),
    (r'(q|k)_einsum/w$', P('tensor', 'fsdp', None)),               # N D H
    (r'(kv|qkv)_einsum/w$', P(None, 'tensor', 'fsdp', None)),      # C K D H
    (r'attn_vec_einsum/w$', P('tensor', None, 'fsdp')),            # N H D
    (r'mlp/gating_einsum$', P(None, 'tensor', 'fsdp')),            # 2 F D
    (r'mlp/linear$', P('tensor', 'fsdp')),                         # F D
    (r'per_layer_(input_gate|projection)/w$', P('fsdp', None)),
    # Adapters, norms and scalars are small: everywhere.
    (r'/(a|b|m)$', P()),
    (r'(scale|skip_scale|count|step)$', P()),
)


def make_mesh(
    *, data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None
) -> jax.sharding.Mesh:
  """Returns a mesh over all devices of all hosts, or over `devices`.

  One of the sizes may be -1: all remaining devices. `devices` keep their order
  and may be descriptions of absent ones (`plan`).

  Raises:
    UserError: if the sizes do not make up the number of devices.
  """
  sizes = dict(zip(AXES, (data, fsdp, tensor)))
  n = jax.device_count() if devices is None else len(devices)
  open_axes = [axis for axis, size in sizes.items() if size == -1]
  known = math.prod(size for size in sizes.values() if size != -1)
  if len(open_axes) == 1 and n % known == 0:
    sizes[open_axes[0]] = n // known
  elif open_axes or known != n:
    text = ' x '.join(f'{a} {s}' for a, s in sizes.items())
    kind = (jax.devices() if devices is None else devices)[0].device_kind
    raise errors.UserError(
        f'config.mesh is {text}, and there are {n} devices ({kind})',
        f'sizes whose product is {n}, at most one of them -1',
        '--config.mesh.data=-1 --config.mesh.fsdp=1 --config.mesh.tensor=1')
  types = (jax.sharding.AxisType.Auto,) * len(AXES)
  shape = tuple(sizes.values())
  if devices is None:
    return jax.make_mesh(shape, AXES, axis_types=types)
  return jax.sharding.Mesh(
      np.array(devices).reshape(shape), AXES, axis_types=types)


def single_device_mesh() -> jax.sharding.Mesh:
  """Returns a mesh of the first local device."""
  return make_mesh(data=1, fsdp=1, tensor=1, devices=jax.local_devices()[:1])


def batch_groups(mesh: jax.sharding.Mesh) -> int:
  """Returns the number of shards that rows are split into."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def local_shards(mesh: jax.sharding.Mesh) -> list[int]:
  """Returns which of the `batch_groups` this process's devices hold.

  They need not be consecutive. Hosts share them where `tensor` spans hosts.
  """
  devices = mesh.devices.reshape(batch_groups(mesh), -1)
  return [i for i, row in enumerate(devices)
          if any(d.process_index == jax.process_index() for d in row)]


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding of arrays (A, B / A, ...)."""
  return NamedSharding(mesh, P(None, ('data', 'fsdp')))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Returns the sharding of arrays that every device holds whole."""
  return NamedSharding(mesh, P())


def tree_shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  """Returns a tree of shardings by `RULES`, for arrays or their shapes.

  The leading axis of stacked layers ('layers/attn/q_einsum/w') stays whole. The
  two arrays of a quantised weight ('w/values', 'w/scales') follow its rule.

  Raises:
    ValueError: if no rule covers a leaf, or several do.
  """
  def of(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    name = re.sub('/(values|scales)$', '', name)
    matches = [i for i, (rule, _) in enumerate(RULES) if re.search(rule, name)]
    if not matches:
      raise ValueError(f'no sharding rule covers {name} {leaf.shape}')
    if len(matches) > 1:
      raise ValueError(
          f'{name} is covered by {[RULES[i][0] for i in matches]}: each'
          ' parameter takes one rule')
    spec = RULES[matches[0]][1]
    if name.startswith('layers/') and spec:
      spec = P(None, *spec)
    return NamedSharding(mesh, _fitting(spec, leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(of, tree)


def _fitting(spec, shape, mesh):
  """Leaves out axes that do not divide a dimension, such as one of 1 head.

  It also leaves out axes of one device, and None at the end, as XLA does in its
  results: a spec that is written differently is another sharding to JAX, which
  would compile the next call again.
  """
  axes = [
      axis if axis is not None and mesh.shape[axis] > 1
      and size % mesh.shape[axis] == 0 else None
      for axis, size in zip(spec, shape)]
  while axes and axes[-1] is None:
    axes.pop()
  return P(*axes)


def put_batch(
    batch: batches.Batch, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """Puts this host's rows of a batch on the mesh; returns only the arrays."""
  rows = batch_sharding(mesh)
  return {
      name: jax.make_array_from_process_local_data(rows, batch[name])
      for name in ('tokens', 'targets', 'positions', 'segment_ids',
                   'loss_mask', 'rows')}
