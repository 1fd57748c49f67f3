"""What `plan` prints."""

import pytest

from gemma_sft import errors
from gemma_sft import plan
from gemma_sft.planning import hardware


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('GEMMA_SFT_CACHE', str(tmp_path / 'cache'))


def _lines(config, topology='kaggle-tpu', analytic=True):
  return '\n'.join(plan.render(plan.make_plan(
      config, hardware.parse(topology), analytic=analytic, search=False)))


def test_verdict_first_then_memory_by_kind_time_and_disk(config):
  text = _lines(config)
  positions = [text.index(word) for word in (
      'MEMORY  fits', 'TIME    fits', 'DISK    fits', 'base', 'adapters',
      'optimizer', 'activations', 'logits', 'rest', 'peak', 'largest that fits',
      'data: 4 examples', 'FLOPs of a step', 'a step:', '6 updates: ',
      'checkpoints: 3 x', 'exports, GB')]
  assert positions == sorted(positions)
  assert 'of 9 h' in text and 'of 19.5 GB' in text
  assert 'estimated' in text and 'never timed there' in text
  assert 'GB above resident memory' in text
  assert 'recomputed in the backward pass: elementwise' in text
  assert max(map(len, text.splitlines())) <= 140


@pytest.mark.parametrize('topology, changes, expected', [
    ('kaggle-tpu',
     {'model.name': 'gemma3_12b', 'model.weights': 'random',
      'model.tokenizer': 'byte', 'data.batch_size': 16,
      'data.max_length': 2048},
     ('DOES NOT FIT', '--config.mesh.fsdp=8', 'GB too much')),
    ('kaggle-tpu', {'data.train': 'nowhere.jsonl'},
     ('not counted, because', 'nowhere.jsonl',
      'assumed instead: full rows, 25%')),
    # The T4 has no bfloat16, and no compiler here.
    ('kaggle-t4x2', {'data.batch_size': 8}, ('float16', '2 x Tesla T4')),
    ('cpu', {'data.batch_size': 8}, ('compiled by XLA', 'plain products')),
], ids=['too large', 'no data', 'T4', 'CPU'])
def test_what_a_plan_says(config, topology, changes, expected):
  config.update_from_flattened_dict(changes)
  text = _lines(config, topology, analytic=topology != 'cpu')
  for part in expected:
    assert part in text


def test_mistakes_are_refused(config):
  with pytest.raises(errors.UserError, match="Did you mean 'v5e-"):
    plan.main(config, 'v5e-9', analytic=True, largest=False)
  config.data.batch_size = 3  # As `train` would.
  with pytest.raises(errors.UserError, match='a multiple of 8'):
    _lines(config)
