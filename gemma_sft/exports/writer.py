"""Writes a model's files, one array at a time in memory."""

from collections.abc import Mapping
import dataclasses
import itertools
import json
import pathlib
from typing import Any

import numpy as np

from gemma_sft import chat
from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft.exports import arrays as arrays_lib
from gemma_sft.exports import templates
from gemma_sft.weights import adapters as adapters_lib
from gemma_sft.weights import architecture
from gemma_sft.weights import gguf_writer
from gemma_sft.weights import names
from gemma_sft.weights import safetensors_file
from gemma_sft.weights import tokenizer_file
from gemma_sft.weights import tokenizer_json


@dataclasses.dataclass(frozen=True)
class Source:
  """What every file is made of.

  Attributes:
    model: The architecture.
    tokenizer: Its tokenizer.
    arrays: Its weights.
    name: What to call it.
    temperature: Of `config.sampling`, a default for whoever serves it.
    repetition_penalty: The same.
  """

  model: model_lib.Model
  tokenizer: chat.Tokenizer
  arrays: arrays_lib.Arrays
  name: str
  temperature: float
  repetition_penalty: float

  @property
  def layout(self) -> names.WeightLayout:
    return self.arrays.layout

  @property
  def n_layers(self) -> int:
    return names.n_layers(self.layout)

  @property
  def extra_gguf_tensors(self) -> dict[str, np.ndarray]:
    return architecture.extra_gguf_tensors(
        self.model.config, self.model.generation)

  @property
  def context_length(self) -> int:
    return architecture.context_length(
        self.model.config, self.model.generation)


@dataclasses.dataclass(frozen=True)
class Adapter:
  """What the adapter was trained with; see `configs/default.py`, lora."""

  rank: int
  alpha: float
  use_rslora: bool
  dropout: float
  scale: float


def hf_bytes(source: Source, dtype: str) -> int:
  """Returns the size of the tensors of `write_hf`."""
  shapes = names.file_shapes(source.layout, 'hf')
  return sum(safetensors_file.n_bytes(s, dtype) for s in shapes.values())


def gguf_bytes(source: Source, quantization: str) -> int:
  """Returns the size of the tensors of `write_gguf`."""
  return gguf_writer.n_bytes(
      names.file_shapes(source.layout, 'gguf'), quantization, source.n_layers)


def adapter_bytes(source: Source) -> int:
  """Returns the size of the tensors of `write_peft` or `write_lora`."""
  tensors = adapters_lib.peft_tensors(source.layout, source.arrays.adapters)
  return sum(tensor.nbytes for tensor in tensors.values())


def write_hf(
    folder: pathlib.Path,
    source: Source,
    *,
    dtype: str,
    max_shard_bytes: int,
    base: bool = False,
) -> None:
  """Writes what `transformers` loads: weights, config, tokenizer, template.

  Args:
    folder: Is made.
    source: The model.
    dtype: A key of `safetensors_file.DTYPES`.
    max_shard_bytes: Of one file.
    base: The untouched base instead.
  """
  folder.mkdir(parents=True)
  read = source.arrays.read_base if base else source.arrays.read
  safetensors_file.write_model(
      folder,
      names.from_library(source.layout, 'hf', read),
      names.file_shapes(source.layout, 'hf'),
      dtype=dtype, max_bytes=max_shard_bytes)
  tokenizer = source.tokenizer
  ids = dict(
      bos_id=tokenizer.bos_id, pad_id=tokenizer.pad_id,
      eos_ids=_eos_ids(tokenizer))
  _write_json(folder / 'config.json', architecture.hf_config(
      source.model.config, source.model.generation,
      vocab_size=tokenizer.vocab_size, dtype=dtype, **ids))
  _write_json(folder / 'generation_config.json', architecture.generation_config(
      temperature=source.temperature,
      repetition_penalty=source.repetition_penalty, **ids))
  template = templates.jinja(source.model.generation)
  (folder / 'tokenizer.model').write_bytes(tokenizer.proto)
  _write_json(folder / 'tokenizer.json',
              tokenizer_json.make_tokenizer_json(tokenizer.proto))
  _write_json(folder / 'tokenizer_config.json',
              tokenizer_json.make_tokenizer_config(
                  tokenizer.proto, chat_template=template,
                  model_max_length=source.context_length))
  (folder / 'chat_template.jinja').write_text(template, encoding='utf-8')


