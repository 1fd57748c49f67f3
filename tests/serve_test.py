"""The command `serve`, and what its guard refuses."""

import contextlib
import json
import os
import re
import signal

import conftest
from fastapi import testclient
import local_server as serving
import pytest

from gemma_sft import errors
from gemma_sft import serve
from gemma_sft.serving import guard
from gemma_sft.serving import pairs as pairs_lib
from gemma_sft.serving import ratings

# The guard -------------------------------------------------------------------


@pytest.fixture
def store(tmp_path):
  return ratings.Store(str(tmp_path / 'ratings.sqlite'))


@pytest.fixture
def client(store):
  return serving.make_client(serving.rating_app(store))


def test_every_answer_forbids_what_is_not_ours(client):
  for path in ('/', '/results', '/static/rate.js', '/api/results', '/nothing'):
    headers = client.get(path).headers
    policy = headers['content-security-policy']
    assert "default-src 'none'" in policy and 'unsafe' not in policy
    assert headers['x-content-type-options'] == 'nosniff'
    assert headers['cache-control'] == 'no-store'
  assert client.get('/nothing').json() == {'error': 'no such page'}


def test_pages_name_no_other_host():
  folder = os.path.join(os.path.dirname(guard.__file__), 'static')
  names = os.listdir(folder)
  assert {'rate.html', 'play.html', 'results.html'} <= set(names)
  for name in names:
    with open(os.path.join(folder, name), encoding='utf-8') as file:
      text = file.read()
    assert not re.search(r'https?:|//\w+\.|@import|innerHTML|insertAdjacent'
                         r'|document\.write|\beval\(|\son\w+=', text), name
  for name in ('/docs', '/openapi.json', '/static/../app.py',
               '/static/%2e%2e/app.py'):
    app = serving.rating_app(None)
    assert serving.make_client(app).get(name).status_code == 404, name


@pytest.mark.parametrize('host, status', [
    ('127.0.0.1:80', 200), ('localhost', 200), ('[::1]:80', 200),
    ('127.0.0.1.evil.example', 403), ('evil.example:80', 403), ('', 403)])
def test_a_name_that_points_here_is_refused(client, host, status):
  assert client.get('/', headers={'host': host}).status_code == status


def test_what_another_sites_page_sends_is_refused(client, store):
  body = json.dumps({'rater': 'Ana'})
  kind = {'content-type': 'application/json'}

  def post(**headers):
    return client.post('/api/undo', content=body, headers=headers).status_code

  assert post(**kind) == 200
  assert post(**kind, origin='http://127.0.0.1:80') in (200, 403)
  assert post(**kind, origin='http://evil.example') == 403
  assert post(**kind, origin='null') == 403
  # What a foreign form can send.
  assert post(**{'content-type': 'text/plain'}) == 415
  assert post() == 415
  assert client.put('/api/undo', json={}).status_code == 405


def test_too_large_a_request_is_refused(client):
  big = json.dumps({'rater': 'x' * guard.MAX_BODY}).encode()
  kind = {'content-type': 'application/json'}
  assert client.post('/api/undo', content=big, headers=kind
                     ).status_code == 413
  # Without a declared length.
  parts = (big[i:i + 1000] for i in range(0, len(big), 1000))
  assert client.post('/api/undo', content=parts, headers=kind
                     ).status_code == 413
  assert client.post('/api/undo', content=b'{', headers=kind
                     ).status_code == 422


def test_with_a_token_nobody_comes_in_without(store):
  token = guard.make_token()
  assert len(token) >= 32
  app = serving.rating_app(store, token=token)

  def get(path, **headers):
    return testclient.TestClient(
        app, base_url='http://phone.example', follow_redirects=False).get(
            path, headers=headers)

  for path in ('/', '/static/rate.js', '/api/results', '/?token=',
               f'/?token={token[:-1]}', f'/?token={token}x', '/?token=é'):
    refused = get(path)
    assert refused.status_code == 401 and token not in refused.text, path
  cookie = 'gemma_sft_80'
  assert get('/', cookie=f'{cookie}=wrong').status_code == 401
  assert get('/', cookie='\x00;=').status_code == 401
  # The token moves from the address to a cookie that scripts cannot read.
  first = get(f'/?token={token}')
  assert (first.status_code, first.headers['location']) == (303, '/')
  set_cookie = first.headers['set-cookie'].lower()
  assert 'httponly' in set_cookie and 'samesite=strict' in set_cookie
  assert get('/', cookie=f'{cookie}={token}').status_code == 200


