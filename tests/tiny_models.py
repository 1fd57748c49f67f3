"""Tiny models of each kind with weights, adapters and rows, for tests."""

import dataclasses
import functools

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft.adapters import lora
from gemma_sft.nn import quantize
from gemma_sft.weights import architecture as architecture_lib
from gemma_sft.weights import gguf_writer
from gemma_sft.weights import load
from gemma_sft.weights import names
from gemma_sft.weights import tokenizer_file

# Gemma 1 7B fuses q, k and v; Gemma 4 E2B has inputs per layer and last layers
# that reuse keys and values.
KINDS = {
    '1': dict(generation=1),
    '1_fused': dict(generation=1, num_kv_heads=4),
    '2': dict(generation=2),
    '3': dict(generation=3),
    '4': dict(generation=4),
    '4_shared': dict(
        generation=4, num_layers=3, per_layer_input_dim=8, shared_kv_layers=1)}


@functools.cache
def model(kind: str, **dimensions) -> model_lib.Model:
  """A model with `conftest.DIMENSIONS`, changed by `dimensions`."""
  return model_lib.make_model(
      'custom', **conftest.DIMENSIONS | KINDS[kind] | dimensions)


def changed(model: model_lib.Model, **changes) -> model_lib.Model:
  """A model with another config of the library."""
  config = dataclasses.replace(model.config, **changes)
  return dataclasses.replace(
      model, transformer=model.transformer.clone(config=config))


def hf_config(model: model_lib.Model, **changes) -> dict:
  """The model's config.json in f32, or with other arguments."""
  return architecture_lib.hf_config(
      model.config, model.generation, eos_ids=[1, 106], bos_id=2, pad_id=0,
      **dict(vocab_size=model.config.num_embed, dtype='float32') | changes)


def check_hf_config(model: model_lib.Model, hf, match: str | None = None):
  """Checks a config.json; `match` is the message if it must be refused."""
  arguments = hf, model.config, model.generation, 'x/config.json'
  if match is None:
    architecture_lib.check_hf_config(*arguments)
    return
  with pytest.raises(errors.UserError, match=match):
    architecture_lib.check_hf_config(*arguments)


def gguf_metadata(model: model_lib.Model) -> tuple[str, dict]:
  """The architecture and the metadata of a model's GGUF."""
  config, generation = model.config, model.generation
  return architecture_lib.gguf_metadata(
      config, generation, name='a model',
      context_length=architecture_lib.context_length(config, generation))


def exact_arrays(layout: names.WeightLayout) -> dict[str, np.ndarray]:
  """Arrays of multiples of 2^-10 below 4: adding 1 is exact in f32."""
  rng = np.random.default_rng(0)
  return {path: (rng.integers(-4096, 4096, shape) / 1024).astype(np.float32)
          for path, shape in layout.shapes.items()}


def write_gguf(
    path, model, arrays, proto, *, tensors=None, architecture=None, **metadata):
  """Writes arrays of the library, or these tensors, as a GGUF in f32.

  `metadata` are keys of the architecture; they replace those of the model.
  """
  layout = load.weight_layout(model)
  kind, values = gguf_metadata(model)
  values |= {f'{kind}.{key}': value for key, value in metadata.items()}
  if tensors is None:
    tensors = dict(names.from_library(layout, 'gguf', arrays.__getitem__))
    tensors |= architecture_lib.extra_gguf_tensors(
        model.config, model.generation)
  gguf_writer.write_model(
      path, architecture=architecture or kind,
      metadata=values | tokenizer_file.to_gguf(proto, model.generation),
      shapes={name: tensor.shape for name, tensor in tensors.items()},
      tensors=iter(tensors.items()), quantization='f32',
      n_layers=names.n_layers(layout))
  return path


def tokenizer_with(
    generation: int, pieces=(), *, add=(), **trainer_spec) -> bytes:
  """The built-in tokenizer with other pieces {id: text} and settings.

  `add` are the (text, score, type) of further pieces.
  """
  proto = sentencepiece_model_pb2.ModelProto.FromString(
      tokenizer_file.byte_tokenizer(generation))
  for token, piece in dict(pieces).items():
    proto.pieces[token].piece = piece
  for piece, score, kind in add:
    proto.pieces.add(piece=piece, score=score, type=kind)
  for key, value in trainer_spec.items():
    setattr(proto.trainer_spec, key, value)
  return proto.SerializeToString()


@functools.cache
def params(kind: str, **dimensions):
  """Random f32 weights."""
  return conftest.make_params(model(kind, **dimensions))


def fresh_adapters(
    kind: str, targets='attn/|mlp/', *, rank=3, seed=0, **dimensions):
  """Adapters before the first step."""
  like = model(kind, **dimensions)
  return lora.init_adapters(
      params(kind, **dimensions), rank=rank, targets=targets, seed=seed,
      transposed_gating=like.transposed_gating, unused=like.unused_weights)


def adapters(kind: str, targets='attn/|mlp/', **dimensions):
  """Adapters as after training: A and B are random."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
      lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32),
      fresh_adapters(kind, targets, **dimensions))


def quantised(tree, quantization: str):
  """Weights whose projections are quantised."""
  def each(path, leaf):
    if not quantize.is_quantized('/'.join(k.key for k in path)):
      return leaf
    return jax.tree.map(
        jnp.asarray, quantize.quantize(np.asarray(leaf), quantization))

  return jax.tree_util.tree_map_with_path(each, tree)


def packed_rows(B: int = 2, T: int = 24):
  """Returns (tokens, positions, segment ids): two examples a row, padding."""
  rng = np.random.default_rng(0)
  tokens_BT = rng.integers(3, 512, (B, T)).astype(np.int32)
  positions_BT = np.zeros((B, T), np.int32)
  segments_BT = np.zeros((B, T), np.int32)
  for row, cut in enumerate((9, 13)):
    positions_BT[row, :cut] = np.arange(cut)
    positions_BT[row, cut:-2] = np.arange(T - 2 - cut)
    segments_BT[row, :cut], segments_BT[row, cut:-2] = 1, 2
  return tuple(map(jnp.asarray, (tokens_BT, positions_BT, segments_BT)))


def assert_close(got, wanted, tolerance: float, least: float = 1e-3):
  """Compares trees, each leaf relative to its largest entry."""
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    g, w = np.asarray(g), np.asarray(w)
    np.testing.assert_allclose(
        g, w, rtol=0, atol=tolerance * max(least, np.abs(w).max()))
