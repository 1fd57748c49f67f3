"""Runs queries in a process of `cage`."""

from collections.abc import Sequence
import importlib.resources
import json
import subprocess
import sys
from typing import Any

from gemma_sft.tasks.sql import cage

TOO_LONG = 'stopped: it took too long or too much memory'


def run_all(jobs: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
  """Returns an answer to each {'path' or 'script', 'query'}, in order.

  An answer is {'rows': [[...], ...], 'filled': whether the database has any
  row} or {'error': the message of SQLite or the cage}. A job that ends the
  process does not affect the others.

  Raises:
    RuntimeError: if the process does not start.
  """
  answers = []
  with importlib.resources.as_file(
      importlib.resources.files('gemma_sft.tasks.sql') / 'cage.py') as script:
    while len(answers) < len(jobs):
      answers += _run_until_it_ends(script, jobs[len(answers):])
  return answers


def _run_until_it_ends(script, jobs):
  """Returns the answers up to the job that ended the process."""
  answers = []
  with subprocess.Popen(
      # With -I and -S only the standard library can be imported.
      [sys.executable, '-I', '-S', str(script)], cwd='/', encoding='utf-8',
      stdin=subprocess.PIPE, stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL) as process:
    if process.stdout.readline().strip() != cage.READY:
      raise RuntimeError(
          f'the process for SQLite ended with status {process.wait()}')
    for job in jobs:
      if (line := _ask(process, json.dumps(job) + '\n')) is None:
        answers.append({'error': TOO_LONG})
        break
      answers.append(json.loads(line))
    try:
      process.stdin.close()
    except BrokenPipeError:
      pass
  return answers


def _ask(process, line):
  """Sends a line and returns the answer, or None if the process has ended."""
  try:
    process.stdin.write(line)
    process.stdin.flush()
    answer = process.stdout.readline()
  except BrokenPipeError:
    return None
  return answer if answer.endswith('\n') else None
