"""Confidence intervals of rates, means and differences."""

import math
from typing import Sequence

import numpy as np
from scipy import stats


def wilson(rate: float, n: int) -> tuple[float, float]:
  """Returns the 95 % Wilson score interval of a rate over n (Wilson 1927)."""
  if n == 0:
    return 0.0, 1.0
  z = 1.959964
  centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
  half = z / (1 + z * z / n) * math.sqrt(
      rate * (1 - rate) / n + z * z / (4 * n * n))
  return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
  """Returns the 95 % percentile bootstrap interval of a mean (Efron 1979).

  Of the differences of two models, one for each record, it is the interval of a
  paired comparison. The same values and seed give the same interval.
  """
  n = len(values)
  if n == 1:  # SciPy refuses a single value.
    return float(values[0]), float(values[0])
  # In batches: all resamples of 100,000 values at once take gigabytes.
  found = stats.bootstrap(
      (np.asarray(values, np.float64),), np.mean, method='percentile',
      confidence_level=0.95, n_resamples=10_000,
      batch=max(1, 10**7 // n), rng=np.random.default_rng(seed))
  low, high = found.confidence_interval
  return float(low), float(high)
