"""Re-reads an exported file, tensor by tensor, against its source."""

from collections.abc import Callable
from collections.abc import Iterator
import pathlib

import numpy as np

from gemma_sft.weights import gguf_file
from gemma_sft.weights import gguf_writer
from gemma_sft.weights import names
from gemma_sft.weights import safetensors_file

# Largest ||stored - source|| / ||source|| by rounding alone: half a unit in
# the last place of every number is the worst case.
_ROUNDING = {'float32': 0.0, 'float16': 2.0**-11, 'bfloat16': 2.0**-8}


def first_wrong_in_hf(
    folder: pathlib.Path,
    layout: names.WeightLayout,
    read: Callable[[str], np.ndarray],
    dtype: str,
) -> str | None:
  """Returns a line about the first tensor that is not its source, or None."""
  opened = safetensors_file.open_folder(folder)
  return _first_wrong(
      opened.shapes, opened.read, layout, 'hf', read,
      lambda name: (dtype, _ROUNDING[dtype]))


def first_wrong_in_gguf(
    path: pathlib.Path,
    layout: names.WeightLayout,
    read: Callable[[str], np.ndarray],
) -> str | None:
  """The same of a GGUF, each tensor by the bound of its own type."""
  opened = gguf_file.open_gguf(path, layout)

  def bound(name):
    kind = opened.type_of(name)
    return kind.name, gguf_writer.max_relative_error(kind)

  return _first_wrong(
      opened.shapes, opened.read, layout, 'gguf', read, bound)


def _first_wrong(shapes, read_file, layout, form, read, bound) -> str | None:
  expected = names.file_shapes(layout, form)
  for name in expected:
    if name not in shapes:
      return f'{name} is missing'
  for name in shapes:
    if name not in expected:
      return f'{name} is surplus'
  for name, error in _errors(read_file, layout, form, read):
    kind, limit = bound(name)
    if not error <= limit:  # NaN is not.
      return (f'{name} ({kind}): relative error {error:.2g}, at most'
              f' {limit:.2g} is the rounding of its type')
  return None


def _errors(read_file, layout, form, read) -> Iterator[tuple[str, float]]:
  for name, source in names.from_library(layout, form, read):
    source = source.astype(np.float32)
    stored = read_file(name).astype(np.float32)
    if stored.shape != source.shape:
      yield name, float('inf')
      continue
    norm = float(np.linalg.norm(source))
    difference = float(np.linalg.norm(stored - source))
    yield name, difference / norm if norm else difference
