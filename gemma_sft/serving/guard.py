"""Checks every request: token, origin and size."""

import hmac
import ipaddress
import re
import secrets
from typing import Any
from urllib import parse

from fastapi import responses
from starlette import datastructures
from starlette import requests

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


def is_loopback(host: str) -> bool:
  """Whether a host name or address is this machine's loopback."""
  try:
    return host == 'localhost' or (
        ipaddress.ip_address(host.strip('[]')).is_loopback)
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

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    """Answers a request, or passes it to the app."""
    if scope['type'] == 'lifespan':
      return await self._app(scope, receive, send)
    if scope['type'] != 'http':
      return await send({'type': 'websocket.close', 'code': 1003})

    async def send_with_headers(message):
      if message['type'] == 'http.response.start':
        datastructures.MutableHeaders(scope=message).update(_HEADERS)
      await send(message)

    request = requests.Request(scope, receive)
    refused = self._check_visitor(request) or _check_origin(request)
    unread = []
    if refused is None and request.method == 'POST':
      body = await _read_body(request)
      unread.append({'type': 'http.request', 'body': body, 'more_body': False})
      if body is None:
        refused = _refusal(413, f'more than {MAX_BODY // 1024} KB were sent')

    async def receive_again():
      return unread.pop() if unread else await receive()

    await (refused or self._app)(scope, receive_again, send_with_headers)

  def _check_visitor(self, request):
    """Returns a refusal if the visitor has no token, or None."""
    if not self._token:
      host = _split_url(f'//{request.headers.get("host", "")}').hostname
      if is_loopback(host or ''):
        return None
      return _refusal(403, 'this address is not served: open the one that the'
                           ' terminal shows')
    cookie_name = f'gemma_sft_{request.scope["server"][1]}'
    if self._is_token(request.query_params.get('token', '')):
      to_page = responses.RedirectResponse(
          request.scope['path'], status_code=303)
      to_page.set_cookie(
          cookie_name, self._token, httponly=True, samesite='strict')
      return to_page
    if self._is_token(request.cookies.get(cookie_name, '')):
      return None
    return _refusal(401, 'open the address that the terminal shows; it ends in'
                         ' ?token=...')

  def _is_token(self, text):
    # In constant time, which only works on bytes or ASCII text.
    return hmac.compare_digest(text.encode(), self._token.encode())


def _check_origin(request):
  """Returns a refusal if another site's page sent this, or None."""
  if request.method in ('GET', 'HEAD'):
    return None
  if request.method != 'POST':
    return _refusal(405, f'{request.method} is not supported')
  origin = request.headers.get('origin')
  if origin and _split_url(origin).netloc != request.headers.get('host'):
    return _refusal(403, 'sent by a page of another site')
  kind = request.headers.get('content-type', '').partition(';')[0].strip()
  if kind != 'application/json':  # A foreign form cannot send JSON.
    return _refusal(415, 'application/json is expected')
  return None


def _refusal(status, text):
  return responses.JSONResponse({'error': text}, status_code=status)


def _split_url(url):
  """Returns the parts of a URL, which are empty if it is malformed."""
  try:
    return parse.urlsplit(url)
  except ValueError:  # Unclosed brackets.
    return parse.urlsplit('')


async def _read_body(request):
  """Returns the whole body, or None if it is too large or cut off."""
  length = request.headers.get('content-length', '0')
  # ASCII digits only, and few enough for int().
  if not re.fullmatch('[0-9]{1,9}', length) or int(length) > MAX_BODY:
    return None
  body = b''
  try:
    async for part in request.stream():
      body += part
      if len(body) > MAX_BODY:
        return None
  except requests.ClientDisconnect:  # Nobody reads the refusal.
    return None
  return body
