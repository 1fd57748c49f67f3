"""The only module that defines flags, and where a user's mistakes end.

An entry point begins

    from gemma_sft import cli

    if __name__ == '__main__':
      cli.run('gemma_sft.train')

before its heavy imports, so that `--help` and a mistyped key are answered
before JAX is loaded; `run` then imports the module by its name and calls its
`main`.
"""

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

_FLAGS = {
    'config': lambda: config_flags.DEFINE_config_file(
        'config', None, 'Config file, such as configs/blop.py or'
        ' configs/blop.py:gemma1_2b; override values as --config.lora.rank=8.',
        lock_config=True),
    'workdir': lambda: flags.DEFINE_string(
        'workdir', None, 'Folder of the run: checkpoints, metrics, report.'),
    'dry_run': lambda: flags.DEFINE_bool(
        'dry_run', False, 'Audit the data, print the plan and stop.'),
    'topology': lambda: flags.DEFINE_string(
        'topology', 'cpu', 'Where to run: kaggle-tpu, kaggle-t4x2, a slice such'
        ' as v5e-8, v5e:2x4, v5p-8, v6e-4, or cpu, gpu for what is here.'),
    'analytic': lambda: flags.DEFINE_bool(
        'analytic', False, 'Estimate by arithmetic; compile nothing.'),
    'largest': lambda: flags.DEFINE_bool(
        'largest', False, 'Find the largest batch and length by compiling them:'
        ' four to eight compilations.'),
    'base': lambda: flags.DEFINE_bool(
        'base', False, 'The untouched base model instead of the tuned one.'),
    'baseline': lambda: flags.DEFINE_list(
        'baseline', [], 'Ways of prompting, by commas: zero, few:4 (examples of'
        ' the training split, drawn by the seed), rag:4 (the nearest by BM25).'
        ' evaluate: of the base; sample: one of them.'),
    'self_test': lambda: flags.DEFINE_bool(
        'self_test', False, 'Before training, compare the gradient of one batch'
        ' as 1xB, Bx1, packed, padded and on one device; stop if they differ.'),
    'split': lambda: flags.DEFINE_string(
        'split', None, 'The split: train, validation or test.'),
    'step': lambda: flags.DEFINE_integer(
        'step', -1, 'Checkpoint to use; -1 is the best, -2 the latest.'),
    'prompt': lambda: flags.DEFINE_multi_string(
        'prompt', None, 'Prompt to answer; may be given several times. Without'
        ' one an interactive chat begins.'),
    'system': lambda: flags.DEFINE_string('system', '', 'System text.'),
    'examples': lambda: flags.DEFINE_integer(
        'examples', 3, 'Number of examples to show; curate: of each step.'),
    'color': lambda: flags.DEFINE_bool(
        'color', None, 'Colours; the default is whether this is a terminal.'),
    'temperature': lambda: flags.DEFINE_float(
        'temperature', None, '0 for greedy. Default of this and of the flags'
        ' below: config.sampling of the run.'),
    'top_k': lambda: flags.DEFINE_integer(
        'top_k', None, 'Keep the k likeliest tokens; 0 for all.'),
    'top_p': lambda: flags.DEFINE_float(
        'top_p', None, 'Keep the likeliest tokens that make up p.'),
    'repetition_penalty': lambda: flags.DEFINE_float(
        'repetition_penalty', None, '1 for none.'),
    'max_new_tokens': lambda: flags.DEFINE_integer(
        'max_new_tokens', None, 'Longest answer.'),
    'stop': lambda: flags.DEFINE_multi_string(
        'stop', None, 'Text that ends an answer; may be given several times.'),
    'seed': lambda: flags.DEFINE_integer(
        'seed', None, 'Of the sampling.'),
    'out': lambda: flags.DEFINE_string(
        'out', None, 'export: folder to export to; it must not be there yet.'
        ' curate: folder to write to. serve: file of the ratings. compare: page'
        ' to write, such as page.html.'),
    'formats': lambda: flags.DEFINE_list(
        'formats', [], 'What to write, separated by commas: hf, peft, lora,'
        ' gguf-f32, gguf-f16, gguf-bf16, gguf-q8_0, gguf-q6_k, gguf-q5_k_m,'
        ' gguf-q4_k_m, gguf-q4_0. Default: hf,peft,gguf-q8_0.'),
    'hf_dtype': lambda: flags.DEFINE_enum(
        'hf_dtype', 'bfloat16', ['bfloat16', 'float16', 'float32'],
        'Of the merged safetensors.'),
    'shard_size': lambda: flags.DEFINE_float(
        'shard_size', 2.0, 'Largest safetensors file in GB; as much memory is'
        ' needed.'),
    'runtime_python': lambda: flags.DEFINE_string(
        'runtime_python', None, 'Interpreter with torch, transformers and peft,'
        ' in which hf and peft are proven. Default: that of .venv-runtimes'
        ' (launch/runtimes.sh), else this one.'),
    'llama_server': lambda: flags.DEFINE_string(
        'llama_server', None, "llama.cpp's llama-server, in which GGUFs are"
        ' proven. Default: that of the export extra, else the one on PATH.'),
    'gguf': lambda: flags.DEFINE_string(
        'gguf', None, "Judge the answers of llama.cpp's server running this"
        ' exported file instead.'),
    'allow_unproven': lambda: flags.DEFINE_bool(
        'allow_unproven', False, 'Export even what cannot be proven because its'
        ' runtime is missing; the card says so.'),
    'overwrite': lambda: flags.DEFINE_bool(
        'overwrite', False, 'Replace what an earlier run wrote under --out.'),
    'push': lambda: flags.DEFINE_multi_string(
        'push', [], 'ORG/NAME on the Hugging Face Hub or kaggle:OWNER/MODEL, to'
        ' upload to afterwards; logins come from the environment.'),
    'push_data': lambda: flags.DEFINE_string(
        'push_data', '', 'Upload the data files too, as a data set under this'
        ' licence, such as cc-by-4.0 or other.'),
    'private': lambda: flags.DEFINE_bool(
        'private', False, 'Make new repositories private.'),
    'limit': lambda: flags.DEFINE_integer(
        'limit', 0, 'Judge only the first so many records; 0 for all.'),
    'mode': lambda: flags.DEFINE_enum(
        'mode', None, ['rate', 'play'], 'rate: people compare the answers of'
        ' --runs; play: a playground for the run of --workdir.'),
    'runs': lambda: flags.DEFINE_list(
        'runs', [], 'Two results to compare, by a comma: workdirs, W:base for'
        ' the untouched model of W.'),
    'report': lambda: flags.DEFINE_bool(
        'report', False, 'Print what people said of --runs, and stop.'),
    'host': lambda: flags.DEFINE_string(
        'host', '127.0.0.1', 'Address to serve on. Any other than this'
        " machine's own needs the token in the address that is printed."),
    'port': lambda: flags.DEFINE_integer(
        'port', 8000, 'Port to serve on; 0 takes any that is free.'),
    'grid': lambda: flags.DEFINE_string(
        'grid', '', 'Factors and their values, every combination of which is a'
        ' cell: lora.rank=4,8;train.epochs=1,5. The factor config is the'
        ' argument of the config file. Default: what sweep() of that file'
        ' says.'),
    'seeds': lambda: flags.DEFINE_integer(
        'seeds', 0, 'Runs of each cell, with config.seed and the numbers after'
        ' it. Default: what sweep() of the config file says, or 1.'),
    'baseline_cell': lambda: flags.DEFINE_string(
        'baseline_cell', '', 'Name of the cell that the others are compared'
        ' with. Default: that of sweep(), or the first.'),
    'evaluate': lambda: flags.DEFINE_enum(
        'evaluate', 'auto', ['auto', 'test', 'validation', 'none'],
        'Split that the best checkpoint of each run answers. auto: test if it'
        ' is set, else validation; none: the validation scores of training'
        ' stand.'),
    'parallel': lambda: flags.DEFINE_integer(
        'parallel', 1, 'Runs at a time, each on a GPU or TPU chip of its own.'),
    'shard': lambda: flags.DEFINE_string(
        'shard', '', 'i/n: this process takes every n-th run, from the i-th'
        ' (0/2 and 1/2 on two hosts that share --workdir).'),
    'search': lambda: flags.DEFINE_string(
        'search', '', 'Space to search instead of a grid: '
        'optimizer.learning_rate=1e-5..1e-3:log;lora.rank=4,8,16.'),
    'trials': lambda: flags.DEFINE_integer(
        'trials', 20, 'Trials of --search, those of earlier calls counted.'),
}


