"""Uploads with the real clients, against small servers of this process."""

import base64
import contextlib
import json
import pathlib
import re
import sys
import time

import huggingface_hub
from huggingface_hub import constants
import local_server
import pytest
from starlette import requests
from starlette import responses

from gemma_sft import errors
from gemma_sft.exports import push

_TOKEN = 'hf_' + 'aB3' * 12
_KEY = '0123456789abcdef' * 2
_NAMES = ('hf/config.json', 'hf/model-00001-of-00002.safetensors',
          'peft/adapter_config.json', 'gguf/model-q8_0.gguf', 'gguf/Modelfile',
          'README.md', 'export.json')


class _Service:
  """An app of `answers`, {'METHOD pattern': (status, answer)}.

  The first that matches counts; an answer is JSON, or a function of the service
  and the body that returns it, or None to hang up. `requests` has (method,
  path, headers, body).
  """

  def __init__(self, answers):
    self.answers, self.requests, self.url = answers, [], ''

  async def __call__(self, scope, receive, send):
    request = requests.Request(scope, receive)
    name, body = f'{request.method} {request.url.path}', await request.body()
    path = request.url.path + (request.url.query and f'?{request.url.query}')
    self.requests.append((request.method, path, dict(request.headers), body))
    status, answer = next(
        (answer for pattern, answer in self.answers.items()
         if re.search(pattern, name)), (404, {'error': f'unknown {name}'}))
    if answer is None:
      await send({'type': 'http.response.start', 'status': status})
      return
    if callable(answer):
      answer = answer(self, body)
    await responses.JSONResponse(answer, status)(scope, receive, send)

  def named(self, pattern):
    return [
        (path, json.loads(body)
         if headers.get('content-type') == 'application/json' else body)
        for method, path, headers, body in self.requests
        if re.search(pattern, f'{method} {path}')]

  def stored(self):
    """Returns {name: content} of the uploads to the storage."""
    return {path.rpartition('/')[2]: content
            for path, content in self.named('PUT /storage/')}


@pytest.fixture
def serve():
  """Starts services; they end with the test."""
  with contextlib.ExitStack() as stack:
    def start(changes, answers):
      # The changes first, also where they replace an answer.
      service = _Service(changes | answers | changes)
      url = stack.enter_context(local_server.running(service))
      service.url = url.rstrip('/')
      return service
    yield start


@pytest.fixture
def export(tmp_path):
  """A finished export with a file of each kind."""
  for name in _NAMES:
    path = tmp_path / 'blop' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'content of {name}')
  return tmp_path / 'blop'


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
  # Port 1: nobody listens there.
  monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:1')


def _push(folder, target='org/blop', **options):
  return push.push(folder, push.parse_target(target), **options)


def _failure(*arguments, **options):
  with pytest.raises(errors.UserError) as caught:
    _push(*arguments, **options)
  # The client's own error, which may hold the token, is not shown with it.
  assert caught.value.__cause__ is None
  assert caught.value.__suppress_context__ or not caught.value.__context__
  return str(caught.value)


def _check_login(service, capfd, secret, header):
  """Checks that the login is in one header, and nowhere else."""
  for _, path, headers, body in service.requests:
    assert secret not in path and secret.encode() not in body
    for name, value in headers.items():
      assert name == 'authorization' or (
          secret not in value and header not in value)
  assert secret not in ''.join(capfd.readouterr())


@pytest.mark.parametrize('text, service, name', [
    ('org/name', 'huggingface', 'org/name'),
    ('Some-Org/gemma-3.1_blop', 'huggingface', 'Some-Org/gemma-3.1_blop'),
    ('kaggle:owner/model', 'kaggle', 'owner/model'),
    ('kaggle:owner/model/gguf/small', 'kaggle', 'owner/model/gguf/small')])
