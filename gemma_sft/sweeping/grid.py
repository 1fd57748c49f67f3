"""The cells of a sweep, from the command line or the config file.

A cell is one setting of the factors and is run once for each seed. A factor is
a key of configs/default.py, or `config`: the argument of the config file, after
the colon in configs/slang.py:attempt1.
"""

import ast
import contextlib
import dataclasses
import itertools
import re
from typing import Any
from typing import Iterator
from typing import Mapping

from gemma_sft import cli
from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft.sweeping import source as source_lib

_EXAMPLE = "for example --grid='lora.rank=4,8;train.epochs=1,5'"


@dataclasses.dataclass(frozen=True)
class Cell:
  """One setting of the factors: {factor: value}."""

  name: str  # Such as 'rank=4, epochs=1'.
  changes: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What a sweep compares: each cell with the baseline, seed by seed."""

  cells: tuple[Cell, ...]
  factors: tuple[str, ...]  # Keys that differ between cells.
  seeds: tuple[int, ...]
  baseline: str  # The name of a cell.


def make_sweep(
    source: source_lib.SweepSource, config: Any, *, grid: str = '',
    seeds: int = 0, baseline: str = '') -> Sweep:
  """Returns the sweep of the flags, or else of the config file's `sweep()`.

  `sweep()` takes nothing and returns a dict with

      grid       as --grid, or {'lora.rank': (4, 8), ...}: every combination; or
      cells      {'small': {'lora.rank': 4, ...}, ...}: these cells, by name;
      seeds      a number of seeds, or the seeds themselves (default 1);
      baseline   the name of a cell (default: the first).

  Raises:
    UserError: for an unknown key, a value of the wrong type, or no cells.
  """
  options = {} if grid else _file_options(source)
  if 'cells' in options:
    cells = [Cell(str(name), _check_types(changes, config))
             for name, changes in options['cells'].items()]
    factors = list(dict.fromkeys(k for c in cells for k in c.changes))
  else:
    values = grid or options.get('grid', '')
    if not values:
      raise errors.UserError(
          f'no --grid, and no sweep() in {source.path}',
          'what to compare', _EXAMPLE)
    values = parse_grid(values, config) if isinstance(values, str) else {
        k: [_check_types({k: v}, config)[k] for v in vs]
        for k, vs in values.items()}
    factors = list(values)
    cells = [make_cell(dict(zip(factors, combination)))
             for combination in itertools.product(*values.values())]
  if not cells:
    raise errors.UserError(
        f'no cell in sweep() of {source.path}', 'at least one', _EXAMPLE)
  wanted = seeds or options.get('seeds', 1)
  chosen = tuple(range(config.seed, config.seed + wanted) if (
      isinstance(wanted, int)) else wanted)
  if not chosen or len(set(chosen)) < len(chosen):
    raise errors.UserError(
        f'seeds: {wanted!r}', 'a number from 1, or different seeds',
        'for example --seeds=3')
  return Sweep(tuple(cells), tuple(factors), chosen, _find_baseline(
      cells, baseline or options.get('baseline', ''), factors))


def make_cell(changes: Mapping[str, Any]) -> Cell:
  """Returns a cell, named by its changes."""
  if list(changes) == [source_lib.ARGUMENT]:
    return Cell(show_value(changes[source_lib.ARGUMENT]), changes)
  last = [key.rpartition('.')[2] for key in changes]
  return Cell(', '.join(
      # The whole key where two keys end alike.
      f'{name if last.count(name) == 1 else key}={show_value(value)}'
      for (key, value), name in zip(changes.items(), last)), changes)


def _file_options(source) -> dict[str, Any]:
  """Returns what a config file's `sweep()` returns, or {}."""
  module = source_lib.load_module(source.path)
  if not hasattr(module, 'sweep'):
    return {}
  options = module.sweep()
  if not isinstance(options, Mapping) or set(options) - {
      'grid', 'cells', 'seeds', 'baseline'} or (
          'grid' in options) == ('cells' in options):
    got = sorted(options) if isinstance(options, Mapping) else options
    raise errors.UserError(
        f'sweep() of {source.path} returns {got!r}',
        'a dict with grid or cells, and maybe seeds and baseline',
        "for example {'grid': {'lora.rank': (4, 8)}, 'seeds': 3}")
  return dict(options)


def _check_types(changes, config) -> dict[str, Any]:
  """Checks keys and types of values given in Python."""
  checked = {}
  for key, value in changes.items():
    _check_key(key)
    if key == source_lib.ARGUMENT:
      checked[key] = str(value)
      continue
    default = source_lib.get_value(config, key)
    is_bool = isinstance(value, bool), isinstance(default, bool)
    kinds = (int, float) if isinstance(default, float) else type(default)
    if not isinstance(value, kinds) or is_bool[0] != is_bool[1]:
      raise errors.UserError(
          f'sweep(): {key}={value!r}',
          f'a value like its default {default!r}', 'correct sweep()')
    checked[key] = type(default)(value)
  return checked


