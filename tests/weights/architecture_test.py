"""config.json and GGUF metadata describe what the library computes."""

import copy

import conftest
import pytest
import tiny_models

from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft.weights import architecture
from gemma_sft.weights import expressible

_MODEL_TYPES = {1: 'gemma', 2: 'gemma2', 3: 'gemma3_text'}
# From Google's own files: width, MLP, layers, heads, key-value heads, head
# width, query_pre_attn_scalar, window, positions, factor of the global rope.
_KNOWN = {
    'gemma1_2b': (2048, 16384, 18, 8, 1, 256, None, None, 8192, 1),
    'gemma1_7b': (3072, 24576, 28, 16, 16, 256, None, None, 8192, 1),
    'gemma2_2b': (2304, 9216, 26, 8, 4, 256, 256, 4096, 8192, 1),
    'gemma2_9b': (3584, 14336, 42, 16, 8, 256, 256, 4096, 8192, 1),
    'gemma2_27b': (4608, 36864, 46, 32, 16, 128, 144, 4096, 8192, 1),
    'gemma3_270m': (640, 2048, 18, 4, 1, 256, 256, 512, 32768, 1),
    'gemma3_1b': (1152, 6912, 26, 4, 1, 256, 256, 512, 32768, 1),
    'gemma3_4b': (2560, 10240, 34, 8, 4, 256, 256, 1024, 131072, 8),
    'gemma3_12b': (3840, 15360, 48, 16, 8, 256, 256, 1024, 131072, 8),
    'gemma3_27b': (5376, 21504, 62, 32, 16, 128, 168, 1024, 131072, 8)}


_hf, _gguf = tiny_models.hf_config, tiny_models.gguf_metadata
_check = tiny_models.check_hf_config


def _assert_same(got, expected):
  assert got == expected
  # The strict configs of transformers 5 accept no float for an int, and a
  # GGUF has a type for each.
  for key, value in expected.items():
    assert type(got[key]) is type(value), key


def test_all_presets_are_known():
  assert set(_KNOWN) == {
      name for name, g in model_lib.PRESETS.items() if g < 4}


def test_rows_and_dtype_are_those_of_the_exported_arrays():
  hf = tiny_models.hf_config(
      tiny_models.model('2'), vocab_size=500, dtype='bfloat16')
  assert (hf['vocab_size'], hf['dtype'], hf['torch_dtype']) == (
      500, 'bfloat16', 'bfloat16')


