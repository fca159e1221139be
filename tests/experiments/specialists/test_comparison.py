"""Differences of systems and their intervals, of right answers made by hand."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from distill_jax.errors import UserError
from experiments.common.study import Context
from experiments.specialists import comparison


def draw(share, seed, shape=(3, 600)):
    return (np.random.default_rng(seed).random(shape) < share).astype(np.int32)


def test_a_clear_gain_is_clear_and_none_is_not():
    before = draw(0.3, 0)
    better, same = np.maximum(before, draw(0.1, 1)), draw(0.3, 2)
    examples = {"typeface": np.arange(600) % 12}
    for right, clear in ((better, True), (same, False)):
        values = 100 * (right.mean(axis=1) - before.mean(axis=1)) / before.mean(axis=1)
        found = dict(comparison._intervals(values, (right, before, before), examples))
        assert len(found) == 3
        for low, high in found.values():
            assert low < values.mean() < high
            assert (low > 0) == clear


def test_without_typefaces_and_with_one_seed():
    right = draw(0.3, 0, (1, 50))
    found = dict(comparison._intervals(np.zeros(1), (right, right, right), {}))
    assert found == {"difference_percent": None, "difference_percent_over_examples": (0.0, 0.0)}


def test_the_slope_is_that_of_the_planted_gains():
    covers, label = np.array([0, 1, 2, 3]), np.repeat(np.arange(4), 100)
    before, after = np.zeros(400, int), np.zeros(400, int)
    for c in range(4):
        before[100 * c : 100 * c + 50] = 1
        after[100 * c : 100 * c + 50 + 2 * c] = 1  # 4 % more with each
    assert comparison._slope(covers, label, before, after) == pytest.approx(4.0)
    assert comparison._slope(np.minimum(covers, 1), label, before, after) == 0.0


def test_a_stage_of_an_earlier_version_is_named(tmp_path):
    context = Context(ConfigDict(), tmp_path, {"random": tmp_path})
    with pytest.raises(
        UserError, match=r"right.npz is missing, as stage random was finished by an"
    ):
        comparison._load(context, "random")
    comparison.keep(context, {"a": np.ones((2, 3), bool)})
    assert comparison._load(context, "random")["a"].tolist() == [[1, 1, 1]] * 2