@pytest.mark.parametrize('host, loopback', [
    ('127.0.0.1', True), ('127.9.9.9', True), ('::1', True),
    ('localhost', True), ('0.0.0.0', False), ('::', False),
    ('192.168.1.7', False), ('localhost.example', False)])
def test_is_loopback(host, loopback):
  assert guard.is_loopback(host) is loopback


# The command -----------------------------------------------------------------


@contextlib.contextmanager
def _serving(*arguments):
  """Yields (process, its first line) of `python -m gemma_sft.serve`."""
  process = conftest.start('serve', *arguments, devices=1)
  try:
    yield process, process.stdout.readline().strip()
  finally:
    process.kill()
    process.communicate()


def _two_runs(tmp_path):
  a = serving.write_result(tmp_path / 'a', {'t:1': 'one', 't:2': 'two'})
  return f'--runs={a},' + serving.write_result(
      tmp_path / 'b', {'t:1': 'eins', 't:2': 'zwei'})


def _open(url, token=''):
  import urllib.error
  import urllib.request

  try:
    opener = urllib.request.build_opener(
        urllib.request.HTTPCookieProcessor())
    with opener.open(url + token, timeout=10) as answer:
      return answer.status, answer.read().decode()
  except urllib.error.HTTPError as error:
    return error.code, error.read().decode()


def test_the_address_comes_first_and_ctrl_c_ends(tmp_path):
  runs_flag = _two_runs(tmp_path)
  with _serving('--mode=rate', runs_flag, '--port=0') as (process, url):
    assert re.fullmatch(r'http://127\.0\.0\.1:\d+/', url)
    status, text = _open(url)
    assert status == 200 and 'Which answer is better?' in text
    port = url.rstrip('/').rpartition(':')[2]
    status, _, err = conftest.run_module(
        'serve', '--mode=rate', runs_flag, f'--port={port}', devices=1)
    assert status == 2 and f'--port={port}' in err and 'Traceback' not in err
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, '')
    assert out.endswith('stopped\n')
  assert (tmp_path / 'a' / 'ratings.sqlite').exists()


def test_open_to_others_it_wants_its_token(tmp_path):
  with _serving('--mode=rate', _two_runs(tmp_path), '--port=0',
                '--host=0.0.0.0') as (_, url):
    address, _, token = url.partition('?token=')
    port = address.rstrip('/').rpartition(':')[2]
    assert len(token) >= 32 and '0.0.0.0' not in address
    here = f'http://127.0.0.1:{port}/'
    assert _open(here)[0] == 401
    status, text = _open(here, f'?token={token}')
    assert status == 200 and 'Which answer is better?' in text


def _main(mode='rate', **changes):
  values = dict(
      runs=[], split='test', report=False, out=None, config=None, workdir=None,
      base=False, step=-1, host='127.0.0.1', port=0)
  return serve.main(mode, **(values | changes))


def test_report(tmp_path, capsys):
  flag = _two_runs(tmp_path).partition('=')[2].split(',')
  with pytest.raises(errors.UserError, match='no ratings in'):
    _main(runs=flag, report=True)
  path = str(tmp_path / 'r.sqlite')
  store = ratings.Store(path)
  pairs = pairs_lib.read(tuple(flag), 'test')
  for pair in pairs:
    store.add(ratings.Rating('Ana', pair.item, 'a', 'a'),
              runs=serving.RUNS, place='')
  assert _main(runs=flag, report=True, out=path) == 0
  assert 'win rate of a: 100.0%' in capsys.readouterr().out


@pytest.mark.parametrize('changes, message', [
    (dict(mode=None), '--mode is missing'),
    (dict(runs=['a']), '--runs=a'),
    (dict(runs=['a', 'a']), '--runs=a,a'),
    (dict(mode='play'), '--workdir is missing'),
    (dict(mode='play', report=True), 'with --mode=play'),
])
def test_flags_that_do_not_go_together(changes, message):
  with pytest.raises(errors.UserError, match=message):
    _main(**changes)


@pytest.mark.parametrize('host, port', [
    ('127.0.0.1', 70000), ('127.0.0.1', -1), ('no such host', 0),
    ('192.0.2.1', 0)])
def test_an_address_that_cannot_be_had(host, port):
  with pytest.raises(errors.UserError, match=f'--port={port}'):
    with serve.listen(host, port):
      pass
