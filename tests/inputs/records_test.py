"""Every format reads back what was written; every mistake names its place."""

import csv
import json
import subprocess
import sys
import types

import conftest
import hypothesis
from hypothesis import strategies as st
import pytest

from gemma_sft import errors
from gemma_sft.inputs import records

_PAIR = {'prompt': 'p', 'completion': 'c'}
_TWO = {'prompt': 'a\u2028b\x85', 'completion': 'c'}
_LINE = json.dumps(_TWO, ensure_ascii=False)
_LONG = 'x' * 200_000  # The csv module takes 131,072 characters by default.
_text = st.text(
    st.characters(blacklist_categories=['Cs'], blacklist_characters='\0'),
    min_size=1).filter(str.strip)


def _write(folder, name, content):
  path = folder / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return str(path)


def _fields(source, **kwargs):
  return [record.fields for record in records.read(source, **kwargs)]


def _error(source, **kwargs):
  with pytest.raises(errors.UserError) as caught:
    records.read(source, **kwargs)
  return caught.value


@pytest.mark.parametrize(('name', 'content', 'fields', 'places'), [
    ('a.txt',  # Inner blank lines and indentation stay.
     '\n# INPUT\nfirst\n\nline \n\n# OUTPUT\n\n  def f() {\n\n  }\n\n'
     '# INPUT\nsecond\n# OUTPUT \n# a comment\n',
     [{'prompt': 'first\n\nline ', 'completion': '  def f() {\n\n  }'},
      {'prompt': 'second', 'completion': '# a comment'}], [':2', ':13']),
    ('a.txt',  # Windows line ends and a byte order mark.
     '# INPUT\r\na\r\nb\r\n# OUTPUT\r\nc\r\n'.encode('utf-8-sig'),
     [{'prompt': 'a\nb', 'completion': 'c'}], [':1']),
    ('a.txt', '\n春眠\n不覺曉\n \n\n  two\r\n',  # A record a paragraph.
     [{'text': '春眠\n不覺曉'}, {'text': '  two'}], [':2', ':6']),
    ('a.csv',  # Lines are counted, not rows.
     '\ufeffprompt,completion,n\n"a\nb","say ""x""",1\n\nc,"d,e",2\n',
     [{'prompt': 'a\nb', 'completion': 'say "x"', 'n': '1'},
      {'prompt': 'c', 'completion': 'd,e', 'n': '2'}], [':2', ':5']),
    ('a.csv', f'prompt,completion\np,{_LONG}\n',
     [{'prompt': 'p', 'completion': _LONG}], [':2']),
    ('a.tsv', 'prompt\tcompletion\na, b\tc\n',
     [{'prompt': 'a, b', 'completion': 'c'}], [':2']),
    ('a.json', json.dumps([_PAIR, _PAIR]), [_PAIR, _PAIR], ['[0]', '[1]']),
    ('a.json', json.dumps({'v': 1, 'data': [_PAIR, _PAIR]}), [_PAIR, _PAIR],
     ['[0]', '[1]']),
    # Split at line feeds only.
    ('a.jsonl', f'{_LINE}\r\n\n{_LINE}', [_TWO, _TWO], [':1', ':3']),
    # Without canonical fields they stay raw.
    ('a.jsonl', '{"slang": "W", "year": 2020}\n{"slang": "", "x": ["y", null]}',
     [{'slang': 'W', 'year': 2020}, {'slang': '', 'x': ['y', None]}],
     [':1', ':2']),
    # Numbers become strings only in canonical fields.
    ('a.json', '[{"prompt": 2, "completion": 0.5, "year": 2020}]',
     [{'prompt': '2', 'completion': '0.5', 'year': 2020}], ['[0]']),
    # A blank system text is dropped.
    ('a.csv', 'system,prompt,completion\nbe kind,p,c\n ,p,c\n',
     [{'system': 'be kind', **_PAIR}, _PAIR], [':2', ':3']),
    # An escaped backslash is not a NUL.
    ('a.jsonl', json.dumps({'text': '\\u0000 and \\\\u0000'}),
     [{'text': '\\u0000 and \\\\u0000'}], [':1'])],
                         ids=lambda value: str(value)[:20])
