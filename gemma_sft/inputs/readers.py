"""Reads file formats into rows: (where, fields), one for each record.

A row that cannot be accepted has a `UserError` in place of its fields, so that
`records.read` can report several at once.
"""

import collections
from collections.abc import Iterable
from collections.abc import Iterator
import csv
import functools
import io
import itertools
import json
import os
import pathlib
import re
from typing import Any

from gemma_sft import errors

Row = tuple[str, dict[str, Any] | errors.UserError]
# Field names with one meaning in every source; see `records.validate`.
CANONICAL = ('prompt', 'completion', 'system', 'messages', 'text')
# Matches more than the accepted headings, so that a mistyped one is reported
# instead of becoming part of the content above it.
HEADING = re.compile(
    r'^(#[ \t]*(?:INPUT|OUTPUT)[ \t]*:?[ \t\r]*)$',
    re.IGNORECASE | re.MULTILINE)


def bad_row(where: str, got: str, expected: str, fix: str) -> Row:
  """Returns a row that holds a `UserError`."""
  return where, errors.UserError(f'{where}: {got}', expected, fix)


def read_text(path: str) -> str:
  """Returns the text of a UTF-8 file, without its byte order mark."""
  if os.path.isdir(path):
    raise errors.UserError(f'{path} is a directory', 'a file', f'Try {path}/*')
  data = pathlib.Path(path).read_bytes()
  try:
    text = data.decode()
    at = data.find(b'\0')
    fix = 'Remove the byte, or convert the file from UTF-16 if it is that.'
  except UnicodeDecodeError as error:
    at = error.start
    # European text has few high bytes, Chinese text has mostly high bytes.
    is_dense = sum(byte > 127 for byte in data) > len(data) / 4
    has_mark = data.startswith((b'\xff\xfe', b'\xfe\xff'))
    legacy = 'GB18030' if is_dense else 'WINDOWS-1252'
    encoding = 'UTF-16' if has_mark else legacy
    fix = f'It looks like {encoding}: iconv -f {encoding} -t UTF-8 {path}'
  if at < 0:
    return text.removeprefix('\ufeff')
  line = data.count(b'\n', 0, at) + 1
  got = f'{path}:{line}: byte 0x{data[at]:02X} at byte offset {at}'
  raise errors.UserError(got, 'UTF-8 text without NUL bytes', fix)


def _read_pairs(path: str) -> Iterator[Row]:
  expected = '# INPUT and # OUTPUT in turns, each alone on its line'
  text = read_text(path).replace('\r\n', '\n')
  preamble, *parts = HEADING.split(text)
  if preamble.strip():
    n_blank = preamble[:-len(preamble.lstrip())].count('\n')
    yield bad_row(f'{path}:{n_blank + 1}', 'text before the first heading',
                  expected, 'Put # INPUT above it.')
  line = preamble.count('\n') + 1
  pending: tuple[str, str] | None = None  # Place and text of an INPUT.
  for heading, content in zip(parts[::2], parts[1::2], strict=True):
    where = f'{path}:{line}'
    line += content.count('\n')
    name = heading.strip('# \t:').upper()
    if heading.rstrip() != f'# {name}':
      yield bad_row(
          where, f'{heading!r} is almost a heading', expected,
          'Correct it; content with such a line needs the format jsonl.')
    if name == 'OUTPUT' and pending:
      prompt, completion = pending[1].strip('\n'), content.strip('\n')
      yield pending[0], {'prompt': prompt, 'completion': completion}
      pending = None
    elif name == 'OUTPUT':
      yield bad_row(where, 'no # INPUT before it', expected, 'Add it.')
    else:
      if pending:
        yield bad_row(pending[0], 'no # OUTPUT after it', expected, 'Add it.')
      pending = where, content
  if pending:
    yield bad_row(pending[0], 'no # OUTPUT after it', expected, 'Add it.')


def _read_paragraphs(path: str) -> Iterator[Row]:
  lines = enumerate(read_text(path).replace('\r\n', '\n').split('\n'), 1)
  for is_text, group in itertools.groupby(lines, lambda x: bool(x[1].strip())):
    if is_text:
      numbers, paragraph = zip(*group, strict=True)
      yield f'{path}:{numbers[0]}', {'text': '\n'.join(paragraph)}


def _read_csv(path: str, delimiter: str = ',') -> Iterator[Row]:
  text = read_text(path)
  # The default limit of 128 KiB would refuse a long document.
  csv.field_size_limit(max(csv.field_size_limit(), len(text)))
  reader = csv.reader(
      io.StringIO(text, newline=''), delimiter=delimiter, strict=True)
  header: list[str] = []
  start = 1
  try:
    for cells in reader:
      where, start = f'{path}:{start}', reader.line_num + 1
      if not header:
        header = cells
        if repeated := _repeated(header):
          yield bad_row(where, repeated, 'different names', 'Rename one.')
          return
      elif len(cells) == len(header):
        yield where, dict(zip(header, cells, strict=True))
      elif cells:  # A blank line has none.
        yield bad_row(
            where, f'{len(cells)} cells', f'{len(header)}, as in the header',
            f'Put quotes around cells that contain {delimiter!r}.')
  except csv.Error as error:
    yield bad_row(
        f'{path}:{start}', str(error),
        'quoted cells with the quotes inside them doubled',
        'Close or double the quote in the row that starts there.')


def _repeated(names: Iterable[str]) -> str:
  counts = collections.Counter(names).items()
  repeated = ', '.join(repr(name) for name, count in counts if count > 1)
  return f'the name {repeated} appears more than once' if repeated else ''


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  if repeated := _repeated(name for name, _ in pairs):
    raise ValueError(repeated)
  return dict(pairs)


