"""Files of examples -> validated raw records.

A reader yields (where, fields) for each record, with a `UserError` in place of
the fields of one it cannot accept, so that `read` can show several at once.
"""

import collections
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import csv
import dataclasses
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import re
from typing import Any

from gemma_sft import errors

CANONICAL = ('prompt', 'completion', 'system', 'messages', 'text')

_Row = tuple[str, dict[str, Any] | errors.UserError]
_MAX_SHOWN = 5
_SHAPES = (
    {'prompt', 'completion'},
    {'system', 'prompt', 'completion'},
    {'messages'},
    {'text'},
)
_EXPECTED_SHAPE = (
    "exactly one of 'prompt' with 'completion' (and 'system' if wanted), "
    "'messages', or 'text'"
)
_EXPECTED_MESSAGES = (
    "a list of {'role', 'content'}: one system turn first if wanted, then user "
    'and model (or assistant) by turns, the last one model'
)
# Looser than the headings that are accepted: a mistyped one would otherwise
# become part of the content above it.
_HEADING = re.compile(
    r'^(#[ \t]*(?:INPUT|OUTPUT)[ \t]*:?[ \t\r]*)$', re.IGNORECASE | re.MULTILINE
)


@dataclasses.dataclass(frozen=True)
class Record:
  """One example as its source has it.

  `fields` holds strings and, under 'messages', a list of {'role', 'content'};
  what is not in `CANONICAL` keeps the type that the source gave it. `where` is
  'train.txt:12' (the line where the record starts), 'train.json[3]' (counted
  from 0), 'tfds name:split[5]' or 'hub:org/name:split[5]'.
  """

  fields: dict[str, Any]
  where: str


def read(
    source: str,
    *,
    format: str = 'auto',
    columns: Mapping[str, str] | None = None,
    split: str = 'train',
) -> list[Record]:
  """Reads all records of a source, in its order, and validates them.

  A source without any field of `CANONICAL` is left to the task to interpret:
  only its characters are checked. Otherwise see `validate`.

  Args:
    source: A file, a glob pattern (all its files, sorted by name), a directory
      prepared by TFDS, 'tfds:name' or 'hub:org/name'.
    format: One of `FORMATS`, or 'auto' to go by the prefix or file ending.
    columns: New name -> the source's name, for fields to rename.
    split: The split of a TFDS or hub data set; a file is one split already.

  Raises:
    UserError: With up to five bad records, each with its place.
  """
  if format not in ('auto', *FORMATS):
    raise errors.UserError(
        f'unknown data format {format!r}',
        f'auto or one of {", ".join(FORMATS)}',
        f'{errors.nearest(format, FORMATS)}Correct the format.',
    )
  rows: list[_Row] = []
  for path in _expand(source, format):
    kind = _guess_format(path) if format == 'auto' else format
    if kind in _LIBRARY_READERS:
      rows += _read_with_library(kind, path, split)
    else:
      rows += _TEXT_READERS[kind](path)
  if not rows:
    raise errors.UserError(
        f'no records in {source}', 'at least one', 'Add records to it.'
    )
  rows = _rename(rows, columns or {}, source)
  is_canonical = any(
      isinstance(fields, dict) and not fields.keys().isdisjoint(CANONICAL)
      for _, fields in rows
  )
  records, bad = [], []
  for where, fields in rows:
    try:
      if isinstance(fields, errors.UserError):
        raise fields
      record = Record(fields, where)
      _check_characters(record)
      records.append(validate(record) if is_canonical else record)
    except errors.UserError as error:
      bad.append(error)
  if bad:
    raise _merge(bad)
  return records


