"""Tries bad input by the hundred thousand, and prints the results.

    python tests/fuzz/run.py [--cases=100000] [--only=records,web] [--seed=0]

A fifth of the cases come from strategies (hypothesis). The others are mutated
copies of cases that reached new lines (atheris). Status 1 if anything crashed,
hung or was silently lost. The shortest case of each failure is then in
--failures: correct the code and add the case to tests/fuzz/corpus, which the
fast tests replay.
"""

import argparse
import collections
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile

_ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(_ROOT / 'tests'))

from fuzz import targets

_PROPERTY_SHARE = 0.2
# CPU time for the imports and for each case.
_CPU_SECONDS = (200, 0.5)
# Wall time over CPU time at which a process counts as hung on a busy machine.
_CLOCK = 20


def main() -> int:
  """Returns the exit status."""
  arguments = _parse()
  print(f'{"target":12} {"cases":>7} {"CPU s":>8} {"crashes":>8} {"hangs":>6}'
        f' {"silent losses":>14} {"corpus":>7}', flush=True)
  total, places = collections.Counter(), {}
  for name in arguments.only:
    row, found = _drill(name, arguments)
    _print_row(name, row)
    places |= {f'{name}: {what}': entry for what, entry in found.items()}
    total += row
  _print_row('all', total)
  for what, (count, file, n_bytes) in places.items():
    print(f'{count:6} x {what}  ({file}, {n_bytes} bytes)')
  return 1 if places else 0


def _parse():
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--cases', type=int, default=100_000)
  parser.add_argument(
      '--only', type=lambda text: text.split(','), default=list(targets.DRILLS))
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--failures', default='/tmp/fuzz_failures')
  arguments = parser.parse_args()
  if unknown := set(arguments.only) - set(targets.DRILLS):
    parser.error(f'--only={",".join(sorted(unknown))}; there are'
                 f' {",".join(targets.DRILLS)}')
  return arguments


def _print_row(name, row):
  print(f'{name:12} {row["n"]:7} {row["seconds"]:8.1f} {row["crash"]:8}'
        f' {row["hang"]:6} {row["loss"]:14} {row["inputs"]:7}', flush=True)


def _drill(name, arguments):
  """Returns (counts, places) of a target, over both ways of making cases."""
  drill = targets.DRILLS[name]
  cases = max(2, round(arguments.cases * drill.share))
  n_property = round(cases * _PROPERTY_SHARE) if drill.guided else cases
  row, places = collections.Counter(), {}
  start = _cpu_seconds()
  for guided, n in ((False, n_property), (True, cases - n_property)):
    if n:
      counts, found = _work(name, guided, n, arguments)
      row += counts
      places |= found
  row['seconds'] = _cpu_seconds() - start
  return row, places


def _cpu_seconds():
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime


def _work(name, guided, cases, arguments):
  """Returns (counts, places) of the cases, which another process tries."""
  keep = pathlib.Path(arguments.failures, name)
  keep.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    for part in ('scratch', 'failures', 'inputs'):
      (folder / part).mkdir()
    limit, message = round(_CPU_SECONDS[0] + cases * _CPU_SECONDS[1]), ''
    try:
      done = subprocess.run(
          [sys.executable, str(pathlib.Path(__file__).with_name('worker.py')),
           json.dumps(dict(
               name=name, guided=guided, cases=cases, seed=arguments.seed + 1,
               folder=str(folder), cpu_seconds=limit))],
          cwd=_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
          timeout=_CLOCK * limit, encoding='utf-8', errors='replace',
          env=os.environ | {'JAX_PLATFORMS': 'cpu',
                            'PYTHONPATH': f'{_ROOT}:{_ROOT}/tests'})
      message = done.stderr
      ended = f'the process ended with status {done.returncode}'
      if done.returncode == -signal.SIGXCPU:
        ended = f'hang: the process took more than {limit} s'
    except subprocess.TimeoutExpired:
      ended = 'hang: the process did not end'
    result = folder / 'result.json'
    account = json.loads(result.read_text()) if result.exists() else {
        'counts': {'hang' if ended.startswith('hang') else 'crash': 1},
        'places': {f'{ended}: {message[-6000:]}': [1, 'last', 0]}}
    if account['places']:
      shutil.copytree(folder / 'failures', keep, dirs_exist_ok=True)
    return collections.Counter(account['counts']) + collections.Counter(
        inputs=len(os.listdir(folder / 'inputs'))), account['places']


if __name__ == '__main__':
  sys.exit(main())
