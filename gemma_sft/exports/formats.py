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

_PRECISION = {'float32': 'f32', 'float16': 'f16', 'bfloat16': 'bf16'}
# Name of a runtime -> what finds its program, given that of the flag or None.
_FIND_RUNTIME = {
    'transformers': verify.find_python,
    'llama.cpp': llama_runtime.find_server,
}


@dataclasses.dataclass(frozen=True)
class Format:
  """A format: how to size, write, prove and run it.

  Attributes:
    name: As in --formats.
    kind: As in export.json; formats of one kind are run the same way.
    path: The file or folder, relative to the export.
    runtime: Where it is proven, 'transformers' or 'llama.cpp'.
    precision: From the source to a key of `divergence.LIMITS`.
    n_bytes: From the source to the size of the tensors.
    write: Writes a path from the source.
    prove: From (path, source, reference, program of the runtime) to a `Proof`.
    how_to_run: From the card's summary and the artefacts of this kind to
      snippets.
    first_wrong: From (path, source) to a line about the first tensor that
      differs, or None. Adapter files have no such comparison.
    scratch_bytes: Size of the base that the proof of an adapter writes for the
      time of the proof.
    is_adapter: Whether it holds the adapter alone.
    holds_magnitudes: Whether it can hold the magnitudes of DoRA.
    for_ollama: Whether Ollama runs it, with a Modelfile.
  """

  name: str
  kind: str
  path: str
  runtime: str
  precision: Callable[[writer.ExportSource], str]
  n_bytes: Callable[[writer.ExportSource], int]
  write: Callable[[pathlib.Path, writer.ExportSource], None]
  prove: Callable[
      [pathlib.Path, writer.ExportSource, reference_lib.Reference, str],
      verify.Proof]
  how_to_run: Callable[..., list[how_to_run.Snippet]]
  first_wrong: Callable[
      [pathlib.Path, writer.ExportSource], str | None] | None = None
  scratch_bytes: Callable[[writer.ExportSource], int] = lambda source: 0
  is_adapter: bool = False
  holds_magnitudes: bool = True
  for_ollama: bool = False


def _write_hf(path, source):
  writer.write_hf(path, source, dtype=source.hf_dtype)


def _prove_hf(path, source, reference, program):
  return verify.prove_hf(
      path, reference, kind=_PRECISION[source.hf_dtype], python=program)


# An adapter is proven on the base of its training, which is quantised if that
# was. The base is written in float32 for the proof alone.


def _prove_peft(path, source, reference, program):
  with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
    base = pathlib.Path(scratch) / 'base'
    writer.write_hf(base, source, dtype='float32', base=True)
    return verify.prove_hf(
        base, reference, kind='f32', python=program, adapter=path)


def _prove_lora(path, source, reference, program):
  with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
    base = pathlib.Path(scratch) / 'base.gguf'
    writer.write_gguf(base, source, quantization='f32', base=True)
    return verify.prove_gguf(
        base, reference, kind='f32', server=program, lora=path)


def _gguf(quantization: str) -> Format:
  """Returns the row of the whole model as a GGUF of one quantisation."""

  def prove(path, source, reference, program):
    del source
    return verify.prove_gguf(
        path, reference, kind=quantization, server=program)

  return Format(
      name=f'gguf-{quantization}',
      kind='gguf',
      path=f'gguf/model-{quantization}.gguf',
      runtime='llama.cpp',
      precision=lambda source: quantization,
      n_bytes=functools.partial(writer.gguf_bytes, quantization=quantization),
      write=functools.partial(writer.write_gguf, quantization=quantization),
      prove=prove,
      how_to_run=how_to_run.gguf,
      first_wrong=first_difference.first_wrong_in_gguf,
      for_ollama=True)


_ROWS = (
    *map(_gguf, gguf_writer.QUANTIZATIONS),
    Format(
        name='lora',
        kind='gguf-lora',
        path='gguf/adapter.gguf',
        runtime='llama.cpp',
        precision=lambda source: 'f32',
        n_bytes=writer.adapter_bytes,
        write=writer.write_lora,
        prove=_prove_lora,
        how_to_run=how_to_run.lora_gguf,
        scratch_bytes=functools.partial(writer.gguf_bytes, quantization='f32'),
        is_adapter=True,
        holds_magnitudes=False),
    Format(
        name='hf',
        kind='hf',
        path='hf',
        runtime='transformers',
        precision=lambda source: _PRECISION[source.hf_dtype],
        n_bytes=lambda source: writer.hf_bytes(source, source.hf_dtype),
        write=_write_hf,
        prove=_prove_hf,
        how_to_run=how_to_run.transformers,
        first_wrong=first_difference.first_wrong_in_hf),
    Format(
        name='peft',
        kind='peft',
        path='peft',
        runtime='transformers',
        precision=lambda source: 'f32',
        n_bytes=writer.adapter_bytes,
        write=writer.write_peft,
        prove=_prove_peft,
        how_to_run=how_to_run.peft,
        scratch_bytes=functools.partial(writer.hf_bytes, dtype='float32'),
        is_adapter=True),
)
FORMATS: Mapping[str, Format] = {row.name: row for row in _ROWS}


def choose(
    names: Sequence[str], *, has_adapters: bool, has_magnitudes: bool
) -> list[Format]:
  """Returns the rows of --formats, or of the default formats.

  Args:
    names: As asked for; none for the default.
    has_adapters: Whether adapters are exported.
    has_magnitudes: Whether they are those of DoRA.

  Raises:
    UserError: A format is unknown or cannot be made of this run.
  """
  names = list(dict.fromkeys(names)) or [
      'hf', *(['peft'] if has_adapters else []), 'gguf-q8_0']
  for name in names:
    if name not in FORMATS:
      raise errors.UserError(
          f'--formats: {name!r}', f'some of {", ".join(FORMATS)}',
          errors.nearest(name, list(FORMATS)).strip()
          or 'choose from these')
    row = FORMATS[name]
    if row.is_adapter and not has_adapters:
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
    rows: Sequence[Format],
    programs: Mapping[str, str | None],
    allow_unproven: bool,
) -> tuple[dict[str, str], dict[str, str]]:
  """Looks for the runtimes that prove the formats.

  Args:
    rows: The chosen formats.
    programs: Runtime -> the program to use; None to look for one.
    allow_unproven: Whether a runtime may be missing.

  Returns:
    {runtime: its program} and {runtime: why it is missing}.
  """
  found, missing = {}, {}
  for runtime in dict.fromkeys(row.runtime for row in rows):
    try:
      found[runtime] = _FIND_RUNTIME[runtime](programs[runtime])
    except errors.UserError as error:
      if not allow_unproven:
        raise
      missing[runtime] = error.got
  return found, missing


def snippets(summary: Mapping[str, Any]) -> list[how_to_run.Snippet]:
  """Returns how to run what an export holds, in the order of `FORMATS`.

  Args:
    summary: A `card.CardSummary`.
  """
  found = []
  for kind, row in {row.kind: row for row in _ROWS}.items():
    artifacts = [a for a in summary['artifacts'] if a['kind'] == kind]
    if artifacts:
      found += row.how_to_run(summary, artifacts)
  return found