def test_formats(tmp_path, name, content, fields, places):
  path = _write(tmp_path, name, content)
  found = records.read(path)
  assert [record.fields for record in found] == fields
  assert [record.where for record in found] == [path + at for at in places]


def test_parquet_adds_no_column_from_the_folder_name(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  folder = tmp_path / 'lang=de'
  folder.mkdir()
  path = str(folder / 'a.parquet')
  conversation = [{'role': 'user', 'content': 'u', 'name': None},
                  {'role': 'assistant', 'content': 'm', 'name': None}]
  table = pyarrow.Table.from_pylist([{'messages': conversation, 'text': None}])
  parquet.write_table(table, path)
  turns = [{'role': 'user', 'content': 'u'}, {'role': 'model', 'content': 'm'}]
  assert records.read(path) == [
      records.Record({'messages': turns}, f'{path}[0]')]
  path = _write(tmp_path, 'a.parquet', 'hello')
  assert _error(path).got.startswith(f'{path}: Parquet file size is 5 bytes')


def test_array_record_of_json(tmp_path):
  pytest.importorskip('grain')
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
    ('pyarrow', 'a.parquet', 'pyarrow'), ('grain', 'a.array_record', 'grain'),
    ('tensorflow_datasets', 'tfds:name', 'tensorflow-datasets')])
def test_missing_libraries(tmp_path, monkeypatch, module, name, package):
  monkeypatch.setitem(sys.modules, module, None)
  error = _error(name if ':' in name else _write(tmp_path, name, 'x'))
  assert f'without the module {module!r}' in error.got
  assert f"pip install '{package}'" in error.fix


def test_import_is_light():
  code = ('import sys; from gemma_sft.inputs import records; assert not {'
          '"numpy", "jax", "pyarrow", "grain", "tensorflow_datasets",'
          '"tensorflow", "datasets"} & set(sys.modules)')
  subprocess.run([sys.executable, '-c', code], check=True, cwd=conftest.ROOT)


@hypothesis.given(
    pairs=st.lists(st.tuples(_text, _text), min_size=1, max_size=5),
    ending=st.sampled_from(['csv', 'tsv', 'jsonl', 'ascii.jsonl', 'json']))
@hypothesis.settings(deadline=None, max_examples=200)
def test_any_text_survives(tmp_path_factory, pairs, ending):
  expected = [{'prompt': p, 'completion': c} for p, c in pairs]
  path = tmp_path_factory.getbasetemp() / f'any.{ending}'
  with path.open('w', encoding='utf-8', newline='') as file:
    if ending in ('csv', 'tsv'):
      writer = csv.writer(file, delimiter=',' if ending == 'csv' else '\t')
      writer.writerows([('prompt', 'completion'), *pairs])
    elif ending == 'json':
      json.dump(expected, file, ensure_ascii=False)
    else:
      is_ascii = ending == 'ascii.jsonl'
      for fields in expected:
        file.write(json.dumps(fields, ensure_ascii=is_ascii) + '\n')
  assert _fields(str(path)) == expected


