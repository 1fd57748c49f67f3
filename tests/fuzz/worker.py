"""The process that tries the cases of a target; see `run`."""

import importlib
import json
import os
import pathlib
import resource
import sys

import atheris
import hypothesis

# Longer cases find nothing new.
_MAX_BYTES = 32_768


def main(name: str, guided: str, cases: str, seed: str, folder: str,
         cpu_seconds: str) -> None:
  """Tries cases and writes the counts to `result.json` in the folder.

  Args:
    name: The target.
    guided: '1' for cases that coverage guides, '0' for those of the strategy.
    cases: The number of cases.
    seed: For making the cases.
    folder: With scratch/, failures/ and inputs/; the cases that reached new
      lines are written to inputs/.
    cpu_seconds: The limit of the process.
  """
  limit = int(cpu_seconds)
  resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10))
  from fuzz import targets

  drill = targets.DRILLS[name]
  with atheris.instrument_imports(include=list(drill.packages)):
    target = importlib.import_module(f'fuzz.targets.{name}')
    seeds = target.seeds()
    for case in seeds:  # Completes the lazy imports.
      target.check(case, os.path.join(folder, 'scratch'))
  from fuzz import judging

  judging.bound_memory()
  session = judging.Session(
      target, os.path.join(folder, 'scratch'),
      os.path.join(folder, 'failures'))

  def finish():
    result = pathlib.Path(folder, 'result.json')
    result.write_text(json.dumps(session.as_json()))
    sys.stdout.flush()
    os._exit(0)  # Without libFuzzer's own output.

  if guided == '1':
    _guided(drill, seeds, session, int(cases), int(seed), folder, finish)
  else:
    _property_based(target, session, int(cases), int(seed))
    finish()


def _property_based(target, session, cases, seed):
  @hypothesis.seed(seed)
  @hypothesis.settings(
      max_examples=cases, database=None, deadline=None,
      phases=[hypothesis.Phase.generate],
      suppress_health_check=list(hypothesis.HealthCheck))
  @hypothesis.given(target.STRATEGY)
  def drill(case):
    if session.n < cases:
      session.run(case)

  drill()


def _guided(drill, seeds, session, cases, seed, folder, finish):
  from fuzz import mutation

  inputs = pathlib.Path(folder, 'inputs')
  for i, case in enumerate(seeds):
    (inputs / f'seed{i}').write_bytes(case)

  def try_one(case):
    session.run(case)
    if session.n >= cases:
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
  sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
  main(*sys.argv[1:])
