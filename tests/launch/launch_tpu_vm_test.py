"""The scripts for Cloud TPU, with a stand-in for gcloud and a folder as cloud.

Like the real gcloud it refuses to create a slice that exists, to delete, reach
or describe one that does not, and to read from a missing folder of a bucket.
"""

import os
import pathlib
import shlex
import shutil
import sys
import time

import conftest
import pytest
import scripts

_RUN = ('train', '--config=configs/blop.py', "--config.eval.prompts=('a b',)",
        '--workdir=gs://bucket/blop')

# The file `states` lists the coming states of the queued resource; each query
# takes the first, and the last one stays. `answers` lists those of `host.sh
# status`, where PREEMPT takes the slice away. A command that contains a line of
# `broken` fails once.
_GCLOUD = r'''
import os, pathlib, re, shutil, sys
cloud = pathlib.Path(os.environ['CLOUD'])
arguments = sys.argv[1:]
line = ' '.join(arguments)
with open(cloud / 'calls', 'a') as file:
  file.write(line + '\n')

def lines(name):
  path = cloud / name
  return path.read_text().splitlines() if path.exists() else []

def put(name, values):
  (cloud / name).write_text(''.join(v + '\n' for v in values))

def fail(text, status=1):
  print('ERROR: (gcloud) ' + text, file=sys.stderr)
  sys.exit(status)

broken = lines('broken')
for text in broken:
  if text in line:
    broken.remove(text)
    put('broken', broken)
    fail('PERMISSION_DENIED: ' + text)
states = lines('states')
if 'queued-resources list' in line:
  if states:
    print(states[0])
    put('states', states[1:] or states)
elif 'queued-resources create' in line:
  if states:
    fail('ALREADY_EXISTS')
  put('states', lines('next') or ['ACTIVE'])
  put('next', [])
elif 'queued-resources delete' in line:
  if not states:
    fail('NOT_FOUND')
  put('states', [])
elif 'queued-resources describe' in line:
  print('state: ' + (states or fail('NOT_FOUND'))[0])
elif 'tpu-vm' in line:
  if states != ['ACTIVE']:
    fail('the node is not there', 255)
  if 'host.sh status' in line:
    answers = lines('answers')
    put('answers', answers[1:])
    if answers[0] == 'PREEMPT':
      put('states', ['SUSPENDING', 'SUSPENDED'])
      fail('connection closed', 255)
    print(answers[0])
elif arguments[:3] == ['storage', 'cp', '-']:
  path = cloud / arguments[3].removeprefix('gs://')
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(sys.stdin.read())
elif arguments[:2] == ['storage', 'rsync']:
  source, target = (
      cloud / a.removeprefix('gs://') if a.startswith('gs://')
      else pathlib.Path(a) for a in arguments[2:] if not a.startswith('--'))
  if not source.is_dir():
    fail('did not match existing container: ' + str(source))
  left_out = next(
      (a[10:] for a in arguments if a.startswith('--exclude=')), '$^')
  def names(folder):
    found = (str(p.relative_to(folder)) for p in folder.rglob('*')
             if p.is_file())
    return {n for n in found if not re.match(left_out, n)}
  for name in names(source):
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / name, target / name)
  if '--delete-unmatched-destination-objects' in arguments:
    for name in names(target) - names(source):
      (target / name).unlink()
else:
  fail('unrecognized arguments: ' + line)
'''


@pytest.fixture(name='cloud')
def _cloud(tmp_path, monkeypatch):
  """An empty cloud with its gcloud, and a small project."""
  scripts.copy_launch(tmp_path, monkeypatch)
  programs, cloud = tmp_path / 'bin', tmp_path / 'cloud'
  cloud.mkdir()
  scripts.write_program(
      programs / 'gcloud', _GCLOUD, f'{sys.executable} -SE')
  # Without a metadata server a host is the first one.
  scripts.write_program(programs / 'curl', 'exit 7')
  for name, value in {
      'CLOUD': str(cloud), 'PROJECT': 'p', 'ZONE': 'z', 'POLL': '0'}.items():
    monkeypatch.setenv(name, value)
  for name in ('ACCELERATOR', 'TPU_NAME', 'SPOT', 'RUNTIME', 'CREATE_FLAGS',
               'DRY_RUN', 'TPU_SETTINGS', 'WEIGHTS', 'EXTRAS', 'RESTARTS'):
    monkeypatch.delenv(name, raising=False)
  return cloud


