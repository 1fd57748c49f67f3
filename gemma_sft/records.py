"""Files of examples -> validated raw records.

A reader yields (where, fields) for each record, with a `UserError` in place of
the fields of one it cannot accept, so that `read` can show several at once.
"""

from __future__ import annotations

import csv
import dataclasses
import glob
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import pathlib
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gemma_sft import errors

CANONICAL = ('prompt', 'completion', 'system', 'messages', 'text')

_Row = tuple[str, dict[str, Any] | errors.UserError]

_SHAPES = ({'prompt', 'completion'}, {'messages'}, {'text'})
_SHAPES += ({'system', 'prompt', 'completion'},)
_EXPECTED_SHAPE = (
    "exactly one of 'prompt' with 'completion' (and 'system' if wanted), "
    "'messages', or 'text'"
)
_EXPECTED_MESSAGES = (
    "a list of {'role', 'content'}: one system turn first if wanted, then user "
    'and model (or assistant) by turns, the last one model'
)
_MAX_SHOWN = 5
# Looser than the headings that are accepted: a mistyped one would otherwise
# become part of the content above it.
_HEADING = re.compile(r'#[ \t]*(INPUT|OUTPUT)[ \t]*:?\s*', re.IGNORECASE)


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
    reader = _READERS[_guess_format(path) if format == 'auto' else format]
    rows.extend(reader(path, split))
  if not rows:
    raise errors.UserError(
        f'no records in {source}', 'at least one', 'Add records to it.'
    )
  rows = _rename(rows, columns or {}, source)
  is_canonical = any(
      not isinstance(fields, errors.UserError)
      and not fields.keys().isdisjoint(CANONICAL)
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
  if format == 'hub' or source.startswith(('hub:', 'tfds:')):
    return [source]
  if os.path.exists(source):
    return [source]
  if matches := sorted(glob.glob(source, recursive=True)):
    return matches
  missing = pathlib.Path(source)
  while not missing.parent.is_dir():
    missing = missing.parent
  hint = errors.nearest(missing.name, sorted(os.listdir(missing.parent)))
  raise errors.UserError(
      f'{source} does not exist' + (f' (no {missing})' if hint else ''),
      'a file, a glob pattern, tfds:name or hub:org/name',
      f'{hint}Correct the path.',
  )


def _guess_format(path: str) -> str:
  for prefix in ('hub', 'tfds'):
    if path.startswith(f'{prefix}:'):
      return prefix
  if os.path.isdir(path):
    return 'tfds'
  if '.array_record' in os.path.basename(path):
    return 'array_record'
  ending = os.path.splitext(path)[1].lower().removeprefix('.')
  if ending == 'txt':
    headings = map(_HEADING.fullmatch, _read_text(path).split('\n'))
    has_input = any(match and match[1].upper() == 'INPUT' for match in headings)
    return 'pairs' if has_input else 'text'
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
  good = [row for _, row in rows if not isinstance(row, errors.UserError)]
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
          f'columns: {new!r} is {old!r}, but {source} has a {new!r} too',
          'a name that is free',
          f'Give the old {new!r} another name in columns as well.',
      )
  renamed: list[_Row] = []
  for where, fields in rows:
    if not isinstance(fields, errors.UserError):
      kept = {k: v for k, v in fields.items() if k not in columns.values()}
      moved = {k: fields[v] for k, v in columns.items() if v in fields}
      fields = kept | moved
    renamed.append((where, fields))
  return renamed


def _strings(value: Any) -> Iterator[str]:
  if isinstance(value, str):
    yield value
  elif isinstance(value, dict):
    yield from _strings([*value, *value.values()])
  elif isinstance(value, list):
    for item in value:
      yield from _strings(item)


def _check_characters(record: Record) -> None:
  """Refuses what no tokenizer takes, and JSON can smuggle in by escapes."""
  for name, value in record.fields.items():
    for text in _strings(value):
      bad = re.search('[\0\ud800-\udfff]', text)
      if bad:
        raise errors.UserError(
            f'{record.where}: {name} has U+{ord(bad[0]):04X}',
            'text without NUL characters and unpaired surrogates',
            'Remove the character.',
        )


