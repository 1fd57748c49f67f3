"""How often a sweep's 95 % interval covers the truth: a table by simulation.

    python tests/benchmarks/sweep_coverage.py [--repeats=2000]

A difference of two cells on one record under one seed is the true gain (0
here), what the pair of runs of that seed got luckier by, what the record
favours one of them by, and the rest, all normal. The parts' sizes are the
columns: the interval is to hold whether seeds or records differ more.
"""

import argparse

import numpy as np

from gemma_sft.sweeping import significance

_SEEDS = (1, 3, 5)
_RECORDS = (24, 60, 120, 500)
# Standard deviations of seeds, records and the rest, of verdicts from 0 to 1.
_PARTS = {'records only': (0.0, 0.2, 0.4),
          'little luck of seeds': (0.05, 0.2, 0.4),
          'much luck of seeds': (0.2, 0.2, 0.4)}


def coverage(seeds: int, records: int, parts, repeats: int) -> float:
  """Returns the share of simulated sweeps whose interval holds the truth."""
  generator = np.random.default_rng([seeds, records, repeats])
  by_seed, by_record, rest = parts
  covered = 0
  for _ in range(repeats):
    d_SR = (by_seed * generator.standard_normal((seeds, 1))
            + by_record * generator.standard_normal((1, records))
            + rest * generator.standard_normal((seeds, records)))
    difference = significance.crossed(d_SR)
    covered += difference.low <= 0 <= difference.high
  return covered / repeats


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--repeats', type=int, default=2000)
  repeats = parser.parse_args().repeats
  print('| seeds | records | ' + ' | '.join(_PARTS) + ' |')
  print('|---|---|' + '---|' * len(_PARTS))
  for seeds in _SEEDS:
    for records in _RECORDS:
      shares = [coverage(seeds, records, p, repeats) for p in _PARTS.values()]
      print(f'| {seeds} | {records} | '
            + ' | '.join(f'{s:.1%}' for s in shares) + ' |', flush=True)


if __name__ == '__main__':
  main()
