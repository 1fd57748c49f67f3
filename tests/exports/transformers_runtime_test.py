"""transformers on a tiny Gemma 3, against JAX; export_test has the others."""

import dataclasses
import json
import os
import re
import subprocess

import conftest
from exports import llama_runtime_test
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from gemma_sft.exports import transformers_runtime
from gemma_sft.exports import writer
from gemma_sft.weights import safetensors_file

pytestmark = pytest.mark.skipif(
    not os.path.exists(conftest.RUNTIME_PYTHON),
    reason='no transformers: bash launch/runtimes.sh makes .venv-runtimes')

# Longer than the window of 8, so that masks of local layers matter.
_PROMPTS = [[2, *range(300, 338)], [2, 300, 301], [2]]
_tiny = llama_runtime_test.make_tiny


def _rounded():
  return dataclasses.replace(_tiny(), params=jax.tree.map(
      lambda array: array.astype(jnp.bfloat16).astype(jnp.float32),
      _tiny().params))


def _write_folder(folder, dtype='float32'):
  writer.write_hf(folder, _tiny().source(), dtype=dtype)


def _request(root, name, **changes):
  path = root / f'{name}.json'
  path.write_text(json.dumps({
      'folder': str(root / name), 'adapter': None, 'prompts': _PROMPTS,
      'positions': 64, 'greedy_tokens': 6, 'conversations': [],
      'out': str(root / f'{name}.npz')} | changes))
  return str(path)


def _run(*requests):
  return subprocess.run(
      [conftest.RUNTIME_PYTHON, transformers_runtime.__file__, *requests],
      check=False, capture_output=True, text=True, cwd='/')


@pytest.fixture(scope='module')
def answers(tmp_path_factory):
  """Name -> arrays: every folder that loads, in one run of the script."""
  root = tmp_path_factory.mktemp('hf')
  _write_folder(root / 'f32')
  _write_folder(root / 'bf16', 'bfloat16')
  # The second token of an answer is one that ends it.
  path = root / 'bf16' / 'generation_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {
      'eos_token_id': [1, _rounded().greedy(_PROMPTS[1], 2)[1]]}))
  done = _run(_request(root, 'f32'), _request(root, 'bf16', positions=2))
  assert done.returncode == 0, done.stderr[-3000:]
  return {name: dict(np.load(root / f'{name}.npz')) for name in ('f32', 'bf16')}


def test_logits_and_answers_are_those_of_jax(answers):
  found = answers['f32']
  info = json.loads(str(found['info']))
  assert info['tied'] is True
  assert re.fullmatch(r'transformers \d[\w.]+', info['runtime'])
  assert info['end_ids'] == sorted(_tiny().tokenizer.stop_ids)
  for i, ids in enumerate(_PROMPTS):
    ours, theirs = _tiny().logits(ids), found[f'logits_{i}']
    assert theirs.shape == ours.shape and theirs.dtype == np.float32
    # f32 sums in another order, logits of about 5: 1e-5 was measured.
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    assert np.ptp(ours) > 1
    answer = _tiny().greedy(ids, 6)
    assert len(answer) == 6
    assert found[f'greedy_{i}'].tolist() == answer


def test_an_answer_ends_before_the_token_that_ends_it(answers):
  ours = _rounded().greedy(_PROMPTS[1], 2)
  assert ours[0] != ours[1]
  assert answers['bf16']['greedy_1'].tolist() == ours[:1]
  assert json.loads(str(answers['bf16']['info']))['end_ids'] == [1, ours[1]]


def test_bfloat16_is_computed_in_float32(answers):
  for i, ids in enumerate(_PROMPTS):
    found = answers['bf16'][f'logits_{i}']
    assert found.shape == (
        min(2, len(ids)), _tiny().tokenizer.vocab_size)
    # As above; computing in bfloat16 is 0.05 off.
    np.testing.assert_allclose(found, _rounded().logits(ids)[-2:], atol=1e-4)


def _check_refused(root, texts, **changes):
  done = _run(_request(root, 'tiny', **changes))
  assert done.returncode == 1
  assert all(text in done.stderr for text in texts), done.stderr
  assert 'Traceback' not in done.stderr
  assert not (root / 'tiny.npz').exists()


def test_a_misnamed_tensor_is_an_error(tmp_path):
  _write_folder(tmp_path / 'tiny')
  file = tmp_path / 'tiny' / 'model.safetensors'
  tensors = safetensors_numpy.load_file(file)
  name = 'model.layers.1.mlp.up_proj.weight'
  tensors[name.replace('_proj', '')] = tensors.pop(name)
  safetensors_file.write_file(file, tensors)
  _check_refused(tmp_path, ['missing_keys', name, 'unexpected_keys'])


def test_a_misnamed_adapter_is_an_error(tmp_path):
  _write_folder(tmp_path / 'tiny')
  # PEFT warns, and runs on with an adapter of zeros.
  key = 'base_model.model.layers.1.self_attn.q_proj'
  adapter = tmp_path / 'adapter'
  adapter.mkdir()
  safetensors_file.write_file(adapter / 'adapter_model.safetensors', {
      f'{key}.lora_A.weight': np.ones((2, 32), np.float32),
      f'{key}.lora_B.weight': np.ones((64, 2), np.float32)})
  (adapter / 'adapter_config.json').write_text(json.dumps({
      'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': 2,
      'base_model_name_or_path': 'tiny',
      'target_modules': r'model\.layers\.1\.self_attn\.q_proj'}))
  _check_refused(
      tmp_path, ['2 adapter tensors missing', f'{key}.lora_A.weight'],
      adapter=str(adapter))
