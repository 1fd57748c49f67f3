"""Uploads with the real clients, against small servers of this process."""

import base64
import contextlib
import http.server
import json
import pathlib
import re
import socket
import sys
import threading
import time

import huggingface_hub
from huggingface_hub import constants
import pytest

from gemma_sft import errors
from gemma_sft.exports import push

_TOKEN = 'hf_' + 'aB3' * 12
_KEY = '0123456789abcdef' * 2


class _Service(http.server.ThreadingHTTPServer):
  """Answers from `answers`, {'METHOD pattern': (status, answer)}.

  The first that matches counts; an answer is JSON, or a function of the body
  that returns it, or None to hang up. `requests` has (method, path, headers,
  body).
  """

  def __init__(self, answers):
    self.answers, self.requests = answers, []
    super().__init__(('127.0.0.1', 0), _Handler)

  @property
  def url(self):
    return f'http://127.0.0.1:{self.server_address[1]}'

  def named(self, pattern):
    """Returns (path, parsed body) of the requests that match."""
    found = []
    for method, path, headers, body in self.requests:
      if re.search(pattern, f'{method} {path}'):
        kind = {k.lower(): v for k, v in headers.items()}.get('content-type')
        found.append(
            (path, json.loads(body) if kind == 'application/json' else body))
    return found


class _Handler(http.server.BaseHTTPRequestHandler):

  def _answer(self):
    length = self.headers.get('Content-Length')
    body = self.rfile.read(int(length)) if length else b''
    if self.headers.get('Transfer-Encoding') == 'chunked':
      while size := int(self.rfile.readline(), 16):
        body += self.rfile.read(size)
        self.rfile.readline()
      self.rfile.readline()
    service = self.server
    service.requests.append(
        (self.command, self.path, dict(self.headers), body))
    status, answer = next(
        (answer for pattern, answer in service.answers.items()
         if re.search(pattern, f'{self.command} {self.path}')),
        (404, {'error': f'unknown {self.path}'}))
    if answer is None:
      self.close_connection = True
      return
    if callable(answer):
      answer = answer(body)
    content = json.dumps(answer).encode()
    self.send_response(status)
    self.send_header('Content-Type', 'application/json')
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(content)

  do_GET = do_POST = do_PUT = do_HEAD = _answer

  def log_message(self, *_):
    """Keeps quiet: the tests look at what is printed."""


@contextlib.contextmanager
def _serving(answers):
  with _Service(answers) as service:
    thread = threading.Thread(target=service.serve_forever, args=(0.01,))
    thread.start()
    try:
      yield service
    finally:
      service.shutdown()
      thread.join()


def _closed_port():
  with socket.socket() as one:
    one.bind(('127.0.0.1', 0))
    return f'http://127.0.0.1:{one.getsockname()[1]}'


@pytest.fixture
def export(tmp_path):
  """A finished export with a file of each kind."""
  folder = tmp_path / 'blop'
  for name in ('hf/config.json', 'hf/model-00001-of-00002.safetensors',
               'peft/adapter_config.json', 'gguf/model-q8_0.gguf',
               'gguf/Modelfile', 'README.md', 'export.json'):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'content of {name}')
  return folder


@pytest.fixture(autouse=True)
def _no_login(monkeypatch, tmp_path):
  """Nobody is logged in anywhere, and no cache of the machine is touched."""
  home = tmp_path / 'home'
  home.mkdir()
  monkeypatch.setenv('HOME', str(home))
  monkeypatch.setenv('KAGGLE_CONFIG_DIR', str(home / '.kaggle'))
  for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'HF_OIDC_RESOURCE',
               'KAGGLE_USERNAME', 'KAGGLE_KEY', 'KAGGLE_API_TOKEN',
               'KAGGLE_KERNEL_RUN_TYPE', 'KAGGLE_API_ENVIRONMENT'):
    monkeypatch.delenv(name, raising=False)
  for name in ('HF_TOKEN_PATH', 'HF_STORED_TOKENS_PATH',
               'AGENT_HARNESSES_PATH'):
    monkeypatch.setattr(constants, name, str(home / name))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
  # Large files by plain HTTP: Xet's protocol is more than a test can speak.
  monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
  monkeypatch.setattr(constants, 'ENDPOINT', _closed_port())


