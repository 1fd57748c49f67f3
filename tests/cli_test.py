"""The command line, with one process per case."""

import time

import conftest
import pytest

_PROGRAMS = {
    'train': ('config', 'workdir', 'dry_run', 'self_test'),
    'evaluate': ('config', 'workdir', 'base', 'split', 'step', 'limit'),
    'sample': ('workdir', 'prompt', 'system', 'temperature', 'stop', 'seed'),
    'preview': ('config', 'split', 'examples', 'color'),
}


@pytest.mark.parametrize('program, names', _PROGRAMS.items())
def test_help_lists_the_flags_without_jax(program, names):
  start = time.monotonic()
  status, out, err = conftest.run_module(
      program, '--help', env={'PYTHONPROFILEIMPORTTIME': '1'})
  assert status == 0
  assert time.monotonic() - start < 10  # 3 s on an idle machine.
  assert f'python -m gemma_sft.{program}' in out  # The module's docstring.
  for name in names:
    assert f'--{name}: ' in out
  imported = {line.rpartition('|')[2].strip() for line in err.splitlines()}
  assert 'absl' in imported
  assert not imported & {'jax', 'gemma', 'tensorflow', 'orbax', 'numpy.linalg'}


def _error(program: str, *arguments: str) -> str:
  """Returns the message of a command that has to fail with status 2."""
  status, out, err = conftest.run_module(program, *arguments)
  assert status == 2, (status, out, err)
  assert 'Traceback' not in err
  message = err[err.index('error: '):]
  assert '\n  expected: ' in message and '\n  fix: ' in message
  return message


_TINY = ('--config=configs/tiny.py', '--workdir=/nowhere/w')


@pytest.mark.parametrize('arguments, parts', [
    (('--config.lora.rnk=3',), ['--config.lora.rnk', "mean 'lora.rank'"]),
    (('--config.rank=3',), ["Did you mean 'lora.rank'?"]),
    (('--config.lora.dora=true',), ["Did you mean 'lora.use_dora'?"]),
    (('--config.optimizer.clip_norm=1',),
     ["Did you mean 'optimizer.max_grad_norm'?"]),
    (('--config.lora.rank=many',), ['config.lora.rank=many', 'int']),
    (('--config.data.packing=maybe',), ['config.data.packing=maybe']),
    (('--workdr=w',), ["'workdr'", 'workdir']),
    (('--dry_run=maybe',), ['dry_run=maybe']),
    (('stray',), ["the argument 'stray'", '--workdir']),
    (('--prompt=Hi',), ["'prompt'"]),  # A flag of `sample`.
], ids=lambda x: x[0])
def test_mistakes_on_the_command_line_are_named(arguments, parts):
  message = _error('train', *_TINY, *arguments)
  for part in parts:
    assert part in message


@pytest.mark.parametrize('program, arguments, missing', [
    ('train', ('--workdir=w',), '--config is missing'),
    ('train', ('--config=configs/tiny.py',), '--workdir is missing'),
    ('evaluate', (), '--workdir is missing'),
    ('sample', (), '--workdir is missing'),
    ('preview', (), '--config is missing'),
])
def test_missing_flags_are_named(program, arguments, missing):
  assert missing in _error(program, *arguments)


def test_a_missing_config_file_is_named(tmp_path):
  message = _error(
      'train', '--config=configs/nowhere.py', f'--workdir={tmp_path}')
  assert 'configs/nowhere.py' in message


def test_an_unknown_variant_of_a_config_is_named_in_one_line(tmp_path):
  message = _error(
      'train', '--config=configs/blop.py:gemma9', f'--workdir={tmp_path}')
  assert 'use :270m or :gemma1_2b' in message
  assert 'File "' not in message


def test_a_config_that_is_not_a_delta_on_default_is_refused(tmp_path):
  path = tmp_path / 'own.py'
  path.write_text(
      'from ml_collections import config_dict\n'
      'def get_config():\n  return config_dict.ConfigDict({"lr": 1})\n')
  assert 'default.py' in _error(
      'train', f'--config={path}', f'--workdir={tmp_path / "w"}')


def test_bad_data_ends_with_status_2(tmp_path):
  (tmp_path / 'bad.txt').write_bytes(b'# INPUT\nCaf\xe9?\n# OUTPUT\nYes\n')
  message = _error(
      'train', '--config=configs/tiny.py', f'--workdir={tmp_path / "w"}',
      f'--config.data.train={tmp_path / "bad.txt"}')
  assert 'bad.txt:2' in message and 'UTF-8' in message
  message = _error('evaluate', f'--workdir={tmp_path / "no_run"}')
  assert 'no config.json in' in message
