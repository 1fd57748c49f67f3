"""Base weights one array at a time, for what must not hold a whole model."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import hashlib
import math
import re
from typing import Any

from absl import logging
import jax
import numpy as np

from gemma_sft import errors
from gemma_sft.nn import quantize
from gemma_sft.weights import names
from gemma_sft.weights import safetensors_file

# What the library leaves out of a text model when it restores.
_MULTIMODAL = (
    'vision_encoder/',
    'embedder/mm_input_projection/',
    'embedder/mm_soft_embedding_norm/',
)


Read = Callable[[str], np.ndarray]


def open_arrays(
    resolved: Any,
    shapes: Mapping[str, names.Shape],
    *,
    layout: names.Layout | None = None,
    seed: int = 0,
) -> Read:
  """Returns a function from a library path to the array, in its own dtype.

  Args:
    resolved: From `load.resolve`.
    shapes: Library path -> shape that is wanted.
    layout: For a Hugging Face folder only, from `load.make_layout`.
    seed: For random weights only.

  Raises:
    UserError: Names all missing, surplus and misshapen arrays.
  """
  if resolved.kind == 'random':
    plain_norms = has_plain_norms(shapes)
    return lambda path: draw(
        path, shapes[path], np.dtype(np.float32), seed, plain_norms
    )
  if resolved.kind == 'hf':
    return _open_hf(resolved.path, layout)
  return open_checkpoint(resolved.path, shapes)


def _open_hf(path, layout):
  folder = safetensors_file.open_folder(path)
  shapes = names.file_shapes(layout, 'hf')
  embedding = names.tensor_of(layout, names.EMBEDDING, 'hf')
  found_rows = folder.shapes.get(embedding, (0,))[0]
  rows, columns = shapes[embedding]
  if names.is_padding(rows, found_rows):
    shapes[embedding] = (found_rows, columns)
  names.check_shapes(folder.shapes, shapes, str(path))
  return lambda wanted: names.read_library_array(
      layout, 'hf', folder.read, wanted
  )


def open_checkpoint(
    path: str, shapes: Mapping[str, names.Shape], prefix: tuple[str, ...] = ()
) -> Read:
  """Returns the same of an Orbax checkpoint (NESTED or FLAT).

  Args:
    path: The checkpoint.
    shapes: Library path -> shape that is wanted.
    prefix: Keys of its tree below which the parameters lie.
  """
  from orbax import checkpoint as ocp

  found = _entries(path, prefix)
  target = dict(shapes)
  if (
      names.EMBEDDING in found
      and names.is_padding(
          shapes[names.EMBEDDING][0], found[names.EMBEDDING][1].shape[0])
  ):
    target[names.EMBEDDING] = tuple(found[names.EMBEDDING][1].shape)
  names.check_shapes(
      {name: tuple(leaf.shape) for name, (_, leaf) in found.items()},
      target,
      f'checkpoint {path}',
  )
  if names.EMBEDDING in found:
    log_padding(target[names.EMBEDDING][0], shapes[names.EMBEDDING][0])

  def read(name):
    keys, leaf = found[name]
    item, restore_args = leaf, ocp.RestoreArgs(restore_type=np.ndarray)
    for key in reversed(keys):
      item, restore_args = {key: item}, {key: restore_args}
    with ocp.PyTreeCheckpointer() as checkpointer:
      array = checkpointer.restore(
          path,
          args=ocp.args.PyTreeRestore(
              item=item, restore_args=restore_args, partial_restore=True
          ),
      )
    for key in keys:
      array = array[key]
    if name == names.EMBEDDING:
      array = names.resize_rows(array, shapes[name][0])
    return array

  return read


def log_padding(found: int, wanted: int) -> None:
  """Logs how the embedding's rows of a checkpoint are made those wanted."""
  if found != wanted:
    logging.warning(
        'The checkpoint has %d embedding rows, the model %d: %s.',
        found,
        wanted,
        'the rows beyond the vocabulary are cut'
        if wanted < found
        else 'the missing rows are zero, so their logits are 0, not -inf',
    )


def checkpoint_shapes(path: str) -> dict[str, names.Shape]:
  """Returns path -> shape in a NESTED or FLAT checkpoint, by NESTED names."""
  return {
      name: tuple(leaf.shape) for name, (_, leaf) in _entries(path).items()
  }


