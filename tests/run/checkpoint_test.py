"""Checkpoints that are damaged, refused, rotated or too large for the disk."""

import hashlib
import logging
import os
import pathlib
import resource
import shutil

import conftest
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_sft import errors
from gemma_sft import sample
from gemma_sft import state as state_lib
from gemma_sft import train
from gemma_sft.run import checkpoint


def _state(value: float, step: int) -> state_lib.TrainState:
  return state_lib.TrainState(
      step=jnp.int32(step),
      trainable={'layer_0': {'q': {'a': jnp.full((3, 2), value),
                                   'b': jnp.zeros((2, 4))}}},
      opt_state={'count': jnp.int32(step)})


def _meta(step: int, mode: str = 'min', **more) -> checkpoint.Meta:
  return checkpoint.Meta(
      step=step, data={'next_index': step}, chain=f'{step:064x}',
      config={'eval.metric': 'loss', 'eval.mode': mode,
              'data.buckets': [1, 2]}, base='b' * 64,
      data_hash='d' * 64, **more)


def _save(workdir, losses, *, keep=1, mode='min', metric='loss'):
  checkpoints = checkpoint.Checkpoints(
      str(workdir), keep=keep, metric=metric, mode=mode)
  best = {}
  for step, loss in losses.items():
    sign = 1 if mode == 'max' else -1
    if not best or sign * loss > sign * best['value']:
      best = {'step': step, 'value': loss}
    checkpoints.save(_state(float(step), step), _meta(
        step, mode, metrics={'loss': loss}, best=best))
  checkpoints.wait()
  return checkpoints


def test_state_and_meta_come_back_bit_for_bit(tmp_path):
  state = _state(0.1, 7)
  checkpoints = checkpoint.Checkpoints(str(tmp_path), keep=2)
  meta = _meta(7, metrics={'loss': 0.1}, best={'step': 7, 'value': 0.1},
               stale=3)
  checkpoints.save(state, meta)
  checkpoints.close()
  restored, found = checkpoint.Checkpoints(str(tmp_path)).restore_latest(
      state, lambda meta: None)
  assert int(restored.step) == 7
  np.testing.assert_array_equal(
      restored.trainable['layer_0']['q']['a'], np.full((3, 2), np.float32(0.1)))
  # Over each leaf's path and bytes, in the order of the tree.
  sha = hashlib.sha256()
  for path, array in (
      ('.step', np.int32(7)),
      (".trainable['layer_0']['q']['a']", np.full((3, 2), np.float32(0.1))),
      (".trainable['layer_0']['q']['b']", np.zeros((2, 4), np.float32)),
      (".opt_state['count']", np.int32(7))):
    sha.update(path.encode() + array.tobytes())
  assert found.digest == sha.hexdigest()
  assert found.config == meta.config and found.stale == 3
  assert found.best == {'step': 7, 'value': 0.1}


@pytest.mark.parametrize('mode, best', [('min', 2), ('max', 4)])
def test_newest_and_best_are_kept(tmp_path, mode, best):
  losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 9.0, 5: 4.0, 6: 5.0}
  checkpoints = _save(tmp_path, losses, keep=2, mode=mode)
  assert checkpoints.steps() == [best, 5, 6]
  assert checkpoint.choose_step(checkpoints, -1) == best
  assert checkpoint.choose_step(checkpoints, -2) == 6
  assert checkpoint.choose_step(checkpoints, 5) == 5
  with pytest.raises(errors.UserError, match=f'one of \\[{best}, 5, 6\\]'):
    checkpoint.choose_step(checkpoints, 1)


def test_without_scores_the_latest_is_the_best(tmp_path):
  checkpoints = checkpoint.Checkpoints(str(tmp_path), keep=2, metric='loss')
  for step in (1, 2, 3):
    checkpoints.save(_state(1.0, step), _meta(step))
  checkpoints.wait()
  assert checkpoints.steps() == [2, 3]
  assert checkpoint.choose_step(checkpoints, -1) == 3


def test_best_of_the_saved_ones_where_the_base_was_better(tmp_path):
  checkpoints = checkpoint.Checkpoints(
      str(tmp_path), keep=3, metric='loss', mode='min')
  for step, loss in {2: 1.1, 4: 1.5}.items():
    checkpoints.save(_state(1.0, step), _meta(
        step, metrics={'loss': loss}, best={'step': 0, 'value': 1.0}))
  checkpoints.wait()
  assert checkpoint.choose_step(checkpoints, -1) == 2