def test_targets(text, service, name):
  target = push.Target(service, name)
  assert push.parse_target(text) == target
  assert push.hub_repository([push.Target('kaggle', 'a/b'), target]) == (
      name if service == 'huggingface' else '')


@pytest.mark.parametrize('text', [
    '', 'name', 'a/b/c', 'a/b/c/d', '/name', 'org/', 'org/na me', 'org/name\n',
    'https://huggingface.co/org/name', '../name', 'org/.name', 'org/name.',
    'kaggle:model', 'kaggle:a/b/c', 'kaggle:a/b/c/d/5', 'kaggle:a/b.c',
    'hf:org/name', f'{_TOKEN}@org/name'])
def test_wrong_targets(text):
  with pytest.raises(
      errors.UserError, match='expected: ORGANISATION/NAME') as caught:
    push.parse_target(text)
  assert _TOKEN not in str(caught.value)


def _modes(_, body):
  # As the real one does: weights are large files, texts are not.
  return {'files': [
      {'path': f['path'], 'shouldIgnore': False, 'oid': None, 'uploadMode':
       'lfs' if f['path'].endswith(('.gguf', '.safetensors')) else 'regular'}
      for f in json.loads(body)['files']]}


def _batch(service, body):
  return {'transfer': 'basic', 'objects': [
      {'oid': o['oid'], 'size': o['size'],
       'actions': {'upload': {'href': f'{service.url}/storage/{o["oid"]}'}}}
      for o in json.loads(body)['objects']]}


@pytest.fixture
def hub(monkeypatch, serve):
  """Starts a Hub with a login, whose repositories hold the files `left`."""
  def start(changes=None, left=()):
    service = serve(changes or {}, {
        r'GET /api/whoami-v2': (200, {'name': 'alice', 'type': 'user'}),
        r'POST /api/repos/create': (200, lambda service, body: {
            'url': f'{service.url}/org/{json.loads(body)["name"]}'}),
        r'POST /api/validate-yaml': (200, {}),
        r'GET /api/models/org/blop$|/api/models/org/blop/tree': (200, [
            {'type': 'file', 'path': name, 'size': 1, 'oid': 'a' * 40}
            for name in left]),
        r'POST /api/\w+/org/[\w-]+/preupload/main': (200, _modes),
        r'POST .*/info/lfs/objects/batch': (200, _batch),
        r'PUT /storage/': (200, {}),
        r'POST /api/\w+/org/[\w-]+/commit/main': (200, {
            'commitUrl': 'https://huggingface.co/org/blop/commit/1',
            'commitOid': '1'})})
    monkeypatch.setattr(constants, 'ENDPOINT', service.url)
    monkeypatch.setenv('HF_TOKEN', _TOKEN)
    return service
  return start


def _committed(service, repository):
  """Returns ({path: content}, deleted paths) of its one commit."""
  (_, body), = service.named(f'/{repository}/commit/')
  stored, files, deleted = service.stored(), {}, []
  for line in map(json.loads, filter(None, body.split(b'\n'))):
    value = line['value']
    if line['key'] == 'file':
      files[value['path']] = base64.b64decode(value['content']).decode()
    elif line['key'] == 'lfsFile':
      files[value['path']] = stored[value['oid']].decode()
    elif line['key'] == 'deletedFile':
      deleted.append(value['path'])
  return files, deleted


def test_an_export_on_the_hub(hub, export, capfd):
  service = hub()
  assert _push(export) == f'{service.url}/org/blop'
  (_, created), = service.named('repos/create')
  assert (created['organization'], created['name']) == ('org', 'blop')
  assert created.get('visibility') != 'private'
  assert _committed(service, 'blop') == (
      {n.removeprefix('hf/'): f'content of {n}' for n in _NAMES}, [])
  assert not service.named('/api/datasets/')
  _check_login(service, capfd, _TOKEN, _TOKEN)
  for method, path, headers, _ in service.requests:
    if path.startswith('/storage/'):
      assert _TOKEN not in str(headers)
    elif path.startswith('/api/') and 'harness' not in path:
      assert headers['authorization'] == f'Bearer {_TOKEN}', method