def test_options_of_reading(tmp_path):
  content = 'completion,prompt,sys\np,c,s\n'
  columns = {'prompt': 'completion', 'completion': 'prompt', 'note': 'sys'}
  path = _write(tmp_path, 'a.csv', content)
  assert _fields(path, columns=columns) == [{**_PAIR, 'note': 's'}]
  for name in ('b', 'a'):
    _write(tmp_path, f'{name}.jsonl', json.dumps({'text': name}))
  assert _fields(str(tmp_path / '*.jsonl')) == [{'text': 'a'}, {'text': 'b'}]
  # Without validation blank text stays.
  path = _write(tmp_path, 'a.jsonl', '{"text": "", "x": "y"}\n{"text": "la"}\n')
  assert 'text is empty' in _error(path).got
  assert _fields(path, validated=False) == [
      {'text': '', 'x': 'y'}, {'text': 'la'}]


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
    *(({'messages': messages}, got) for messages, got in (
        ('hi', "messages is 'hi'"), (['hi'], "messages[0] is 'hi'"),
        ([], 'messages has no model turn at its end'),
        (_turns('system'), 'no model turn at its end'),
        (_turns('user'), 'no model turn at its end'),
        (_turns('user', 'model', 'user'), 'no model turn'),
        (_turns('model'), "messages[0] has the role 'model' wh"),
        (_turns('user', 'user'),
         "messages[1] has the role 'user' where 'model' is due"),
        (_turns('user', 'system', 'model'),
         "messages[1] has the role 'system' where 'model' is due"),
        (_turns('system', 'system', 'user', 'model'),
         "messages[1] has the role 'system' where 'user' is due"),
        (_turns('user', 'tool'), "the role 'tool'"),
        ([{'from': 'human', 'value': 'x'}], "'from', 'value'"),
        ([{'role': 'user', 'content': ''}], 'messages[0].content is empty'),
        ([{**_turns('user')[0], 'tool_calls': [1]}],
         "messages[0] has 'role', 'content', 'tool_calls'")))])
def test_bad_record(tmp_path, fields, got):
  lines = [json.dumps(_PAIR), json.dumps(fields)]
  error = _error(_write(tmp_path, 'a.jsonl', '\n'.join(lines)))
  assert got in error.got
  assert 'a.jsonl:2: ' in error.got
  assert error.expected and error.fix


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


@pytest.mark.parametrize(('name', 'content', 'got', 'fix'), [
    ('a.txt', '\nhi\n# INPUT\na\n# OUTPUT\nb', '@:2: text before', 'above'),
    ('a.txt', '# INPUT\na\n# INPUT\nb\n# OUTPUT\nc', '@:1: no # OUT', 'Add'),
    ('a.txt', '# INPUT\na\n# OUTPUT\nb\n# INPUT\n', '@:5: no # OUT', 'Add'),
    ('a.txt', '# INPUT\na\n# OUTPUT\nb\n# OUTPUT\n',
     '@:5: no # INPUT before it', 'Add'),
    ('a.txt', '# INPUT\na\n# OUTPUT\nb\n\n# Input:\nc\n# OUTPUT\nd',
     "@:6: '# Input:' is almost a heading", 'jsonl'),
    ('a.txt', '#input\na\n', "@:1: '#input' is almost a heading", 'Correct'),
    ('a.txt', '# INPUT\na\n# OUTPUT\n\n', '@:1: completion is empty', 'Fill'),
    ('a.csv', 'prompt,completion\na,b\nc\n', '@:3: 1 cells', 'quotes'),
    ('a.csv', 'prompt,completion\n"a\n",b,c\n', '@:2: 3 cells', 'quotes'),
    ('a.csv', 'prompt,x,prompt\na,b,c\n', "@:1: the name 'prompt'", 'Rename'),
    ('a.csv', 'prompt,completion\na,b\nc,"d\n', '@:3: unexpected end', 'Close'),
    ('a.csv', 'prompt,completion\na,""\n', '@:2: completion is empty', 'Fill'),
    ('a.csv', 'prompt,completion\n', 'no records in @', 'Add'),
    ('a.jsonl', '', 'no records in @', 'Add'),
    ('a.json', '[]', 'no records in @', 'Add'),
    ('a.jsonl', '{"text": "a"}\n{"text" "b"}', '@:2: column 9: Exp', 'Corr'),
    ('a.jsonl', '{"text": "a", "text": "b"}', "@:1: the name 'text'", 'Corr'),
    ('a.jsonl', '\n["a"]', "@:2: ['a']", 'names'),
    ('a.json', '[\n {"text" "a"}\n]', '@:2: column 10: Expecting', 'Correct'),
    ('a.json', '{"text": "a"}\n{"text": "b"}', '@:2: column 1: E', 'jsonl'),
    ('a.json', '[{"a": 1, "a": 2}]', "@: the name 'a' appears", 'Keep one'),
    ('a.json', '{"a": [], "b": []}', '@: no list, or several', 'jsonl'),
    ('a.json', '[1]', '@[0]: 1', 'names'),
    ('a.jsonl', b'{}\n\xe9', '@:2: byte 0xE9 at byte offset 3', 'WINDOWS-1252'),
    ('a.txt', '春眠不覺曉'.encode('gb18030'),
     '@:1: byte 0xB4 at byte offset 0', 'GB18030'),
    ('a.csv', 'a,b'.encode('utf-16'), '@:1: byte 0xFF at byte', 'f UTF-16 -t'),
    ('a.txt', b'ab\nc\x00d', '@:2: byte 0x00 at byte offset 4', 'UTF-16'),
    ('a.docx', 'x', "@: unknown file ending 'docx'", 'jsonl')])
