"""Answers one after the other, each streamed while it is made."""

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

# Further questions are refused: each waits on a thread of its own.
_MOST_WAITING = 8


class _Stopped(Exception):
  """Nobody listens any more."""


class Turns:
  """A queue before the one device.

  `end` makes all of them stop at their next piece of text, as does closing the
  iterator of one (the page's stop button closes its connection).
  """

  def __init__(self):
    self._lock = threading.Lock()
    self._pool = futures.ThreadPoolExecutor(_MOST_WAITING)
    self._stops: set[threading.Event] = set()

  def check_room(self) -> None:
    """Raises a `UserError` if too many questions are waiting."""
    if len(self._stops) >= _MOST_WAITING:
      raise errors.UserError(
          f'{len(self._stops)} questions are waiting', 'fewer',
          'try again in a while')

  def end(self) -> None:
    """Stops all answers; for the end of the server."""
    for stop in list(self._stops):
      stop.set()
    self._pool.shutdown(wait=False, cancel_futures=True)

  async def stream(
      self,
      answer: Callable[[Callable[[str], None]], str],
      judge: Callable[[str], dict[str, Any]],
  ) -> AsyncIterator[dict[str, Any]]:
    """Yields {'started'}, {'text'} ..., {'answer', 'seconds'}, the verdict.

    Or {'error'} at the end.

    Args:
      answer: Called with a function to write pieces of text to; returns all.
      judge: Called with the answer; what it returns is the last event.
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
