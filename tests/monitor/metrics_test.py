"""What a run writes down, and what of it survives a kill."""

import json
import math
import types

import jax
import pytest

from gemma_sft.monitor import metrics


def _write(workdir, resume_step, *steps, **values):
  writer = metrics.Writer(str(workdir), resume_step=resume_step)
  for step in steps:
    writer.write(step, values or {'loss': float(step)})
  writer.close()


def _steps(workdir):
  return [r['step'] for r in metrics.read_jsonl(str(workdir / 'metrics.jsonl'))]


def test_lines_are_json_with_step_and_time(tmp_path):
  _write(tmp_path, -1, 3, loss=0.5, chain='ab')
  line, = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  row = json.loads(line)
  assert row.pop('time') > 1.6e9
  assert row == {'step': 3, 'loss': 0.5, 'chain': 'ab'}
  assert list((tmp_path / 'tensorboard').iterdir())


@pytest.mark.parametrize('resume_step, kept', ((3, [0, 1, 2, 3]), (-1, [])))
def test_a_resumed_run_repeats_its_later_steps(tmp_path, resume_step, kept):
  _write(tmp_path, -1, 0, 1, 2, 3, 4, 5)
  _write(tmp_path, resume_step, 4)
  assert _steps(tmp_path) == [*kept, 4]


def test_a_half_written_last_line_is_ignored(tmp_path):
  _write(tmp_path, -1, 1, 2)
  path = tmp_path / 'metrics.jsonl'
  whole = path.read_text()
  for length in range(1, 20):
    path.write_text(whole + whole[:length])
    assert _steps(tmp_path) == [1, 2]
  # And is gone after a resume, so that the next line is whole.
  _write(tmp_path, 2, 3)
  assert _steps(tmp_path) == [1, 2, 3]
  assert len(path.read_text().splitlines()) == 3


def test_lines_are_written_during_the_run_by_the_first_host(tmp_path):
  for active in False, True:
    writer = metrics.Writer(str(tmp_path), resume_step=-1, active=active)
    writer.write(1, {'loss': 1.0})
    assert _steps(tmp_path) == ([1] if active else [])
    writer.close()
    assert active or not list(tmp_path.iterdir())


_PROGRESS = dict(
    step=7, total_steps=100, loss=1.23456, grad_norm=0.5,
    tokens_per_second=12_345.6, flops_per_second=50e12, seconds_left=65)


def test_the_progress_line_where_the_peak_is_not_known():
  assert metrics.peak_flops() is None  # A CPU.
  assert metrics.progress_line(**_PROGRESS) == (
      'step   7/100 | loss 1.2346 | grad norm 0.500 | 12,346 tokens/s |'
      ' 1 m 05 s left')


@pytest.mark.parametrize('kind, peak', (
    ('NVIDIA H100 80GB HBM3', 989e12), ('Tesla T4', 65e12),
    # The longest name that fits.
    ('TPU v5 lite', 197e12), ('TPU v5', 459e12), ('TPU v5p', 459e12),
    ('TPU v6 lite', 918e12)))
def test_the_share_of_the_peak_of_all_devices(monkeypatch, kind, peak):
  device = types.SimpleNamespace(device_kind=kind)
  monkeypatch.setattr(jax, 'devices', lambda: [device] * 2)
  monkeypatch.setattr(jax, 'device_count', lambda: 2)
  assert metrics.peak_flops() == 2 * peak
  line = metrics.progress_line(
      **_PROGRESS | dict(flops_per_second=0.25 * 2 * peak))
  assert '| 25.0 % of peak | 1 m 05 s left' in line


def test_step_flops():
  counts = dict(body_params=10, embedding_params=100, n_tokens=8, n_trained=2)
  assert metrics.step_flops(**counts, frozen_base=True) == 4 * (80 + 200)
  assert metrics.step_flops(**counts, frozen_base=False) == 6 * (80 + 200)


def test_summarise():
  scores = metrics.summarise(8 * math.log(2), 4, 16, 10)
  assert scores == pytest.approx({
      'loss': 2 * math.log(2), 'perplexity': 4.0, 'bits_per_byte': 0.5,
      'bits_per_character': 0.8})
  extreme = metrics.summarise(1e6, 1, 0, 0)
  assert math.isfinite(extreme['perplexity'])
  assert extreme['bits_per_byte'] == pytest.approx(1e6 / math.log(2))
