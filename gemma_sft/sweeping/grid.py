"""Which cells a sweep has: from texts of the command line, or a config file.

A cell is one setting of the factors; run with several seeds, it is several
runs. A factor is a key of configs/default.py, or `config`, the argument of the
config file (the part after the colon in configs/slang.py:attempt1).
"""

import ast
import dataclasses
import inspect
import itertools
import re
from typing import Any
from typing import Mapping
from typing import Sequence

from gemma_sft import cli
from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft.sweeping import source as source_lib

_EXAMPLE = "--grid='lora.rank=4,8;train.epochs=1,5'"
_HOOK = {'grid', 'cells', 'seeds', 'baseline'}


# The cells -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cell:
  """One setting of the factors.

  Attributes:
    name: For people, such as 'rank=4, epochs=1'.
    changes: {factor: value}.
  """

  name: str
  changes: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What is to be compared.

  Attributes:
    cells: In order; no two of the same changes.
    factors: Keys that differ between cells, in order.
    seeds: config.seed of the runs of each cell.
    baseline: Name of the cell that the others are compared with.
  """

  cells: tuple[Cell, ...]
  factors: tuple[str, ...]
  seeds: tuple[int, ...]
  baseline: str


def make_sweep(
    source: source_lib.Source, config: Any, *, grid: str = '', seeds: int = 0,
    baseline: str = '') -> Sweep:
  """Returns the sweep of the flags, or else of the config file's `sweep()`.

  `sweep()` takes nothing and returns a dict with

      grid       as --grid, or {'lora.rank': (4, 8), ...}: every combination; or
      cells      {'small': {'lora.rank': 4, ...}, ...}: these cells, by name;
      seeds      a number of seeds, or the seeds themselves (default 1);
      baseline   the name of a cell (default: the first).

  Args:
    source: The config file.
    config: Its config, for the types of values and the first seed.
    grid: Of --grid; '' for the file's.
    seeds: Of --seeds; 0 for the file's, or 1.
    baseline: Of --baseline_cell; '' for the file's, or the first.

  Raises:
    UserError: for a key that does not exist (naming the nearest), a value that
      is none of its type, or a sweep without cells.
  """
  hook = {} if grid else _hook(source)
  if 'cells' in hook:
    cells = [Cell(str(name), _typed(changes, config))
             for name, changes in hook['cells'].items()]
    factors = list(dict.fromkeys(k for c in cells for k in c.changes))
  else:
    text = grid or hook.get('grid', '')
    if not text:
      raise errors.UserError(
          f'no --grid, and no sweep() in {source.path}',
          'what to compare', f'for example {_EXAMPLE}')
    if isinstance(text, str):
      values = parse_grid(text, config)
    else:
      values = {k: [_typed({k: v}, config)[k] for v in vs]
                for k, vs in text.items()}
    factors = list(values)
    names = short_names(factors)
    cells = []
    for combination in itertools.product(*values.values()):
      changes = dict(zip(factors, combination))
      cells.append(Cell(', '.join(
          show_value(v) if k == source_lib.ARGUMENT and len(factors) == 1 else
          f'{names[k]}={show_value(v)}' for k, v in changes.items()), changes))
  wanted = seeds or hook.get('seeds', 1)
  first = config.seed
  chosen = (tuple(range(first, first + wanted)) if isinstance(wanted, int)
            else tuple(wanted))
  if not chosen or len(set(chosen)) < len(chosen):
    raise errors.UserError(
        f'seeds: {wanted!r}', 'a number from 1, or different seeds',
        'for example --seeds=3')
  return Sweep(tuple(cells), tuple(factors), chosen,
               _find(cells, baseline or hook.get('baseline', ''), factors))


def _hook(source) -> dict[str, Any]:
  """Returns what a config file's `sweep()` returns, or {}."""
  module = source_lib.load_module(source.path)
  if not hasattr(module, 'sweep'):
    return {}
  hook = module.sweep()
  where = f'sweep() of {source.path}'
  if not isinstance(hook, Mapping) or set(hook) - _HOOK or (
      'grid' in hook) == ('cells' in hook):
    got = sorted(hook) if isinstance(hook, Mapping) else hook
    raise errors.UserError(
        f'{where} returns {got!r}',
        'a dict with grid or cells, and maybe seeds and baseline',
        inspect.cleandoc("for example {'grid': {'lora.rank': (4, 8)},"
                         " 'seeds': 3}"))
  return dict(hook)


def _typed(changes, config) -> dict[str, Any]:
  """Checks keys and types of values given in Python."""
  typed = {}
  for key, value in changes.items():
    _check_key(key)
    if key == source_lib.ARGUMENT:
      typed[key] = str(value)
      continue
    default = source_lib.get_value(config, key)
    good = isinstance(value, type(default)) and (
        isinstance(value, bool) == isinstance(default, bool)) or (
            isinstance(default, float) and type(value) is int)
    if not good:
      raise errors.UserError(
          f'sweep(): {key}={value!r}',
          f'a value like its default {default!r}', 'correct sweep()')
    typed[key] = float(value) if isinstance(default, float) else value
  return typed


