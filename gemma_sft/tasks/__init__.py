"""One file a domain: how a record becomes messages, how an answer is judged.

A task is a module of this folder with

    to_messages(record) -> Sequence[chat.Message] | str
        A conversation that ends with the model's answer, or plain text.
    judge(records, completions) -> Judged
        Scores answers to the records' prompts.
    check_answers(records) -> list[str]
        What is wrong with the training answers themselves, a line each. Only
        reported: the run goes on.
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
    metrics: Totals, such as {'strict': 0.6, 'n': 48}. Empty if the judge could
      not work.
    rows: One dict an answer, in order: what to show of it.
    note: Why the judge could not work, or what it left out; '' otherwise.
  """

  metrics: dict[str, float]
  rows: list[dict[str, Any]]
  note: str = ''


def names() -> list[str]:
  """Returns the tasks there are."""
  return sorted(m.name for m in pkgutil.iter_modules(__path__))


def load(name: str) -> types.ModuleType:
  """Returns a task by the name of its file.

  Raises:
    UserError: naming the nearest task.
  """
  if name not in names():
    raise errors.UserError(
        f'config.task is {name!r}', f'one of {", ".join(names())}',
        f'{errors.nearest(name, names())}A new domain is a new file in'
        ' gemma_sft/tasks/.')
  return importlib.import_module(f'gemma_sft.tasks.{name}')
