"""Confidence intervals: of a mean over seeds, and of what is computed of test examples."""

from collections.abc import Callable

import numpy as np

Interval = tuple[float, float]
"""The lower and the upper end."""


def mean_interval(values: np.ndarray, level: float = 0.95) -> Interval | None:
    """Student's interval of the mean of independent values; of differences of pairs, the paired test.

    Args:
        values: `[seeds]`.
        level: of confidence.

    Returns:
        None for fewer than two values.

    Examples:
        >>> low, high = mean_interval(np.array([1.0, 2.0, 3.0]))
        >>> print(f"{low:.2f} to {high:.2f}")
        -0.48 to 4.48
    """
    from scipy import special  # late: it takes a tenth of a command's start

    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return None
    half = special.stdtrit(len(values) - 1, (1 + level) / 2) * standard_error(values)
    return float(values.mean() - half), float(values.mean() + half)


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values `[n]`, n above 1.

    Examples:
        >>> print(f"{standard_error(np.array([1.0, 2.0, 3.0])):.3f}")
        0.577
    """
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def bootstrap_interval(
    statistic: Callable[..., float], *fields: np.ndarray, level: float = 0.95, resamples: int = 2000
) -> Interval:
    """The interval of a statistic of test examples, or utterances: they are drawn anew, with repeats.

    Args:
        statistic: of the fields, each with the same rows. A difference of two nets on the same examples
            is a paired comparison.
        fields: `[N, ...]`, a row for each example.
        level: of confidence.
        resamples: draws of N rows; the same ones every time.

    Examples:
        >>> right = np.arange(100) < 60
        >>> low, high = bootstrap_interval(np.mean, right)
        >>> print(f"{low:.1f} to {high:.1f}")
        0.5 to 0.7
    """
    random, size = np.random.default_rng(0), len(fields[0])
    found = []
    for _ in range(resamples):
        rows = random.integers(0, size, size)
        found.append(statistic(*(field[rows] for field in fields)))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