def test_a_data_set_beside_it_and_weights_of_an_earlier_export(
    hub, export, tmp_path, capsys):
  (tmp_path / 'train.txt').write_text('# INPUT')
  service = hub(left=[
      'README.md', 'config.json', 'gguf/model-f16.gguf',
      'model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors',
      'peft/adapter_model.safetensors', 'picture.png', 'notes/gguf/a.txt'])
  _push(export, private=True, data_files=[str(tmp_path / 'train.txt')],
        data_card='its card')
  created = [body for _, body in service.named('repos/create')]
  assert {(c['name'], c.get('type', 'model'), c['visibility'])
          for c in created} == {('blop', 'model', 'private'),
                                ('blop-data', 'dataset', 'private')}
  assert _committed(service, 'blop-data')[0] == {
      'train.txt': '# INPUT', 'README.md': 'its card'}
  files, deleted = _committed(service, 'blop')
  assert 'train.txt' not in files
  # What it brings itself and what is not an export's stays.
  assert deleted == ['gguf/model-f16.gguf', 'model-00002-of-00002.safetensors',
                     'peft/adapter_model.safetensors']
  assert 'gguf/model-f16.gguf' in capsys.readouterr().out


@pytest.mark.parametrize('target, start, parts', [
    ('org/blop', 'no login for the Hugging Face Hub',
     ['HF_TOKEN', 'hf auth login']),
    ('kaggle:owner/blop', 'no login for Kaggle', ['KAGGLE_API_TOKEN'])])
def test_no_login_and_nothing_to_upload(
    monkeypatch, tmp_path, export, target, start, parts):
  if target.startswith('kaggle'):
    pytest.importorskip('kagglehub')
  text = _failure(export, target)
  assert text.startswith(start) and all(part in text for part in parts)
  monkeypatch.setenv('HF_TOKEN', _TOKEN)
  (tmp_path / 'empty').mkdir()
  for folder in (tmp_path / 'none', tmp_path / 'empty'):
    assert 'a finished export' in _failure(folder, target)


@pytest.mark.parametrize('target, service, secret', [
    ('org/blop', 'the Hugging Face Hub', _TOKEN),
    ('kaggle:owner/blop', 'Kaggle', _KEY)])
def test_no_network(
    request, monkeypatch, export, capfd, target, service, secret):
  monkeypatch.setenv('HF_TOKEN', _TOKEN)
  if service == 'Kaggle':  # Its client would say that the login is wrong.
    request.getfixturevalue('kaggle')(url='http://127.0.0.1:1')
  text = _failure(export, target)
  assert text.split('\n')[0] == (
      f'{service} cannot be reached ([Errno 111] Connection refused); the files'
      f' stay in {export}')
  assert {str(path.relative_to(export)): path.read_text()
          for path in export.rglob('*') if path.is_file()} == {
              name: f'content of {name}' for name in _NAMES}
  assert secret not in text + ''.join(capfd.readouterr())
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  text = _failure(export)
  assert 'cannot be reached' in text and 'HF_HUB_OFFLINE' in text


def test_a_network_that_goes_away(monkeypatch, hub, export):
  monkeypatch.setattr(time, 'sleep', lambda _: None)  # The client's retries.
  service = hub({'POST .*/preupload/': (200, None)})
  assert 'the Hugging Face Hub cannot be reached' in _failure(export)
  assert len(service.named('preupload')) > 1 and not service.named('/commit/')


@pytest.mark.parametrize('status, where, expected', [
    (401, 'GET /api/whoami-v2', 'refused, no valid login'),
    (403, 'POST /api/repos/create', 'refused, no right to write there'),
    (403, 'POST .*/commit/', 'refused, no right to write there'),
    (400, 'POST .*/commit/', 'the Hugging Face Hub: ')])