def _find(cells, name, factors) -> str:
  """Returns the name of the baseline's cell."""
  if not name:
    return cells[0].name
  shown = {re.sub(r'\s', '', c.name): c.name for c in cells}
  shown |= {';'.join(f'{k}={show_value(c.changes[k])}' for k in factors
                     if k in c.changes): c.name for c in cells}
  wanted = re.sub(r'\s', '', name)
  if wanted not in shown:
    names = [c.name for c in cells]
    raise errors.UserError(
        f'baseline cell {name!r}', 'one of ' + '; '.join(names),
        errors.nearest(name, names) or 'name one of them')
  return shown[wanted]


def short_names(factors: Sequence[str]) -> dict[str, str]:
  """Returns {'lora.rank': 'rank'}, whole keys where the last part is shared."""
  last = [key.rpartition('.')[2] for key in factors]
  return {key: name if last.count(name) == 1 else key
          for key, name in zip(factors, last)}


def show_value(value: Any) -> str:
  """Returns a value for people: 0.001 as 0.001, 1.3e-05 as 1.3e-05."""
  if isinstance(value, float):
    return f'{value:.4g}'
  return source_lib.as_text(value).replace("'", '')


# The text --------------------------------------------------------------------


def parse_grid(text: str, config: Any) -> dict[str, list[Any]]:
  """Returns {'lora.rank': [4, 8], ...} of 'lora.rank=4,8;...'.

  A comma inside brackets or quotes belongs to the value:
  `data.buckets=(128,256),(512,)`, `lora.targets='attn/','q,v'`.

  Args:
    text: Of --grid.
    config: For the types of values.

  Raises:
    UserError: see `make_sweep`.
  """
  values = {}
  for key, rest in split_factors(text):
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


def split_factors(text: str) -> list[tuple[str, str]]:
  """Returns [(key, rest)] of 'key=rest;key=rest', keys checked.

  Raises:
    UserError: for a part without a key, or a key that does not exist or comes
      twice.
  """
  found = []
  for part in filter(None, split_outside(text, ';')):
    key, equals, rest = part.partition('=')
    key = key.strip()
    if not equals or not rest.strip():
      raise errors.UserError(
          f'{part!r}', 'key=value,value', f'for example {_EXAMPLE}')
    _check_key(key)
    if key in dict(found):
      raise errors.UserError(
          f'{key} comes twice', 'each key once',
          'write its values behind one another, by commas')
    found.append((key, rest.strip()))
  if not found:
    raise errors.UserError(
        f'{text!r}', 'key=value,value', f'for example {_EXAMPLE}')
  return found


def _check_key(key):
  if key == source_lib.ARGUMENT:
    return
  if key == 'seed':
    raise errors.UserError(
        'seed as a factor', 'seeds by --seeds: cells are compared seed by seed',
        'for example --seeds=3')
  cli.check_key(key, key)


def parse_value(key: str, text: str, config: Any) -> Any:
  """Returns a text as a value of the key's type.

  Raises:
    UserError: if it is none.
  """
  text = text.strip()
  if key == source_lib.ARGUMENT:
    return _unquoted(text)
  default = source_lib.get_value(config, key)
  try:
    if isinstance(default, bool):
      return {'true': True, 'false': False}[text.lower()]
    if isinstance(default, int):
      return int(text)
    if isinstance(default, float):
      return float(text)
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
  return _unquoted(text)


def _unquoted(text):
  if len(text) > 1 and text[0] == text[-1] and text[0] in '\'"':
    return text[1:-1]
  return text


def split_outside(text: str, separator: str) -> list[str]:
  """Splits at a sign outside of brackets and quotes; parts are stripped."""
  parts, depth, quote = [''], 0, ''
  for sign in text:
    if quote:
      quote = '' if sign == quote else quote
    elif sign in '\'"':
      quote = sign
    elif sign in '([':
      depth += 1
    elif sign in ')]':
      depth = max(0, depth - 1)
    elif sign == separator and not depth:
      parts.append('')
      continue
    parts[-1] += sign
  return [part.strip() for part in parts]


# Checks ----------------------------------------------------------------------


def load_cell(source: source_lib.Source, cell: Cell) -> Any:
  """Returns the validated config of a cell.

  Raises:
    UserError: naming the cell.
  """
  try:
    config = source.load(cell.changes)
    config_lib.validate(config)
  except errors.UserError as error:
    raise named(cell, error) from error
  return config


def named(cell: Cell, error: errors.UserError) -> errors.UserError:
  """Returns an error that begins with the cell's name."""
  return errors.UserError(
      f'cell {cell.name}: {error.got}', error.expected, error.fix)
