"""Checks every request: token, origin and size."""

import hmac
import http.cookies
import ipaddress
import re
import secrets
from typing import Any
from typing import Awaitable
from typing import Callable
from urllib import parse

from fastapi import responses
from starlette import datastructures

# Bytes: a conversation of some thousand words, the most that the pages send.
MAX_BODY = 256 * 1024

# Pages load only our own files and run no inline scripts.
_HEADERS = {
    'content-security-policy': (
        "default-src 'none'; script-src 'self'; style-src 'self';"
        " connect-src 'self'; img-src 'self' data:; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none'"),
    'x-content-type-options': 'nosniff',
    'x-frame-options': 'DENY',
    'referrer-policy': 'no-referrer',
    'cross-origin-opener-policy': 'same-origin',
    'cross-origin-resource-policy': 'same-origin',
    'cache-control': 'no-store',
}

_Receive = Callable[[], Awaitable[Any]]


def is_loopback(host: str) -> bool:
  """Whether a host name or address is this machine's loopback."""
  if host == 'localhost':
    return True
  try:
    return ipaddress.ip_address(host.strip('[]')).is_loopback
  except ValueError:
    return False


def make_token() -> str:
  """Returns 192 random bits as text for an address."""
  return secrets.token_urlsafe(24)


class Guard:
  """ASGI middleware that checks requests and adds headers to responses.

  With a token, the first request has it in the address (`/?token=...`), gets it
  as a cookie and is redirected to the same page without it. Without a token,
  the Host header must name this machine, so that a foreign page whose host name
  resolves to this machine (DNS rebinding) is refused.
  """

  def __init__(self, app: Any, *, token: str = ''):
    self._app = app
    self._token = token

  async def __call__(self, scope: Any, receive: _Receive, send: Any) -> None:
    """Answers a request, or passes it to the app."""
    if scope['type'] == 'lifespan':
      return await self._app(scope, receive, send)
    if scope['type'] != 'http':
      return await send({'type': 'websocket.close', 'code': 1003})

    async def send_with_headers(message):
      if message['type'] == 'http.response.start':
        datastructures.MutableHeaders(scope=message).update(_HEADERS)
      await send(message)

    headers = datastructures.Headers(scope=scope)
    refused = (self._check_visitor(scope, headers)
               or self._check_origin(scope, headers))
    if refused is None and scope['method'] not in ('GET', 'HEAD'):
      body = await _read_body(receive, headers)
      if body is None:
        refused = _refusal(413, f'more than {MAX_BODY // 1024} KB were sent')
      else:
        receive = _replay(body, receive)
    await (refused or self._app)(scope, receive, send_with_headers)

  def _check_visitor(self, scope, headers):
    """Returns a refusal if the visitor has no token, or None."""
    if not self._token:
      if is_loopback(_host_name(headers.get('host', ''))):
        return None
      return _refusal(403, 'this address is not served: open the one that the'
                           ' terminal shows')
    cookie_name = f'gemma_sft_{scope["server"][1]}'
    query = parse.parse_qs(scope['query_string'].decode('latin-1'))
    if self._is_token(query.get('token', [''])[0]):
      to_page = responses.RedirectResponse(scope['path'], status_code=303)
      to_page.set_cookie(
          cookie_name, self._token, httponly=True, samesite='strict')
      return to_page
    cookies = http.cookies.SimpleCookie()
    try:
      cookies.load(headers.get('cookie', ''))
    except http.cookies.CookieError:
      pass
    given = cookies.get(cookie_name)
    if given is not None and self._is_token(given.value):
      return None
    return _refusal(401, 'open the address that the terminal shows; it ends in'
                         ' ?token=...')

  def _is_token(self, text):
    # In constant time, which only works on bytes or ASCII text.
    return hmac.compare_digest(text.encode(), self._token.encode())

  def _check_origin(self, scope, headers):
    """Returns a refusal if another site's page sent this, or None."""
    if scope['method'] in ('GET', 'HEAD'):
      return None
    if scope['method'] != 'POST':
      return _refusal(405, f'{scope["method"]} is not supported')
    origin = headers.get('origin')
    if origin and _address(origin) != headers.get('host'):
      return _refusal(403, 'sent by a page of another site')
    kind = headers.get('content-type', '').partition(';')[0].strip()
    if kind != 'application/json':  # A foreign form cannot send JSON.
      return _refusal(415, 'application/json is expected')
    return None


def _refusal(status, text):
  return responses.JSONResponse({'error': text}, status_code=status)


def _host_name(host):
  """Returns the name of 'name:port' or '[::1]:port'."""
  try:
    return parse.urlsplit(f'//{host}').hostname or ''
  except ValueError:  # Unclosed brackets.
    return ''


def _address(origin):
  """Returns 'name:port' of 'http://name:port', or None."""
  try:
    return parse.urlsplit(origin).netloc
  except ValueError:
    return None


async def _read_body(receive, headers):
  """Returns the whole body, or None if it is too large."""
  length = headers.get('content-length', '0')
  # ASCII digits only, and few enough for int().
  if not re.fullmatch('[0-9]{1,9}', length) or int(length) > MAX_BODY:
    return None
  body = b''
  while True:
    message = await receive()
    if message['type'] == 'http.disconnect':
      return body
    body += message.get('body', b'')
    if len(body) > MAX_BODY:
      return None
    if not message.get('more_body'):
      return body


def _replay(body, receive):
  """Returns a `receive` that first returns this body."""
  sent = False

  async def again():
    nonlocal sent
    if sent:
      return await receive()
    sent = True
    return {'type': 'http.request', 'body': body, 'more_body': False}

  return again
