"""The page on which a run is talked to: forms, a chat, base beside tuned."""

import asyncio
import dataclasses
import json
import random
from typing import Annotated
from typing import Any
from typing import Callable
from typing import Literal
from typing import Mapping
from typing import Sequence

import fastapi
from fastapi import responses
import pydantic

from gemma_sft import chat
from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft.generation import prompting
from gemma_sft.inputs import records as records_lib
from gemma_sft.run import restore
from gemma_sft.serving import app as app_lib
from gemma_sft.serving import streaming
from gemma_sft.weights import architecture

# Tokens. A longer prompt is a mistake in a page for trying things out, and its
# cache would take gigabytes.
_LONGEST_PROMPT = 8192
_LONGEST_ANSWER = 4096
# A column of the training split with at most so many values, each so short, is
# a choice and not a text.
_MOST_CHOICES = 16
_LONGEST_CHOICE = 40
_N_SAMPLES = 40
WAYS = ('zero', 'few:4', 'rag:4')

_Text = Annotated[str, pydantic.Field(max_length=100_000)]


class _Message(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra='forbid')
  role: Literal['system', 'user', 'model']
  content: _Text


class _Sampling(pydantic.BaseModel):
  """The ranges that `config.validate` leaves open are closed here."""

  model_config = pydantic.ConfigDict(extra='forbid', allow_inf_nan=False)
  temperature: float = pydantic.Field(ge=0, le=10)
  top_k: int = pydantic.Field(ge=0, le=100_000)
  top_p: float
  repetition_penalty: float = pydantic.Field(le=10)
  max_new_tokens: int = pydantic.Field(ge=1, le=_LONGEST_ANSWER)
  seed: int = pydantic.Field(ge=0, lt=2**31)
  stop: list[Annotated[str, pydantic.Field(max_length=200)]] = pydantic.Field(
      max_length=16)


class _Question(pydantic.BaseModel):
  """A filled-in form, or a conversation; one of them."""

  model_config = pydantic.ConfigDict(extra='forbid')
  model: str
  fields: dict[str, _Text] | None = None
  messages: Annotated[list[_Message], pydantic.Field(max_length=200)] | None = (
      None)
  examples: Literal[WAYS] = 'zero'
  sampling: _Sampling


@dataclasses.dataclass(frozen=True)
class Asked:
  """A question as `sample.answer` takes it.

  Attributes:
    conversation: Ending with the user's turn.
    sampling: A `config.sampling`.
    prompter: Of the examples before it, or None.
    as_text: As a transcript, for a base that knows no turns.
  """

  conversation: list[chat.Message]
  sampling: Any
  prompter: prompting.Prompter | None
  as_text: bool

  def shown(self) -> list[dict[str, str]]:
    """Returns what the model reads, for the page."""
    examples = self.prompter.choose(self.conversation) if self.prompter else []
    if self.as_text:
      text = prompting.transcript(examples, self.conversation)
      return [{'role': 'transcript', 'content': text}]
    return [{'role': m.role, 'content': m.content}
            for m in prompting.before(examples, self.conversation)]


