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
import os, sys
cloud = os.environ['CLOUD']
arguments = sys.argv[1:]
line = ' '.join(arguments)
with open(cloud + '/../calls', 'a') as file:
  file.write(line + '\n')

def lines(name):
  path = os.path.join(cloud, name)
  return open(path).read().splitlines() if os.path.exists(path) else []

def put(name, values):
  with open(os.path.join(cloud, name), 'w') as file:
    file.write(''.join(v + '\n' for v in values))

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
  path = os.path.join(cloud, arguments[3].removeprefix('gs://'))
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with open(path, 'w') as file:
    file.write(sys.stdin.read())
elif arguments[:2] == ['storage', 'rsync']:
  import pathlib, re, shutil  # Slow, and nothing else needs them.
  source, target = (
      pathlib.Path(cloud, a[5:]) if a.startswith('gs://') else pathlib.Path(a)
      for a in arguments[2:] if not a.startswith('--'))
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
  cloud = tmp_path / 'cloud'
  cloud.mkdir()
  scripts.make_project(
      # Without a metadata server a host is the first one.
      tmp_path, monkeypatch, {'curl': 'exit 7'}, CLOUD=str(cloud), PROJECT='p',
      ZONE='z', POLL='0', **dict.fromkeys((
          'ACCELERATOR', 'TPU_NAME', 'SPOT', 'RUNTIME', 'CREATE_FLAGS',
          'TPU_SETTINGS', 'WEIGHTS', 'EXTRAS', 'RESTARTS')))
  scripts.write_program(
      tmp_path / 'bin' / 'gcloud', _GCLOUD, f'{sys.executable} -SE')
  return cloud


def _launch(script, *arguments, status=0, **options):
  done = scripts.launch(f'tpu_vm/{script}', *arguments, **options)
  assert done.returncode == status, done.stderr
  return done


def _put(cloud, name, *lines):
  (cloud / name).write_text(''.join(line + '\n' for line in lines))


_WHERE = ' --project=p --zone=z --quiet'


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
    ('delete', (), ['queued-resources list',
                    'queued-resources delete gemma-sft --force' + _WHERE])])
@pytest.mark.usefixtures('cloud')
def test_a_dry_run_prints_the_commands_and_runs_none(
    script, arguments, expected):
  printed = scripts.check_dry_run(f'tpu_vm/{script}', *arguments)
  for line, part in zip(printed, expected, strict=True):
    # Read the line as a shell does.
    assert ' '.join(shlex.split(part)) in ' '.join(shlex.split(line))


def test_arguments_reach_the_host_unchanged(cloud):
  _put(cloud, 'states', 'ACTIVE')
  _launch('run', *_RUN)
  call, = scripts.calls('host.sh start')
  command = call.partition('--command=')[2].partition(_WHERE)[0]
  assert tuple(shlex.split(command.partition(' start ')[2])) == _RUN
  assert '--worker=all' in call


@pytest.mark.parametrize('script, arguments, variables, got', [
    *((script, _RUN, variables, got)
      for script in ('create', 'delete', 'watch') for variables, got in (
          ({'PROJECT': ''}, 'no PROJECT'),
          ({'ZONE': ''}, 'no ZONE'),
          ({'ACCELERATOR': 'v5e-8'}, 'ACCELERATOR=v5e-8'),
          ({'ACCELERATOR': 'v6e-12'}, 'ACCELERATOR=v6e-12'),
          ({'TPU_NAME': 'My_TPU'}, 'TPU_NAME=My_TPU'),
          ({'SPOT': 'yes'}, 'SPOT=yes'))),
    ('run', (), {}, "entry point ''"),
    ('run', ('trian', *_RUN[1:]), {}, "entry point 'trian'"),
    ('run', _RUN[:-1], {}, 'no --workdir'),
    ('watch', (*_RUN[:-1], '--workdir=workdirs/x'), {}, '--workdir=workdirs/x')
])
@pytest.mark.usefixtures('cloud')
def test_a_mistake_is_reported_in_one_line(script, arguments, variables, got):
  scripts.check_refused(got, f'tpu_vm/{script}', *arguments, **variables)


