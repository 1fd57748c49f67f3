"""One folder per domain: how a record becomes messages, how answers are judged.

A new domain is a folder here, a config in `configs/` and a folder in `data/`.
The folder's module `task` has

    HEADLINE: str
        The metric of `judge` that says in one number how good answers are.
    LOWER_IS_BETTER: frozenset[str]
        The metrics that are better when lower, unlike all others.
    to_messages(record) -> Conversation
        A conversation that ends with the model's answer, or plain text. Only
        this function words the prompt: training, judging, few-shot examples,
        `sample` and the web page all call it.
    judge(records, completions, training=()) -> Judged
        Scores answers to the prompts of the records. `training` are the records
        that the model was tuned on; the judge may look for copies of them.
    check_answers(records) -> list[str]
        One line for each mistake in the training answers themselves, which are
        only reported: the run continues.
    FIELDS: tuple[str, ...]
        The fields of the form on the web page, of which the first is required.
        `to_messages` of a record with only these returns '' as the answer.
    to_form(record) -> dict[str, str]
        The fields of the form that a record of the data has values for.

and, where a domain needs them,

    referenced_files(records) -> list[str]
        Paths of the files (databases) that records only name, each once. Their
        content is part of the data's hash.
    judge_prompts(prompts, completions) -> Judged
        Scores answers to `config.eval.prompts`, questions about the domain
        itself ("What is Blop?").
"""

from collections.abc import Sequence
import dataclasses
import importlib
import pkgutil
import types
from typing import Any

from gemma_sft import chat as chat_lib  # `chat` is a folder here.
from gemma_sft import errors
from gemma_sft.inputs import records as records_lib

Record = records_lib.Record
Records = Sequence[Record]
Conversation = Sequence[chat_lib.Message] | str


@dataclasses.dataclass(frozen=True)
class Judged:
  """A judge's verdict on a list of answers.

  Attributes:
    metrics: Totals such as {'strict': 0.6, 'n': 48}; all but `n` are between 0
      and 1. A total that is the mean of the rows' values of the same name gets
      a confidence interval. Empty if the judge could not work.
    rows: What to show of each answer, in order. A row that a total leaves out
      (a question about Blop among requests for code) lacks the total's key.
    note: Why the judge could not work, or what it left out; '' otherwise.
    free_rows: The rows of `judge_prompts`.
  """

  metrics: dict[str, float]
  rows: list[dict[str, Any]]
  note: str = ''
  free_rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def conversation(question: str, answer: str) -> list[chat_lib.Message]:
  """Returns a question of the user and the model's answer."""
  return [chat_lib.Message('user', question),
          chat_lib.Message('model', answer)]


def means(
    rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, float]:
  """Returns the mean of each named value over the rows that have it."""
  values = {name: [row[name] for row in rows if name in row] for name in names}
  return {name: sum(v) / len(v) for name, v in values.items() if v}


def distinct(texts: Sequence[Sequence[str]]) -> dict[str, float]:
  """Returns different n-grams over all n-grams (Li et al. 2016), 0 if none."""
  shares = {}
  for n in (1, 2):
    grams = [tuple(text[i:i + n]) for text in texts
             for i in range(len(text) - n + 1)]
    shares[f'distinct{n}'] = len(set(grams)) / max(1, len(grams))
  return shares


def wrong_columns(
    record: Record, expected: str, columns: str) -> errors.UserError:
  """Returns the error for a record that lacks the columns of its task.

  `columns` is an example for `config.data.columns`, such as 'text=poem'.
  """
  return errors.UserError(
      f'{record.where}: columns {", ".join(record.fields)}', expected,
      f"name your columns: --config.data.columns='{columns}'")


def names() -> list[str]:
  """Returns the names of the tasks, which are the folders here."""
  return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.ispkg)


def load(name: str) -> types.ModuleType:
  """Returns the module `task` of a folder."""
  if name not in names():
    raise errors.UserError(
        f'config.task is {name!r}', f'one of {", ".join(names())}',
        f'{errors.nearest(name, names())}A new domain is a new folder in'
        ' gemma_sft/tasks/.')
  return importlib.import_module(f'gemma_sft.tasks.{name}.task')
