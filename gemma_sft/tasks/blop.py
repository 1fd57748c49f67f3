"""Blop, a small language for the web, judged by its own compiler.

The compiler (npm `blop-language` 0.9.19) runs in one Node process a call and
compiles; nothing is executed. `bash launch/blop_compiler.sh` installs it.
"""

import importlib.resources
import json
import re
import shutil
import subprocess
from typing import Any
from typing import Sequence

from gemma_sft import cache
from gemma_sft import records as records_lib
from gemma_sft import tasks
from gemma_sft.tasks import chat as chat_task

to_messages = chat_task.to_messages

_FENCE = re.compile(r'```[\w-]*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)', re.DOTALL)
# A line that only code begins with. Prose about Blop names tags and keywords
# inside its sentences.
_CODE_LINE = re.compile(
    r'^\s*(?:(?:async )?def \w*\(|class \w+ (?:extends|\{)|import [\'"{\w]'
    r'|(?:for|if|while) .*\{\s*$|try \{|<[\w/]|[\w.]+(?:: \w+)? :?= \S'
    r'|\{ [\w, ]+ \} = |(?:async )?\([\w, :=\'"]*\) =>|return\b|//)',
    re.MULTILINE)
_SECONDS_PER_SNIPPET = 0.5


class CompilerError(RuntimeError):
  """The compiler is missing or does not run."""


def looks_like_code(text: str) -> bool:
  """Whether an answer is Blop rather than prose about it."""
  return bool(_FENCE.search(text) or _CODE_LINE.search(text))


def extract_code(completion: str) -> str:
  """Returns the code of an answer: its first fenced block, else all of it.

  The compiler takes a fenced answer for one back-ticked string and accepts it,
  so the fence has to go.
  """
  fenced = _FENCE.search(completion)
  return (fenced.group(1) if fenced else completion).strip()


def compiler_problem() -> str:
  """Returns why the compiler cannot be used here, or ''."""
  if shutil.which('node') is None:
    return 'no Node.js on the PATH, so nothing was compiled'
  if not _compiler_dir().joinpath('node_modules', 'blop-language').is_dir():
    return ('the Blop compiler is not installed, so nothing was compiled: run'
            ' bash launch/blop_compiler.sh')
  return ''


def _compiler_dir():
  return cache.folder('blop')


def compile_snippets(snippets: Sequence[str]) -> list[dict[str, Any]]:
  """Returns the compiler's verdict on each snippet.

  Keys: strict, wrapped, parses (bool), stage ('ok', 'tokenize', 'parse',
  'semantic', 'empty'), line, column (from 1; 0 if unknown), message.

  Raises:
    CompilerError: if the compiler is not there or its process fails.
  """
  if problem := compiler_problem():
    raise CompilerError(problem)
  if not snippets:
    return []
  lines = [json.dumps({'id': i, 'code': code})
           for i, code in enumerate(snippets)]
  with importlib.resources.as_file(
      importlib.resources.files(tasks) / 'blop_check.js') as script:
    try:
      done = subprocess.run(
          ['node', str(script), str(_compiler_dir())],
          input='\n'.join(lines), capture_output=True, text=True, check=False,
          # The compiler reads extra globals from a blop.config.js above it.
          cwd=_compiler_dir(),
          timeout=30 + _SECONDS_PER_SNIPPET * len(snippets))
    except (OSError, subprocess.TimeoutExpired) as error:
      raise CompilerError(f'the Blop compiler failed: {error}') from error
  # Not splitlines: messages repeat odd line breaks of the code.
  rows = [json.loads(line) for line in done.stdout.split('\n') if line]
  if done.returncode or len(rows) != len(snippets):
    raise CompilerError(f'the Blop compiler failed: {done.stderr[-500:]}')
  return rows


def judge(
    records: Sequence[records_lib.Record], completions: Sequence[str]
) -> tasks.Judged:
  """Compiles the answers to the prompts that ask for code.

  Metrics, as shares of those prompts: `strict` (accepted as a whole file),
  `wrapped` (as a file or as the body of a function), `parses` (the grammar
  accepts it; names may be undefined). `reach` is the mean share of an answer's
  lines before the compiler's first error: on a few dozen answers it tells two
  checkpoints apart with less noise than a rate of yes and no. Questions about
  the language, whose reference answer is prose, are shown and not counted.
  """
  asks_code = [looks_like_code(chat_task.answer(r)) for r in records]
  try:
    verdicts = iter(compile_snippets(
        [extract_code(c) for c, code in zip(completions, asks_code) if code]))
  except CompilerError as error:
    return tasks.Judged({}, [{} for _ in records], str(error))
  rows = [next(verdicts) if code else {} for code in asks_code]
  for row, completion in zip(rows, completions):
    if row:
      row['reach'] = _reach(row, extract_code(completion))
  counted = [row for row in rows if row]
  n = len(counted)
  metrics = {name: sum(row[name] for row in counted) / max(1, n)
             for name in ('strict', 'wrapped', 'parses', 'reach')}
  return tasks.Judged(metrics | {'n': n}, rows)


def _reach(verdict, code):
  n_lines = code.count('\n') + 1
  if verdict['strict']:
    return 1.0
  if verdict['line']:
    return min(1.0, (verdict['line'] - 1) / n_lines)
  # Without a place: the code ended too early, or there was none.
  at_end = 'End Of Stream' in verdict['message']
  return (n_lines - 1) / n_lines if at_end else 0.0


def check_answers(records: Sequence[records_lib.Record]) -> list[str]:
  """Returns a line for each training answer that the compiler refuses."""
  code = [(r, extract_code(chat_task.answer(r))) for r in records
          if looks_like_code(chat_task.answer(r))]
  try:
    verdicts = compile_snippets([text for _, text in code])
  except CompilerError:
    return []  # The judge's note says so.
  return [
      f'{record.where}: the answer does not compile ({row["stage"]}, line'
      f' {row["line"]} column {row["column"]}: {row["message"]})'
      for (record, _), row in zip(code, verdicts) if not row['strict']]
