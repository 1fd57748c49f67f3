"""Every format reads back what was written; every mistake names its place."""

import csv
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types

import hypothesis
from hypothesis import strategies as st
import pytest

from gemma_sft import errors
from gemma_sft.inputs import records

_ROOT = pathlib.Path(records.__file__).parents[2]
_PAIR = {'prompt': 'p', 'completion': 'c'}


def _write(folder, name, content):
  path = folder / name
  if isinstance(content, bytes):
    path.write_bytes(content)
  else:
    path.write_text(content, encoding='utf-8', newline='')
  return str(path)


def _fields(source, **kwargs):
  return [record.fields for record in records.read(source, **kwargs)]


def _places(source, **kwargs):
  found = records.read(source, **kwargs)
  return [record.where.replace(source, 'FILE') for record in found]


def _error(source, **kwargs):
  with pytest.raises(errors.UserError) as caught:
    records.read(source, **kwargs)
  return caught.value


def _needs(module):
  return pytest.mark.skipif(
      importlib.util.find_spec(module) is None, reason=f'needs {module}')


# --- formats


def test_pairs_keep_inner_blank_lines_and_indentation(tmp_path):
  path = _write(
      tmp_path,
      'train.txt',
      '\n# INPUT\nfirst\n\nline \n\n# OUTPUT\n\n  def f() {\n\n  }\n\n'
      '# INPUT\nsecond\n# OUTPUT \n# a comment\n')
  assert _fields(path) == [
      {'prompt': 'first\n\nline ', 'completion': '  def f() {\n\n  }'},
      {'prompt': 'second', 'completion': '# a comment'}]
  assert _places(path) == ['FILE:2', 'FILE:13']


def test_pairs_with_windows_line_ends_and_byte_order_mark(tmp_path):
  content = '# INPUT\r\na\r\nb\r\n# OUTPUT\r\nc\r\n'.encode('utf-8-sig')
  path = _write(tmp_path, 'train.txt', content)
  assert _fields(path) == [{'prompt': 'a\nb', 'completion': 'c'}]


def test_text_is_one_record_per_paragraph(tmp_path):
  path = _write(tmp_path, 'poems.txt', '\n春眠\n不覺曉\n \n\n  two\r\n')
  assert _fields(path) == [{'text': '春眠\n不覺曉'}, {'text': '  two'}]
  assert _places(path) == ['FILE:2', 'FILE:6']


def test_csv_counts_lines_not_rows(tmp_path):
  content = '\ufeffprompt,completion,n\n"a\nb","say ""x""",1\n\nc,"d,e",2\n'
  path = _write(tmp_path, 'a.csv', content)
  assert _fields(path) == [
      {'prompt': 'a\nb', 'completion': 'say "x"', 'n': '1'},
      {'prompt': 'c', 'completion': 'd,e', 'n': '2'}]
  assert _places(path) == ['FILE:2', 'FILE:5']


def test_csv_takes_a_long_cell(tmp_path):
  # Longer than the 131,072 characters that the csv module takes by default.
  long = 'x' * 200_000
  path = _write(tmp_path, 'a.csv', f'prompt,completion\np,{long}\n')
  assert _fields(path)[0]['completion'] == long


def test_tsv(tmp_path):
  path = _write(tmp_path, 'a.tsv', 'prompt\tcompletion\na, b\tc\n')
  assert _fields(path) == [{'prompt': 'a, b', 'completion': 'c'}]


@pytest.mark.parametrize('wrap', [lambda r: r, lambda r: {'v': 1, 'data': r}])
def test_json_list_or_object_with_one_list(tmp_path, wrap):
  path = _write(tmp_path, 'a.json', json.dumps(wrap([_PAIR, _PAIR])))
  assert _fields(path) == [_PAIR, _PAIR]
  assert _places(path) == ['FILE[0]', 'FILE[1]']


def test_jsonl_is_split_at_line_feeds_only(tmp_path):
  record = {'prompt': 'a\u2028b\x85', 'completion': 'c'}
  line = json.dumps(record, ensure_ascii=False)
  path = _write(tmp_path, 'a.jsonl', f'{line}\r\n\n{line}')
  assert _fields(path) == [record, record]
  assert _places(path) == ['FILE:1', 'FILE:3']