class Playground:
  """What the page can ask for, apart from how it asks."""

  def __init__(
      self,
      models: Mapping[str, restore.Served],
      training: Sequence[records_lib.Record],
      held_out: Sequence[records_lib.Record],
  ):
    """Takes the models and the data that go with them.

    Args:
      models: 'tuned' and 'base', or one of them.
      training: For examples in the prompt, the choices of the form and the
        judge's question what was copied; () where the file is not at hand.
      held_out: To fill in the form with.
    """
    self.models = models
    self._served = next(iter(models.values()))
    self._task = self._served.task
    self._training = training
    self._held_out = held_out
    self._forms = [self._task.to_form(r) for r in training]
    self._prompters: dict[str, prompting.Prompter] = {}

  def setup(self) -> dict[str, Any]:
    """Returns what the page has to know to draw itself."""
    sampling = self._served.config.sampling
    fields = self._task.FIELDS
    return {
        'task': self._task.__name__.split('.')[-2],
        'models': [{'name': name, 'description': served.description}
                   for name, served in self.models.items()],
        'fields': [{'name': name, 'required': i == 0,
                    'choices': self._choices(name)}
                   for i, name in enumerate(fields)],
        'samples': self._samples(),
        'examples': [way for way in WAYS
                     if prompting.parse(way).n <= len(self._training)],
        'sampling': {
            name: list(sampling[name]) if name == 'stop' else sampling[name]
            for name in _Sampling.model_fields},
        'longest_answer': _LONGEST_ANSWER,
        'lower_is_better': sorted(self._task.LOWER_IS_BETTER),
    }

  def _samples(self):
    """Returns some held-out records that have all that the form asks for."""
    fields = self._task.FIELDS
    order = random.Random(0).sample(self._held_out, len(self._held_out))
    samples = []
    for record in order:
      form = self._task.to_form(record)
      if all(form.get(f) for f in fields):
        samples.append({f: str(form[f]) for f in fields})
      if len(samples) == _N_SAMPLES:
        break
    return samples

  def _choices(self, name):
    """Returns the values of a column if they are few and short, else []."""
    values = {str(form[name]) for form in self._forms if form.get(name)}
    few = 1 < len(values) <= min(_MOST_CHOICES, len(self._training) // 4)
    return sorted(values) if few and all(
        len(v) <= _LONGEST_CHOICE for v in values) else []

  def prepare(self, question: _Question) -> 'Asked':
    """Returns what is to be answered, checked.

    Raises:
      UserError: if the task refuses the form, there is nothing to answer, or a
        value or the prompt's length is out of its range.
    """
    config = self._served.config.copy_and_resolve_references()
    config.sampling.update(question.sampling.model_dump(exclude={'stop'}))
    config.sampling.stop = tuple(question.sampling.stop)
    config_lib.validate(config)
    conversation = self._conversation(question)
    prompter = None
    if question.examples != 'zero':
      prompter = self._prompter(question.examples)
    asked = Asked(
        conversation, config.sampling, prompter,
        question.model == 'base' and config.eval.base_prompt == 'text')
    self._check_length(asked)
    return asked

  def _conversation(self, question):
    if (question.fields is None) == (question.messages is None):
      raise errors.UserError(
          'the question', 'either fields or messages', 'send one of them')
    if question.fields is None:
      return [chat.Message(m.role, m.content) for m in question.messages]
    asked = self._task.to_messages(self.record(question.fields))
    if isinstance(asked, str):
      raise errors.UserError(
          'this form gives plain text', 'a question: more of its fields'
          ' filled in', 'fill them in')
    return list(asked[:-1] if asked[-1].role == 'model' else asked)

  def _check_length(self, asked):
    served = self._served
    # Even for a transcript: it says whether the turns are in order.
    n = len(chat.render_prompt(
        asked.conversation, served.tokenizer, 'the question'))
    n = max(n, sum(len(served.tokenizer.encode(m['content']))
                   for m in asked.shown()))
    limit = min(_LONGEST_PROMPT, architecture.context_length(
        served.model.config, served.model.generation)
                - asked.sampling.max_new_tokens)
    if n > limit:
      raise errors.UserError(
          f'the prompt has {n} tokens', f'at most {limit}', 'shorten it')

  def record(self, fields: Mapping[str, str]) -> records_lib.Record:
    """Returns a filled-in form as a record.

    Raises:
      UserError: if what is needed is left out, or a field is not the task's.
    """
    needed, unknown = self._task.FIELDS[0], set(fields) - set(self._task.FIELDS)
    if unknown:
      raise errors.UserError(
          f'the form has a field {sorted(unknown)[0]!r}',
          f'{", ".join(self._task.FIELDS)}', 'load the page again')
    filled = {k: v.strip() for k, v in fields.items() if v.strip()}
    if needed not in filled:
      raise errors.UserError(
          f'{needed} is empty', 'some text', 'fill it in')
    # Some tasks look for files beside their data.
    where = self._training[0].where if self._training else 'form'
    return records_lib.Record(filled, where)

  def _prompter(self, way):
    if way not in self._prompters:
      self._prompters[way] = prompting.Prompter(
          prompting.parse(way),
          [self._task.to_messages(r) for r in self._training],
          self._served.config.seed)
    return self._prompters[way]

  def verdict(
      self, question: _Question, text: str
  ) -> tuple[dict[str, Any], str]:
    """Returns (the judge's row, its note) on an answer to a form.

    A judge that needs a reference has nothing to say here: the row is empty.
    """
    if question.fields is None:
      return {}, ''
    try:
      judged = self._task.judge(
          [self.record(question.fields)], [text], self._training)
    except Exception as error:  # Tasks of other people, without a reference.
      print(f'the judge could not work: {type(error).__name__}: {error}')
      return {}, ''
    row = judged.rows[0] if judged.rows else {}
    return {str(k): v for k, v in row.items()
            if isinstance(v, (bool, int, float, str)) and v != ''}, judged.note


def make_app(
    playground: Playground,
    answer: Callable[..., str],
    *,
    token: str = '',
) -> fastapi.FastAPI:
  """Returns the app.

  Args:
    playground: The models.
    answer: `sample.answer`.
    token: See `guard.Guard`.
  """
  turns = streaming.Turns()
  app = app_lib.make_app(
      page='play.html', token=token, on_shutdown=turns.end)

  @app.get('/api/setup')
  def _() -> dict[str, Any]:
    return playground.setup()

  @app.post('/api/answer')
  async def _(question: _Question) -> responses.StreamingResponse:
    served = playground.models.get(question.model)
    if served is None:
      raise errors.UserError(
          f'no model {question.model!r}', ', '.join(playground.models),
          'load the page again')

    # In a thread: retrieval and a long prompt take their time.
    asked = await asyncio.to_thread(playground.prepare, question)

    def work(write):
      return answer(served, asked.sampling, asked.conversation, write,
                    asked.prompter, asked.as_text)

    def judge(text):
      row, note = playground.verdict(question, text)
      return {'verdict': row, 'note': note}

    turns.check_room()
    return responses.StreamingResponse(
        _lines(turns.stream(work, judge), asked),
        media_type='application/x-ndjson')

  return app


async def _lines(events, asked):
  """Yields a line of JSON an event, the prompt first."""
  yield json.dumps({'prompt': asked.shown()}) + '\n'
  async for event in events:
    yield json.dumps(event) + '\n'
