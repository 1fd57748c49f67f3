"""Runs queries in a process of `cage`."""

from collections.abc import Sequence
import contextlib
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
  """
  answers = []
  while len(answers) < len(jobs):
    answers += _run_until_it_ends(jobs[len(answers):])
  return answers


def _run_until_it_ends(jobs):
  """Returns the answers up to the job that ended the process."""
  answers = []
  with subprocess.Popen(
      # With -I and -S only the standard library can be imported.
      [sys.executable, '-I', '-S', cage.__file__], cwd='/', encoding='utf-8',
      stdin=subprocess.PIPE, stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL) as process:
    if process.stdout.readline().strip() != cage.READY:
      raise RuntimeError(
          f'the process for SQLite ended with status {process.wait()}')
    for job in jobs:
      line = ''
      with contextlib.suppress(BrokenPipeError):  # The process has ended.
        process.stdin.write(json.dumps(job) + '\n')
        process.stdin.flush()
        line = process.stdout.readline()
      if not line.endswith('\n'):
        answers.append({'error': TOO_LONG})
        break
      answers.append(json.loads(line))
    with contextlib.suppress(BrokenPipeError):
      process.stdin.close()
  return answers
