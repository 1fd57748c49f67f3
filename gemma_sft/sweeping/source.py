"""A config file: its configs under changes, and their command lines."""

import dataclasses
import functools
import importlib.util
import operator
import os
import types
from typing import Any
from typing import Mapping

from gemma_sft import errors

# The factor that is no key of a config: the argument of `get_config`.
ARGUMENT = 'config'


@dataclasses.dataclass(frozen=True)
class SweepSource:
  """A config file and the overrides that all runs of a sweep share.

  Attributes:
    argument: Of its `get_config`; None for its default.
    overrides: {key: value} of `--config.key=value`.
  """

  path: str
  argument: str | None
  overrides: Mapping[str, Any]

  @classmethod
  def from_flag(cls, name: str, overrides: Mapping[str, Any]) -> 'SweepSource':
    """Returns the source of `--config=NAME` and its overrides."""
    path, colon, argument = name.partition(':')
    return cls(path, argument if colon else None, dict(overrides))

  def load(self, changes: Mapping[str, Any]) -> Any:
    """Returns the locked config with {factor: value} changed."""
    argument = changes.get(ARGUMENT, self.argument)
    module = load_module(self.path)
    try:
      config = module.get_config(*([] if argument is None else [argument]))
    except (TypeError, ValueError) as error:
      raise errors.UserError(
          f'{self.path}:{argument}: {error}', 'an argument of its get_config',
          'correct the value after the colon, or of the factor config'
      ) from error
    for key, value in self._values(changes).items():
      try:
        config.update_from_flattened_dict({key: value})
      except (TypeError, ValueError) as error:
        raise errors.UserError(
            f'{key}={value!r}',
            f'a value like its default {get_value(config, key)!r}',
            'correct the value') from error
    return config

  def arguments(self, changes: Mapping[str, Any]) -> list[str]:
    """Returns the command line of `load(changes)`."""
    argument = changes.get(ARGUMENT, self.argument)
    name = self.path if argument is None else f'{self.path}:{argument}'
    return [f'--config={name}', *(
        f'--config.{key}={as_text(value)}'
        for key, value in self._values(changes).items())]

  def _values(self, changes):
    return {**self.overrides, **{
        k: v for k, v in changes.items() if k != ARGUMENT}}


def load_module(path: str) -> types.ModuleType:
  """Returns a config file as a module."""
  if not os.path.isfile(path):
    raise errors.UserError(
        f'--config={path}: no such file', 'a config file',
        'for example --config=configs/slang.py')
  spec = importlib.util.spec_from_file_location('sweep_config', path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except (ImportError, SyntaxError) as error:
    raise errors.UserError(
        f'--config={path}: {error}', 'a config file that can be imported',
        'correct it') from error
  return module


def get_value(config: Any, key: str) -> Any:
  """Returns the value of a dotted key."""
  return functools.reduce(operator.getitem, key.split('.'), config)


def as_text(value: Any) -> str:
  """Returns a value as the command line takes it."""
  if isinstance(value, bool):
    return str(value).lower()
  return value if isinstance(value, str) else repr(value)
