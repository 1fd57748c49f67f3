"""Gathers what the model card and export.json say of an export."""

from collections.abc import Mapping
from collections.abc import Sequence
import hashlib
import os
import pathlib

from gemma_sft import config as config_lib
from gemma_sft import tasks
from gemma_sft.evaluation import report
from gemma_sft.exports import card
from gemma_sft.exports import divergence
from gemma_sft.exports import verify
from gemma_sft.inputs import splits as splits_lib
from gemma_sft.monitor import record
from gemma_sft.run import base
from gemma_sft.run import restore
from gemma_sft.weights import load

_PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'gemma', 'gguf',
             'safetensors', 'sentencepiece', 'libgguf')
# Google's repositories of the pretrained models on the Hub.
_HUB_NAMES = {
    'gemma1_2b': 'google/gemma-2b', 'gemma1_7b': 'google/gemma-7b',
    'gemma2_2b': 'google/gemma-2-2b', 'gemma2_9b': 'google/gemma-2-9b',
    'gemma2_27b': 'google/gemma-2-27b',
    'gemma3_270m': 'google/gemma-3-270m',
    'gemma3_1b': 'google/gemma-3-1b-pt', 'gemma3_4b': 'google/gemma-3-4b-pt',
    'gemma3_12b': 'google/gemma-3-12b-pt',
    'gemma3_27b': 'google/gemma-3-27b-pt',
    'gemma4_e2b': 'google/gemma-4-E2B', 'gemma4_e4b': 'google/gemma-4-E4B',
    'gemma4_31b': 'google/gemma-4-31B',
}


def hub_name(model_name: str) -> str:
  """Returns the Hub's name of a preset's pretrained model; '' for custom."""
  return _HUB_NAMES.get(model_name, '')


def make_summary(
    chosen: restore.Chosen,
    identity: str,
    workdir: str,
    name: str,
    files: Sequence[tuple[str, str]],
    folder: pathlib.Path,
    results: Mapping[str, verify.Result],
    missing: Mapping[str, str],
    stops: Sequence[str],
    config_changes: Mapping[str, object],
) -> card.Summary:
  """Returns everything that the card says.

  Args:
    chosen: The weights.
    identity: What tells this export from another.
    workdir: Of the run, for its scores.
    name: Of the tuned model.
    files: (path below the folder, precision) of the artefacts.
    folder: Where they lie.
    results: Path -> result of its proof.
    missing: Path -> why it was not proven.
    stops: Texts that end an answer.
    config_changes: What differs from configs/default.py.
  """
  config = chosen.config
  flat = dict(config_lib.leaves(config))
  tuned = chosen.meta is not None
  method = 'base'
  if tuned:
    method = 'lora' if config.lora.enabled else 'full'
  artifacts = [_artifact(folder, path, kind) for path, kind in files]
  return card.Summary(
      name=name, identity=identity, repository='', task=config.task,
      method=method, languages=(),
      base=_base(chosen), data=_data(chosen, tuned), config=flat,
      config_changes=config_changes, commit=_commit(),
      packages=record.packages(_PACKAGES),
      step=chosen.step, metrics=_scores(workdir, tuned), artifacts=artifacts,
      parity=[_row(path, kind, results.get(path), missing.get(path, ''))
              for path, kind in files],
      templates=[
          card.TemplateParity(
              runtime=result.runtime, conversations=len(result.templates),
              equal=all(result.templates.values()), note='')
          for result in _one_each(results.values())],
      sampling=card.Sampling(
          temperature=config.sampling.temperature,
          repetition_penalty=config.sampling.repetition_penalty,
          stop=list(stops)))


def _base(chosen):
  resolved = chosen.resolved
  return card.Base(
      name=chosen.config.model.name, source=chosen.config.model.weights,
      sha256=base.base_hash(resolved, chosen.config.seed),
      hugging_face=hub_name(chosen.config.model.name),
      dequantised_from=load.quantization(resolved),
      rounded_to=chosen.config.model.quantization)


def _data(chosen, tuned):
  section = chosen.config.data
  splits = []
  for split in ('train', 'validation', 'test'):
    if not section[split] or not tuned:
      continue
    records = splits_lib.read_split(section, split)
    splits.append(card.Split(
        split=split, files=[section[split]], records=len(records),
        sha256=splits_lib.data_hash(
            records, tasks.load(chosen.config.task)), origin=''))
  return splits


def _commit() -> str:
  """Returns the commit of the code, '+' if files differ; '' if not a clone."""
  commit, dirty = record.commit()
  return commit[:12] + ('+' if dirty else '')


def _scores(workdir, tuned):
  if not tuned:
    return None
  folder = os.path.join(workdir, 'evaluation')
  for split in ('test', 'validation'):
    results = report.read_results(folder, split)
    if 'tuned' in results:
      return card.metrics_of(results, split)
  return None


def _artifact(folder, path, precision):
  place = folder / path
  if place.is_file():
    with open(place, 'rb') as file:
      sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
    kind = 'gguf-lora' if path.endswith('adapter.gguf') else 'gguf'
    size = place.stat().st_size
  else:
    kind, sha256 = path, ''
    size = sum(f.stat().st_size for f in place.rglob('*') if f.is_file())
  return card.Artifact(
      path=path, kind=kind, precision=precision, size=size, sha256=sha256)


def _row(path, kind, result, note):
  if result is None:
    return card.Parity(
        artifact=path, runtime='', version='', limit=divergence.LIMITS[kind],
        kl_max=None, kl_mean=None, max_difference=None, greedy_equal=None,
        proven=False, note=note)
  runtime, _, version = result.runtime.partition(' ')
  comparison = result.comparison
  return card.Parity(
      artifact=path, runtime=runtime, version=version, limit=comparison.limit,
      kl_max=comparison.kl_max, kl_mean=comparison.kl_mean,
      max_difference=comparison.max_logit_difference,
      greedy_equal=comparison.greedy_equal == comparison.greedy_total,
      proven=result.passed, note=note)


def _one_each(results):
  """Returns one result with templates for each runtime."""
  found = {}
  for result in results:
    if result.templates:
      found.setdefault(result.runtime, result)
  return found.values()
