"""What outside input must not be able to do, unless another test covers it.

Covered elsewhere: the guard of the pages (serve_test), escaping in a browser
(rating_page_test, playground_test), hostile queries and scripts (sql_test),
hostile programs (blop_run_test), secrets in run.json, cards and uploads
(record_test, card_test, push_test, tracking_test), generated bad input of all
kinds (fuzz_test).
"""

import ast
import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time

import conftest
import local_server as serving
import pytest

from gemma_sft import cli
from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft import evaluate
from gemma_sft import export
from gemma_sft import train
from gemma_sft.inputs import readers
from gemma_sft.inputs import records as records_lib
from gemma_sft.tasks.blop import run_js
from gemma_sft.tasks.sql import cage
from gemma_sft.tasks.sql import task
from gemma_sft.tasks.sql import worker
from gemma_sft.weights import safetensors_file

_FILES = sorted(path for folder in ('gemma_sft', 'configs', 'data', 'launch')
                for path in (conftest.ROOT / folder).rglob('*.py'))
# Modules that make objects or code from bytes.
_MODULES = {
    'pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'marshal', 'shelve',
    'jsonpickle', 'xmlrpc', 'code', 'codeop', 'tarfile', 'zipfile'}
_CALLS = {'eval', 'exec', 'compile', '__import__', 'breakpoint', 'os.system',
          'os.popen', 'tempfile.mktemp', 'yaml.load', 'yaml.unsafe_load',
          'torch.load', 'pandas.read_pickle', 'shutil.unpack_archive',
          'subprocess.getoutput', 'subprocess.getstatusoutput'}
_METHODS = {'extractall', 'enable_load_extension'}
_ARGUMENTS = {'shell', 'allow_pickle', 'trust_remote_code'}
_ALLOWED = {
    # Names of an entry point, of the library, and of a task in the folder.
    ('gemma_sft/cli.py', 'import_module'),
    ('gemma_sft/model.py', 'import_module'),
    ('gemma_sft/tasks/__init__.py', 'import_module'),
    # A notebook unpacks the project itself.
    ('launch/kaggle/notebooks.py', 'shutil.unpack_archive')}


def _dotted(node):
  if isinstance(node, ast.Attribute):
    return f'{_dotted(node.value)}.{node.attr}'
  return node.id if isinstance(node, ast.Name) else ''


def _findings(tree):
  """Yields (line, call or import) that may run or unpack outside input."""
  for node in ast.walk(tree):
    if isinstance(node, (ast.Import, ast.ImportFrom)):
      imported = [alias.name for alias in node.names]
      if isinstance(node, ast.ImportFrom):
        imported = [node.module or '']
      for name in imported:
        if name.partition('.')[0] in _MODULES:
          yield node.lineno, f'import {name}'
    elif isinstance(node, ast.Call):
      name = _dotted(node.func)
      if name in _CALLS or name.rpartition('.')[2] in _METHODS:
        yield node.lineno, name
      if name.endswith('import_module'):
        yield node.lineno, 'import_module'
      for keyword in node.keywords:
        if keyword.arg in _ARGUMENTS and not (
            isinstance(keyword.value, ast.Constant)
            and keyword.value.value is False):
          yield node.lineno, f'{keyword.arg}='


def test_no_code_or_object_is_made_of_outside_input():
  assert len(_FILES) > 100
  assert not [
      (path, line, what) for path in _FILES
      for line, what in _findings(ast.parse(path.read_text(encoding='utf-8')))
      if (str(path.relative_to(conftest.ROOT)), what) not in _ALLOWED]


@pytest.mark.parametrize('source', [
    'import pickle', 'from marshal import loads', 'eval(x)', 'exec(x)',
    'os.system(x)', 'run(x, shell=True)', 'run(x, shell=y)', 'yaml.load(x)',
    'np.load(x, allow_pickle=True)', 'load(x, trust_remote_code=True)',
    'a.b.extractall(x)', 'import tarfile', 'importlib.import_module(x)'])
def test_what_would_be_found(source):
  assert list(_findings(ast.parse(source)))


def test_bandit_finds_nothing():
  pytest.importorskip('bandit')
  done = subprocess.run(
      [sys.executable, '-m', 'bandit', '-q', '-c', 'bandit.yaml', '-r',
       'gemma_sft', 'configs', 'launch', '-f', 'json'],
      cwd=conftest.ROOT, capture_output=True, text=True)
  found = json.loads(done.stdout)
  assert not found['errors'] and not found['results']


@pytest.mark.parametrize('name', [
    '../other.safetensors', '/etc/passwd', 'sub/a.safetensors', '..', '',
    'a.safetensors\0', 'ä.safetensors', 7, None])
def test_an_index_names_files_of_its_folder_alone(tmp_path, name):
  (tmp_path / 'other.safetensors').write_bytes(b'')
  folder = tmp_path / 'model'
  folder.mkdir()
  (folder / 'config.json').write_text('{}')
  (folder / safetensors_file.INDEX).write_text(json.dumps(
      {'weight_map': {'model.norm.weight': name}}))
  with pytest.raises(errors.UserError, match='it lists the file'):
    safetensors_file.open_folder(folder)


