"""The page for trying a run: a form and a chat, tuned and base side by side."""

import asyncio
import dataclasses
import functools
import itertools
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
from gemma_sft import model as model_lib
from gemma_sft.generation import prompting
from gemma_sft.inputs import records as records_lib
from gemma_sft.run import build
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
  messages: list[_Message] | None = pydantic.Field(None, max_length=200)
  examples: Literal[WAYS] = 'zero'
  sampling: _Sampling


@dataclasses.dataclass(frozen=True)
class PreparedQuestion:
  """The arguments of `sample.answer`."""

  conversation: list[chat.Message]
  sampling: Any
  examples: list[prompting.Conversation]
  as_text: bool

  def shown(self) -> list[dict[str, str]]:
    """Returns the messages that the model reads, for the page."""
    if self.as_text:
      text = prompting.transcript(self.examples, self.conversation)
      return [{'role': 'transcript', 'content': text}]
    return [{'role': m.role, 'content': m.content}
            for m in prompting.before(self.examples, self.conversation)]


class Playground:
  """The models and data behind the page, independent of HTTP."""

  def __init__(
      self, models: Mapping[str, restore.Served],
      training: Sequence[records_lib.Record],
      held_out: Sequence[records_lib.Record]):
    """Stores the models and the run's records, () for a missing file.

    `training` is for examples in the prompt, for the choices of the form, and
    for the judge to find copies; `held_out` is for filling in the form.
    """
    self.models = models
    self._served = next(iter(models.values()))
    self._task = self._served.task
    self._training = training
    self._held_out = held_out
    self._forms = [self._task.to_form(r) for r in training]
    self._prompter = functools.cache(self._make_prompter)

  def setup(self) -> dict[str, Any]:
    """Returns everything that the page needs to draw itself."""
    sampling = self._served.config.sampling
    return {
        'task': self._task.__name__.split('.')[-2],
        'models': [{'name': name, 'description': served.description}
                   for name, served in self.models.items()],
        'fields': [{'name': name, 'required': i == 0,
                    'choices': self._choices(name)}
                   for i, name in enumerate(self._task.FIELDS)],
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
    complete = ({f: str(form[f]) for f in fields}
                for form in map(self._task.to_form, order)
                if all(map(form.get, fields)))
    return list(itertools.islice(complete, _N_SAMPLES))

  def _choices(self, name):
    """Returns the values of a field if they are few and short, else []."""
    values = {str(form[name]) for form in self._forms if form.get(name)}
    are_few = 1 < len(values) <= min(_MAX_CHOICES, len(self._training) // 4)
    return sorted(values) if are_few and all(
        len(v) <= _MAX_CHOICE_LENGTH for v in values) else []

  def prepare(self, question: _Question) -> PreparedQuestion:
    """Prepares a question for answering; raises `UserError` for a mistake."""
    served = self._served
    config = served.config.copy_and_resolve_references()
    config.sampling.update(question.sampling.model_dump(exclude={'stop'}))
    config.sampling.stop = tuple(question.sampling.stop)
    config_lib.validate(config)
    conversation, examples = self._conversation(question), []
    # Checks the order of the turns, even if the model reads a transcript.
    chat.render_prompt(conversation, served.tokenizer, 'the question')
    if question.examples != 'zero':
      examples = self._prompter(question.examples).choose(conversation)
    as_text = question.model == 'base' and config.eval.base_prompt == 'text'
    n = len(prompting.render(
        served.tokenizer, examples, conversation, as_text=as_text))
    limit = min(_MAX_PROMPT, architecture.context_length(
        served.model.config, served.model.generation)
                - config.sampling.max_new_tokens)
    if n > limit:
      raise errors.UserError(
          f'the prompt has {n} tokens', f'at most {limit}', 'shorten it')
    return PreparedQuestion(conversation, config.sampling, examples, as_text)

  def _conversation(self, question):
    if (question.fields is None) == (question.messages is None):
      raise errors.UserError(
          'the question', 'either fields or messages', 'send one of them')
    if question.fields is None:
      return [chat.Message(m.role, m.content) for m in question.messages]
    messages = self._task.to_messages(self._record(question.fields))
    if isinstance(messages, str):
      raise errors.UserError(
          'this form makes plain text, not a question',
          'more fields filled in', 'fill them in')
    return list(messages[:-1] if messages[-1].role == 'model' else messages)

  def _record(self, fields):
    """Returns a filled-in form as a record."""
    known = self._task.FIELDS
    required, unknown = known[0], set(fields) - set(known)
    if unknown:
      raise errors.UserError(
          f'the form has a field {sorted(unknown)[0]!r}',
          ', '.join(known), 'load the page again')
    filled = {k: v.strip() for k, v in fields.items() if v.strip()}
    if required not in filled:
      raise errors.UserError(f'{required} is empty', 'some text', 'fill it in')
    # Some tasks read files that are beside their data.
    where = self._training[0].where if self._training else 'form'
    return records_lib.Record(filled, where)

  def _make_prompter(self, way):
    return prompting.Prompter(
        prompting.parse(way),
        [self._task.to_messages(r) for r in self._training],
        self._served.config.seed)

  def verdict(self, question: _Question, text: str) -> dict[str, Any]:
    """Returns the judge's row for an answer to a form, and its note.

    The row is empty if the judge needs a reference, which a form does not have.
    """
    row, note = {}, ''
    try:
      if question.fields is not None:
        judged = self._task.judge(
            [self._record(question.fields)], [text], self._training)
        row, note = (judged.rows or [{}])[0], judged.note
    # A judge without its reference may raise anything.
    except Exception as error:
      print(f'the judge failed: {type(error).__name__}: {error}')
    return {'note': note, 'verdict': {
        str(k): v for k, v in row.items()
        if isinstance(v, (bool, int, float, str)) and v != ''}}


def load_models(
    config: Any, workdir: str, *, base_only: bool, step: int
) -> dict[str, restore.Served]:
  """Loads {'tuned': ..., 'base': ...}, or only the base.

  The base weights are read once. The tuned model shares the arrays that have no
  adapters (the embedding, which is most of a small model), and holds merged
  copies of the others.
  """
  if not base_only:
    # Raises its errors before gigabytes are read.
    chosen = restore.choose_weights(config, workdir, base=False, step=step)
  base = restore.load_weights(config, workdir, base=True, step=step)
  if base_only:
    return {'base': base}
  if not config.lora.enabled:  # All weights were trained: none are shared.
    tuned = restore.load_weights(config, workdir, base=False, step=step)
    return {'tuned': tuned, 'base': base}
  adapters, _ = chosen.checkpoints.restore_trainable(chosen.step)
  params = model_lib.merge(
      base.model, base.params, adapters, build.lora_scale(config))
  return {'tuned': dataclasses.replace(
      base, params=params, description=chosen.description,
      identity=chosen.identity), 'base': base}


def make_app(
    playground: Playground, answer: Callable[..., str], *, token: str = ''
) -> fastapi.FastAPI:
  """Returns the app; `answer` is `sample.answer`."""
  turns = streaming.Turns()
  app = app_lib.make_app(page='play.html', token=token, on_shutdown=turns.end)

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
                    prepared.examples, prepared.as_text)

    async def lines():
      yield json.dumps({'prompt': prepared.shown()}) + '\n'
      async for event in turns.stream(
          generate, functools.partial(playground.verdict, question)):
        yield json.dumps(event) + '\n'

    turns.check_room()
    return responses.StreamingResponse(
        lines(), media_type='application/x-ndjson')

  return app
