"""The page on which people say which of two answers is better."""

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


class _Rater(app_lib.Body):
  rater: _Name


class _Vote(_Rater):
  """A choice; answers are called by their position on the page."""

  item: Annotated[str, pydantic.Field(max_length=64)]
  choice: Literal['first', 'tie', 'second']
  first: _Marks = {}
  second: _Marks = {}


def make_app(
    pairs: Sequence[pairs_lib.AnswerPair], runs: tuple[str, str],
    store: ratings.Store, *, token: str = '') -> fastapi.FastAPI:
  """Returns the app, which shows the pairs in order.

  The rating page never learns which run an answer comes from: it says first and
  second, and the server maps these back.
  """
  app = app_lib.make_app(page='rate.html', token=token)
  app_lib.add_page(app, '/results', 'results.html')
  by_item = {pair.item: pair for pair in pairs}
  # One vote at a time: the next pair depends on what is stored.
  lock = threading.Lock()

  def next_state(rater: str, before: ratings.Rating | None = None):
    done = {r.item for r in store.ratings() if r.rater == rater} & set(by_item)
    state = {'done': len(done), 'total': len(pairs),
             'criteria': ratings.CRITERIA, 'pair': None}
    pair = next((pair for pair in pairs if pair.item not in done), None)
    if pair is not None:
      run_of = _run_by_position(rater, pair.item)
      state['pair'] = dict(
          item=pair.item, prompt=pair.prompt,
          **{name: getattr(pair, run_of[name]) for name in ('first', 'second')})
      if before is not None and before.item == pair.item:
        position = {run: name for name, run in run_of.items()}
        marks = {'first': {}, 'second': {}}
        for (run, criterion), mark in before.marks.items():
          marks[position[run]][criterion] = mark
        state['pair']['before'] = {'choice': position[before.choice], **marks}
    return state

  @app.get('/api/next')
  def _(rater: _Name) -> dict[str, Any]:
    return next_state(_clean_name(rater))

  @app.post('/api/rate')
  def _(vote: _Vote) -> dict[str, Any]:
    rater = _clean_name(vote.rater)
    pair = by_item.get(vote.item)
    if pair is None:
      raise errors.UserError(
          'this pair is not one of those being rated', 'one of them',
          'load the page again')
    run_of = _run_by_position(rater, pair.item)
    marks = {(run_of[name], criterion): mark for name in ('first', 'second')
             for criterion, mark in getattr(vote, name).items()}
    with lock:
      # The first vote on a pair stands (a key hit twice, two windows).
      store.add(
          ratings.Rating(rater, pair.item, run_of['first'],
                         run_of[vote.choice], marks),
          runs=runs, place=pair.place)
      return next_state(rater)

  @app.post('/api/undo')
  def _(body: _Rater) -> dict[str, Any]:
    rater = _clean_name(body.rater)
    with lock:
      return next_state(rater, store.undo(rater, by_item))

  @app.get('/api/results')
  def _() -> dict[str, Any]:
    summary = ratings.summarise(store.ratings(), by_item)
    return summary | {'runs': pairs_lib.labels(runs)}

  return app


def _run_by_position(rater: str, item: str) -> dict[str, str]:
  """Returns the run whose answer is 'first' and 'second', and 'tie' itself."""
  first = pairs_lib.shown_first(rater, item)
  return {'first': first, 'second': 'b' if first == 'a' else 'a', 'tie': 'tie'}


def _clean_name(text: str) -> str:
  """Returns a rater's name in one spelling, or raises a `UserError`."""
  name = ' '.join(unicodedata.normalize('NFC', text).split())
  if not name or len(name) > 40 or not name.isprintable():
    raise errors.UserError('your name', '1 to 40 letters', 'enter a name')
  return name
