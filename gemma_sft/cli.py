"""Parses the command line, and reports a user's mistakes in one message.

A command begins, before its heavy imports, with

    from gemma_sft import cli

    if __name__ == '__main__':
      cli.run('gemma_sft.train', cli.CONFIG, cli.WORKDIR)

so that `--help` and a mistyped key are answered before JAX is loaded. `run`
then imports the module by its name and calls its `main` with the flags.
"""

import functools
import importlib
import logging
import os
import signal
import sys
from typing import Any
from typing import Callable

from absl import flags
from ml_collections import config_flags

from gemma_sft import config as config_lib
from gemma_sft import errors


class Flag:
  """A flag that a command declares; `define` registers it with absl."""

  def __init__(self, definer: Callable[..., Any], name: str, *arguments: Any):
    self.name = name
    self.define = functools.partial(definer, name, *arguments)


# Each takes the flag's name, default and help; `choice` takes the possible
# values before the help. `words` is a list separated by commas, `texts` a flag
# that may be repeated.
switch = functools.partial(Flag, flags.DEFINE_bool)
text = functools.partial(Flag, flags.DEFINE_string)
integer = functools.partial(Flag, flags.DEFINE_integer)
real = functools.partial(Flag, flags.DEFINE_float)
choice = functools.partial(Flag, flags.DEFINE_enum)
words = functools.partial(Flag, flags.DEFINE_list)
texts = functools.partial(Flag, flags.DEFINE_multi_string)

# Flags that several commands share.
CONFIG = Flag(
    config_flags.DEFINE_config_file, 'config', None, 'Config file, such as'
    ' configs/blop.py or configs/blop.py:gemma1_2b; override values as'
    ' --config.lora.rank=8.')  # It is locked.
WORKDIR = text(
    'workdir', None, 'Folder of the run: checkpoints, metrics, report.')
BASE = switch(
    'base', False, 'Use the untouched base model instead of the tuned one.')
STEP = integer('step', -1, 'Checkpoint to use; -1 is the best, -2 the latest.')
OVERWRITE = switch(
    'overwrite', False, 'Replace what an earlier run wrote under --out.')
LLAMA_SERVER = text(
    'llama_server', None, "llama.cpp's llama-server, which runs GGUFs. Default:"
    ' that of the export extra, else the one on PATH.')
TOPOLOGY = text(
    'topology', 'cpu', 'Hardware: kaggle-tpu, kaggle-t4x2, a slice such as'
    ' v5e-8, v5e:2x4, v5p-8, v6e-4, or cpu, gpu for the devices here.')


def split(default: str) -> Flag:
  """Returns the flag for a split of config.data."""
  return text('split', default, 'The split: train, validation or test.')


def run(module: str, *declared: Flag, positional: str = '',
        template: str = 'configs.default') -> None:
  """Parses the command line, runs `module.main(**flags)` and exits.

  The exit status is what `main` returns, 2 for a user's mistake, or 130 for an
  interrupt. `positional` names the parameter of `main` that takes the arguments
  that are not flags; '' allows none. --config must have the keys of the config
  in the module `template`.
  """
  _quiet_orbax()
  # Python's exit ends a started llama-server and removes a half-written export.
  # Training replaces this handler with its own.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  try:
    values = _parse(module, declared, positional, template)
    main: Callable[..., Any] = importlib.import_module(module).main
    status = main(**values)
  except errors.UserError as error:
    # In one write, because other threads may be writing too.
    sys.stderr.write(f'error: {error}\n')
    status = 2
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    status = 130
  except BrokenPipeError:  # The reader, such as `head`, has closed.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    status = 0
  sys.stdout.flush()
  sys.exit(status or 0)


def _quiet_orbax():
  """Suppresses Orbax's warnings about options and its tasks' tracebacks.

  They would hide our message; a failure reaches the caller as an exception.
  """
  logging.getLogger('absl').addFilter(
      lambda record: f'{os.sep}orbax{os.sep}' not in record.pathname)
  logging.getLogger('asyncio').addFilter(
      lambda record: 'was never retrieved' not in record.getMessage())
  report = sys.unraisablehook

  def hook(unraisable):
    # Threads of TensorStore call into the event loop that Orbax has closed.
    if str(unraisable.exc_value) != 'Event loop is closed':
      report(unraisable)

  sys.unraisablehook = hook


