"""How sure a measured share, mean or difference is."""

import math
from typing import Sequence

import numpy as np

_RESAMPLES = 10_000
_LEVEL = 0.95


def wilson(share: float, n: int) -> tuple[float, float]:
  """Returns the 95 % Wilson score interval of a share of n (Wilson 1927)."""
  if n == 0:
    return 0.0, 1.0
  z = 1.959964
  centre = (share + z * z / (2 * n)) / (1 + z * z / n)
  half = z / (1 + z * z / n) * math.sqrt(
      share * (1 - share) / n + z * z / (4 * n * n))
  return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
  """Returns the 95 % percentile bootstrap interval of a mean (Efron 1979).

  Differences of two models on the same records, given as one value a record,
  make it a paired interval.

  Args:
    values: One a record; at least one.
    seed: Of the resampling: the same values give the same interval.
  """
  values = np.asarray(values, np.float64)
  rng = np.random.default_rng(seed)
  means = []
  # Some thousand rows at a time: all at once would be gigabytes for 10^5.
  step = max(1, 10**7 // len(values))
  for start in range(0, _RESAMPLES, step):
    index = rng.integers(
        0, len(values), (min(step, _RESAMPLES - start), len(values)))
    means.append(values[index].mean(axis=1))
  tail = (1 - _LEVEL) / 2
  low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
  return float(low), float(high)