def run(module: str, *flag_names: str, positional: str = '',
        template: str = 'configs.default', **defaults: Any) -> None:
  """Parses the command line, runs `module.main(**flags)` and exits.

  Exit status: what `main` returns, or 2 for a user's mistake, or 130 for an
  interrupt.

  Args:
    module: The entry point's importable name.
    *flag_names: The flags that it takes, keys of `_FLAGS`.
    positional: Parameter of `main` that takes the arguments that are no flags;
      '' where there may be none.
    template: Module of the config whose keys --config must have.
    **defaults: Of flags whose default is another here.
  """
  _quiet_orbax()
  # So that what was started (llama-server, a half-written export) is ended
  # and cleaned up; training puts its own handler in the place of this one.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  try:
    values = _parse(module, flag_names, positional, defaults, template)
    main: Callable[..., Any] = importlib.import_module(module).main
    status = main(**values)
  except errors.UserError as error:
    # One write: other threads may be writing too.
    sys.stderr.write(f'error: {error}\n')
    status = 2
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    status = 130
  except BrokenPipeError:  # The reader, such as `head`, has seen enough.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    status = 0
  sys.stdout.flush()
  sys.exit(status or 0)


def _quiet_orbax():
  """Keeps Orbax's own noise from the person, to whom our message speaks.

  These are warnings about its options, and, after a write that failed (a full
  disk), tracebacks of its background tasks: the failure itself reaches the
  caller as an exception.
  """
  logging.getLogger('absl').addFilter(
      lambda record: f'{os.sep}orbax{os.sep}' not in record.pathname)
  logging.getLogger('asyncio').addFilter(
      lambda record: 'was never retrieved' not in record.getMessage())
  report = sys.unraisablehook

  def hook(unraisable):
    # TensorStore's threads call back into the loop that Orbax has closed.
    if str(unraisable.exc_value) != 'Event loop is closed':
      report(unraisable)

  sys.unraisablehook = hook