def _sql_record(folder, db_id):
  return records_lib.Record(
      {'question': 'q', 'query': 'SELECT 1', 'db_id': db_id},
      str(folder / 'train.jsonl:1'))


@pytest.mark.parametrize('db_id', [
    '../secret', '..', '/etc/passwd', 'a/../../secret', '', 'a\0', '.',
    ['a'], {'a': 1}])
def test_a_database_lies_below_its_data(tmp_path, db_id):
  secret = tmp_path / 'secret'
  secret.mkdir()
  with contextlib.closing(sqlite3.connect(secret / 'secret.sqlite')) as other:
    other.execute('CREATE TABLE t (a)')
  (tmp_path / 'data' / 'database').mkdir(parents=True)
  with pytest.raises(errors.UserError, match='train.jsonl:1'):
    task.to_messages(_sql_record(tmp_path / 'data', db_id))


@pytest.mark.parametrize('ending, data', [
    ('sqlite', b'garbage' * 100), ('sqlite', b''),
    ('sql', b'\xff\xfeC\0'), ('sql', b'CREATE TABLE t (a)\0'),
    ('sql', b'x' * 2000)])
def test_a_database_that_is_none_is_named(tmp_path, ending, data):
  folder = tmp_path / 'database' / 'a'
  folder.mkdir(parents=True)
  (folder / f'a.{ending}').write_bytes(data)
  if data:
    with pytest.raises(errors.UserError, match=r'train.jsonl:1|a\.sql:1'):
      task.to_messages(_sql_record(tmp_path, 'a'))
  else:  # For SQLite an empty file is a database without tables.
    assert task.to_messages(_sql_record(tmp_path, 'a'))


def test_the_schema_of_a_database_is_no_way_out(tmp_path):
  path = tmp_path / 'a.sqlite'
  with contextlib.closing(sqlite3.connect(path)) as connection:
    connection.executescript("""
        CREATE TABLE t (a); INSERT INTO t VALUES (1);
        CREATE VIEW endless AS WITH RECURSIVE n(i) AS (
            SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n;
        CREATE VIEW loads AS SELECT load_extension('x') AS a;
        CREATE TABLE g (a, b AS (hex(zeroblob(2000000))));
        INSERT INTO g (a) VALUES (1);
        CREATE TRIGGER r AFTER INSERT ON t BEGIN DELETE FROM t; END;""")
  before = path.read_bytes()
  queries = {
      'SELECT count(*) FROM endless': 'stopped after',
      'SELECT a FROM loads': 'load_extension',
      'SELECT b FROM g': 'too big|zeroblob',
      'PRAGMA writable_schema = 1': 'not a SELECT',
      'WITH x AS (SELECT 1) INSERT INTO t VALUES (2)': 'not authorized',
      "SELECT * FROM pragma_database_list": 'not authorized',
      "SELECT format('%900000000d', 1)": 'format'}
  answers = worker.run_all(
      [{'path': str(path), 'query': query} for query in queries]
      + [{'path': str(path), 'query': 'SELECT a FROM t'}])
  for (query, reasons), answer in zip(queries.items(), answers):
    assert any(r in answer['error'] for r in reasons.split('|')), (
        query, answer)
  assert answers[-1]['rows'] == [[1]]
  assert path.read_bytes() == before
  assert os.listdir(tmp_path) == ['a.sqlite']


def test_a_pragma_in_a_script_does_nothing(tmp_path):
  script = ("PRAGMA writable_schema = 1; CREATE TABLE t (a);"
            f"PRAGMA temp_store_directory = '{tmp_path}';"
            'PRAGMA hard_heap_limit = 0')
  with contextlib.closing(cage.build(script)) as connection:
    with pytest.raises(sqlite3.DatabaseError, match='not authorized'):
      connection.execute('PRAGMA writable_schema')
    with pytest.raises(sqlite3.DatabaseError):
      connection.execute("UPDATE sqlite_master SET sql = 'x'")


def test_a_script_cannot_compare_for_minutes():
  # Each instr() is a single step of SQLite, of as many comparisons as the
  # product of two lengths: 10^11 for texts of the cage's longest values.
  text = 'a' * 400_000
  start = time.process_time()
  with pytest.raises(sqlite3.Error, match='too big'):
    cage.build('CREATE TABLE t (a); INSERT INTO t VALUES'
               f" (instr('{text}', '{text[1:]}b'))")
  assert time.process_time() - start < 1


_SHOWS = ("function Hi(a) {{ return blop.h('p', {{}}, ['' + ({})]) }}\n"
          'module.exports = {{ Hi }};')