def test_settings_may_come_from_a_file(cloud):
  _put(cloud, 'tpu.env', 'ZONE=there', 'ACCELERATOR=v6e-16', 'SPOT=0',
       'CREATE_FLAGS="--internal-ips --network=n"')
  _launch('create', TPU_SETTINGS=str(cloud / 'tpu.env'))
  call, = scripts.calls('create')
  assert call.endswith(
      '--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e'
      ' --internal-ips --network=n --project=p --zone=there --quiet')


def test_creating_and_deleting_a_slice_again_does_nothing(cloud):
  _put(cloud, 'next', 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE')
  lines = _launch('create').stdout.splitlines()
  assert [line.rpartition(' ')[2] for line in lines] == [
      'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE']
  _launch('create')
  assert len(scripts.calls('queued-resources create')) == 1
  _launch('delete')
  again = _launch('delete')
  assert 'there is no gemma-sft in zone z of project p' in again.stdout
  assert len(scripts.calls('queued-resources delete')) == 1


@pytest.mark.parametrize('states', [
    ('SUSPENDED',), ('SUSPENDING', 'SUSPENDED'), ('FAILED',),
    ('PROVISIONING', 'SUSPENDING', 'SUSPENDED')])
def test_a_lost_slice_is_requested_again(cloud, states):
  _put(cloud, 'states', *states)
  _launch('create')
  assert [c.split()[3] for c in scripts.calls('create', 'delete')] == [
      'delete', 'create']
  _put(cloud, 'states')
  _put(cloud, 'next', 'ACCEPTED', 'FAILED')
  assert 'state: FAILED' in _launch('create', status=1).stderr


@pytest.mark.parametrize('script, broken', [
    ('create', 'list'), ('create', 'create'), ('delete', 'list'),
    ('setup', 'scp'), ('run', 'host.sh start'), ('watch', 'list')])
def test_an_error_of_gcloud_is_passed_on(cloud, script, broken):
  _put(cloud, 'states', *(['ACTIVE'] if broken != 'create' else []))
  _put(cloud, 'broken', broken)
  assert 'PERMISSION_DENIED' in _launch(script, *_RUN, status=1).stderr


_START = ['create', 'install', 'start train']


def _events():
  names = ('create', 'delete', 'install', 'start train', 'host.sh stop')
  return [next(n for n in names if n in c) for c in scripts.calls(*names)]


def test_a_preempted_run_continues_on_another_slice(cloud):
  _put(cloud, 'answers', 'none', 'running', 'PREEMPT', 'none', 'running',
       'PREEMPT', 'none', 'running', 'exit 0')
  done = _launch('watch', *_RUN, DELETE='1')
  assert _events() == [*_START, 'delete'] * 3
  assert len(set(scripts.calls('start train'))) == 1  # The same command.
  assert 'gs://bucket/blop' in done.stdout


@pytest.mark.parametrize('states, answers, events, printed', [
    (['ACTIVE'], ['running', 'exit 0'], [], 'the run has ended'),
    # The end of an earlier run does not count.
    (['ACTIVE'], ['exit 2', 'running', 'stopped'], _START[1:], 'stopped'),
    # After a reboot the run starts again.
    ([], ['none', 'running', 'none', 'exit 0'], [*_START, *_START[1:]],
     'the run has ended'),
    ([], ['none', 'running', 'exit 75'], _START,
     'continues from gs://bucket/blop')])
def test_a_watch_that_ends_well(cloud, states, answers, events, printed):
  _put(cloud, 'states', *states)
  _put(cloud, 'answers', *answers)
  done = _launch('watch', *_RUN)
  assert _events() == events
  assert printed in done.stdout


def test_connections_may_break_crashes_are_limited_and_mistakes_final(cloud):
  _put(cloud, 'answers', 'none', *['exit 1'] * 9)
  _launch('watch', *_RUN, RESTARTS='2', status=1)
  assert _events() == [*_START, *['host.sh stop', *_START[1:]] * 2]
  _put(cloud, 'answers', 'none', 'exit 2')
  _launch('watch', *_RUN, status=2)
  assert scripts.calls('tail -n 20')
  _put(cloud, 'broken', 'scp', 'host.sh status', 'host.sh start')
  _put(cloud, 'answers', 'none', 'none', 'none', 'running', 'exit 0')
  _launch('watch', *_RUN)
  assert len(scripts.calls('queued-resources create')) == 1


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
  _wait(lambda: _on('status') != 'running')


def _new_disk(tmp_path):
  root = tmp_path / 'gemma_sft'
  shutil.rmtree(root, ignore_errors=True)
  (root / 'launch' / 'tpu_vm').mkdir(parents=True)
  for name in ('environment.sh', 'tpu_vm/host.sh'):
    shutil.copy(conftest.ROOT / 'launch' / name, root / 'launch' / name)
  (root / '.venv' / 'bin').mkdir(parents=True)
  scripts.write_program(root / '.venv' / 'bin' / 'python', _TRAIN)


def _on(*arguments, **environment):
  return _launch(
      'host', *arguments, cwd='../gemma_sft', **environment).stdout.strip()


def _wait(condition):
  end = time.monotonic() + 120
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.02)


