"""Runs of several processes: real ones, on loopback, with pretend devices."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import conftest
import jax
import numpy as np
import pytest

from configs import tiny
from gemma_sft import batches as batches_lib
from gemma_sft import errors
from gemma_sft import train
from gemma_sft.monitor import metrics
from gemma_sft.monitor import record as record_lib
from gemma_sft.monitor import stop
from gemma_sft.run import checkpoint
from gemma_sft.run import hosts
from gemma_sft.run import prepare

# float32 sums over another number of devices, in another order, through many
# updates.
_SAME = dict(rtol=2e-5)
_STEPS = 40

# `python -m gemma_sft.train`, each step slowed down, so that signals find it at
# work, and every example that a batch reads written down.
_TRAIN = """
import json, runpy, sys, threading, time
from gemma_sft import batches
from gemma_sft.inputs import token_cache
seconds, path = float(sys.argv.pop(1)), sys.argv.pop(1)
here, log = threading.local(), open(path, 'a')
make_batch, read = batches.Batches.__getitem__, token_cache.Examples.__getitem__
extend_chain = batches.extend_chain

def make_batch_(self, index):
  here.index = index
  try:
    return make_batch(self, index)
  finally:
    here.index = None

def read_(self, i):
  if getattr(here, 'index', None) is not None:
    log.write(json.dumps([len(self), here.index, int(i)]) + '\\n')
    log.flush()
  return read(self, i)

def extend_chain_(*arguments):
  time.sleep(seconds)
  return extend_chain(*arguments)

