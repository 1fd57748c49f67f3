"""The scripts for Cloud TPU, with a gcloud that keeps its cloud in a folder.

It refuses what the real one refuses: to create what is there, to delete, reach
or describe what is not, to read from a bucket's folder that is not there.
"""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import conftest
import pytest

_BASH = shutil.which('bash')
_RUN = ('train', '--config=configs/blop.py', "--config.eval.prompts=('a b',)",
        '--workdir=gs://bucket/blop')

# States of the queued resource stand in `states`, one a line; looking takes the
# first and leaves the last. `answers` are those of `host.sh status`; PREEMPT
# takes the slice away. A command that contains a line of `broken` fails once.
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
  """A cloud without anything in it, its gcloud first on the PATH, and a project
  small enough to be packed in no time."""
  shutil.copytree(conftest.ROOT / 'launch', tmp_path / 'project' / 'launch')
  (tmp_path / 'project' / 'gemma_sft').mkdir()
  (tmp_path / 'project' / 'gemma_sft' / 'train.py').touch()
  programs, cloud = tmp_path / 'bin', tmp_path / 'cloud'
  programs.mkdir()
  cloud.mkdir()
  _program(programs / 'gcloud', f'#!{sys.executable} -SE{_GCLOUD}')
  # No metadata server: this is the first host.
  _program(programs / 'curl', f'#!{_BASH}\nexit 7\n')
  monkeypatch.setenv('PATH', f'{programs}{os.pathsep}{os.environ["PATH"]}')
  monkeypatch.setenv('CLOUD', str(cloud))
  for name, value in {'PROJECT': 'p', 'ZONE': 'z', 'POLL': '0'}.items():
    monkeypatch.setenv(name, value)
  for name in ('ACCELERATOR', 'TPU_NAME', 'SPOT', 'RUNTIME', 'CREATE_FLAGS',
               'DRY_RUN', 'TPU_SETTINGS', 'WEIGHTS', 'EXTRAS', 'RESTARTS'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.chdir(tmp_path / 'project')
  return cloud


def _program(path, text):
  path.write_text(text)
  path.chmod(0o755)


def _launch(script, *arguments, root=None, **environment):
  return subprocess.run(
      [_BASH, f'launch/tpu_vm/{script}.sh', *arguments], cwd=root,
      env=os.environ | environment, capture_output=True, text=True,
      check=False, timeout=300)


def _calls(cloud, *parts):
  """The calls so far that contain one of `parts`, or all of them."""
  path = cloud / 'calls'
  lines = path.read_text().splitlines() if path.exists() else []
  return [c for c in lines if not parts or any(p in c for p in parts)]


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
    ('stop', (), ['--worker=all', ]),
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
    # Printed for a shell: read as one.
    assert ' '.join(shlex.split(part)) in ' '.join(shlex.split(line))


def test_arguments_reach_the_host_as_they_are(cloud):
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
def test_a_mistake_is_told_in_one_line(cloud, script, variables, got):
  done = _launch(script, *_RUN, **variables)
  assert done.returncode == 2
  line, = done.stderr.splitlines()
  assert line.startswith(f'got: {got}; expected: ') and '; fix: ' in line
  assert not _calls(cloud)


@pytest.mark.parametrize('script, arguments, got', [
    ('run', (), "entry point ''"),
    ('run', ('trian', *_RUN[1:]), "entry point 'trian'"),
    ('run', _RUN[:-1], 'no --workdir'),
    ('watch', (*_RUN[:-1], '--workdir=workdirs/x'), '--workdir=workdirs/x'),
])
def test_a_run_that_could_not_go_is_refused(cloud, script, arguments, got):
  done = _launch(script, *arguments)
  assert done.returncode == 2
  assert done.stderr.startswith(f'got: {got}') and '; fix: ' in done.stderr
  assert not _calls(cloud)


def test_settings_may_stand_in_a_file(cloud, tmp_path):
  settings = tmp_path / 'tpu.env'
  settings.write_text('ZONE=there\nACCELERATOR=v6e-16\nSPOT=0\n'
                      'CREATE_FLAGS="--internal-ips --network=n"\n')
  assert _launch('create', TPU_SETTINGS=str(settings)).returncode == 0
  call, = _calls(cloud, 'create')
  assert call.endswith(
      '--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e'
      ' --internal-ips --network=n --project=p --zone=there --quiet')


# The slice ------------------------------------------------------------------


def test_created_twice_it_is_there_once(cloud):
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
def test_what_was_taken_away_is_asked_for_again(cloud, states):
  _put(cloud, 'states', *states)
  assert _launch('create').returncode == 0
  assert [c.split()[3] for c in _calls(cloud, 'create', 'delete')] == [
      'delete', 'create']


def test_a_request_that_fails_says_why(cloud):
  _put(cloud, 'next', 'ACCEPTED', 'FAILED')
  done = _launch('create')
  assert done.returncode == 1
  assert 'state: FAILED' in done.stderr


def test_deleted_twice_is_no_error(cloud):
  _put(cloud, 'states', 'ACTIVE')
  assert _launch('delete').returncode == 0
  again = _launch('delete')
  assert again.returncode == 0 and 'there is no gemma-sft' in again.stdout
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


def _story(cloud):
  names = {'create': 'create', 'delete': 'delete', 'install': 'install',
           'start train': 'start', 'host.sh stop': 'stop'}
  return [names[next(n for n in names if n in c)] for c in _calls(
      cloud, *names)]


def test_a_preempted_run_goes_on_on_another_slice(cloud):
  _put(cloud, 'answers', 'none', 'running', 'PREEMPT', 'none', 'running',
       'PREEMPT', 'none', 'running', 'exit 0')
  done = _launch('watch', *_RUN, DELETE='1')
  assert done.returncode == 0, done.stderr
  once = ['create', 'install', 'start']
  assert _story(cloud) == [*once, 'delete', *once, 'delete', *once, 'delete']
  assert len(set(_calls(cloud, 'start train'))) == 1  # The same command.
  assert 'gs://bucket/blop' in done.stdout


def test_a_watch_takes_up_a_run_under_way(cloud):
  _put(cloud, 'states', 'ACTIVE')
  _put(cloud, 'answers', 'running', 'exit 0')
  assert _launch('watch', *_RUN).returncode == 0
  assert not _story(cloud)


def test_how_an_earlier_run_ended_is_not_this_one(cloud):
  _put(cloud, 'states', 'ACTIVE')
  _put(cloud, 'answers', 'exit 2', 'running', 'stopped')
  assert _launch('watch', *_RUN).returncode == 0
  assert _story(cloud) == ['install', 'start']


def test_a_rebooted_host_is_started_again(cloud):
  _put(cloud, 'answers', 'none', 'running', 'none', 'exit 0')
  assert _launch('watch', *_RUN).returncode == 0
  assert _story(cloud) == ['create', *['install', 'start'] * 2]


def test_crashes_are_few_and_mistakes_final(cloud):
  _put(cloud, 'answers', 'none', *['exit 1'] * 9)
  done = _launch('watch', *_RUN, RESTARTS='2')
  assert done.returncode == 1
  assert _story(cloud) == ['create', 'install', 'start',
                           *['stop', 'install', 'start'] * 2]
  _put(cloud, 'answers', 'none', 'exit 2')
  assert _launch('watch', *_RUN).returncode == 2
  assert _calls(cloud, 'tail -n 20')


def test_a_deadline_ends_the_watch(cloud):
  _put(cloud, 'answers', 'none', 'running', 'exit 75')
  done = _launch('watch', *_RUN)
  assert done.returncode == 0, done.stderr
  assert _story(cloud) == ['create', 'install', 'start']
  assert 'goes on from gs://bucket/blop' in done.stdout


def test_a_lost_connection_ends_nothing(cloud):
  _put(cloud, 'broken', 'scp', 'host.sh status', 'host.sh start')
  _put(cloud, 'answers', 'none', 'none', 'none', 'running', 'exit 0')
  done = _launch('watch', *_RUN)
  assert done.returncode == 0, done.stderr
  assert len(_calls(cloud, 'queued-resources create')) == 1


# The host -------------------------------------------------------------------

# Counts its starts in the workdir. `save` is what it does at the end, and at a
# SIGTERM; with `wait` there, it first waits for that.
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
  _program(root / '.venv' / 'bin' / 'python', f'#!{_BASH}{_TRAIN}')


def _on(tmp_path, *arguments, **environment):
  done = _launch('host', *arguments, root=tmp_path / 'gemma_sft', **environment)
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


def _ends(tmp_path, status):
  assert _wait(lambda: _status(tmp_path) != 'running')
  assert _status(tmp_path) == status


def _files(folder):
  return {str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file()}


def test_a_run_ends_in_the_bucket_and_goes_on_from_there(
    cloud, host, tmp_path):
  bucket = cloud / 'bucket' / 'blop'
  assert _status(tmp_path) == 'none'
  for start in (1, 2, 3):
    _new_disk(tmp_path)
    _on(tmp_path, 'start', *_RUN)
    _ends(tmp_path, 'exit 0')
    assert (bucket / 'checkpoints' / 'latest').read_text() == f'{start}\n'
  # What is half done stays out, what was deleted here is deleted there.
  assert _files(bucket) == {
      '.synchronised', 'checkpoints/latest', 'checkpoints/2/a',
      'checkpoints/3/a'}
  assert (host / 'arguments').read_text().split()[:3] == [
      '-m', 'gemma_sft.train', '--config=configs/blop.py']
  assert '--workdir=workdirs/bucket/blop' in (host / 'arguments').read_text()


def test_it_is_copied_while_it_runs(cloud, host, tmp_path):
  (host / 'wait').touch()
  _on(tmp_path, 'start', *_RUN, SYNC_SECONDS='0.05')
  assert _wait((cloud / 'bucket/blop/checkpoints/latest').exists)
  assert _status(tmp_path) == 'running'


def test_started_twice_it_runs_once(host, tmp_path):
  (host / 'wait').touch()
  _on(tmp_path, 'start', *_RUN)
  assert _wait((host / 'started').exists)
  assert 'under way already' in _on(tmp_path, 'start', *_RUN)
  assert (host / 'log').read_text().count('== ') == 1


def test_stopped_it_saves_first(cloud, host, tmp_path):
  (host / 'wait').touch()
  _on(tmp_path, 'stop')  # Nothing runs: nothing happens.
  _on(tmp_path, 'start', *_RUN)
  assert _wait((host / 'started').exists)
  _on(tmp_path, 'stop')
  assert _status(tmp_path) == 'stopped'
  assert (host / 'signals').read_text() == 'terminated\n'
  assert (cloud / 'bucket/blop/checkpoints/latest').read_text() == '2\n'


def test_a_shutdown_is_no_end(cloud, host, tmp_path):
  # Every process gets a SIGTERM of its own; the run must not get two.
  (host / 'wait').touch()
  _on(tmp_path, 'start', *_RUN)
  assert _wait((host / 'started').exists)
  train = int((host / 'process').read_text())
  work = int(pathlib.Path(f'/proc/{train}/stat').read_text().split()[3])
  os.kill(work, 15)
  os.kill(train, 15)
  _ends(tmp_path, 'none')
  assert (host / 'signals').read_text() == 'terminated\n'
  assert (cloud / 'bucket/blop/checkpoints/latest').read_text() == '2\n'


def test_the_status_is_that_of_the_run(host, tmp_path):
  (host / 'train_status').write_text('2')
  _on(tmp_path, 'start', *_RUN)
  _ends(tmp_path, 'exit 2')


def test_a_bucket_that_cannot_be_written_is_told_first(cloud, host, tmp_path):
  _put(cloud, 'broken', 'storage cp')
  _on(tmp_path, 'start', *_RUN)
  _ends(tmp_path, 'exit 1')
  assert not (host / 'started').exists()
  assert 'PERMISSION_DENIED' in (host / 'log').read_text()


def test_nothing_is_deleted_after_a_copy_that_failed(cloud, host, tmp_path):
  bucket = cloud / 'bucket' / 'blop'
  for _ in range(2):
    _on(tmp_path, 'start', *_RUN)
    _ends(tmp_path, 'exit 0')
  _put(cloud, 'broken', 'rsync --recursive --exclude')
  _on(tmp_path, 'start', *_RUN)
  _ends(tmp_path, 'exit 1')
  assert {'checkpoints/1/a', 'checkpoints/2/a'} <= _files(bucket)
  assert (bucket / 'checkpoints/latest').read_text() == '2\n'


def test_only_the_first_host_writes(cloud, host, tmp_path):
  _program(tmp_path / 'bin' / 'curl', f'#!{_BASH}\necho -n 1\n')
  _on(tmp_path, 'start', *_RUN)
  _ends(tmp_path, 'exit 0')
  assert _files(cloud / 'bucket' / 'blop') == {'.synchronised'}
  assert (host / 'started').exists()
