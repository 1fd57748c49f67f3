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


def _save(workdir, losses, *, keep=2, mode='min'):
  """Saves checkpoints of {step: loss}; None is a step without evaluation."""
  checkpoints = checkpoint.Checkpoints(
      str(workdir), keep=keep, metric='loss', mode=mode)
  for step, loss in losses.items():
    checkpoints.save(_state(float(step), step), _meta(
        step, mode, metrics={} if loss is None else {'loss': loss}))
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
  checkpoints = _save(tmp_path, losses, mode=mode)
  assert checkpoints.steps() == [best, 5, 6]
  for step, found in ((-1, best), (-2, 6), (5, 5)):
    assert checkpoint.choose_step(checkpoints, step) == found
  with pytest.raises(errors.UserError, match=f'one of \\[{best}, 5, 6\\]'):
    checkpoint.choose_step(checkpoints, 1)


@pytest.mark.parametrize('losses, kept, best', [
    ({1: None, 2: None, 3: None}, [2, 3], 3),
    # The base was better than both, but it is no checkpoint.
    ({2: 1.1, 4: 1.5}, [2, 4], 2)], ids=['without scores', 'worse than base'])
def test_the_best_of_what_was_saved(tmp_path, losses, kept, best):
  checkpoints = _save(tmp_path, losses)
  assert checkpoints.steps() == kept
  assert checkpoint.choose_step(checkpoints, -1) == best


def test_no_checkpoints(tmp_path):
  with pytest.raises(errors.UserError, match='no checkpoints in'):
    checkpoint.Checkpoints(str(tmp_path), read_only=True)
  checkpoints = checkpoint.Checkpoints(str(tmp_path))
  assert checkpoints.restore_latest(_state(0.0, 0), lambda meta: None) is None
  with pytest.raises(errors.UserError, match='the workdir has no checkpoints'):
    checkpoint.choose_step(checkpoints, -1)


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


def _damaging(*damages):
  return pytest.mark.parametrize(
      'damage', damages, ids=lambda f: f.__name__[1:])


def _expect_same_state(workdir, straight):
  again, reference = (conftest.saved_state(w, 6) for w in (workdir, straight))
  assert again.keys() == reference.keys()
  for path, leaf in reference.items():
    np.testing.assert_array_equal(again[path], leaf, err_msg=path)


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory):
  """(config, workdir) of a run with checkpoints 2, 4 and 6."""
  folder = tmp_path_factory.mktemp('run')
  config = conftest.config.__wrapped__(folder)
  config = conftest.run_config.__wrapped__(config, folder)
  config.eval.every = 2
  config.checkpoint.keep = 3
  train.main(config, str(folder / 'w'))
  return config, folder / 'w'


@pytest.fixture
def copied(whole_run, tmp_path):
  """A copy of that workdir."""
  return shutil.copytree(whole_run[1], tmp_path / 'w')


@_damaging(_truncate, _flip, _delete_meta, _empty_meta, _delete_state)
def test_a_damaged_newest_checkpoint_is_skipped(
    whole_run, copied, caplog, capsys, damage):
  config, straight = whole_run
  damage(copied / 'checkpoints' / '6')
  with caplog.at_level(logging.WARNING):
    train.main(config, str(copied))
  assert 'checkpoint 6 cannot be read and is skipped' in caplog.text
  assert 'resuming after 4 updates' in capsys.readouterr().out
  # Kept for a look, and saved again to the same bits.
  assert (copied / 'damaged-6').is_dir()
  _expect_same_state(copied, straight)
  assert conftest.losses(copied) == conftest.losses(straight)


def test_bytes_that_orbax_accepts_are_found_by_the_digest(tmp_path):
  checkpoints = _save(tmp_path, {3: None, 4: None})
  state = _state(3.0, 3)
  trainable, _ = checkpoints.restore_trainable(3)
  np.testing.assert_array_equal(
      trainable['layer_0']['q']['a'], np.full((3, 2), 3.0, np.float32))
  for tree, restore, error in (
      (state, lambda: checkpoints.restore(3, state), ValueError),
      (state.trainable, lambda: checkpoints.restore_trainable(3),
       errors.UserError)):
    meta = _largest(tmp_path / 'checkpoints' / '3' / 'meta')
    meta.write_text(meta.read_text().replace(
        checkpoint.tree_digest(tree), 'f' * 64))
    with pytest.raises(error, match='have changed on disk'):
      restore()


def test_all_damaged_is_reported_and_nothing_is_lost(whole_run, copied):
  for step in (2, 4, 6):
    _truncate(copied / 'checkpoints' / str(step))
  for _ in range(2):  # Started again, it must not begin afresh either.
    with pytest.raises(errors.UserError, match='none of the checkpoints') as e:
      train.main(whole_run[0], str(copied))
    assert '[2, 4, 6]' in str(e.value) and 'new --workdir' in str(e.value)
    for step in (2, 4, 6):
      assert (copied / 'checkpoints' / str(step) / 'state').is_dir()
    assert sorted(conftest.losses(copied)) == [1, 2, 3, 4, 5, 6]


def _sample(workdir):
  sample.main(None, str(workdir), base=False, step=-1, prompt=['Hi'],
              system='', max_new_tokens=1)


@_damaging(_truncate, _flip, _delete_state)
def test_serving_a_damaged_checkpoint_is_refused(copied, damage):
  damage(copied / 'checkpoints' / '6')
  with pytest.raises(errors.UserError, match='cannot be read') as error:
    _sample(copied)
  assert '[2, 4, 6]' in str(error.value)


@_damaging(_delete_meta, _empty_meta)
def test_serving_skips_one_without_meta(copied, caplog, capsys, damage):
  damage(copied / 'checkpoints' / '6')
  _sample(copied)
  assert 'checkpoint 6 cannot be read' in caplog.text
  assert 'tuned 4 updates' in capsys.readouterr().err


def _train_with_limit(config, workdir, n_bytes):
  """Trains where no file may be larger; returns what it wrote as an error."""
  status, _, err = conftest.run_module(
      'train', *conftest.flags(config), f'--workdir={workdir}', devices=1,
      # What a process sees of a full disk: a write that fails with an errno.
      preexec_fn=lambda: resource.setrlimit(
          resource.RLIMIT_FSIZE, (n_bytes, n_bytes)),
      # A cache of its own: compiled programs cut off by the limit would be
      # found by other runs.
      env={'GEMMA_SFT_CACHE': f'{workdir}.cache'})
  assert status == 2, err
  return err


def test_full_disk_while_saving_loses_nothing(whole_run, copied, tmp_path):
  config, straight = whole_run
  shutil.move(copied / 'checkpoints' / '6', tmp_path / 'six')
  # The largest file of a checkpoint has 58 kB.
  err = _train_with_limit(config, copied, 40_000)
  assert 'Traceback' not in err, err
  message = err[err.index('error: '):].splitlines()
  assert len(message) == 3, err
  assert 'the disk is full' in message[0]
  assert message[1].startswith('  expected: ')
  assert message[2].startswith('  fix: ')
  assert checkpoint.Checkpoints(str(copied), read_only=True).steps() == [2, 4]
  train.main(config, str(copied))
  _expect_same_state(copied, straight)


def test_full_disk_while_logging_is_reported(whole_run, tmp_path):
  config = whole_run[0].copy_and_resolve_references()
  config.train.steps = 80
  config.eval.every = config.checkpoint.every = 100
  err = _train_with_limit(config, tmp_path / 'w', 9_000)
  assert os.path.getsize(tmp_path / 'w' / 'metrics.jsonl') <= 9_000
  assert 'metrics cannot be written: File too large' in err
