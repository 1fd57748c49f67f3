"""Gemma 4 in config.json and GGUF, compared with transformers and llama.cpp."""

import dataclasses
import functools
import json
import os
import subprocess

import conftest
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tiny_models

from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft.exports import llama_runtime
from gemma_sft.weights import architecture
from gemma_sft.weights import load
from gemma_sft.weights import names
from gemma_sft.weights import safetensors_file
from gemma_sft.weights import tokenizer_file

_LOCAL, _GLOBAL = 'sliding_attention', 'full_attention'
_PIECES = 498  # Of the built-in tokenizer; llama.cpp requires as many rows.


def _small(changes=None, **dimensions):
  """Six layers LLGLLG whose window is shorter than the prompts."""
  model = model_lib.make_model('custom', **dict(
      generation=4, vocab_size=_PIECES, num_layers=6, embed_dim=64,
      hidden_dim=96, num_heads=4, num_kv_heads=2, head_dim=32,
      sliding_window=8, local_layers_per_global=2) | dimensions)
  return tiny_models.changed(model, **(changes or {}))


_SHARED = dict(per_layer_input_dim=16, shared_kv_layers=3)
# The features that distinguish the three dense presets, at a small size.
# 'plain' has none of them, and rope in other proportions.
_FORMS = {
    'plain': _small(dict(
        global_rope_proportion=0.6, global_key_size=48,
        global_base_frequency=20_000, local_base_frequency=500,
        final_logit_softcap=None)),
    'e2b': _small(
        dict(override_kv_shared_ffw_hidden=192), num_kv_heads=1, **_SHARED),
    'e4b': _small(**_SHARED),
    '31b': _small(dict(
        k_eq_v_global=True, num_global_kv_heads=1,
        use_bidirectional_attention='vision'))}


_hf, _gguf = tiny_models.hf_config, tiny_models.gguf_metadata
_check = tiny_models.check_hf_config


# From Google's own text_config: width, MLP, layers, heads, key-value heads,
# those of global layers, window, width of the per-layer inputs, layers that
# share keys and values, values that are keys, double MLP, positions, period.
_KNOWN = {
    'gemma4_e2b': (
        1536, 6144, 35, 8, 1, None, 512, 256, 20, False, True, 131072, 5),
    'gemma4_e4b': (
        2560, 10240, 42, 8, 2, None, 512, 256, 18, False, False, 131072, 6),
    'gemma4_31b': (
        5376, 21504, 60, 32, 16, 4, 1024, 0, 0, True, False, 262144, 6)}
_KEYS = (
    'hidden_size', 'intermediate_size', 'num_hidden_layers',
    'num_attention_heads', 'num_key_value_heads', 'num_global_key_value_heads',
    'sliding_window', 'hidden_size_per_layer_input', 'num_kv_shared_layers',
    'attention_k_eq_v', 'use_double_wide_mlp', 'max_position_embeddings')


def test_all_presets_are_known():
  assert set(_KNOWN) == {
      name for name, g in model_lib.PRESETS.items() if g == 4}


