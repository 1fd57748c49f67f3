"""run.json: what decides a run's identity, and what is noted of each start."""

import importlib.util
import json
import shutil
import subprocess
import sys

import conftest
import jax
import pytest

from configs import default
from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft import train
from gemma_sft.inputs import records
from gemma_sft.inputs import splits
from gemma_sft.monitor import record as record_lib

_DATA = {'train': 'a' * 64, 'validation': 'b' * 64, 'test': 'c' * 64}


def _identity(data=_DATA, base='base', **changes):
  leaves = dict(config_lib.leaves(default.get_config()))
  assert changes.keys() <= leaves.keys()
  return record_lib.identity(leaves | changes, base, data)


@pytest.mark.parametrize('key, value', (
    ('lora.rank', 8), ('seed', 1), ('task', 'blop'), ('data.repeat', 5),
    ('data.packing', False), ('train.epochs', 1),
    ('train.gradient_accumulation_steps', 2), ('optimizer.learning_rate', 1e-3),
    ('model.quantization', 'int8'), ('model.tokenizer', 'byte'),
    ('init_from', 'w'), ('eval.metric', 'x'), ('eval.every', 5),
    ('eval.judged', 3), ('eval.temperature', 0.5)))
def test_what_decides_the_result_is_another_run(key, value):
  assert _identity(**{key: value}) != _identity()


@pytest.mark.parametrize('key, value', (
    ('deadline_minutes', 5.0), ('mesh.fsdp', 8), ('checkpoint.every', 7),
    ('train.log_every', 1), ('train.remat', 'block'), ('sampling.top_k', 9),
    ('eval.batch_size', 2), ('data.train', 'moved'), ('data.test', 'moved'),
    ('data.format', 'csv'), ('model.weights', 'moved'),
    ('model.attention', 'einsum')))
def test_what_does_not_is_the_same_run(key, value):
  assert _identity(**{key: value}) == _identity()


def test_data_and_base_count_by_their_content():
  hashes = {_identity(), _identity(base='other'),
            *(_identity(data=_DATA | {split: 'd' * 64}) for split in _DATA),
            _identity(data={'train': 'a' * 64})}
  assert len(hashes) == 6
  assert all(len(h) == 16 and int(h, 16) >= 0 for h in hashes)
  # It outlives JSON and the order of splits.
  leaves = dict(config_lib.leaves(default.get_config()))
  assert _identity() == record_lib.identity(
      json.loads(json.dumps(leaves)), 'base', dict(reversed(_DATA.items())))


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """(config, workdir) of 6 updates, with checkpoints 3 and 6."""
  folder = tmp_path_factory.mktemp('finished')
  config = conftest.config.__wrapped__(folder)
  config = conftest.run_config.__wrapped__(config, folder)
  assert train.main(config, str(folder / 'w')) == 0
  return config, folder / 'w'


@pytest.fixture
def stopped(finished, tmp_path):
  """(config, copy of the workdir without the last checkpoint)."""
  config, workdir = finished
  copy = shutil.copytree(workdir, tmp_path / 'w')
  shutil.rmtree(copy / 'checkpoints' / '6')
  return config.copy_and_resolve_references(), copy


def _read(workdir):
  return json.loads((workdir / 'run.json').read_text('utf-8'))


def test_a_finished_run_says_what_it_was(finished):
  config, workdir = finished
  record = _read(workdir)
  assert record == record_lib.read(str(workdir))
  leaves = dict(config_lib.leaves(config))
  assert record['config'] == leaves == json.loads(
      (workdir / 'config.json').read_text('utf-8'))
  assert record['data'] == {
      split: records.content_hash(splits.read_split(config.data, split))
      for split in ('train', 'validation')}
  assert record['identity'] == record_lib.identity(
      leaves, record['base'], record['data'])
  assert (record['base'], record['seed'], record['total_steps']) == (
      'random weights of seed 0', 0, 6)
  assert 0 < record['trained_weights'] < record['base_weights'] < 200_000

  start, = record['starts']
  expected = {
      'step': 0, 'hosts': 1, 'python': sys.version.split()[0], 'devices': {
          'platform': 'cpu', 'kind': jax.devices()[0].device_kind, 'count': 8}}
  assert {key: start[key] for key in expected} == expected
  assert start['time'].endswith('+00:00') and start['command'][0] == 'python'
  assert start['packages']['jax'] == jax.__version__
  end = record['end']
  assert (end['step'], end['reason'], end['finished']) == (6, 'finished', True)
  assert end['seconds'] == start['seconds'] > 0
  # log_every is 1, and the first step has no speed.
  speeds = sorted(r['tokens_per_second'] for r in conftest.train_rows(workdir)
                  if 'tokens_per_second' in r)
  assert speeds[0] <= end['tokens_per_second'] <= speeds[-1]
  assert 5e7 < end['peak_bytes'] < 1e12


