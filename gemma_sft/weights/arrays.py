"""Base weights one array at a time, for what must not hold a whole model."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import hashlib
from typing import Any

import numpy as np

from gemma_sft import errors
from gemma_sft.weights import names
from gemma_sft.weights import safetensors_file

# What the library leaves out of a text model when it restores.
_MULTIMODAL = (
    'vision_encoder/',
    'embedder/mm_input_projection/',
    'embedder/mm_soft_embedding_norm/',
)


def open_arrays(
    resolved: Any, layout: names.Layout, *, seed: int = 0
) -> Callable[[str], np.ndarray]:
  """Returns a function from a library path to the array, in its own dtype.

  Args:
    resolved: From `weights.resolve`.
    layout: The model, from `weights.make_layout`.
    seed: For random weights only.

  Raises:
    UserError: Names all missing, surplus and misshapen arrays.
  """
  if resolved.kind == 'random':
    plain_norms = has_plain_norms(layout.shapes)
    return lambda path: draw(
        path, layout.shapes[path], np.dtype(np.float32), seed, plain_norms
    )
  if resolved.kind == 'hf':
    return _open_hf(resolved.path, layout)
  return open_checkpoint(resolved.path, layout.shapes)


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
) -> Callable[[str], np.ndarray]:
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