def _failure(*arguments, **options):
  with pytest.raises(errors.UserError) as caught:
    push.push(*arguments, **options)
  # The client's own error, which may hold the token, is not shown with it.
  assert caught.value.__cause__ is None
  assert caught.value.__suppress_context__ or not caught.value.__context__
  return str(caught.value)


# Targets ----------------------------------------------------------------------


@pytest.mark.parametrize('text, service, name', [
    ('org/name', 'huggingface', 'org/name'),
    ('Some-Org/gemma-3.1_blop', 'huggingface', 'Some-Org/gemma-3.1_blop'),
    ('kaggle:owner/model', 'kaggle', 'owner/model'),
    ('kaggle:owner/model/gguf/small', 'kaggle', 'owner/model/gguf/small'),
])
def test_targets(text, service, name):
  target = push.parse_target(text)
  assert target == push.Target(service, name)
  assert push.hub_repository([push.Target('kaggle', 'a/b'), target]) == (
      name if service == 'huggingface' else '')


@pytest.mark.parametrize('text', [
    '', 'name', 'a/b/c', 'a/b/c/d', '/name', 'org/', 'org/na me', 'org/name\n',
    'https://huggingface.co/org/name', '../name', 'org/.name', 'org/name.',
    'kaggle:model', 'kaggle:a/b/c', 'kaggle:a/b/c/d/5', 'kaggle:a/b.c',
    'hf:org/name'])
def test_wrong_targets(text):
  with pytest.raises(errors.UserError, match='expected: ORGANISATION/NAME'):
    push.parse_target(text)


def test_a_token_in_the_target_is_not_repeated():
  with pytest.raises(errors.UserError) as caught:
    push.parse_target(f'{_TOKEN}@org/name')
  assert _TOKEN not in str(caught.value)


# The Hugging Face Hub ---------------------------------------------------------


def _modes(body):
  # As the real one does: weights are large files, texts are not.
  return {'files': [
      {'path': f['path'], 'shouldIgnore': False, 'oid': None, 'uploadMode':
       'lfs' if f['path'].endswith(('.gguf', '.safetensors')) else 'regular'}
      for f in json.loads(body)['files']]}


def _hub(url, left=()):
  """Returns the answers of a Hub whose repositories hold the files `left`."""
  def batch(body):
    return {'transfer': 'basic', 'objects': [
        {'oid': o['oid'], 'size': o['size'],
         'actions': {'upload': {'href': f'{url()}/storage/{o["oid"]}'}}}
        for o in json.loads(body)['objects']]}

  return {
      r'GET /api/whoami-v2': (200, {'name': 'alice', 'type': 'user'}),
      r'POST /api/repos/create': (200, lambda body: {
          'url': f'{url()}/org/{json.loads(body)["name"]}'}),
      r'POST /api/validate-yaml': (200, {}),
      r'GET /api/models/org/blop$|/api/models/org/blop/tree': (200, [
          {'type': 'file', 'path': name, 'size': 1, 'oid': 'a' * 40}
          for name in left]),
      r'POST /api/\w+/org/[\w-]+/preupload/main': (200, _modes),
      r'POST .*/info/lfs/objects/batch': (200, batch),
      r'PUT /storage/': (200, {}),
      r'POST /api/\w+/org/[\w-]+/commit/main': (200, {
          'commitUrl': 'https://huggingface.co/org/blop/commit/1',
          'commitOid': '1'}),
  }


@contextlib.contextmanager
def _hub_serving(monkeypatch, changes=None, left=()):
  services = []
  changes = changes or {}
  # The changes first, also where they replace an answer.
  answers = changes | _hub(lambda: services[0].url, left) | changes
  with _serving(answers) as service:
    services.append(service)
    monkeypatch.setattr(constants, 'ENDPOINT', service.url)
    monkeypatch.setenv('HF_TOKEN', _TOKEN)
    yield service


