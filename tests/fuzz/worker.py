"""The process that tries the cases of a target; see `run`."""

import importlib
import json
import os
import pathlib
import resource
import sys

import atheris
import hypothesis

from fuzz import judging
from fuzz import mutation
from fuzz import targets

# Longer cases find nothing new.
_MAX_BYTES = 32_768


def main(
    *, name: str, guided: bool, cases: int, seed: int, folder: str,
    cpu_seconds: int) -> None:
  """Tries cases of a target and writes the counts to `result.json`.

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

  if guided:
    _guided(drill, seeds, session, cases, seed, folder, finish)
  else:
    _property_based(target, session, cases, seed)
    finish()


def _property_based(target, session, cases, seed):
  @hypothesis.seed(seed)
  @hypothesis.settings(
      max_examples=cases, database=None, deadline=None,
      phases=[hypothesis.Phase.generate],
      suppress_health_check=list(hypothesis.HealthCheck))
  @hypothesis.given(target.STRATEGY)
  def drill(case):
    if session.counts['n'] < cases:
      session.run(case)

  drill()


def _guided(drill, seeds, session, cases, seed, folder, finish):
  inputs = pathlib.Path(folder, 'inputs')
  for i, case in enumerate(seeds):
    (inputs / f'seed{i}').write_bytes(case)

  def try_one(case):
    session.run(case)
    if session.counts['n'] >= cases:
      finish()

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
  main(**json.loads(sys.argv[1]))
