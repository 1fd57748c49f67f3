"""Command lines, saved configs, and the grids and search spaces of sweeps.

A case is {"arguments": [...], "saved": {...} or text, "grid": text,
"search": text}; any may be missing.
"""

import json
import math
import os
import pathlib
import sys

from absl import flags
from hypothesis import strategies as st
from ml_collections import config_dict

from configs import default
from configs import tiny
from fuzz import judging
from gemma_sft import cli
from gemma_sft import config as config_lib
from gemma_sft.sweeping import grid
from gemma_sft.sweeping import search

_DECLARED = (
    cli.CONFIG, cli.WORKDIR, cli.switch('dry_run', False, ''),
    cli.integer('limit', 0, ''), cli.real('temperature', None, ''),
    cli.texts('prompt', None, ''))
_FLAGS = tuple(flag.name for flag in _DECLARED)
_TINY = str(pathlib.Path(tiny.__file__).resolve())
_LEAVES = dict(config_lib.leaves(default.get_config()))


def check(case: bytes, folder: str) -> None:
  """Parses every part of the case."""
  document = judging.parse(case)
  if not isinstance(document, dict):
    return
  _check_command(document.get('arguments', []))
  if 'saved' in document:
    _check_saved(document['saved'], folder)
  for name, parse in (('grid', grid.parse_grid),
                      ('search', search.parse_space)):
    if isinstance(text := document.get(name), str):
      with judging.may_refuse():
        parse(text, tiny.get_config())


def _check_command(arguments):
  """Parses a command line as an entry point does, and checks the config."""
  if not isinstance(arguments, list):
    return
  # A real one has no NUL and only the surrogates of undecodable bytes.
  arguments = [os.fsdecode(a.encode('utf-8', 'replace')).replace('\0', '')
               for a in arguments if isinstance(a, str)]
  arguments = [a for a in arguments if not _names_a_file(a)]
  before, known = sys.argv, set(flags.FLAGS)
  was_parsed = flags.FLAGS.is_parsed()
  sys.argv = ['fuzz', f'--config={_TINY}', *arguments]
  try:
    with judging.may_refuse():
      config = cli._parse('gemma_sft.fuzz', _DECLARED)['config']
      config_lib.validate(config)
      _check_config(config)
      text = config_lib.to_json(config)
      again = config_lib.from_json(text, default.get_config())
      if config_lib.differences(config, again) or config_lib.to_json(
          again) != text:
        raise judging.Loss('the saved config is another')
  finally:
    sys.argv = before
    for name in set(flags.FLAGS) - known:
      delattr(flags.FLAGS, name)
    if not was_parsed:
      flags.FLAGS.unparse_flags()


def _names_a_file(argument):
  """Whether it runs a config, which is a program, or ends the process."""
  name = argument.lstrip('-').partition('=')[0]
  return (name == 'config' or name.startswith(('flagfile', 'help', 'only_'))
          or name == 'h' or argument == '--')


def _check_config(config):
  """A valid config has the types of the default and finite numbers."""
  for key, value in config_lib.leaves(config):
    if type(value) is not type(_LEAVES[key]):
      raise judging.Loss(f'{key} became {value!r}')
    if isinstance(value, float) and not math.isfinite(value):
      raise judging.Loss(f'{key} is valid as {value!r}')
    if isinstance(value, int) and abs(value) > 2**31:
      raise judging.Loss(f'{key} is valid as a huge number')


def _check_saved(saved, folder):
  """Reads a config.json that a user has edited."""
  text = saved if isinstance(saved, str) else json.dumps(saved)
  pathlib.Path(folder, 'config.json').write_text(
      text, encoding='utf-8', errors='replace')
  with judging.may_refuse():
    config = cli.load_run_config(folder)
    config_lib.validate(config)
    if not isinstance(config, config_dict.ConfigDict):
      raise judging.Loss('a saved config is none')


def seeds() -> list[bytes]:
  """Returns command lines, a saved config, a grid and a search space."""
  return list(map(judging.dump, (
      {'arguments': ['--config.lora.rank=8', '--workdir=w', '--limit=3']},
      {'arguments': ["--config.data.buckets=(128, 256)", '--dry_run',
                     '--config.data.packing=false', '--temperature=0.5']},
      {'arguments': ['--config.optimizer.learning_rate=1e-4',
                     "--config.eval.prompts=('a',)", '--prompt=x',
                     '--config.data.columns=prompt=q,completion=a']},
      {'saved': dict(config_lib.leaves(tiny.get_config()))},
      {'grid': 'lora.rank=4,8;data.packing=true,false;data.buckets=(1,2),()'},
      {'search': 'optimizer.learning_rate=1e-5..1e-3:log;lora.rank=4,8'})))


_VALUES = st.one_of(
    st.sampled_from((
        'nan', 'inf', '-inf', '-1', '0', '1', '1e400', '1e-400', '1_0', '0x10',
        '9' * 30, '9' * 5000, 'true', 'None', '', ' ', '()', '(', '(1,)',
        "('a', 1)", '[1, 2]', '{}', '1.5', '(0.5, 0.5, 0.0)', '(nan,)',
        '(' * 300, "__import__('os')", '\udcff', 'é', 'a=b', 'a=b,c', '**',
        '[', '(a+)+$', "('attn/',)", 'lambda: 0', '3 if 1 else 2')),
    st.text(max_size=8), st.integers().map(str), st.floats().map(repr))
_KEYS = st.one_of(st.sampled_from(sorted(_LEAVES)), st.sampled_from((
    '', 'lora', 'lora.', 'lora.rank.x', 'lora..rank', '.', 'seed.x', 'unlock',
    '__class__', 'lora.__class__', 'data.buckets[0]', 'to_dict', 'é')))
_ARGUMENTS = st.lists(
    st.builds('--config.{}={}'.format, _KEYS, _VALUES)
    | st.builds('--{}={}'.format, st.sampled_from(_FLAGS[1:] + ('x', '')),
                _VALUES)
    | st.text(max_size=10), max_size=3)
_SPECS = st.lists(st.builds(
    lambda key, values: f'{key}={",".join(values)}', _KEYS,
    st.lists(_VALUES | st.builds('{}..{}{}'.format, _VALUES, _VALUES,
                                 st.sampled_from(('', ':log', ':x'))),
             max_size=3)), max_size=3).map(';'.join)
_SAVED = st.dictionaries(
    _KEYS, st.none() | st.booleans() | st.integers() | _VALUES
    | st.lists(_VALUES, max_size=2), max_size=3)
_TEXT = st.text(max_size=20)
STRATEGY = st.sampled_from((
    ('arguments', _ARGUMENTS), ('arguments', _ARGUMENTS),
    ('grid', _SPECS | _TEXT), ('search', _SPECS | _TEXT),
    ('saved', _SAVED | _TEXT))).flatmap(
        lambda part: st.fixed_dictionaries(dict([part]))).map(judging.dump)