def _committed(service, repository):
  """Returns ({path: content}, deleted paths) of its one commit."""
  (_, body), = service.named(f'/{repository}/commit/')
  stored = {path.rpartition('/')[2]: content
            for path, content in service.named('PUT /storage/')}
  files, deleted = {}, []
  for line in map(json.loads, filter(None, body.split(b'\n'))):
    value = line['value']
    if line['key'] == 'file':
      files[value['path']] = base64.b64decode(value['content']).decode()
    elif line['key'] == 'lfsFile':
      files[value['path']] = stored[value['oid']].decode()
    elif line['key'] == 'deletedFile':
      deleted.append(value['path'])
  return files, deleted


def test_an_export_on_the_hub(monkeypatch, export, capfd):
  with _hub_serving(monkeypatch) as service:
    url = push.push(export, push.parse_target('org/blop'))
  assert url == f'{service.url}/org/blop'
  (_, created), = service.named('repos/create')
  assert (created['organization'], created['name']) == ('org', 'blop')
  assert created.get('visibility') != 'private'
  files, deleted = _committed(service, 'blop')
  assert files == {
      'config.json': 'content of hf/config.json',
      'model-00001-of-00002.safetensors':
          'content of hf/model-00001-of-00002.safetensors',
      'peft/adapter_config.json': 'content of peft/adapter_config.json',
      'gguf/model-q8_0.gguf': 'content of gguf/model-q8_0.gguf',
      'gguf/Modelfile': 'content of gguf/Modelfile',
      'README.md': 'content of README.md',
      'export.json': 'content of export.json'}
  assert not deleted
  assert not service.named('/api/datasets/')
  # The login: in one header, for the Hub alone, and nowhere else.
  for method, path, headers, body in service.requests:
    assert _TOKEN not in path and _TOKEN.encode() not in body
    for name, value in headers.items():
      assert _TOKEN not in value or name.lower() == 'authorization'
    if path.startswith('/storage/'):
      assert _TOKEN not in str(headers)
    elif path.startswith('/api/') and 'harness' not in path:
      assert headers['authorization' if 'authorization' in headers
                     else 'Authorization'] == f'Bearer {_TOKEN}', method
  printed = capfd.readouterr()
  assert _TOKEN not in printed.out + printed.err


def test_the_data_set_beside_it(monkeypatch, export, tmp_path):
  (tmp_path / 'train.txt').write_text('# INPUT')
  with _hub_serving(monkeypatch) as service:
    push.push(
        export, push.parse_target('org/blop'), private=True,
        data_files=[str(tmp_path / 'train.txt')], data_card='its card')
  created = [body for _, body in service.named('repos/create')]
  assert {(c['name'], c.get('type', 'model'), c['visibility'])
          for c in created} == {('blop', 'model', 'private'),
                                ('blop-data', 'dataset', 'private')}
  assert _committed(service, 'blop-data')[0] == {
      'train.txt': '# INPUT', 'README.md': 'its card'}
  assert 'train.txt' not in _committed(service, 'blop')[0]


def test_weights_of_an_earlier_export_go(monkeypatch, export, capsys):
  left = ['README.md', 'config.json', 'gguf/model-f16.gguf',
          'model-00001-of-00002.safetensors',
          'model-00002-of-00002.safetensors', 'peft/adapter_model.safetensors',
          'picture.png', 'notes/gguf/a.txt']
  with _hub_serving(monkeypatch, left=left) as service:
    push.push(export, push.parse_target('org/blop'))
  _, deleted = _committed(service, 'blop')
  # What it brings itself and what is not an export's stays.
  assert deleted == ['gguf/model-f16.gguf', 'model-00002-of-00002.safetensors',
                     'peft/adapter_model.safetensors']
  assert 'gguf/model-f16.gguf' in capsys.readouterr().out


def test_no_login(export):
  text = _failure(export, push.parse_target('org/blop'))
  assert text.startswith('no login for the Hugging Face Hub')
  assert 'HF_TOKEN' in text and 'hf auth login' in text


def _contents(folder):
  return {path: path.read_bytes() for path in folder.rglob('*')
          if path.is_file()}


