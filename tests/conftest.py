"""Eight CPU devices, strict shapes and a small config, for every test."""

import functools
import os

# Before JAX is imported by any test module.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8')

import jaxtyping

# Shape annotations of these modules are checked while they are traced.
_HOOK = jaxtyping.install_import_hook(
    ['gemma_sft.loss', 'gemma_sft.model'], 'beartype.beartype')

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from configs import tiny as tiny_config
from gemma_sft import chat
from gemma_sft import model as model_lib
from gemma_sft.weights import tokenizer_file

# (1, T) broadcast to (B, T) by accident is a wrong sum, not an error.
jax.config.update('jax_numpy_rank_promotion', 'raise')


def _allow_rank_promotion(cls):
  """Spares the library's Gemma 4 blocks, which scale by a (1,) array."""
  strict = cls.__call__

  @functools.wraps(strict)
  def call(*args, **kwargs):
    with jax.numpy_rank_promotion('allow'):
      return strict(*args, **kwargs)

  cls.__call__ = call


model_lib.import_gemma()
from gemma.gm.nn.gemma4 import _modules as modules4

_allow_rank_promotion(modules4.Block)


# Two layers, one local and one global; grouped queries; norms where the
# generation has them. The window is shorter than the rows of the tests.
DIMENSIONS = dict(
    vocab_size=512, num_layers=2, embed_dim=32, hidden_dim=48, num_heads=4,
    num_kv_heads=2, head_dim=16, sliding_window=8, local_layers_per_global=1)


@pytest.fixture(params=(1, 2, 3, 4), ids=lambda g: f'gemma{g}')
def model(request) -> model_lib.Model:
  """A tiny model of each generation in turn."""
  return model_lib.make_model(
      'custom', generation=request.param, **DIMENSIONS)


def make_params(model: model_lib.Model, seed: int = 0):
  """Random f32 weights of a scale at which softcaps and norms matter."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32),
      model_lib.abstract_params(model))


def make_tokenizer(generation: int) -> chat.Tokenizer:
  """The built-in byte tokenizer with the tags of a generation."""
  if generation != 4:
    return chat.Tokenizer(
        tokenizer_file.byte_tokenizer(generation), generation)
  proto = sentencepiece_model_pb2.ModelProto.FromString(
      tokenizer_file.byte_tokenizer(3))
  # Where Gemma 4 has them; the first two ids do not matter.
  for token, piece in ((7, '<|image>'), (8, '<audio|>'), (105, '<|turn>'),
                       (106, '<turn|>')):
    proto.pieces[token].piece = piece
  return chat.Tokenizer(proto.SerializeToString(), 4)


@pytest.fixture
def tokenizer() -> chat.Tokenizer:
  """The built-in byte tokenizer, Gemma 3's turn tags."""
  return chat.Tokenizer(tokenizer_file.byte_tokenizer(3), 3)


@pytest.fixture
def config(tmp_path):
  """`configs/tiny.py` on six records of its own; unlocked for changes."""
  rows = [(f'What is {i} and {i}?', f'It is {2 * i}.') for i in range(1, 7)]
  text = ''.join(f'# INPUT\n{p}\n\n# OUTPUT\n{c}\n\n' for p, c in rows[:4])
  (tmp_path / 'train.txt').write_text(text)
  text = ''.join(f'# INPUT\n{p}\n\n# OUTPUT\n{c}\n\n' for p, c in rows[4:])
  (tmp_path / 'validation.txt').write_text(text)
  config = tiny_config.get_config()
  config.task = 'chat'
  config.data.update(
      train=str(tmp_path / 'train.txt'), test='',
      validation=str(tmp_path / 'validation.txt'), max_length=64)
  return config
