"""Word errors counted by hand."""

import doctest

import pytest

from distill_jax.errors import UserError
from experiments.speech import word_errors


def test_examples():
    result = doctest.testmod(word_errors)
    assert result.attempted and not result.failed


def test_by_hand():
    references = ["the cat sat on the mat", "go", "stay here", "i read it"]
    # A substitution (sat, sit) and a deletion (the); an insertion; everything deleted; all right.
    hypotheses = ["the cat sit on mat", "go now", "", "<s> i read(2) [NOISE] it <sil> ++um++"]
    counts = word_errors.count(references, hypotheses)
    assert {name: each.tolist() for name, each in counts.items()} == {
        "words": [6, 1, 2, 3],
        "substitutions": [1, 0, 0, 0],
        "deletions": [1, 0, 2, 0],
        "insertions": [0, 1, 0, 0],
    }
    assert word_errors.by_utterance(counts).tolist() == [2, 1, 2, 0]
    assert word_errors.total(counts) == {
        "words": 12,
        "substitutions": 1,
        "deletions": 3,
        "insertions": 1,
        "word_error_rate": pytest.approx(100 * 5 / 12),
    }


def test_of_nothing():
    with pytest.raises(UserError, match="2 hypotheses for 1 references"):
        word_errors.count(["a"], ["a", "b"])
    with pytest.raises(UserError, match="no words"):
        word_errors.count(["", ""], ["a", "b"])
