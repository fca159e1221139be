"""What is counted by utterance, and the intervals and differences made of it."""

import doctest

import numpy as np
import pytest

from experiments.speech import differences, intervals, table1
from experiments.speech.config import get_config


def test_examples():
    result = doctest.testmod(intervals)
    assert result.attempted and not result.failed


def test_right_frames_by_utterance():
    examples = {"utterance": np.array([0, 0, 0, 1, 2, 2]), "label": np.array([1, 2, -1, 0, 3, 3])}
    predicted = np.array([1, 0, -1, 0, 3, 3])
    assert intervals.count_frames(examples).tolist() == [2, 1, 2]
    assert intervals.count_right(predicted, examples)[1:].tolist() == [1, 2]


def test_long_runs_of_equal_frames_count_as_one():
    """Frames of an utterance that are right or wrong together: the interval is that of utterances."""
    random = np.random.default_rng(0)
    right, frames = 100 * random.integers(0, 2, 200), np.full(200, 100)
    low, high = intervals.percent(right, frames)
    share = right.sum() / 20_000
    assert (high - low) / 2 == pytest.approx(196 * np.sqrt(share * (1 - share) / 200), rel=0.1)


def test_a_share_of_no_gain_has_no_interval():
    assert intervals.percent(np.array([1, 2]), np.array([0, 0])) is None


def test_differences_are_of_pairs():
    """Nets that err on the same utterances differ by less than each is uncertain."""
    random = np.random.default_rng(1)
    words = random.integers(3, 9, 300)
    ensemble = random.binomial(words, random.uniform(0, 1, 300))[None]
    easier = np.minimum(words, ensemble + random.binomial(1, [[0.1], [0.3]], (2, 300)))
    student = np.minimum(words, ensemble + random.binomial(1, 0.05, (3, 300)))
    counts = {"baseline": easier, "ensemble": ensemble, "student": student}
    rows = differences.rows(get_config("smoke"), "word_error_rate", counts, words)
    rate = {name: 100 * each.sum(axis=1) / words.sum() for name, each in counts.items()}
    for row, a, b in zip(
        rows, ("baseline", "baseline", "student"), ("ensemble", "student", "ensemble"), strict=True
    ):
        assert row["row"] == f"{a} less {b}"
        assert row["value"] == pytest.approx(rate[a].mean() - rate[b].mean())
        assert row["interval"][0] < row["value"] < row["interval"][1]
        assert np.ptp(row["interval"]) < 0.5 * np.ptp(intervals.percent(ensemble[0], words))
    assert [row["seeds"] for row in rows] == [2, 3, 3]
    assert rows[1]["std"] == pytest.approx(rate["student"].std(ddof=1))
    right = differences.rows(
        get_config("smoke"),
        "frame_accuracy",
        {n: words - each for n, each in counts.items()},
        words,
    )
    assert right[0]["row"] == "ensemble less baseline"
    np.testing.assert_allclose([row["value"] for row in right], [row["value"] for row in rows])


def test_the_error_of_a_share_is_its_spread_over_repetitions():
    random = np.random.default_rng(2)
    top = np.array([1100])

    def shares(base, own):
        return 100 * (own.mean(-1) - base.mean(-1)) / (top - base.mean(-1))

    base, own = random.normal(1000, 8, (2000, 10, 1)), random.normal(1070, 5, (2000, 3, 1))
    expected = np.std([shares(b[:, 0], o[:, 0]) for b, o in zip(base, own, strict=True)])
    found = [table1.error_of_share(b, top, o) for b, o in zip(base, own, strict=True)]
    assert np.sqrt(np.mean(np.square(found))) == pytest.approx(expected, rel=0.05)
    assert table1.error_of_share(base[0], top, own[0, :1]) is None