@_needs('pyarrow')
def test_parquet_adds_no_column_from_the_folder_name(tmp_path):
  import pyarrow
  from pyarrow import parquet

  folder = tmp_path / 'lang=de'
  folder.mkdir()
  path = str(folder / 'a.parquet')
  conversation = [
      {'role': 'user', 'content': 'u', 'name': None},
      {'role': 'assistant', 'content': 'm', 'name': None}]
  table = pyarrow.Table.from_pylist([{'messages': conversation, 'text': None}])
  parquet.write_table(table, path)
  turns = [{'role': 'user', 'content': 'u'}, {'role': 'model', 'content': 'm'}]
  assert _fields(path) == [{'messages': turns}]
  assert _places(path) == ['FILE[0]']


@_needs('grain')
def test_array_record_of_json(tmp_path):
  from array_record.python import array_record_module

  path = str(tmp_path / 'a.array_record')
  writer = array_record_module.ArrayRecordWriter(path, 'group_size:1')
  for data in (json.dumps(_PAIR), '{"prompt": "p"'):
    writer.write(data.encode())
  writer.close()
  error = _error(path)
  assert f'{path}[1]: column 15: Expecting' in error.got
  assert '[0]' not in error.got


def test_hub_goes_through_the_datasets_library(monkeypatch):
  def load_dataset(name, split):
    assert (name, split) == ('org/name', 'test')
    return [_PAIR]

  stand_in = types.SimpleNamespace(load_dataset=load_dataset)
  monkeypatch.setitem(sys.modules, 'datasets', stand_in)
  (record,) = records.read('hub:org/name', split='test')
  assert record == records.Record(_PAIR, 'hub:org/name:test[0]')
  assert records.read('org/name', format='hub', split='test') == [record]


@pytest.mark.parametrize(('module', 'name', 'package'), [
    ('datasets', 'hub:org/name', 'gemma_sft[hub]'),
    ('pyarrow', 'a.parquet', 'pyarrow'),
    ('grain', 'a.array_record', 'grain'),
    ('tensorflow_datasets', 'tfds:name', 'tensorflow-datasets')])
def test_missing_library_names_what_to_install(
    tmp_path, monkeypatch, module, name, package):
  monkeypatch.setitem(sys.modules, module, None)
  source = name if ':' in name else _write(tmp_path, name, 'x')
  error = _error(source)
  assert f'without the module {module!r}' in error.got
  assert f"pip install '{package}'" in error.fix


@_needs('pyarrow')
def test_file_that_is_not_parquet(tmp_path):
  path = _write(tmp_path, 'a.parquet', 'hello')
  assert _error(path).got.startswith(f'{path}: Parquet file size is 5 bytes')


def test_import_is_light():
  code = """
import sys
from gemma_sft.inputs import records
heavy = 'numpy jax pyarrow grain tensorflow_datasets tensorflow datasets'
print(sorted(set(sys.modules) & set(heavy.split())))
"""
  done = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, check=True,
      env={**os.environ, 'PYTHONPATH': str(_ROOT)})
  assert done.stdout == '[]\n'


def test_glob_reads_all_files_in_order(tmp_path):
  for name in ('b', 'a'):
    record = {'prompt': name, 'completion': 'c'}
    _write(tmp_path, f'{name}.jsonl', json.dumps(record))
  found = _fields(str(tmp_path / '*.jsonl'))
  assert [fields['prompt'] for fields in found] == ['a', 'b']


_text = st.text(
    st.characters(blacklist_categories=['Cs'], blacklist_characters='\0'),
    min_size=1).filter(str.strip)


@hypothesis.given(
    pairs=st.lists(st.tuples(_text, _text), min_size=1, max_size=5),
    ending=st.sampled_from(['csv', 'tsv', 'jsonl', 'ascii.jsonl', 'json']))
@hypothesis.settings(deadline=None, max_examples=200)
def test_any_text_survives(tmp_path_factory, pairs, ending):
  expected = [{'prompt': p, 'completion': c} for p, c in pairs]
  path = tmp_path_factory.getbasetemp() / f'any.{ending}'
  with path.open('w', encoding='utf-8', newline='') as file:
    if ending in ('csv', 'tsv'):
      delimiter = ',' if ending == 'csv' else '\t'
      writer = csv.writer(file, delimiter=delimiter)
      writer.writerows([('prompt', 'completion'), *pairs])
    elif ending == 'json':
      json.dump(expected, file, ensure_ascii=False)
    else:
      is_ascii = ending == 'ascii.jsonl'
      for fields in expected:
        file.write(json.dumps(fields, ensure_ascii=is_ascii) + '\n')
  assert _fields(str(path)) == expected


