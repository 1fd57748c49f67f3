"""The commands that run an exported model, for its card and for the terminal.

Each function takes a `card.CardSummary` and its artefacts of one kind. All
paths are relative to the folder of the export.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

# From the best choice on a laptop to the largest file.
_PREFERRED = ('q4_k_m', 'q5_k_m', 'q6_k', 'q8_0', 'q4_0', 'bf16', 'f16', 'f32')


class Snippet(NamedTuple):
  """Lines of code; the title says what they are for."""

  title: str
  language: str
  lines: Sequence[str]


def gguf(
    summary: Mapping[str, Any], artifacts: Sequence[Mapping[str, Any]]
) -> list[Snippet]:
  """Returns how to run merged GGUFs."""
  order = {precision: i for i, precision in enumerate(_PREFERRED)}
  best = min(artifacts, key=lambda a: order.get(a['precision'], len(order)))
  name = summary['name'].lower()  # As Ollama writes it.
  return [
      Snippet('Ollama', 'bash', (
          f'ollama create {name} -f gguf/Modelfile', f'ollama run {name}')),
      Snippet('llama.cpp', 'bash', (
          f'llama-server -m {best["path"]} --jinja {_options(summary)}',))]


def _options(summary) -> str:
  sampling = summary['sampling']
  return (f'--temp {sampling["temperature"]}'
          f' --repeat-penalty {sampling["repetition_penalty"]}')


def lora_gguf(
    summary: Mapping[str, Any], artifacts: Sequence[Mapping[str, Any]]
) -> list[Snippet]:
  """Returns how to run an adapter on a GGUF of the base."""
  rounded = 'rounded ' if summary['base']['rounded_to'] else ''
  return [Snippet(
      f'llama.cpp, with the adapter on a GGUF of the {rounded}base in f16 or'
      ' f32', 'bash',
      ('llama-server -m BASE.gguf --lora'
       f' {artifacts[0]["path"]} --jinja {_options(summary)}',))]


def transformers(
    summary: Mapping[str, Any], artifacts: Sequence[Mapping[str, Any]]
) -> list[Snippet]:
  """Returns how to run a Hugging Face folder."""
  # On the Hub, the files of this folder are at the root of the repository.
  name = summary['repository'] or artifacts[0]['path']
  note = '' if summary['repository'] else (
      '  # On the Hub: the name of this repository.')
  return [Snippet('Transformers', 'python', (
      'from transformers import AutoModelForCausalLM, AutoTokenizer', '',
      f'name = {name!r}{note}',
      'tokenizer = AutoTokenizer.from_pretrained(name)',
      'model = AutoModelForCausalLM.from_pretrained(name)',
      "messages = [{'role': 'user', 'content': 'Your question'}]",
      'inputs = tokenizer.apply_chat_template(',
      "    messages, add_generation_prompt=True, return_tensors='pt',",
      '    return_dict=True)',
      'answer = model.generate(**inputs, max_new_tokens=256)[0]',
      "print(tokenizer.decode(answer[inputs['input_ids'].shape[1]:]))"))]


def peft(
    summary: Mapping[str, Any], artifacts: Sequence[Mapping[str, Any]]
) -> list[Snippet]:
  """Returns how to run a PEFT adapter on the base that it was trained on."""
  path, where = artifacts[0]['path'], summary['repository']
  adapter = f'{where!r}, subfolder={path!r}' if where else repr(path)
  # Only on its own base is the adapter the model that was measured.
  if summary['base']['rounded_to']:
    base = 'FOLDER_OF_THE_ROUNDED_BASE'
  elif summary['base']['dequantised_from']:
    base = 'FOLDER_OF_THE_DEQUANTISED_BASE'
  else:
    base = summary['base']['hugging_face'] or 'FOLDER_OF_THE_BASE'
  return [Snippet('PEFT', 'python', (
      'from peft import PeftModel',
      'from transformers import AutoModelForCausalLM', '',
      f'base = AutoModelForCausalLM.from_pretrained({base!r})',
      f'model = PeftModel.from_pretrained(base, {adapter})'))]