def _check_text(value: Any, what: str) -> str:
  if type(value) is int or type(value) is float and math.isfinite(value):
    value = str(value)
  if not isinstance(value, str):
    raise errors.UserError(
        f'{what} is {json.dumps(value, default=str):.40}',
        'text',
        'Write it as a string.',
    )
  if not value.strip():
    raise errors.UserError(
        f'{what} is empty', 'text', 'Fill it in or remove the record.'
    )
  return value


def _check_messages(value: Any, what: str) -> list[dict[str, str]]:
  """Returns the turns with role and content only, assistant called model."""

  def error(got: str) -> errors.UserError:
    return errors.UserError(got, _EXPECTED_MESSAGES, 'Mend the conversation.')

  if not isinstance(value, list):
    raise error(f'{what} is {json.dumps(value, default=str):.40}')
  turns: list[dict[str, str]] = []
  role_due = 'user'
  for i, message in enumerate(value):
    place = f'{what}[{i}]'
    if not isinstance(message, dict):
      raise error(f'{place} is {json.dumps(message, default=str):.40}')
    # Tables of many sources carry null for the keys that a turn lacks.
    keys = [key for key, item in message.items() if item is not None]
    if sorted(keys) != ['content', 'role']:
      raise error(f'{place} has {", ".join(map(repr, keys)) or "nothing"}')
    role = 'model' if message['role'] == 'assistant' else message['role']
    if role == role_due:
      role_due = 'user' if role == 'model' else 'model'
    elif role != 'system' or i:
      raise error(f'{place}.role is {role!r} where {role_due!r} is due')
    content = _check_text(message['content'], f'{place}.content')
    turns.append({'role': role, 'content': content})
  if not turns or turns[-1]['role'] != 'model':
    raise error(f'{what} has no model turn at its end')
  return turns


def _import(module: str, package: str, path: str) -> types.ModuleType:
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    raise errors.UserError(
        f'{path}: cannot be read, there is no module {error.name!r}',
        f'{package} to be installed',
        f'pip install {package}',
    ) from error


def _read_text(path: str) -> str:
  """Returns the text of a UTF-8 file, without its byte order mark."""
  if os.path.isdir(path):
    raise errors.UserError(
        f'{path} is a directory', 'a file', f'Name its files: {path}/*'
    )
  data = pathlib.Path(path).read_bytes()
  try:
    text = data.decode().removeprefix('\ufeff')
    at = data.find(b'\0')
    fix = 'Remove the byte, or convert the file from UTF-16 if it is that.'
  except UnicodeDecodeError as error:
    at = error.start
    encoding = _guess_encoding(data)
    fix = (
        f'If the file is {encoding}, as it seems: iconv -f {encoding} -t UTF-8'
    )
  if at >= 0:
    line = data.count(b'\n', 0, at) + 1
    raise errors.UserError(
        f'{path}:{line}: byte 0x{data[at]:02X} at offset {at}',
        'UTF-8 text without NUL bytes',
        fix,
    )
  return text


def _guess_encoding(data: bytes) -> str:
  if data.startswith((b'\xff\xfe', b'\xfe\xff')):
    return 'UTF-16'
  # Accented letters are few among ASCII; Chinese text is nearly all high bytes.
  num_high = sum(byte > 127 for byte in data)
  return 'GB18030' if num_high > len(data) / 4 else 'WINDOWS-1252'