def _check_end(status):
  _wait(lambda: _on('status') != 'running')
  assert _on('status') == status


def _run_on(status):
  _on('start', *_RUN)
  _check_end(status)


def _start_waiting(host, **environment):
  """Starts a run that does not end by itself."""
  (host / 'wait').touch()
  _on('start', *_RUN, **environment)
  _wait((host / 'started').exists)


def _check_terminated_once(cloud, host):
  assert (host / 'signals').read_text() == 'terminated\n'
  assert (cloud / 'bucket/blop/checkpoints/latest').read_text() == '2\n'


def _files(folder):
  return {str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file()}


def test_a_run_is_copied_to_the_bucket_and_continues_from_there(
    cloud, host, tmp_path):
  bucket = cloud / 'bucket' / 'blop'
  assert _on('status') == 'none'
  for start in (1, 2, 3):
    _new_disk(tmp_path)
    _run_on('exit 0')
    assert (bucket / 'checkpoints' / 'latest').read_text() == f'{start}\n'
  # Unfinished files are not copied, and deletions are repeated in the bucket.
  assert _files(bucket) == {'.synchronised', 'checkpoints/latest',
                            'checkpoints/2/a', 'checkpoints/3/a'}
  arguments = (host / 'arguments').read_text()
  assert arguments.startswith('-m gemma_sft.train --config=configs/blop.py ')
  assert '--workdir=workdirs/bucket/blop' in arguments
  # Nothing is deleted after a failed copy.
  _put(cloud, 'broken', 'rsync --recursive --exclude')
  _run_on('exit 1')
  assert {'checkpoints/2/a', 'checkpoints/3/a'} <= _files(bucket)
  assert (bucket / 'checkpoints/latest').read_text() == '3\n'


def test_a_run_is_copied_while_it_runs_and_saves_before_it_stops(cloud, host):
  _on('stop')  # Without a run this does nothing.
  _start_waiting(host, SYNC_SECONDS='0.05')
  _wait((cloud / 'bucket/blop/checkpoints/latest').exists)
  assert _on('status') == 'running'
  assert 'in progress already' in _on('start', *_RUN)
  assert (host / 'log').read_text().count('== ') == 1
  _on('stop')
  assert _on('status') == 'stopped'
  _check_terminated_once(cloud, host)


def test_a_shutdown_does_not_count_as_the_end(cloud, host):
  # Every process gets its own SIGTERM; the run must not get a second one.
  _start_waiting(host)
  train = int((host / 'process').read_text())
  os.kill(int(pathlib.Path(f'/proc/{train}/stat').read_text().split()[3]), 15)
  os.kill(train, 15)
  _check_end('none')
  _check_terminated_once(cloud, host)


def test_a_bucket_that_cannot_be_written_is_reported_first(cloud, host):
  _put(cloud, 'broken', 'storage cp')
  _run_on('exit 1')
  assert not (host / 'started').exists()
  assert 'PERMISSION_DENIED' in (host / 'log').read_text()
  (host / 'train_status').write_text('2')
  _run_on('exit 2')  # The run's own status.


def test_only_the_first_host_writes(cloud, host, tmp_path):
  scripts.write_program(tmp_path / 'bin' / 'curl', 'echo -n 1')
  _run_on('exit 0')
  assert _files(cloud / 'bucket' / 'blop') == {'.synchronised'}
  assert (host / 'started').exists()
