"""Writes a run's model for others to run, and proves each file first.

    python -m gemma_sft.export --workdir=W --out=O
    python -m gemma_sft.export --workdir=W --out=O \\
        --formats=hf,peft,lora,gguf-f16,gguf-q4_k_m --push=org/name
    python -m gemma_sft.export --workdir=W --out=O --dry_run    # sizes only

Formats: hf (merged safetensors), peft (the adapter), lora (the adapter as
GGUF), gguf-f32, -f16, -bf16, -q8_0, -q6_k, -q5_k_m, -q4_k_m, -q4_0. Each is
loaded in transformers, peft or llama.cpp and compared with the JAX model; over
the limit nothing appears under O. A Modelfile for Ollama, a model card and
export.json with the figures lie beside.
"""

from gemma_sft import cli

if __name__ == '__main__':
  cli.run(
      'gemma_sft.export', cli.CONFIG, cli.WORKDIR, cli.BASE, cli.STEP,
      cli.LLAMA_SERVER, cli.OVERWRITE,
      cli.text('out', None, 'Folder to export to; it must not exist yet.'),
      cli.words(
          'formats', [], 'What to write, separated by commas: hf, peft, lora,'
          ' gguf-f32, gguf-f16, gguf-bf16, gguf-q8_0, gguf-q6_k, gguf-q5_k_m,'
          ' gguf-q4_k_m, gguf-q4_0. Default: hf,peft,gguf-q8_0.'),
      cli.choice(
          'hf_dtype', 'bfloat16', ['bfloat16', 'float16', 'float32'],
          'Dtype of the merged safetensors.'),
      cli.real(
          'shard_size', 2.0, 'Largest safetensors file in GB; the export needs'
          ' as much memory.'),
      cli.text(
          'runtime_python', None, 'Interpreter with torch, transformers and'
          ' peft, in which hf and peft are proven. Default: that of'
          ' .venv-runtimes (launch/runtimes.sh), else this one.'),
      cli.switch(
          'allow_unproven', False, 'Export even what cannot be proven because'
          ' its runtime is missing; the card says so.'),
      cli.texts(
          'push', [], 'ORG/NAME on the Hugging Face Hub or kaggle:OWNER/MODEL,'
          ' to upload to afterwards; logins come from the environment.'),
      cli.text(
          'push_data', '', 'Upload the data files too, as a data set under this'
          ' licence, such as cc-by-4.0 or other.'),
      cli.switch('private', False, 'Make new repositories private.'),
      cli.switch('dry_run', False, 'Print the sizes and stop.'))

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
import time
from typing import Any
from typing import Sequence

from configs import default
from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft.exports import arrays
from gemma_sft.exports import card
from gemma_sft.exports import first_difference
from gemma_sft.exports import llama_runtime
from gemma_sft.exports import modelfile
from gemma_sft.exports import push as push_lib
from gemma_sft.exports import reference as reference_lib
from gemma_sft.exports import summary as summary_lib
from gemma_sft.exports import templates
from gemma_sft.exports import verify
from gemma_sft.exports import writer
from gemma_sft.run import build
from gemma_sft.run import restore

_SHORT = {'float32': 'f32', 'float16': 'f16', 'bfloat16': 'bf16'}
# Headers, tokenizer files and the file system's own.
_SPARE_BYTES = 100_000_000
_SCHEMA = {
    'prompt': 'what is asked; # INPUT in text files',
    'completion': 'what is to be answered; # OUTPUT in text files',
    'system': 'the system text, where a record has one',
    'messages': 'the turns, instead of the three above'}
# Of the run's own data, among the prompts of the proof.
_EXAMPLES = 8


@dataclasses.dataclass(frozen=True)
class Job:
  """One artefact of an export.

  Attributes:
    format: As asked for.
    path: Below the export's folder.
    kind: Its precision, a key of `divergence.LIMITS`.
    n_bytes: Of its tensors.
    base_bytes: Of the base that its proof needs for a while.
  """

  format: str
  path: str
  kind: str
  n_bytes: int
  base_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Runtimes:
  """Where files are proven; None where that runtime is not needed or lacking.

  Attributes:
    python: With torch, transformers and peft.
    server: llama.cpp's.
    missing: Format -> why it cannot be proven.
  """

  python: str | None
  server: str | None
  missing: dict[str, str]


