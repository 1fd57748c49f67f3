"""Requests to the web pages, as a server's parser delivers them.

A case is {"app", "method", "path", "query", "headers", "body"}; a body that is
not a text is sent as JSON.
"""

import asyncio
import atexit
import functools
import itertools
import json
import os
import shutil
import tempfile

from hypothesis import strategies as st
import jax
import numpy as np

from configs import tiny
from fuzz import judging
from fuzz import targets
from gemma_sft import chat
from gemma_sft import tasks
from gemma_sft.inputs import records
from gemma_sft.nn import blocks
from gemma_sft.run import restore
from gemma_sft.serving import guard
from gemma_sft.serving import pairs as pairs_lib
from gemma_sft.serving import playground
from gemma_sft.serving import rating_page
from gemma_sft.serving import ratings
from gemma_sft.weights import tokenizer_file

_TOKEN = 'secret-token-of-this-drill'
_PAIRS = [pairs_lib.make_pair(f't:{i}', f'Ask {i}', '<script>a</script>', 'b')
          for i in range(3)]
_SCRIPT = '<script>alert(1)</script>'
_MOST_RATINGS = 200
_APPS = 'rate', 'play', 'token'
_METHODS = 'POST', 'POST', 'GET', 'HEAD', 'PUT', 'OPTIONS'


@functools.cache
def _apps():
  """Returns (event loop, apps by name, a function that deletes ratings)."""
  # Not in the folder of a case, because all cases use it.
  folder = tempfile.mkdtemp()
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  path = os.path.join(folder, 'ratings.sqlite')
  store, numbers = ratings.Store(path), itertools.count(1)

  def tidy():
    if next(numbers) % _MOST_RATINGS == 0:
      os.remove(path)
      ratings.Store(path)

  runs = 'w/a', 'w/b'
  return asyncio.new_event_loop(), {
      'rate': rating_page.make_app(_PAIRS, runs, store),
      'token': rating_page.make_app(_PAIRS, runs, store, token=_TOKEN),
      'play': playground.make_app(_playground(), _echo)}, tidy


def _echo(served, sampling, conversation, write, *_):
  """Answers with the question."""
  del served, sampling
  write(conversation[-1].content)
  return conversation[-1].content


def _playground():
  config = tiny.get_config()
  config.task = 'chat'
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ('data',))
  served = restore.Served(
      config, mesh, targets.model(),
      chat.Tokenizer(tokenizer_file.byte_tokenizer(3), 3), tasks.load('chat'),
      {}, blocks.Execution(), 'base', 'x')
  rows = [records.Record({'prompt': p, 'completion': _SCRIPT}, f't:{i}')
          for i, p in enumerate(('Red?', 'Blue?', 'Green?', 'Grey?', 'Tan?'))]
  return playground.Playground({'tuned': served, 'base': served}, rows, rows)


def check(case: bytes, folder: str) -> None:
  """Sends a request and checks what must hold for every answer."""
  del folder
  request = _parse(judging.parse(case))
  loop, apps, tidy = _apps()
  status, headers, body = loop.run_until_complete(asyncio.wait_for(
      _send(apps[request['app']], request), 60))
  tidy()
  if not 200 <= status < 500:
    raise AssertionError(f'status {status}: {body!r:.200}')
  kind = headers.get('content-type', '')
  if "default-src 'none'" not in headers.get('content-security-policy', '') or (
      headers.get('x-content-type-options') != 'nosniff'):
    raise judging.Loss('an answer without the security headers')
  if 'access-control-allow-origin' in headers:
    raise judging.Loss('another site may read the answer')
  if 'json' in kind:
    for line in body.decode().splitlines() if 'nd' in kind else [body.decode()]:
      json.loads(line)
  elif request['app'] != 'play' and status == 200 and _SCRIPT in body.decode():
    raise judging.Loss('an answer of a model that is not in JSON')
  _check_guard(request, status, body)


def _parse(document):
  """Returns a request that a server could have parsed."""
  document = document if isinstance(document, dict) else {}
  request = {name: document.get(name) for name in (
      'app', 'method', 'path', 'query', 'headers', 'body')}
  for name, known in ('app', _APPS), ('method', (*_METHODS, 'DELETE')):
    if request[name] not in known:
      request[name] = known[0]
  for name in ('path', 'query'):
    request[name] = str(request[name] or '').encode('utf-8', 'replace').decode()
  request['path'] = '/' + request['path'].lstrip('/')
  pairs = request['headers'] if isinstance(request['headers'], list) else []
  request['headers'] = {
      str(p[0]).lower(): str(p[1]) for p in pairs
      if isinstance(p, list) and len(p) == 2}
  body = request['body']
  request['body'] = (body if isinstance(body, str) else json.dumps(body)
                     ).encode('utf-8', 'replace')
  return request