def _entries(path, prefix=()) -> dict[str, tuple[tuple[str, ...], Any]]:
  """Returns NESTED name -> (keys of the checkpoint's tree, metadata)."""
  from orbax import checkpoint as ocp

  with ocp.PyTreeCheckpointer() as checkpointer:
    metadata = checkpointer.metadata(path).item_metadata
  if metadata is None:
    raise errors.UserError(
        f'checkpoint {path}: no metadata of its arrays',
        'a checkpoint of parameters, saved by Orbax (NESTED or FLAT)',
        'give the folder that holds _METADATA',
    )
  entries = {}
  for keys, leaf in _leaves(metadata.tree):
    if keys[: len(prefix)] != prefix:
      continue
    name = '/'.join(keys[len(prefix) :])
    if name.startswith('transformer/'):
      # The official FLAT files: 'transformer/' before every path, and a 'w'
      # in the MLP that the modules do not have.
      name = name.removeprefix('transformer/')
      if '/mlp/' in name:
        name = name.removesuffix('/w')
    elif name.startswith('SigLiPFromPatches_0/'):
      name = f'vision_encoder/{name}'
    if not name.startswith(_MULTIMODAL):
      entries[name] = keys, leaf
  return entries


def _leaves(tree, keys=()):
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, (*keys, key))
    else:
      yield (*keys, key), value


# Onto devices ----------------------------------------------------------------


def load(
    read: Read,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    *,
    stacked: bool,
    quantization: str,
) -> dict[str, Any]:
  """Returns library path -> array or `quantize.Quantized` in its shards.

  Arrays are read, quantised and placed one at a time: the host holds one, with
  `stacked` all layers of one, and the devices never one in full precision that
  is to be quantised.

  Args:
    read: From `open_arrays`.
    wanted: Library path -> shape, dtype and sharding; the dtype is not for
      what is quantised.
    stacked: Joins 'layer_<i>/x' of all layers i as 'layers/x', along a leading
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
  # In the order of `wanted`: all hosts read together.
  for path, leaf in wanted.items():
    if path not in grouped:
      loaded[path] = _place(read_placeable(path), leaf.sharding)
  for name, paths in groups.items():
    loaded[name] = _place(
        _read_stack(read_placeable, paths),
        _with_layers(wanted[paths[0]].sharding),
    )
  return loaded


def _layers_by_name(paths: Iterable[str]) -> dict[str, list[str]]:
  """Returns 'layers/x' -> 'layer_0/x', 'layer_1/x', ..."""
  groups = {}
  for path in paths:
    match = re.fullmatch(r'layer_(\d+)/(.*)', path)
    if match:
      layers = groups.setdefault(f'layers/{match[2]}', {})
      layers[int(match[1])] = path
  return {
      name: [layers[i] for i in range(len(layers))]
      for name, layers in groups.items()
  }


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
  """Returns the sharding of a stack of what has this one."""
  if isinstance(sharding, jax.sharding.NamedSharding):
    spec = jax.sharding.PartitionSpec(None, *sharding.spec)
    return jax.sharding.NamedSharding(sharding.mesh, spec)
  return sharding


def _place(array, sharding):
  """Puts an array, or the two of a quantised weight, into shards."""
  if isinstance(array, quantize.Quantized):
    return jax.tree.map(
        lambda leaf: _place(leaf, _fitting(sharding, leaf.shape)), array
    )
  return jax.make_array_from_callback(
      array.shape, sharding, lambda index: array[index]
  )


def _fitting(sharding, shape):
  """Leaves out mesh axes that do not divide; the weight is wider than these."""
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return sharding
  mesh, fitting = sharding.mesh, []
  for axes, size in zip(sharding.spec, shape):
    named = (axes,) if isinstance(axes, str) else axes or ()
    parts = math.prod(mesh.shape[axis] for axis in named)
    fitting.append(axes if size % parts == 0 else None)
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*fitting))


# Random weights --------------------------------------------------------------


def has_plain_norms(paths: Iterable[str]) -> bool:
  """Whether norms multiply by w (Gemma 4) rather than by 1 + w."""
  return any(path.endswith('skip_scale') for path in paths)


def draw(
    path: str,
    shape: names.Shape,
    dtype: Any,
    seed: int,
    plain_norms: bool,
) -> np.ndarray:
  """Draws an array from a generator of its own, keyed by seed and path."""
  if len(shape) == 1:
    return np.full(shape, float(plain_norms), dtype)
  digest = hashlib.sha256(f'{seed}/{path}'.encode()).digest()
  key = np.frombuffer(digest[:16], np.uint64)
  generator = np.random.Generator(np.random.Philox(key=key))
  array = generator.standard_normal(shape, np.float32)
  array *= np.float32(_fan_in(path, shape) ** -0.5)
  return array.astype(dtype)


def _fan_in(path: str, shape: tuple[int, ...]) -> int:
  """Returns how many inputs each output of the array sums over."""
  if path.endswith('attn_vec_einsum/w'):  # (N, H, D)
    return shape[0] * shape[1]
  if path.endswith('gating_einsum'):  # (2, D, F) or (2, F, D), and D < F.
    return min(shape[1:])
  if path.endswith('input_embedding'):  # (V, D), as the tied output head.
    return shape[1]
  return shape[-2]  # (..., D, H) of the heads, (F, D) of the MLP.
