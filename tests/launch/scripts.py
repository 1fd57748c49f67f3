"""Helpers of the tests of the launch scripts."""

import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import conftest
from packaging import requirements
import setuptools

BASH = shutil.which('bash')


def find(program: str) -> str | None:
  """Returns a program's path, also in an environment not on the PATH."""
  return shutil.which(program) or shutil.which(
      program, path=os.path.dirname(sys.executable))


def write_program(path: pathlib.Path, text: str, interpreter: str = BASH):
  """Writes an executable script."""
  path.write_text(f'#!{interpreter}\n{text}\n')
  path.chmod(0o755)


def make_project(
    tmp_path: pathlib.Path, monkeypatch, programs: dict[str, str],
    **variables: str | None) -> pathlib.Path:
  """Makes a small project, the working directory, and programs on the PATH.

  The project contains launch/ and an empty gemma_sft/train.py. A variable that
  is None is unset.
  """
  project = tmp_path / 'project'
  shutil.copytree(conftest.ROOT / 'launch', project / 'launch')
  (project / 'gemma_sft').mkdir()
  (project / 'gemma_sft' / 'train.py').touch()
  (tmp_path / 'bin').mkdir()
  for name, text in programs.items():
    write_program(tmp_path / 'bin' / name, text)
  variables['PATH'] = f'{tmp_path / "bin"}{os.pathsep}{os.environ["PATH"]}'
  for name, value in (dict(DRY_RUN=None) | variables).items():
    if value is None:
      monkeypatch.delenv(name, raising=False)
    else:
      monkeypatch.setenv(name, value)
  monkeypatch.chdir(project)
  return project


def launch(script: str, *arguments: str, cwd=None, **environment: str):
  """Runs a script of launch/ and returns the completed process."""
  return subprocess.run(
      [BASH, f'launch/{script}.sh', *arguments], cwd=cwd,
      env=os.environ | environment, capture_output=True, text=True,
      check=False, timeout=300)


def read_lines(path: pathlib.Path) -> list[str]:
  """Returns the lines of a file, none if it does not exist."""
  return path.read_text().splitlines() if path.exists() else []


def calls(*parts: str) -> list[str]:
  """Returns the calls that the programs noted and that contain a part."""
  return [call for call in read_lines(pathlib.Path('../calls'))
          if not parts or any(part in call for part in parts)]


def check_dry_run(script: str, *arguments: str, **environment) -> list[str]:
  """Asserts that a dry run changes and calls nothing; returns its output."""
  def files():
    return {(path, path.stat().st_mtime_ns)
            for path in pathlib.Path().rglob('*')}

  before = files()
  done = launch(script, *arguments, DRY_RUN='1', **environment)
  assert done.returncode == 0, done.stderr
  assert not calls() and files() == before
  return done.stdout.splitlines()


def check_refused(got: str, script: str, *arguments: str, **environment):
  """Asserts that a script ends with status 2 and one line; it calls nothing."""
  done = launch(script, *arguments, **environment)
  assert done.returncode == 2
  line, = done.stderr.splitlines()
  assert line.startswith(f'got: {got}; expected: ') and '; fix: ' in line
  assert not calls()


def check_pins(monkeypatch, folders, extras, *more: str) -> dict[str, str]:
  """Asserts that setup.py accepts the versions pinned in folders of launch/.

  Returns {package: version}. `extras` are those of setup.py, `more` further
  requirements.
  """
  pins = dict(
      line.split('==') for folder in folders for line in read_lines(
          conftest.ROOT / 'launch' / folder / 'requirements.txt')
      if not line.startswith('#'))
  setup = {}
  monkeypatch.setattr(setuptools, 'setup', lambda **kw: setup.update(kw))
  runpy.run_path(str(conftest.ROOT / 'setup.py'))
  for text in [*setup['install_requires'], *more, *(
      text for extra in extras for text in setup['extras_require'][extra])]:
    wanted = requirements.Requirement(text)
    name = re.sub('[-_.]+', '-', wanted.name).lower()
    assert pins[name] in wanted.specifier, text
  return pins
