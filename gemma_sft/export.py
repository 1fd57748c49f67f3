"""Exports a run's model for other runtimes, and proves each file first.

    python -m gemma_sft.export --workdir=W --out=O
    python -m gemma_sft.export --workdir=W --out=O \\
        --formats=hf,peft,lora,gguf-f16,gguf-q4_k_m --push=org/name
    python -m gemma_sft.export --workdir=W --out=O --dry_run    # sizes only

Formats: hf (merged safetensors), peft (the adapter), lora (the adapter as
GGUF), gguf-f32, -f16, -bf16, -q8_0, -q6_k, -q5_k_m, -q4_k_m, -q4_0. Each file
is loaded in transformers, peft or llama.cpp and compared with the JAX model; if
one differs by more than its limit, nothing appears under O. Beside the files
are a Modelfile for Ollama, a model card and export.json with the figures.
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

import json
import pathlib
import shutil
import time
from typing import Any
from typing import Sequence

from configs import default
from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft.exports import arrays
from gemma_sft.exports import card
from gemma_sft.exports import formats as formats_lib
from gemma_sft.exports import modelfile
from gemma_sft.exports import push as push_lib
from gemma_sft.exports import reference as reference_lib
from gemma_sft.exports import summary as summary_lib
from gemma_sft.exports import templates
from gemma_sft.exports import verify
from gemma_sft.exports import writer
from gemma_sft.run import build
from gemma_sft.run import restore

# Room for headers, tokenizer files and the file system itself.
_SPARE_BYTES = 100_000_000
_SCHEMA = {
    'prompt': 'the question; # INPUT in text files',
    'completion': 'the answer; # OUTPUT in text files',
    'system': 'the system text, where a record has one',
    'messages': 'the turns, instead of the three above'}
# Examples of the run's own data among the prompts of the proof.
_EXAMPLES = 8


def main(
    config: Any, workdir: str, out: str, formats: Sequence[str], base: bool,
    step: int, hf_dtype: str, shard_size: float, runtime_python: str | None,
    llama_server: str | None, allow_unproven: bool, overwrite: bool,
    push: Sequence[str], push_data: str, private: bool, dry_run: bool) -> int:
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
  rows = formats_lib.choose(
      formats, has_adapters=has_adapters,
      has_magnitudes=has_adapters and config.lora.use_dora)
  final = pathlib.Path(out)
  chosen = restore.choose_weights(config, workdir, base=base, step=step)
  identity = ' '.join(filter(None, [
      chosen.identity, config.model.quantization, hf_dtype,
      *(row.name for row in rows)]))
  if _is_done(final, identity, overwrite, allow_unproven):
    print(f'{final}/ is this export already')
    if not dry_run:
      _push(targets, final, config, push_data, private)
    return 0

  source = make_source(chosen, final.name, hf_dtype, shard_size)
  print(f'weights: {chosen.description}')
  if kind := config.model.quantization:
    print(f'the base is that of training, rounded to {kind}; an adapter on the'
          ' original base is another model')
  _check_disk(rows, source, final)
  if dry_run:
    return 0
  programs, missing = formats_lib.find_runtimes(
      rows, {'transformers': runtime_python, 'llama.cpp': llama_server},
      allow_unproven)
  # The folder keeps this name until its files are proven.
  partial = final.with_name(final.name + '.partial')
  if partial.exists():
    print(f'removing {partial}, which an earlier export left')
    shutil.rmtree(partial)
  partial.mkdir(parents=True)
  for row in rows:
    _write(row, source, partial / row.path)
  _write_modelfile(rows, source, partial)
  reference = _make_reference(config, workdir, base, step) if programs else None
  proofs = _prove(rows, source, partial, reference, programs, missing)
  known = dict(config_lib.leaves(default.get_config()))
  summary = summary_lib.make_summary(
      chosen, source, workdir, partial, rows, proofs, missing,
      identity=identity, repository=push_lib.hub_repository(targets),
      config_changes={key: value for key, value in config_lib.leaves(config)
                      if known[key] != value})
  (partial / 'export.json').write_text(card.to_json(summary), encoding='utf-8')
  (partial / 'README.md').write_text(card.render(summary), encoding='utf-8')
  _publish(partial, final)
  print(f'exported to {final}/; README.md is the model card')
  commands = [line for snippet in formats_lib.snippets(summary)
              if snippet.language == 'bash' for line in snippet.lines]
  if commands:
    print('\n  '.join([f'  cd {final}', *commands]))
  _push(targets, final, config, push_data, private)
  return 0


def _is_done(final: pathlib.Path, identity: str, overwrite: bool,
             allow_unproven: bool) -> bool:
  """Returns whether this export exists already.

  Raises:
    UserError: Something else has the name and may not be replaced.
  """
  path = final / 'export.json'
  if not final.exists():
    return False
  if path.exists():
    earlier = json.loads(path.read_text(encoding='utf-8'))
    # An unproven export does not count as the proven one asked for now.
    proven = all(row['proven'] for row in earlier['parity'])
    if earlier['identity'] == identity and (proven or allow_unproven):
      return True
    if overwrite:
      return False
  raise errors.UserError(
      f'--out={final} exists', 'a new folder',
      'choose another, or replace an earlier export with --overwrite'
      if path.exists() else 'choose another: that folder is not an export')


def make_source(chosen: restore.Chosen, name: str, hf_dtype: str,
                shard_size: float) -> writer.ExportSource:
  """Returns what the files are made of; `shard_size` is in GB."""
  config = chosen.config
  return writer.ExportSource(
      chosen.model, chosen.tokenizer, arrays.open_arrays(chosen), name=name,
      base_name=summary_lib.HUB_NAMES.get(
          config.model.name, 'PATH_OF_THE_BASE'),
      sampling=config.sampling, lora=config.lora,
      lora_scale=build.lora_scale(config), hf_dtype=hf_dtype,
      max_shard_bytes=int(shard_size * 1e9))


def _check_disk(rows, source, final: pathlib.Path) -> None:
  """Prints the sizes; raises if the files and the proof do not fit."""
  total = 0
  for row in rows:
    n_bytes = row.n_bytes(source)
    print(f'  {row.path}: {_megabytes(n_bytes)}')
    total += n_bytes
  scratch = max(row.scratch_bytes(source) for row in rows)
  parent = final.absolute().parent
  while not parent.exists():
    parent = parent.parent
  free = shutil.disk_usage(parent).free
  print(f'  together {_megabytes(total)}, and {_megabytes(scratch)} more during'
        f' the proof; free: {_megabytes(free)}')
  needed = total + scratch + _SPARE_BYTES
  if needed > free:
    raise errors.UserError(
        f'{_megabytes(free)} free in {parent}', _megabytes(needed),
        'fewer --formats, another --out, or make room')


def _megabytes(n: int) -> str:
  return f'{n / 1e6:,.1f} MB'


def _write(row, source, path: pathlib.Path) -> None:
  start = time.monotonic()
  try:
    row.write(path, source)
  except OSError as error:
    raise errors.UserError(
        f'{path} cannot be written: {error.strerror or error}',
        f'room for {_megabytes(row.n_bytes(source))}',
        'make room and start the same command again; nothing has the final'
        ' name yet') from error
  print(f'wrote {row.path}: {_megabytes(summary_lib.size(path))}'
        f' ({time.monotonic() - start:.0f} s)', flush=True)


def _write_modelfile(rows, source, folder) -> None:
  """Writes a Modelfile for the smallest file that Ollama runs."""
  files = [row for row in rows if row.for_ollama]
  if not files:
    return
  path = folder / min(files, key=lambda row: row.n_bytes(source)).path
  sampling = source.sampling
  path.with_name('Modelfile').write_text(modelfile.render(
      gguf=f'./{path.name}',
      template=templates.ollama(source.model.generation),
      temperature=sampling.temperature,
      repetition_penalty=sampling.repetition_penalty,
      top_k=sampling.top_k, top_p=sampling.top_p, stops=source.stops,
      context_length=min(source.context_length, 4096),
      license=f'Gemma terms of use: {card.TERMS}'), encoding='utf-8')


def _make_reference(config, workdir, base, step) -> reference_lib.Reference:
  print('running the JAX model in float32 on the prompts of the proof',
        flush=True)
  served = restore.load_weights(
      config, workdir, base=base, step=step, dtype='float32')
  split = 'validation' if config.data.validation else 'train'
  return reference_lib.make_reference(
      served.model, served.params, served.tokenizer,
      served.split(split).examples[:_EXAMPLES])


def _prove(rows, source, folder, reference, programs, missing
           ) -> dict[str, verify.Proof]:
  """Returns the proofs by format; raises if one has failed."""
  proofs = {}
  for row in rows:
    if row.runtime in missing:
      print(f'UNPROVEN {row.path}: {missing[row.runtime]}')
      continue
    proof = row.prove(
        folder / row.path, source, reference, programs[row.runtime])
    proofs[row.name] = proof
    print(f'{"proven" if proof.passed else "NOT EQUAL"} {row.path}:'
          f' {proof.divergence} ({proof.runtime})', flush=True)
  failed = [row for row in rows
            if row.name in proofs and not proofs[row.name].passed]
  if failed:
    raise errors.UserError(
        '\n  '.join(_difference(row, proofs[row.name], source, folder)
                    for row in failed),
        'KL divergences within the limits and the tokens of training',
        f'export without {",".join(row.name for row in failed)}, or in a finer'
        f' precision; nothing was exported, the files are in {folder}')
  return proofs


def _difference(row, proof, source, folder) -> str:
  """Describes a file that failed, with its first wrong tensor."""
  line = f'{row.path} is not the model that was trained: {proof.divergence}'
  others = [name for name, equal in proof.templates.items() if not equal]
  if others:
    line += f'; other tokens for the conversations {", ".join(others)}'
  if row.first_wrong is None:
    return line
  try:
    wrong = row.first_wrong(folder / row.path, source)
  except errors.UserError as error:
    wrong = error.got
  if wrong:
    return f'{line}; first wrong tensor: {wrong}'
  return (f'{line}; every tensor is its source within the rounding of its type:'
          ' the cause is the rounding itself, the metadata, the tokenizer or'
          ' the runtime')


def _publish(partial: pathlib.Path, final: pathlib.Path) -> None:
  """Gives the finished folder its name in place of an earlier export."""
  if final.exists():
    old = final.with_name(final.name + '.old')
    final.rename(old)
    partial.rename(final)
    shutil.rmtree(old)
  else:
    partial.rename(final)


def _push(targets, final, config, push_data, private) -> None:
  """Uploads a finished export."""
  if not targets:
    return
  summary = json.loads((final / 'export.json').read_text(encoding='utf-8'))
  data_files, data_card = [], ''
  if push_data:
    data_files = [config.data[split] for split in
                  ('train', 'validation', 'test') if config.data[split]]
    data_card = card.data_card(
        summary['data'], name=f'{final.name}-data', task=config.task,
        schema=_SCHEMA, licence=push_data)
  for target in targets:
    address = push_lib.push(final, target, private=private,
                            data_files=data_files, data_card=data_card)
    print(f'pushed to {address}')
