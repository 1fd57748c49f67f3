"""One folder a domain: how a record becomes messages, how an answer is judged.

A task is the module `task` of a folder here, with

    HEADLINE: str
        The metric of `judge` that says in one number how good answers are.
    LOWER_IS_BETTER: frozenset[str]
        Metrics that are better when lower; all others when higher.
    to_messages(record) -> Sequence[chat.Message] | str
        A conversation that ends with the model's answer, or plain text. The
        one place that words the prompt: training, judging, few-shot examples,
        `sample` and the web page all come here.
    judge(records, completions, training=()) -> Judged
        Scores answers to the records' prompts. `training` are the records that
        the model was tuned on, for what it may have copied from them.
    check_answers(records) -> list[str]
        What is wrong with the training answers themselves, a line each. Only
        reported: the run goes on.
    FIELDS: tuple[str, ...]
        What a person fills in for a prompt, as the web page's form asks for it:
        `to_messages` of a record of these alone words it, with '' as the
        answer. The first is needed, the others may be left out.
    to_form(record) -> dict[str, str]
        Those fields of a record of the data, as a person would fill them in;
        without what it has none of.

and, where records name files that prompts or verdicts depend on (databases),

    referenced_files(records) -> list[str]
        Their paths, each once: their content is part of the data's hash.

and, where a domain has questions about itself (Blop: "What is Blop?"),

    judge_prompts(prompts, completions) -> Judged
        Scores answers to `config.eval.prompts`.
"""

import dataclasses
import importlib
import pkgutil
import types
from typing import Any

from gemma_sft import errors


@dataclasses.dataclass(frozen=True)
class Judged:
  """A judge's verdict on a list of answers.

  Attributes:
    metrics: Totals, such as {'strict': 0.6, 'n': 48}, all but `n` from 0 to 1.
      One that is the mean of a value of its name over the rows that have it
      gets a confidence interval. Empty if the judge could not work.
    rows: One dict an answer, in order: what to show of it. A row that an
      aggregate leaves out (a question about Blop among requests for code) lacks
      its key.
    free_rows: The same for `judge_prompts`.
    note: Why the judge could not work, or what it left out; '' otherwise.
  """

  metrics: dict[str, float]
  rows: list[dict[str, Any]]
  note: str = ''
  free_rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def names() -> list[str]:
  """Returns the names of the tasks, which are folders here."""
  return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.ispkg)


def load(name: str) -> types.ModuleType:
  """Returns a task by the name of its folder.

  Raises:
    UserError: naming the nearest task.
  """
  if name not in names():
    raise errors.UserError(
        f'config.task is {name!r}', f'one of {", ".join(names())}',
        f'{errors.nearest(name, names())}A new domain is a new folder in'
        ' gemma_sft/tasks/.')
  return importlib.import_module(f'gemma_sft.tasks.{name}.task')
