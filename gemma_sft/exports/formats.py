"""The formats of an export, one row each.

A new format is a row of `FORMATS` and a function of `writer`. The export, the
model card and the checks of --formats read everything from the row. Only the
help of `gemma_sft.export` lists the names again, because it loads no model
code; a test compares the two.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import pathlib
import tempfile
from typing import Any

from gemma_sft import errors
from gemma_sft.exports import first_difference
from gemma_sft.exports import how_to_run
from gemma_sft.exports import llama_runtime
from gemma_sft.exports import reference as reference_lib
from gemma_sft.exports import verify
from gemma_sft.exports import writer
from gemma_sft.weights import gguf_writer

# Name of a runtime -> what finds its program, given that of the flag or None,
# and what proves a file in it.
_RUNTIMES = {
    'transformers': (verify.find_python, verify.prove_hf),
    'llama.cpp': (llama_runtime.find_server, verify.prove_gguf),
}


@dataclasses.dataclass(frozen=True)
class Format:
  """A format: how to size, write, prove and run it."""

  name: str  # As in --formats.
  kind: str  # As in export.json; formats of one kind are run the same way.
  path: str  # The file or folder, relative to the export.
  runtime: str  # Where it is proven, a key of `_RUNTIMES`.
  # Returns a key of `divergence.LIMITS`.
  precision: Callable[[writer.ExportSource], str]
  # Returns the size of the tensors.
  n_bytes: Callable[[writer.ExportSource], int]
  write: Callable[[pathlib.Path, writer.ExportSource], None]
  # From the card's summary and the artefacts of this kind.
  how_to_run: Callable[..., list[how_to_run.Snippet]]
  # Describes the first tensor that differs, or returns None. Adapter files have
  # no such comparison.
  first_wrong: Callable[
      [pathlib.Path, writer.ExportSource], str | None] | None = None
  # For adapters: writes the base on which they are proven, in float32.
  write_base: Callable[[pathlib.Path, writer.ExportSource], None] | None = None
  # Size of that base.
  scratch_bytes: Callable[[writer.ExportSource], int] = lambda source: 0
  holds_magnitudes: bool = True  # Whether it can hold those of DoRA.
  for_ollama: bool = False  # Whether Ollama runs it, with a Modelfile.

  def prove(
      self, path: pathlib.Path, source: writer.ExportSource,
      reference: reference_lib.Reference, program: str) -> verify.Proof:
    """Compares a written file in its runtime with the JAX model.

    An adapter is proven on the base of its training, which is quantised if that
    was. The base is written for the proof alone.
    """
    _, prove = _RUNTIMES[self.runtime]
    prove = functools.partial(
        prove, reference=reference, kind=self.precision(source),
        program=program)
    if self.write_base is None:
      return prove(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
      base = pathlib.Path(scratch) / 'base'
      self.write_base(base, source)
      return prove(base, adapter=path)


def _gguf(quantization: str) -> Format:
  """Returns the row of the whole model as a GGUF of one quantisation."""
  return Format(
      name=f'gguf-{quantization}', kind='gguf',
      path=f'gguf/model-{quantization}.gguf', runtime='llama.cpp',
      precision=lambda source: quantization,
      n_bytes=functools.partial(writer.gguf_bytes, quantization=quantization),
      write=functools.partial(writer.write_gguf, quantization=quantization),
      how_to_run=how_to_run.gguf,
      first_wrong=first_difference.first_wrong_in_gguf,
      for_ollama=True)


_ROWS = (
    *map(_gguf, gguf_writer.QUANTIZATIONS),
    Format(
        name='lora', kind='gguf-lora', path='gguf/adapter.gguf',
        runtime='llama.cpp',
        precision=lambda source: 'f32',
        n_bytes=writer.adapter_bytes,
        write=writer.write_lora,
        how_to_run=how_to_run.lora_gguf,
        write_base=functools.partial(
            writer.write_gguf, quantization='f32', base=True),
        scratch_bytes=functools.partial(writer.gguf_bytes, quantization='f32'),
        holds_magnitudes=False),
    Format(
        name='hf', kind='hf', path='hf', runtime='transformers',
        precision=lambda source: {
            'float32': 'f32', 'float16': 'f16', 'bfloat16': 'bf16',
        }[source.hf_dtype],
        n_bytes=lambda source: writer.hf_bytes(source, source.hf_dtype),
        write=lambda path, source: writer.write_hf(
            path, source, dtype=source.hf_dtype),
        how_to_run=how_to_run.transformers,
        first_wrong=first_difference.first_wrong_in_hf),
    Format(
        name='peft', kind='peft', path='peft', runtime='transformers',
        precision=lambda source: 'f32',
        n_bytes=writer.adapter_bytes,
        write=writer.write_peft,
        how_to_run=how_to_run.peft,
        write_base=functools.partial(
            writer.write_hf, dtype='float32', base=True),
        scratch_bytes=functools.partial(writer.hf_bytes, dtype='float32')),
)
FORMATS: Mapping[str, Format] = {row.name: row for row in _ROWS}


def choose(
    names: Sequence[str], *, has_adapters: bool, has_magnitudes: bool
) -> list[Format]:
  """Returns the rows of --formats, or of the default formats.

  Raises:
    UserError: A format is unknown or cannot be made of this run.
  """
  names = list(dict.fromkeys(names)) or [
      'hf', *(['peft'] if has_adapters else []), 'gguf-q8_0']
  for name in names:
    if name not in FORMATS:
      raise errors.UserError(
          f'--formats: {name!r}', f'some of {", ".join(FORMATS)}',
          errors.nearest(name, list(FORMATS)).strip() or 'choose from these')
    row = FORMATS[name]
    if row.write_base is not None and not has_adapters:
      raise errors.UserError(
          f'--formats: {name}, and there is no adapter: all weights were'
          ' trained, or --base was given', 'formats of a whole model',
          '--formats=hf,gguf-q8_0')
    if has_magnitudes and not row.holds_magnitudes:
      raise errors.UserError(
          f'--formats: {name}, and config.lora.use_dora is true: an adapter of'
          ' llama.cpp has no place for the magnitudes of DoRA',
          'peft for the adapter alone, or a merged GGUF',
          '--formats=peft,gguf-q8_0')
  return [FORMATS[name] for name in names]


def find_runtimes(
    rows: Sequence[Format], programs: Mapping[str, str | None],
    allow_unproven: bool) -> tuple[dict[str, str], dict[str, str]]:
  """Looks for the runtimes that prove the formats.

  `programs` has a runtime's program, or None to look for one. With
  `allow_unproven` a runtime may be missing.

  Returns:
    {runtime: its program} and {runtime: why it is missing}.
  """
  found, missing = {}, {}
  for runtime in dict.fromkeys(row.runtime for row in rows):
    find, _ = _RUNTIMES[runtime]
    try:
      found[runtime] = find(programs[runtime])
    except errors.UserError as error:
      if not allow_unproven:
        raise
      missing[runtime] = error.got
  return found, missing


def snippets(summary: Mapping[str, Any]) -> list[how_to_run.Snippet]:
  """Returns how to run what an export holds, from a `card.CardSummary`."""
  found = []
  for kind, row in {row.kind: row for row in _ROWS}.items():
    artifacts = [a for a in summary['artifacts'] if a['kind'] == kind]
    if artifacts:
      found += row.how_to_run(summary, artifacts)
  return found