def test_bad_file(tmp_path, name, content, got, fix):
  path = _write(tmp_path, name, content)
  error = _error(path)
  assert got in error.got.replace(path, '@')
  assert fix in error.fix
  assert error.expected


@pytest.mark.parametrize(('source', 'options', 'got', 'expected', 'fix'), [
    ('trian.jsonl', {}, 'trian.jsonl does not exist', '',
     "Did you mean 'train.jsonl'?"),
    ('*.xml', {}, '*.xml does not exist', '', ''),
    ('dta/x/train.jsonl', {}, 'does not exist', '', "Did you mean 'data'?"),
    ('', {}, 'is a directory without dataset_info.json', '', '/*.jsonl'),
    ('', dict(format='jsonl'), 'is a directory', '', ''),
    ('x', dict(format='jsnl'), "'jsnl'", '', "'jsonl'"),
    ('a.csv', dict(columns={'prompt': 'qestion'}),
     "no column 'qestion' (for 'prompt')", "one of 'question', 'answer'",
     "Did you mean 'question'?"),
    # A record without a renamed column is a bad record.
    ('q.jsonl', dict(columns={'prompt': 'q'}),
     "q.jsonl:2: the fields are 'completion'", '', ''),
    ('b.csv', dict(columns={'prompt': 'question'}),
     "'question' would replace the 'prompt'", '', '')])
def test_bad_source(tmp_path, source, options, got, expected, fix):
  (tmp_path / 'data').mkdir()
  _write(tmp_path, 'train.jsonl', json.dumps(_PAIR))
  _write(tmp_path, 'a.csv', 'question,answer\np,c\n')
  _write(tmp_path, 'b.csv', 'prompt,completion,question\np,c,q\n')
  _write(tmp_path, 'q.jsonl',
         '{"q": "p", "completion": "c"}\n{"completion": "c"}')
  error = _error(str(tmp_path / source), **options)
  assert got in error.got and fix in error.fix
  assert expected in ('', error.expected)


def test_functions_of_records():
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
  record = records.Record({'Slang': 'a', 'Description': 'b', 'Context': 'c'},
                          'f:2')
  kept = records.keep_fields(record, ('Slang', 'Description'))
  assert kept == records.Record({'Slang': 'a', 'Description': 'b'}, 'f:2')
  with pytest.raises(errors.UserError, match="f:2: no field 'Slagn'") as error:
    records.keep_fields(record, ('Slagn',))
  assert 'Slang' in str(error.value)
  # Validation returns a new record.
  turns = _turns('system', 'user', 'assistant', 'user', 'model')
  turns[3]['content'] = 7
  record = records.Record({'messages': turns}, 'x:1')
  found = records.validate(record).fields['messages']
  roles = [turn['role'] for turn in found]
  assert roles == ['system', 'user', 'model', 'user', 'model']
  assert found[3]['content'] == '7'
  assert turns[2]['role'] == 'assistant'
