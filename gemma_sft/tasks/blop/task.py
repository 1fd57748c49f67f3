"""Blop, a small language for the web, judged by its own compiler.

The compiler (npm `blop-language` 0.9.19) compiles all answers in one Node
process and runs none of them. Each answer that compiles then runs in a cage
(`run_js`) and is compared with its reference (`compare`).
"""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
from typing import Any
from typing import Sequence

from gemma_sft import cache
from gemma_sft import tasks
from gemma_sft.tasks.blop import compare
from gemma_sft.tasks.blop import run_js
from gemma_sft.tasks.blop import text as text_lib
from gemma_sft.tasks.chat import task as chat_task

HEADLINE = 'strict'
LOWER_IS_BETTER = frozenset({'fallback', 'invented'})
FIELDS = ('prompt',)
to_messages = chat_task.to_messages
to_form = chat_task.to_form

_FENCE = re.compile(r'```[\w-]*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)', re.DOTALL)
# The start of a line of code. Prose about Blop has tags and keywords only
# within its sentences.
_CODE_LINE = re.compile(
    r'^\s*(?:(?:async )?def \w*\(|class \w+ (?:extends|\{)|import [\'"{\w]'
    r'|(?:for|if|while) .*\{\s*$|try \{|<[\w/]|[\w.]+(?:: \w+)? :?= \S'
    r'|\{ [\w, ]+ \} = |(?:async )?\([\w, :=\'"]*\) =>|return\b|//)',
    re.MULTILINE)
_SECONDS_PER_SNIPPET = 0.5


class CompilerError(RuntimeError):
  """The compiler is missing or fails."""


def looks_like_code(text: str) -> bool:
  """Whether an answer is Blop rather than prose about it."""
  return bool(_FENCE.search(text) or _CODE_LINE.search(text))


def extract_code(completion: str) -> str:
  """Returns the code of an answer: its first fenced block, else all of it.

  The fence must go, because the compiler would accept a fenced answer as one
  back-ticked string.
  """
  fenced = _FENCE.search(completion)
  return (fenced.group(1) if fenced else completion).strip()


def compiler_problem() -> str:
  """Returns why the compiler cannot be used on this machine, or ''."""
  if shutil.which('node') is None:
    return 'no Node.js on the PATH, so nothing was compiled'
  if not cache.folder('blop', 'node_modules', 'blop-language').is_dir():
    return ('the Blop compiler is not installed, so nothing was compiled: run'
            ' bash launch/blop_compiler.sh')
  return ''


def compile_snippets(snippets: Sequence[str]) -> list[dict[str, Any]]:
  """Returns the compiler's verdict on each snippet.

  Its keys are strict, wrapped, parses (bool); stage ('ok', 'tokenize', 'parse',
  'semantic', 'empty'); line, column (from 1; 0 if unknown); message; and, if
  strict, js and names: the JavaScript and the names that it exports.

  Raises:
    CompilerError: if the compiler is missing or its process fails.
  """
  if problem := compiler_problem():
    raise CompilerError(problem)
  if not snippets:
    return []
  lines = [json.dumps({'id': i, 'code': code})
           for i, code in enumerate(snippets)]
  folder = cache.folder('blop')
  try:
    done = subprocess.run(
        ['node', pathlib.Path(__file__).with_name('check.js'), folder],
        input='\n'.join(lines), capture_output=True, text=True, check=False,
        # The compiler reads a blop.config.js from the current folder up.
        cwd=folder, timeout=30 + _SECONDS_PER_SNIPPET * len(snippets))
  except (OSError, subprocess.TimeoutExpired) as error:
    raise CompilerError(f'the Blop compiler failed: {error}') from error
  # Not splitlines, because messages quote odd line breaks of the code.
  rows = [json.loads(line) for line in done.stdout.split('\n') if line]
  if done.returncode or len(rows) != len(snippets):
    raise CompilerError(f'the Blop compiler failed: {done.stderr[-500:]}')
  return rows


def judge(
    records: tasks.Records, completions: Sequence[str],
    training: tasks.Records = ()) -> tasks.Judged:
  """Compiles and runs the answers to the prompts that ask for code.

  Metrics, as shares of those prompts:

    strict: the compiler accepts the answer as a whole file.
    wrapped: it accepts it as a file or as the body of a function.
    parses: the grammar accepts it; names may be undefined.
    reach: the share of its lines before the compiler's first error; its mean
      has less noise than a rate of yes and no.
    fallback: it has habits of JavaScript, JSX or Python, which the row lists.

  As shares of the prompts whose reference can be run:

    component: what was asked for is defined by the name in the prompt and
      renders, or can be called.
    right: it does what the reference does on made-up inputs; `why` in the row
      is the first difference.
    same_tags: its trees of tags are the reference's.

  For questions about the language that have key facts, `knows` is the share of
  these that the answer states, or 0 if it contradicts one. Other questions are
  only shown.
  """
  rows, asked, pairs = [], [], []
  for record, completion in zip(records, completions):
    prompt, reference = chat_task.prompt(record), chat_task.answer(record)
    if looks_like_code(reference):
      asked.append((len(rows), prompt))
      pairs.append((extract_code(completion), extract_code(reference)))
      rows.append({})
    else:
      rows.append(text_lib.knowledge(prompt, completion) or {})
  try:
    verdicts = compile_snippets([code for pair in pairs for code in pair])
    tried = _tried([p for _, p in asked], pairs, verdicts[::2], verdicts[1::2])
  except (CompilerError, run_js.CageError) as error:
    return tasks.Judged({}, [{} for _ in records], str(error))
  for (i, _), (text, _), verdict, outcome in zip(
      asked, pairs, verdicts[::2], tried):
    verdict['reach'] = _reach(verdict, text)
    rows[i] = _shown(verdict, text) | outcome
  rates = ('strict', 'wrapped', 'parses', 'reach', 'fallback')
  metrics = dict.fromkeys(rates, 0.0) | tasks.means(
      rows, [*rates, 'component', 'right', 'same_tags', 'knows'])
  return tasks.Judged(metrics | {'n': len(pairs)}, rows)


