"""Proves that a refactoring changes no bit of what is trained and exported.

    python tests/benchmarks/equal_runs.py --before=CHECKOUT --after=CHECKOUT \\
        [--before_results=FOLDER] [--only=lora,dora] [--parallel=2]

Each variant below is trained in both checkouts (six updates of a model of
random weights on made-up text, on the CPU) and exported, without proofs. It
compares every number that a line of metrics.jsonl has in both runs, except
times; the hash chain of the batches; the SHA-256 of every exported file but
README.md and export.json. The table says `equal` or the first difference of
each variant; the status is 1 if anything differs or fails.

With --before_results the runs of `before` are kept there and used again with
the same code, packages and processor; once all are there, --before may be left
out. Both sides run in this interpreter's environment, each with its own
gemma_sft, and share one cache of compiled programs. A checkout must not change
while its code runs. `_RENAMED` has the config keys that `after` has renamed.
"""

import argparse
from concurrent import futures
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

# Key of a config -> the last part of its later name.
_RENAMED = {
    'lora.dora': 'use_dora',
    'lora.plus_ratio': 'loraplus_lr_ratio',
    'lora.rank_stabilised': 'use_rslora',
    'optimizer.clip_norm': 'max_grad_norm',
    'optimizer.warmup_share': 'warmup_ratio',
    'train.microbatches': 'gradient_accumulation_steps',
}
# Lines of metrics.jsonl have these in both runs, or in neither.
_ALWAYS = ('chain', 'grad_norm', 'loss', 'eval/loss')
_TIMES = ('time', 'first_step_seconds', 'tokens_per_second')
# They name the commit and the config keys of the code that wrote them.
_NOT_COMPARED = ('README.md', 'export.json')
_WEIGHTS = ('.gguf', '.safetensors')
# Their versions may change what is computed or written.
_PACKAGES = ('gemma', 'gguf', 'grain', 'flax', 'jax', 'jaxlib', 'numpy',
             'optax', 'safetensors', 'sentencepiece')

# Six layers: five of them local, and one global.
_SETTINGS = {
    'seed': 1, 'task': 'chat', 'model.num_layers': 6, 'data.test': '',
    'data.max_length': 128, 'data.batch_size': 4, 'train.steps': 6,
    # Large enough for the last updates to show in rounded weights.
    'optimizer.learning_rate': 1e-2, 'optimizer.weight_decay': 0.01,
    'eval.every': 3, 'eval.judged': 0, 'eval.prompts': '()'}
_MERGED = ('hf', 'gguf-f16', 'gguf-q8_0')


@dataclasses.dataclass(frozen=True)
class Variant:
  """A run, and the formats of the adapter alone and of the merged model.

  The settings are config keys, by the older names, on top of `_SETTINGS`.
  """

  settings: dict[str, Any]
  adapters: tuple[str, ...] = ('peft', 'lora')
  merged: tuple[str, ...] = _MERGED
  generation: int = 3
  devices: int = 1


VARIANTS = {
    # The only one that also generates, which takes long to compile.
    'lora': Variant({
        'eval.judged': 2, 'eval.prompts': "('What is a lark?',)"}),
    'dora': Variant({'lora.dora': True}, ('peft',)),
    'full': Variant({'lora.enabled': False}, ()),
    'int8': Variant({'model.quantization': 'int8'}),
    'int4': Variant({'model.quantization': 'int4'}),
    'nf4': Variant({'model.quantization': 'nf4'}),
    'float16': Variant({'model.dtype': 'float16'}),
    'accumulated': Variant({
        'train.microbatches': 2, 'train.remat': 'block', 'train.loss_chunk': 32,
        'lora.dropout': 0.1, 'lora.rank_stabilised': True,
        'lora.plus_ratio': 16.0, 'lora.targets': 'attn/',
        'optimizer.warmup_share': 0.4, 'optimizer.clip_norm': 0.5,
        'optimizer.schedule': 'linear', 'optimizer.final_share': 0.1}),
    'sharded': Variant({'mesh.fsdp': 2, 'mesh.tensor': 2}, devices=4),
    'gemma1, buckets': Variant(
        {'model.num_layers': 2, 'model.layers': 'loop', 'data.packing': False,
         'data.buckets': '(64, 128)'}, generation=1),
    'gemma2, bfloat16': Variant(
        {'model.dtype': 'bfloat16', 'model.attention': 'einsum',
         'train.remat': 'none'}, generation=2),
    'gemma4': Variant({}, generation=4),
}


class Failed(Exception):
  """A run that did not come to its end."""