def main(
    config: Any,
    workdir: str,
    out: str,
    formats: Sequence[str],
    base: bool,
    step: int,
    hf_dtype: str,
    shard_size: float,
    runtime_python: str | None,
    llama_server: str | None,
    allow_unproven: bool,
    overwrite: bool,
    push: Sequence[str],
    push_data: str,
    private: bool,
    dry_run: bool,
) -> int:
  """Exports; see the module's docstring."""
  cli.require('workdir', workdir, '--workdir=workdirs/blop')
  cli.require('out', out, '--out=exports/blop')
  if config is None:
    config = cli.load_run_config(workdir)
  config_lib.validate(config)
  targets = [push_lib.parse_target(text) for text in push]
  if not shard_size > 0:
    raise errors.UserError(
        f'--shard_size={shard_size}', 'gigabytes, above 0', '--shard_size=2')
  has_adapters = config.lora.enabled and not base
  formats = list(dict.fromkeys(formats)) or [
      'hf', *(['peft'] if has_adapters else []), 'gguf-q8_0']
  writer.check_formats(formats, has_adapters=has_adapters,
                       has_magnitudes=has_adapters and config.lora.use_dora)
  final = pathlib.Path(out)
  chosen = restore.choose_weights(config, workdir, base=base, step=step)
  identity = ' '.join(filter(None, [
      chosen.identity, config.model.quantization, hf_dtype, *formats]))
  if _is_there(final, identity, overwrite, allow_unproven):
    print(f'{final}/ is this export already')
    _push(targets, final, config, push_data, private)
    return 0
  source = writer.Source(
      chosen.model, chosen.tokenizer, arrays.open_arrays(chosen),
      name=final.name, temperature=config.sampling.temperature,
      repetition_penalty=config.sampling.repetition_penalty)
  jobs = plan(source, formats, hf_dtype)
  print(f'weights: {chosen.description}')
  if config.model.quantization:
    print(f'the base is that of training, rounded to'
          f' {config.model.quantization}; on the base as it was an adapter'
          ' alone is another model')
  _check_disk(jobs, final)
  if dry_run:
    return 0
  runtimes = _find_runtimes(
      formats, runtime_python, llama_server, allow_unproven)

  partial = final.with_name(final.name + '.partial')
  if partial.exists():
    print(f'removing {partial}, which an earlier export left')
    shutil.rmtree(partial)
  partial.mkdir(parents=True)
  for job in jobs:
    start = time.monotonic()
    write(job, partial, source, config, hf_dtype, shard_size)
    print(f'wrote {job.path}: {_megabytes(_size(partial / job.path))}'
          f' ({time.monotonic() - start:.0f} s)', flush=True)
  _write_modelfile(partial, jobs, source, config)

  reference, results = None, {}
  if any(job.format not in runtimes.missing for job in jobs):
    print('running the JAX model in float32 on the prompts of the proof',
          flush=True)
    reference = _make_reference(config, workdir, base, step)
  for job in jobs:
    if job.format in runtimes.missing:
      print(f'UNPROVEN {job.path}: {runtimes.missing[job.format]}')
      continue
    result = _prove(job, partial, source, config, reference, runtimes)
    results[job.path] = result
    print(f'{"proven" if result.passed else "NOT EQUAL"} {job.path}:'
          f' {result.comparison} ({result.runtime})', flush=True)

  failed = [job for job in jobs
            if job.path in results and not results[job.path].passed]
  if failed:
    raise _not_equal(failed, results, partial, source, hf_dtype)

  summary = summary_lib.make_summary(
      chosen, identity, workdir, final.name,
      [(job.path, job.kind) for job in jobs], partial, results,
      {job.path: runtimes.missing[job.format] for job in jobs
       if job.format in runtimes.missing},
      _stops(source.tokenizer, config), _changes(config))
  (partial / 'export.json').write_text(
      card.to_json(summary), encoding='utf-8')
  (partial / 'README.md').write_text(card.render(summary), encoding='utf-8')
  _publish(partial, final)
  print(f'exported to {final}/; README.md is the model card')
  print(_how_to_run(final, jobs))
  _push(targets, final, config, push_data, private)
  return 0


def plan(
    source: writer.Source, formats: Sequence[str], hf_dtype: str
) -> list[Job]:
  """Returns what is to be written, with its sizes."""
  jobs = []
  for name in formats:
    if name == 'hf':
      jobs.append(Job(
          name, 'hf', _SHORT[hf_dtype], writer.hf_bytes(source, hf_dtype)))
    elif name == 'peft':
      jobs.append(Job(
          name, 'peft', 'f32', writer.adapter_bytes(source),
          writer.hf_bytes(source, 'float32')))
    elif name == 'lora':
      jobs.append(Job(
          name, 'gguf/adapter.gguf', 'f32', writer.adapter_bytes(source),
          writer.gguf_bytes(source, 'f32')))
    else:
      quantization = name.removeprefix('gguf-')
      jobs.append(Job(
          name, f'gguf/model-{quantization}.gguf', quantization,
          writer.gguf_bytes(source, quantization)))
  return jobs