def _json_row(text: str | bytes, where: str) -> Row:
  try:
    value = json.loads(text, object_pairs_hook=_unique)
    return _object_row(value, where)
  except json.JSONDecodeError as error:
    problem = f'column {error.colno}: {error.msg}'
  except ValueError as error:  # A repeated name, or bytes that are not UTF-8.
    problem = str(error)
  except RecursionError:
    problem = 'brackets are nested too deeply'
  return bad_row(where, problem, 'one JSON object', 'Correct the record.')


def _object_row(value: Any, where: str) -> Row:
  if isinstance(value, dict):
    return where, value
  return bad_row(
      where, f'{value!r:.40}', 'one JSON object', 'Give its values names.')


def _read_jsonl(path: str) -> Iterator[Row]:
  # Not splitlines, because JSON strings may contain U+2028 and the like.
  for number, line in enumerate(read_text(path).split('\n'), 1):
    if line.strip():
      yield _json_row(line, f'{path}:{number}')


def _read_json(path: str) -> Iterator[Row]:
  expected = 'a list of objects, or an object with one list'
  fix = "Correct it, or set the format to 'jsonl' if each line is a record."
  text = read_text(path)
  try:
    value = json.loads(text, object_pairs_hook=_unique)
  except json.JSONDecodeError as error:
    problem = f'column {error.colno}: {error.msg}'
    yield bad_row(f'{path}:{error.lineno}', problem, expected, fix)
    return
  except ValueError as error:
    yield bad_row(path, str(error), 'different names', 'Keep one of them.')
    return
  except RecursionError:
    yield bad_row(path, 'brackets are nested too deeply', expected, fix)
    return
  if isinstance(value, dict) and not value.keys().isdisjoint(CANONICAL):
    # Its list holds the turns of one conversation, not records.
    yield bad_row(path, 'one record', expected, 'Put brackets around it.')
    return
  if isinstance(value, dict):
    lists = [item for item in value.values() if isinstance(item, list)]
    value = lists[0] if len(lists) == 1 else value
  if not isinstance(value, list):
    yield bad_row(path, 'no list, or several', expected, fix)
    return
  for i, item in enumerate(value):
    yield _object_row(item, f'{path}[{i}]')


def _read_parquet(path: str, split: str) -> Iterator[Row]:
  del split
  from pyarrow import parquet

  # Not read_table, which adds a column for a folder named like 'lang=de'.
  table = parquet.ParquetFile(path).read()
  if repeated := _repeated(table.column_names):
    raise ValueError(repeated)
  for i, fields in enumerate(table.to_pylist()):
    yield f'{path}[{i}]', fields


def _read_array_record(path: str, split: str) -> Iterator[Row]:
  del split
  import grain

  for i, data in enumerate(grain.sources.ArrayRecordDataSource(path)):
    yield _json_row(data, f'{path}[{i}]')


def _read_tfds(source: str, split: str) -> Iterator[Row]:
  import tensorflow_datasets as tfds

  name = source.removeprefix('tfds:')
  if os.path.isdir(name):
    builder = tfds.builder_from_directory(name)
  else:
    # Unlike tfds.builder, this never downloads or prepares a data set.
    builder = tfds.core.read_only_builder.builder_from_files(name)
  for i, fields in enumerate(builder.as_data_source(split=split)):
    # TFDS returns text as bytes and everything else as NumPy values.
    text = json.dumps(fields, default=lambda v: (
        v.decode() if isinstance(v, bytes) else v.tolist()))
    yield f'tfds {builder.name}:{split}[{i}]', json.loads(text)


def _read_hub(source: str, split: str) -> Iterator[Row]:
  import datasets

  name = source.removeprefix('hub:')
  # Since 4.0 the library runs no code of data sets, and the run records the
  # hash of what was read.
  rows = datasets.load_dataset(name, split=split)  # nosec B615
  for i, fields in enumerate(rows):
    yield f'hub:{name}:{split}[{i}]', fields


def read_with_library(kind: str, source: str, split: str) -> list[Row]:
  """Reads a binary source; turns the library's errors into user errors."""
  reader, package = LIBRARY_READERS[kind]
  try:
    return list(reader(source, split))
  except ModuleNotFoundError as error:
    raise errors.UserError(
        f'{source}: cannot be read without the module {error.name!r}',
        f'the library that reads {kind}',
        f"pip install '{package}'; if that is installed, pip install"
        f' {error.name}') from error
  # Some of Arrow's errors are KeyErrors, TypeErrors or IndexErrors.
  except (ValueError, OSError, RuntimeError, LookupError, TypeError,
          MemoryError) as error:
    raise errors.UserError(
        f'{source}: {error}',
        f'{kind} that its library can read, with text as UTF-8',
        f'Check the path and the split {split!r}, or write the data again '
        '(TFDS: with file_format=array_record).') from error


TEXT_READERS = {
    'pairs': _read_pairs,
    'csv': _read_csv,
    'tsv': functools.partial(_read_csv, delimiter='\t'),
    'json': _read_json,
    'jsonl': _read_jsonl,
    'text': _read_paragraphs,
}
# {format: (reader, what to install for it)}.
LIBRARY_READERS = {
    'parquet': (_read_parquet, 'pyarrow'),
    'array_record': (_read_array_record, 'grain'),
    'tfds': (_read_tfds, 'tensorflow-datasets'),
    'hub': (_read_hub, 'gemma_sft[hub]'),
}
FORMATS = (*TEXT_READERS, *LIBRARY_READERS)
