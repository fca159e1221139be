"""Confidence intervals against scipy's own, and how often they hold the true value."""

import doctest

import numpy as np
from scipy import stats

from experiments.common import statistics


def test_examples():
    result = doctest.testmod(statistics)
    assert result.attempted
    assert not result.failed


def test_a_mean_of_seeds_has_students_interval():
    values = np.array([1.0, 4.0, 2.0, 2.5])
    test = stats.ttest_1samp(values, 0.0)
    np.testing.assert_allclose(
        statistics.mean_interval(values), test.confidence_interval(0.95), rtol=1e-12
    )
    assert statistics.mean_interval(values[:1]) is None


def test_resampled_examples_have_the_interval_of_the_normal_approximation():
    random = np.random.default_rng(3)
    errors, words = random.poisson(2, 400), random.integers(4, 12, 400)
    low, high = statistics.bootstrap_interval(
        lambda errors, words: errors.sum() / words.sum(), errors, words
    )
    rate = errors.sum() / words.sum()
    spread = (errors - rate * words).std() / np.sqrt(400) / words.mean()
    np.testing.assert_allclose(
        [low, high], rate + np.array([-1.96, 1.96]) * spread, atol=0.1 * spread
    )


def test_intervals_of_a_mean_hold_the_truth_as_often_as_they_say():
    draws = np.random.default_rng(5).normal(1.0, 2.0, (400, 5))
    found = np.array([statistics.mean_interval(values) for values in draws])
    held = np.mean((found[:, 0] < 1.0) & (found[:, 1] > 1.0))
    assert 0.92 < held < 0.98
