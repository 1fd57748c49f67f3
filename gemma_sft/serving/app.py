"""What both pages have in common: files, errors, and the guard before them."""

import contextlib
import pathlib
from typing import Any
from typing import Callable

import fastapi
from fastapi import exceptions
from fastapi import responses
from fastapi import staticfiles

from gemma_sft import errors
from gemma_sft.serving import guard

_STATIC = pathlib.Path(__file__).parent / 'static'


def make_app(
    *,
    page: str,
    token: str = '',
    on_shutdown: Callable[[], None] | None = None,
) -> fastapi.FastAPI:
  """Returns an app that serves the static files, `page` at its root.

  Every mistake is answered with {'error': text}.

  Args:
    page: A file of `static`.
    token: See `guard.Guard`; '' asks for none.
    on_shutdown: Called when the server is asked to end.
  """
  @contextlib.asynccontextmanager
  async def lifespan(_):
    yield
    if on_shutdown is not None:
      on_shutdown()

  # Its own pages of documentation load scripts from elsewhere.
  app = fastapi.FastAPI(
      docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
  app.add_middleware(guard.Guard, token=token)
  app.mount('/static', staticfiles.StaticFiles(directory=_STATIC))
  add_page(app, '/', page)

  @app.exception_handler(errors.UserError)
  async def user_error(_: fastapi.Request, error: errors.UserError):
    return responses.JSONResponse({'error': message_of(error)}, 400)

  @app.exception_handler(exceptions.RequestValidationError)
  async def invalid(
      _: fastapi.Request, error: exceptions.RequestValidationError):
    first = error.errors()[0]
    name = '.'.join(map(str, first['loc'][1:]))
    return responses.JSONResponse({'error': f'{name}: {first["msg"]}'}, 422)

  @app.exception_handler(404)
  async def missing(_: fastapi.Request, error: Any):
    del error
    return responses.JSONResponse({'error': 'no such page'}, 404)

  @app.exception_handler(Exception)
  async def failed(_: fastapi.Request, error: Exception):
    # The server logs the traceback; a page has no use for it.
    return responses.JSONResponse(
        {'error': f'the server failed: {type(error).__name__}'}, 500)

  return app


def add_page(app: fastapi.FastAPI, path: str, page: str) -> None:
  """Serves a file of `static` under a path."""
  @app.get(path)
  def _() -> responses.FileResponse:
    return responses.FileResponse(_STATIC / page)


def message_of(error: errors.UserError) -> str:
  """Returns a mistake in one line, without what to type in a terminal."""
  return f'{error.got.strip(": ")} (expected: {error.expected})'
