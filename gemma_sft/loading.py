"""From a config's sections to the things that every entry point needs."""

import dataclasses
import os
from typing import Any
from typing import Sequence

import jax
import jax.numpy as jnp

from gemma_sft import audit
from gemma_sft import cache
from gemma_sft import chat
from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft import records as records_lib
from gemma_sft import sharding
from gemma_sft import weights
from gemma_sft.weights import tokenizer_file


def enable_compilation_cache() -> None:
  """Keeps compiled programs between runs."""
  folder = cache.folder('compiled')
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 1.0)


def choose_dtype(name: str) -> tuple[Any, str]:
  """Returns the dtype of the frozen base and of compute, and why.

  Args:
    name: 'auto', 'bfloat16' or 'float32'.
  """
  if name != 'auto':
    return jnp.dtype(name), 'config.model.dtype says so'
  device = jax.local_devices()[0]
  if device.platform == 'cpu':
    return jnp.dtype('float32'), 'a CPU: XLA has no fast bfloat16 there'
  if device.platform == 'gpu':
    # By the card: libraries may call bfloat16 supported where it is emulated.
    capability = float(getattr(device, 'compute_capability', 0) or 0)
    if capability < 8.0:
      return jnp.dtype('float32'), (
          f'compute capability {capability} has no bfloat16')
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
  if path == 'auto':
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
) -> model_lib.Params:
  """Returns the base weights, each array straight in its shards."""
  weights.check_config(resolved, model)
  abstract = model_lib.abstract_params(model)
  return weights.load(
      resolved, abstract, dtype=dtype,
      shardings=sharding.tree_shardings(abstract, mesh), seed=seed,
      layout=weights.make_layout(model))


@dataclasses.dataclass(frozen=True)
class Split:
  """One split: what was read, what is trained, what the audit counted."""

  records: list[records_lib.Record]
  examples: list[chat.Example]
  report: audit.Report


def load_splits(
    section: Any,
    names: Sequence[str],
    task: Any,
    tokenizer: chat.Tokenizer,
) -> dict[str, Split]:
  """Reads, renders and audits splits of `config.data`; unset ones are left out.

  Raises:
    UserError: for the first thing wrong with a file, a row or a split.
  """
  splits, prompts = {}, {}
  for name in names:
    if not section[name]:
      continue
    records = records_lib.read(
        section[name], format=section.format, split=name,
        columns=config_lib.parse_columns(section.columns))
    conversations = [task.to_messages(r) for r in records]
    examples = [
        render(c, tokenizer, r.where) for c, r in zip(conversations, records)]
    examples, report = audit.check_split(
        name, examples, tokenizer, max_length=section.max_length,
        max_cut_share=section.max_cut_share,
        n_control_text=sum(
            chat.has_control_text(text) for c in conversations
            for text in [_whole_text(c)]))
    splits[name] = Split(records, examples, report)
    prompts[name] = [
        (_prompt_text(c), r.where) for c, r in zip(conversations, records)]
  audit.check_leakage(prompts)
  return splits


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

  Raises:
    UserError: if another process has it, or it cannot be written.
  """
  import fcntl

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
        f'workdir {workdir} is in use by process {file.read().strip()}',
        'one run a workdir', 'wait for it, stop it, or choose another'
        ' --workdir') from None
  file.truncate(0)
  file.write(str(os.getpid()))
  file.flush()
  return file