def judge_prompts(
    prompts: Sequence[str], completions: Sequence[str]) -> tasks.Judged:
  """Scores answers to free prompts by the key facts that they state.

  `knows` is as in `judge`, and `invented` is the share of answers that
  contradict a key fact. The row of an answer with code also has the compiler's
  verdict, which counts in no total.
  """
  rows = [text_lib.knowledge(p, c) or {}
          for p, c in zip(prompts, completions)]
  for row in rows:
    if row:
      row['invented'] = bool(row['wrong'])
  metrics = tasks.means(rows, ('knows', 'invented')) | {'n': len(rows)}
  code = {i: extract_code(completions[i]) for i, row in enumerate(rows)
          if not row and looks_like_code(completions[i])}
  try:
    verdicts = compile_snippets([*code.values()])
  except CompilerError as error:
    return tasks.Judged(metrics, rows, str(error))
  for (i, text), verdict in zip(code.items(), verdicts):
    rows[i] = _shown(verdict, text)
  return tasks.Judged(metrics, rows)


def _shown(verdict, code):
  """Returns what a row shows of the compiler's verdict, and the habits."""
  habits = text_lib.habits(code)
  return {k: v for k, v in verdict.items() if k not in ('js', 'names')} | {
      'fallback': bool(habits), 'habits': ', '.join(habits)}


def _reach(verdict, code):
  n_lines = code.count('\n') + 1
  if verdict['strict']:
    return 1.0
  if verdict['line']:
    return min(1.0, (verdict['line'] - 1) / n_lines)
  # No line is known if the code ends too early or is empty.
  at_end = 'End Of Stream' in verdict['message']
  return (n_lines - 1) / n_lines if at_end else 0.0


def check_answers(records: tasks.Records) -> list[str]:
  """Returns a line for each training answer that the compiler refuses."""
  code = [(r.where, answer) for r in records
          if looks_like_code(answer := chat_task.answer(r))]
  try:
    verdicts = compile_snippets([extract_code(answer) for _, answer in code])
  except CompilerError:
    return []  # The judge's note reports it.
  return [
      f'{where}: the answer does not compile ({row["stage"]}, line'
      f' {row["line"]} column {row["column"]}: {row["message"]})'
      for (where, _), row in zip(code, verdicts) if not row['strict']]


def _tried(prompts, pairs, answers, models):
  """Returns {component, right, same_tags, why} of each pair, if decidable."""
  jobs = [_job(*row) for row in zip(prompts, pairs, answers, models)]
  asked = [i for i, job in enumerate(jobs) if job]
  rows = [{} for _ in jobs]
  again = []
  for i, lines in zip(asked, run_js.run([jobs[i] for i in asked])):
    rows[i] = _compared(prompts[i], answers[i], lines)
    if rows[i].get('right') is False and len(lines) == 3 and all(
        'reads' in line for line in lines[1:]):
      aliases = compare.open_names(
          lines[1], lines[2], compare.read_prompt(prompts[i]))
      if aliases:
        again.append((i, dataclasses.replace(jobs[i], aliases=aliases)))
  # Run again with fields named as in the answer where the prompt names none.
  for (i, _), lines in zip(again, run_js.run([job for _, job in again])):
    renamed = _compared(prompts[i], answers[i], lines)
    if renamed.get('right'):
      rows[i] = renamed
  return rows


def _job(prompt, codes, answer, model):
  """Returns the programs to run, or None if the reference has none."""
  if not model['strict']:
    return None
  names, renamed = _defined(codes[1], model), {}
  asked = [n for n in names if re.search(rf'\b{re.escape(n)}\b', prompt)]
  if not asked:
    # The prompt gives no name, so the last definition is what it asks for.
    asked = names[-1:]
    renamed = dict(zip(asked, _defined(codes[0], answer)[-1:]))
  return run_js.ProgramPair(
      {'js': model['js'], 'names': asked},
      {'js': answer['js'], 'names': renamed} if answer['strict'] else None,
      examples=compare.read_prompt(prompt).quoted)


def _defined(code, verdict):
  """Returns the names that a file defines rather than imports."""
  own = re.findall(
      r'^(?:async )?(?:(?:def|class) (\w+)|(\w+)(?:: [\w\[\]]+)? = )', code,
      re.MULTILINE)
  return [n for pair in own if (n := ''.join(pair)) in verdict['names']]


def _compared(prompt, answer, lines):
  if len(lines) < 2 or 'problem' in lines[0] or 'problem' in lines[1]:
    return {}  # The reference itself cannot be run.
  reference = lines[1]
  got = lines[2] if len(lines) == 3 else {}
  why = ('does not compile' if not answer['strict']
         else got.get('problem', '') if got else 'takes too much memory')
  if why:
    got = {'load': [], 'traces': {}, 'reads': {}}
  asked = compare.read_prompt(prompt)
  row = {'component': compare.defined(reference, got)}
  row['right'], difference = compare.same_behaviour(reference, got, asked)
  row['same_tags'] = compare.same_tags(reference, got)
  row = {k: v for k, v in row.items() if v is not None}
  return row | ({'why': why or difference} if row else {})
