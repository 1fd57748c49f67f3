"""Reads base weights one array at a time.

A model larger than the host's memory can thus be quantised, sharded and
exported.
"""

from collections.abc import Iterable
from collections.abc import Mapping
import hashlib
import math
import re
from typing import Any

from absl import logging
from flax import traverse_util
import jax
import numpy as np

from gemma_sft import errors
from gemma_sft.nn import quantize
from gemma_sft.weights import names
from gemma_sft.weights import safetensors_file

# Parts of a checkpoint that the library skips when it restores a text model.
_MULTIMODAL = ('vision_encoder/', 'embedder/mm_input_projection/',
               'embedder/mm_soft_embedding_norm/')


def open_arrays(
    resolved: Any,
    shapes: Mapping[str, names.Shape],
    *,
    layout: names.WeightLayout | None = None,
    seed: int = 0,
) -> names.Read:
  """Returns a function from a library path to the array, in its own dtype.

  Args:
    resolved: From `load.resolve`.
    shapes: Library path -> shape.
    layout: For a Hugging Face folder only, from `load.weight_layout`.
    seed: For random weights only.

  Raises:
    UserError: Lists all missing, surplus and misshapen arrays.
  """
  if resolved.kind == 'random':
    # Norms multiply by w in Gemma 4 and by 1 + w in the others.
    norm = float(any(path.endswith('skip_scale') for path in shapes))
    return lambda path: _draw(path, shapes[path], seed, norm)
  if resolved.kind == 'hf':
    return _open_hf(resolved.path, layout)
  return open_checkpoint(resolved.path, shapes)


def _open_hf(path, layout):
  folder = safetensors_file.open_folder(path)
  names.check_shapes(folder.shapes, names.file_shapes(layout, 'hf'), str(path),
                     embedding=names.HF_EMBEDDING)
  return lambda wanted: names.read_library_array(
      layout, 'hf', folder.read, wanted)


def open_checkpoint(
    path: str, shapes: Mapping[str, names.Shape], prefix: tuple[str, ...] = ()
) -> names.Read:
  """Opens an Orbax checkpoint (NESTED or FLAT) as `open_arrays` does.

  `prefix` are the keys of the checkpoint's tree that lead to the parameters.
  """
  from orbax import checkpoint as ocp

  found = _entries(path, prefix)
  found_shapes = {name: tuple(leaf.shape) for name, (_, leaf) in found.items()}
  names.check_shapes(
      found_shapes, shapes, f'checkpoint {path}', embedding=names.EMBEDDING)
  if names.EMBEDDING in found:
    log_padding(found_shapes[names.EMBEDDING][0], shapes[names.EMBEDDING][0])

  def read(name):
    keys, leaf = found[name]
    item, restore_args = leaf, ocp.RestoreArgs(restore_type=np.ndarray)
    for key in reversed(keys):
      item, restore_args = {key: item}, {key: restore_args}
    with ocp.PyTreeCheckpointer() as checkpointer:
      array = checkpointer.restore(path, args=ocp.args.PyTreeRestore(
          item=item, restore_args=restore_args, partial_restore=True))
    for key in keys:
      array = array[key]
    if name == names.EMBEDDING:
      array = names.resize_rows(array, shapes[name][0])
    return array

  return read


def log_padding(found: int, wanted: int) -> None:
  """Logs which rows of a checkpoint's embedding are cut or added."""
  if found != wanted:
    logging.warning(
        'The checkpoint has %d embedding rows, the model %d: %s.', found,
        wanted,
        'the rows beyond the vocabulary are cut' if wanted < found else
        'the missing rows are zero, so their logits are 0, not -inf')


def checkpoint_shapes(path: str) -> dict[str, names.Shape]:
  """Returns path -> shape in a NESTED or FLAT checkpoint, by NESTED names."""
  return {name: tuple(leaf.shape)
          for name, (_, leaf) in _entries(path).items()}


def _entries(path, prefix=()) -> dict[str, tuple[tuple[str, ...], Any]]:
  """Returns NESTED name -> (keys of the checkpoint's tree, metadata)."""
  from orbax import checkpoint as ocp

  with ocp.PyTreeCheckpointer() as checkpointer:
    metadata = checkpointer.metadata(path).item_metadata
  if metadata is None:
    raise errors.UserError(
        f'checkpoint {path}: no metadata of its arrays',
        'a checkpoint of parameters, saved by Orbax (NESTED or FLAT)',
        'give the folder that holds _METADATA')
  entries = {}
  for keys, leaf in traverse_util.flatten_dict(metadata.tree).items():
    if keys[: len(prefix)] != prefix:
      continue
    name = '/'.join(keys[len(prefix) :])
    if name.startswith('transformer/'):
      # The official FLAT files have 'transformer/' before every path and a
      # 'w' in the MLP that the modules do not have.
      name = name.removeprefix('transformer/')
      if '/mlp/' in name:
        name = name.removesuffix('/w')
    elif name.startswith('SigLiPFromPatches_0/'):
      name = f'vision_encoder/{name}'
    if not name.startswith(_MULTIMODAL):
      entries[name] = keys, leaf
  return entries