def test_a_resume_is_noted_and_times_what_was_killed(stopped):
  config, workdir = stopped
  start, = _read(workdir)['starts']
  rows = conftest.train_rows(workdir)
  (workdir / 'run.json').write_text(json.dumps(_read(workdir) | {
      'end': None, 'starts': [start | {'seconds': None}]}), 'utf-8')
  config.train.log_every = 2
  assert train.main(config, str(workdir)) == 0
  record = _read(workdir)
  first, second = record['starts']
  assert (first['step'], second['step']) == (0, 3)
  # To its last line, that of update 6, which the resume takes out of the file.
  assert start['seconds'] >= first['seconds'] > (
      rows[-1]['time'] - rows[0]['time'])
  assert record['end']['seconds'] == pytest.approx(
      first['seconds'] + second['seconds'], abs=0.11)
  assert record['config']['train.log_every'] == 2
  assert first['identity'] == second['identity'] == record['identity']


def test_an_older_workdir_gets_a_record_without_secrets(stopped, monkeypatch):
  config, workdir = stopped
  (workdir / 'run.json').unlink()
  assert record_lib.read(str(workdir)) is None
  secret = 'k' * 40
  monkeypatch.setenv('WANDB_API_KEY', secret)
  monkeypatch.setattr(sys, 'argv', ['x', f'--note={secret}', 'hf_' + 'a' * 20])
  assert train.main(config, str(workdir)) == 0
  record = _read(workdir)
  assert [s['step'] for s in record['starts']] == [3]
  assert record['end']['finished']
  text = (workdir / 'run.json').read_text()
  assert secret not in text and 'hf_a' not in text
  assert '--note=[removed]' in text
  # A broken record is named.
  (workdir / 'run.json').write_text('{"identity": 1}')
  with pytest.raises(errors.UserError, match='run.json cannot be read'):
    train.main(config, str(workdir))


def _git(folder, *arguments):
  subprocess.run(
      ['git', '-c', 'user.name=x', '-c', 'user.email=x@x', *arguments],
      cwd=folder, check=True, capture_output=True)


def test_commit_of_a_clone_and_of_no_clone(tmp_path, monkeypatch):
  # The module itself, in a repository of its own.
  folder = tmp_path / 'gemma_sft'
  (folder / 'monitor').mkdir(parents=True)
  (folder / '__init__.py').touch()
  path = shutil.copy(record_lib.__file__, folder / 'monitor')
  spec = importlib.util.spec_from_file_location('copied_record', path)
  copied = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(copied)
  assert copied.commit() == ('', False)  # No repository.
  _git(tmp_path, 'init')
  with monkeypatch.context() as patch:
    patch.setenv('PATH', '/nowhere')
    assert copied.commit() == ('', False)  # No git.
  (tmp_path / 'other').touch()
  _git(tmp_path, 'add', 'other')
  _git(tmp_path, 'commit', '-m', 'x')
  # Another project's repository, in whose environment this package lies.
  assert copied.commit() == ('', False)
  _git(tmp_path, 'add', '.')
  _git(tmp_path, 'commit', '-m', 'x')
  revision, dirty = copied.commit()
  assert len(revision) == 40 and not dirty
  (tmp_path / 'README').write_text('not the code')
  assert copied.commit() == (revision, False)
  (folder / 'more.py').write_text('')
  assert copied.commit() == (revision, True)


def test_packages_that_are_not_installed_are_left_out():
  assert record_lib.packages(('jax', 'no-such-package')) == {
      'jax': jax.__version__}