@dataclasses.dataclass(frozen=True)
class Checkout:
  """One of the two sides.

  Attributes:
    keys: Of its configs/default.py.
    code: Hash of all files of gemma_sft/ and configs/.
    commit: For people; '+' where these files differ from it.
  """

  folder: pathlib.Path
  keys: tuple[str, ...]
  code: str
  commit: str

  def key(self, name: str) -> str:
    """Returns the name that a config key has here."""
    if name in self.keys:
      return name
    found = [key for key in self.keys
             if key.rpartition('.')[2] == _RENAMED.get(name)]
    if len(found) != 1:
      raise Failed(f'{self.folder}: config.{name} is not in'
                   ' configs/default.py: add its new name to _RENAMED')
    return found[0]


# One side --------------------------------------------------------------------

_PROBE = """
import json
import gemma_sft
from configs import default

def keys(node, prefix=''):
  for name, value in node.items():
    if hasattr(value, 'items'):
      yield from keys(value, f'{prefix}{name}.')
    else:
      yield prefix + name

print(json.dumps([gemma_sft.__file__, list(keys(default.get_config()))]))
"""


def open_checkout(folder: pathlib.Path) -> Checkout:
  """Reads the config keys of a checkout and checks that its own code runs."""
  folder = folder.resolve()
  done = subprocess.run(
      [sys.executable, '-c', _PROBE], cwd=folder, env=_environment(folder),
      capture_output=True, text=True)
  if done.returncode:
    raise Failed(f'{folder}: {_last_line(done.stderr)}')
  file, keys = json.loads(done.stdout.splitlines()[-1])
  if folder not in pathlib.Path(file).resolve().parents:
    raise Failed(f'{folder}: gemma_sft would be imported from {file}')
  return Checkout(folder, tuple(keys), _code(folder), _commit(folder))


def _code(folder):
  digest = hashlib.sha256()
  for path in sorted(
      path for part in ('gemma_sft', 'configs')
      for path in (folder / part).rglob('*')
      if path.is_file() and '__pycache__' not in path.parts):
    digest.update(str(path.relative_to(folder)).encode())
    digest.update(hashlib.sha256(path.read_bytes()).digest())
  return digest.hexdigest()


def _commit(folder):
  def git(*arguments):
    return subprocess.run(['git', *arguments], cwd=folder, capture_output=True,
                          text=True).stdout.strip()

  changes = git('status', '--porcelain', '--', 'gemma_sft', 'configs')
  return git('rev-parse', '--short=12', 'HEAD') + ('+' if changes else '')


def _environment(folder, devices=1, cache=None):
  environment = os.environ | {
      'PYTHONPATH': str(folder), 'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'}
  if cache is not None:
    environment['GEMMA_SFT_CACHE'] = str(cache)
  return environment


def run(
    checkout: Checkout, name: str, folder: pathlib.Path, cache: pathlib.Path,
) -> dict[str, Any]:
  """Trains and exports a variant with the code of a checkout.

  The folder is made anew; it keeps logs, workdir, exported files and
  result.json. The cache is for compiled programs.

  Returns:
    {'made_by', 'commit', 'seconds', 'metrics': lines, 'files': {path:
    SHA-256}, 'failed': why nothing was exported, or ''}.

  Raises:
    Failed: if training does, or a command wrote nothing to compare, or the
      code was changed under way.
  """
  variant, start = VARIANTS[name], time.monotonic()
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  settings = _SETTINGS | variant.settings
  for split, text in _data().items():
    (folder / f'{split}.txt').write_text(text, encoding='utf-8')
    settings[f'data.{split}'] = str(folder / f'{split}.txt')
  command = functools.partial(
      _command, checkout.folder, folder,
      _environment(checkout.folder, variant.devices, cache))
  # The folders' last names appear in the files, so both sides use the same.
  command('train', f'--config=configs/tiny.py:{variant.generation}',
          f'--workdir={folder / "workdir"}',
          *(f'--config.{checkout.key(k)}={v}' for k, v in settings.items()))
  formats, failed = ','.join((*variant.merged, *variant.adapters)), ''
  try:
    command('export', f'--workdir={folder / "workdir"}',
            f'--out={folder / "exported"}', f'--formats={formats}',
            # float32, so that no difference is rounded away.
            '--hf_dtype=float32',
            # No runtime is found, so none is run.
            '--allow_unproven', '--runtime_python=none', '--llama_server=none')
  except Failed as error:
    failed = str(error)  # The training is compared all the same.
  lines = (folder / 'workdir' / 'metrics.jsonl').read_text().splitlines()
  result = {
      'made_by': made_by(checkout.code, name), 'commit': checkout.commit,
      'seconds': round(time.monotonic() - start),
      'metrics': [json.loads(line) for line in lines],
      'files': _hashes(folder / 'exported'), 'failed': failed}
  steps = sum('loss' in row for row in result['metrics'])
  if steps != settings['train.steps']:
    raise Failed(f'{steps} lines of training in metrics.jsonl, not'
                 f' {settings["train.steps"]}')
  if not (failed or any(p.endswith(_WEIGHTS) for p in result['files'])):
    raise Failed('no weights were exported')
  if _code(checkout.folder) != checkout.code:
    raise Failed(f'{checkout.folder}: the code was changed under way')
  if failed:
    return result
  # It gets its name once it is complete.
  (folder / 'result.tmp').write_text(json.dumps(result, indent=1))
  (folder / 'result.tmp').rename(folder / 'result.json')
  return result


