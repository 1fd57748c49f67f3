"""Simulates how often a sweep's 95 % interval covers the true difference.

    python tests/benchmarks/sweep_coverage.py [--repeats=2000]

The difference of two cells on a record under a seed is the sum of the true gain
(0 here), an effect of the seed, an effect of the record and noise, all normal.
The columns have different sizes of these effects: the interval must hold
whether seeds or records differ more.
"""

import argparse

import numpy as np

from gemma_sft import pages
from gemma_sft.sweeping import significance

_SEEDS = (1, 3, 5)
_RECORDS = (24, 60, 120, 500)
# Standard deviations of seeds, records and noise, for verdicts from 0 to 1.
_PARTS = {'records only': (0.0, 0.2, 0.4),
          'small effect of seeds': (0.05, 0.2, 0.4),
          'large effect of seeds': (0.2, 0.2, 0.4)}


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
  print(pages.table(('seeds', 'records', *_PARTS), [
      (seeds, records, *(f'{coverage(seeds, records, parts, repeats):.1%}'
                         for parts in _PARTS.values()))
      for seeds in _SEEDS for records in _RECORDS]))


if __name__ == '__main__':
  main()
