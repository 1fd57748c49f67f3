"""What `plan` prints."""

import conftest
import pytest

from gemma_sft import plan
from gemma_sft.planning import hardware


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
  monkeypatch.setenv('GEMMA_SFT_CACHE', str(tmp_path / 'cache'))


def _lines(config, topology='kaggle-tpu', **options):
  target = hardware.parse(topology)
  options = {'analytic': True, 'search': False, **options}
  return '\n'.join(plan.render(plan.make_plan(config, target, **options)))


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


def test_a_model_that_does_not_fit_gets_a_proposal(config):
  config.model.update(name='gemma3_12b', weights='random', tokenizer='byte')
  config.data.update(batch_size=16, max_length=2048)
  text = _lines(config)
  assert 'DOES NOT FIT' in text
  assert '--config.mesh.fsdp=8' in text
  assert 'GB too much' in text


def test_missing_data_are_assumed_and_the_plan_says_so(config):
  config.data.train = 'nowhere.jsonl'
  text = _lines(config)
  assert 'not counted, because' in text and 'nowhere.jsonl' in text
  assert 'assumed instead: full rows, 25%' in text


def test_a_card_without_a_compiler_is_estimated(config):
  config.data.batch_size = 8
  text = _lines(config, 'kaggle-t4x2', analytic=True)
  # The T4 has no bfloat16.
  assert 'float16' in text and '2 x Tesla T4' in text


def test_this_machine_is_compiled_for(config):
  config.data.update(batch_size=8)
  text = _lines(config, 'cpu', analytic=False)
  assert 'compiled by XLA' in text
  assert 'plain products' in text


def test_mistakes_are_one_message():
  status, _, err = conftest.run_module(
      'plan', '--config=configs/tiny.py', '--topology=v5e-9')
  assert status == 2 and "Did you mean 'v5e-" in err
  assert 'Traceback' not in err


def test_what_train_would_refuse_is_refused(config):
  config.data.batch_size = 3
  with pytest.raises(ValueError, match='a multiple of 8'):
    _lines(config)
