"""The scripts for NVIDIA cards and SLURM, with stand-ins; the image's files."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import conftest
import pytest
import scripts

_RUN = ('train', '--config=configs/blop.py', "--config.eval.prompts=('a b',)",
        '--workdir=workdirs/blop')
_FOLDER = conftest.ROOT / 'launch' / 'gpu'


@pytest.fixture(name='project')
def _project(tmp_path, monkeypatch):
  """An installed project on a machine with two cards and SLURM."""
  calls = tmp_path / 'calls'
  project = scripts.make_project(
      tmp_path, monkeypatch, {
          'nvidia-smi': 'printf "0, 580.65.06\\n1, 580.65.06\\n"',
          'srun': f'echo "srun $*" >>{calls}\n'
                  'while [[ "$1" = --* ]]; do shift; done\nexec "$@"',
          'scancel': f'echo "scancel $*" >>{calls};'
                     f' kill "$(cat {tmp_path}/process)"',
          'scontrol': f'echo "scontrol $*" >>{calls}'},
      GEMMA_SFT_CACHE=str(tmp_path / 'project/cache'), SLURM_JOB_ID='7',
      SLURM_SUBMIT_DIR=str(tmp_path / 'project'), SLURM_GPUS_ON_NODE='2',
      GPUS=None, EXTRAS=None, CUDA_VISIBLE_DEVICES=None)
  for folder in ('.venv/bin', 'cache/blop/node_modules/blop-language'):
    (project / folder).mkdir(parents=True)
  (project / 'setup.py').touch()
  (project / '.venv' / '.installed-cuda,base').touch()
  os.utime(project / 'setup.py', (0, 0))
  scripts.write_program(project / '.venv/bin/python', f'''
echo "python $* cards=${{CUDA_VISIBLE_DEVICES-}} \\
ids=${{JAX_LOCAL_DEVICE_IDS-}}" >>{calls}
trap 'echo terminated >>{calls}; exit 75' TERM
echo $$ >{tmp_path}/process
while [ -e {tmp_path}/wait ]; do sleep 0.02; done
exit "$(cat {tmp_path}/status 2>/dev/null || echo 0)"''')
  return project


_TRAIN = 'python -m gemma_sft.' + ' '.join(_RUN) + ' '


def test_a_run_takes_all_cards_or_those_named(project):
  assert scripts.launch('gpu/run', *_RUN).returncode == 0
  assert scripts.launch('gpu/run', *_RUN, GPUS='1').returncode == 0
  assert scripts.calls() == [_TRAIN + 'cards= ids=', _TRAIN + 'cards=1 ids=']
  (project.parent / 'status').write_text('2')
  assert scripts.launch('gpu/run', *_RUN).returncode == 2


@pytest.mark.parametrize('script, expected', [
    ('run', ['nvidia-smi --query-gpu=index,driver_version'
             ' --format=csv,noheader', 'make_environment cuda,base',
             'bash launch/blop_compiler.sh',
             "env CUDA_VISIBLE_DEVICES=0 .venv/bin/python -m gemma_sft.train"]),
    ('setup', ['make_environment cuda,base', 'bash launch/blop_compiler.sh']),
    ('slurm', ['JAX_LOCAL_DEVICE_IDS=0,1 srun --ntasks-per-node=1'
               ' --kill-on-bad-exit=1 .venv/bin/python -m gemma_sft.train'])])
@pytest.mark.usefixtures('project')
def test_a_dry_run_prints_the_commands_and_runs_none(script, expected):
  lines = scripts.check_dry_run(f'gpu/{script}', *_RUN, GPUS='0')
  for line, start in zip(lines, expected, strict=True):
    assert line.startswith(start)
  if script != 'setup':
    assert tuple(shlex.split(lines[-1])[-3:]) == _RUN[1:]


@pytest.mark.parametrize('script, arguments, variables, got', [
    ('run', (), {}, "entry point ''"),
    ('run', ('trian',), {}, "entry point 'trian'"),
    ('run', _RUN, {'GPUS': 'all'}, 'GPUS=all'),
    ('run', _RUN, {'GPUS': '0,2'}, 'GPUS=0,2, and no card 2'),
    ('slurm', (), {}, "entry point ''"),
    ('slurm', _RUN, {'SLURM_JOB_ID': ''}, 'no SLURM job'),
    ('slurm', _RUN, {'SLURM_SUBMIT_DIR': '/'}, 'the folder /')])
@pytest.mark.usefixtures('project')
def test_a_mistake_is_reported_in_one_line(script, arguments, variables, got):
  scripts.check_refused(got, f'gpu/{script}', *arguments, **variables)


@pytest.mark.parametrize('program, got', [
    ('echo 0, 535.104.05', 'NVIDIA driver 535.104.05'),
    ('exit 9', 'nvidia-smi failed')])
def test_an_unusable_driver_is_refused(project, program, got):
  scripts.write_program(project.parent / 'bin' / 'nvidia-smi', program)
  scripts.check_refused(got, 'gpu/run', *_RUN)


def test_a_job_that_finishes_is_not_queued_again(project):
  assert scripts.launch('gpu/slurm', *_RUN).returncode == 0
  assert [c.split()[0] for c in scripts.calls()] == ['srun', 'python']
  assert scripts.calls()[1] == _TRAIN + 'cards= ids=0,1'
  (project.parent / 'status').write_text('3')
  assert scripts.launch('gpu/slurm', *_RUN).returncode == 3
  assert 'scontrol' not in ' '.join(scripts.calls())
  (project.parent / 'status').write_text('75')  # The deadline.
  assert scripts.launch('gpu/slurm', *_RUN).returncode == 0
  assert scripts.calls()[-1] == 'scontrol requeue 7'


def test_a_job_at_its_time_limit_saves_and_is_queued_again(project):
  (project.parent / 'wait').touch()
  job = subprocess.Popen([scripts.BASH, 'launch/gpu/slurm.sh', *_RUN])
  end = time.monotonic() + 120
  while not (project.parent / 'process').exists():
    assert time.monotonic() < end
    time.sleep(0.02)
  # --signal=B: signals the batch shell only.
  job.send_signal(signal.SIGTERM)
  assert job.wait(120) == 0
  assert scripts.calls()[2:] == [
      'scancel --signal=TERM 7', 'terminated', 'scontrol requeue 7']


def test_jax_takes_all_cards_of_the_node():
  # Without JAX_LOCAL_DEVICE_IDS each task takes one card, that of its number.
  code = '''
import jax
from jax._src import xla_bridge
jax.distributed.initialize()
print(xla_bridge.CUDA_VISIBLE_DEVICES.value, jax.process_count())
jax.distributed.shutdown()'''
  done = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, check=False,
      timeout=300, env=os.environ | {
          'JAX_PLATFORMS': 'cpu', 'JAX_LOCAL_DEVICE_IDS': '0,1',
          # JAX derives the port from the job's number.
          'SLURM_JOB_ID': str(os.getpid()), 'SLURM_STEP_NODELIST': 'localhost',
          'SLURM_NTASKS': '1', 'SLURM_PROCID': '0', 'SLURM_LOCALID': '0'})
  assert done.stdout.split() == ['0,1', '1'], done.stderr


@pytest.mark.skipif(
    not scripts.find('hadolint'), reason='hadolint is not installed')
def test_hadolint():
  subprocess.run(
      [scripts.find('hadolint'), str(_FOLDER / 'Dockerfile')], check=True)


def test_the_image_copies_existing_files_and_has_the_packages_of_setup(
    monkeypatch):
  lines = scripts.read_lines(_FOLDER / 'Dockerfile')
  copied = [line.split()[1] for line in lines
            if line.startswith('COPY') and '--from' not in line]
  kept = {line[1:] for line in scripts.read_lines(
      _FOLDER / 'Dockerfile.dockerignore') if line.startswith('!')}
  assert set(copied) == kept
  assert all((conftest.ROOT / name).exists() for name in copied)
  assert 'USER 1000:1000' in lines
  assert all(re.search(r':\d+\.\d+\.\d+', line)
             for line in lines if line.startswith('FROM'))
  assert 'jax-cuda13-plugin' in scripts.check_pins(
      monkeypatch, ['gpu'], ['cuda', 'base'])