batches.Batches.__getitem__ = make_batch_
token_cache.Examples.__getitem__ = read_
batches.extend_chain = extend_chain_
runpy.run_module('gemma_sft.train', run_name='__main__', alter_sys=True)
"""


def _start(config, workdir, n, *, devices=2, seconds=0.0, only=None,
           changes=(), environment=()):
  """Starts n processes; returns them, their output in WORKDIR.N.log."""
  port, processes = _free_port(), []
  for i in range(n) if only is None else only:
    with open(f'{workdir}.{i}.log', 'ab') as log:
      processes.append(subprocess.Popen(
          [sys.executable, '-c', _TRAIN, str(seconds), f'{workdir}.{i}.read',
           *conftest.flags(config), f'--workdir={workdir}',
           *dict(changes).get(i, ())],
          cwd=conftest.ROOT, stdout=log, stderr=log, env=os.environ | {
              'PYTHONPATH': str(conftest.ROOT),
              'XLA_FLAGS':
                  f'--xla_force_host_platform_device_count={devices}',
              'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
              'JAX_NUM_PROCESSES': str(n), 'JAX_PROCESS_ID': str(i),
          } | dict(environment)))
  return processes


def _free_port():
  # Below those that the system gives to outgoing connections: nobody takes it
  # before the run does.
  while True:
    port = random.randrange(12000, 32000)
    with socket.socket() as free, contextlib.suppress(OSError):
      free.bind(('', port))
      return port


def _end(processes, seconds=900):
  """Returns the exit statuses."""
  end = time.monotonic() + seconds
  while any(p.poll() is None for p in processes) and time.monotonic() < end:
    time.sleep(0.1)
  for p in processes:
    p.kill()
  return [p.wait() for p in processes]


def _log(workdir, i):
  return pathlib.Path(f'{workdir}.{i}.log').read_text('utf-8', 'replace')


def _wait_for_step(processes, workdir, step):
  end = time.monotonic() + 900
  while max(conftest.losses(workdir), default=0) < step:
    if time.monotonic() > end or any(p.poll() is not None for p in processes):
      _end(processes, 1)
      pytest.fail('\n'.join(
          _log(workdir, i)[-2000:] for i in range(len(processes))))
    time.sleep(0.1)


def _steps(workdir):
  return checkpoint.Checkpoints(str(workdir), read_only=True).steps()


def _evaluations(workdir):
  rows = metrics.read_jsonl(os.path.join(workdir, 'metrics.jsonl'))
  return {r['step']: r['eval/loss'] for r in rows if 'eval/loss' in r}


def _expect_same_losses(workdir, straight):
  for read in conftest.losses, _evaluations:
    found, wanted = read(workdir), read(straight)
    assert list(found) == list(wanted)
    np.testing.assert_allclose(
        list(found.values()), list(wanted.values()), **_SAME)
  assert [r['chain'] for r in conftest.train_rows(workdir)] == [
      r['chain'] for r in conftest.train_rows(straight)]


@pytest.fixture(scope='module')
def story(tmp_path_factory):
  """One run: two processes, stopped; two again, one killed; one to the end."""
  folder = tmp_path_factory.mktemp('story')
  config = tiny.get_config()
  config.model.dtype = 'float32'
  config.task = 'chat'
  pairs = [(f'What is {i} and {i}?', f'It is {2 * i}.') for i in range(1, 27)]
  config.data.update(
      train=conftest.write_pairs(folder / 'train.txt', pairs[:24]),
      validation=conftest.write_pairs(folder / 'validation.txt', pairs[24:]),
      test='', max_length=80)
  config.train.steps = _STEPS
  config.eval.update(every=10, judged=0, prompts=())
  config.checkpoint.every = 5
  straight, workdir = folder / 'straight', folder / 'w'
  assert train.main(config, str(straight)) == 0

  both = _start(config, workdir, 2, seconds=0.2)
  _wait_for_step(both, workdir, 3)
  both[1].send_signal(signal.SIGTERM)
  both[1].send_signal(signal.SIGTERM)
  seen = dict(stopped=_end(both), stopped_at=_steps(workdir)[-1],
              read=[pathlib.Path(f'{workdir}.{i}.read') for i in (0, 1)],
              stop_logs=[_log(workdir, i) for i in (0, 1)],
              stop_record=record_lib.read(str(workdir)))

  both = _start(config, workdir, 2, seconds=0.2)
  _wait_for_step(both, workdir, seen['stopped_at'] + 7)
  both[1].kill()
  start = time.monotonic()
  seen |= dict(killed=_end(both), seconds=time.monotonic() - start,
               kill_logs=[_log(workdir, i) for i in (0, 1)],
               kept=_steps(workdir)[-1])
  shutil.copytree(workdir, folder / 'killed')

  assert train.main(config, str(workdir)) == 0
  return dict(seen, config=config, straight=straight, workdir=workdir,
              folder=folder)


def test_losses_are_those_of_one_process(story):
  assert len(conftest.losses(story['straight'])) == _STEPS
  _expect_same_losses(story['workdir'], story['straight'])


def test_a_signal_to_one_stops_all_at_one_step(story):
  assert story['stopped'] == [stop.UNFINISHED] * 2
  assert 3 <= story['stopped_at'] < _STEPS
  first, second = story['stop_logs']
  assert (f'stopped by a signal to another process after'
          f' {story["stopped_at"]} of {_STEPS} updates') in first
  assert story['stop_record']['end']['reason'] == 'signal'
  assert story['stop_record']['starts'][0]['hosts'] == 2
  # The second one says nothing but what the runtime itself prints.
  assert 'update' not in second and 'Traceback' not in second


def test_a_killed_process_ends_the_other(story):
  assert story['killed'] == [1, -signal.SIGKILL]
  assert story['seconds'] < 60
  message = story['kill_logs'][0]
  assert 'error: process 1 (' in message and 'silent for 30 s' in message
  assert 'start the same command on all of them again' in message
  assert 'Traceback' not in message
  # The one that was killed has a child which says so.
  assert 'it was killed, or ran out of memory' in story['kill_logs'][1]
  assert story['kept'] > story['stopped_at']


def test_each_process_reads_its_rows_and_no_others(story):
  batches = _batches(story['config'])
  for i, path in enumerate(story['read']):
    read = {}
    for line in path.read_text().splitlines():
      n_examples, batch, example = json.loads(line)
      if n_examples == 24:  # Those of training.
        read.setdefault(batch, set()).add(example)
    # The last batch of an epoch has no rows for the second process.
    for batch in {*range(story['stopped_at']), *read}:
      assert read.get(batch, set()) == {
          e for row in batches[batch][4 * i:4 * i + 4] for e in row}
    assert read


def _batches(config):
  """Returns the rows of examples of each batch."""
  run = prepare.prepare(config, '')
  layout = batches_lib.Layout(batch_size=8, max_length=config.data.max_length)
  return [rows for epoch in range(_STEPS)
          for _, rows in batches_lib.plan_epoch(
              run.splits['train'].examples.lengths(), layout, seed=config.seed,
              epoch=epoch)]


@pytest.mark.slow
def test_four_processes_resume_on_another_mesh(story, tmp_path):
  # Each group of rows lies on two processes, and each process has a half.
  config = story['config'].copy_and_resolve_references()
  config.mesh.update(data=1, fsdp=2, tensor=4)
  config.eval.update(judged=1, max_new_tokens=4)
  workdir = shutil.copytree(story['folder'] / 'killed', tmp_path / 'w')
  four = _start(config, workdir, 4, seconds=0.2)
  _wait_for_step(four, workdir, story['kept'] + 6)
  four[0].kill()  # The coordinator goes with it.
  start = time.monotonic()
  statuses = _end(four)
  assert time.monotonic() - start < 60
  assert statuses[0] == -signal.SIGKILL and not {0, 2} & set(statuses)
  for i in (1, 2, 3):
    last = _log(workdir, i).partition(f'error: process {i} of 4')[2]
    assert 'process 0 (127.0.0.1:' in last and 'has died' in last
    assert 'start the same command on all of them again' in last

  assert _end(_start(config, workdir, 4)) == [0] * 4
  _expect_same_losses(workdir, story['straight'])
  record = record_lib.read(str(workdir))
  assert record['end']['finished'] and record['starts'][-1]['hosts'] == 4


def test_a_mistake_of_one_process_is_reported_by_it(run_config, tmp_path):
  both = _start(run_config, tmp_path / 'w', 2, changes={1: ['--config.seed=5']})
  assert _end(both) == [2, 2]
  first, second = _log(tmp_path / 'w', 0), _log(tmp_path / 'w', 1)
  assert 'error: config.seed is 5 on process 1 and 0 on process 0' in second
  assert 'process 1 of 2 has ended with status 2' in first
  assert 'Traceback' not in first + second


@pytest.mark.slow
def test_a_mistake_of_all_is_reported_once(run_config, tmp_path):
  run_config.data.train = str(tmp_path / 'absent.txt')
  assert _end(_start(run_config, tmp_path / 'w', 2)) == [2, 2]
  assert _log(tmp_path / 'w', 0).count('error: ') == 1
  assert 'error: ' not in _log(tmp_path / 'w', 1)


@pytest.mark.parametrize('changed, text', (
    ({'JAX_PROCESS_ID': ''}, 'not JAX_PROCESS_ID'),
    ({'JAX_COORDINATOR_ADDRESS': ''}, 'not JAX_COORDINATOR_ADDRESS'),
    ({'JAX_COORDINATOR_ADDRESS': 'host'}, 'HOST:PORT'),
    ({'JAX_PROCESS_ID': '2'}, 'JAX_PROCESS_ID=2'),
    ({'JAX_NUM_PROCESSES': 'two'}, 'JAX_NUM_PROCESSES=two')))
def test_variables_half_set_or_wrong_are_refused(changed, text):
  environment = {'JAX_COORDINATOR_ADDRESS': 'host:1', 'JAX_NUM_PROCESSES': '2',
                 'JAX_PROCESS_ID': '1'}
  assert hosts.find(environment) == dict(
      coordinator_address='host:1', num_processes=2, process_id=1)
  with pytest.raises(errors.UserError, match=text):
    hosts.find(environment | changed)


def test_processes_that_did_not_meet_are_reported():
  said = hosts.lost(jax.errors.JaxRuntimeError(
      'UNKNOWN: Gloo context initialization failed: DEADLINE_EXCEEDED\nmore'))
  assert 'DEADLINE_EXCEEDED; on CPUs' in said and 'same command' in said
  assert not hosts.lost(jax.errors.JaxRuntimeError('INTERNAL'))
  assert not hosts.lost(ValueError('Gloo context initialization failed'))


def test_one_process_joins_none():
  slurm = {'SLURM_STEP_NODELIST': 'n[1-2]', 'SLURM_PROCID': '0'}
  for environment in (
      {}, {'JAX_NUM_PROCESSES': '1'}, slurm | {'SLURM_STEP_NUM_TASKS': '1'},
      # A batch script's own shell, and what says that it wants to be alone.
      {'SLURM_NTASKS': '2'},
      slurm | {'SLURM_STEP_NUM_TASKS': '2', 'JAX_NUM_PROCESSES': '1'}):
    assert hosts.find(environment) is None
  assert hosts.find(slurm | {'SLURM_STEP_NUM_TASKS': '2'}) == {}


def test_a_process_alone_gives_up(run_config, tmp_path):
  lonely = _start(run_config, tmp_path / 'w', 2, only=(0,),
                  environment={'GEMMA_SFT_JOIN_SECONDS': '3'})
  assert _end(lonely) == [2]
  log = _log(tmp_path / 'w', 0)
  assert 'this is 0 of 2; one or more of the others did not join' in log
  assert 'Traceback' not in log
