"""The script that runs in transformers' environment, against the JAX model."""

import functools
import json
import os
import pathlib
import subprocess

import conftest
from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from gemma_sft import model as model_lib
from gemma_sft.exports import divergence
from gemma_sft.exports import transformers_runtime
from gemma_sft.weights import load
from gemma_sft.weights import names

_PYTHON = os.environ.get(
    'GEMMA_SFT_RUNTIME_PYTHON',
    str(conftest.ROOT / '.venv-runtimes' / 'bin' / 'python'))
pytestmark = pytest.mark.skipif(
    not pathlib.Path(_PYTHON).exists(),
    reason='no transformers: bash launch/runtimes.sh makes .venv-runtimes')

_SIZES = conftest.DIMENSIONS
# Longer than the window of 8, so that masks of local layers matter.
_PROMPTS = [[2, *range(300, 338)], [2, 7], [2]]
_END = 106
_LETTERS = ('bos', 'user', 'model', 'system', 'start', 'end')


def _config(generation):
  """The least that transformers needs to know about a tiny model."""
  config = {
      'model_type': {1: 'gemma', 2: 'gemma2', 3: 'gemma3_text'}[generation],
      'architectures': [f'Gemma{generation}ForCausalLM'.replace('1', '')],
      'vocab_size': _SIZES['vocab_size'],
      'hidden_size': _SIZES['embed_dim'],
      'intermediate_size': _SIZES['hidden_dim'],
      'num_hidden_layers': _SIZES['num_layers'],
      'num_attention_heads': _SIZES['num_heads'],
      'num_key_value_heads': _SIZES['num_kv_heads'],
      'head_dim': _SIZES['head_dim'],
      'query_pre_attn_scalar': _SIZES['head_dim'],
      'sliding_window': _SIZES['sliding_window'],
      'layer_types': ['sliding_attention', 'full_attention'],
      'hidden_act': 'gelu_pytorch_tanh',
      'hidden_activation': 'gelu_pytorch_tanh',
      'max_position_embeddings': 256, 'rms_norm_eps': 1e-6,
      'tie_word_embeddings': True, 'bos_token_id': 2, 'pad_token_id': 0,
      'eos_token_id': [1, _END],
  }
  if generation == 1:
    del config['layer_types'], config['sliding_window']
  if generation == 3:
    config |= {'rope_parameters': {
        'full_attention': {'rope_type': 'default', 'rope_theta': 1e6},
        'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4}}}
  return config


def _make_model(generation):
  model = model_lib.make_model('custom', generation=generation, **_SIZES)
  params = conftest.make_params(model)
  # Smaller, or a token's own row wins and every answer repeats one token.
  params['embedder']['input_embedding'] /= 3
  return model, params


def _make_rounded_model():
  model, params = _make_model(3)
  return model, jax.tree.map(
      lambda array: array.astype(jnp.bfloat16).astype(jnp.float32), params)


def _write_folder(folder, model, params, dtype=np.float32, end=_END):
  folder.mkdir()
  flat = traverse_util.flatten_dict(params, sep='/')
  tensors = {name: array.astype(dtype) for name, array in names.from_library(
      load.weight_layout(model), 'hf', lambda path: np.asarray(flat[path]))}
  safetensors_numpy.save_file(
      tensors, folder / 'model.safetensors', {'format': 'pt'})
  (folder / 'config.json').write_text(json.dumps(_config(model.generation)))
  (folder / 'generation_config.json').write_text(json.dumps(
      {'bos_token_id': 2, 'pad_token_id': 0, 'eos_token_id': [1, end]}))


def _write_tokenizer(folder):
  """A tokenizer of words and a template that marks where an answer begins."""
  (folder / 'tokenizer.json').write_text(json.dumps({
      'version': '1.0', 'truncation': None, 'padding': None,
      'added_tokens': [], 'normalizer': None, 'post_processor': None,
      'decoder': None, 'pre_tokenizer': {'type': 'WhitespaceSplit'},
      'model': {'type': 'WordLevel', 'unk_token': 'user',
                'vocab': {word: i for i, word in enumerate(_LETTERS)}}}))
  (folder / 'tokenizer_config.json').write_text(json.dumps({
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'chat_template': (
          "bos {% for m in messages %}start {{ m['role'] }} end "
          '{% endfor %}{% if add_generation_prompt %}start{% endif %}')}))


def _write_adapter(folder, seed, prefix='base_model.model.model.layers'):
  """Writes an adapter for q of layer 1; returns its update (N * H, D)."""
  folder.mkdir()
  rng = np.random.default_rng(seed)
  n_out = _SIZES['num_heads'] * _SIZES['head_dim']
  a = rng.normal(0, 0.3, (2, _SIZES['embed_dim'])).astype(np.float32)
  b = rng.normal(0, 0.3, (n_out, 2)).astype(np.float32)
  key = f'{prefix}.1.self_attn.q_proj.lora_'
  safetensors_numpy.save_file(
      {f'{key}A.weight': a, f'{key}B.weight': b},
      folder / 'adapter_model.safetensors', {'format': 'pt'})
  (folder / 'adapter_config.json').write_text(json.dumps({
      'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': 2, 'lora_alpha': 6,
      'lora_dropout': 0.0, 'bias': 'none', 'fan_in_fan_out': False,
      'inference_mode': True, 'base_model_name_or_path': 'tiny',
      'target_modules': r'model\.layers\.1\.self_attn\.q_proj'}))
  return 3 * b @ a


def _request(root, name, **changes):
  path = root / f'{name}.json'
  path.write_text(json.dumps({
      'folder': str(root / name), 'adapter': None, 'prompts': _PROMPTS,
      'positions': 64, 'greedy_tokens': 6, 'conversations': [],
      'out': str(root / f'{name}.npz')} | changes))
  return str(path)


def _run(*requests):
  return subprocess.run(
      [_PYTHON, transformers_runtime.__file__, *requests], check=False,
      capture_output=True, text=True, cwd='/')


@pytest.fixture(scope='module')
def answers(tmp_path_factory):
  """Name -> arrays: every folder that loads, in one run of the script."""
  root = tmp_path_factory.mktemp('hf')
  requests = []
  for generation in (1, 2, 3):
    _write_folder(root / f'gemma{generation}', *_make_model(generation))
    requests.append(_request(root, f'gemma{generation}'))
  _write_folder(
      root / 'bf16', *_make_model(3), dtype=ml_dtypes.bfloat16,
      end=_greedy(*_make_rounded_model(), _PROMPTS[1])[1])
  _write_tokenizer(root / 'bf16')
  requests.append(_request(
      root, 'bf16', positions=2,
      conversations=[m for _, m in divergence.template_conversations()]))
  update = _write_adapter(root / 'adapter', 5)
  requests.append(_request(
      root, 'peft', folder=str(root / 'gemma3'),
      adapter=str(root / 'adapter')))
  done = _run(*requests)
  assert done.returncode == 0, done.stderr[-3000:]
  loaded = {}
  for name in ('gemma1', 'gemma2', 'gemma3', 'bf16', 'peft'):
    with np.load(root / f'{name}.npz') as arrays:
      loaded[name] = dict(arrays)
  return loaded | {'update': update}


def _logits(model, params, ids):
  # One compilation a model; what stands right of a token is not seen.
  tokens_BT = np.zeros((1, 64), np.int32)
  tokens_BT[0, :len(ids)] = ids
  return np.asarray(_forward(model, params, tokens_BT))[:len(ids)]


def _greedy(model, params, ids):
  new = []
  for _ in range(6):
    new.append(int(_logits(model, params, [*ids, *new])[-1].argmax()))
  return new


@functools.partial(jax.jit, static_argnames='model')
def _forward(model, params, tokens_BT):
  x_BTD = model_lib.hidden_states(
      model, params, tokens_BT, jnp.arange(64)[None], jnp.ones_like(tokens_BT))
  return model_lib.logits(model, params, x_BTD[0])


@pytest.mark.parametrize('generation', [1, 2, 3])
def test_every_position_is_that_of_jax(answers, generation):
  model, params = _make_model(generation)
  found = answers[f'gemma{generation}']
  assert json.loads(str(found['info']))['tied'] is True
  for i, ids in enumerate(_PROMPTS):
    ours = _logits(model, params, ids)
    theirs = found[f'logits_{i}']
    assert theirs.shape == ours.shape and theirs.dtype == np.float32
    # f32 sums in another order, logits of about 5: 1e-5 was measured.
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    assert np.ptp(ours) > 1


@pytest.mark.parametrize('generation', [1, 2, 3])
def test_greedy_answers_are_those_of_jax(answers, generation):
  model, params = _make_model(generation)
  for i, ids in enumerate(_PROMPTS):
    ours = _greedy(model, params, ids)
    assert not {1, _END} & set(ours)
    assert answers[f'gemma{generation}'][f'greedy_{i}'].tolist() == ours


def test_an_answer_ends_before_the_token_that_ends_it(answers):
  ours = _greedy(*_make_rounded_model(), _PROMPTS[1])
  assert ours[0] != ours[1]
  assert answers['bf16']['greedy_1'].tolist() == ours[:1]
  assert json.loads(str(answers['bf16']['info']))['end_ids'] == [1, ours[1]]


def test_bfloat16_is_computed_in_float32(answers):
  model, rounded = _make_rounded_model()
  for i, ids in enumerate(_PROMPTS):
    found = answers['bf16'][f'logits_{i}']
    assert found.shape == (min(2, len(ids)), _SIZES['vocab_size'])
    # As above; computing in bfloat16 is 0.05 off.
    np.testing.assert_allclose(
        found, _logits(model, rounded, ids)[-2:], atol=1e-4)


def test_an_adapter_changes_the_model_as_its_update_says(answers):
  model, params = _make_model(3)
  flat = dict(traverse_util.flatten_dict(params, sep='/'))
  shape = (_SIZES['num_heads'], _SIZES['head_dim'], _SIZES['embed_dim'])
  flat['layer_1/attn/q_einsum/w'] += jnp.asarray(
      answers['update'].reshape(shape).transpose(0, 2, 1), jnp.float32)
  ours = _logits(
      model, traverse_util.unflatten_dict(flat, sep='/'), _PROMPTS[0])
  found = answers['peft']['logits_0']
  np.testing.assert_allclose(found, ours, atol=1e-4)  # As above.
  assert np.abs(found - answers['gemma3']['logits_0']).max() > 0.01
  info = json.loads(str(answers['peft']['info']))
  assert info['runtime'] == (
      f'transformers {info["versions"]["transformers"]},'
      f' peft {info["versions"]["peft"]}')
  assert info['end_ids'] == [1, _END]


def test_conversations_and_where_the_answer_begins(answers):
  start, end = _LETTERS.index('start'), _LETTERS.index('end')
  for i, (_, messages) in enumerate(divergence.template_conversations()):
    found = answers['bf16'][f'template_{i}'].tolist()
    assert found[0] == _LETTERS.index('bos')
    assert found.count(end) == len(messages)
    assert found[-1] == (start if messages[-1]['role'] == 'user' else end)
  assert 'template_0' not in answers['gemma3']


# What can go wrong ----------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
  _write_folder(tmp_path / 'tiny', *_make_model(3))
  return tmp_path


def _rename(file, old, new):
  tensors = safetensors_numpy.load_file(file)
  tensors[new] = tensors.pop(old)
  safetensors_numpy.save_file(tensors, file, {'format': 'pt'})


def test_a_misnamed_tensor_is_an_error(tiny):
  _rename(tiny / 'tiny' / 'model.safetensors',
          'model.layers.1.mlp.up_proj.weight', 'model.layers.1.mlp.up.weight')
  done = _run(_request(tiny, 'tiny'))
  assert done.returncode == 1
  assert 'missing_keys' in done.stderr
  assert 'model.layers.1.mlp.up_proj.weight' in done.stderr
  assert 'unexpected_keys' in done.stderr
  assert 'Traceback' not in done.stderr
  assert not (tiny / 'tiny.npz').exists()


def test_a_misnamed_adapter_is_an_error(tiny):
  # PEFT warns, and runs on with an adapter of zeros.
  _write_adapter(tiny / 'adapter', 5, prefix='base_model.model.layers')
  done = _run(_request(tiny, 'tiny', adapter=str(tiny / 'adapter')))
  assert done.returncode == 1
  assert '2 adapter tensors missing' in done.stderr
  assert 'base_model.model.layers.1.self_attn.q_proj.lora_A.weight' in (
      done.stderr)
  assert 'Traceback' not in done.stderr
  assert not (tiny / 'tiny.npz').exists()
