"""Sweeps: lists of config overrides. A config file's `sweep(name)` builds them from these."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

Overrides = dict[str, Any]
"""Dotted config keys and their values: one point of a sweep."""


def product(values: Mapping[str, Sequence[Any]]) -> list[Overrides]:
    """Every combination: `product({"a": [1, 2], "b": [3, 4]})` has four points."""
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def zipped(values: Mapping[str, Sequence[Any]]) -> list[Overrides]:
    """The first values together, the second together, and so on; all of one length."""
    return [dict(zip(values, point, strict=True)) for point in zip(*values.values(), strict=True)]
