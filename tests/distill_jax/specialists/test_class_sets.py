"""Class sets and labels of specialists that are none: named where they enter, wherever that is."""

import numpy as np
import pytest

from distill_jax.errors import UserError
from distill_jax.specialists import coverage, enrichment, heads, inference

C = 5
LABELS = np.array([0, 1, 2, 3, 4, -1])
PARAMS = {"output": {"kernel": np.zeros((2, C)), "bias": np.zeros(C)}}
LOGITS = np.zeros((3, C), np.float32)
USERS = {
    "enriched_rows": lambda own: enrichment.enriched_rows(LABELS, own, C),
    "dustbin_labels": lambda own: heads.dustbin_labels(own, C),
    "correct_others": lambda own: heads.correct_others(LOGITS, own, 0.5),
    "collapse": lambda own: heads.collapse(LOGITS, own),
    "reduce_output": lambda own: heads.reduce_output(PARAMS, own, C),
    "active_specialists": lambda own: inference.active_specialists(LOGITS, own[None], 1),
    "statistics": lambda own: coverage.statistics(own[None], C),
    "combine": lambda own: inference.combine(
        inference.Evidence(
            LOGITS[:1], np.zeros((1, 1, 4), np.float32), own[None, None], np.ones((1, 1), bool)
        )
    ),
}


@pytest.mark.parametrize("name", USERS)
@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ((-1, 2, 3), "class -1; there are 5"),
        ((1, 2, 6), "class 6; there are 5"),
        ((3, 1, 3), "names class 3 twice"),
    ],
)
def test_a_class_set_that_is_none(name, classes, message):
    with pytest.raises(UserError, match=message):
        USERS[name](np.array(classes, np.int32))


def test_padding_may_repeat_but_is_no_set_alone():
    coverage.check_class_sets(np.array([[0, C, C], [2, 1, C]]), C)
    with pytest.raises(UserError, match=r"set \[5, 5\] has no class, only padding"):
        enrichment.enriched_rows(LABELS, [C, C], C)


def test_labels_of_no_class():
    wrong = np.append(LABELS, 7)
    with pytest.raises(UserError, match="label 7 at row 6; the model has 5 classes"):
        enrichment.enriched_rows(wrong, [0, 1], C)
    with pytest.raises(UserError, match="label 7 at row 6"):
        coverage.mistakes_covered([[0, 1]], C, wrong, np.zeros(7, int))


def test_an_unknown_label_is_no_mistake():
    labels, predictions = np.array([0, -1, -100, 2]), np.array([1, 4, 0, 0])
    assert coverage.mistakes_covered([[0, 1], [3, 4]], C, labels, predictions) == 0.5


def test_a_generalist_without_such_an_output_layer():
    for params in ({"head": PARAMS["output"]}, {"output": {"kernel": np.zeros((2, C))}}):
        with pytest.raises(
            UserError, match=r"the generalist.s layer .output. lacks (kernel, )?bias"
        ):
            heads.reduce_output(params, np.array([0]), C)


@pytest.mark.parametrize("n", [0, C + 1])
def test_no_specialist_is_active_by_no_class(n):
    with pytest.raises(UserError, match=f"n is {n}; expected 1 to 5"):
        inference.active_specialists(LOGITS, np.array([[0]]), 1, n)
