"""Bad input: many cases of each target, and every case that once failed.

The drill itself is `python tests/fuzz/run.py`.
"""

import functools
import importlib
import pathlib
import subprocess
import sys
import tempfile

import conftest
from fuzz import judging
from fuzz import mutation
from fuzz import targets
import hypothesis
import pytest

_CORPUS = pathlib.Path(__file__).parent / 'fuzz' / 'corpus'
_KEPT = sorted(_CORPUS.glob('*/*'))
# Cases per target; few where each case starts a process.
_CASES = {'sql': 12, 'blop': 2, 'config': 120}
_MOST = 200


@functools.cache
def _load(name):
  target = importlib.import_module(f'fuzz.targets.{name}')
  # So that lazy imports do not count as the time of a case.
  with tempfile.TemporaryDirectory() as folder:
    for case in target.seeds()[-1:]:
      target.check(case, folder)
  return target


def _judge(target, case, folder):
  kind, what, story = judging.judge(target, case, str(folder))
  assert not kind, f'{what}\n{story}\n{case!r:.500}'


@pytest.mark.parametrize('name', targets.DRILLS)
def test_good_cases_their_changed_copies_and_those_of_the_strategy(
    name, tmp_path):
  target, drill = _load(name), targets.DRILLS[name]
  for case in target.seeds():
    _judge(target, case, tmp_path)
  strategy = target.STRATEGY
  if drill.guided:
    strategy |= mutation.strategy(
        target.seeds,
        mutation.mutate if drill.as_json else mutation.mutate_bytes)

  @hypothesis.settings(
      max_examples=_CASES.get(name, _MOST), database=None, deadline=None,
      derandomize=True, phases=[hypothesis.Phase.generate],
      suppress_health_check=list(hypothesis.HealthCheck))
  @hypothesis.given(strategy)
  def drill_all(case):
    _judge(target, case, tmp_path)

  drill_all()


@pytest.mark.parametrize(
    'path', _KEPT, ids=lambda path: f'{path.parent.name}/{path.name}')
def test_what_once_failed(path, tmp_path):
  _judge(_load(path.parent.name), path.read_bytes(), tmp_path)


def test_the_corpus_is_small():
  assert len(_KEPT) > 30
  assert sum(path.stat().st_size for path in _KEPT) < 100_000


class _Target:
  """Fails in each of the possible ways."""

  def check(self, case, folder):
    del folder
    if case == b'loss':
      raise judging.Loss('gone')
    if case == b'crash':
      raise KeyError('x')
    while case == b'hang':
      pass


def test_each_kind_of_failure_is_counted(tmp_path, monkeypatch):
  monkeypatch.setattr(judging, 'SECONDS', 0.2)
  session = judging.Session(_Target(), str(tmp_path), str(tmp_path))
  for case in (b'loss', b'fine', b'crash', b'hang', b'crash'):
    session.run(case)
  assert session.counts == {'n': 5, 'loss': 1, 'crash': 2, 'hang': 1}
  files = [name for _, name, _ in session.places.values()]
  assert sorted((tmp_path / f).read_bytes() for f in files) == [
      b'crash', b'hang', b'loss']


def test_the_drill_prints_its_table(tmp_path):
  pytest.importorskip('atheris')
  done = subprocess.run(
      [sys.executable, str(_CORPUS.parent / 'run.py'), '--cases=400',
       '--only=ratings', f'--failures={tmp_path}'],
      cwd=conftest.ROOT, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stdout + done.stderr
  header, row, total = done.stdout.splitlines()
  assert header.split()[:3] == ['target', 'cases', 'CPU']
  assert row.split()[:2] == ['ratings', '8']
  assert total.split()[3:6] == ['0', '0', '0']
