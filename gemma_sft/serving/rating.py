"""The page on which people say which of two answers is the better one."""

import dataclasses
import threading
from typing import Annotated
from typing import Any
from typing import Literal
from typing import Sequence
import unicodedata

import fastapi
import pydantic

from gemma_sft import errors
from gemma_sft.serving import app as app_lib
from gemma_sft.serving import pairs as pairs_lib
from gemma_sft.serving import ratings

_Mark = Annotated[int, pydantic.Field(ge=1, le=5, strict=True)]
_Marks = dict[Literal[ratings.CRITERIA], _Mark]
_Name = Annotated[str, pydantic.Field(max_length=200)]


class _Vote(pydantic.BaseModel):
  """What the page sends; the answers go by their places on it."""

  model_config = pydantic.ConfigDict(extra='forbid')
  rater: _Name
  item: Annotated[str, pydantic.Field(max_length=64)]
  choice: Literal['first', 'tie', 'second']
  first: _Marks = {}
  second: _Marks = {}


class _Rater(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra='forbid')
  rater: _Name


def make_app(
    pairs: Sequence[pairs_lib.Pair],
    runs: tuple[str, str],
    store: ratings.Store,
    *,
    token: str = '',
) -> fastapi.FastAPI:
  """Returns the app.

  Which run an answer is of never reaches the page that rates it: that goes by
  first and second, and the server maps them back.

  Args:
    pairs: What there is to rate, in order.
    runs: Their names, for the page of results.
    store: Where ratings go.
    token: See `guard.Guard`.
  """
  app = app_lib.make_app(page='rate.html', token=token)
  app_lib.add_page(app, '/results', 'results.html')
  by_item = {pair.item: pair for pair in pairs}
  # One vote at a time: what comes next depends on what is there.
  lock = threading.Lock()

  def task_of(rater: str, before: ratings.Rating | None = None):
    done = {r.item for r in store.ratings() if r.rater == rater} & set(by_item)
    left = [pair for pair in pairs if pair.item not in done]
    state = {'done': len(done), 'total': len(pairs),
             'criteria': ratings.CRITERIA, 'pair': None}
    if left:
      pair = left[0]
      first = pairs_lib.shown_first(rater, pair.item)
      texts = (pair.a, pair.b) if first == 'a' else (pair.b, pair.a)
      state['pair'] = dict(item=pair.item, prompt=pair.prompt,
                           first=texts[0], second=texts[1])
      if before is not None and before.item == pair.item:
        state['pair']['before'] = _as_shown(before)
    return state

  @app.get('/api/next')
  def _(rater: _Name) -> dict[str, Any]:
    return task_of(_name(rater))

  @app.post('/api/rate')
  def _(vote: _Vote) -> dict[str, Any]:
    rater = _name(vote.rater)
    pair = by_item.get(vote.item)
    if pair is None:
      raise errors.UserError(
          'this pair is not among those that are rated now', 'one of them',
          'load the page again')
    first = pairs_lib.shown_first(rater, pair.item)
    second = 'b' if first == 'a' else 'a'
    sides = {'first': first, 'second': second, 'tie': 'tie'}
    marks = {(first, c): m for c, m in vote.first.items()}
    marks |= {(second, c): m for c, m in vote.second.items()}
    with lock:
      # A vote that is there already (a key hit twice, two windows) stands.
      store.add(
          ratings.Rating(rater, pair.item, first, sides[vote.choice], marks),
          runs=runs, place=pair.place)
      return task_of(rater)

  @app.post('/api/undo')
  def _(who: _Rater) -> dict[str, Any]:
    rater = _name(who.rater)
    with lock:
      return task_of(rater, store.undo(rater, list(by_item)))

  @app.get('/api/results')
  def _() -> dict[str, Any]:
    summary = ratings.summarise(store.ratings(), list(by_item))
    return dataclasses.asdict(summary) | {'runs': pairs_lib.labels(runs)}

  return app


def _name(text: str) -> str:
  """Returns a rater's name in one spelling, or raises a `UserError`."""
  name = ' '.join(unicodedata.normalize('NFC', text).split())
  if not name or len(name) > 40 or not name.isprintable():
    raise errors.UserError(
        'your name', '1 to 40 letters', 'enter a name')
  return name


def _as_shown(rating: ratings.Rating) -> dict[str, Any]:
  """Returns a rating by the places on the page, to be changed there."""
  place = {rating.shown_first: 'first', 'tie': 'tie'}
  shown = {'choice': place.get(rating.choice, 'second'),
           'first': {}, 'second': {}}
  for (side, criterion), mark in rating.marks.items():
    shown[place.get(side, 'second')][criterion] = mark
  return shown
