"""The command line, with one process per case."""

import resource

import conftest
import layers_test
import pytest

_FLAGS = {
    'train': 'config workdir dry_run self_test',
    'evaluate': 'config workdir base split step limit',
    'sample': 'workdir prompt system temperature stop seed',
    'preview': 'config split examples color'}


@pytest.mark.parametrize('program', layers_test.COMMANDS)
def test_help_is_quick_lists_the_flags_and_loads_no_model(program):
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  status, out, err = conftest.run_module(
      program, '--help', env={'PYTHONPROFILEIMPORTTIME': '1'})
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  assert status == 0, err[-2000:]
  assert f'python -m gemma_sft.{program}' in out  # The module's docstring.
  assert '--workdir' in out or '--config' in out
  for name in _FLAGS.get(program, '').split():
    assert f'--{name}: ' in out
  imported = {line.rpartition('|')[2].strip() for line in err.splitlines()}
  assert {'absl', 'gemma_sft'} <= imported  # The list was read.
  assert not imported & {'jax', 'jaxlib', 'gemma', 'flax', 'tensorflow',
                         'orbax', 'grain', 'kauldron', 'numpy.linalg'}
  assert (after.ru_utime + after.ru_stime
          - before.ru_utime - before.ru_stime) < 3


def _error(program: str, *arguments: str) -> str:
  status, out, err = conftest.run_module(program, *arguments)
  assert status == 2, (status, out, err)
  assert 'Traceback' not in err
  message = err[err.index('error: '):]
  assert '\n  expected: ' in message and '\n  fix: ' in message
  return message


_TINY = 'train --config=configs/tiny.py --workdir=/nowhere/w '


@pytest.mark.parametrize('command, parts', [
    (_TINY + '--config.lora.rnk=3', ['--config.lora.rnk', "mean 'lora.rank'"]),
    (_TINY + '--config.rank=3', ["Did you mean 'lora.rank'?"]),
    (_TINY + '--config.lora.dora=true', ["Did you mean 'lora.use_dora'?"]),
    (_TINY + '--config.optimizer.clip_norm=1',
     ["Did you mean 'optimizer.max_grad_norm'?"]),
    (_TINY + '--config.lora.rank=many', ['config.lora.rank=many', 'int']),
    (_TINY + '--config.data.packing=maybe', ['config.data.packing=maybe']),
    (_TINY + '--workdr=w', ["'workdr'", 'workdir']),
    (_TINY + '--dry_run=maybe', ['dry_run=maybe']),
    (_TINY + 'stray', ["the argument 'stray'", '--workdir']),
    (_TINY + '--prompt=Hi', ["'prompt'"]),  # A flag of `sample`.
    ('plan --config=configs/tiny.py --topology=v5e-9', ["mean 'v5e-"]),
    *((command, ['--config is missing'])
      for command in ('train --workdir=w', 'preview')),
    *((command, ['--workdir is missing'])
      for command in ('train --config=configs/tiny.py', 'evaluate', 'sample')),
    ('compare /nowhere/a /nowhere/b', ['/nowhere/a is not a folder']),
    ('evaluate --workdir=/nowhere/w', ['no config.json in'])], ids=str)
def test_mistakes_on_the_command_line_are_named(command, parts):
  message = _error(*command.split())
  for part in parts:
    assert part in message


def test_a_config_or_data_file_that_cannot_be_used_is_refused(tmp_path):
  path = tmp_path / 'own.py'
  path.write_text(
      'from ml_collections import config_dict\n'
      'def get_config():\n  return config_dict.ConfigDict({"lr": 1})\n')
  for config, part in (
      ('configs/nowhere.py', 'configs/nowhere.py'),
      ('configs/blop.py:gemma9', 'use :270m or :gemma1_2b'),
      (path, 'default.py')):  # It lacks the keys of that file.
    message = _error(
        'train', f'--config={config}', f'--workdir={tmp_path / "w"}')
    assert part in message and 'File "' not in message
  (tmp_path / 'bad.txt').write_bytes(b'# INPUT\nCaf\xe9?\n# OUTPUT\nYes\n')
  message = _error(
      'train', '--config=configs/tiny.py', f'--workdir={tmp_path / "w"}',
      f'--config.data.train={tmp_path / "bad.txt"}')
  assert 'bad.txt:2' in message and 'UTF-8' in message
