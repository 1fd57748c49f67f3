"""Files of examples: csv, tsv, json, jsonl, txt and parquet.

A case is the file's extension, a line feed, and the file. The records must have
all the text of the file, in order, and the number that the format defines. An
error must name the file.
"""

import csv
import functools
import io
import json
import pathlib
import re

from hypothesis import strategies as st
import pyarrow
from pyarrow import parquet

from fuzz import judging
from gemma_sft.inputs import records

_PAIRS = b'# INPUT\nHi\n# OUTPUT\nHello\n\n# INPUT\nWho?\n# OUTPUT\nA b\nc\n'


def check(case: bytes, folder: str) -> None:
  """Reads the file as raw records and as validated examples."""
  name, _, data = case.partition(b'\n')
  ending = name.decode('latin-1')
  if ending not in _ORACLES:
    ending, data = list(_ORACLES)[len(case) % len(_ORACLES)], case
  path = pathlib.Path(folder, f'case.{ending}')
  path.write_bytes(data)
  found = _read(path, validated=False)
  if found is not None:
    _ORACLES[ending](
        data if ending == 'parquet' else data.decode('utf-8-sig'), found)
  examples = _read(path, validated=True)
  if examples is None:
    return
  if found is None or len(found) != len(examples):
    raise judging.Loss('validation changes the number of records')
  for raw, example in zip(found, examples):
    _compare('validated', *(
        _leaves(_without_roles(r.fields)) for r in (raw, example)))


def _read(path, validated):
  """Returns the records, or None if the file is refused with its name."""
  with judging.may_refuse('case.'):
    found = records.read(str(path), validated=validated)
    records.content_hash(found)
    return found


def _without_roles(fields):
  """Removes the names of roles, which validation changes."""
  fields = dict(fields)
  if isinstance(fields.get('messages'), list):
    fields['messages'] = [m.get('content') if isinstance(m, dict) else m
                          for m in fields['messages']]
  return fields


def _leaves(value):
  """Returns the texts of a value, including names."""
  if isinstance(value, dict):
    # Sorted, because validation and renaming may change the order.
    return [t for k in sorted(value) if value[k] is not None
            and str(value[k]).strip() for t in (k, *_leaves(value[k]))]
  if isinstance(value, list):
    return [text for item in value for text in _leaves(item)]
  return [str(value)] if value is not None else []


def _compare(what, wanted, got, but=''):
  """Compares the visible characters of texts, except those in `but`."""
  wanted, got = (''.join(c for part in parts for c in part
                         if not c.isspace() and c not in but)
                 for parts in (wanted, got))
  if wanted != got:
    raise judging.Loss(f'{what}: {wanted!r:.200} became {got!r:.200}')


def _count(wanted, found):
  if wanted != len(found):
    raise judging.Loss(f'{wanted} records became {len(found)}')


def _check_table(text, found, delimiter):
  # All rows have the names of the header.
  names = list(found[0].fields)
  cells = [cell for r in found for cell in r.fields.values()]
  _compare('cells', [text], names + cells, but=delimiter + '"')
  # Line ends within quotes belong to a cell, if the quotes begin the cell.
  quoted = rf'(?:^|(?<=[{delimiter}\r\n]))"(?:[^"]|"")*"'
  rows = re.sub(quoted, 'q', text)
  _count(len([r for r in re.split(r'\r\n|\r|\n', rows) if r]) - 1, found)


def _object(pairs):
  """Returns a JSON object, whose names must differ."""
  if len({k for k, _ in pairs}) != len(pairs):
    raise judging.Loss('a name was there twice')
  return dict(pairs)


_parse = functools.partial(json.loads, object_pairs_hook=_object)


def _check_objects(values, found):
  _count(len(values), found)
  for value, record in zip(values, found):
    _compare('object', _leaves(value), _leaves(record.fields))


def _check_json(text, found):
  value = _parse(text)
  if isinstance(value, dict):
    if beside := [k for k, v in value.items()
                  if k in records.CANONICAL and not isinstance(v, list)]:
      raise judging.Loss(f'{beside} beside the list')
    value, = (v for v in value.values() if isinstance(v, list))
  _check_objects(value, found)


def _check_jsonl(text, found):
  _check_objects(
      [_parse(line) for line in text.split('\n') if line.strip()], found)


def _check_text(text, found):
  lines = text.replace('\r\n', '\n').split('\n')
  if 'prompt' in found[0].fields:
    headings = [line.rstrip(' \t\r') for line in lines]
    _count(headings.count('# INPUT'), found)
    lines = [line for line, heading in zip(lines, headings)
             if heading not in ('# INPUT', '# OUTPUT')]
  else:
    blank = [not line.strip() for line in lines]
    _count(sum(b and not a for b, a in zip([True, *blank], blank)), found)
  _compare(
      'text', lines, [text for r in found for text in r.fields.values()])