def test_no_network(monkeypatch, export, capfd):
  monkeypatch.setenv('HF_TOKEN', _TOKEN)
  before = _contents(export)
  text = _failure(export, push.parse_target('org/blop'))
  first, *_ = text.split('\n')
  assert first == ('the Hugging Face Hub cannot be reached ([Errno 111]'
                   f' Connection refused); the files stay in {export}')
  assert _contents(export) == before
  assert _TOKEN not in text + ''.join(capfd.readouterr())


def test_offline_mode(monkeypatch, export):
  monkeypatch.setenv('HF_TOKEN', _TOKEN)
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  text = _failure(export, push.parse_target('org/blop'))
  assert 'cannot be reached' in text and 'HF_HUB_OFFLINE' in text


def test_a_network_that_goes_away(monkeypatch, export):
  monkeypatch.setattr(time, 'sleep', lambda _: None)  # The client's retries.
  changes = {'POST .*/preupload/': (200, None)}
  with _hub_serving(monkeypatch, changes) as service:
    text = _failure(export, push.parse_target('org/blop'))
  assert 'the Hugging Face Hub cannot be reached' in text
  assert len(service.named('preupload')) > 1 and not service.named('/commit/')


@pytest.mark.parametrize('status, where, expected', [
    (401, 'GET /api/whoami-v2', 'refused, no valid login'),
    (403, 'POST /api/repos/create', 'refused, no right to write there'),
    (403, 'POST .*/commit/', 'refused, no right to write there'),
    (400, 'POST .*/commit/', 'the Hugging Face Hub: '),
])
def test_what_the_hub_refuses(monkeypatch, export, status, where, expected):
  # The worst server: its message repeats the login.
  answer = {'error': f'no, not with Bearer {_TOKEN} or {_TOKEN}'}
  with _hub_serving(monkeypatch, {where: (status, answer)}) as service:
    text = _failure(export, push.parse_target('org/blop'))
  assert expected in text.split('\n')[0]
  assert f'the files stay in {export}' in text.split('\n')[0]
  assert _TOKEN not in text
  # Nothing is made with a login that is not accepted.
  assert bool(service.named('repos/create')) == ('whoami' not in where)


def test_a_login_of_an_unknown_shape_is_scrubbed(monkeypatch, export):
  token = 'of-no-known-shape'
  answer = {'error': f'no {token}'}
  with _hub_serving(monkeypatch, {'POST .*/commit/': (400, answer)}):
    # From the client's file: no variable holds it.
    monkeypatch.delenv('HF_TOKEN')
    pathlib.Path(constants.HF_TOKEN_PATH).write_text(token)
    text = _failure(export, push.parse_target('org/blop'))
  assert 'no [removed]' in text and token not in text


def test_a_token_in_the_files_is_not_published(monkeypatch, export):
  (export / 'export.json').write_text(f'{{"token": "{_TOKEN}"}}')
  with _hub_serving(monkeypatch) as service:
    text = _failure(export, push.parse_target('org/blop'))
  assert text.startswith('export.json contains the token')
  assert _TOKEN not in text
  assert not service.requests


def test_the_client_keeps_its_own_timeouts(monkeypatch, export):
  with _hub_serving(monkeypatch):
    push.push(export, push.parse_target('org/blop'))
  assert huggingface_hub.get_session().timeout.read is None


def test_timeouts_of_the_login(monkeypatch, export):
  seen = []
  whoami = huggingface_hub.HfApi.whoami

  def spy(self):
    seen.append(huggingface_hub.get_session().timeout)
    return whoami(self)

  monkeypatch.setattr(huggingface_hub.HfApi, 'whoami', spy)
  with _hub_serving(monkeypatch):
    push.push(export, push.parse_target('org/blop'))
  timeout, = seen
  assert (timeout.connect, timeout.read) == (10, 30)


