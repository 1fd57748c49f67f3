"""Generates answers one at a time and streams each while it is generated."""

import asyncio
from concurrent import futures
import threading
import time
import traceback
from typing import Any
from typing import AsyncIterator
from typing import Callable

from gemma_sft import errors
from gemma_sft.serving import app as app_lib

# More questions are refused: each occupies a thread while it waits.
_MAX_WAITING = 8


class _Stopped(Exception):
  """The client has gone."""


class Turns:
  """A queue for the one device.

  An answer stops at its next piece of text once its iterator is closed, which
  the page's stop button does.
  """

  def __init__(self):
    self._lock = threading.Lock()
    self._pool = futures.ThreadPoolExecutor(_MAX_WAITING)
    self._stops: set[threading.Event] = set()

  def check_room(self) -> None:
    """Raises a `UserError` if too many questions are waiting."""
    if len(self._stops) >= _MAX_WAITING:
      raise errors.UserError(
          f'{len(self._stops)} questions are waiting', 'fewer',
          'try again in a while')

  def end(self) -> None:
    """Stops all answers, when the server shuts down."""
    for stop in list(self._stops):
      stop.set()
    self._pool.shutdown(wait=False, cancel_futures=True)

  async def stream(
      self, answer: Callable[[Callable[[str], None]], str],
      judge: Callable[[str], dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    """Yields {'started'}, {'text'} ..., {'answer', 'seconds'}, the verdict.

    `answer` gets a function that takes pieces of text, and returns the whole
    answer; `judge` gets the answer and returns the last event. If something
    fails, that is {'error'}.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue = asyncio.Queue()
    stop = threading.Event()
    self._stops.add(stop)

    def put(event):
      if stop.is_set():
        raise _Stopped
      loop.call_soon_threadsafe(events.put_nowait, event)

    def work():
      try:
        with self._lock:
          put({'started': True})
          start = time.monotonic()
          text = answer(lambda piece: put({'text': piece}))
          put({'answer': text, 'seconds': time.monotonic() - start})
        put(judge(text))
      except _Stopped:
        return
      except errors.UserError as error:
        put({'error': app_lib.message_of(error)})
      except Exception as error:
        traceback.print_exc()
        put({'error': f'no answer: {type(error).__name__}: {error}'})
      finally:
        if not stop.is_set():
          loop.call_soon_threadsafe(events.put_nowait, None)

    try:
      self._pool.submit(work)
      while (event := await events.get()) is not None:
        yield event
    finally:
      stop.set()
      self._stops.discard(stop)
