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
import importlib
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

import atheris
import hypothesis

from fuzz import judging
from fuzz import mutation
from fuzz import targets

_PROPERTY_SHARE = 0.2
# CPU time for the imports and for each case.
_CPU_SECONDS = (200, 0.5)
_MAX_BYTES = 32_768  # Longer cases find nothing new.
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
  start = sum(os.times()[2:4])  # CPU time of ended processes.
  for guided, n in ((False, n_property), (True, cases - n_property)):
    if n:
      counts, found = _work(name, guided, n, arguments)
      row += counts
      places |= found
  row['seconds'] = sum(os.times()[2:4]) - start
  return row, places


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
          [sys.executable, __file__, json.dumps(dict(
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


def _try_cases(name, guided, cases, seed, folder, cpu_seconds):
  """Tries cases of a target, in a process of its own, and writes the counts.

  The folder has scratch/, failures/ and inputs/, which receives the cases that
  reached new lines. Coverage guides the cases, or the strategy makes them.
  """
  resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 10))
  drill, scratch = targets.DRILLS[name], os.path.join(folder, 'scratch')
  with atheris.instrument_imports(include=list(drill.packages)):
    target = importlib.import_module(f'fuzz.targets.{name}')
    seeds = target.seeds()
    for case in seeds:  # Completes the lazy imports.
      target.check(case, scratch)
  judging.bound_memory()
  session = judging.Session(target, scratch, os.path.join(folder, 'failures'))

  def finish():
    pathlib.Path(folder, 'result.json').write_text(json.dumps(
        {'counts': session.counts, 'places': session.places}))
    sys.stdout.flush()
    os._exit(0)  # Without libFuzzer's own output.

  def try_one(case):
    session.run(case)
    if session.counts['n'] >= cases:
      finish()

  if not guided:
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=cases, database=None, deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(target.STRATEGY)
    def try_all(case):
      try_one(case)

    try_all()
    finish()
  inputs = pathlib.Path(folder, 'inputs')
  for i, case in enumerate(seeds):
    (inputs / f'seed{i}').write_bytes(case)
  options = {'custom_mutator': mutation.mutate} if drill.as_json else {}
  # `judging` limits the time of a case. With a timeout of 0 atheris would end
  # the process at the first case during which a new second begins.
  atheris.Setup(
      ['fuzz', str(inputs), f'-artifact_prefix={folder}/', f'-seed={seed}',
       f'-max_len={_MAX_BYTES}', '-len_control=0', '-timeout=999999',
       '-rss_limit_mb=0', '-verbosity=0', '-handle_segv=0', '-handle_abrt=0'],
      try_one, **options)
  atheris.Fuzz()


if __name__ == '__main__':
  if sys.argv[1:2] and sys.argv[1].startswith('{'):
    _try_cases(**json.loads(sys.argv[1]))
  sys.exit(main())