# --- canonical form


def test_source_without_canonical_fields_stays_raw(tmp_path):
  rows = [{'slang': 'W', 'year': 2020}, {'slang': '', 'notes': ['x', None]}]
  path = _write(tmp_path, 'a.jsonl', '\n'.join(map(json.dumps, rows)))
  assert _fields(path) == rows


def test_numbers_become_strings_only_in_canonical_fields(tmp_path):
  rows = [{'prompt': 2, 'completion': 0.5, 'year': 2020}]
  path = _write(tmp_path, 'a.json', json.dumps(rows))
  assert _fields(path) == [{'prompt': '2', 'completion': '0.5', 'year': 2020}]


def test_blank_system_is_dropped(tmp_path):
  content = 'system,prompt,completion\nbe kind,p,c\n ,p,c\n'
  path = _write(tmp_path, 'a.csv', content)
  assert _fields(path) == [{'system': 'be kind', **_PAIR}, _PAIR]


def test_columns_rename_and_may_swap(tmp_path):
  content = 'completion,prompt,sys\np,c,s\n'
  columns = {'prompt': 'completion', 'completion': 'prompt', 'note': 'sys'}
  path = _write(tmp_path, 'a.csv', content)
  assert _fields(path, columns=columns) == [{**_PAIR, 'note': 's'}]


def test_validate_returns_a_new_record():
  turns = [
      {'role': 'system', 'content': 's'},
      {'role': 'user', 'content': 'u'},
      {'role': 'assistant', 'content': 'm'},
      {'role': 'user', 'content': 7},
      {'role': 'model', 'content': 'n'}]
  record = records.Record({'messages': turns}, 'x:1')
  found = records.validate(record).fields['messages']
  roles = [turn['role'] for turn in found]
  assert roles == ['system', 'user', 'model', 'user', 'model']
  assert found[3]['content'] == '7'
  assert turns[2]['role'] == 'assistant'


def _turns(*roles):
  return [{'role': role, 'content': 'x'} for role in roles]


@pytest.mark.parametrize(('fields', 'got'), [
    ({'prompt': 'p'}, "a.jsonl:2: the fields are 'prompt'"),
    ({**_PAIR, 'text': 't'}, "'prompt', 'completion', 'text'"),
    ({**_PAIR, 'completion': None}, "'prompt', 'completion' (null)"),
    ({'text': 't', 'system': 's'}, "'text', 'system'"),
    ({'other': 't'}, "a.jsonl:2: the fields are 'other'"),
    ({'prompt': ' \n', 'completion': 'c'}, 'a.jsonl:2: prompt is empty'),
    ({'text': True}, 'a.jsonl:2: text is True'),
    ({'text': float('nan')}, 'a.jsonl:2: text is nan'),
    ({'text': 'a\0b'}, 'a.jsonl:2: text has a NUL'),
    ({'text': 'a', 'id': ['\ud800']}, 'a.jsonl:2: id has a NUL or an unp'),
    ({'messages': 'hi'}, "messages is 'hi'"),
    ({'messages': ['hi']}, "messages[0] is 'hi'"),
    ({'messages': []}, 'messages has no model turn at its end'),
    ({'messages': _turns('system')}, 'no model turn at its end'),
    ({'messages': _turns('user')}, 'no model turn at its end'),
    ({'messages': _turns('user', 'model', 'user')}, 'no model turn'),
    ({'messages': _turns('model')}, "messages[0] has the role 'model' wh"),
    ({'messages': _turns('user', 'user')},
     "messages[1] has the role 'user' where 'model' is due"),
    ({'messages': _turns('user', 'system', 'model')},
     "messages[1] has the role 'system' where 'model' is due"),
    ({'messages': _turns('system', 'system', 'user', 'model')},
     "messages[1] has the role 'system' where 'user' is due"),
    ({'messages': _turns('user', 'tool')}, "the role 'tool'"),
    ({'messages': [{'from': 'human', 'value': 'x'}]}, "'from', 'value'"),
    ({'messages': [{'role': 'user', 'content': ''}]},
     'messages[0].content is empty'),
    ({'messages': [{**_turns('user')[0], 'tool_calls': [1]}]},
     "messages[0] has 'role', 'content', 'tool_calls'")])
