"""The command `serve`, and what its guard refuses."""

import json
import pathlib
import re
import signal
import urllib.request

import conftest
from fastapi import testclient
import local_server as serving
import pytest

from gemma_sft import errors
from gemma_sft import serve
from gemma_sft.serving import guard
from gemma_sft.serving import pairs as pairs_lib
from gemma_sft.serving import ratings


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


def test_pages_name_no_other_host(client):
  files = list(pathlib.Path(guard.__file__).with_name('static').iterdir())
  assert {'rate.html', 'play.html', 'results.html'} <= {f.name for f in files}
  for file in files:
    assert not re.search(
        r'https?:|//\w+\.|@import|innerHTML|insertAdjacent|document\.write'
        r'|\beval\(|\son\w+=', file.read_text('utf-8')), file
  for name in ('/docs', '/openapi.json', '/static/../app.py',
               '/static/%2e%2e/app.py'):
    assert client.get(name).status_code == 404, name


def test_a_name_that_points_here_is_refused(client):
  for host, status in (
      ('127.0.0.1:80', 200), ('localhost', 200), ('[::1]:80', 200),
      ('127.0.0.1.evil.example', 403), ('evil.example:80', 403), ('', 403)):
    assert client.get('/', headers={'host': host}).status_code == status, host
  for host in '127.0.0.1', '127.9.9.9', '::1', 'localhost':
    assert guard.is_loopback(host) is True
  for host in '0.0.0.0', '::', '192.168.1.7', 'localhost.example':
    assert guard.is_loopback(host) is False


_JSON = {'content-type': 'application/json'}
_ANA = b'{"rater": "Ana"}'
_BIG = json.dumps({'rater': 'x' * guard.MAX_BODY}).encode()


@pytest.mark.parametrize('method, headers, body, status', [
    ('POST', _JSON, _ANA, 200),
    ('PUT', _JSON, _ANA, 405),
    ('POST', _JSON | {'origin': 'http://127.0.0.1'}, _ANA, 200),
    ('POST', _JSON | {'origin': 'http://evil.example'}, _ANA, 403),
    ('POST', _JSON | {'origin': 'null'}, _ANA, 403),
    # What a foreign form can send.
    ('POST', {'content-type': 'text/plain'}, _ANA, 415),
    ('POST', {}, _ANA, 415), ('POST', _JSON, _BIG, 413),
    ('POST', _JSON, [_BIG[:1000]] * 1000, 413),  # Without a declared length.
    ('POST', _JSON, b'{', 422)])
def test_which_requests_are_refused(client, method, headers, body, status):
  content = iter(body) if isinstance(body, list) else body
  found = client.request(method, '/api/undo', content=content, headers=headers)
  assert found.status_code == status


def test_without_its_token_every_request_is_refused(store):
  token = guard.make_token()
  assert len(token) >= 32
  client = testclient.TestClient(
      serving.rating_app(store, token=token), base_url='http://phone.example',
      follow_redirects=False)

  def get(path, **headers):
    client.cookies.clear()
    return client.get(path, headers=headers)

  for path in ('/', '/static/rate.js', '/api/results', '/?token=',
               f'/?token={token[:-1]}', f'/?token={token}x', '/?token=é'):
    refused = get(path)
    assert refused.status_code == 401 and token not in refused.text, path
  for cookie in 'gemma_sft_80=wrong', '\x00;=':
    assert get('/', cookie=cookie).status_code == 401
  # The token moves from the address to a cookie that scripts cannot read.
  first = get(f'/?token={token}')
  assert (first.status_code, first.headers['location']) == (303, '/')
  set_cookie = first.headers['set-cookie'].lower()
  assert 'httponly' in set_cookie and 'samesite=strict' in set_cookie
  assert get('/', cookie=f'gemma_sft_80={token}').status_code == 200


@pytest.fixture
def runs(tmp_path):
  return [serving.write_result(tmp_path / name, {'t:1': name, 't:2': name * 2})
          for name in 'ab']


def _main(mode='rate', **changes):
  values = dict(
      runs=[], split='test', report=False, out=None, config=None, workdir=None,
      base=False, step=-1, host='127.0.0.1', port=0)
  return serve.main(mode, **(values | changes))


def test_the_address_comes_first_and_ctrl_c_ends(runs, tmp_path):
  process = conftest.start('serve', '--mode=rate', f'--runs={",".join(runs)}',
                           '--port=0', devices=1)
  try:
    url = process.stdout.readline().strip()
    assert re.fullmatch(r'http://127\.0\.0\.1:\d+/', url)
    with urllib.request.urlopen(url, timeout=10) as page:
      assert 'Which answer is better?' in page.read().decode()
    port = int(url.rstrip('/').rpartition(':')[2])
    with pytest.raises(errors.UserError, match=f'--port={port}'):
      _main(runs=runs, port=port)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, '')
    assert out.endswith('stopped\n')
  finally:
    process.kill()
    process.communicate()
  assert (tmp_path / 'a' / 'ratings.sqlite').exists()


def test_open_to_others_it_wants_its_token(runs, monkeypatch, capsys):
  apps = []
  monkeypatch.setattr(serve, '_serve', lambda sock, app: apps.append(app))
  assert _main(runs=runs, host='0.0.0.0') == 0
  url = capsys.readouterr().out.splitlines()[0]
  address, _, token = url.partition('?token=')
  assert len(token) >= 32 and '0.0.0.0' not in address
  client = serving.make_client(apps[0])
  assert client.get('/').status_code == 401
  page = client.get(f'/?token={token}')
  assert page.status_code == 200 and 'Which answer is better?' in page.text


def test_report(runs, store, capsys):
  with pytest.raises(errors.UserError, match='no ratings in'):
    _main(runs=runs, report=True)
  for pair in pairs_lib.read(tuple(runs), 'test'):
    store.add(ratings.Rating('Ana', pair.item, 'a', 'a'),
              runs=serving.RUNS, place='')
  assert _main(runs=runs, report=True, out=store.path) == 0
  assert 'win rate of a: 100.0%' in capsys.readouterr().out


@pytest.mark.parametrize('changes, message', [
    (dict(mode=None), '--mode is missing'), (dict(runs=['a']), '--runs=a'),
    (dict(runs=['a', 'a']), '--runs=a,a'),
    (dict(mode='play'), '--workdir is missing'),
    (dict(mode='play', report=True), 'with --mode=play')])
def test_flags_that_do_not_go_together(changes, message):
  with pytest.raises(errors.UserError, match=message):
    _main(**changes)


@pytest.mark.parametrize('host, port', [
    ('127.0.0.1', 70000), ('127.0.0.1', -1), ('no such host', 0),
    ('192.0.2.1', 0)])
def test_an_address_that_cannot_be_had(host, port):
  with pytest.raises(errors.UserError, match=f'--port={port}'):
    serve.listen(host, port).__enter__()