@pytest.mark.parametrize('name', _KNOWN)
def test_config_json_of_the_presets(name):
  model = model_lib.make_model(name)
  (width, hidden, layers, heads, kv_heads, head_dim, scalar, window,
   positions, factor) = _KNOWN[name]
  generation = model.generation
  expected = {
      'architectures': [f'Gemma{generation if generation > 1 else ""}'
                        'ForCausalLM'],
      'model_type': _MODEL_TYPES[generation],
      'vocab_size': {1: 256128, 2: 256128, 3: 262144}[generation],
      'hidden_size': width, 'intermediate_size': hidden,
      'num_hidden_layers': layers, 'num_attention_heads': heads,
      'num_key_value_heads': kv_heads, 'head_dim': head_dim,
      'max_position_embeddings': positions, 'rms_norm_eps': 1e-6,
      'hidden_activation': 'gelu_pytorch_tanh',
      'attention_bias': False, 'attention_dropout': 0.0,
      'tie_word_embeddings': True,
      'bos_token_id': 2, 'eos_token_id': [1, 106], 'pad_token_id': 0,
      'dtype': 'float32', 'torch_dtype': 'float32',
      'rope_theta': 1e6 if generation == 3 else 1e4, 'rope_scaling': None,
      'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4}}
  if generation == 1:
    expected['hidden_act'] = 'gelu_pytorch_tanh'
  else:
    period = {2: 2, 3: 6}[generation]
    expected |= {
        'query_pre_attn_scalar': scalar, 'sliding_window': window,
        'layer_types': ['full_attention' if i % period == period - 1
                        else 'sliding_attention' for i in range(layers)],
        'attn_logit_softcapping': {2: 50.0, 3: None}[generation],
        'final_logit_softcapping': {2: 30.0, 3: None}[generation]}
  if generation == 3:
    scaling = {'rope_type': 'linear', 'factor': 8.0}
    expected |= {
        'rope_local_base_freq': 1e4,
        'rope_scaling': scaling if factor == 8 else None,
        'rope_parameters': {
            'full_attention': {
                **(scaling if factor == 8 else {'rope_type': 'default'}),
                'rope_theta': 1e6},
            'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4}}}
  _assert_same(_hf(model), expected)
  _check(model, _hf(model))


@pytest.mark.parametrize('name', _KNOWN)
def test_metadata_of_the_presets(name):
  model = model_lib.make_model(name)
  (width, hidden, layers, heads, kv_heads, head_dim, _, window,
   positions, factor) = _KNOWN[name]
  kind, metadata = _gguf(model)
  assert kind == {1: 'gemma', 2: 'gemma2', 3: 'gemma3'}[model.generation]
  expected = {
      'context_length': positions, 'embedding_length': width,
      'block_count': layers, 'feed_forward_length': hidden,
      'attention.head_count': heads, 'attention.head_count_kv': kv_heads,
      'attention.key_length': head_dim, 'attention.value_length': head_dim,
      'attention.layer_norm_rms_epsilon': 1e-6,
      'rope.freq_base': 1e6 if model.generation == 3 else 1e4}
  if model.generation > 1:
    expected['attention.sliding_window'] = window
  if model.generation == 2:
    expected |= {
        'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0}
  if model.generation == 3:
    expected['rope.freq_base_swa'] = 1e4
  if factor == 8:
    expected |= {'rope.scaling.type': 'linear', 'rope.scaling.factor': 8.0}
  _assert_same(metadata, {
      'general.type': 'model', 'general.name': 'a model',
      **{f'{kind}.{key}': value for key, value in expected.items()}})
  written = {'general.architecture': kind, **metadata}
  architecture.check_gguf_metadata(
      written, model.config, model.generation, 'x.gguf')
  with pytest.raises(errors.UserError, match=f'architecture is {kind}\n'):
    architecture.check_gguf_metadata(written, model.config, 4, 'x.gguf')


def test_a_pattern_that_is_not_llama_cpps_default_is_written():
  model = tiny_models.model('3')
  key = 'gemma3.attention.sliding_window_pattern'
  assert _gguf(model)[1][key] == 2
  # llama.cpp's default, too, has no global layer among the first five.
  assert key not in _gguf(tiny_models.changed(model, **_layers('LL')))[1]


@pytest.mark.parametrize('temperature, expected', [
    (0.2, {'do_sample': True, 'temperature': 0.2}), (0.0, {'do_sample': False}),
])
def test_generation_config(temperature, expected):
  assert architecture.generation_config(
      temperature=temperature, repetition_penalty=1.1, eos_ids=[1, 106],
      bos_id=2, pad_id=0) == {
          'bos_token_id': 2, 'eos_token_id': [1, 106], 'pad_token_id': 0,
          'repetition_penalty': 1.1, **expected}


_SCALING = {'factor': 8.0, 'rope_type': 'linear'}


# google/gemma-3-4b-it and -27b-it, without the keys of the vision tower.
@pytest.mark.parametrize('name, text', [
    ('gemma3_4b', {
        'hidden_size': 2560, 'intermediate_size': 10240,
        'model_type': 'gemma3_text', 'num_hidden_layers': 34,
        'rope_scaling': _SCALING, 'sliding_window': 1024}),
    ('gemma3_27b', {
        'head_dim': 128, 'hidden_size': 5376, 'intermediate_size': 21504,
        'model_type': 'gemma3_text', 'num_attention_heads': 32,
        'num_hidden_layers': 62, 'num_key_value_heads': 16,
        'query_pre_attn_scalar': 168, 'rope_scaling': _SCALING,
        'sliding_window': 1024})])
def test_text_config_of_a_multimodal_file(name, text):
  hf = {'model_type': 'gemma3', 'text_config': dict(text)}
  model = model_lib.make_model(name)
  _check(model, hf)
  _check(model, hf | {'tie_word_embeddings': False},
         'x/config.json: tie_word_embeddings is False')
  del hf['text_config']['rope_scaling']
  _check(model, hf, 'x/config.json: text_config.rope_scaling.factor is 1\n')


@pytest.mark.parametrize('name, keys', [
    ('gemma1_7b', {}),
    ('gemma1_7b', {'hidden_act': 'gelu', 'hidden_activation': None}),
    ('gemma2_2b', {}),
    ('gemma2_2b', {'rope_scaling': None, 'rope_theta': 10000}),
    ('gemma3_1b', {
        'hidden_size': 1152, 'intermediate_size': 6912, 'sliding_window': 512,
        'num_attention_heads': 4, 'num_key_value_heads': 1,
        'layer_types': None, 'sliding_window_pattern': 6})])
def test_defaults_of_transformers(name, keys):
  model = model_lib.make_model(name)
  _check(model, {'model_type': _MODEL_TYPES[model.generation], **keys})


def test_a_default_that_is_not_the_models_is_a_contradiction():
  model = model_lib.make_model('gemma3_27b')
  hf = _hf(model)
  for key, default in {
      'hidden_size': 2304, 'intermediate_size': 9216, 'num_hidden_layers': 26,
      'num_attention_heads': 8, 'num_key_value_heads': 4, 'head_dim': 256,
      'query_pre_attn_scalar': 256, 'sliding_window': 4096}.items():
    _check(model, {k: v for k, v in hf.items() if k != key},
           f'{key} is {default}\n')


# Preset -> changes of its config.json; the message names the first key, after
# a dot with its wrong part.
_WRONG = {
    'gemma1_2b': [
        {'hidden_act': 'silu'}, {'hidden_activation': 'relu'},
        {'model_type': 'gemma2'}, {'rope_theta': 1e6}],
    'gemma2_2b': [
        {'attn_logit_softcapping': None}, {'final_logit_softcapping': 50.0},
        {'query_pre_attn_scalar': 224}, {'sliding_window': 4095},
        {'layer_types': 26 * ['full_attention']},
        {'layer_types': None, 'sliding_window_pattern': 3},
        {'hidden_activation': 'gelu'}, {'rms_norm_eps': 1e-5},
        {'tie_word_embeddings': False}, {'attention_bias': True},
        {'quantization_config': {'bits': 4}},
        {'use_bidirectional_attention': True}, {'hidden_size': 2305},
        {'rope_parameters.rope_type': {'rope_type': 'yarn'}},
        {'rope_parameters.rope_theta': {'rope_theta': 5e5}}],
    'gemma3_4b': [
        {'rope_scaling.factor': None},
        {'rope_scaling.factor': {'type': 'linear', 'factor': 4}},
        {'rope_scaling.rope_type': {'rope_type': 'dynamic', 'factor': 8}},
        {'rope_theta': 1e4}, {'rope_local_base_freq': 1e6},
        {'final_logit_softcapping': 30.0}, {'model_type': None}]}


@pytest.mark.parametrize('name, change', [
    (name, change) for name, changes in _WRONG.items() for change in changes])
def test_the_first_contradiction_is_named(name, change):
  model = model_lib.make_model(name)
  hf = _hf(model) | {k.partition('.')[0]: v for k, v in change.items()}
  _check(model, hf, f'x/config.json: {next(iter(change))} is')


@pytest.mark.parametrize('part, name, value, key', [
    ('full_attention', 'rope_theta', 1e4, 'rope_theta'),
    ('full_attention', 'factor', 1.0, 'factor'),
    ('full_attention', 'rope_type', 'default', 'factor'),
    ('sliding_attention', 'rope_theta', 1e6, 'rope_theta'),
    ('sliding_attention', 'rope_type', 'llama3', 'rope_type')])
def test_rope_in_the_keys_of_transformers_5(part, name, value, key):
  model = model_lib.make_model('gemma3_4b')
  hf = copy.deepcopy(_hf(model))
  for older in ('rope_theta', 'rope_scaling', 'rope_local_base_freq'):
    del hf[older]
  _check(model, hf)  # The missing older keys do not mean their defaults.
  hf['rope_parameters'][part][name] = value
  _check(model, hf, f'rope_parameters.{part}.{key} is')


def test_rope_parameters_fall_back_on_the_older_keys():
  model = model_lib.make_model('gemma3_4b')
  hf = _hf(model) | {'rope_parameters': {'full_attention': _SCALING}}
  _check(model, hf)
  _check(model, hf | {'rope_parameters': _SCALING})
  del hf['rope_theta']
  _check(model, hf | {'rope_scaling': {'type': 'linear', 'factor': 8}})
  small = model_lib.make_model('gemma2_2b')
  _check(small, _hf(small) | {'rope_parameters': {'rope_type': 'default'}})


@pytest.mark.parametrize('change, message', [
    ({'global_base_frequency': 500_000}, 'rope_theta is 1000000.0'),
    ({'local_base_frequency': 20_000}, 'rope_local_base_freq is 10000.0'),
    ({'global_scale_factor': 8.0}, 'rope_scaling.factor is 1')])
def test_missing_rope_keys_mean_the_defaults_of_transformers(change, message):
  model = model_lib.make_model('gemma3_1b')
  hf = {k: v for k, v in _hf(model).items() if not k.startswith('rope')}
  _check(model, hf)
  _check(tiny_models.changed(model, **change), hf, message)


def test_numbers_rounded_to_f32_are_the_same():
  assert expressible.same(1e-6, 9.99999997475e-07)
  assert not expressible.same(1e-6, 1.00001e-6)
  assert not expressible.same(None, 0)


def _norm(name):
  gm = model_lib.import_gemma()
  return {'query_pre_attn_norm': gm.nn.config.QueryPreAttentionNormalisation[
      name]}


def _layers(pattern):
  gm = model_lib.import_gemma()
  kinds = {'L': gm.nn.AttentionType.LOCAL_SLIDING,
           'G': gm.nn.AttentionType.GLOBAL}
  return {'attention_types': tuple(kinds[c] for c in pattern)}


_BY_WIDTH = _norm('BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS')


# (generation, refused by transformers, by llama.cpp) -> changes of a tiny model
_LIMITS = {
    (1, True, True): [
        {'final_logit_softcap': 30.0}, {'attn_logits_soft_cap': 50.0},
        _layers('LG') | {'sliding_window_size': 4}, _BY_WIDTH,
        {'use_post_attn_norm': True}],
    (1, False, False): [{'global_scale_factor': 2.0}],
    (2, False, True): [
        {'final_logit_softcap': None}, {'attn_logits_soft_cap': None},
        _layers('GL'), _layers('LL'), _BY_WIDTH],
    (2, True, True): [
        _norm('BY_EMBED_DIM_DIV_NUM_HEADS'), {'global_base_frequency': 20_000},
        {'global_scale_factor': 2.0}, {'sliding_window_size': None},
        {'use_qk_norm': True}],
    (2, True, False): [{'embed_dim': 30}],
    (3, True, True): [
        {'local_scale_factor': 2.0}, {'use_post_ffw_norm': False}],
    (3, False, True): [
        {'final_logit_softcap': 30.0}, {'attn_logits_soft_cap': 50.0},
        _layers('GL'), _layers('LGGLG'), _BY_WIDTH, _layers(62 * 'L')],
    (3, False, False): [
        _layers('LGLG'), _layers('LLL'), _BY_WIDTH | _layers(62 * 'L')]}


@pytest.mark.parametrize('generation, hf, gguf, change', [
    (*key, change) for key, changes in _LIMITS.items() for change in changes])
def test_what_cannot_be_expressed_is_refused(generation, hf, gguf, change):
  model = model_lib.make_model(
      'custom', generation=generation, **conftest.DIMENSIONS)
  expressible.check_hf(model.config, generation)
  expressible.check_gguf(model.config, generation)
  changed = tiny_models.changed(model, **change)
  for refused, build in ((hf, _hf), (gguf, _gguf)):
    if refused:
      with pytest.raises(errors.UserError, match='the model has'):
        build(changed)
    else:
      build(changed)