def _launch(script, *arguments, **options):
  return scripts.launch(f'tpu_vm/{script}', *arguments, **options)


def _calls(cloud, *parts):
  """Returns the calls of gcloud that contain one of `parts`, or all calls."""
  return [call for call in scripts.read_lines(cloud / 'calls')
          if not parts or any(part in call for part in parts)]


def _put(cloud, name, *lines):
  (cloud / name).write_text(''.join(line + '\n' for line in lines))


_WHERE = ' --project=p --zone=z --quiet'


# What is printed ------------------------------------------------------------


@pytest.mark.parametrize('script, arguments, expected', [
    ('create', (), [
        'compute tpus queued-resources list',
        'compute tpus queued-resources create gemma-sft --node-id=gemma-sft'
        ' --accelerator-type=v5litepod-8'
        ' --runtime-version=v2-alpha-tpuv5-lite --spot' + _WHERE]),
    ('setup', (), [
        'mkdir', 'tar -czf build/tpu_vm.tar.gz',
        'compute tpus tpu-vm scp build/tpu_vm.tar.gz'
        ' gemma-sft:gemma_sft.tar.gz --worker=all' + _WHERE,
        'host.sh install tpu,base']),
    ('run', _RUN, ['host.sh start train --config=configs/blop.py']),
    ('watch', _RUN, [
        'queued-resources list', 'queued-resources create', 'mkdir', 'tar',
        'scp', 'host.sh install', 'host.sh start train', 'host.sh status']),
    ('logs', (), ['--worker=0 "--command=tail -n 50 -F gemma_sft_job/log"']),
    ('stop', (), ['--worker=all']),
    ('delete', (), [
        'queued-resources list',
        'queued-resources delete gemma-sft --force' + _WHERE]),
])
def test_a_dry_run_prints_the_commands_and_runs_none(
    cloud, script, arguments, expected):
  before = sorted(pathlib.Path().rglob('*'))
  done = _launch(script, *arguments, DRY_RUN='1')
  assert done.returncode == 0, done.stderr
  assert not _calls(cloud)
  assert sorted(pathlib.Path().rglob('*')) == before
  printed = done.stdout.splitlines()
  assert len(printed) == len(expected)
  for line, part in zip(printed, expected):
    # Read the line as a shell does.
    assert ' '.join(shlex.split(part)) in ' '.join(shlex.split(line))


def test_arguments_reach_the_host_unchanged(cloud):
  _put(cloud, 'states', 'ACTIVE')
  assert _launch('run', *_RUN).returncode == 0
  call, = _calls(cloud, 'host.sh start')
  command = call.partition('--command=')[2].partition(_WHERE)[0]
  assert tuple(shlex.split(command.partition(' start ')[2])) == _RUN
  assert '--worker=all' in call


# Mistakes -------------------------------------------------------------------


@pytest.mark.parametrize('variables, got', [
    ({'PROJECT': ''}, 'no PROJECT'),
    ({'ZONE': ''}, 'no ZONE'),
    ({'ACCELERATOR': 'v5e-8'}, 'ACCELERATOR=v5e-8'),
    ({'ACCELERATOR': 'v6e-12'}, 'ACCELERATOR=v6e-12'),
    ({'TPU_NAME': 'My_TPU'}, 'TPU_NAME=My_TPU'),
    ({'SPOT': 'yes'}, 'SPOT=yes'),
])
@pytest.mark.parametrize('script', ['create', 'delete', 'watch'])
def test_a_mistake_is_reported_in_one_line(cloud, script, variables, got):
  scripts.check_refused(_launch(script, *_RUN, **variables), got)
  assert not _calls(cloud)


