"""Intervals against published and analytic values."""

import warnings

import numpy as np
import pytest

from gemma_sft.evaluation import intervals


@pytest.mark.parametrize('rate, n, low, high', (
    # Against R's prop.test(..., correct=FALSE).
    (0.5, 10, 0.2366, 0.7634),
    (0.1, 50, 0.0435, 0.2136),
    (0.0, 20, 0.0, 0.1611),
    (1.0, 20, 0.8389, 1.0),
    (0.0, 0, 0.0, 1.0),  # Nothing was judged.
))
def test_wilson(rate, n, low, high):
  assert intervals.wilson(rate, n) == pytest.approx((low, high), abs=1e-4)


def test_bootstrap_of_a_large_sample_is_the_normal_interval():
  values = np.random.default_rng(3).normal(5.0, 2.0, 500)
  first, second = (intervals.bootstrap(values, seed) for seed in (0, 1))
  half = 1.96 * values.std() / np.sqrt(len(values))
  # The bootstrap's own noise at 10,000 resamples is about 2 % of the width.
  assert first == pytest.approx(
      (values.mean() - half, values.mean() + half), abs=0.1 * half)
  assert first != second
  assert first == pytest.approx(second, abs=0.1 * half)


@pytest.mark.parametrize('values, low, high', (
    # Of the resampler that stood here before SciPy's: the same draws.
    (np.linspace(0, 1, 15) ** 2, 0.1908163265306122, 0.5149744897959182),
    ([0.0, 1.0, 1.0, 0.0, 1.0], 0.2, 1.0),
    ([0.25] * 4, 0.25, 0.25),
    ([1.0], 1.0, 1.0)))
def test_bootstrap_is_repeatable_and_degenerate_without_a_warning(
    values, low, high):
  with warnings.catch_warnings(action='error'):
    found = intervals.bootstrap(values)
  assert found == pytest.approx((low, high), abs=1e-12)