def test_nothing_to_upload(tmp_path, monkeypatch):
  monkeypatch.setenv('HF_TOKEN', _TOKEN)
  for folder in (tmp_path / 'none', tmp_path / 'empty'):
    (tmp_path / 'empty').mkdir(exist_ok=True)
    for target in ('org/blop', 'kaggle:owner/blop'):
      if target[0] == 'k':
        pytest.importorskip('kagglehub')
      with pytest.raises(errors.UserError, match='a finished export'):
        push.push(folder, push.parse_target(target))


def test_two_files_for_one_place(export):
  (export / 'hf' / 'README.md').write_text('another')
  with pytest.raises(errors.UserError, match=r'README\.md is there and in hf/'):
    push.push(export, push.parse_target('org/blop'))


@pytest.mark.parametrize('names', [
    ['a/train.txt', 'b/train.txt'], ['a/README.md'], ['a/none.txt']])
def test_data_files_that_cannot_be_laid_out(export, tmp_path, names):
  for name in ('a/train.txt', 'b/train.txt', 'a/README.md'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('x')
  with pytest.raises(errors.UserError, match='files of the data set'):
    push.push(export, push.parse_target('org/blop'),
              data_files=[str(tmp_path / name) for name in names])


def test_a_missing_client(monkeypatch, export):
  monkeypatch.setitem(sys.modules, 'kagglehub', None)
  with pytest.raises(errors.UserError, match='not installed') as caught:
    push.push(export, push.parse_target('kaggle:owner/blop'))
  assert "pip install 'gemma_sft[push]'" in str(caught.value)


# Kaggle -----------------------------------------------------------------------


def _kaggle():
  return {
      'HEAD /': (200, {}),
      'DiagnosticsService/Hello': (200, {'userName': 'alice'}),
      'ModelApiService/GetModel$': (404, {'code': 404, 'message': 'none'}),
      'ModelApiService/CreateModel$': (200, {}),
      'ModelApiService/CreateModelInstance$': (200, {}),
      'DatasetApiService/CreateDataset$': (200, {}),
      'PUT /storage/': (200, {}),
  }


@contextlib.contextmanager
def _kaggle_serving(monkeypatch, changes=None):
  pytest.importorskip('kagglehub')
  from kagglesdk import kaggle_env

  services = []

  def start(body):
    name = json.loads(body)['name']
    token = f'{len(services[0].named("StartBlobUpload"))}-{name}'
    return {'token': token, 'createUrl': f'{services[0].url}/storage/{token}'}

  changes = changes or {}
  answers = (changes | _kaggle() | {'StartBlobUpload': (200, start)}) | changes
  with _serving(answers) as service:
    services.append(service)
    # The client's only way to another server of ours: its table of them.
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD,
                        service.url)
    monkeypatch.setenv('KAGGLE_USERNAME', 'alice')
    monkeypatch.setenv('KAGGLE_KEY', _KEY)
    yield service


def _tree(folder, stored):
  files = {}
  for file in folder.get('files', []):
    token = file['token']
    files[token.partition('-')[2]] = stored[token].decode()
  for inner in folder.get('directories', []):
    for name, content in _tree(inner, stored).items():
      files[f'{inner["name"]}/{name}'] = content
  return files


def _uploaded(service, pattern):
  """Returns [(request, {path: content})] of what has been made."""
  stored = {path.rpartition('/')[2]: content
            for path, content in service.named('PUT /storage/')}
  return [(body, _tree(body.get('body', body), stored))
          for _, body in service.named(pattern)]


