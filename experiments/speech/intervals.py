"""Confidence intervals by utterance: its frames, or its words, are not independent of each other.

Whatever is a ratio of two sums over utterances has one: an accuracy, a word error rate, the
difference of two nets in either, the share of a gain. Utterances are drawn anew, with all that was
counted in them, so nets are compared on the same ones. The nets stay as they are: how much they differ
is the spread over seeds, which stands beside.
"""

from collections.abc import Mapping

import numpy as np

from experiments.common import statistics
from experiments.common.statistics import Interval


def count_frames(examples: Mapping[str, np.ndarray]) -> np.ndarray:
    """The frames of each utterance that have a label, int64 `[U]`."""
    return _count(examples, examples["label"] >= 0)


def count_right(predicted: np.ndarray, examples: Mapping[str, np.ndarray]) -> np.ndarray:
    """The frames of each utterance with the right state, int64 `[U]`.

    Args:
        predicted: int `[N]`, a state for each frame.
        examples: from `frames.pack`, with "label" and "utterance" `[N]`.
    """
    return _count(examples, predicted == examples["label"])  # false for unknown labels


def percent(part: np.ndarray, whole: np.ndarray) -> Interval | None:
    """The 95 % interval of `100 * sum(part) / sum(whole)`, both `[U]`; None if it has no end.

    Examples:
        >>> right, frames = np.array([5, 6, 7, 9] * 5), np.full(20, 10)
        >>> low, high = percent(right, frames)
        >>> print(f"{low:.0f} to {high:.0f}")
        62 to 74
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        found = statistics.bootstrap_interval(
            lambda part, whole: 100.0 * part.sum() / whole.sum(), part, whole
        )
    return found if np.isfinite(found).all() else None


def _count(examples: Mapping[str, np.ndarray], chosen: np.ndarray) -> np.ndarray:
    utterances = examples["utterance"]
    return np.bincount(utterances[chosen], minlength=utterances.max() + 1)