def _parse(module, declared, positional='', template='configs.default'):
  for flag in declared:
    flag.define()
  if any(a in ('--help', '-h', '--helpfull') for a in sys.argv[1:]):
    print(sys.modules['__main__'].__doc__)
    for flag in declared:
      print(f'  --{flag.name}: {flags.FLAGS[flag.name].help}')
    sys.exit(0)
  for argument in sys.argv[1:]:
    if argument.startswith('--config.'):
      shown = argument.partition('=')[0]
      check_key(shown.removeprefix('--config.'), shown, template)
  try:
    rest = flags.FLAGS(sys.argv)[1:]
    values = {flag.name: getattr(flags.FLAGS, flag.name) for flag in declared}
    if values.get('config') is not None:
      values['config'].keys()  # Parses the config file now.
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError,
          OSError, ImportError) as error:
    raise _explained(error, template) from None
  if values.get('config') is not None:
    _check_complete(values['config'], template)
  if positional:
    values[positional] = rest
  elif rest:
    raise errors.UserError(
        f'the argument {rest[0]!r}', f'flags of {module}: '
        + ', '.join(f'--{flag.name}' for flag in declared),
        'write --flag=value; --help lists the flags')
  return values


def _keys(template):
  config = importlib.import_module(template).get_config()
  return [key for key, _ in config_lib.leaves(config)]


def _file(template):
  return template.replace('.', '/') + '.py'


def check_key(
    key: str, shown: str, template: str = 'configs.default') -> None:
  """Raises an error that names the nearest key if `template` lacks the key.

  `shown` is what the user typed, for the message.
  """
  known = _keys(template)
  if key.startswith('curate.'):
    raise _moved_to_curation(shown)
  if key not in known:
    name = key.rpartition('.')[2]
    same_name = [k for k in known if k.rpartition('.')[2] == name]
    if key in config_lib.RENAMED:
      same_name = [config_lib.RENAMED[key]]
    near = (f'Did you mean {same_name[0]!r}?' if same_name
            else errors.nearest(key, known).strip())
    raise errors.UserError(shown, f'a key of {_file(template)}',
                           near or 'that file lists every key with a comment')


def config_source() -> tuple[str, dict[str, Any]]:
  """Returns the value of --config and the overrides as {key: value}."""
  flag = flags.FLAGS['config']
  return (config_flags.get_config_filename(flag),
          config_flags.get_override_values(flag))


def _check_complete(config, template):
  """Raises unless a config has exactly the keys of its template."""
  known = set(_keys(template))
  got = {key for key, _ in config_lib.leaves(config)}
  if 'data.train' in got - known:
    raise _moved_to_curation('--config is a config of training')
  if got != known:
    raise errors.UserError(
        'the config file lacks ' + (', '.join(sorted(known - got)) or 'nothing')
        + ' and adds ' + (', '.join(sorted(got - known)) or 'nothing'),
        f'the keys of {_file(template)}', 'begin its get_config with: config ='
        f' {template.rpartition(".")[2]}.get_config()')


def _moved_to_curation(shown) -> errors.UserError:
  return errors.UserError(
      shown, "the settings of curation in a config of their own, without"
      " 'curate.': configs/curation.py, or a file whose get_config begins with"
      ' config = curation.get_config()',
      'python -m gemma_sft.curate --config=configs/curation.py'
      ' --config.source=raw.csv, or --config=configs/curation.py:lyrics')


def _explained(error: Exception, template: str) -> errors.UserError:
  """Returns one message for an error of absl or ml_collections."""
  text = str(error)
  if 'Traceback (most recent call last)' in text:
    # An error inside a config file contains a traceback: take its last line.
    text = text.strip().splitlines()[-1].partition(': ')[2] or text
  text = ' '.join(text.split())
  if "'curate'" in text:  # A config file that still sets config.curate.
    return _moved_to_curation(f'the config file sets config.curate: {text}')
  return errors.UserError(
      f'the command line: {text}',
      'flags and config keys that exist, with values of their type',
      f'every key with its comment is in {_file(template)}; --help lists the'
      ' flags')


def require(name: str, value: Any, example: str) -> Any:
  """Returns the value of a flag; raises `UserError` if it is missing."""
  if not value:
    raise errors.UserError(
        f'--{name} is missing', f'--{name}=...', f'for example {example}')
  return value


def load_run_config(workdir: str) -> Any:
  """Returns the locked config that a run saved in its workdir."""
  path = os.path.join(workdir, 'config.json')
  if not os.path.exists(path):
    raise errors.UserError(
        f'no config.json in {workdir}', 'the workdir of a training run',
        'train first: python -m gemma_sft.train --config=... --workdir='
        f'{workdir}')
  from configs import default

  try:
    with open(path, encoding='utf-8') as file:
      return config_lib.from_json(file.read(), default.get_config())
  except (OSError, ValueError, AttributeError, KeyError, TypeError,
          RecursionError) as error:
    raise errors.UserError(
        f'{path}: {" ".join(str(error).split()):.200}',
        'the config.json that the run wrote',
        'restore it from a copy of the run, or train again in another workdir'
    ) from None
