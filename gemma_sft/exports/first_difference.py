"""Compares an exported file with its source, tensor by tensor."""

import pathlib

import numpy as np

from gemma_sft.exports import writer
from gemma_sft.weights import gguf_file
from gemma_sft.weights import gguf_writer
from gemma_sft.weights import names
from gemma_sft.weights import safetensors_file

# Largest ||stored - source|| / ||source|| that rounding alone can cause: at
# worst every number is off by half a unit in the last place.
_ROUNDING = {'float32': 0.0, 'float16': 2.0**-11, 'bfloat16': 2.0**-8}


def first_wrong_in_hf(
    folder: pathlib.Path, source: writer.ExportSource) -> str | None:
  """Returns a line about the first tensor that differs, or None."""
  opened = safetensors_file.open_folder(folder)
  dtype = source.hf_dtype
  return _first_wrong(
      opened, source, 'hf', lambda name: (dtype, _ROUNDING[dtype]))


def first_wrong_in_gguf(
    path: pathlib.Path, source: writer.ExportSource) -> str | None:
  """The same for a GGUF; each tensor has the bound of its own type."""
  opened = gguf_file.open_gguf(path, source.layout)

  def bound(name):
    kind = opened.type_of(name)
    return kind.name, gguf_writer.MAX_RELATIVE_ERROR[kind]

  return _first_wrong(opened, source, 'gguf', bound)


def _first_wrong(opened, source, form, bound) -> str | None:
  expected = names.file_shapes(source.layout, form)
  for name in expected:
    if name not in opened.shapes:
      return f'{name} is missing'
  for name in opened.shapes:
    if name not in expected:
      return f'{name} is not a tensor of the model'
  for name, array in names.from_library(
      source.layout, form, source.arrays.read):
    error = _relative_error(opened.read(name), array.astype(np.float32))
    kind, limit = bound(name)
    if not error <= limit:  # True for a NaN.
      return (f'{name} ({kind}): relative error {error:.2g}; rounding to its'
              f' type explains at most {limit:.2g}')
  return None


def _relative_error(stored: np.ndarray, source: np.ndarray) -> float:
  if stored.shape != source.shape:
    return float('inf')
  norm = float(np.linalg.norm(source))
  difference = float(np.linalg.norm(stored.astype(np.float32) - source))
  return difference / norm if norm else difference
