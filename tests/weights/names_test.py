"""The tables of names: exact in both directions, for every generation."""

import dataclasses

import numpy as np
import pytest
import tiny_models

from gemma_sft import errors
from gemma_sft import model
from gemma_sft.weights import load
from gemma_sft.weights import names

_SIZES = dict(
    layers=2, vocab=11, embed=8, hidden=12, heads=4, kv_heads=1, head_dim=6)
_LAYOUTS = {
    'gemma1_mqa': dict(generation=1, transposed_gating=False),
    'gemma1_mha': dict(generation=1, transposed_gating=False, kv_heads=4),
    'gemma2_2b': dict(generation=2, transposed_gating=False, kv_heads=2),
    'gemma2_9b': dict(generation=2, transposed_gating=True, kv_heads=2),
    'gemma3': dict(generation=3, transposed_gating=True)}


def _layout(name: str) -> names.WeightLayout:
  return names.make_weight_layout(**(_SIZES | _LAYOUTS[name]))


@pytest.mark.parametrize('form', names.FORMS)
@pytest.mark.parametrize('name', [*_LAYOUTS, 'gemma4'])
def test_round_trip_is_exact_and_has_the_announced_shapes(name, form):
  layout = load.weight_layout(tiny_models.model(
      '4_shared', num_layers=6, shared_kv_layers=3, local_layers_per_global=2)
  ) if name == 'gemma4' else _layout(name)
  arrays = tiny_models.exact_arrays(layout)
  file = dict(names.from_library(layout, form, arrays.__getitem__))
  assert {k: v.shape for k, v in file.items()} == names.file_shapes(
      layout, form)
  back = dict(names.to_library(layout, form, file.__getitem__))
  assert back.keys() == arrays.keys()
  for path, array in arrays.items():
    np.testing.assert_array_equal(back[path], array, err_msg=path)


@pytest.mark.parametrize('name', _LAYOUTS)
def test_layout_is_the_tree_of_the_library(name):
  sizes = _SIZES | _LAYOUTS[name]
  built = model.make_model(
      'custom', generation=sizes['generation'], vocab_size=sizes['vocab'],
      num_layers=sizes['layers'], embed_dim=sizes['embed'],
      hidden_dim=sizes['hidden'], num_heads=sizes['heads'],
      num_kv_heads=sizes['kv_heads'], head_dim=sizes['head_dim'])
  built = tiny_models.changed(
      built, transpose_gating_einsum=sizes['transposed_gating'])
  assert load.weight_layout(built) == _layout(name)


@pytest.mark.parametrize('form', names.FORMS)
@pytest.mark.parametrize('name', _LAYOUTS)
def test_every_projection_computes_what_the_library_computes(name, form):
  layout = _layout(name)
  arrays = tiny_models.exact_arrays(layout)
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


@pytest.mark.parametrize('name, library, hf, gguf', [
    ('gemma1_mqa', 'layer_1/pre_ffw_norm/scale',
     'model.layers.1.post_attention_layernorm.weight', 'blk.1.ffn_norm.weight'),
    ('gemma3', 'layer_1/pre_ffw_norm/scale',
     'model.layers.1.pre_feedforward_layernorm.weight',
     'blk.1.ffn_norm.weight'),
    ('gemma3', 'layer_0/attn/_key_norm/scale',
     'model.layers.0.self_attn.k_norm.weight', 'blk.0.attn_k_norm.weight')])
def test_pinned_names(name, library, hf, gguf):
  assert (library, (hf,), (gguf,)) in {
      (row.library, row.hf, row.gguf) for row in names.rows(_layout(name))}


def test_norms_are_stored_with_an_offset_of_one_in_gguf_only():
  layout = _layout('gemma3')
  arrays = tiny_models.exact_arrays(layout)
  for form, offset in (('hf', 0), ('gguf', 1)):
    file = dict(names.from_library(layout, form, arrays.__getitem__))
    name = {'hf': 'model.norm.weight', 'gguf': 'output_norm.weight'}[form]
    np.testing.assert_array_equal(
        file[name], arrays['final_norm/scale'] + offset)


@pytest.mark.parametrize('file_vocab', [9, 13])
def test_rows_beyond_the_vocabulary_are_cut_or_zero(file_vocab):
  layout = dataclasses.replace(_layout('gemma3'), file_vocab=file_vocab)
  arrays = tiny_models.exact_arrays(layout)
  file = dict(names.from_library(layout, 'hf', arrays.__getitem__))
  got = file['model.embed_tokens.weight']
  assert got.shape == (file_vocab, 8)
  assert names.file_shapes(layout, 'hf')['model.embed_tokens.weight'] == (
      file_vocab, 8)
  np.testing.assert_array_equal(got[:9], arrays[names.EMBEDDING][:9])
  np.testing.assert_array_equal(got[11:], 0)
  back = dict(names.to_library(layout, 'hf', file.__getitem__))
  assert back[names.EMBEDDING].shape == (11, 8)


def test_an_array_without_a_name_is_an_error():
  layout = _layout('gemma1_mqa')
  shapes = layout.shapes | {'layer_0/attn/_key_norm/scale': (6,)}
  with pytest.raises(errors.UserError, match='layer_0/attn/_key_norm/scale'):
    names.rows(dataclasses.replace(layout, shapes=shapes))