@pytest.mark.parametrize('name', _KNOWN)
def test_hf_config_of_presets_is_googles(name):
  *values, period = _KNOWN[name]
  hf = _hf(model_lib.make_model(name))
  assert [hf[key] for key in _KEYS] == values
  assert hf['layer_types'] == (
      (period - 1) * [_LOCAL] + [_GLOBAL]) * (values[2] // period)
  assert hf['rope_parameters'] == {
      _LOCAL: {'rope_type': 'default', 'rope_theta': 10_000.0},
      _GLOBAL: {'rope_type': 'proportional', 'partial_rotary_factor': 0.25,
                'rope_theta': 1_000_000.0}}
  assert hf.items() >= {
      'architectures': ['Gemma4ForCausalLM'], 'model_type': 'gemma4_text',
      'head_dim': 256, 'global_head_dim': 512, 'vocab_size': 262144,
      'vocab_size_per_layer_input': 262144, 'final_logit_softcapping': 30.0,
      'rms_norm_eps': 1e-6, 'hidden_activation': 'gelu_pytorch_tanh',
      'tie_word_embeddings': True, 'bos_token_id': 2, 'eos_token_id': [1, 106],
      'pad_token_id': 0, 'dtype': 'float32'}.items()


def test_gguf_metadata():
  name, metadata = _gguf(model_lib.make_model('gemma4_e2b'))
  assert name == 'gemma4'
  assert metadata == {
      'general.type': 'model', 'general.name': 'a model',
      **{f'gemma4.{key}': value for key, value in {
          'context_length': 131072, 'embedding_length': 1536, 'block_count': 35,
          'feed_forward_length': 15 * [6144] + 20 * [12288],
          'attention.head_count': 8, 'attention.head_count_kv': 1,
          'attention.key_length': 512, 'attention.value_length': 512,
          'attention.key_length_swa': 256, 'attention.value_length_swa': 256,
          'attention.layer_norm_rms_epsilon': 1e-6,
          'attention.sliding_window': 512,
          'attention.sliding_window_pattern':
              7 * [True, True, True, True, False],
          'attention.shared_kv_layers': 20,
          'embedding_length_per_layer_input': 256,
          'rope.dimension_count': 512, 'rope.dimension_count_swa': 256,
          'rope.freq_base': 1e6, 'rope.freq_base_swa': 1e4,
          'final_logit_softcapping': 30.0}.items()}}
  # Of 31B, heads by layer.
  _, metadata = _gguf(model_lib.make_model('gemma4_31b'))
  assert metadata['gemma4.attention.head_count_kv'] == (
      10 * [16, 16, 16, 16, 16, 4])
  assert metadata['gemma4.feed_forward_length'] == 21504


@pytest.mark.parametrize('changes, ones, pairs', [
    ({}, 64, 256),
    # 0.3 * 50 // 2 = 7 and not 8: rounded down, as the library does.
    (dict(global_key_size=50, global_rope_proportion=0.3), 7, 25)])
def test_rope_freqs_stop_the_pairs_that_are_not_rotated(changes, ones, pairs):
  model = tiny_models.changed(model_lib.make_model('gemma4_e4b'), **changes)
  (name, freqs), = architecture.extra_gguf_tensors(model.config, 4).items()
  assert name == 'rope_freqs.weight'
  assert freqs.dtype == np.float32
  np.testing.assert_array_equal(
      freqs, np.float32(ones * [1] + (pairs - ones) * [1e30]))


def test_without_global_layers_there_are_no_rope_freqs():
  model = _small(num_layers=2)
  assert not architecture.extra_gguf_tensors(model.config, 4)
  assert _gguf(model)


_SHARING = _small(**_SHARED).config.kv_cache_sharing_config


@pytest.mark.parametrize('message, changes, dimensions, gguf', [
    ('experts', dict(enable_moe=True), {}, False),
    ('queries without a scale', dict(qk_norm_with_scale=False), {}, False),
    ('norm after attention', dict(use_post_ffw_norm=False), {}, False),
    ('softcap in attention', dict(attn_logits_soft_cap=50.0), {}, False),
    ('no sliding window', dict(sliding_window_size=None), {}, False),
    ('rotate 0.5 of the head', dict(local_rope_proportion=0.5), {}, False),
    ('scaled rope', dict(global_scale_factor=8.0), {}, False),
    ('LLGLLG of which the last 4', {}, _SHARED | dict(shared_kv_layers=4),
     False),
    ('LLGLLG of which the last 3', dict(
        kv_cache_sharing_config=dataclasses.replace(
            _SHARING, share_local=False)), _SHARED, False),
    # With transformers 5.23 these are a TypeError, tensors of another shape,
    # another kind of last layer (logits 7.7 off) and no key.
    ('no per-layer inputs', {}, dict(shared_kv_layers=3), True),
    ('1 key-value heads', dict(num_global_kv_heads=1), {}, True),
    ('LLGL', {}, dict(num_layers=4), True),
    ('width of 100', dict(override_kv_shared_ffw_hidden=100), _SHARED, True)])
def test_what_cannot_be_expressed_is_refused(
    message, changes, dimensions, gguf):
  model = _small(changes, **dimensions)
  for build in (_hf,) if gguf else (_hf, _gguf):
    with pytest.raises(errors.UserError, match=message):
      build(model)
  if gguf:
    assert _gguf(model)


@pytest.mark.parametrize('form', _FORMS)
def test_the_own_config_passes(form):
  model = _FORMS[form]
  _check(model, json.loads(json.dumps(_hf(model))))


def test_a_multimodal_config_without_the_defaults_passes():
  # Left out: what transformers fills in.
  text = {
      'model_type': 'gemma4_text', 'hidden_size': 2560,
      'intermediate_size': 10240, 'num_hidden_layers': 42,
      'num_key_value_heads': 2, 'num_kv_shared_layers': 18,
      'final_logit_softcapping': 30.0}
  hf = {'model_type': 'gemma4', 'text_config': text}
  model = model_lib.make_model('gemma4_e4b')
  _check(model, hf)
  _check(model, hf | {'tie_word_embeddings': False}, 'tie_word_embeddings')
  text['final_logit_softcapping'] = None
  _check(model, hf, 'text_config.final_logit')


def test_a_config_saved_by_transformers_passes():
  model = _FORMS['31b']
  hf = _hf(model)
  del hf['global_head_dim'], hf['num_global_key_value_heads']
  hf['per_layer_config'] = {
      '2': {'head_dim': 64, 'num_key_value_heads': 1},
      '5': {'head_dim': 64, 'num_key_value_heads': 1}}
  _check(model, hf)
  hf['per_layer_config']['5']['num_key_value_heads'] = 2
  _check(model, hf, 'num_key_value_heads of each')


@pytest.mark.parametrize('key, value', [
    ('model_type', 'gemma3_text'), ('hidden_size', 65),
    ('intermediate_size', 97), ('num_hidden_layers', 7),
    ('num_attention_heads', 2), ('num_key_value_heads', 4), ('head_dim', 31),
    ('global_head_dim', 32), ('sliding_window', 9),
    ('layer_types', 5 * [_LOCAL] + [_GLOBAL]),
    ('final_logit_softcapping', None), ('hidden_size_per_layer_input', 0),
    ('attention_k_eq_v', True), ('num_kv_shared_layers', 2),
    ('use_double_wide_mlp', True), ('enable_moe_block', True),
    ('attention_bias', True), ('tie_word_embeddings', False),
    ('rms_norm_eps', 1e-5), ('hidden_activation', 'gelu'),
    ('use_bidirectional_attention', 'all'),
    ('quantization_config', {'bits': 4}),
    (f'{_LOCAL}.rope_theta', 1e6), (f'{_GLOBAL}.rope_theta', 1e4),
    (f'{_GLOBAL}.rope_type', 'default'), (f'{_GLOBAL}.factor', 8.0),
    (f'{_GLOBAL}.partial_rotary_factor', 0.5)])
def test_a_contradiction_is_named(key, value):
  model = _FORMS['e4b']
  hf = json.loads(json.dumps(_hf(model)))
  kind, _, name = key.rpartition('.')
  (hf['rope_parameters'][kind] if kind else hf)[name] = value
  _check(model, hf, key.removeprefix('global_'))


_COMPARED = ('plain', 'e2b', '31b')  # 'e4b' has less than 'e2b'.
_PROMPT = [2, *np.random.default_rng(1).integers(110, _PIECES, 39).tolist()]


def _random_arrays(model):
  """Weights so large that every norm, scale and window affects the logits.

  The logits reach 25 with a standard deviation of 5.
  """
  rng = np.random.default_rng(0)
  arrays = {}
  for path, shape in load.weight_layout(model).shapes.items():
    size = 0.6 if path.endswith(('embedding', 'embeddings')) else 0.3
    array = (rng.uniform(0.5, 1.5, shape) if path.endswith('scale')
             else rng.normal(0, size, shape))
    arrays[path] = np.asarray(array, np.float32)
  return arrays


def _forward(model, params):
  tokens_BT = jnp.asarray(_PROMPT)[None]
  x_BTD = model_lib.hidden_states(
      model, params, tokens_BT, jnp.arange(len(_PROMPT))[None],
      jnp.ones_like(tokens_BT))
  return model_lib.logits(model, params, x_BTD[0])


@pytest.fixture(scope='module')
def references():
  """form -> (model, arrays, the library's logits_TV of the prompt)."""
  found = {}
  for form in _COMPARED:
    model = _FORMS[form]
    arrays = _random_arrays(model)
    params = traverse_util.unflatten_dict(
        jax.tree.map(jnp.asarray, arrays), sep='/')
    # One compilation takes a second, operation by operation four.
    logits_TV = jax.jit(functools.partial(_forward, model))(params)
    found[form] = model, arrays, np.asarray(logits_TV, np.float64)
  return found


_SCRIPT = """
import sys
import numpy, torch, transformers
prompt = torch.tensor([[int(i) for i in sys.argv[1].split()]])
for folder in sys.argv[2:]:
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, output_loading_info=True)
  assert type(model).__name__ == 'Gemma4ForCausalLM'
  assert not any(info.values()), info
  with torch.no_grad():
    numpy.save(folder + '/logits.npy', model(prompt).logits[0].numpy())
"""


@pytest.mark.skipif(
    not os.path.exists(conftest.RUNTIME_PYTHON),
    reason=f'no transformers: {conftest.RUNTIME_PYTHON} does not exist')
def test_logits_are_transformers(references, tmp_path):
  for form, (model, arrays, _) in references.items():
    (tmp_path / form).mkdir()
    (tmp_path / form / 'config.json').write_text(json.dumps(_hf(model)))
    safetensors_file.write_file(
        tmp_path / form / 'model.safetensors', dict(names.from_library(
            load.weight_layout(model), 'hf', arrays.__getitem__)))
  done = subprocess.run(
      [conftest.RUNTIME_PYTHON, '-c', _SCRIPT, ' '.join(map(str, _PROMPT)),
       *(str(tmp_path / form) for form in references)],
      capture_output=True, text=True, timeout=240)
  assert done.returncode == 0, done.stderr[-2000:]
  for form, (_, _, expected) in references.items():
    logits = np.load(tmp_path / form / 'logits.npy')
    # Both in f32: 1e-4 was measured, from sums in another order.
    np.testing.assert_allclose(logits, expected, atol=1e-3, err_msg=form)


@pytest.fixture
def serve(references, tmp_path):
  """A function from (form, tokenizer) to a llama-server of its GGUF."""
  def start(form, proto):
    try:
      binary = llama_runtime.find_server(None)
    except errors.UserError as error:
      pytest.skip(str(error))
    model, arrays, _ = references[form]
    path = tiny_models.write_gguf(tmp_path / 'x.gguf', model, arrays, proto)
    return llama_runtime.Server(binary, path, context_length=512, threads=2)

  return start


@pytest.mark.parametrize('form', _COMPARED)
def test_logits_are_llama_cpps(references, serve, form):
  _, _, logits = references[form]
  with serve(form, tokenizer_file.byte_tokenizer(4)) as server:
    for length in (3, 9, 24, len(_PROMPT)):
      theirs = server.logprobs(_PROMPT[:length])
      ours = logits[length - 1] - np.logaddexp.reduce(logits[length - 1])
      # llama.cpp computes GELU by an f16 table: 0.003 and 4e-10 were measured.
      # The smallest mistake tried, one pair too many in `rope_freqs`, is 0.06.
      assert np.abs(ours - theirs).max() < 0.02
      assert np.sum(np.exp(ours) * (ours - theirs)) < 1e-8


def test_llama_cpp_tokenizes_as_sentencepiece(serve):
  # The built-in tokenizer with pieces of every kind that a Gemma 4 has.
  proto = tiny_models.tokenizer_with(4, {
      7: '<|image|>', 8: '<|channel>', 9: '<channel|>', 10: '\u2581\u2581',
      11: '\n\n', 12: '<b>'})
  processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
  with serve('plain', proto) as server:
    for text in (
        '', ' ', 'the other thing', '  two   three    four', 'a\n\n\nb\n',
        'aaa ththe hehe ininging', '<|turn>user\nhi<turn|>\n', '<b>the</b>',
        '<|channel>x<channel|>', '<unused3><mask>', '\t\r\x01', 'caf\u00e9',
        '\U0001f600 \u0928\u092e', '<0x0A>', 'you and the iton for'):
      assert server.tokenize(text, parse_special=True) == (
          processor.encode(text)), text
    # llama.cpp adds BOS to a text.
    assert server.complete('the other', n_predict=4) == server.complete(
        [2, *processor.encode('the other')], n_predict=4)
