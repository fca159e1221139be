"""Class sets grown from confused pairs, against confusions planted by hand."""

import numpy as np
import pytest

from distill_jax.errors import UserError
from distill_jax.specialists import coverage, greedy


def planted(groups, num_classes, strength=1.0):
    """Covariances of groups of classes that are confused, the first most."""
    matrix = np.eye(num_classes)
    for rank, group in enumerate(groups):
        matrix[np.ix_(group, group)] += strength / (rank + 1)
    return matrix


def test_sets_are_the_confused_groups_which_may_overlap():
    groups = [[0, 3, 7], [3, 5, 8], [1, 2, 9]]
    found = greedy.greedy_sets(planted(groups, 12), 3, 3)
    assert found.dtype == np.int32 and found.tolist() == groups


def test_a_set_is_filled_up_with_what_is_confused_with_any_of_its_classes():
    matrix = np.zeros((6, 6))
    matrix[0, 1], matrix[1, 4], matrix[4, 2] = 5.0, 3.0, 1.0
    assert greedy.greedy_sets(matrix, 1, 4).tolist() == [[0, 1, 2, 4]]
    assert greedy.greedy_sets(matrix.T, 1, 4).tolist() == [[0, 1, 2, 4]]


def test_sets_are_sets_also_where_nothing_is_confused():
    sets = greedy.greedy_sets(-np.ones((5, 5)), 3, 2)
    coverage.check_class_sets(sets, 5)
    assert (np.diff(sets, axis=1) > 0).all()


def test_they_cover_more_of_what_is_confused_than_random_sets():
    random = np.random.default_rng(0)
    matrix = random.exponential(size=(40, 40)) ** 3
    matrix += matrix.T

    def covered(sets):
        inside = np.zeros((40, 40), bool)
        for one in sets:
            inside[np.ix_(one, one)] = True
        np.fill_diagonal(inside, False)
        return matrix[inside].sum()

    others = [random.permutation(40)[:10] for _ in range(4)]
    assert covered(greedy.greedy_sets(matrix, 4, 10)) > 1.3 * covered(others)


@pytest.mark.parametrize(
    ("matrix", "k", "size", "message"),
    [
        (np.eye(4), 1, 5, "a greedy class set has 2 to 4 classes, not 5"),
        (np.eye(4), 1, 1, "2 to 4 classes, not 1"),
        (np.eye(4), 0, 2, "k is 0"),
        (np.full((4, 4), np.nan), 1, 2, "not finite"),
    ],
)
def test_mistakes_are_named(matrix, k, size, message):
    with pytest.raises(UserError, match=message):
        greedy.greedy_sets(matrix, k, size)