def _eos_ids(tokenizer: chat.Tokenizer) -> list[int]:
  return sorted(tokenizer.stop_ids)


def write_peft(
    folder: pathlib.Path, source: Source, adapter: Adapter, base: str
) -> None:
  """Writes what `peft` loads on the base.

  Args:
    folder: Is made.
    source: The model.
    adapter: Its settings.
    base: Name or folder of the base, as PEFT will look for it.
  """
  folder.mkdir(parents=True)
  trained = source.arrays.adapters
  safetensors_file.write_file(
      folder / 'adapter_model.safetensors',
      adapters_lib.peft_tensors(source.layout, trained))
  _write_json(folder / 'adapter_config.json', adapters_lib.peft_config(
      source.layout, trained, base=base, rank=adapter.rank,
      alpha=adapter.alpha, use_rslora=adapter.use_rslora,
      dropout=adapter.dropout))


def write_gguf(
    path: pathlib.Path,
    source: Source,
    *,
    quantization: str,
    base: bool = False,
) -> None:
  """Writes a GGUF of the whole model for llama.cpp and what builds on it.

  Args:
    path: The file.
    source: The model.
    quantization: A key of `gguf_writer.QUANTIZATIONS`.
    base: The untouched base instead.

  Raises:
    UserError: for an unknown quantisation, or a model that llama.cpp cannot
      express.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  read = source.arrays.read_base if base else source.arrays.read
  kind, metadata = architecture.gguf_metadata(
      source.model.config, source.model.generation, name=source.name,
      context_length=source.context_length)
  metadata |= tokenizer_file.to_gguf(
      source.tokenizer.proto, source.model.generation)
  metadata['tokenizer.chat_template'] = templates.jinja(
      source.model.generation)
  extra = source.extra_gguf_tensors
  shapes = names.file_shapes(source.layout, 'gguf')
  gguf_writer.write_model(
      path, architecture=kind, metadata=metadata,
      shapes=shapes | {name: array.shape for name, array in extra.items()},
      tensors=itertools.chain(
          names.from_library(source.layout, 'gguf', read), extra.items()),
      quantization=quantization, n_layers=source.n_layers)


def write_lora(path: pathlib.Path, source: Source, adapter: Adapter) -> None:
  """Writes the adapter alone, for `llama-server --lora`.

  llama.cpp scales by alpha / R and knows no rsLoRA: alpha is what makes that
  the scale of training.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  kind, _ = architecture.gguf_metadata(
      source.model.config, source.model.generation, name=source.name,
      context_length=source.context_length)
  gguf_writer.write_adapter(
      path, architecture=kind, alpha=adapter.scale * adapter.rank,
      tensors=_lora_tensors(source))


def _lora_tensors(source):
  for adapter in adapters_lib.to_file(
      source.layout, source.arrays.adapters, 'gguf'):
    yield f'{adapter.name}.lora_a', adapter.a
    yield f'{adapter.name}.lora_b', adapter.b


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  path.write_text(
      json.dumps(value, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def check_formats(
    formats: list[str], *, has_adapters: bool, has_magnitudes: bool) -> None:
  """Raises a `UserError` for a format that is unknown or cannot be made.

  Args:
    formats: As asked for.
    has_adapters: Whether adapters are exported.
    has_magnitudes: Whether they are DoRA's.
  """
  known = ['hf', 'peft', 'lora',
           *(f'gguf-{q}' for q in gguf_writer.QUANTIZATIONS)]
  if not formats:
    raise errors.UserError(
        'no formats', f'some of {", ".join(known)}',
        '--formats=hf,gguf-q8_0')
  for name in formats:
    if name not in known:
      raise errors.UserError(
          f'--formats: {name!r}', f'some of {", ".join(known)}',
          errors.nearest(name, known).strip() or 'choose from these')
    if name in ('peft', 'lora') and not has_adapters:
      raise errors.UserError(
          f'--formats: {name}, and there is no adapter: all weights were'
          ' trained, or --base was given', 'formats of a whole model',
          '--formats=hf,gguf-q8_0')
    if name == 'lora' and has_magnitudes:
      raise errors.UserError(
          f'--formats: {name}, and config.lora.use_dora is true: an adapter of'
          ' llama.cpp has no place for the magnitudes of DoRA',
          'peft for the adapter alone, or a merged GGUF',
          '--formats=peft,gguf-q8_0')