def write(
    job: Job,
    folder: pathlib.Path,
    source: writer.Source,
    config: Any,
    hf_dtype: str,
    shard_size: float,
) -> None:
  """Writes one artefact below a folder; a full disk is told."""
  path = folder / job.path
  try:
    if job.format == 'hf':
      writer.write_hf(path, source, dtype=hf_dtype,
                      max_shard_bytes=int(shard_size * 1e9))
    elif job.format == 'peft':
      writer.write_peft(path, source, _adapter(config),
                        summary_lib.hub_name(config.model.name)
                        or 'PATH_OF_THE_BASE')
    elif job.format == 'lora':
      writer.write_lora(path, source, _adapter(config))
    else:
      writer.write_gguf(path, source, quantization=job.kind)
  except OSError as error:
    raise errors.UserError(
        f'{path} cannot be written: {error.strerror or error}',
        f'room for {_megabytes(job.n_bytes)}',
        'make room and start the same command again; nothing stands under the'
        ' final name') from error


def _adapter(config):
  return writer.Adapter(
      config.lora.rank, config.lora.alpha, config.lora.use_rslora,
      config.lora.dropout, build.lora_scale(config))


def _is_there(
    final: pathlib.Path, identity: str, overwrite: bool, allow_unproven: bool
) -> bool:
  """Whether the export was made before; raises where it cannot be made."""
  told = final / 'export.json'
  if not final.exists():
    return False
  if told.exists():
    with open(told, encoding='utf-8') as file:
      earlier = json.load(file)
    # What was let through unproven is not the proven export asked for now.
    proven = all(row['proven'] for row in earlier['parity'])
    if earlier['identity'] == identity and (proven or allow_unproven):
      return True
    if overwrite:
      return False
  raise errors.UserError(
      f'--out={final} exists', 'a new folder',
      'choose another, or replace an earlier export with --overwrite'
      if told.exists() else 'choose another: that is no export')


def _publish(partial: pathlib.Path, final: pathlib.Path) -> None:
  """Gives the finished folder its name; an earlier export goes."""
  if final.exists():
    old = final.with_name(final.name + '.old')
    final.rename(old)
    partial.rename(final)
    shutil.rmtree(old)
  else:
    partial.rename(final)


def _check_disk(jobs: Sequence[Job], final: pathlib.Path) -> None:
  """Prints the sizes; raises if they, and what the proof needs, do not fit."""
  for job in jobs:
    print(f'  {job.path}: {_megabytes(job.n_bytes)}')
  scratch = max(job.base_bytes for job in jobs)
  total = sum(job.n_bytes for job in jobs)
  parent = final.absolute().parent
  while not parent.exists():
    parent = parent.parent
  free = shutil.disk_usage(parent).free
  print(f'  together {_megabytes(total)}, for the proof {_megabytes(scratch)}'
        f' more for a while; free: {_megabytes(free)}')
  if total + scratch + _SPARE_BYTES > free:
    raise errors.UserError(
        f'{_megabytes(free)} free in {parent}',
        f'{_megabytes(total + scratch + _SPARE_BYTES)}',
        'fewer --formats, another --out, or make room')


def _megabytes(n: int) -> str:
  return f'{n / 1e6:,.1f} MB'


def _size(path: pathlib.Path) -> int:
  if path.is_file():
    return path.stat().st_size
  return sum(f.stat().st_size for f in path.rglob('*') if f.is_file())


def _find_runtimes(
    formats: Sequence[str],
    python: str | None,
    server: str | None,
    allow_unproven: bool,
) -> Runtimes:
  """Looks for the runtimes before anything is written."""
  missing = {}
  found = {'python': None, 'server': None}
  for name, find, given, users in (
      ('python', verify.find_python, python, ('hf', 'peft')),
      ('server', llama_runtime.find_server, server, ('gguf', 'lora'))):
    needed = [f for f in formats if f.partition('-')[0] in users]
    if not needed:
      continue
    try:
      found[name] = find(given)
    except errors.UserError as error:
      if not allow_unproven:
        raise
      missing |= dict.fromkeys(needed, error.got)
  return Runtimes(**found, missing=missing)


def _make_reference(config, workdir, base, step) -> reference_lib.Reference:
  served = restore.load_weights(
      config, workdir, base=base, step=step, dtype='float32')
  split = 'validation' if config.data.validation else 'train'
  return reference_lib.make_reference(
      served.model, served.params, served.tokenizer,
      served.split(split).examples[:_EXAMPLES])


