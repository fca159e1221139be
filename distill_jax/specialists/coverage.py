"""What class sets cover: which classes, how often, and which of the generalist's mistakes (Table 4).

Class sets are int32 `[K, S]`, padded with C (`clustering`).
"""

import jax
import numpy as np
from jax.typing import ArrayLike

from distill_jax import shapes
from distill_jax.errors import UserError
from distill_jax.train_checks import check_labels


def check_class_sets(class_sets: ArrayLike, num_classes: int) -> None:
    """Checks that a set's classes are distinct and in 0..C-1, or C, padding; what is traced passes.

    Args:
        class_sets: int `[..., S]`.
        num_classes: C.

    Raises:
        UserError: for a class that is not; the message names it.

    Examples:
        >>> import numpy as np
        >>> from distill_jax.specialists import coverage
        >>> coverage.check_class_sets(np.array([[0, 1], [3, 4]]), num_classes=4)
    """
    shapes.check(class_sets=(class_sets, "int ... S"))
    try:
        class_sets = np.asarray(class_sets)
    except jax.errors.TracerArrayConversionError:
        return
    wrong = class_sets[(class_sets < 0) | (class_sets > num_classes)]
    if len(wrong):
        raise UserError(
            f"class_sets name class {wrong[0]}; there are {num_classes}, so expected 0 to "
            f"{num_classes - 1}, or {num_classes} for padding"
        )
    ordered = np.sort(class_sets, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] < num_classes)
    if twice.any():
        *place, _ = np.argwhere(twice)[0].tolist()
        which = f"set {place[0] if len(place) == 1 else place}" if place else "a set"
        raise UserError(
            f"{which} names class {ordered[..., 1:][twice][0]} twice; expected distinct classes"
        )


def check_disjoint(sets: ArrayLike, num_classes: int) -> None:
    """Checks that no class is in two of the sets `[K, S]`.

    Raises:
        UserError: if one is; the message names two sets and a class that they share.

    Examples:
        >>> import numpy as np
        >>> from distill_jax.specialists import coverage
        >>> coverage.check_disjoint(np.array([[0, 1], [2, 3]]), num_classes=4)
    """
    members = _members(sets, num_classes)
    shared = np.flatnonzero(members.sum(axis=0) > 1)
    if len(shared):
        first, second, *_ = np.flatnonzero(members[:, shared[0]])
        raise UserError(
            f"sets {first} and {second} share class {shared[0]} ({len(shared)} classes are in more "
            "than one set): a partition puts every class in one set"
        )


def sets_per_class(sets: ArrayLike, num_classes: int) -> np.ndarray:
    """How many of the sets `[K, S]` contain each class (the rows of Table 4): int32 `[C]`.

    Examples:
        >>> import numpy as np
        >>> from distill_jax.specialists import coverage
        >>> print(coverage.sets_per_class(np.array([[0, 1], [1, 2]]), num_classes=4))
        [1 2 1 0]
    """
    return _members(sets, num_classes).sum(axis=0, dtype=np.int32)


def statistics(sets: ArrayLike, num_classes: int) -> dict[str, float]:
    """Statistics of `sets_per_class`.

    Args:
        sets: int32 `[K, S]`.
        num_classes: C.

    Returns:
        "covered": share of the classes that are in any set, 0..1; "mean_cover" and "max_cover": number
        of sets that contain a covered class.

    Examples:
        >>> import numpy as np
        >>> from distill_jax.specialists import coverage
        >>> found = coverage.statistics(np.array([[0, 1], [1, 2]]), num_classes=4)
        >>> {name: round(value, 3) for name, value in found.items()}
        {'covered': 0.75, 'mean_cover': 1.333, 'max_cover': 2.0}
    """
    cover = sets_per_class(sets, num_classes)
    covered = cover[cover > 0]
    return {
        "covered": len(covered) / num_classes,
        "mean_cover": float(covered.mean()),
        "max_cover": float(covered.max()),
    }


def mistakes_covered(
    sets: ArrayLike, num_classes: int, labels: ArrayLike, predictions: ArrayLike
) -> float:
    """The share of the generalist's mistakes that some specialist could correct.

    A specialist tells two classes apart only if both are in its set. So this is, before any training, an
    upper bound on what a choice of sets can gain.

    Args:
        sets: int32 `[K, S]`.
        num_classes: C.
        labels: int `[N]`, in 0..C-1; one below 0 is unknown, and no mistake.
        predictions: int `[N]`, the generalist's most probable classes.

    Returns:
        The share whose true and predicted class are in the same set, 0..1; 1 if there are no mistakes.

    Examples:
        >>> import numpy as np
        >>> from distill_jax.specialists import coverage
        >>> sets = np.array([[0, 1], [2, 3]])
        >>> coverage.mistakes_covered(sets, 4, np.array([0, 1, 2]), np.array([1, 2, 2]))
        0.5
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    shapes.check(labels=(labels, "int N"), predictions=(predictions, "int N"))
    check_labels([{"label": labels}, {"label": predictions}], num_classes, "mistakes_covered")
    wrong = (labels != predictions) & (labels >= 0)
    if not wrong.any():
        return 1.0
    members = _members(sets, num_classes)
    together = members[:, labels[wrong]] & members[:, predictions[wrong]]
    return float(together.any(axis=0).mean())


def _members(sets: ArrayLike, num_classes: int) -> np.ndarray:
    """Which set contains which class: bool `[K, C]`."""
    sets = np.asarray(sets)
    shapes.check(sets=(sets, "int K S"))
    check_class_sets(sets, num_classes)
    members = np.zeros((len(sets), num_classes + 1), bool)
    np.put_along_axis(members, sets, True, axis=1)
    return members[:, :num_classes]