async def _send(app, request):
  """Returns (status, headers, body)."""
  headers = {'host': '127.0.0.1:80', 'content-type': 'application/json'}
  raw = [(k.encode('latin-1', 'replace'), v.encode('latin-1', 'replace'))
         for k, v in (headers | request['headers']).items()]
  scope = {
      'type': 'http', 'asgi': {'version': '3.0'}, 'http_version': '1.1',
      'method': request['method'], 'scheme': 'http', 'path': request['path'],
      'raw_path': request['path'].encode(), 'root_path': '',
      'query_string': request['query'].encode(), 'headers': raw,
      'client': ('127.0.0.1', 5), 'server': ('127.0.0.1', 80), 'state': {}}
  body, start = [], {}
  halves = [request['body'][:100], request['body'][100:]]

  async def receive():
    if not halves:  # The client stays until the answer is complete.
      await asyncio.Event().wait()
    part = halves.pop(0)
    return {'type': 'http.request', 'body': part, 'more_body': bool(halves)}

  async def send(message):
    if message['type'] == 'http.response.start':
      start.update(message)
    else:
      body.append(message.get('body', b''))

  await app(scope, receive, send)
  return start['status'], {
      k.decode('latin-1'): v.decode('latin-1')
      for k, v in start['headers']}, b''.join(body)


def _check_guard(request, status, body):
  """Checks what the guard promises."""
  headers = request['headers']
  host = headers.get('host', '127.0.0.1:80')
  names_us = host.rpartition(':')[0].endswith('127.0.0.1')
  if request['app'] == 'token':
    known = _TOKEN in request['query'] + headers.get('cookie', '')
    if not known and status != 401 or _TOKEN in body.decode('utf-8', 'replace'):
      raise judging.Loss(f'without the token the status is {status}')
  elif 'example' in host and not names_us and status != 403:
    raise judging.Loss(f'status {status} for the host {host!r}')
  elif (request['method'] == 'POST' and status != 403
        and 'example' in headers.get('origin', '')):
    raise judging.Loss(f'status {status} for another site')
  if len(request['body']) > guard.MAX_BODY and status < 400 and (
      request['method'] not in ('GET', 'HEAD')):
    raise judging.Loss('a huge request is accepted')


def _case(app, method, path, query='', headers=(), body=''):
  return judging.dump(locals())


_SAMPLING = dict(temperature=0, top_k=0, top_p=1, repetition_penalty=1,
                 max_new_tokens=64, seed=0, stop=['x'])
_ANSWER = 'play', 'api/answer'
_BODIES = {
    ('rate', 'api/rate'): {
        'rater': 'Ana', 'item': _PAIRS[0].item, 'choice': 'first',
        'first': {'style': 3}, 'second': {}},
    ('rate', 'api/undo'): {'rater': 'Ana'},
    _ANSWER: {'model': 'base', 'fields': {'prompt': 'Hi'},
              'examples': 'few:4', 'sampling': _SAMPLING}}
_CHAT = {'model': 'tuned', 'sampling': _SAMPLING, 'messages': [
    {'role': 'system', 'content': 'x'}, {'role': 'user', 'content': 'Hi'}]}


def seeds() -> list[bytes]:
  """Returns a request to each route, and some that are refused."""
  return [
      *(_case('rate', 'GET', path) for path in (
          '', 'results', 'static/rate.js', 'api/results', 'nothing')),
      _case('rate', 'GET', 'api/next', 'rater=Ana'),
      _case('play', 'GET', 'api/setup'),
      *(_case(app, 'POST', route, body=body)
        for (app, route), body in (*_BODIES.items(), (_ANSWER, _CHAT))),
      _case('token', 'GET', '', f'token={_TOKEN}'),
      _case('token', 'GET', '', headers=[
          ['cookie', f'gemma_sft_80={_TOKEN}']]),
      _case('rate', 'POST', 'api/undo', headers=[
          ['origin', 'http://evil.example'], ['host', 'evil.example']])]


_ROUTES = st.sampled_from((
    '', 'results', 'static/rate.js', 'static/../app.py', 'static/%2e%2e/x',
    'api/next', 'api/rate', 'api/undo', 'api/results', 'api/setup',
    'api/answer', 'docs', '\x00', '//evil.example/..'))
_TEXT = st.text(st.characters(), max_size=12) | st.sampled_from(
    ('\ud800', 'x' * 300_000, '\x00', _SCRIPT, '漢字', '[' * 3000))
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
        st.sampled_from(('rater', 'item', 'choice', 'first', 'model', 'fields',
                         'messages', 'sampling', 'x', '\ud800')),
        inner, max_size=4), max_leaves=6)
_HEADERS = st.lists(st.tuples(
    st.sampled_from(('host', 'origin', 'content-type', 'content-length',
                     'cookie', 'range', 'accept', 'x', 'if-none-match')),
    st.sampled_from((
        'evil.example', '127.0.0.1', '[::1]:80', '[', 'http://[', 'a:b:c',
        'text/plain', 'application/json', 'null', 'http://evil.example', '-1',
        '9' * 30, '²', '', 'bytes=0-', 'bytes=5-1,-9', '\xff', 'a=b;;=',
        'gemma_sft_80=é', 'http://127.0.0.1:80')) | _TEXT).map(list),
    max_size=3)


@st.composite
def _changed_bodies(draw):
  (app, route), body = draw(st.sampled_from(list(_BODIES.items())))
  key = draw(st.sampled_from(sorted(body) + ['x', '\ud800']))
  return _case(app, 'POST', route, body=body | {key: draw(_JSON)})


STRATEGY = _changed_bodies() | st.builds(
    _case, st.sampled_from(_APPS), st.sampled_from(_METHODS), _ROUTES,
    st.text(max_size=8) | st.sampled_from(
        ('rater=%00', 'rater=%ff', 'rater=' + 'x' * 500, 'token=é', 'rater=a',
         'rater=%ed%a0%80', '%', '&&&', 'rater=a&rater=b')),
    _HEADERS, _JSON)
