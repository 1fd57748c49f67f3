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


def test_passes_on_eight_devices_and_is_recorded(run_config, tmp_path, capsys):
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


@pytest.mark.parametrize('mesh, changes', [
    ((8, 1, 1), {}), ((2, 2, 2), {'lora.enabled': False}),
    ((2, 2, 2), {'lora.dropout': 0.3, 'train.remat': 'block'})], ids=str)
def test_passes_for_every_kind_of_run(run_config, tmp_path, mesh, changes):
  run_config.mesh.update(dict(zip(('data', 'fsdp', 'tensor'), mesh)))
  run_config.update_from_flattened_dict(changes)
  differences = self_test.check(
      prepare.prepare(run_config, str(tmp_path)), train.gradient_sums)
  assert len(differences) == 3 and max(differences.values()) < 1e-5


def _mean_of_means(sound, trainable, base, batch, step, loss_scale, **options):
  """The usual mistake: each microbatch is divided by its own tokens."""

  def mean(microbatch):
    grads, nll, n = sound(
        trainable, base, jax.tree.map(lambda a: a[None], microbatch), step,
        loss_scale, **options)
    return jax.tree.map(lambda g: g / jnp.maximum(n, 1.0), grads), nll, n

  grads, nll, n = jax.lax.map(mean, batch)
  return (jax.tree.map(lambda g: g.mean(axis=0) * n.sum(), grads), nll.sum(),
          n.sum())


def _no_packing_mask(sound, trainable, base, batch, *rest, **options):
  """Packed examples see their neighbours."""
  segments = jnp.minimum(batch['segment_ids'], 1)
  return sound(
      trainable, base, batch | {'segment_ids': segments}, *rest, **options)


@pytest.mark.parametrize('fault', [_mean_of_means, _no_packing_mask])
def test_a_planted_fault_stops_the_run(
    run_config, tmp_path, monkeypatch, fault):
  run_config.mesh.update(data=2, fsdp=2, tensor=2)
  monkeypatch.setattr(train, 'gradient_sums', functools.partial(
      fault, train.gradient_sums))
  with pytest.raises(errors.UserError, match='depends on how the batch') as e:
    train.main(run_config, str(tmp_path), False, self_test=True)
  assert 'nothing was trained' in str(e.value)
  assert not (tmp_path / 'metrics.jsonl').exists()
  record = json.loads((tmp_path / 'self_test.json').read_text())
  assert max(record['largest_difference'].values()) > 1e-3
