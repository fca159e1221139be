"""A sweep of four points, for run.sh."""

from experiments.common.config import Overrides, product


def sweep(name: str) -> list[Overrides]:
    """The four points; whatever the name."""
    return product({"baseline.learning_rate": [0.0005, 0.001, 0.002, 0.004]})
