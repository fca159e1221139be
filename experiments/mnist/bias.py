"""Raising or lowering the biases of classes that a transfer set left out (section 3)."""

from collections.abc import Sequence

import numpy as np

SHIFTS = np.round(np.arange(0.0, 20.05, 0.1), 1)


def shift_classes(logits: np.ndarray, classes: Sequence[int], shift: float) -> np.ndarray:
    """Logits `[N, C]` with `shift` added to those of some classes."""
    shifted = logits.copy()
    shifted[:, list(classes)] += shift
    return shifted


def error_mask(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which examples the largest logit gets wrong: bool `[N]`."""
    return logits.argmax(axis=-1) != labels


def best_shift(
    logits: np.ndarray, labels: np.ndarray, classes: Sequence[int], shifts: np.ndarray
) -> float:
    """The shift with the fewest errors on these labelled examples; of equals, the smallest."""
    counts = [error_mask(shift_classes(logits, classes, shift), labels).sum() for shift in shifts]
    return float(shifts[int(np.argmin(counts))])


def prior_shift(logits: np.ndarray, classes: Sequence[int], prior: float) -> float:
    """The shift at which the classes' mean probability over unlabelled inputs is their prior.

    Needs no labels: inputs `[N, C]` of all classes, and the share `prior` that the classes have among
    them. The mean probability rises with the shift, so it is found by bisection.
    """
    low, high = -50.0, 50.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        shifted = shift_classes(logits.astype(np.float64), classes, middle)
        odds = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
        share = (odds[:, list(classes)].sum(axis=-1) / odds.sum(axis=-1)).mean()
        low, high = (middle, high) if share < prior else (low, middle)
    return 0.5 * (low + high)