def validate(record: Record) -> Record:
  """Returns the record in canonical form: its text as strings, no null fields.

  The fields hold exactly one of `prompt` with `completion` (and perhaps
  `system`, dropped if blank), `messages`, or `text`. Numbers become strings,
  the role assistant becomes model. Other fields stay as they are.

  Raises:
    UserError: Other fields than these, blank text, or messages out of order.
  """
  fields = {
      name: value
      for name, value in record.fields.items()
      if value is not None or name not in CANONICAL
  }
  # A table has a cell for it in every row; a blank one means no system turn.
  if isinstance(fields.get('system'), str) and not fields['system'].strip():
    del fields['system']
  present = fields.keys() & set(CANONICAL)
  if present not in _SHAPES:
    found = ', '.join(
        repr(name) if name in fields else f'{name!r} (null)'
        for name in record.fields
    )
    raise errors.UserError(
        f'{record.where}: the fields are {found or "none"}',
        _EXPECTED_SHAPE,
        "Complete the record, or rename its fields with 'columns'.",
    )
  for name in present:
    check = _check_messages if name == 'messages' else _check_text
    fields[name] = check(fields[name], f'{record.where}: {name}')
  return Record(fields, record.where)


def content_hash(records: Iterable[Record]) -> str:
  """Returns the SHA-256 (hex) of the records' fields, in record order.

  Neither the place of a record nor the order of its fields changes it, so the
  same records in another format have the same hash.
  """
  digest = hashlib.sha256()
  for record in records:
    line = json.dumps(record.fields, sort_keys=True, default=str)
    digest.update(line.encode() + b'\n')
  return digest.hexdigest()


def _merge(bad: list[errors.UserError]) -> errors.UserError:
  """Returns one error that shows the first few."""
  shown = bad[:_MAX_SHOWN]
  got = [error.got for error in shown]
  if len(bad) > len(shown):
    got.append(f'and {len(bad) - len(shown)} more bad records')
  return errors.UserError(
      '\n'.join(got),
      '; '.join(dict.fromkeys(error.expected for error in shown)),
      ' '.join(dict.fromkeys(error.fix for error in shown)),
  )


def _expand(source: str, format: str) -> list[str]:
  """Returns the files of a glob pattern, or the source itself."""
  is_named = format == 'hub' or source.startswith(('hub:', 'tfds:'))
  if is_named or os.path.exists(source):
    return [source]
  if matches := sorted(glob.glob(source, recursive=True)):
    return matches
  missing = pathlib.Path(source)
  while not missing.parent.is_dir():
    missing = missing.parent
  hint = errors.nearest(missing.name, sorted(os.listdir(missing.parent)))
  raise errors.UserError(
      f'{source} does not exist',
      'a file, a glob pattern, tfds:name or hub:org/name',
      f'{hint}Correct the path.',
  )


def _guess_format(path: str) -> str:
  prefix = path.partition(':')[0]
  if prefix in ('tfds', 'hub'):
    return prefix
  if os.path.isdir(path):
    if os.path.exists(os.path.join(path, 'dataset_info.json')):
      return 'tfds'
    # TFDS writes to name/version or name/config/version.
    inside = pathlib.Path(path).glob('*/dataset_info.json')
    deeper = pathlib.Path(path).glob('*/*/dataset_info.json')
    found = [str(info.parent) for info in (*inside, *deeper)]
    raise errors.UserError(
        f'{path} is a directory without dataset_info.json',
        'a file, a glob pattern or a directory prepared by TFDS',
        f'Name what to read in it: {", ".join(found) or f"{path}/*.jsonl"}.',
    )
  if '.array_record' in os.path.basename(path):
    return 'array_record'
  ending = os.path.splitext(path)[1].lower().removeprefix('.')
  if ending == 'txt':
    headings = _HEADING.findall(_read_text(path))
    return 'pairs' if any('INPUT' in h.upper() for h in headings) else 'text'
  if ending not in ('csv', 'tsv', 'json', 'jsonl', 'parquet'):
    raise errors.UserError(
        f'{path}: unknown file ending {ending!r}',
        'txt, csv, tsv, json, jsonl, parquet or array_record',
        f'Rename the file, or set its format: one of {", ".join(FORMATS)}.',
    )
  return ending


