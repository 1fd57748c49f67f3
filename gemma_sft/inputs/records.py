"""Reads files of examples into validated records."""

from collections.abc import Iterable
from collections.abc import Mapping
import dataclasses
import glob
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
from typing import Any

from gemma_sft import errors
from gemma_sft.inputs import readers

CANONICAL = readers.CANONICAL
_MAX_SHOWN = 5
_SHAPES = ({'prompt', 'completion'}, {'system', 'prompt', 'completion'},
           {'messages'}, {'text'})
_EXPECTED_SHAPE = (
    "exactly one of 'prompt' with 'completion' (and 'system' if wanted), "
    "'messages', or 'text'")
_EXPECTED_MESSAGES = (
    "a list of {'role', 'content'}: an optional system turn first, then user"
    ' and model (or assistant) in turns, ending with model')


@dataclasses.dataclass(frozen=True)
class Record:
  """One example as it is in its source.

  `fields` holds strings and, under 'messages', a list of {'role', 'content'};
  fields that are not in `CANONICAL` keep the type that they have in the source.
  `where` is 'train.txt:12' (the line where the record starts), 'train.json[3]'
  (counted from 0), 'tfds name:split[5]' or 'hub:org/name:split[5]'.
  """

  fields: dict[str, Any]
  where: str


def read(
    source: str, *, format: str = 'auto',
    columns: Mapping[str, str] | None = None, split: str = 'train',
    validated: bool = True) -> list[Record]:
  """Reads all records of a source, in its order, and validates them.

  If no record has a field of `CANONICAL`, the task interprets the fields, and
  only their characters are checked here; otherwise see `validate`. With
  `validated=False` that is all too, because the caller (`curate`) repairs what
  is missing or blank.

  Args:
    source: A file, a glob pattern (all its files, sorted by name), a directory
      prepared by TFDS, 'tfds:name' or 'hub:org/name'.
    format: One of `readers.FORMATS`, or 'auto': by the prefix or file ending.
    columns: {new name: the source's name} of the fields to rename.
    split: Of a TFDS or hub data set; a file is one split.

  Raises:
    UserError: naming up to five bad records and their places.
  """
  if format not in ('auto', *readers.FORMATS):
    raise errors.UserError(
        f'unknown data format {format!r}',
        f'auto or one of {", ".join(readers.FORMATS)}',
        f'{errors.nearest(format, readers.FORMATS)}Correct the format.')
  rows: list[readers.Row] = []
  for path in paths(source, format):
    kind = _guess_format(path) if format == 'auto' else format
    if kind in readers.LIBRARY_READERS:
      rows += readers.read_with_library(kind, path, split)
    else:
      rows += readers.TEXT_READERS[kind](path)
  if not rows:
    raise errors.UserError(
        f'no records in {source}', 'at least one', 'Add records to it.')
  rows = _rename(rows, columns or {}, source)
  is_canonical = validated and any(
      isinstance(fields, dict) and not fields.keys().isdisjoint(CANONICAL)
      for _, fields in rows)
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


def keep_fields(record: Record, names: Iterable[str]) -> Record:
  """Returns the record with only these fields, or raises a `UserError`."""
  known = list(record.fields)
  for name in names:
    if name not in known:
      raise errors.UserError(
          f'{record.where}: no field {name!r}',
          f'one of {", ".join(map(repr, known))}',
          f'{errors.nearest(name, known)}Correct config.data.fields.')
  return Record({name: record.fields[name] for name in names}, record.where)


def validate(record: Record) -> Record:
  """Returns the record in canonical form: text as strings, no null fields.

  The fields must hold exactly one of `prompt` with `completion` (and possibly
  `system`, dropped if blank), `messages`, or `text`. Numbers become strings,
  and the role assistant becomes model. Other fields stay as they are.

  Raises:
    UserError: for another set of fields, blank text, or messages out of order.
  """
  fields = {name: value for name, value in record.fields.items()
            if value is not None or name not in CANONICAL}
  # A table has a system cell in every row; a blank one means no system turn.
  if isinstance(fields.get('system'), str) and not fields['system'].strip():
    del fields['system']
  present = fields.keys() & set(CANONICAL)
  if present not in _SHAPES:
    found = ', '.join(
        repr(name) if name in fields else f'{name!r} (null)'
        for name in record.fields)
    raise errors.UserError(
        f'{record.where}: the fields are {found or "none"}', _EXPECTED_SHAPE,
        "Complete the record, or rename its fields with 'columns'.")
  for name in present:
    check = _check_messages if name == 'messages' else _check_text
    fields[name] = check(fields[name], f'{record.where}: {name}')
  return Record(fields, record.where)