def test_what_the_hub_refuses(hub, export, status, where, expected):
  # The worst server: its message repeats the login.
  answer = {'error': f'no, not with Bearer {_TOKEN} or {_TOKEN}'}
  service = hub({where: (status, answer)})
  text = _failure(export)
  line = text.split('\n')[0]
  assert expected in line and f'the files stay in {export}' in line
  assert _TOKEN not in text
  # Nothing is made with a login that is not accepted.
  assert bool(service.named('repos/create')) == ('whoami' not in where)


def test_a_login_of_an_unknown_shape_is_scrubbed(monkeypatch, hub, export):
  token = 'of-no-known-shape'
  hub({'POST .*/commit/': (400, {'error': f'no {token}'})})
  # From the client's file: no variable holds it.
  monkeypatch.delenv('HF_TOKEN')
  pathlib.Path(constants.HF_TOKEN_PATH).write_text(token)
  text = _failure(export)
  assert 'no [removed]' in text and token not in text


@pytest.mark.parametrize('data', [{}, {'data_files': [__file__]}])
@pytest.mark.parametrize('name', ['export.json', 'README.md'])
def test_a_token_in_the_files_is_not_published(hub, export, name, data):
  (export / name).write_text(f'{{"token": "{_TOKEN}"}}')
  service = hub()
  text = _failure(export, **data)
  assert text.startswith(f'{name} contains the token') and _TOKEN not in text
  assert not service.requests


def test_timeouts(monkeypatch, hub, export):
  seen = []
  whoami = huggingface_hub.HfApi.whoami

  def spy(self):
    seen.append(huggingface_hub.get_session().timeout)
    return whoami(self)

  monkeypatch.setattr(huggingface_hub.HfApi, 'whoami', spy)
  hub()
  _push(export)
  assert [(timeout.connect, timeout.read) for timeout in seen] == [(10, 30)]
  assert huggingface_hub.get_session().timeout.read is None


def test_files_that_cannot_be_laid_out(export, tmp_path):
  for name in ('a/train.txt', 'b/train.txt', 'a/README.md'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('x')
  for names in (
      ['a/train.txt', 'b/train.txt'], ['a/README.md'], ['a/none.txt']):
    assert 'files of the data set' in _failure(
        export, data_files=[str(tmp_path / name) for name in names]), names
  (export / 'hf' / 'README.md').write_text('another')
  assert 'README.md is there and in hf/' in _failure(export)


def test_a_missing_client(monkeypatch, export):
  monkeypatch.setitem(sys.modules, 'kagglehub', None)
  with pytest.raises(errors.UserError, match='not installed') as caught:
    _push(export, 'kaggle:owner/blop')
  assert "pip install 'gemma_sft[push]'" in str(caught.value)


@pytest.fixture
def kaggle(monkeypatch, serve):
  pytest.importorskip('kagglehub')
  from kagglehub import clients
  from kagglesdk import kaggle_env

  # Its own takes seconds: it reads the sources of the whole stack.
  monkeypatch.setattr(clients, 'get_user_agent', lambda: 'kagglehub')

  def start_upload(service, body):
    name = json.loads(body)['name']
    token = f'{len(service.named("StartBlobUpload"))}-{name}'
    return {'token': token, 'createUrl': f'{service.url}/storage/{token}'}

  def start(changes=None, url=''):
    service = serve(changes or {}, {
        'HEAD /': (200, {}),
        'DiagnosticsService/Hello': (200, {'userName': 'alice'}),
        'ModelApiService/GetModel$': (404, {'code': 404, 'message': 'none'}),
        'ModelApiService/CreateModel$': (200, {}),
        'ModelApiService/CreateModelInstance$': (200, {}),
        'DatasetApiService/CreateDataset$': (200, {}),
        'PUT /storage/': (200, {}), 'StartBlobUpload': (200, start_upload)})
    # The client's only way to another server of ours: its table of them.
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD,
                        url or service.url)
    monkeypatch.setenv('KAGGLE_USERNAME', 'alice')
    monkeypatch.setenv('KAGGLE_KEY', _KEY)
    return service
  return start


