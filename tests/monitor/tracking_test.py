"""Weights & Biases: the real package, offline, without a login or network."""

import json
import os
import pathlib
import struct
import subprocess
import sys
import types
from unittest import mock

import conftest
import pytest

from gemma_sft import errors
from gemma_sft import train
from gemma_sft.monitor import metrics
from gemma_sft.monitor import record as record_lib
from gemma_sft.monitor import tracking

_FOLDER = str(pathlib.Path(__file__).parent)


def _record(workdir, starts=1):
  return types.SimpleNamespace(
      active=True, workdir=str(workdir), name='r', contents={
          'identity': 'ab',
          'config': {'lora.rank': 4, 'seed': 0,
                     'data.train': '/home/alice/secret/train.txt'},
          'starts': [{'time': '2026-01-01T00:00:00.000+00:00',
                      'identity': 'ab', 'commit': 'c' * 40}] * starts,
          'end': {'reason': 'finished', 'step': 3}})


@pytest.fixture
def offline(monkeypatch, tmp_path):
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('HOME', str(tmp_path))


def _sent(workdir):
  """Returns [(run id, config, {step: values}, summary)] of the kept files."""
  import wandb
  from wandb.proto import wandb_internal_pb2

  wandb.teardown()  # Its process has then written what it was sent.
  found = []
  for path in sorted(pathlib.Path(workdir).glob('wandb/offline-run*/*.wandb')):
    config, history, summary, run_id = {}, {}, {}, ''
    for data in _log_records(path.read_bytes()):
      record = wandb_internal_pb2.Record.FromString(data)
      kind = record.WhichOneof('record_type')
      if kind == 'run':
        run_id = record.run.run_id
        config = {u.key: json.loads(u.value_json)
                  for u in record.run.config.update}
      elif kind == 'history':
        values = {i.key or '/'.join(i.nested_key): json.loads(i.value_json)
                  for i in record.history.item}
        history[values['_step']] = {
            k: v for k, v in values.items() if k[0] != '_'}
      elif kind == 'summary':
        summary |= {u.key: json.loads(u.value_json)
                    for u in record.summary.update}
      assert kind not in ('files', 'artifact', 'output', 'output_raw')
    found.append((run_id, config, history, summary))
  return found


def _log_records(data):
  """Yields what a log of LevelDB's format holds, 7 bytes of header aside."""
  part, at = b'', 7
  while at < len(data):
    left = 32768 - at % 32768
    if left < 7:
      at += left
      continue
    _, n, kind = struct.unpack('<IHB', data[at:at + 7])
    part, at = part + data[at + 7:at + 7 + n], at + 7 + n
    if kind in (1, 4):  # Whole, or its last part.
      yield part
      part = b''


@pytest.mark.usefixtures('offline')
def test_offline_has_the_numbers_the_config_and_the_end(tmp_path):
  tracking.check('me/blop')
  for start in (1, 2):  # The second goes on from step 2, which comes again.
    writer = metrics.Writer(
        str(tmp_path), resume_step=start - 1,
        mirror=tracking.start('me/blop', _record(tmp_path, start)))
    for step in range(start, start + 2):
      writer.write(step, {'loss': 1 / step, 'chain': 'ab'})
      writer.write(step, {'eval/loss': 2 / step})
    writer.close()
  (name, _, history, _), (again, config, later, summary) = _sent(tmp_path)
  assert name == again  # One run there.
  assert history == {1: {'loss': 1.0, 'eval/loss': 2.0},
                     2: {'loss': 0.5, 'eval/loss': 1.0}}
  assert later.keys() == {2, 3}
  assert config['lora'] == {'rank': 4} and config['seed'] == 0
  assert [s['commit'] for s in config['run']['starts']] == ['c' * 40] * 2
  assert 'alice' not in json.dumps(config)
  assert summary['end'] == {'reason': 'finished', 'step': 3}