def content_hash(records: Iterable[Record], files: Iterable[str] = ()) -> str:
  """Returns the SHA-256 (hex) of the records' fields, in record order.

  The same records in another format, or with their fields in another order,
  have the same hash. The content of `files` is hashed after the records.
  """
  digest = hashlib.sha256()
  for record in records:
    line = json.dumps(record.fields, sort_keys=True, default=str)
    digest.update(line.encode() + b'\n')
  for path in files:
    with open(path, 'rb') as file:
      digest.update(hashlib.file_digest(file, 'sha256').digest())
  return digest.hexdigest()


def _merge(bad: list[errors.UserError]) -> errors.UserError:
  """Returns one error that shows the first few bad records."""
  shown = bad[:_MAX_SHOWN]
  got = [error.got for error in shown]
  if len(bad) > len(shown):
    got.append(f'and {len(bad) - len(shown)} more bad records')
  return errors.UserError(
      '\n'.join(got),
      '; '.join(dict.fromkeys(error.expected for error in shown)),
      ' '.join(dict.fromkeys(error.fix for error in shown)))


def paths(source: str, format: str) -> list[str]:
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
      f'{hint}Correct the path.')


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
        f'Name what to read in it: {", ".join(found) or f"{path}/*.jsonl"}.')
  if '.array_record' in os.path.basename(path):
    return 'array_record'
  ending = os.path.splitext(path)[1].lower().removeprefix('.')
  if ending == 'txt':
    headings = readers.HEADING.findall(readers.read_text(path))
    return 'pairs' if any('INPUT' in h.upper() for h in headings) else 'text'
  if ending not in ('csv', 'tsv', 'json', 'jsonl', 'parquet'):
    raise errors.UserError(
        f'{path}: unknown file ending {ending!r}',
        'txt, csv, tsv, json, jsonl, parquet or array_record',
        'Rename the file, or set its format: one of '
        f'{", ".join(readers.FORMATS)}.')
  return ending


def _rename(
    rows: list[readers.Row], columns: Mapping[str, str], source: str
) -> list[readers.Row]:
  """Applies `columns` ({new name: the source's name}) to every record."""
  good = [fields for _, fields in rows if isinstance(fields, dict)]
  known = list(dict.fromkeys(itertools.chain.from_iterable(good)))
  for new, old in columns.items():
    if good and old not in known:
      raise errors.UserError(
          f'columns: {source} has no column {old!r} (for {new!r})',
          f'one of {", ".join(map(repr, known))}',
          f'{errors.nearest(old, known)}Correct the name.')
    if new in known and new not in columns.values():
      raise errors.UserError(
          f'columns: {old!r} would replace the {new!r} that {source} has',
          'a name that is not in use',
          f'Rename the old {new!r} in columns as well.')

  def rename(fields: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in fields.items() if k not in columns.values()}
    return kept | {k: fields[v] for k, v in columns.items() if v in fields}

  return [(where, rename(fields) if isinstance(fields, dict) else fields)
          for where, fields in rows]


def _check_characters(record: Record) -> None:
  """Refuses characters that JSON can escape and no tokenizer accepts."""
  for name, value in record.fields.items():
    text = json.dumps([name, value], ensure_ascii=False, default=str)
    # With escaped backslashes removed, only a real NUL reads as \\u0000.
    text = text.replace('\\\\', '')
    if '\\u0000' in text or re.search('[\ud800-\udfff]', text):
      raise errors.UserError(
          f'{record.where}: {name} has a NUL or an unpaired surrogate',
          'text that UTF-8 can encode', 'Remove the character.')


def _check_text(value: Any, what: str) -> str:
  if type(value) is int or type(value) is float and math.isfinite(value):
    value = str(value)
  if isinstance(value, str) and value.strip():
    return value
  raise errors.UserError(
      f'{what} is {"empty" if isinstance(value, str) else repr(value)[:40]}',
      'text', 'Fill it in, or remove the record.')


def _check_messages(value: Any, what: str) -> list[dict[str, str]]:
  """Returns the turns with only role and content, assistant named model."""

  def error(got: str) -> errors.UserError:
    return errors.UserError(
        got, _EXPECTED_MESSAGES, 'Correct the conversation.')

  if not isinstance(value, list):
    raise error(f'{what} is {value!r:.40}')
  turns: list[dict[str, str]] = []
  due = 'user'
  for i, message in enumerate(value):
    place = f'{what}[{i}]'
    if not isinstance(message, dict):
      raise error(f'{place} is {message!r:.40}')
    # Tables often have null for the keys that a turn lacks.
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
