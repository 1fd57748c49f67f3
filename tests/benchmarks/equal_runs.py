"""Proves that a refactoring changes no bit of what is trained and exported.

    python tests/benchmarks/equal_runs.py --before=CHECKOUT --after=CHECKOUT \\
        [--results=FOLDER] [--only=lora,dora] [--parallel=2]

Each variant below is trained in both checkouts (six updates of a model of
random weights on made-up text, on the CPU) and exported, without proofs. It
compares every number that a line of metrics.jsonl has in both runs, except
times; the hash chain of the batches; the SHA-256 of every exported file but
README.md and export.json. The table says `equal` or the first difference of
each variant; the status is 1 if anything differs or fails.

A complete run in --results is not run again if commit, settings and packages
are the same, so that one `before` serves many an `after`. Both sides run in
this interpreter's environment, each with its own gemma_sft, and share one cache
of compiled programs. A checkout must be clean and must not change while its
code runs. `_RENAMED` has the config keys that `after` has renamed.
"""

import argparse
from concurrent import futures
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
from typing import Any

# Key of a config -> its later name.
_RENAMED = {
    'lora.dora': 'lora.use_dora',
    'lora.plus_ratio': 'lora.loraplus_lr_ratio',
    'lora.rank_stabilised': 'lora.use_rslora',
    'optimizer.clip_norm': 'optimizer.max_grad_norm',
    'optimizer.warmup_share': 'optimizer.warmup_ratio',
    'train.microbatches': 'train.gradient_accumulation_steps'}
# Lines of metrics.jsonl have these in both runs, or in neither.
_ALWAYS = ('chain', 'grad_norm', 'loss', 'eval/loss')
_TIMES = ('time', 'first_step_seconds', 'tokens_per_second')
# They name the commit and the config keys of the code that wrote them.
_NOT_COMPARED = ('README.md', 'export.json')

# Six layers: five of them local, and one global.
_SETTINGS = {
    'seed': 1, 'task': 'chat', 'data.test': '',
    'model.num_layers': 6, 'model.dtype': 'float32',
    'data.max_length': 128, 'data.batch_size': 4, 'train.steps': 6,
    # Large enough for the last updates to show in rounded weights.
    'optimizer.learning_rate': 1e-2, 'optimizer.weight_decay': 0.01,
    'eval.every': 3, 'eval.judged': 0, 'eval.prompts': '()'}
_MERGED = ('hf', 'gguf-f16', 'gguf-q8_0')


@dataclasses.dataclass(frozen=True)
class Variant:
  """A run. The settings are config keys, by the older names."""

  settings: dict[str, Any]
  formats: tuple[str, ...] = (*_MERGED, 'peft', 'lora')
  generation: int = 3
  devices: int = 1


VARIANTS = {
    # The only one that also generates, which takes long to compile.
    'lora': Variant({
        'eval.judged': 2, 'eval.prompts': "('What is a lark?',)"}),
    'dora': Variant({'lora.dora': True}, (*_MERGED, 'peft')),
    'full': Variant({'lora.enabled': False}, _MERGED),
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
    'gemma1-buckets': Variant(
        {'model.num_layers': 2, 'model.layers': 'loop', 'data.packing': False,
         'data.buckets': '(64, 128)'}, generation=1),
    'gemma2-bfloat16': Variant(
        {'model.dtype': 'bfloat16', 'model.attention': 'einsum',
         'train.remat': 'none'}, generation=2),
    'gemma4': Variant({}, generation=4)}


class Failed(Exception):
  """A command that did not come to its end."""


def commit_of(checkout: pathlib.Path) -> str:
  """Returns the commit of a checkout, which must be clean."""
  def git(*arguments):
    return subprocess.run(['git', *arguments], cwd=checkout, check=True,
                          capture_output=True, text=True).stdout.strip()

  if git('status', '--porcelain', '--', 'gemma_sft', 'configs'):
    sys.exit(f'error: {checkout} has changes that are not committed')
  return git('rev-parse', '--short=12', 'HEAD')


