"""The self-test passes, is recorded, and catches a fault planted in a step."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest

from gemma_sft import errors
from gemma_sft import train
from gemma_sft.monitor import self_test
from gemma_sft.run import prepare


def test_passes_on_eight_devices_and_is_recorded(
    run_config, tmp_path, capsys):
  run_config.mesh.update(data=2, fsdp=2, tensor=2)
  run_config.train.steps = 1
  train.main(run_config, str(tmp_path), False, self_test=True)
  record = json.loads((tmp_path / 'self_test.json').read_text())
  assert record['limit'] == 1e-5  # Float32 sums in another order.
  assert sorted(record['largest_difference']) == [
      '1x32, packed, one device', '1x32, padded', '8x4, packed']
  assert 0 < max(record['largest_difference'].values()) < 1e-5
  assert len(set(record['trained_tokens'].values())) == 1
  assert record['trained_tokens']['1x32, packed'] > 100
  assert capsys.readouterr().out.count('self-test: gradient of') == 3


@pytest.mark.parametrize('changes', [
    {'lora.enabled': False}, {'lora.dropout': 0.3, 'train.remat': 'block'}],
    ids=str)
def test_passes_for_every_kind_of_run(run_config, tmp_path, changes):
  run_config.mesh.update(data=2, fsdp=2, tensor=2)
  run_config.update_from_flattened_dict(changes)
  run = prepare.prepare(run_config, str(tmp_path))
  assert max(self_test.check(run, train.gradient_sums).values()) < 1e-5


def test_compares_microbatches_whatever_the_mesh(run_config, tmp_path):
  run = prepare.prepare(run_config, str(tmp_path))  # 8 x 1 x 1.
  assert len(self_test.check(run, train.gradient_sums)) == 3


def _mean_of_means(trainable, base, batch, step, loss_scale, **options):
  """The usual mistake: each microbatch is divided by its own tokens."""
  sums, nll, n = None, 0.0, 0.0
  count = batch['tokens'].shape[0]
  for i in range(count):
    part = jax.tree.map(lambda a, i=i: a[i:i + 1], batch)
    g, part_nll, m = train.gradient_sums(
        trainable, base, part, step, loss_scale, **options)
    g = jax.tree.map(lambda x, m=m: x / jnp.maximum(m, 1.0), g)
    sums = g if sums is None else jax.tree.map(jnp.add, sums, g)
    nll, n = nll + part_nll, n + m
  return jax.tree.map(lambda x: x * n / count, sums), nll, n


def _no_packing_mask(trainable, base, batch, step, loss_scale, **options):
  """Packed examples see their neighbours."""
  segments = jnp.minimum(batch['segment_ids'], 1)
  return train.gradient_sums(
      trainable, base, batch | {'segment_ids': segments}, step, loss_scale,
      **options)


@pytest.mark.parametrize('fault', [_mean_of_means, _no_packing_mask])
def test_a_planted_fault_stops_the_run(
    run_config, tmp_path, monkeypatch, fault):
  run_config.mesh.update(data=2, fsdp=2, tensor=2)
  sound = train.gradient_sums
  monkeypatch.setattr(
      train, 'gradient_sums', functools.wraps(sound)(
          lambda *a, **k: _with(sound, fault, *a, **k)))
  with pytest.raises(errors.UserError, match='depends on how the batch') as e:
    train.main(run_config, str(tmp_path), False, self_test=True)
  assert 'nothing was trained' in str(e.value)
  assert not (tmp_path / 'metrics.jsonl').exists()
  record = json.loads((tmp_path / 'self_test.json').read_text())
  assert max(record['largest_difference'].values()) > 1e-3


def _with(sound, fault, *arguments, **options):
  """Calls the fault, which calls the sound function by its usual name."""
  faulty, train.gradient_sums = train.gradient_sums, sound
  try:
    return fault(*arguments, **options)
  finally:
    train.gradient_sums = faulty