def test_bad_record(tmp_path, fields, got):
  lines = [json.dumps(_PAIR), json.dumps(fields)]
  error = _error(_write(tmp_path, 'a.jsonl', '\n'.join(lines)))
  assert got in error.got
  assert 'a.jsonl:2: ' in error.got
  assert error.expected and error.fix


def test_escaped_backslash_is_not_a_nul(tmp_path):
  record = {'text': '\\u0000 and \\\\u0000'}
  path = _write(tmp_path, 'a.jsonl', json.dumps(record))
  assert _fields(path) == [record]


def test_five_bad_records_are_shown_and_the_rest_counted(tmp_path):
  good, bad = json.dumps(_PAIR), '{"prompt": "p", "completion": ""}'
  lines = [good, *[bad] * 3, '{', *[bad] * 4]
  error = _error(_write(tmp_path, 'a.jsonl', '\n'.join(lines)))
  shown = error.got.splitlines()
  places = [line.rpartition('a.jsonl:')[2][:2] for line in shown[:5]]
  assert places == ['2:', '3:', '4:', '5:', '6:']
  assert 'a.jsonl:5: column 2: Expecting property name' in shown[3]
  assert shown[5:] == ['and 3 more bad records']
  assert 'Fill it in' in error.fix and 'Correct the record' in error.fix


# --- mistakes in files


@pytest.mark.parametrize(('name', 'content', 'got', 'fix'), [
    ('a.txt', '\nhi\n# INPUT\na\n# OUTPUT\nb', 'FILE:2: text before', 'above'),
    ('a.txt', '# INPUT\na\n# INPUT\nb\n# OUTPUT\nc', 'FILE:1: no # OUT', 'Add'),
    ('a.txt', '# INPUT\na\n# OUTPUT\nb\n# INPUT\n', 'FILE:5: no # OUT', 'Add'),
    ('a.txt', '# INPUT\na\n# OUTPUT\nb\n# OUTPUT\n',
     'FILE:5: no # INPUT before it', 'Add'),
    ('a.txt', '# INPUT\na\n# OUTPUT\nb\n\n# Input:\nc\n# OUTPUT\nd',
     "FILE:6: '# Input:' is almost a heading", 'jsonl'),
    ('a.txt', '#input\na\n', "FILE:1: '#input' is almost a heading", 'Correct'),
    ('a.txt', '# INPUT\na\n# OUTPUT\n\n', 'FILE:1: completion is empty',
     'Fill'),
    ('a.csv', 'prompt,completion\na,b\nc\n', 'FILE:3: 1 cells', 'quotes'),
    ('a.csv', 'prompt,completion\n"a\n",b,c\n', 'FILE:2: 3 cells', 'quotes'),
    ('a.csv', 'prompt,x,prompt\na,b,c\n', "FILE:1: the name 'prompt'",
     'Rename'),
    ('a.csv', 'prompt,completion\na,b\nc,"d\n', 'FILE:3: unexpected end',
     'Close'),
    ('a.csv', 'prompt,completion\na,""\n', 'FILE:2: completion is empty',
     'Fill'),
    ('a.csv', 'prompt,completion\n', 'no records in FILE', 'Add'),
    ('a.jsonl', '', 'no records in FILE', 'Add'),
    ('a.json', '[]', 'no records in FILE', 'Add'),
    ('a.jsonl', '{"text": "a"}\n{"text" "b"}', 'FILE:2: column 9: Exp', 'Corr'),
    ('a.jsonl', '{"text": "a", "text": "b"}', "FILE:1: the name 'text'",
     'Corr'),
    ('a.jsonl', '\n["a"]', "FILE:2: ['a']", 'names'),
    ('a.json', '[\n {"text" "a"}\n]', 'FILE:2: column 10: Expecting',
     'Correct'),
    ('a.json', '{"text": "a"}\n{"text": "b"}', 'FILE:2: column 1: E', 'jsonl'),
    ('a.json', '[{"a": 1, "a": 2}]', "FILE: the name 'a' appears", 'Keep one'),
    ('a.json', '{"a": [], "b": []}', 'FILE: no list, or several', 'jsonl'),
    ('a.json', '[1]', 'FILE[0]: 1', 'names'),
    ('a.jsonl', b'{}\n\xe9', 'FILE:2: byte 0xE9 at byte offset 3',
     'WINDOWS-1252'),
    ('a.txt', '春眠不覺曉'.encode('gb18030'),
     'FILE:1: byte 0xB4 at byte offset 0', 'GB18030'),
    ('a.csv', 'a,b'.encode('utf-16'), 'FILE:1: byte 0xFF at byte',
     'f UTF-16 -t'),
    ('a.txt', b'ab\nc\x00d', 'FILE:2: byte 0x00 at byte offset 4', 'UTF-16'),
    ('a.docx', 'x', "FILE: unknown file ending 'docx'", 'jsonl')])
