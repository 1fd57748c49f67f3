"""The targets; see the docstring of the package."""

import ast
import functools
import pathlib

NAMES = ('records', 'chat', 'gguf', 'safetensors', 'config', 'web', 'ratings',
         'sql', 'blop')


@functools.cache
def _constants(name):
  """Returns a target's constants without importing the tested code."""
  path = pathlib.Path(__file__).with_name(f'{name}.py')
  return {
      node.targets[0].id: ast.literal_eval(node.value)
      for node in ast.parse(path.read_text(encoding='utf-8')).body
      if isinstance(node, ast.Assign) and isinstance(
          node.targets[0], ast.Name)
      and node.targets[0].id in ('SHARE', 'GUIDED', 'INCLUDE')}


def share(name: str) -> float:
  """Returns the target's share of all cases."""
  return _constants(name)['SHARE']


def is_guided(name: str) -> bool:
  """Whether coverage guides the cases."""
  return _constants(name)['GUIDED']


def include(name: str) -> list[str]:
  """Returns the packages to instrument."""
  return _constants(name)['INCLUDE']
