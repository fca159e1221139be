"""What the paper says of temperatures, and how far objectives are apart: differences with intervals.

Nets of one seed begin alike and see the same batches, so their errors are compared in pairs.
"""

from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from experiments.common.statistics import mean_interval
from experiments.common.study import Row, make_row

_COLD, _MIDDLE, _HOT = "T below 2.5", "T from 2.5 to 4", "T above 8"
_RANGES: dict[str, Callable[[float], bool]] = {
    _COLD: lambda t: t < 2.5,
    _MIDDLE: lambda t: 2.5 <= t <= 4,
    _HOT: lambda t: t > 8,
}


def of_temperatures(
    config: ConfigDict, net: str, temperatures: Sequence[float], errors: np.ndarray
) -> list[Row]:
    """Section 3: all above 8 alike for 300 units or more; 2.5 to 4 significantly better for 30.

    Args:
        config: of the study.
        net: its name in the rows, "2x300".
        temperatures: `[V]`.
        errors: `[V, seeds]`.
    """
    table, means = "mnist_temperature", {}
    for name, holds in _RANGES.items():
        inside = [holds(t) for t in temperatures]
        if any(inside):
            means[name] = errors[inside].mean(axis=0)
    pairs = [(_MIDDLE, _HOT), (_MIDDLE, _COLD)]
    found = [
        difference_row(config, table, f"{net}, {a} less {b}", means[a] - means[b])
        for a, b in pairs
        if a in means and b in means
    ]
    hot = sorted((t, v) for v, t in enumerate(temperatures) if t > 8)
    if len(hot) > 1:
        (_, coolest), (_, hottest) = hot[0], hot[-1]
        row = f"{net}, highest T less lowest T above 8"
        found.append(difference_row(config, table, row, errors[hottest] - errors[coolest]))
    return found


def difference_row(config: ConfigDict, table: str, row: str, differences: np.ndarray) -> Row:
    """A row of differences of errors `[seeds]`, with Student's interval."""
    return make_row(
        config,
        table,
        row,
        "difference_of_errors",
        differences,
        seconds=0.0,
        interval=mean_interval(differences),
    )