def _prove(job, folder, source, config, reference, runtimes) -> verify.Result:
  path = folder / job.path
  if job.format == 'hf':
    return verify.prove_hf(
        path, reference, kind=job.kind, python=runtimes.python)
  if job.format.startswith('gguf-'):
    return verify.prove_gguf(
        path, reference, kind=job.kind, server=runtimes.server)
  # An adapter is proven on the base as it was in training, rounded if that
  # was, written for that alone.
  with tempfile.TemporaryDirectory(dir=folder) as scratch:
    base = pathlib.Path(scratch) / 'base'
    if job.format == 'peft':
      writer.write_hf(base, source, dtype='float32',
                      max_shard_bytes=2_000_000_000, base=True)
      return verify.prove_hf(
          base, reference, kind=job.kind, python=runtimes.python, adapter=path)
    writer.write_gguf(
        base / 'base.gguf', source, quantization='f32', base=True)
    return verify.prove_gguf(
        base / 'base.gguf', reference, kind=job.kind, server=runtimes.server,
        lora=path)


def _not_equal(failed, results, folder, source, hf_dtype) -> errors.UserError:
  """Returns the error that names the first wrong tensor of each file."""
  got = []
  for job in failed:
    result = results[job.path]
    line = f'{job.path} is not the model that was trained: {result.comparison}'
    others = [n for n, equal in result.templates.items() if not equal]
    if others:
      line += f'; other tokens for the conversations {", ".join(others)}'
    wrong = _first_wrong(job, folder, source, hf_dtype)
    got.append(line + (f'; first wrong tensor: {wrong}' if wrong else (
        '; every tensor is its source within the rounding of its type: the'
        ' rounding itself, the metadata, the tokenizer or the runtime')))
  kept = ','.join(f'{job.format}' for job in failed)
  return errors.UserError(
      '\n  '.join(got),
      'KL divergences within the limits and the tokens of training',
      f'export without {kept}, or in a finer precision; nothing was exported,'
      f' what was written is in {folder}')


def _first_wrong(job, folder, source, hf_dtype) -> str | None:
  path, read = folder / job.path, source.arrays.read
  try:
    if job.format == 'hf':
      return first_difference.first_wrong_in_hf(
          path, source.layout, read, hf_dtype)
    if job.format.startswith('gguf-'):
      return first_difference.first_wrong_in_gguf(path, source.layout, read)
  except errors.UserError as error:
    return error.got
  return None


def _write_modelfile(folder, jobs, source, config) -> None:
  """Writes an Ollama Modelfile for the smallest merged GGUF."""
  files = [j for j in jobs if j.format.startswith('gguf-')]
  if not files:
    return
  best = min(files, key=lambda job: job.n_bytes)
  text = modelfile.render(
      gguf='./' + os.path.basename(best.path),
      template=templates.ollama(source.model.generation),
      temperature=config.sampling.temperature,
      repetition_penalty=config.sampling.repetition_penalty,
      top_k=config.sampling.top_k, top_p=config.sampling.top_p,
      stops=_stops(source.tokenizer, config),
      context_length=min(source.context_length, 4096),
      license=f'Gemma terms of use: {card.TERMS}')
  modelfile.check(text)
  (folder / 'gguf' / 'Modelfile').write_text(text, encoding='utf-8')


def _push(targets, final, config, push_data, private) -> None:
  """Uploads a finished export; its own export.json says what it is."""
  if not targets:
    return
  with open(final / 'export.json', encoding='utf-8') as file:
    summary = json.load(file)
  for target in targets:
    address = push_lib.push(
        final, target, private=private,
        data_files=_data_files(config) if push_data else (),
        data_card=card.data_card(
            summary['data'], name=f'{final.name}-data', task=config.task,
            schema=_SCHEMA, licence=push_data) if push_data else '')
    print(f'pushed to {address}')


def _stops(tokenizer, config) -> list[str]:
  """Returns the texts that end an answer, of the template and the config."""
  return [*map(tokenizer.piece, tokenizer.stop_ids), *config.sampling.stop]


def _changes(config) -> dict[str, Any]:
  known = dict(config_lib.leaves(default.get_config()))
  return {key: value for key, value in config_lib.leaves(config)
          if known[key] != value}


def _data_files(config) -> list[str]:
  return [config.data[split] for split in ('train', 'validation', 'test')
          if config.data[split]]


def _how_to_run(final, jobs) -> str:
  lines = []
  files = [j.path for j in jobs if j.format.startswith('gguf-')]
  if files:
    lines += [f'  cd {final}/gguf && ollama create {final.name.lower()}'
              f' -f Modelfile && ollama run {final.name.lower()}',
              f'  llama-server -m {final / files[0]} --jinja']
  if any(j.format == 'lora' for j in jobs):
    lines.append('  llama-server -m BASE.gguf --lora'
                 f' {final}/gguf/adapter.gguf')
  return '\n'.join(lines)
