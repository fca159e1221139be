"""Class sets that grow greedily from confused pairs of classes, in place of K-means (section 5.3)."""

import numpy as np
from jax.typing import ArrayLike

from distill_jax import ranges, shapes
from distill_jax.errors import UserError


def greedy_sets(matrix: ArrayLike, k: int, size: int) -> np.ndarray:
    """Overlapping sets that grow from the pairs of classes that are predicted together most.

    A set begins with the strongest pair that no earlier set has. Then it takes, one after another, the
    class with the most covariance (or confusions) with its classes, where pairs that an earlier set has
    count 0. So each set adds as much of what is confused as it can, one class at a time.

    Args:
        matrix: `[C, C]`, from `clustering.prediction_covariance`, which needs no labels, or
            `clustering.confusion`. Its symmetric part is taken, and values below 0 count as 0.
        k: number of sets.
        size: S, in 2..C.

    Returns:
        int32 `[k, S]`, each row sorted.

    Raises:
        UserError: if the size is not in 2..C, k is below 1, or the matrix is not finite.

    Examples:
        Classes 0 and 1 are confused, and 1 and 2 a little less.

        >>> import numpy as np
        >>> from distill_jax.specialists import greedy
        >>> matrix = np.zeros((4, 4))
        >>> matrix[0, 1], matrix[1, 2], matrix[2, 3] = 3.0, 2.0, 1.0
        >>> print(greedy.greedy_sets(matrix, k=2, size=2))
        [[0 1]
         [1 2]]
    """
    num_classes = shapes.check(matrix=(matrix, "float C C"))["C"]
    ranges.check_value("k", k, ranges.count())
    if not 2 <= size <= num_classes:
        raise UserError(f"a greedy class set has 2 to {num_classes} classes, not {size}")
    own = np.asarray(matrix, np.float64)
    if not np.isfinite(own).all():
        raise UserError("the matrix is not finite, so its pairs can't be ordered")
    left = np.maximum((own + own.T) / 2, 0.0)
    np.fill_diagonal(left, 0.0)
    sets = np.zeros((k, size), np.int32)
    for one in sets:
        one[:2] = np.unravel_index(left.argmax(), left.shape)
        if one[0] == one[1]:  # nothing is left: the first classes
            one[:2] = 0, 1
        gain = left[one[0]] + left[one[1]]
        gain[one[:2]] = -np.inf
        for i in range(2, size):
            one[i] = gain.argmax()
            gain += left[one[i]]
            gain[one[i]] = -np.inf
        left[np.ix_(one, one)] = 0.0
        one.sort()
    return sets