def test_no_checkpoints(tmp_path):
  with pytest.raises(errors.UserError, match='no checkpoints in'):
    checkpoint.Checkpoints(str(tmp_path), read_only=True)
  checkpoints = checkpoint.Checkpoints(str(tmp_path))
  assert checkpoints.restore_latest(
      _state(0.0, 0), lambda meta: None) is None
  with pytest.raises(errors.UserError, match='the workdir has no checkpoints'):
    checkpoint.choose_step(checkpoints, -1)


# Damage ----------------------------------------------------------------------


def _largest(folder: pathlib.Path) -> pathlib.Path:
  return max((p for p in folder.rglob('*') if p.is_file()),
             key=lambda p: p.stat().st_size)


# Damage goes to state/d, which is read: ocdbt.process_0 beside it holds files
# of the save that may be as large.
def _truncate(folder):
  path = _largest(folder / 'state' / 'd')
  path.write_bytes(path.read_bytes()[:100])


def _flip(folder):
  path = _largest(folder / 'state' / 'd')
  content = bytearray(path.read_bytes())
  for i in range(len(content) // 2, len(content) // 2 + 8):
    content[i] ^= 0xFF
  path.write_bytes(content)


def _delete_meta(folder):
  shutil.rmtree(folder / 'meta')


def _empty_meta(folder):
  _largest(folder / 'meta').write_text('')


def _delete_state(folder):
  shutil.rmtree(folder / 'state')


_DAMAGES = [_truncate, _flip, _delete_meta, _empty_meta, _delete_state]


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory):
  """(config, workdir) of a run with checkpoints 2, 4 and 6."""
  folder = tmp_path_factory.mktemp('run')
  config = conftest.config.__wrapped__(folder)
  config = conftest.run_config.__wrapped__(config, folder)
  config.eval.every = 2
  config.checkpoint.keep = 3
  train.main(config, str(folder / 'w'), False)
  return config, folder / 'w'


@pytest.mark.parametrize('damage', _DAMAGES, ids=lambda f: f.__name__[1:])
def test_damaged_newest_is_passed_over_for_the_one_before(
    whole_run, tmp_path, caplog, capsys, damage):
  config, straight = whole_run
  workdir = shutil.copytree(straight, tmp_path / 'w')
  damage(workdir / 'checkpoints' / '6')
  with caplog.at_level(logging.WARNING):
    train.main(config, str(workdir), False)
  assert 'checkpoint 6 cannot be read and is skipped' in caplog.text
  assert 'resuming after 4 updates' in capsys.readouterr().out
  # Kept for a look, and saved again to the same bits.
  assert (workdir / 'damaged-6').is_dir()
  again, reference = (
      conftest.saved_state(w, 6) for w in (workdir, straight))
  assert again.keys() == reference.keys()
  for path, leaf in reference.items():
    np.testing.assert_array_equal(again[path], leaf, err_msg=path)
  assert conftest.losses(workdir) == conftest.losses(straight)


def test_bytes_that_orbax_takes_for_good_are_found_by_the_digest(tmp_path):
  state = _state(0.5, 3)
  checkpoints = checkpoint.Checkpoints(str(tmp_path), keep=2)
  checkpoints.save(state, _meta(3))
  checkpoints.wait()
  meta = _largest(tmp_path / 'checkpoints' / '3' / 'meta')
  digest = checkpoint.tree_digest(state)
  meta.write_text(meta.read_text().replace(digest, 'f' * 64))
  with pytest.raises(ValueError, match='have changed on disk'):
    checkpoints.restore(3, state)


def test_serving_compares_the_digest_too(tmp_path):
  state = _state(0.5, 3)
  checkpoints = checkpoint.Checkpoints(str(tmp_path), keep=2)
  checkpoints.save(state, _meta(3))
  checkpoints.wait()
  trainable, _ = checkpoints.restore_trainable(3)
  np.testing.assert_array_equal(
      trainable['layer_0']['q']['a'], np.full((3, 2), 0.5, np.float32))
  meta = _largest(tmp_path / 'checkpoints' / '3' / 'meta')
  digest = checkpoint.tree_digest(state.trainable)
  meta.write_text(meta.read_text().replace(digest, 'f' * 64))
  with pytest.raises(errors.UserError, match='have changed on disk'):
    checkpoints.restore_trainable(3)


