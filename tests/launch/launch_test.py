"""The scripts: their syntax, quickstart's dry run, serving, the environment."""

import os
import pathlib
import shutil
import subprocess

import conftest
import pytest
import scripts

_SCRIPTS = [*sorted((conftest.ROOT / 'launch').rglob('*.sh')),
            conftest.ROOT / '.ci' / 'run']


def _bash(*arguments, **environment):
  return subprocess.run(
      [scripts.BASH, *arguments], cwd=conftest.ROOT, capture_output=True,
      env=os.environ | environment, text=True, check=False, timeout=120)


@pytest.mark.parametrize('script', _SCRIPTS, ids=lambda p: p.name)
def test_syntax(script):
  assert _bash('-n', str(script)).stderr == ''


@pytest.mark.skipif(
    not scripts.find('shellcheck'), reason='shellcheck is not installed')
def test_shellcheck():
  subprocess.run([scripts.find('shellcheck'), '-x', *map(str, _SCRIPTS)],
                 cwd=conftest.ROOT, check=True)


def test_dry_run_prints_the_steps_and_changes_nothing(tmp_path, monkeypatch):
  scripts.make_project(tmp_path, monkeypatch, {})
  first, *lines = scripts.check_dry_run(
      'quickstart', '--config.lora.rank=8', WORKDIR='mine')
  assert first.startswith('Seven steps: ')
  assert [line[:3] for line in lines[::2]] == ['== '] * (len(lines) // 2)
  assert len(lines) == 14
  commands = '\n'.join(lines[1::2])
  assert 'gemma_sft.train --config=configs/blop.py' in commands
  assert '--config.lora.rank=8' in commands and '--workdir=mine' in commands


def test_serve_requires_a_file_and_reports_why_the_server_ended(tmp_path):
  done = _bash('launch/serve.sh')
  assert done.returncode == 2
  assert 'FILE.gguf' in done.stderr and 'Traceback' not in done.stderr
  server = tmp_path / 'llama-server'
  scripts.write_program(server, 'echo no such model; exit 1')
  done = _bash('launch/serve.sh', 'x.gguf', 'Hi', LLAMA_SERVER=str(server),
               PORT='1')
  assert done.returncode == 2
  assert 'no such model' in done.stderr and 'set PORT' in done.stderr


def _find_python(path: pathlib.Path, python=''):
  return _bash('-c', '. launch/environment.sh; find_python', PATH=str(path),
               PYTHON=python)


def test_the_first_suitable_python_is_taken_and_a_missing_one_reported(
    tmp_path):
  # A version that is too old.
  scripts.write_program(tmp_path / 'python3', 'exit 1')
  done = _find_python(tmp_path)
  assert done.returncode == 2 and done.stdout == ''
  line, = done.stderr.strip().splitlines()
  assert 'needs Python 3.12 or newer' in line
  assert 'PYTHON=/path/to/python3.12' in line
  for name, status in {
      'python3.12': 1, 'python3.13': 0, 'python3': 0, 'own': 0}.items():
    scripts.write_program(tmp_path / name, f'exit {status}')
  assert _find_python(tmp_path).stdout.strip() == 'python3.13'
  own = str(tmp_path / 'own')
  assert _find_python(tmp_path, own).stdout.strip() == own


def test_without_npm_the_compiler_is_left_out(tmp_path):
  # The one program that the script needs before it looks for npm.
  (tmp_path / 'dirname').symlink_to(shutil.which('dirname'))
  done = _bash('launch/blop_compiler.sh', PATH=str(tmp_path),
               GEMMA_SFT_CACHE=str(tmp_path / 'cache'))
  assert done.returncode == 0
  assert 'npm is not installed' in done.stderr
  assert not (tmp_path / 'cache').exists()