@pytest.mark.usefixtures('offline')
def test_a_training_is_tracked_to_its_end_once(run_config, tmp_path, capsys):
  run_config.train.steps = 2
  run_config.track.wandb = 'blop'
  workdir = tmp_path / 'w'
  for _ in range(2):  # The second time there is nothing to do.
    assert train.main(run_config, str(workdir)) == 0
  assert 'tracked on the disk' in capsys.readouterr().out
  (_, config, history, summary), = _sent(workdir)
  rows = metrics.read_jsonl(str(workdir / 'metrics.jsonl'))
  assert set(history) == {0, 1, 2}
  for key in ('loss', 'grad_norm', 'eval/loss'):
    assert {s: v[key] for s, v in history.items() if key in v} == {
        r['step']: r[key] for r in rows if key in r}
  record = record_lib.read(str(workdir))
  assert config['run']['identity'] == record['identity']
  assert config['train']['steps'] == 2
  assert summary['end']['reason'] == 'finished'


def test_nothing_is_tracked_unless_asked_for(tmp_path):
  tracking.check('')
  assert tracking.start('', _record(tmp_path)) is None
  record = _record(tmp_path)
  record.active = False  # Another host, or a run that was over before.
  assert tracking.start('blop', record) is None


def test_a_failure_is_reported_once_and_stops_nothing(tmp_path, capsys):
  fail = mock.Mock(side_effect=ConnectionError('no route'))
  broken = types.SimpleNamespace(
      log=fail, finish=fail, summary=types.SimpleNamespace(update=None))
  writer = metrics.Writer(
      str(tmp_path), resume_step=-1,
      mirror=tracking.Mirror(broken, _record(tmp_path)))
  for step in (1, 2):
    writer.write(step, {'loss': 1.0})
  writer.close()
  assert capsys.readouterr().out.count('warning: Weights & Biases: no rou') == 1
  assert len(metrics.read_jsonl(str(tmp_path / 'metrics.jsonl'))) == 2


def _python(program, tmp_path, **env):
  clean = {k: v for k, v in os.environ.items() if not k.startswith('WANDB')}
  return subprocess.run(
      [sys.executable, '-c', program], cwd=tmp_path, capture_output=True,
      text=True, stdin=subprocess.DEVNULL, timeout=600,
      env=clean | {'HOME': str(tmp_path), 'NETRC': str(tmp_path / 'netrc'),
                   'PYTHONPATH': str(conftest.ROOT)} | env)


def test_without_a_login_it_stops_and_does_not_ask(tmp_path):
  done = _python(
      "from gemma_sft.monitor import tracking; tracking.check('blop')",
      tmp_path)
  assert 'UserError: config.track.wandb is ' in done.stderr
  assert 'fix: run `wandb login`' in done.stderr


@pytest.mark.slow
def test_without_a_network_the_run_is_kept(tmp_path):
  program = (
      'import sys; from gemma_sft.monitor import tracking;'
      f' sys.path[:0] = {[str(conftest.ROOT / "tests"), _FOLDER]!r};'
      ' import tracking_test as t; r = t._record(".");'
      ' tracking.check("blop"); m = tracking.start("blop", r);'
      ' m.write(1, {"loss": 1.0}); m.close()')
  done = _python(program, tmp_path, WANDB_API_KEY='a' * 40,
                 WANDB_BASE_URL='http://127.0.0.1:9')
  assert done.returncode == 0, done.stderr
  assert 'connection refused' in done.stdout and 'aaaa' not in done.stdout
  assert 'tracked on the disk; to send it: wandb sync' in done.stdout
  assert _sent(tmp_path)[-1][2] == {1: {'loss': 1.0}}


def test_a_missing_package_is_named(monkeypatch):
  for module, message in (
      (None, 'wandb cannot be imported'),
      # A folder of that name, as offline runs leave, is no package.
      (types.ModuleType('wandb'), 'is not installed')):
    monkeypatch.setitem(sys.modules, 'wandb', module)
    with pytest.raises(errors.UserError, match=message):
      tracking.check('blop')
