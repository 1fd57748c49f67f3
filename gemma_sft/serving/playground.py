"""The page for trying a run: a form and a chat, tuned and base side by side."""

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

# In tokens. A longer prompt is probably a mistake here, and its cache would
# take gigabytes.
_MAX_PROMPT = 8192
_MAX_ANSWER = 4096
# A field is shown as a choice if the training split has at most this many
# different values, none with more characters.
_MAX_CHOICES = 16
_MAX_CHOICE_LENGTH = 40
_N_SAMPLES = 40
WAYS = ('zero', 'few:4', 'rag:4')

_Text = Annotated[str, pydantic.Field(max_length=100_000)]


class _Message(app_lib.Body):
  role: Literal['system', 'user', 'model']
  content: _Text


class _Sampling(app_lib.Body):
  """Adds the upper limits that `config.validate` does not have."""

  temperature: float = pydantic.Field(ge=0, le=10)
  top_k: int = pydantic.Field(ge=0, le=100_000)
  top_p: float
  repetition_penalty: float = pydantic.Field(le=10)
  max_new_tokens: int = pydantic.Field(ge=1, le=_MAX_ANSWER)
  seed: int = pydantic.Field(ge=0, lt=2**31)
  stop: list[Annotated[str, pydantic.Field(max_length=200)]] = pydantic.Field(
      max_length=16)


class _Question(app_lib.Body):
  """Either a filled-in form or a conversation."""

  model: str
  fields: dict[str, _Text] | None = None
  messages: Annotated[list[_Message], pydantic.Field(max_length=200)] | None = (
      None)
  examples: Literal[WAYS] = 'zero'
  sampling: _Sampling


@dataclasses.dataclass(frozen=True)
class PreparedQuestion:
  """The arguments of `sample.answer`.

  Attributes:
    conversation: Ends with the user's turn.
    sampling: A `config.sampling`.
    prompter: Chooses the examples before the conversation; None for none.
    as_text: Whether the model reads a transcript, as a base model without turns
      does.
  """

  conversation: list[chat.Message]
  sampling: Any
  prompter: prompting.Prompter | None
  as_text: bool

  def shown(self) -> list[dict[str, str]]:
    """Returns the messages that the model reads, for the page."""
    examples = self.prompter.choose(self.conversation) if self.prompter else []
    if self.as_text:
      text = prompting.transcript(examples, self.conversation)
      return [{'role': 'transcript', 'content': text}]
    return [{'role': m.role, 'content': m.content}
            for m in prompting.before(examples, self.conversation)]


class Playground:
  """The models and data behind the page, independent of HTTP."""

  def __init__(
      self,
      models: Mapping[str, restore.Served],
      training: Sequence[records_lib.Record],
      held_out: Sequence[records_lib.Record],
  ):
    """Stores the models and their data.

    Args:
      models: 'tuned' and 'base', or one of them.
      training: Records for examples in the prompt, for the choices of the form,
        and for the judge to find copies; () if the file is missing.
      held_out: Records to fill in the form with.
    """
    self.models = models
    self._served = next(iter(models.values()))
    self._task = self._served.task
    self._training = training
    self._held_out = held_out
    self._forms = [self._task.to_form(r) for r in training]
    self._prompters: dict[str, prompting.Prompter] = {}

  def setup(self) -> dict[str, Any]:
    """Returns everything that the page needs to draw itself."""
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
        'lower_is_better': sorted(self._task.LOWER_IS_BETTER),
    }

  def _samples(self):
    """Returns some held-out records that have all fields of the form."""
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
    """Returns the values of a field if they are few and short, else []."""
    values = {str(form[name]) for form in self._forms if form.get(name)}
    are_few = 1 < len(values) <= min(_MAX_CHOICES, len(self._training) // 4)
    return sorted(values) if are_few and all(
        len(v) <= _MAX_CHOICE_LENGTH for v in values) else []

  def prepare(self, question: _Question) -> PreparedQuestion:
    """Checks a question and prepares it for answering.

    Raises:
      UserError: if the task refuses the form, there is nothing to answer, or a
        value or the prompt's length is out of range.
    """
    config = self._served.config.copy_and_resolve_references()
    config.sampling.update(question.sampling.model_dump(exclude={'stop'}))
    config.sampling.stop = tuple(question.sampling.stop)
    config_lib.validate(config)
    conversation = self._conversation(question)
    prompter = None
    if question.examples != 'zero':
      prompter = self._prompter(question.examples)
    prepared = PreparedQuestion(
        conversation, config.sampling, prompter,
        question.model == 'base' and config.eval.base_prompt == 'text')
    self._check_length(prepared)
    return prepared

  def _conversation(self, question):
    if (question.fields is None) == (question.messages is None):
      raise errors.UserError(
          'the question', 'either fields or messages', 'send one of them')
    if question.fields is None:
      return [chat.Message(m.role, m.content) for m in question.messages]
    messages = self._task.to_messages(self.record(question.fields))
    if isinstance(messages, str):
      raise errors.UserError(
          'this form makes plain text, not a question',
          'more fields filled in', 'fill them in')
    return list(messages[:-1] if messages[-1].role == 'model' else messages)

  def _check_length(self, prepared):
    served = self._served
    # Rendered even if the model reads a transcript, to check the turns' order.
    n = len(chat.render_prompt(
        prepared.conversation, served.tokenizer, 'the question'))
    n = max(n, sum(len(served.tokenizer.encode(m['content']))
                   for m in prepared.shown()))
    limit = min(_MAX_PROMPT, architecture.context_length(
        served.model.config, served.model.generation)
                - prepared.sampling.max_new_tokens)
    if n > limit:
      raise errors.UserError(
          f'the prompt has {n} tokens', f'at most {limit}', 'shorten it')

  def record(self, fields: Mapping[str, str]) -> records_lib.Record:
    """Returns a filled-in form as a record.

    Raises:
      UserError: if the first field is empty, or a field is not the task's.
    """
    known = self._task.FIELDS
    required, unknown = known[0], set(fields) - set(known)
    if unknown:
      raise errors.UserError(
          f'the form has a field {sorted(unknown)[0]!r}',
          ', '.join(known), 'load the page again')
    filled = {k: v.strip() for k, v in fields.items() if v.strip()}
    if required not in filled:
      raise errors.UserError(
          f'{required} is empty', 'some text', 'fill it in')
    # Some tasks read files that are beside their data.
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
    """Returns (the judge's row, its note) for an answer to a form.

    The row is empty if the judge needs a reference, which a form does not have.
    """
    if question.fields is None:
      return {}, ''
    try:
      judged = self._task.judge(
          [self.record(question.fields)], [text], self._training)
    # A judge without its reference may raise anything.
    except Exception as error:
      print(f'the judge failed: {type(error).__name__}: {error}')
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
    playground: The models and data.
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

    # In a thread, as retrieval and long prompts take time.
    prepared = await asyncio.to_thread(playground.prepare, question)

    def generate(write):
      return answer(served, prepared.sampling, prepared.conversation, write,
                    prepared.prompter, prepared.as_text)

    def judge(text):
      row, note = playground.verdict(question, text)
      return {'verdict': row, 'note': note}

    turns.check_room()
    return responses.StreamingResponse(
        _lines(turns.stream(generate, judge), prepared),
        media_type='application/x-ndjson')

  return app


async def _lines(events, prepared):
  """Yields the prompt and then each event, each as a line of JSON."""
  yield json.dumps({'prompt': prepared.shown()}) + '\n'
  async for event in events:
    yield json.dumps(event) + '\n'