def _command(cwd, folder, environment, module, *arguments):
  log = folder / f'{module}.log'
  with log.open('w') as file:
    status = subprocess.run(
        [sys.executable, '-m', f'gemma_sft.{module}', *arguments], cwd=cwd,
        env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
  if status:
    text = log.read_text()
    reason = next((line for line in text.splitlines()
                   if line.startswith('error: ')), _last_line(text))
    raise Failed(f'{module} ended with {status}: {reason}')


def _last_line(text):
  return (text.strip().splitlines() or ['no output'])[-1]


@functools.cache
def _data():
  """Returns {split: text}: prompts and answers of many lengths."""
  draw = random.Random(0)
  words = ('lark sings over the mill while rain falls on häuser and 山 42'
           ' stones, slowly; nobody = there').split()

  def some(n):
    return ' '.join(draw.choices(words, k=draw.randint(1, n)))

  # Packed, 30 examples make two epochs of three batches that share one bound on
  # their trained tokens, so the step is compiled once.
  return {split: ''.join(
      f'# INPUT\n{i} {some(4)}\n\n# OUTPUT\n{some(9)}\n\n' for i in range(n))
          for split, n in (('train', 30), ('validation', 6))}


def _hashes(folder):
  files = {str(path.relative_to(folder)): path
           for path in sorted(folder.rglob('*')) if path.is_file()}
  return {name: hashlib.sha256(path.read_bytes()).hexdigest()
          for name, path in files.items() if name not in _NOT_COMPARED}


def made_by(code: str, name: str) -> dict[str, Any]:
  """Returns everything on which the bits of a variant's run depend."""
  plan = json.dumps([_SETTINGS, dataclasses.asdict(VARIANTS[name]), _data()])
  return {
      'code': code, 'plan': hashlib.sha256(plan.encode()).hexdigest()[:16],
      'python': platform.python_version(), 'processor': _processor(),
      'cores': len(os.sched_getaffinity(0)),
      'packages': {p: importlib.metadata.version(p) for p in _PACKAGES}}


@functools.cache
def _processor():
  for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
    if line.startswith('model name'):
      return line.partition(':')[2].strip()
  return platform.machine()


def load_kept(
    checkout: Checkout | None, name: str, folder: pathlib.Path
) -> tuple[dict[str, Any] | None, str]:
  """Returns (an earlier result or None, why it cannot be used)."""
  path = folder / 'result.json'
  if not path.exists():
    return None, 'there is none'
  result = json.loads(path.read_text())
  found = result['made_by']
  wanted = made_by(checkout.code if checkout else found['code'], name)
  others = [key for key in wanted if found.get(key) != wanted[key]]
  return (None, 'of another ' + ', '.join(others)) if others else (result, '')


# Both sides ------------------------------------------------------------------


def differences(
    before: dict[str, Any], after: dict[str, Any]
) -> tuple[list[str], set[str]]:
  """Compares two results.

  Returns:
    (the differences in the order in which they arose; names that are in only
    one metrics.jsonl, which are not compared).
  """
  found, alone = [], set()
  rows = [_rows(result) for result in (before, after)]
  for place in sorted(rows[0] | rows[1]):
    a, b = (side.get(place) for side in rows)
    if a is None or b is None:
      found.append(f'{place[1]} of step {place[0]}:'
                   f' {"before" if b is None else "after"} alone')
      continue
    for key in sorted((a | b).keys() - set(_TIMES), key=_order):
      if (key in a) != (key in b) and key not in _ALWAYS:
        alone.add(key)
      elif a.get(key) != b.get(key):
        found.append(
            f'step {place[0]}: {key} {a.get(key)}, then {b.get(key)}')
  if before.get('failed') or after.get('failed'):
    return found, alone
  files = [result['files'] for result in (before, after)]
  for path in sorted(files[0] | files[1], key=lambda p: (
      not p.endswith(_WEIGHTS), p)):
    a, b = (side.get(path) for side in files)
    if a != b:
      found.append(f'{path}: ' + (
          'before alone' if b is None else 'after alone' if a is None
          else 'other bytes'))
  return found, alone


def _rows(result):
  return {(row['step'], 'training' if 'chain' in row else 'evaluation'): row
          for row in result['metrics']}


def _order(key):
  return (_ALWAYS.index(key) if key in _ALWAYS else len(_ALWAYS)), key


def compare(
    name: str, before: Checkout | None, after: Checkout,
    before_results: pathlib.Path, after_results: pathlib.Path,
) -> tuple[str, list[str], set[str]]:
  """Returns (row of the table, differences, names that one has alone)."""
  folder, cache = name.replace(', ', '-'), before_results / 'cache'
  times, side = ['', ''], 'before'
  try:
    old, why = load_kept(before, name, before_results / folder)
    times[0] = 'kept' if old else ''
    if old is None:
      if before is None:
        raise Failed(f'no result that serves ({why}), and no --before')
      old = run(before, name, before_results / folder, cache)
      times[0] = f'{old["seconds"]} s'
    side = 'after'
    new = run(after, name, after_results / folder, cache)
    times[1] = f'{new["seconds"]} s'
  except Failed as error:
    found, alone = [f'{side}: {error}'], set()
    verdict = f'FAILED {found[0]}'
  else:
    found, alone = differences(old, new)
    failed = [f'{side}: {result["failed"]}' for side, result in (
        ('before', old), ('after', new)) if result.get('failed')]
    if failed:
      verdict = f'FAILED {failed[0]}; training is ' + (
          f'different: {found[0]}' if found else 'equal')
      found = failed + found
    elif found:
      verdict = f'DIFFERENT {found[0]}' + (
          f' (and {len(found) - 1} more)' if found[1:] else '')
    else:
      steps = sum('chain' in row for row in new['metrics'])
      verdict = f'equal: {steps} steps, {len(new["files"])} files'
  return f'| {name} | {verdict} | {times[0]} | {times[1]} |', found, alone


def main():
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--before', type=pathlib.Path)
  parser.add_argument('--after', type=pathlib.Path, required=True)
  parser.add_argument('--before_results', type=pathlib.Path,
                      help='folder to keep the runs of --before in')
  by_word = {name.partition(',')[0]: name for name in VARIANTS}
  parser.add_argument('--only', default=','.join(by_word),
                      help='variants by their first words: lora,dora,full')
  parser.add_argument('--parallel', type=int, default=1,
                      help='variants at a time')
  args = parser.parse_args()
  if unknown := set(args.only.split(',')) - set(by_word):
    parser.error(f'--only: {", ".join(sorted(unknown))} is not of'
                 f' {", ".join(by_word)}')
  if not (args.before or args.before_results):
    parser.error('--before, or --before_results with its runs')
  try:
    before = args.before and open_checkout(args.before)
    after = open_checkout(args.after)
  except Failed as error:
    sys.exit(f'error: {error}')
  work = pathlib.Path(tempfile.mkdtemp(prefix='equal_runs'))
  compared = functools.partial(
      compare, before=before, after=after, after_results=work / 'after',
      before_results=(args.before_results or work / 'before').resolve())
  for side, checkout in (('before', before), ('after', after)):
    if checkout:
      print(f'{side}: {checkout.commit or "no clone"}')
  print('\n| variant | result | before | after |\n|---|---|---|---|')
  found, alone = {}, set()
  with futures.ThreadPoolExecutor(args.parallel) as pool:
    names = [by_word[word] for word in args.only.split(',')]
    for name, (row, different, one_sided) in zip(
        names, pool.map(compared, names)):
      print(row, flush=True)
      found[name] = different
      alone |= one_sided
  if alone:
    print(f'\nnot compared, in one run alone: {", ".join(sorted(alone))}')
  for name, different in found.items():
    if different[1:]:
      print(f'\n{name}:', *different, sep='\n  ')
  if any(found.values()):
    sys.exit(f'\nlogs and files of after are in {work / "after"}')
  shutil.rmtree(work)


if __name__ == '__main__':
  main()