def test_an_export_on_kaggle(monkeypatch, export, capfd):
  with _kaggle_serving(monkeypatch) as service:
    url = push.push(export, push.parse_target('kaggle:owner/blop'))
  assert url == 'https://www.kaggle.com/models/owner/blop'
  # Asked with a timeout, which the client's own requests do not have.
  assert service.requests[0][:2] == ('HEAD', '/')
  made = {body['body']['instanceSlug']: (body, files)
          for body, files in _uploaded(service, 'CreateModelInstance$')}
  shared = {'README.md': 'content of README.md',
            'export.json': 'content of export.json'}
  assert {name: files for name, (_, files) in made.items()} == {
      'merged': shared | {
          'config.json': 'content of hf/config.json',
          'model-00001-of-00002.safetensors':
              'content of hf/model-00001-of-00002.safetensors'},
      'adapter': shared | {
          'adapter_config.json': 'content of peft/adapter_config.json'},
      'llama-cpp': shared | {
          'model-q8_0.gguf': 'content of gguf/model-q8_0.gguf',
          'Modelfile': 'content of gguf/Modelfile'}}
  for name, framework in (('merged', 'TRANSFORMERS'),
                          ('adapter', 'TRANSFORMERS'), ('llama-cpp', 'GGUF')):
    body, _ = made[name]
    assert (body['ownerSlug'], body['modelSlug']) == ('owner', 'blop')
    assert framework in body['body']['framework'].upper()
  login = base64.b64encode(f'alice:{_KEY}'.encode()).decode()
  for _, path, headers, body in service.requests:
    assert _KEY not in path and _KEY.encode() not in body
    for name, value in headers.items():
      assert name == 'Authorization' or (
          _KEY not in value and login not in value)
  assert _KEY not in ''.join(capfd.readouterr())


def test_one_variation_of_ones_own(monkeypatch, export):
  with _kaggle_serving(monkeypatch) as service:
    push.push(export, push.parse_target('kaggle:owner/blop/other/all'))
  (body, files), = _uploaded(service, 'CreateModelInstance$')
  assert body['body']['instanceSlug'] == 'all'
  assert {'config.json', 'gguf/Modelfile', 'peft/adapter_config.json',
          'README.md'} < files.keys()


def test_the_data_set_on_kaggle(monkeypatch, export, tmp_path):
  (tmp_path / 'train.txt').write_text('# INPUT')
  with _kaggle_serving(monkeypatch) as service:
    push.push(export, push.parse_target('kaggle:owner/blop/gguf/all'),
              data_files=[str(tmp_path / 'train.txt')], data_card='its card')
  (body, files), = _uploaded(service, 'CreateDataset$')
  assert (body['ownerSlug'], body['slug']) == ('owner', 'blop-data')
  assert files == {'train.txt': '# INPUT', 'README.md': 'its card'}


def test_a_folder_that_no_variation_takes(monkeypatch, export):
  (export / 'onnx').mkdir()
  (export / 'onnx' / 'model.onnx').write_text('x')
  with _kaggle_serving(monkeypatch) as service:
    text = _failure(export, push.parse_target('kaggle:owner/blop'))
  assert 'onnx/model.onnx belongs to no part' in text and not service.requests


def test_no_login_of_kaggle(export):
  pytest.importorskip('kagglehub')
  text = _failure(export, push.parse_target('kaggle:owner/blop'))
  assert text.startswith('no login for Kaggle') and 'KAGGLE_API_TOKEN' in text


def test_no_network_to_kaggle(monkeypatch, export, capfd):
  before = _contents(export)
  with _kaggle_serving(monkeypatch):
    pass  # Now closed.
  text = _failure(export, push.parse_target('kaggle:owner/blop'))
  first, *_ = text.split('\n')
  # kagglehub itself would say that the login is wrong.
  assert first == ('Kaggle cannot be reached ([Errno 111] Connection refused);'
                   f' the files stay in {export}')
  assert _contents(export) == before
  assert _KEY not in text + ''.join(capfd.readouterr())


@pytest.mark.parametrize('where, status, answer, expected', [
    ('Hello', 401, {'code': 401, 'message': f'bad {_KEY}'},
     'Kaggle refused, no valid login'),
    ('CreateModel$', 403, {'code': 403, 'message': f'not with {_KEY}'},
     'Kaggle refused, no right to write there'),
    ('CreateModelInstance$', 200, {'error': f'no {_KEY}', 'errorCode': 400},
     'Kaggle: '),
])
def test_what_kaggle_refuses(
    monkeypatch, export, where, status, answer, expected):
  with _kaggle_serving(monkeypatch, {where: (status, answer)}) as service:
    text = _failure(export, push.parse_target('kaggle:owner/blop'))
  assert text.startswith(expected) and _KEY not in text
  assert f'the files stay in {export}' in text
  assert bool(service.named('CreateModel$')) == (where != 'Hello')