def _find_baseline(cells, name, factors) -> str:
  """Returns the name of the baseline's cell, also for 'lora.rank=4'."""
  if not name:
    return cells[0].name
  known = {re.sub(r'\s', '', c.name): c.name for c in cells}
  known |= {';'.join(f'{k}={show_value(c.changes[k])}' for k in factors
                     if k in c.changes): c.name for c in cells}
  without_spaces = re.sub(r'\s', '', name)
  if without_spaces not in known:
    names = [c.name for c in cells]
    raise errors.UserError(
        f'baseline cell {name!r}', 'one of ' + '; '.join(names),
        errors.nearest(name, names) or 'name one of them')
  return known[without_spaces]


def show_value(value: Any) -> str:
  """Returns a value to print: 0.001 as 0.001, 1.3e-05 as 1.3e-05."""
  if isinstance(value, float):
    return f'{value:.4g}'
  return source_lib.as_text(value).replace("'", '')


# Parsing ---------------------------------------------------------------------


def parse_grid(text: str, config: Any) -> dict[str, list[Any]]:
  """Returns {'lora.rank': [4, 8], ...} of 'lora.rank=4,8;...'.

  A comma inside brackets or quotes belongs to the value:
  `data.buckets=(128,256),(512,)`, `lora.targets='attn/','q,v'`.
  """
  values = {}
  for key, rest in split_factors(text).items():
    parts = split_outside(rest, ',')
    if not all(parts):
      raise errors.UserError(
          f'--grid: {key}={rest}', 'a value between commas',
          "for '' write two quotes")
    values[key] = [parse_value(key, part, config) for part in parts]
    if len(set(map(repr, values[key]))) < len(parts):
      raise errors.UserError(
          f'--grid: {key}={rest}', 'each value once', 'remove the second one')
  return values


def split_factors(text: str) -> dict[str, str]:
  """Returns {key: rest} of 'key=rest;key=rest'; a key comes once."""
  found = {}
  for part in filter(None, split_outside(text, ';')):
    key, equals, rest = map(str.strip, part.partition('='))
    if not equals or not rest:
      raise errors.UserError(f'{part!r}', 'key=value,value', _EXAMPLE)
    _check_key(key)
    if key in found:
      raise errors.UserError(
          f'{key} comes twice', 'each key once',
          'write all of its values after one key, separated by commas')
    found[key] = rest
  if not found:
    raise errors.UserError(f'{text!r}', 'key=value,value', _EXAMPLE)
  return found


def _check_key(key):
  if key == 'seed':
    raise errors.UserError(
        'seed as a factor', 'seeds by --seeds: cells are compared seed by seed',
        'for example --seeds=3')
  if key != source_lib.ARGUMENT:
    cli.check_key(key, key)


def parse_value(key: str, text: str, config: Any) -> Any:
  """Returns a text as a value of the key's type."""
  text = text.strip()
  default = ('' if key == source_lib.ARGUMENT
             else source_lib.get_value(config, key))
  try:
    if isinstance(default, bool):
      return {'true': True, 'false': False}[text.lower()]
    if isinstance(default, (int, float)):
      return type(default)(text)
    if isinstance(default, tuple):
      value = ast.literal_eval(text)
      if not isinstance(value, (tuple, list)):
        raise ValueError
      return tuple(value)
  except (KeyError, ValueError, SyntaxError):
    kind = 'true or false' if isinstance(default, bool) else (
        f'{type(default).__name__}, such as its default {default!r}')
    raise errors.UserError(
        f'{key}={text}', f'a value of the type {kind}',
        'correct the value') from None
  if len(text) > 1 and text[0] == text[-1] and text[0] in '\'"':
    return text[1:-1]
  return text


def split_outside(text: str, separator: str) -> list[str]:
  """Splits at a character outside brackets and quotes; parts are stripped."""
  parts, depth, quote = [''], 0, ''
  for character in text:
    if quote:
      quote = '' if character == quote else quote
    elif character in '\'"':
      quote = character
    elif character in '([':
      depth += 1
    elif character in ')]':
      depth = max(0, depth - 1)
    elif character == separator and not depth:
      parts.append('')
      continue
    parts[-1] += character
  return [part.strip() for part in parts]


# Checks ----------------------------------------------------------------------


@contextlib.contextmanager
def naming(cell: Cell) -> Iterator[None]:
  """Puts the cell's name in front of a user's mistake."""
  try:
    yield
  except errors.UserError as error:
    raise errors.UserError(
        f'cell {cell.name}: {error.got}', error.expected, error.fix
    ) from error


def load_cell(source: source_lib.SweepSource, cell: Cell) -> Any:
  """Returns the validated config of a cell; a mistake names the cell."""
  with naming(cell):
    config = source.load(cell.changes)
    config_lib.validate(config)
  return config
