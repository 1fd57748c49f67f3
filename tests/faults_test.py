"""The drill of faults names tests that exist."""

import importlib.util

import conftest

_RUN = conftest.ROOT / 'tests' / 'faults' / 'run.py'


def test_the_tests_that_plant_faults_exist():
  spec = importlib.util.spec_from_file_location('faults_run', _RUN)
  run = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(run)
  nodes = [node for group in run.PLANTED.values() for node in group]
  assert len(nodes) > 15
  for node in nodes:
    file, _, test = node.partition('::')
    text = (conftest.ROOT / file).read_text(encoding='utf-8')
    assert f'def {test}' in text, node