def run(
    checkout: pathlib.Path, name: str, folder: pathlib.Path, cache: pathlib.Path
) -> dict[str, Any]:
  """Trains and exports a variant; returns its 'metrics' and 'files'."""
  variant, kept = VARIANTS[name], folder / 'result.json'
  made_by = [commit_of(checkout), sys.version, repr((_SETTINGS, variant)), *(
      importlib.metadata.version(p) for p in ('jax', 'gemma', 'gguf'))]
  if kept.exists():
    result = json.loads(kept.read_text())
    if result['made_by'] == made_by:
      return result
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  settings = _SETTINGS | variant.settings
  draw = random.Random(0)
  for split, n in (('train', 30), ('validation', 6)):
    (folder / f'{split}.txt').write_text(_examples(n, draw), encoding='utf-8')
    settings[f'data.{split}'] = str(folder / f'{split}.txt')
  environment = os.environ | {
      'PYTHONPATH': str(checkout), 'JAX_PLATFORMS': 'cpu',
      'GEMMA_SFT_CACHE': str(cache),
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={variant.devices}'}

  def command(module, *arguments):
    done = subprocess.run(
        [sys.executable, '-m', f'gemma_sft.{module}', *arguments], cwd=checkout,
        env=environment, capture_output=True, text=True)
    if done.returncode:
      raise Failed(f'{module} ended with {done.returncode}: '
                   + done.stderr.strip().rpartition('\n')[2])

  new_names = 'use_dora' in (checkout / 'configs' / 'default.py').read_text()
  # The folders' last names appear in the files, so both sides use the same.
  command('train', f'--config=configs/tiny.py:{variant.generation}',
          f'--workdir={folder / "workdir"}',
          *(f'--config.{_RENAMED.get(k, k) if new_names else k}={v}'
            for k, v in settings.items()))
  command('export', f'--workdir={folder / "workdir"}',
          f'--out={folder / "exported"}',
          f'--formats={",".join(variant.formats)}',
          # float32, so that no difference is rounded away.
          '--hf_dtype=float32',
          # No runtime is found, so none is run.
          '--allow_unproven', '--runtime_python=none', '--llama_server=none')
  exported = folder / 'exported'
  lines = (folder / 'workdir' / 'metrics.jsonl').read_text().splitlines()
  result = {
      'made_by': made_by, 'metrics': [json.loads(line) for line in lines],
      'files': {
          str(path.relative_to(exported)):
              hashlib.sha256(path.read_bytes()).hexdigest()
          for path in sorted(exported.rglob('*'))
          if path.is_file()
          and str(path.relative_to(exported)) not in _NOT_COMPARED}}
  kept.write_text(json.dumps(result, indent=1))
  return result


def _examples(n, draw):
  """Returns prompts and answers of many lengths.

  Packed, 30 make two epochs of three batches that share one bound on their
  trained tokens, so the step is compiled once.
  """
  words = ('lark sings over the mill while rain falls on häuser and 山 42'
           ' stones, slowly; nobody = there').split()

  def some(most):
    return ' '.join(draw.choices(words, k=draw.randint(1, most)))

  return ''.join(f'# INPUT\n{i} {some(4)}\n\n# OUTPUT\n{some(9)}\n\n'
                 for i in range(n))


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
  """Returns how two results differ, in the order in which it arose."""
  found = []
  rows = [{(row['step'], 'chain' in row): row for row in side['metrics']}
          for side in (before, after)]
  for place in sorted(rows[0].keys() | rows[1].keys()):
    a, b = (side.get(place, {}) for side in rows)
    keys = a.keys() & b.keys() | (a.keys() | b.keys()) & set(_ALWAYS)
    found += [f'step {place[0]}: {key} {a.get(key)}, then {b.get(key)}'
              for key in sorted(keys - set(_TIMES))
              if a.get(key) != b.get(key)]
  a, b = before['files'], after['files']
  return found + [
      f'{path}: ' + ('other bytes' if path in a and path in b else 'one alone')
      for path in sorted(a.keys() | b.keys()) if a.get(path) != b.get(path)]


def main():
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--before', type=pathlib.Path, required=True)
  parser.add_argument('--after', type=pathlib.Path, required=True)
  parser.add_argument('--results', type=pathlib.Path, default=pathlib.Path(
      tempfile.gettempdir(), 'equal_runs'), help='folder to keep the runs in')
  parser.add_argument('--only', default=','.join(VARIANTS))
  parser.add_argument('--parallel', type=int, default=1,
                      help='variants at a time')
  args = parser.parse_args()
  names = args.only.split(',')
  if unknown := set(names) - set(VARIANTS):
    parser.error(
        f'--only: {", ".join(unknown)} is not of {", ".join(VARIANTS)}')

  def compare(name):
    try:
      before, after = (
          run(checkout.resolve(), name,
              args.results.resolve() / side / name,
              args.results.resolve() / 'cache')
          for side, checkout in (('before', args.before),
                                 ('after', args.after)))
    except Failed as error:
      return f'FAILED {error}', 1
    found = differences(before, after)
    steps = sum('chain' in row for row in after['metrics'])
    if steps != _SETTINGS['train.steps'] or len(after['files']) < 5:
      return f'FAILED {steps} steps, {len(after["files"])} files', 1
    return (f'DIFFERENT {"; ".join(found)}' if found else
            f'equal: {steps} steps, {len(after["files"])} files'), len(found)

  print(f'before: {commit_of(args.before)}\nafter: {commit_of(args.after)}\n\n'
        '| variant | result |\n|---|---|')
  n_different = 0
  with futures.ThreadPoolExecutor(args.parallel) as pool:
    for name, (verdict, n) in zip(names, pool.map(compare, names)):
      print(f'| {name} | {verdict} |', flush=True)
      n_different += n
  sys.exit(bool(n_different))


if __name__ == '__main__':
  main()