def _check_parquet(data, found):
  _count(parquet.ParquetFile(io.BytesIO(data)).metadata.num_rows, found)


_ORACLES = {
    'csv': functools.partial(_check_table, delimiter=','),
    'tsv': functools.partial(_check_table, delimiter='\t'),
    'json': _check_json, 'jsonl': _check_jsonl, 'txt': _check_text,
    'parquet': _check_parquet}


def seeds() -> list[bytes]:
  """Returns a good file of each kind, and some edge cases."""
  sink = pyarrow.BufferOutputStream()
  parquet.write_table(pyarrow.table(
      {'prompt': ['Hi', 'é'], 'completion': ['a', 'b'],
       'n': [1.5, None]}), sink)
  turns = [{'role': role, 'content': 'Hi'} for role in ('user', 'assistant')]
  return [
      b'csv\nprompt,completion\nHi,"a ""b""\nc"\n',
      b'tsv\nprompt\tcompletion\r\nHi\tHello\r\n\r\nA\tB\r\n',
      b'csv\n\xef\xbb\xbftext,n\n"a,b",1\n\n\xc3\xa9,\n',
      b'json\n' + json.dumps([{'messages': turns, 'n': {'a': [1]}}]).encode(),
      b'json\n{"version": "1", "data": [{"text": "a"}, {"text": "b"}]}',
      b'jsonl\n{"prompt": "Hi", "completion": 3, "system": " "}\n\n'
      b'{"prompt": "\\u00e9", "completion": "x", "m": [1, null, 1.5e300]}\n',
      b'jsonl\n' + json.dumps({'messages': turns}).encode(),
      b'txt\n' + _PAIRS, b'txt\n' + _PAIRS.replace(b'\n', b'\r\n'),
      b'txt\nA paragraph\nof text.\n\n \nAnother.\n',
      b'parquet\n' + sink.getvalue().to_pybytes()]


_TEXT = st.text(max_size=20) | st.sampled_from([
    '', ' ', 'prompt', 'a"b', 'a,b', 'a\tb', 'a\nb', 'a\r\nb', '\r', '\x00',
    '# INPUT', '# OUTPUT', '# input:', '\ufeff', '\u2028', '\x0b', '\x1c',
    '\x85', '漢字', '\U0001f469\u200d\U0001f469', '\u202e', 'x' * 9000])
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(_TEXT, inner, max_size=3), max_leaves=6)
_NAMES = st.sampled_from((*records.CANONICAL, 'n', '', 'role')) | _TEXT
_OBJECTS = st.lists(
    st.dictionaries(_NAMES, _VALUES, max_size=4)
    | st.fixed_dictionaries({'prompt': _TEXT, 'completion': _TEXT})
    | _VALUES, max_size=4)


@st.composite
def _tables(draw, delimiter):
  width = draw(st.integers(1, 4))
  rows = draw(st.lists(
      st.lists(_TEXT, min_size=width, max_size=width), max_size=5))
  if draw(st.booleans()):
    rows.insert(0, list(records.CANONICAL[:width]))
  out = io.StringIO(newline='')
  csv.writer(out, delimiter=delimiter, quoting=draw(st.sampled_from(
      (csv.QUOTE_MINIMAL, csv.QUOTE_ALL))), lineterminator=draw(
          st.sampled_from(('\n', '\r\n')))).writerows(rows)
  return out.getvalue()


@st.composite
def _files(draw):
  ending = draw(st.sampled_from(list(_ORACLES)[:-1]))
  if ending in ('csv', 'tsv'):
    text = draw(_tables(',' if ending == 'csv' else '\t'))
  elif ending == 'json':
    text = json.dumps(draw(_OBJECTS | st.dictionaries(
        _NAMES, _OBJECTS | _VALUES, max_size=2)),
                      ensure_ascii=draw(st.booleans()))
  elif ending == 'jsonl':
    text = '\n'.join(json.dumps(o) for o in draw(_OBJECTS))
  else:
    text = '\n'.join(draw(st.lists(_TEXT | st.sampled_from(
        ('# INPUT', '# OUTPUT', '')), max_size=8)))
  data = text.encode(draw(st.sampled_from(
      ('utf-8', 'utf-8', 'utf-8', 'utf-8-sig', 'utf-16', 'gb18030'))),
                     'replace')
  if draw(st.integers(0, 3)) == 0:  # Cut, or with bytes inserted.
    at = draw(st.integers(0, len(data)))
    data = data[:at] + draw(st.binary(max_size=4)) + (
        data[at:] if draw(st.booleans()) else b'')
  return ending.encode() + b'\n' + data


STRATEGY = _files() | st.builds(
    lambda ending, data: ending.encode() + b'\n' + data,
    st.sampled_from(list(_ORACLES)), st.binary(max_size=200))