def _rename(
    rows: list[_Row], columns: Mapping[str, str], source: str
) -> list[_Row]:
  """Applies `columns` (new name -> the source's name) to every record."""
  good = [fields for _, fields in rows if isinstance(fields, dict)]
  known = list(dict.fromkeys(itertools.chain.from_iterable(good)))
  for new, old in columns.items():
    if good and old not in known:
      raise errors.UserError(
          f'columns: {source} has no column {old!r} (for {new!r})',
          f'one of {", ".join(map(repr, known))}',
          f'{errors.nearest(old, known)}Correct the name.',
      )
    if new in known and new not in columns.values():
      raise errors.UserError(
          f'columns: {old!r} would replace the {new!r} that {source} has',
          'a name that is free',
          f'Give the old {new!r} another name in columns as well.',
      )

  def rename(fields: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in fields.items() if k not in columns.values()}
    return kept | {k: fields[v] for k, v in columns.items() if v in fields}

  return [
      (where, rename(fields) if isinstance(fields, dict) else fields)
      for where, fields in rows
  ]


def _check_characters(record: Record) -> None:
  """Refuses what no tokenizer takes and JSON can bring in as an escape."""
  for name, value in record.fields.items():
    text = json.dumps(value, ensure_ascii=False, default=str)
    # Without escaped backslashes only a real NUL still reads as \\u0000.
    text = text.replace('\\\\', '')
    if '\\u0000' in text or re.search('[\ud800-\udfff]', text):
      raise errors.UserError(
          f'{record.where}: {name} has a NUL or an unpaired surrogate',
          'text that UTF-8 can carry',
          'Remove the character.',
      )


def _check_text(value: Any, what: str) -> str:
  if type(value) is int or type(value) is float and math.isfinite(value):
    value = str(value)
  if isinstance(value, str) and value.strip():
    return value
  raise errors.UserError(
      f'{what} is {"empty" if isinstance(value, str) else repr(value)[:40]}',
      'text',
      'Fill it in, or remove the record.',
  )


def _check_messages(value: Any, what: str) -> list[dict[str, str]]:
  """Returns the turns with role and content only, assistant called model."""

  def error(got: str) -> errors.UserError:
    return errors.UserError(got, _EXPECTED_MESSAGES, 'Mend the conversation.')

  if not isinstance(value, list):
    raise error(f'{what} is {value!r:.40}')
  turns: list[dict[str, str]] = []
  due = 'user'
  for i, message in enumerate(value):
    place = f'{what}[{i}]'
    if not isinstance(message, dict):
      raise error(f'{place} is {message!r:.40}')
    # Tables of many sources carry null for the keys that a turn lacks.
    keys = [key for key, item in message.items() if item is not None]
    if sorted(keys) != ['content', 'role']:
      raise error(f'{place} has {", ".join(map(repr, keys)) or "nothing"}')
    role = 'model' if message['role'] == 'assistant' else message['role']
    if role == due:
      due = 'user' if role == 'model' else 'model'
    elif role != 'system' or i:
      raise error(f'{place} has the role {role!r} where {due!r} is due')
    content = _check_text(message['content'], f'{place}.content')
    turns.append({'role': role, 'content': content})
  if not turns or turns[-1]['role'] != 'model':
    raise error(f'{what} has no model turn at its end')
  return turns


def _bad_row(where: str, got: str, expected: str, fix: str) -> _Row:
  return where, errors.UserError(f'{where}: {got}', expected, fix)


def _read_text(path: str) -> str:
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
    # Accented letters are few among ASCII; Chinese text is mostly high bytes.
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