# Onto devices ----------------------------------------------------------------


def load_arrays(
    read: names.Read,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    *,
    stacked: bool,
    quantization: str,
) -> dict[str, Any]:
  """Returns library path -> array or `quantize.Quantized` in its shards.

  Arrays are read, quantised and placed one at a time. The host holds one array,
  or one array of all layers with `stacked`. Weights to be quantised never reach
  the devices in full precision.

  Args:
    read: From `open_arrays`.
    wanted: Library path -> shape, dtype and sharding; quantised weights have
      dtypes of their own.
    stacked: Joins 'layer_<i>/x' of all layers i to 'layers/x', along a leading
      axis that is not sharded.
    quantization: One of `quantize.KINDS`, or '' for none.
  """

  def read_placeable(path):
    array = read(path)
    if quantization and quantize.is_quantized(path):
      return quantize.quantize(array, quantization)
    return array.astype(wanted[path].dtype)

  groups = _layers_by_name(wanted) if stacked else {}
  grouped = {path for paths in groups.values() for path in paths}
  loaded = {}
  # In the order of `wanted`, so that all hosts read the same array.
  for path, leaf in wanted.items():
    if path not in grouped:
      loaded[path] = _place(read_placeable(path), leaf.sharding)
  for name, paths in groups.items():
    loaded[name] = _place(_read_stack(read_placeable, paths),
                          _with_layers(wanted[paths[0]].sharding))
  return loaded


def _layers_by_name(paths: Iterable[str]) -> dict[str, list[str]]:
  """Returns 'layers/x' -> 'layer_0/x', 'layer_1/x', ..."""
  groups = {}
  for path in paths:
    match = re.fullmatch(r'layer_(\d+)/(.*)', path)
    if match:
      layers = groups.setdefault(f'layers/{match[2]}', {})
      layers[int(match[1])] = path
  return {name: [layers[i] for i in range(len(layers))]
          for name, layers in groups.items()}


def _read_stack(read, paths):
  """Reads layers into one array, or one pair of quantised arrays."""
  stack = None
  for i, path in enumerate(paths):
    leaves, treedef = jax.tree.flatten(read(path))
    if stack is None:
      stack = [np.empty((len(paths), *x.shape), x.dtype) for x in leaves]
    for into, leaf in zip(stack, leaves):
      into[i] = leaf
  return jax.tree.unflatten(treedef, stack)


def _with_layers(sharding):
  """Returns the sharding of a stack, given the sharding of one layer."""
  if isinstance(sharding, jax.sharding.NamedSharding):
    spec = jax.sharding.PartitionSpec(None, *sharding.spec)
    return jax.sharding.NamedSharding(sharding.mesh, spec)
  return sharding


def _place(array, sharding):
  """Shards an array, or the values and scales of a quantised weight."""
  if isinstance(array, quantize.Quantized):
    return jax.tree.map(
        lambda leaf: _place(leaf, _fitting(sharding, leaf.shape)), array)
  return jax.make_array_from_callback(
      array.shape, sharding, lambda index: array[index])


def _fitting(sharding, shape):
  """Drops the mesh axes that do not divide the shape.

  The values and scales of a quantised weight are smaller than the weight, which
  the sharding was made for.
  """
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return sharding
  mesh, fitting = sharding.mesh, []
  for axes, size in zip(sharding.spec, shape):
    named = (axes,) if isinstance(axes, str) else axes or ()
    parts = math.prod(mesh.shape[axis] for axis in named)
    fitting.append(axes if size % parts == 0 else None)
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*fitting))


# Random weights --------------------------------------------------------------


def _draw(path: str, shape: names.Shape, seed: int, norm: float) -> np.ndarray:
  """Draws an array from its own generator, which seed and path determine."""
  if len(shape) == 1:
    return np.full(shape, norm, np.float32)
  digest = hashlib.sha256(f'{seed}/{path}'.encode()).digest()
  key = np.frombuffer(digest[:16], np.uint64)
  generator = np.random.Generator(np.random.Philox(key=key))
  array = generator.standard_normal(shape, np.float32)
  array *= np.float32(_fan_in(path, shape) ** -0.5)
  return array


def _fan_in(path: str, shape: tuple[int, ...]) -> int:
  """Returns the number of inputs that each output sums over."""
  if path.endswith('attn_vec_einsum/w'):  # (N, H, D)
    return shape[0] * shape[1]
  if path.endswith('gating_einsum'):  # (2, D, F) or (2, F, D), and D < F.
    return min(shape[1:])
  if path.endswith('input_embedding'):  # (V, D), as the tied output head.
    return shape[1]
  return shape[-2]  # (..., D, H) of the heads, (F, D) of the MLP.