def _parse(module, flag_names, positional, defaults,
           template='configs.default'):
  for name in flag_names:
    _FLAGS[name]()
  for name, value in defaults.items():
    flags.FLAGS.set_default(name, value)
  if any(a in ('--help', '-h', '--helpfull') for a in sys.argv[1:]):
    print(sys.modules['__main__'].__doc__)
    for name in flag_names:
      print(f'  --{name}: {flags.FLAGS[name].help}')
    sys.exit(0)
  _check_keys(sys.argv[1:], template)
  try:
    rest = flags.FLAGS(sys.argv)[1:]
    values = {name: getattr(flags.FLAGS, name) for name in flag_names}
    if values.get('config') is not None:
      values['config'].keys()  # Read here, not where it is first used.
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
        + ', '.join(f'--{name}' for name in flag_names),
        'write --flag=value; --help lists the flags')
  return values


def _check_keys(arguments, template):
  """Names the nearest key for a mistyped `--config.key`."""
  for argument in arguments:
    if argument.startswith('--config.'):
      key = argument[len('--config.'):].partition('=')[0]
      check_key(key, f'--config.{key}', template)


def _keys(template):
  config = importlib.import_module(template).get_config()
  return [key for key, _ in config_lib.leaves(config)]


def _file(template):
  return template.replace('.', '/') + '.py'


def check_key(
    key: str, shown: str, template: str = 'configs.default') -> None:
  """Raises, naming the nearest, unless a template config has a key.

  Args:
    key: Such as lora.rank.
    shown: How it was written, for the message.
    template: The module of the config.
  """
  known = _keys(template)
  if key.startswith('curate.'):
    raise _moved_to_curation(shown)
  if key not in known:
    name = key.rpartition('.')[2]
    same_name = [k for k in known if k.rpartition('.')[2] == name]
    if key in config_lib.RENAMED:
      same_name = [config_lib.RENAMED[key]]
    raise errors.UserError(
        shown, f'a key of {_file(template)}',
        (f'Did you mean {same_name[0]!r}?' if same_name else
         errors.nearest(key, known).strip())
        or 'every key stands there with a comment')


def config_source() -> tuple[str, dict[str, Any]]:
  """Returns what --config names, argument and all, and {key: override}."""
  flag = flags.FLAGS['config']
  return (config_flags.get_config_filename(flag),
          config_flags.get_override_values(flag))


def _check_complete(config, template):
  """Raises unless a config has the keys of its template, no others."""
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
  """Turns what absl and ml_collections raise into one message."""
  text = str(error)
  if 'Traceback (most recent call last)' in text:
    # An error inside a config file comes with its whole story: its last line.
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
  """Returns a flag's value, or raises for one that was left out."""
  if not value:
    raise errors.UserError(
        f'--{name} is missing', f'--{name}=...', f'for example {example}')
  return value


def load_run_config(workdir: str) -> Any:
  """Returns the locked config that a run saved in its workdir.

  Raises:
    UserError: if there is none.
  """
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
        'the config.json that the run has written',
        'take it from a copy of the run, or train again in another workdir'
    ) from None