def test_bad_file(tmp_path, name, content, got, fix):
  path = _write(tmp_path, name, content)
  error = _error(path)
  assert got in error.got.replace(path, 'FILE')
  assert fix in error.fix
  assert error.expected


def test_missing_file_names_the_nearest(tmp_path):
  _write(tmp_path, 'train.jsonl', json.dumps(_PAIR))
  error = _error(str(tmp_path / 'trian.jsonl'))
  assert 'trian.jsonl does not exist' in error.got
  assert "Did you mean 'train.jsonl'?" in error.fix
  error = _error(str(tmp_path / '*.csv'))
  assert '*.csv does not exist' in error.got


def test_missing_folder_names_the_nearest(tmp_path):
  (tmp_path / 'data').mkdir()
  error = _error(str(tmp_path / 'dta' / 'x' / 'train.jsonl'))
  assert "Did you mean 'data'?" in error.fix


def test_directory_needs_a_pattern(tmp_path):
  assert f'{tmp_path}/*.jsonl' in _error(str(tmp_path)).fix
  assert 'is a directory' in _error(str(tmp_path), format='jsonl').got


def test_unknown_format_names_the_nearest():
  error = _error('x', format='jsnl')
  assert "'jsnl'" in error.got and "'jsonl'" in error.fix


def test_columns_must_exist(tmp_path):
  path = _write(tmp_path, 'a.csv', 'question,answer\np,c\n')
  error = _error(path, columns={'prompt': 'qestion'})
  assert "no column 'qestion' (for 'prompt')" in error.got
  assert error.expected == "one of 'question', 'answer'"
  assert "Did you mean 'question'?" in error.fix


def test_record_without_a_renamed_column_is_a_bad_record(tmp_path):
  lines = '{"q": "p", "completion": "c"}\n{"completion": "c"}'
  error = _error(_write(tmp_path, 'a.jsonl', lines), columns={'prompt': 'q'})
  assert error.got.endswith("a.jsonl:2: the fields are 'completion'")


def test_columns_never_replace_a_column(tmp_path):
  path = _write(tmp_path, 'a.csv', 'prompt,completion,question\np,c,q\n')
  error = _error(path, columns={'prompt': 'question'})
  assert "'question' would replace the 'prompt'" in error.got


# --- content hash


def test_content_hash_is_of_fields_in_record_order(tmp_path):
  first, second = {'prompt': 'é', 'completion': 'c'}, _PAIR
  a = [records.Record(first, 'a:1'), records.Record(second, 'a:2')]
  swapped = {'completion': 'c', 'prompt': 'é'}
  b = [records.Record(swapped, 'b:7'), records.Record(second, 'b:9')]
  assert records.content_hash(a) == records.content_hash(b)
  assert records.content_hash(a) != records.content_hash(a[::-1])
  assert records.content_hash(a) != records.content_hash(a[:1])
  # sha256 of '{"completion": "c", "prompt": "p"}\n', by another program.
  assert records.content_hash(a[1:]) == (
      '7952e28eab99348e15e577458da0e798128166ca099283cd25c3fa619ad43d4b')


def test_keep_fields():
  record = records.Record({'Slang': 'a', 'Description': 'b', 'Context': 'c'},
                          'f:2')
  kept = records.keep_fields(record, ('Slang', 'Description'))
  assert kept == records.Record({'Slang': 'a', 'Description': 'b'}, 'f:2')
  with pytest.raises(errors.UserError, match="f:2: no field 'Slagn'") as error:
    records.keep_fields(record, ('Slagn',))
  assert 'Slang' in str(error.value)


def test_without_validation_blank_text_stays(tmp_path):
  path = tmp_path / 'songs.jsonl'
  path.write_text('{"text": "", "poet": "x"}\n{"text": "la"}\n')
  with pytest.raises(errors.UserError, match='text is empty'):
    records.read(str(path))
  rows = records.read(str(path), validated=False)
  assert [r.fields.get('text') for r in rows] == ['', 'la']