# Programs that try to reach the host: its environment, constructors of an async
# function and of a generator, a stack, WebAssembly, waiting, a flood of output,
# an internal binding, a prototype.
_PROGRAMS = [
    "typeof process === 'undefined' ? 'none' : process.env.SECRET_OF_THE_HOST",
    "(async () => {}).constructor('return globalThis')()",
    "(function* () {}).constructor('yield globalThis')().next().value",
    '(() => { Error.prepareStackTrace = (e, s) => s.map((f) => f.getThis() &&'
    ' f.getThis().process); return new Error().stack })()',
    'typeof WebAssembly.compile(new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0]))'
    '.then',
    'Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1e9)',
    "(() => { for (let i = 0; i < 1e7; i++) console.log('x'.repeat(1000));"
    " return 'done' })()",
    "process.binding('fs')",
    "(() => { ({}).constructor.prototype.cage = 'forged'; return 'fine' })()"]


@pytest.mark.skipif(shutil.which('node') is None, reason='no Node.js')
def test_programs_that_look_for_the_host(monkeypatch, tmp_path):
  monkeypatch.setenv('SECRET_OF_THE_HOST', 'SENTINEL')
  reference = {
      'js': "function Hi(a) { return blop.h('p', {}, [a.name]); }\n"
            'module.exports = { Hi };', 'names': ['Hi']}
  start = time.monotonic()
  outcomes = run_js.run([
      run_js.ProgramPair(reference, {'js': _SHOWS.format(js), 'names': {}})
      for js in _PROGRAMS])
  # Each program has at most 4 and 10 s of processor time.
  assert time.monotonic() - start < 60 * len(_PROGRAMS)
  for program, lines in zip(_PROGRAMS, outcomes, strict=True):
    text = json.dumps(lines)
    assert 'SENTINEL' not in text and len(text) < 2_000_000, program
    assert '[object process]' not in text, program
    # The reference was traced first and is unaffected.
    shown = lines[1]['traces']['Hi']['runs'][0]['tree'][3]
    assert shown == ['name_1'], program


def test_no_other_site_is_let_in():
  client = serving.make_client(serving.rating_app(None))
  origin = {'origin': 'http://evil.example'}
  asked = client.options('/api/rate', headers={
      **origin, 'access-control-request-method': 'POST'})
  assert asked.status_code == 405
  for answer in (asked, client.get('/', headers=origin)):
    assert not [h for h in answer.headers if h.startswith('access-control')]
  source = (conftest.ROOT / 'gemma_sft' / 'serve.py').read_text()
  assert "'host', '127.0.0.1'" in source  # Loopback is the default.


@pytest.mark.parametrize('header, value, status', [
    # Each of them once ended in a traceback.
    ('host', '[', 403), ('host', '[::1', 403), ('origin', 'http://[', 403),
    ('content-length', '9' * 5000, 413), ('content-length', '\u00b2', 413)])
def test_headers_that_do_not_parse(header, value, status):
  client = serving.make_client(serving.rating_app(None))
  answer = client.post(
      '/api/undo', content=b'{}', headers={
          'content-type': 'application/json', header: value.encode('latin-1')})
  assert answer.status_code == status


_SECRETS = {'HF_TOKEN': 'hf_' + 'Zq7' * 10, 'WANDB_API_KEY': 'wb' * 20,
            'KAGGLE_KEY': '0123456789abcdef' * 2, 'MY_OWN_KEY': 'Xy9' * 8}


def test_no_file_of_a_run_holds_a_secret(
    run_config, tmp_path, monkeypatch, capfd):
  """Through training, evaluation with its page, and export with its card."""
  for name, value in _SECRETS.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(sys, 'argv', ['train', *(
      f'--note={value}' for value in _SECRETS.values())])
  run_config.train.steps = 2
  run_config.eval.max_new_tokens = 4
  workdir = tmp_path / 'w'
  assert train.main(run_config, str(workdir), False) == 0
  assert evaluate.main(
      None, str(workdir), base=False, split='validation', step=-1, limit=2) == 0
  assert export.main(
      None, str(workdir), f'{workdir}/out', ['peft'], base=False, step=-1,
      hf_dtype='float32', shard_size=2.0, runtime_python='/nowhere',
      llama_server=None, allow_unproven=True, overwrite=False, push=[],
      push_data='', private=False, dry_run=False) == 0
  texts, names = [*capfd.readouterr()], set()
  for path in workdir.rglob('*'):
    if path.is_file():
      names.add(path.name)
      texts.append(path.read_bytes().decode('latin-1'))
  assert {'run.json', 'config.json', 'report.html', 'README.md',
          'export.json'} <= names
  for value in _SECRETS.values():
    assert not [text[:200] for text in texts if value in text]


def test_a_key_in_the_config_is_refused_without_being_shown(config):
  config.track.wandb = 'ab12' * 10
  with pytest.raises(errors.UserError) as error:
    config_lib.validate(config)
  assert 'ab12ab12' not in str(error.value)


def test_json_that_is_none_is_named(tmp_path):
  for text in ('{"lora', '[]', '[' * 5000, '{"lora": 3}'):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(errors.UserError, match='config.json'):
      cli.load_run_config(str(tmp_path))
  for name in ('a.json', 'a.jsonl'):
    (tmp_path / name).write_text('[' * 100_000)
    with pytest.raises(errors.UserError, match='too deep'):
      records_lib.read(str(tmp_path / name))
  assert readers.CANONICAL == records_lib.CANONICAL
