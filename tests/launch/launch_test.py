"""The scripts: their syntax, quickstart's dry run, serving, the environment."""

import os
import pathlib
import shutil
import subprocess
import sys

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


# Also in a virtual environment whose bin is not on the PATH.
_SHELLCHECK = shutil.which('shellcheck') or shutil.which(
    'shellcheck', path=str(pathlib.Path(sys.executable).parent))


@pytest.mark.skipif(_SHELLCHECK is None, reason='shellcheck is not installed')
@pytest.mark.parametrize('script', _SCRIPTS, ids=lambda p: p.name)
def test_shellcheck(script):
  done = subprocess.run(
      [_SHELLCHECK, '-x', str(script)], cwd=conftest.ROOT, text=True,
      capture_output=True, check=False)
  assert done.returncode == 0, done.stdout


def _files() -> set[tuple[str, int]]:
  """Returns every file of the project with the time of its last change."""
  found = set()
  for folder, folders, names in os.walk(conftest.ROOT):
    folders[:] = [f for f in folders if f not in (
        '.git', '.venv', '.venv-runtimes', '__pycache__', '.pytest_cache',
        '.hypothesis', '.ruff_cache')]
    found |= {(os.path.join(folder, name),
               os.stat(os.path.join(folder, name)).st_mtime_ns)
              for name in names}
  return found


def test_dry_run_prints_the_steps_and_changes_nothing(tmp_path):
  before = _files()
  environment = conftest.ROOT / '.venv'
  stamp = environment.stat().st_mtime_ns if environment.exists() else None
  done = _bash('launch/quickstart.sh', '--config.lora.rank=8', DRY_RUN='1',
               WORKDIR=str(tmp_path / 'w'))
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert [line[:3] for line in lines[::2]] == ['== '] * (len(lines) // 2)
  assert len(lines) == 14
  commands = '\n'.join(lines[1::2])
  assert 'gemma_sft.train --config=configs/blop.py' in commands
  assert '--config.lora.rank=8' in commands
  assert str(tmp_path / 'w') in commands
  assert not (tmp_path / 'w').exists()
  assert _files() == before
  if stamp is not None:
    assert environment.stat().st_mtime_ns == stamp


def test_serve_requires_a_file():
  done = _bash('launch/serve.sh')
  assert done.returncode == 2
  assert 'FILE.gguf' in done.stderr and 'Traceback' not in done.stderr


def test_serve_reports_why_the_server_ended(tmp_path):
  server = tmp_path / 'llama-server'
  scripts.write_program(server, 'echo no such model; exit 1')
  done = _bash('launch/serve.sh', 'x.gguf', 'Hi', LLAMA_SERVER=str(server),
               PORT='1')
  assert done.returncode == 2
  assert 'no such model' in done.stderr and 'set PORT' in done.stderr


def _python(folder: pathlib.Path, name: str, status: int) -> str:
  scripts.write_program(folder / name, f'exit {status}')
  return str(folder / name)


def _find_python(path: pathlib.Path, **environment):
  return _bash('-c', '. launch/environment.sh; find_python',
               PATH=str(path), **{'PYTHON': ''} | environment)


def test_a_missing_python_is_reported_in_one_line(tmp_path):
  _python(tmp_path, 'python3', 1)  # A version that is too old.
  done = _find_python(tmp_path)
  assert done.returncode == 2 and done.stdout == ''
  assert 'needs Python 3.12 or newer' in done.stderr
  assert 'PYTHON=/path/to/python3.12' in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1


def test_the_first_suitable_python_is_taken(tmp_path):
  _python(tmp_path, 'python3.12', 1)
  _python(tmp_path, 'python3.13', 0)
  _python(tmp_path, 'python3', 0)
  assert _find_python(tmp_path).stdout.strip() == 'python3.13'
  own = _python(tmp_path, 'own', 0)
  assert _find_python(tmp_path, PYTHON=own).stdout.strip() == own


def test_without_npm_the_compiler_is_left_out(tmp_path):
  # The one program that the script needs before it looks for npm.
  (tmp_path / 'dirname').symlink_to(shutil.which('dirname'))
  done = _bash('launch/blop_compiler.sh', PATH=str(tmp_path),
               GEMMA_SFT_CACHE=str(tmp_path / 'cache'))
  assert done.returncode == 0
  assert 'npm is not installed' in done.stderr
  assert not (tmp_path / 'cache').exists()