def _tree(folder, stored):
  files = {file['token'].partition('-')[2]: stored[file['token']].decode()
           for file in folder.get('files', [])}
  for inner in folder.get('directories', []):
    for name, content in _tree(inner, stored).items():
      files[f'{inner["name"]}/{name}'] = content
  return files


def _uploaded(service, pattern):
  """Returns [(request, {path: content})] of what has been made."""
  return [(body, _tree(body.get('body', body), service.stored()))
          for _, body in service.named(pattern)]


def test_an_export_on_kaggle(kaggle, export, capfd):
  service = kaggle()
  url = _push(export, 'kaggle:owner/blop')
  assert url == 'https://www.kaggle.com/models/owner/blop'
  # Asked with a timeout, which the client's own requests do not have.
  assert service.requests[0][:2] == ('HEAD', '/')
  made = {body['body']['instanceSlug']: (body, files)
          for body, files in _uploaded(service, 'CreateModelInstance$')}
  assert made.keys() == {'merged', 'adapter', 'llama-cpp'}
  for name, part, framework in (
      ('merged', 'hf', 'TRANSFORMERS'), ('adapter', 'peft', 'TRANSFORMERS'),
      ('llama-cpp', 'gguf', 'GGUF')):
    body, files = made[name]
    assert files == {n.removeprefix(f'{part}/'): f'content of {n}'
                     for n in _NAMES if '/' not in n or n.startswith(part)}
    assert (body['ownerSlug'], body['modelSlug']) == ('owner', 'blop')
    assert framework in body['body']['framework'].upper()
  _check_login(service, capfd, _KEY,
               base64.b64encode(f'alice:{_KEY}'.encode()).decode())


def test_one_variation_of_ones_own_and_a_data_set(kaggle, export, tmp_path):
  (tmp_path / 'train.txt').write_text('# INPUT')
  service = kaggle()
  _push(export, 'kaggle:owner/blop/other/all',
        data_files=[str(tmp_path / 'train.txt')], data_card='its card')
  (body, files), = _uploaded(service, 'CreateModelInstance$')
  assert body['body']['instanceSlug'] == 'all'
  assert {'config.json', 'gguf/Modelfile', 'peft/adapter_config.json',
          'README.md'} < files.keys()
  (body, files), = _uploaded(service, 'CreateDataset$')
  assert (body['ownerSlug'], body['slug']) == ('owner', 'blop-data')
  assert files == {'train.txt': '# INPUT', 'README.md': 'its card'}


def test_a_folder_that_no_variation_takes(kaggle, export):
  (export / 'onnx').mkdir()
  (export / 'onnx' / 'model.onnx').write_text('x')
  service = kaggle()
  text = _failure(export, 'kaggle:owner/blop')
  assert 'onnx/model.onnx belongs to no part' in text and not service.requests


@pytest.mark.parametrize('where, status, answer, expected', [
    ('Hello', 401, {'code': 401, 'message': f'bad {_KEY}'},
     'Kaggle refused, no valid login'),
    ('CreateModel$', 403, {'code': 403, 'message': f'not with {_KEY}'},
     'Kaggle refused, no right to write there'),
    ('CreateModelInstance$', 200, {'error': f'no {_KEY}', 'errorCode': 400},
     'Kaggle: ')])
def test_what_kaggle_refuses(kaggle, export, where, status, answer, expected):
  service = kaggle({where: (status, answer)})
  text = _failure(export, 'kaggle:owner/blop')
  assert text.startswith(expected) and _KEY not in text
  assert f'the files stay in {export}' in text
  assert bool(service.named('CreateModel$')) == (where != 'Hello')
