"""Writes the files of a model; at most one array is in memory at a time."""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import itertools
import json
import pathlib
from typing import Any

import numpy as np

from gemma_sft import chat
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
class ExportSource:
  """The model to be written, and how."""

  model: model_lib.Model
  tokenizer: chat.Tokenizer
  arrays: arrays_lib.Arrays
  name: str  # Of the tuned model.
  base_name: str  # Where PEFT looks for the base: a Hub name or a folder.
  sampling: Any  # `config.sampling`: the defaults that the files carry.
  lora: Any  # `config.lora`.
  lora_scale: float  # The factor of the adapters' update.
  hf_dtype: str  # Of the merged model, a key of `safetensors_file.DTYPES`.
  max_shard_bytes: int  # Of a safetensors file.

  @property
  def layout(self) -> names.WeightLayout:
    return self.arrays.layout

  @property
  def n_layers(self) -> int:
    return names.n_layers(self.layout)

  @property
  def context_length(self) -> int:
    return architecture.context_length(
        self.model.config, self.model.generation)

  @property
  def stops(self) -> list[str]:
    """The texts that end an answer: those of the template and the config."""
    pieces = map(self.tokenizer.piece, self.tokenizer.stop_ids)
    return [*pieces, *self.sampling.stop]

  def reader(self, base: bool) -> Callable[[str], np.ndarray]:
    """Returns what reads an array of the tuned model, or of its base."""
    return self.arrays.read_base if base else self.arrays.read


def hf_bytes(source: ExportSource, dtype: str) -> int:
  """Returns the size of the tensors of `write_hf`."""
  shapes = names.file_shapes(source.layout, 'hf')
  return sum(safetensors_file.n_bytes(s, dtype) for s in shapes.values())


def gguf_bytes(source: ExportSource, quantization: str) -> int:
  """Returns the size of the tensors of `write_gguf`."""
  return gguf_writer.n_bytes(
      names.file_shapes(source.layout, 'gguf'), quantization, source.n_layers)


def adapter_bytes(source: ExportSource) -> int:
  """Returns the size of the tensors of `write_peft` or `write_lora`."""
  tensors = adapters_lib.peft_tensors(source.layout, source.arrays.adapters)
  return sum(tensor.nbytes for tensor in tensors.values())


def write_hf(
    folder: pathlib.Path, source: ExportSource, *, dtype: str,
    base: bool = False) -> None:
  """Writes a new folder that `transformers` loads, of the model or its base."""
  folder.mkdir(parents=True)
  model, tokenizer = source.model, source.tokenizer
  safetensors_file.write_model(
      folder, shapes=names.file_shapes(source.layout, 'hf'),
      tensors=names.from_library(source.layout, 'hf', source.reader(base)),
      dtype=dtype, max_bytes=source.max_shard_bytes)
  ids = dict(
      bos_id=tokenizer.bos_id, pad_id=tokenizer.pad_id,
      eos_ids=sorted(tokenizer.stop_ids))
  _write_json(folder / 'config.json', architecture.hf_config(
      model.config, model.generation, vocab_size=tokenizer.vocab_size,
      dtype=dtype, **ids))
  _write_json(folder / 'generation_config.json', architecture.generation_config(
      temperature=source.sampling.temperature,
      repetition_penalty=source.sampling.repetition_penalty, **ids))
  template = templates.jinja(model.generation)
  (folder / 'tokenizer.model').write_bytes(tokenizer.proto)
  _write_json(folder / 'tokenizer.json',
              tokenizer_json.make_tokenizer_json(tokenizer.proto))
  _write_json(
      folder / 'tokenizer_config.json', tokenizer_json.make_tokenizer_config(
          tokenizer.proto, chat_template=template,
          model_max_length=source.context_length))
  (folder / 'chat_template.jinja').write_text(template, encoding='utf-8')


def write_peft(folder: pathlib.Path, source: ExportSource) -> None:
  """Writes the adapter alone, as `peft` loads it on the base."""
  folder.mkdir(parents=True)
  adapters, lora = source.arrays.adapters, source.lora
  safetensors_file.write_file(
      folder / 'adapter_model.safetensors',
      adapters_lib.peft_tensors(source.layout, adapters))
  _write_json(folder / 'adapter_config.json', adapters_lib.peft_config(
      source.layout, adapters, base=source.base_name, rank=lora.rank,
      alpha=lora.alpha, use_rslora=lora.use_rslora, dropout=lora.dropout))


def write_gguf(
    path: pathlib.Path, source: ExportSource, *, quantization: str,
    base: bool = False) -> None:
  """Writes the whole model, or its untouched base, as a GGUF.

  Raises:
    UserError: The model cannot be expressed in llama.cpp.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  model = source.model
  kind, metadata = _gguf_metadata(source)
  metadata |= tokenizer_file.to_gguf(source.tokenizer.proto, model.generation)
  metadata['tokenizer.chat_template'] = templates.jinja(model.generation)
  extra = architecture.extra_gguf_tensors(model.config, model.generation)
  shapes = names.file_shapes(source.layout, 'gguf')
  gguf_writer.write_model(
      path, architecture=kind, metadata=metadata,
      shapes=shapes | {name: array.shape for name, array in extra.items()},
      tensors=itertools.chain(
          names.from_library(source.layout, 'gguf', source.reader(base)),
          extra.items()),
      quantization=quantization, n_layers=source.n_layers)


def write_lora(path: pathlib.Path, source: ExportSource) -> None:
  """Writes the adapter alone, for `llama-server --lora`.

  llama.cpp always scales by alpha / R. The alpha of the file is chosen so that
  this is the scale of training, also with rank-stabilised LoRA.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  kind, _ = _gguf_metadata(source)
  gguf_writer.write_adapter(
      path, architecture=kind, alpha=source.lora_scale * source.lora.rank,
      adapters=adapters_lib.to_file(
          source.layout, source.arrays.adapters, 'gguf'))


def _gguf_metadata(source):
  return architecture.gguf_metadata(
      source.model.config, source.model.generation, name=source.name,
      context_length=source.context_length)


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  path.write_text(
      json.dumps(value, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
