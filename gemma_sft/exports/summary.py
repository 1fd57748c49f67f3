"""Gathers what the model card and export.json say about an export."""

from collections.abc import Mapping
from collections.abc import Sequence
import hashlib
import os
import pathlib

from gemma_sft import config as config_lib
from gemma_sft import tasks
from gemma_sft.evaluation import report
from gemma_sft.exports import card
from gemma_sft.exports import divergence as divergence_lib
from gemma_sft.exports import formats
from gemma_sft.exports import verify
from gemma_sft.exports import writer
from gemma_sft.inputs import splits as splits_lib
from gemma_sft.monitor import record
from gemma_sft.run import base
from gemma_sft.run import restore
from gemma_sft.weights import load

_PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'gemma', 'gguf',
             'safetensors', 'sentencepiece', 'libgguf')
# Preset -> Google's repository of the pretrained model on the Hub.
HUB_NAMES = {
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


def make_summary(
    chosen: restore.Chosen, source: writer.ExportSource, workdir: str,
    folder: pathlib.Path, rows: Sequence[formats.Format],
    proofs: Mapping[str, verify.Proof], missing: Mapping[str, str], *,
    identity: str, repository: str, config_changes: Mapping[str, object],
) -> card.CardSummary:
  """Returns everything that the card says.

  `proofs` has the name of a format and its proof, `missing` the name of a
  runtime and why it is missing.
  """
  config = chosen.config
  is_tuned = chosen.meta is not None
  method = 'lora' if config.lora.enabled else 'full'
  commit, dirty = record.commit()  # '' if this is not a clone.
  return card.CardSummary(
      name=source.name, identity=identity, repository=repository,
      task=config.task, method=method if is_tuned else 'base', languages=(),
      base=_base(chosen),
      data=_data(config) if is_tuned else [],
      config=dict(config_lib.leaves(config)), config_changes=config_changes,
      commit=commit[:12] + ('+' if dirty else ''),
      packages=record.packages(_PACKAGES), step=chosen.step,
      metrics=_scores(workdir) if is_tuned else None,
      artifacts=[_artifact(folder, row, source) for row in rows],
      parity=[_parity(row, source, proofs.get(row.name),
                      missing.get(row.runtime, '')) for row in rows],
      templates=_template_parity(proofs.values()),
      sampling=card.CardSampling(
          temperature=source.sampling.temperature,
          repetition_penalty=source.sampling.repetition_penalty,
          stop=source.stops))


def _base(chosen):
  model = chosen.config.model
  return card.CardBase(
      name=model.name, source=model.weights,
      sha256=base.base_hash(chosen.resolved, chosen.config.seed),
      hugging_face=HUB_NAMES.get(model.name, ''),
      dequantised_from=load.quantization(chosen.resolved),
      rounded_to=model.quantization)


def _data(config):
  task, splits = tasks.load(config.task), []
  for split in ('train', 'validation', 'test'):
    if not config.data[split]:
      continue
    records = splits_lib.read_split(config.data, split)
    splits.append(card.CardSplit(
        split=split, files=[config.data[split]], records=len(records),
        sha256=splits_lib.data_hash(records, task), origin=''))
  return splits


def _scores(workdir):
  folder = os.path.join(workdir, 'evaluation')
  for split in ('test', 'validation'):
    results = report.read_results(folder, split)
    if 'tuned' in results:
      return card.metrics_of(results, split)
  return None


def size(path: pathlib.Path) -> int:
  """Returns the bytes of a file, or of all files in a folder."""
  if path.is_file():
    return path.stat().st_size
  return sum(f.stat().st_size for f in path.rglob('*') if f.is_file())


def _artifact(folder, row, source):
  path, sha256 = folder / row.path, ''
  if path.is_file():
    with open(path, 'rb') as file:
      sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
  return card.Artifact(
      path=row.path, kind=row.kind, precision=row.precision(source),
      size=size(path), sha256=sha256)


def _parity(row, source, proof, note):
  parity = card.Parity(
      artifact=row.path, runtime='', version='',
      limit=divergence_lib.LIMITS[row.precision(source)], kl_max=None,
      kl_mean=None, max_difference=None, greedy_equal=None, proven=False,
      note=note)
  if proof is None:
    return parity
  runtime, _, version = proof.runtime.partition(' ')
  found = proof.divergence
  return parity | dict(
      runtime=runtime, version=version, kl_max=found.kl_max,
      kl_mean=found.kl_mean, max_difference=found.max_logit_difference,
      greedy_equal=found.greedy_equal == found.greedy_total,
      proven=proof.passed)


def _template_parity(proofs):
  """Returns one row for each runtime, from the first proof with templates."""
  first = {}
  for proof in proofs:
    if proof.templates:
      first.setdefault(proof.runtime, proof.templates)
  return [
      card.TemplateParity(
          runtime=runtime, conversations=len(templates),
          equal=all(templates.values()), note='')
      for runtime, templates in first.items()]
