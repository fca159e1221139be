"""Specialists against all else, as differences of pairs: each seed's generalist is the same for both.

The stages keep which test examples each system has right; here they are compared. A difference is one
of accuracies, relative to the generalist's. It has two intervals: over seeds (Student), which says what
other generalists would give, and over test examples or typefaces (bootstrap) with these nets.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from distill_jax.data.images import Examples
from distill_jax.errors import UserError
from distill_jax.nets import Net
from distill_jax.specialists import coverage
from experiments.common import statistics
from experiments.common.study import Context, Row, make_row, write_arrays
from experiments.specialists.clusters import load_sets
from experiments.specialists.data import load_data

DISTILLED = "distilled, from the generalist"
LABELS = "trained as long on labels"
LONGER = "generalist, trained as much longer"
_TABLE, _KEPT = "specialists_comparison", "right.npz"


def system(config: ConfigDict) -> str:
    """The name of the generalist with its specialists."""
    return f"generalist + {config.clusters.count} specialists"


def keep(context: Context, right: Mapping[str, Sequence[np.ndarray] | np.ndarray]) -> None:
    """Keeps which test examples each system of a stage has right: bool `[seeds, N]` by its name."""
    arrays = {name: np.asarray(each, np.uint8) for name, each in right.items()}
    write_arrays(context.directory / _KEPT, **arrays)


def right_of(net: Net, examples: Examples) -> np.ndarray:
    """Which examples the nets of all seeds have right: bool `[seeds, N]`."""
    assert net.members is not None
    each = [net.member(s).logits(examples["inputs"]) for s in range(net.members)]
    return np.stack([logits.argmax(axis=-1) == examples["label"] for logits in each])


def compare(context: Context) -> list[Row]:
    """Differences of systems with their intervals, and how the gain grows with the coverage."""
    config, test = context.config, load_data(context.config).test
    wanted = {
        "clusters": False,
        "other_sets": config.clusters.both_methods,
        "mixture": config.mixture.epochs or config.mixture.scratch_epochs,
    }
    stages = [stage for stage in context.inputs if wanted.get(stage, True)]
    kept = {stage: _load(context, stage) for stage in stages}
    right = {name: each for found in kept.values() for name, each in found.items()}
    whole = system(config)
    others = [name for stage in kept if stage != "distilled" for name in kept[stage]]
    pairs = [
        *((whole, name) for name in others if not name.startswith(f"{whole}, n") and name != whole),
        (f"{whole}, n = 1", "generalist"),
        *((name, "generalist") for name in kept.get("other_sets", ())),
        (LONGER, "generalist"),
        (DISTILLED, "generalist"),
        (DISTILLED, LABELS),
    ]
    rows = []
    for first, second in pairs:
        fields = (right[first], right[second], right["generalist"])
        rows += _difference(config, f"{first}, against {second}", fields, test)
    whole_gain, own_gain = (
        right[name].mean(axis=1) - right["generalist"].mean(axis=1) for name in (whole, DISTILLED)
    )
    if whole_gain.all():  # of nothing there is no share
        share = 100.0 * own_gain / whole_gain
        interval = statistics.mean_interval(share)
        rows += _rows(config, DISTILLED, [("gain_kept_percent", interval)], share)
    slopes = [
        _slope(
            coverage.sets_per_class(load_sets(context, s), load_data(config).num_classes),
            test["label"],
            right["generalist"][s],
            right[whole][s],
        )
        for s in range(len(config.seeds))
    ]
    return rows + _rows(
        config,
        "gain with each further specialist of a covered class (slope of Table 4)",
        [("relative_change_percent", statistics.mean_interval(np.array(slopes)))],
        slopes,
    )


def _load(context: Context, stage: str) -> dict[str, np.ndarray]:
    path = context.inputs[stage] / _KEPT
    if not path.exists():
        raise UserError(
            f"{path} is missing, as stage {stage} was finished by an earlier version: delete "
            f"{path.parent} and run it again"
        )
    return {name: array.astype(np.int32) for name, array in np.load(path).items()}


def _difference(
    config: ConfigDict, name: str, right: tuple[np.ndarray, ...], examples: Examples
) -> list[Row]:
    """Rows of the difference of two systems, relative to a third: each `[seeds, N]`."""
    values = 100.0 * (right[0].mean(axis=1) - right[1].mean(axis=1)) / right[2].mean(axis=1)
    return _rows(config, name, _intervals(values, right, examples), values)


def _intervals(
    values: np.ndarray, right: tuple[np.ndarray, ...], examples: Examples
) -> Iterator[tuple[str, statistics.Interval | None]]:
    """The intervals of a difference, by the name of the metric."""
    yield "difference_percent", statistics.mean_interval(values)
    by_example = [each.T for each in right]
    yield "difference_percent_over_examples", statistics.bootstrap_interval(_mean, *by_example)
    if "typeface" in examples:
        _, face = np.unique(examples["typeface"], return_inverse=True)
        sums = [np.zeros((face.max() + 1, len(values)), np.int64) for _ in right]
        for total, each in zip(sums, by_example, strict=True):
            np.add.at(total, face, each)
        yield "difference_percent_over_typefaces", statistics.bootstrap_interval(_mean, *sums)


def _mean(first: np.ndarray, second: np.ndarray, base: np.ndarray) -> float:
    """The mean over seeds of a relative difference, per cent: of right ones `[N, seeds]`."""
    change = first.sum(axis=0) - second.sum(axis=0)
    return float((100.0 * change / np.maximum(base.sum(axis=0), 1)).mean())


def _slope(covers: np.ndarray, label: np.ndarray, before: np.ndarray, after: np.ndarray) -> float:
    """Relative change of accuracy, per cent, for each further specialist that covers the class.

    Least squares over the numbers of specialists from 1 on, weighted with what was right before.

    Args:
        covers: int `[C]`, sets of each class.
        label: int `[N]`.
        before, after: which examples are right, `[N]`.

    Returns:
        0 where all covered classes are in as many sets.
    """
    of_example = covers[label]
    numbers = np.unique(of_example[(of_example > 0) & (before > 0)])
    if len(numbers) < 2:
        return 0.0
    counts = np.array([before[of_example == n].sum() for n in numbers])
    later = np.array([after[of_example == n].sum() for n in numbers])
    changes = 100.0 * (later - counts) / counts
    return float(np.polyfit(numbers, changes, 1, w=np.sqrt(counts))[0])


def _rows(
    config: ConfigDict,
    name: str,
    intervals: Iterable[tuple[str, statistics.Interval | None]],
    values: Sequence[float] | np.ndarray,
) -> list[Row]:
    """A row for each interval of the same values `[seeds]`."""
    return [
        make_row(
            config,
            _TABLE,
            name,
            metric,
            values,
            seconds=0.0,
            interval=interval,
        )
        for metric, interval in intervals
    ]