def _read_pairs(path: str, split: str) -> Iterator[_Row]:
  del split
  sections: list[tuple[str, int, list[str]]] = []
  preamble: list[str] = []
  lines = _read_text(path).replace('\r\n', '\n').split('\n')
  for number, line in enumerate(lines, 1):
    content = sections[-1][2] if sections else preamble
    heading = _HEADING.fullmatch(line)
    if heading is None:
      content.append(line)
      continue
    sections.append((heading[1].upper(), number, []))
    if line.rstrip() not in ('# INPUT', '# OUTPUT'):
      yield _bad(
          f'{path}:{number}',
          f'{line!r} looks like a heading',
          'exactly # INPUT or # OUTPUT',
          'Correct it, or use jsonl for content with such lines.',
      )
  for number, line in enumerate(preamble, 1):
    if line.strip():
      yield _bad(
          f'{path}:{number}',
          'text before the first heading',
          '# INPUT on the first line',
          'Put # INPUT above the text.',
      )
      break
  while sections:
    heading, number, content = sections.pop(0)
    where = f'{path}:{number}'
    if heading == 'OUTPUT':
      problem = '# OUTPUT without # INPUT'
    elif not sections or sections[0][0] != 'OUTPUT':
      problem = '# INPUT without # OUTPUT'
    else:
      completion = sections.pop(0)[2]
      fields = {'prompt': content, 'completion': completion}
      yield where, {k: '\n'.join(v).strip('\n') for k, v in fields.items()}
      continue
    yield _bad(
        where,
        problem,
        '# INPUT and # OUTPUT by turns',
        'Add the missing part.',
    )


def _bad(where: str, got: str, expected: str, fix: str) -> _Row:
  return where, errors.UserError(f'{where}: {got}', expected, fix)


def _read_paragraphs(path: str, split: str) -> Iterator[_Row]:
  del split
  lines = _read_text(path).replace('\r\n', '\n').split('\n')
  groups = itertools.groupby(
      enumerate(lines, 1), key=lambda numbered: bool(numbered[1].strip())
  )
  for has_text, group in groups:
    if has_text:
      numbers, paragraph = zip(*group, strict=True)
      yield f'{path}:{numbers[0]}', {'text': '\n'.join(paragraph)}


def _read_csv(path: str, split: str, delimiter: str = ',') -> Iterator[_Row]:
  del split
  text = _read_text(path)
  # The default of 128 KiB would refuse a long document.
  csv.field_size_limit(max(csv.field_size_limit(), len(text)))
  reader = csv.reader(
      io.StringIO(text, newline=''), delimiter=delimiter, strict=True
  )
  header: list[str] = []
  start = 1
  try:
    for cells in reader:
      where, start = f'{path}:{start}', reader.line_num + 1
      if not cells:
        continue
      if not header:
        header = cells
        _refuse_duplicates(header, where)
      elif len(cells) != len(header):
        yield _bad(
            where,
            f'{len(cells)} cells',
            f'{len(header)} cells, as in the header',
            'Quote cells that contain the delimiter, a quote or a line break.',
        )
      else:
        yield where, dict(zip(header, cells, strict=True))
  except csv.Error as error:
    raise errors.UserError(
        f'{path}:{start}: {error}',
        'cells quoted with " and quotes inside them doubled',
        'Close or double the quote in the row that starts there.',
    ) from error


def _read_tsv(path: str, split: str) -> Iterator[_Row]:
  return _read_csv(path, split, delimiter='\t')


def _refuse_duplicates(names: Iterable[str], where: str) -> None:
  seen: set[str] = set()
  for name in names:
    if name in seen:
      raise errors.UserError(
          f'{where}: {name!r} is there twice',
          'every name once',
          'Rename or remove one of them.',
      )
    seen.add(name)


def _parse_json(text: str | bytes, where: str, line: int | None = None) -> Any:
  """Parses JSON; `where` is the file, or the record if `line` is None."""

  def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    place = where if line is None else f'{where}:{line}'
    _refuse_duplicates((key for key, _ in pairs), place)
    return dict(pairs)

  try:
    return json.loads(text, object_pairs_hook=build)
  except json.JSONDecodeError as error:
    if line is not None:
      where = f'{where}:{line + error.lineno - 1}'
    fix = 'Correct the line.'
    if error.msg == 'Extra data':
      fix = "If each line is an object of its own, set the format to 'jsonl'."
    raise errors.UserError(
        f'{where}: column {error.colno}: {error.msg}', 'valid JSON', fix
    ) from error
  except UnicodeDecodeError as error:
    raise errors.UserError(
        f'{where}: byte 0x{error.object[error.start]:02X} at {error.start}',
        'JSON in UTF-8',
        'Write the file again with one JSON object per record.',
    ) from error