def _read_pairs(path: str) -> Iterator[_Row]:
  expected = '# INPUT and # OUTPUT by turns, each alone on its line'
  text = _read_text(path).replace('\r\n', '\n')
  preamble, *parts = _HEADING.split(text)
  if preamble.strip():
    num_blank = preamble[: -len(preamble.lstrip())].count('\n')
    where = f'{path}:{num_blank + 1}'
    problem = 'text before the first heading'
    yield _bad_row(where, problem, expected, 'Put # INPUT above it.')
  line = preamble.count('\n') + 1
  waiting: tuple[str, str] | None = None  # Place and text of an INPUT.
  for heading, content in zip(parts[::2], parts[1::2], strict=True):
    where = f'{path}:{line}'
    line += content.count('\n')
    name = heading.strip('# \t:').upper()
    if heading.rstrip() != f'# {name}':
      problem = f'{heading!r} is almost a heading'
      fix = 'Correct it; content with such a line needs the format jsonl.'
      yield _bad_row(where, problem, expected, fix)
    if name == 'OUTPUT' and waiting:
      prompt, completion = waiting[1].strip('\n'), content.strip('\n')
      yield waiting[0], {'prompt': prompt, 'completion': completion}
      waiting = None
    elif name == 'OUTPUT':
      yield _bad_row(where, 'no # INPUT before it', expected, 'Add it.')
    else:
      if waiting:
        yield _bad_row(waiting[0], 'no # OUTPUT after it', expected, 'Add it.')
      waiting = where, content
  if waiting:
    yield _bad_row(waiting[0], 'no # OUTPUT after it', expected, 'Add it.')


def _read_paragraphs(path: str) -> Iterator[_Row]:
  lines = enumerate(_read_text(path).replace('\r\n', '\n').split('\n'), 1)
  for is_text, group in itertools.groupby(lines, lambda x: bool(x[1].strip())):
    if is_text:
      numbers, paragraph = zip(*group, strict=True)
      yield f'{path}:{numbers[0]}', {'text': '\n'.join(paragraph)}


def _read_csv(path: str, delimiter: str = ',') -> Iterator[_Row]:
  text = _read_text(path)
  # The default of 128 KiB would refuse a long document.
  csv.field_size_limit(max(csv.field_size_limit(), len(text)))
  lines = io.StringIO(text, newline='')
  reader = csv.reader(lines, delimiter=delimiter, strict=True)
  header: list[str] = []
  start = 1
  try:
    for cells in reader:
      where, start = f'{path}:{start}', reader.line_num + 1
      if not header:
        header = cells
        if repeated := _repeated(header):
          yield _bad_row(where, repeated, 'different names', 'Rename one.')
          return
      elif len(cells) == len(header):
        yield where, dict(zip(header, cells, strict=True))
      elif cells:  # A blank line has none.
        got, expected = f'{len(cells)} cells', f'{len(header)}, as the header'
        fix = f'Put quotes around cells that contain {delimiter!r}.'
        yield _bad_row(where, got, expected, fix)
  except csv.Error as error:
    expected = 'quoted cells with the quotes inside them doubled'
    fix = 'Close or double the quote in the row that starts there.'
    yield _bad_row(f'{path}:{start}', str(error), expected, fix)


def _repeated(names: Iterable[str]) -> str:
  counts = collections.Counter(names).items()
  repeated = ', '.join(repr(name) for name, count in counts if count > 1)
  return f'the name {repeated} is there more than once' if repeated else ''


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  if repeated := _repeated(name for name, _ in pairs):
    raise ValueError(repeated)
  return dict(pairs)


def _json_row(text: str | bytes, where: str) -> _Row:
  try:
    value = json.loads(text, object_pairs_hook=_unique)
    return _object_row(value, where)
  except json.JSONDecodeError as error:
    problem = f'column {error.colno}: {error.msg}'
  except ValueError as error:  # A repeated name, or bytes that are not UTF-8.
    problem = str(error)
  return _bad_row(where, problem, 'one JSON object', 'Correct the record.')


def _object_row(value: Any, where: str) -> _Row:
  if isinstance(value, dict):
    return where, value
  problem, fix = f'{value!r:.40}', 'Give its values names.'
  return _bad_row(where, problem, 'one JSON object', fix)


def _read_jsonl(path: str) -> Iterator[_Row]:
  # Not splitlines: JSON strings may hold U+2028 and its like.
  for number, line in enumerate(_read_text(path).split('\n'), 1):
    if line.strip():
      yield _json_row(line, f'{path}:{number}')