def test_all_damaged_is_told_each_time_and_nothing_is_lost(
    whole_run, tmp_path):
  config, straight = whole_run
  workdir = shutil.copytree(straight, tmp_path / 'w')
  for step in (2, 4, 6):
    _truncate(workdir / 'checkpoints' / str(step))
  for _ in range(2):  # Started again, it must not begin afresh either.
    with pytest.raises(errors.UserError, match='none of the checkpoints') as e:
      train.main(config, str(workdir), False)
    assert '[2, 4, 6]' in str(e.value) and 'new --workdir' in str(e.value)
    for step in (2, 4, 6):
      assert (workdir / 'checkpoints' / str(step) / 'state').is_dir()
    assert sorted(conftest.losses(workdir)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize('damage', [_truncate, _flip, _delete_state],
                         ids=lambda f: f.__name__[1:])
def test_serving_a_damaged_checkpoint_is_told(whole_run, tmp_path, damage):
  _, straight = whole_run
  workdir = shutil.copytree(straight, tmp_path / 'w')
  damage(workdir / 'checkpoints' / '6')
  with pytest.raises(errors.UserError, match='cannot be read') as error:
    sample.main(None, str(workdir), base=False, step=-1, prompt=['Hi'],
                system='', max_new_tokens=1)
  assert '[2, 4, 6]' in str(error.value)


@pytest.mark.parametrize('damage', [_delete_meta, _empty_meta],
                         ids=lambda f: f.__name__[1:])
def test_serving_passes_over_what_says_nothing(
    whole_run, tmp_path, caplog, capsys, damage):
  _, straight = whole_run
  workdir = shutil.copytree(straight, tmp_path / 'w')
  damage(workdir / 'checkpoints' / '6')
  sample.main(None, str(workdir), base=False, step=-1, prompt=['Hi'],
              system='', max_new_tokens=1)
  assert 'checkpoint 6 cannot be read' in caplog.text
  assert 'tuned 4 updates' in capsys.readouterr().err


# A full disk -----------------------------------------------------------------


def _limit_files(n_bytes):
  # What a process sees of a full disk: a write that fails with an errno.
  return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def test_full_disk_while_saving_loses_nothing(whole_run, tmp_path):
  config, straight = whole_run
  workdir = shutil.copytree(straight, tmp_path / 'w')
  shutil.move(workdir / 'checkpoints' / '6', tmp_path / 'six')
  status, _, err = conftest.run_module(
      'train', *conftest.flags(config), f'--workdir={workdir}',
      # The largest file of a checkpoint has 58 kB. A cache of its own: compiled
      # programs cut off by the limit would be found by other runs.
      preexec_fn=_limit_files(40_000),
      env={'GEMMA_SFT_CACHE': str(tmp_path / 'cache')})
  assert status == 2, err
  assert 'Traceback' not in err, err
  message = err[err.index('error: '):].splitlines()
  assert len(message) == 3, err
  assert 'the disk is full' in message[0]
  assert message[1].startswith('  expected: ')
  assert message[2].startswith('  fix: ')
  assert checkpoint.Checkpoints(str(workdir), read_only=True).steps() == [2, 4]
  train.main(config, str(workdir), False)
  again, reference = (
      conftest.saved_state(w, 6) for w in (workdir, straight))
  for path, leaf in reference.items():
    np.testing.assert_array_equal(again[path], leaf, err_msg=path)


def test_full_disk_while_logging_is_told(whole_run, tmp_path):
  config, _ = whole_run
  config = config.copy_and_resolve_references()
  config.train.steps = 80
  config.eval.every = config.checkpoint.every = 100
  workdir = tmp_path / 'w'
  status, _, err = conftest.run_module(
      'train', *conftest.flags(config), f'--workdir={workdir}',
      preexec_fn=_limit_files(9_000),
      env={'GEMMA_SFT_CACHE': str(tmp_path / 'cache')})
  assert os.path.getsize(workdir / 'metrics.jsonl') <= 9_000
  assert status == 2, err
  assert 'metrics cannot be written: File too large' in err
