"""What both apps share: static files, error messages and the guard."""

import contextlib
import pathlib
from typing import Any
from typing import Callable

import fastapi
from fastapi import exceptions
from fastapi import responses
from fastapi import staticfiles
import pydantic

from gemma_sft import errors
from gemma_sft.serving import guard

_STATIC = pathlib.Path(__file__).parent / 'static'


class Body(pydantic.BaseModel):
  """What a page sends; an unknown field is an error."""

  model_config = pydantic.ConfigDict(extra='forbid', allow_inf_nan=False)


def make_app(
    *, page: str, token: str = '',
    on_shutdown: Callable[[], None] = lambda: None) -> fastapi.FastAPI:
  """Returns an app that serves the static files, with `page` at its root.

  Every error is answered with {'error': text}. `token` is that of
  `guard.Guard`; `on_shutdown` is called when the server is asked to stop.
  """
  @contextlib.asynccontextmanager
  async def lifespan(_):
    yield
    on_shutdown()

  def answer_with(status, text_of):
    async def answer(_: fastapi.Request, error: Any):
      return responses.JSONResponse({'error': text_of(error)}, status)

    return answer

  app = fastapi.FastAPI(
      # FastAPI's own pages of documentation load scripts from other hosts.
      docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan,
      exception_handlers={
          errors.UserError: answer_with(400, message_of),
          exceptions.RequestValidationError: answer_with(422, _first_invalid),
          404: answer_with(404, lambda _: 'no such page'),
          # The server logs the traceback, which the page does not need.
          Exception: answer_with(
              500, lambda e: f'the server failed: {type(e).__name__}')})
  app.add_middleware(guard.Guard, token=token)
  app.mount('/static', staticfiles.StaticFiles(directory=_STATIC))
  add_page(app, '/', page)
  return app


def add_page(app: fastapi.FastAPI, path: str, page: str) -> None:
  """Serves a file of `static` under a path."""
  @app.get(path)
  def _() -> responses.FileResponse:
    return responses.FileResponse(_STATIC / page)


def message_of(error: errors.UserError) -> str:
  """Returns an error in one line, without what to type in a terminal."""
  return f'{error.got.strip(": ")} (expected: {error.expected})'


def _first_invalid(error: exceptions.RequestValidationError) -> str:
  first = error.errors()[0]
  return f'{".".join(map(str, first["loc"][1:]))}: {first["msg"]}'