def _read_json(path: str) -> Iterator[_Row]:
  expected = 'a list of objects, or an object with one list'
  fix = "Correct it, or set the format to 'jsonl' if each line is a record."
  text = _read_text(path)
  try:
    value = json.loads(text, object_pairs_hook=_unique)
  except json.JSONDecodeError as error:
    problem = f'column {error.colno}: {error.msg}'
    yield _bad_row(f'{path}:{error.lineno}', problem, expected, fix)
    return
  except ValueError as error:
    yield _bad_row(path, str(error), 'different names', 'Keep one of them.')
    return
  if isinstance(value, dict):
    lists = [item for item in value.values() if isinstance(item, list)]
    value = lists[0] if len(lists) == 1 else value
  if not isinstance(value, list):
    yield _bad_row(path, 'no list, or several', expected, fix)
    return
  for i, item in enumerate(value):
    yield _object_row(item, f'{path}[{i}]')


def _read_parquet(path: str, split: str) -> Iterator[_Row]:
  del split
  from pyarrow import parquet

  # Not read_table: it adds a column for a folder named like 'lang=de'.
  table = parquet.ParquetFile(path).read()
  if repeated := _repeated(table.column_names):
    raise ValueError(repeated)
  for i, fields in enumerate(table.to_pylist()):
    yield f'{path}[{i}]', fields


def _read_array_record(path: str, split: str) -> Iterator[_Row]:
  del split
  import grain

  for i, data in enumerate(grain.sources.ArrayRecordDataSource(path)):
    yield _json_row(data, f'{path}[{i}]')


def _read_tfds(source: str, split: str) -> Iterator[_Row]:
  import tensorflow_datasets as tfds

  name = source.removeprefix('tfds:')
  if os.path.isdir(name):
    builder = tfds.builder_from_directory(name)
  else:
    # Unlike tfds.builder, this never downloads or builds anything.
    builder = tfds.core.read_only_builder.builder_from_files(name)
  for i, fields in enumerate(builder.as_data_source(split=split)):
    # Text comes as bytes, everything else as NumPy values.
    text = json.dumps(
        fields,
        default=lambda v: v.decode() if isinstance(v, bytes) else v.tolist(),
    )
    yield f'tfds {builder.name}:{split}[{i}]', json.loads(text)


def _read_hub(source: str, split: str) -> Iterator[_Row]:
  import datasets

  name = source.removeprefix('hub:')
  for i, fields in enumerate(datasets.load_dataset(name, split=split)):
    yield f'hub:{name}:{split}[{i}]', fields


def _read_with_library(kind: str, source: str, split: str) -> list[_Row]:
  """Reads a binary source, with the library's complaints as user errors."""
  reader, package = _LIBRARY_READERS[kind]
  try:
    return list(reader(source, split))
  except ModuleNotFoundError as error:
    raise errors.UserError(
        f'{source}: cannot be read without the module {error.name!r}',
        f'what reads {kind} to be installed',
        f"pip install '{package}'; if it is there, pip install {error.name}",
    ) from error
  except (ValueError, OSError, RuntimeError) as error:
    raise errors.UserError(
        f'{source}: {error}',
        f'{kind} that its library can read, with text as UTF-8',
        f'Check the path and the split {split!r}, or write the data again '
        '(TFDS: with file_format=array_record).',
    ) from error


_TEXT_READERS = {
    'pairs': _read_pairs,
    'csv': _read_csv,
    'tsv': functools.partial(_read_csv, delimiter='\t'),
    'json': _read_json,
    'jsonl': _read_jsonl,
    'text': _read_paragraphs,
}
# With what brings the library.
_LIBRARY_READERS = {
    'parquet': (_read_parquet, 'pyarrow'),
    'array_record': (_read_array_record, 'grain'),
    'tfds': (_read_tfds, 'tensorflow-datasets'),
    'hub': (_read_hub, 'gemma_sft[hub]'),
}
FORMATS = (*_TEXT_READERS, *_LIBRARY_READERS)
