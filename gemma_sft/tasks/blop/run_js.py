"""Runs compiled Blop on made-up inputs, in a cage.

A model wrote the programs, so each runs in a Node process of its own without
files, network, child processes or workers, with little time and memory, and in
a context without Node's objects (cage.js).
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import tempfile
from typing import Any
from typing import Sequence

_SECONDS = 4  # CPU time.
_MEGABYTES = 96  # Node's heap.
# The shell limits CPU seconds, file sizes, core dumps, open files, and with -v
# the address space in kilobytes.
_LIMITS = ('ulimit -t 10; ulimit -f 0; ulimit -c 0; ulimit -n 64;'
           ' ulimit -v 4000000')

Program = dict[str, Any]  # {'js': ..., 'names': [...]}.


@dataclasses.dataclass(frozen=True)
class ProgramPair:
  """A reference and an answer to run on the same inputs.

  Attributes:
    reference: Its names are the list of those to look at.
    answer: Its names are {reference's name: the answer's name} where they
      differ. None runs only the reference.
    aliases: {path: {answer's name: our name}} of fields of the inputs.
    examples: Texts to try functions on.
  """

  reference: Program
  answer: Program | None
  aliases: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
  examples: tuple[str, ...] = ()


class CageError(RuntimeError):
  """The caged process does not start."""


def run(pairs: Sequence[ProgramPair]) -> list[list[dict[str, Any]]]:
  """Returns [plan, the reference's trace, the answer's trace] of each pair.

  The list is shorter if a program crashed its process. {'problem': why} stands
  for the trace of a program that ran out of time or memory, or did not load.

  Raises:
    CageError: if the caged process does not start.
  """
  if not pairs:
    return []
  flags = permission_flags()
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
    return list(pool.map(lambda pair: _run(pair, flags), pairs))


def _run(pair, flags):
  job = {
      'inside': _inside(), 'reference': pair.reference, 'answer': pair.answer,
      'aliases': pair.aliases, 'seconds': _SECONDS, 'literals': literals(
          pair.reference['js']) | {'examples': pair.examples[:6]}}
  with tempfile.TemporaryDirectory() as nowhere:
    try:
      done = subprocess.run(
          command(_source('cage.js'), flags),
          input=json.dumps(job).encode(), capture_output=True, check=False,
          cwd=nowhere, timeout=15 * _SECONDS,
          env={'PATH': os.environ.get('PATH', ''), 'TZ': 'UTC', 'LANG': 'C'})
      output, message = done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
      output, message = error.stdout or b'', b'it ran out of time'
    except OSError as error:
      raise CageError(f'the cage for Blop failed: {error}') from error
  lines = []
  with contextlib.suppress(ValueError):  # The process was ended.
    for line in output.decode('utf-8', 'replace').split('\n')[:4]:
      found = json.loads(line)
      lines.append(found if isinstance(found, dict)
                   else {'problem': 'the program breaks its harness'})
  if not lines or 'cage' not in lines[0]:
    raise CageError('the cage for Blop failed: '
                    f'{message.decode("utf-8", "replace")[-500:]}')
  return lines[1:]


def command(script: str, flags: Sequence[str]) -> list[str]:
  """Returns the command that runs a script in an unprivileged Node process."""
  return ['sh', '-c', f'{_LIMITS}; exec "$@"', 'sh', 'node', *flags,
          f'--max-old-space-size={_MEGABYTES}', '--no-warnings',
          '--disallow-code-generation-from-strings', '--no-addons',
          '-e', script]


@functools.lru_cache
def _source(name):
  return pathlib.Path(__file__).with_name(name).read_text(encoding='utf-8')


@functools.lru_cache
def _inside():
  parts = map(_source, ('world.js', 'inputs.js', 'trace.js'))
  return ('const blopCage__ = (() => {\n' + '\n'.join(parts)
          + '\nreturn blopCage;\n})();')


@functools.lru_cache
def permission_flags() -> tuple[str, ...]:
  """Returns the strictest permission flag that Node has; Node 18 has none."""
  for flag in ('--permission', '--experimental-permission'):
    done = subprocess.run(
        ['node', flag, '--no-warnings', '-e', '0'], capture_output=True,
        check=False, timeout=60)
    if done.returncode == 0:
      return (flag,)
  return ()


def literals(js: str) -> dict[str, list]:
  """Returns the values that a program compares its inputs with, as inputs."""
  texts = re.findall(r"[=!]== '([^'\n]{0,40})'", js)
  if re.search(r'\w\[[a-z]\w*(?:\.\w+)*\]', js):  # Looks up a table.
    texts += re.findall(r"[{,]\s*'?(\w+)'?: ['\d]", js)[:3]
  for words in re.findall(r"\[('[^\]\n]*')\]\.(?:includes|indexOf)", js):
    texts += re.findall(r"'([^']*)'", words)[:2]
  limits = re.findall(r'(?:[<>]=?|[=!]==) (\d+(?:\.\d+)?)', js)
  numbers = [float(limit) + step for limit in limits for step in (0, -1, 1)]
  keys = re.findall(r"\.(?:key|code) [=!]== '([^']*)'", js)
  return {
      'texts': list(dict.fromkeys(texts))[:6],
      'numbers': [int(n) if n == int(n) else n
                  for n in dict.fromkeys(numbers) if n >= 0][:9],
      'keyNames': list(dict.fromkeys([*keys, 'Enter', 'Escape', 'a']))[:6]}