@pytest.mark.parametrize('script, arguments, got', [
    ('run', (), "entry point ''"),
    ('run', ('trian', *_RUN[1:]), "entry point 'trian'"),
    ('run', _RUN[:-1], 'no --workdir'),
    ('watch', (*_RUN[:-1], '--workdir=workdirs/x'), '--workdir=workdirs/x'),
])
def test_invalid_arguments_of_a_run_are_refused(cloud, script, arguments, got):
  scripts.check_refused(_launch(script, *arguments), got)
  assert not _calls(cloud)


def test_settings_may_come_from_a_file(cloud, tmp_path):
  settings = tmp_path / 'tpu.env'
  settings.write_text('ZONE=there\nACCELERATOR=v6e-16\nSPOT=0\n'
                      'CREATE_FLAGS="--internal-ips --network=n"\n')
  assert _launch('create', TPU_SETTINGS=str(settings)).returncode == 0
  call, = _calls(cloud, 'create')
  assert call.endswith(
      '--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e'
      ' --internal-ips --network=n --project=p --zone=there --quiet')


# The slice ------------------------------------------------------------------


def test_creating_a_slice_again_does_nothing(cloud):
  _put(cloud, 'next', 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE')
  first = _launch('create')
  assert first.returncode == 0, first.stderr
  assert [line.rpartition(' ')[2] for line in first.stdout.splitlines()] == [
      'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE']
  assert _launch('create').returncode == 0
  assert len(_calls(cloud, 'queued-resources create')) == 1


@pytest.mark.parametrize('states', [
    ('SUSPENDED',), ('SUSPENDING', 'SUSPENDED'), ('FAILED',),
    ('PROVISIONING', 'SUSPENDING', 'SUSPENDED')])
def test_a_lost_slice_is_requested_again(cloud, states):
  _put(cloud, 'states', *states)
  assert _launch('create').returncode == 0
  assert [c.split()[3] for c in _calls(cloud, 'create', 'delete')] == [
      'delete', 'create']


def test_a_failed_request_is_reported(cloud):
  _put(cloud, 'next', 'ACCEPTED', 'FAILED')
  done = _launch('create')
  assert done.returncode == 1
  assert 'state: FAILED' in done.stderr


def test_deleting_a_slice_again_does_nothing(cloud):
  _put(cloud, 'states', 'ACTIVE')
  assert _launch('delete').returncode == 0
  again = _launch('delete')
  assert again.returncode == 0
  assert 'there is no gemma-sft in zone z of project p' in again.stdout
  assert len(_calls(cloud, 'queued-resources delete')) == 1


@pytest.mark.parametrize('script, broken', [
    ('create', 'list'), ('create', 'create'), ('delete', 'list'),
    ('setup', 'scp'), ('run', 'host.sh start'), ('watch', 'list')])
def test_an_error_of_gcloud_is_passed_on(cloud, script, broken):
  _put(cloud, 'states', *(['ACTIVE'] if broken != 'create' else []))
  _put(cloud, 'broken', broken)
  done = _launch(script, *_RUN)
  assert done.returncode == 1
  assert 'PERMISSION_DENIED' in done.stderr


# The watch ------------------------------------------------------------------

_START = ['create', 'install', 'start']


def _events(cloud):
  names = {'create': 'create', 'delete': 'delete', 'install': 'install',
           'start train': 'start', 'host.sh stop': 'stop'}
  return [names[next(n for n in names if n in c)] for c in _calls(
      cloud, *names)]


def test_a_preempted_run_continues_on_another_slice(cloud):
  _put(cloud, 'answers', 'none', 'running', 'PREEMPT', 'none', 'running',
       'PREEMPT', 'none', 'running', 'exit 0')
  done = _launch('watch', *_RUN, DELETE='1')
  assert done.returncode == 0, done.stderr
  assert _events(cloud) == [*_START, 'delete'] * 3
  assert len(set(_calls(cloud, 'start train'))) == 1  # The same command.
  assert 'gs://bucket/blop' in done.stdout


@pytest.mark.parametrize('states, answers, events, printed', [
    pytest.param(['ACTIVE'], ['running', 'exit 0'], [], 'the run has ended',
                 id='a run in progress is watched'),
    pytest.param(['ACTIVE'], ['exit 2', 'running', 'stopped'], _START[1:],
                 'stopped', id='the end of an earlier run does not count'),
    pytest.param([], ['none', 'running', 'none', 'exit 0'],
                 [*_START, *_START[1:]], 'the run has ended',
                 id='after a reboot the run starts again'),
    pytest.param([], ['none', 'running', 'exit 75'], _START,
                 'continues from gs://bucket/blop',
                 id='a deadline ends the watch'),
])
def test_a_watch_that_ends_well(cloud, states, answers, events, printed):
  _put(cloud, 'states', *states)
  _put(cloud, 'answers', *answers)
  done = _launch('watch', *_RUN)
  assert done.returncode == 0, done.stderr
  assert _events(cloud) == events
  assert printed in done.stdout


def test_crashes_are_limited_and_mistakes_final(cloud):
  _put(cloud, 'answers', 'none', *['exit 1'] * 9)
  done = _launch('watch', *_RUN, RESTARTS='2')
  assert done.returncode == 1
  assert _events(cloud) == [*_START, *['stop', *_START[1:]] * 2]
  _put(cloud, 'answers', 'none', 'exit 2')
  assert _launch('watch', *_RUN).returncode == 2
  assert _calls(cloud, 'tail -n 20')


def test_a_watch_survives_lost_connections(cloud):
  _put(cloud, 'broken', 'scp', 'host.sh status', 'host.sh start')
  _put(cloud, 'answers', 'none', 'none', 'none', 'running', 'exit 0')
  done = _launch('watch', *_RUN)
  assert done.returncode == 0, done.stderr
  assert len(_calls(cloud, 'queued-resources create')) == 1


# The host -------------------------------------------------------------------

# Stands in for Python. It saves a checkpoint at the start and on a SIGTERM, and
# runs until the file `wait` is gone.
_TRAIN = r'''
workdir="${!#}"
workdir="${workdir#--workdir=}"
echo "$*" >"$JOB/arguments"
save() {
  step=$(($(cat "$workdir/checkpoints/latest" 2>/dev/null || echo 0) + 1))
  mkdir -p "$workdir/checkpoints/$step.orbax-checkpoint-tmp"
  echo half >"$workdir/checkpoints/$step.orbax-checkpoint-tmp/a"
  touch "$workdir/.lock"
  rm -rf "$workdir/checkpoints/$((step - 2))"
  mkdir -p "$workdir/checkpoints/$step"
  echo "$step" >"$workdir/checkpoints/$step/a"
  echo "$step" >"$workdir/checkpoints/latest"
}
trap 'echo terminated >>"$JOB/signals"; save; exit 75' TERM
save
touch "$JOB/started"
while [ -e "$JOB/wait" ]; do sleep 0.02; done
exit "$(cat "$JOB/train_status" 2>/dev/null || echo 0)"
'''


@pytest.fixture(name='host')
def _host(cloud, tmp_path, monkeypatch):
  """A host that has been set up; returns its job folder."""
  del cloud
  job = tmp_path / 'job'
  job.mkdir()
  monkeypatch.setenv('JOB', str(job))
  _new_disk(tmp_path)
  yield job
  (job / 'wait').unlink(missing_ok=True)
  assert _wait(lambda: _status(tmp_path) != 'running')


def _new_disk(tmp_path):
  root = tmp_path / 'gemma_sft'
  shutil.rmtree(root, ignore_errors=True)
  (root / 'launch' / 'tpu_vm').mkdir(parents=True)
  for name in ('environment.sh', 'tpu_vm/host.sh'):
    shutil.copy(conftest.ROOT / 'launch' / name, root / 'launch' / name)
  (root / '.venv' / 'bin').mkdir(parents=True)
  scripts.write_program(root / '.venv' / 'bin' / 'python', _TRAIN)


def _on(tmp_path, *arguments, **environment):
  done = _launch('host', *arguments, cwd=tmp_path / 'gemma_sft', **environment)
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


def _status(tmp_path):
  return _on(tmp_path, 'status')


def _wait(condition):
  end = time.monotonic() + 120
  while time.monotonic() < end:
    if condition():
      return True
    time.sleep(0.02)
  return False


def _check_end(tmp_path, status):
  assert _wait(lambda: _status(tmp_path) != 'running')
  assert _status(tmp_path) == status


def _run_on(tmp_path, status):
  """Starts the run and waits for its end."""
  _on(tmp_path, 'start', *_RUN)
  _check_end(tmp_path, status)


def _start_waiting(host, tmp_path):
  """Starts a run that does not end by itself."""
  (host / 'wait').touch()
  _on(tmp_path, 'start', *_RUN)
  assert _wait((host / 'started').exists)


def _check_terminated_once(cloud, host):
  assert (host / 'signals').read_text() == 'terminated\n'
  assert (cloud / 'bucket/blop/checkpoints/latest').read_text() == '2\n'


def _files(folder):
  return {str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file()}


def test_a_run_is_copied_to_the_bucket_and_continues_from_there(
    cloud, host, tmp_path):
  bucket = cloud / 'bucket' / 'blop'
  assert _status(tmp_path) == 'none'
  for start in (1, 2, 3):
    _new_disk(tmp_path)
    _run_on(tmp_path, 'exit 0')
    assert (bucket / 'checkpoints' / 'latest').read_text() == f'{start}\n'
  # Unfinished files are not copied, and deletions are repeated in the bucket.
  assert _files(bucket) == {
      '.synchronised', 'checkpoints/latest', 'checkpoints/2/a',
      'checkpoints/3/a'}
  assert (host / 'arguments').read_text().split()[:3] == [
      '-m', 'gemma_sft.train', '--config=configs/blop.py']
  assert '--workdir=workdirs/bucket/blop' in (host / 'arguments').read_text()


def test_a_run_is_copied_while_it_runs(cloud, host, tmp_path):
  (host / 'wait').touch()
  _on(tmp_path, 'start', *_RUN, SYNC_SECONDS='0.05')
  assert _wait((cloud / 'bucket/blop/checkpoints/latest').exists)
  assert _status(tmp_path) == 'running'


def test_starting_a_run_again_does_nothing(host, tmp_path):
  _start_waiting(host, tmp_path)
  assert 'in progress already' in _on(tmp_path, 'start', *_RUN)
  assert (host / 'log').read_text().count('== ') == 1


def test_a_stopped_run_saves_first(cloud, host, tmp_path):
  _on(tmp_path, 'stop')  # Without a run this does nothing.
  _start_waiting(host, tmp_path)
  _on(tmp_path, 'stop')
  assert _status(tmp_path) == 'stopped'
  _check_terminated_once(cloud, host)


def test_a_shutdown_does_not_count_as_the_end(cloud, host, tmp_path):
  # Every process gets its own SIGTERM; the run must not get a second one.
  _start_waiting(host, tmp_path)
  train = int((host / 'process').read_text())
  work = int(pathlib.Path(f'/proc/{train}/stat').read_text().split()[3])
  os.kill(work, 15)
  os.kill(train, 15)
  _check_end(tmp_path, 'none')
  _check_terminated_once(cloud, host)


def test_the_status_is_that_of_the_run(host, tmp_path):
  (host / 'train_status').write_text('2')
  _run_on(tmp_path, 'exit 2')


def test_a_bucket_that_cannot_be_written_is_reported_first(
    cloud, host, tmp_path):
  _put(cloud, 'broken', 'storage cp')
  _run_on(tmp_path, 'exit 1')
  assert not (host / 'started').exists()
  assert 'PERMISSION_DENIED' in (host / 'log').read_text()


def test_nothing_is_deleted_after_a_failed_copy(cloud, host, tmp_path):
  bucket = cloud / 'bucket' / 'blop'
  for _ in range(2):
    _run_on(tmp_path, 'exit 0')
  _put(cloud, 'broken', 'rsync --recursive --exclude')
  _run_on(tmp_path, 'exit 1')
  assert {'checkpoints/1/a', 'checkpoints/2/a'} <= _files(bucket)
  assert (bucket / 'checkpoints/latest').read_text() == '2\n'


def test_only_the_first_host_writes(cloud, host, tmp_path):
  scripts.write_program(tmp_path / 'bin' / 'curl', 'echo -n 1')
  _run_on(tmp_path, 'exit 0')
  assert _files(cloud / 'bucket' / 'blop') == {'.synchronised'}
  assert (host / 'started').exists()
