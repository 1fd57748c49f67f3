"""Helpers of the tests of the launch scripts."""

import os
import pathlib
import re
import runpy
import shutil
import subprocess

import conftest
from packaging import requirements
import setuptools

BASH = shutil.which('bash')


def write_program(path: pathlib.Path, text: str, interpreter: str = BASH):
  """Writes an executable script."""
  path.write_text(f'#!{interpreter}\n{text}\n')
  path.chmod(0o755)


def copy_launch(tmp_path: pathlib.Path, monkeypatch) -> pathlib.Path:
  """Makes a small project and an empty folder `bin`, first on the PATH.

  The project contains launch/ and an empty gemma_sft/train.py; it becomes the
  working directory.
  """
  project, programs = tmp_path / 'project', tmp_path / 'bin'
  shutil.copytree(conftest.ROOT / 'launch', project / 'launch')
  (project / 'gemma_sft').mkdir()
  (project / 'gemma_sft' / 'train.py').touch()
  programs.mkdir()
  monkeypatch.setenv('PATH', f'{programs}{os.pathsep}{os.environ["PATH"]}')
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


def check_refused(done, got: str):
  """Asserts that a script ended with status 2 and one line about `got`."""
  assert done.returncode == 2
  line, = done.stderr.splitlines()
  assert line.startswith(f'got: {got}; expected: ') and '; fix: ' in line


def check_pins(monkeypatch, folders, extras, *more: str) -> dict[str, str]:
  """Asserts that pinned versions are those that setup.py accepts.

  Args:
    monkeypatch: The fixture.
    folders: Folders of launch/ whose requirements.txt pin the versions.
    extras: The extras of setup.py.
    *more: Further requirements.

  Returns:
    {package: version}.
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
