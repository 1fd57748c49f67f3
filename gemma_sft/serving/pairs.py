"""Pairs of answers to the same prompts, from two evaluations."""

import dataclasses
import hashlib
import os
from typing import Any

from gemma_sft import cli
from gemma_sft import errors
from gemma_sft.evaluation import report


@dataclasses.dataclass(frozen=True)
class AnswerPair:
  """One prompt with the answers of two runs, a and b."""

  # A hash of all other fields. New answers to a prompt make a new item, so that
  # a rating never counts for answers that the rater has not seen.
  item: str
  place: str  # The record that the prompt came from, such as test.csv:12.
  prompt: str
  a: str
  b: str


def parse_run(text: str) -> tuple[str, str]:
  """Returns (workdir, name of the result) of 'W', 'W:base' or 'W:few:4'."""
  if os.path.isdir(text):
    return text, 'tuned'
  workdir, _, name = text.partition(':')
  return workdir, name or 'tuned'


def labels(runs: tuple[str, str]) -> tuple[str, str]:
  """Returns the runs' names, without their folders if they still differ."""
  short = []
  for run in runs:
    workdir, name = parse_run(run)
    folder = os.path.basename(os.path.normpath(workdir))
    short.append(folder if name == 'tuned' else f'{folder}:{name}')
  return (short[0], short[1]) if short[0] != short[1] else runs


def read(runs: tuple[str, str], split: str) -> list[AnswerPair]:
  """Returns the pairs of two runs (see `parse_run`), ordered by their hashes.

  Every rater sees this order. Whoever stops early has rated a random part, and
  the same part as the others, which their agreement needs. Raises `UserError`
  if an evaluation is missing, or they share no record.
  """
  a, b = (_read_answers(run, split) for run in runs)
  shared = [place for place in a if place in b]
  if not shared:
    raise errors.UserError(
        f'{runs[0]} and {runs[1]} have answered none of the same records of'
        f' {split}', 'two evaluations of the same file',
        'evaluate both with the same --config.data.' + split)
  if all('prompt' in a[place] for place in shared):
    prompts = {place: a[place]['prompt'] for place in shared}
  else:
    prompts = _read_prompts(runs[0], split)
  return sorted(
      (make_pair(place, prompts[place], a[place]['answer'], b[place]['answer'])
       for place in shared if place in prompts), key=lambda pair: pair.item)


def make_pair(place: str, prompt: str, a: str, b: str) -> AnswerPair:
  """Returns a pair with its hash."""
  parts = '\0'.join((place, prompt, a, b))
  item = hashlib.sha256(parts.encode()).hexdigest()[:24]
  return AnswerPair(item, place, prompt, a, b)


def shown_first(rater: str, item: str) -> str:
  """Returns 'a' or 'b' at random, but always the same for (rater, item)."""
  digest = hashlib.sha256('\0'.join((rater, item)).encode()).digest()
  return 'ab'[digest[0] & 1]


def _read_answers(run: str, split: str) -> dict[str, Any]:
  workdir, name = parse_run(run)
  folder = os.path.join(workdir, 'evaluation')
  results = report.read_results(folder, split)
  if name not in results:
    base = ' --base' if name == 'base' else ''
    raise errors.UserError(
        f'{run}: no answers of {name!r} to {split} in {folder}',
        f'one of {", ".join(results)}' if results else 'an evaluated run',
        f'python -m gemma_sft.evaluate --workdir={workdir} --split={split}'
        f'{base}')
  return {row['where']: row for row in results[name]['answers']}


def _read_prompts(run: str, split: str) -> dict[str, str]:
  """Returns the prompts, for old evaluations that did not store them."""
  # These import JAX, which rating does not need otherwise.
  from gemma_sft import tasks
  from gemma_sft.generation import prompting
  from gemma_sft.inputs import splits

  config = cli.load_run_config(parse_run(run)[0])
  task = tasks.load(config.task)

  def prompt(record):
    conversation = task.to_messages(record)
    if isinstance(conversation, str):
      return prompting.question(conversation)
    # The system text too: stored ratings are found by a hash of this text.
    return '\n\n'.join(message.content for message in conversation[:-1])

  return {record.where: prompt(record)
          for record in splits.read_split(config.data, split)}
