"""Transfer sets: the examples that a student is distilled on (sections 1 and 3).

Each function maps examples to examples: a dict of arrays that share their leading axis `[N]`. Soft
targets that were attached before stay with their examples.
"""

from collections.abc import Collection

import numpy as np

from distill_jax import shapes
from distill_jax.data.images import Examples
from distill_jax.errors import UserError


def select(examples: Examples, rows: np.ndarray) -> Examples:
    """The examples at `rows` (indices or a mask)."""
    _check(examples)
    return {name: field[rows] for name, field in examples.items()}


def fraction(examples: Examples, share: float, seed: int) -> Examples:
    """A random share in (0, 1] of the examples; with the same seed, a smaller share is a subset."""
    if not 0 < share <= 1:
        raise UserError(
            f"the fraction of a transfer set must be above 0 and at most 1, not {share}"
        )
    order = _order(examples, seed)
    return select(examples, np.sort(order[: max(1, round(share * len(order)))]))


def without_classes(examples: Examples, classes: Collection[int]) -> Examples:
    """The examples of all other classes."""
    _check(examples, label="int N?")
    return select(examples, ~np.isin(examples["label"], list(classes)))


def only_classes(examples: Examples, classes: Collection[int]) -> Examples:
    """The examples of these classes only."""
    _check(examples, label="int N?")
    return select(examples, np.isin(examples["label"], list(classes)))


def labels_known(examples: Examples, share: float, seed: int) -> Examples:
    """Keeps a random share, 0..1, of the labels and replaces the others by -1.

    Adds "label_known", bool `[N]`. The other labels are gone, so no later step can use them by mistake.
    """
    if not 0 <= share <= 1:
        raise UserError(f"the share of known labels must be in 0..1, not {share}")
    _check(examples, label="int N?")
    order = _order(examples, seed)
    known = np.zeros(len(order), bool)
    known[order[: round(share * len(order))]] = True
    known &= examples["label"] >= 0  # labels removed before stay unknown
    return {**examples, "label": np.where(known, examples["label"], -1), "label_known": known}


def hold_out(examples: Examples, count: int, seed: int) -> tuple[Examples, Examples]:
    """Splits off `count` random examples: (the rest, the held-out ones)."""
    order, size = _order(examples, seed), len(examples["id"])
    if not 0 <= count < size:
        raise UserError(f"can't hold out {count} of {size} examples")
    return select(examples, np.sort(order[count:])), select(examples, np.sort(order[:count]))


def _order(examples: Examples, seed: int) -> np.ndarray:
    _check(examples, id="int N?")
    return np.random.default_rng(seed).permutation(len(examples["id"]))


def _check(examples: Examples, **needed: str) -> None:
    """Raises a UserError unless these fields are there, and all fields are of one length."""
    fields = {**dict.fromkeys(examples, "any N? *"), **needed}
    shapes.check_fields(examples, "the set of examples", **fields)
