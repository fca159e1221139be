"""What values may be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import ranges
from distill_jax.errors import UserError

GOOD = [
    {"temperature": 1e-3, "hard_weight": 0, "learning_rate": np.float32(1)},
    {"hard_weight": 1.0, "momentum": 0, "max_norm": 0, "input_dropout": 0.0},
    {"epochs": 1, "jitter": 0, "k": np.int64(3), "fused_logits": 0},
    {"hidden": (), "hidden_dropout": jnp.bfloat16(0.5)},
    {"hidden": [3, np.int32(4)], "mean": "geometric", "encoding": "top_k"},
    {"temperature": np.array([1.0, 20.0]), "learning_rate": jnp.ones(3)},
]
WRONG = [
    {"temperature": 0}, {"temperature": -4.0}, {"temperature": np.inf}, {"temperature": np.nan},
    {"temperature": True}, {"temperature": "1"}, {"temperature": None}, {"temperature": (1.0, 2.0)},
    {"temperature": np.bool_(True)}, {"temperature": jnp.bfloat16(-1)}, {"temperature": 1j},
    {"hard_weight": -0.5}, {"hard_weight": 5}, {"hard_weight": 1.0001}, {"learning_rate": np.nan},
    {"hidden_dropout": 1.0}, {"input_dropout": 1.5}, {"momentum": 1}, {"max_norm": -1.0},
    {"epochs": 0}, {"epochs": 2.0}, {"epochs": True}, {"epochs": np.int64(0)}, {"jitter": -1},
    {"batch_size": 0}, {"report_every": 0}, {"k": 0}, {"k": np.float32(3)}, {"hidden": 5},
    {"hidden": (3, 0)}, {"hidden": (3.0,)}, {"hidden": "34"}, {"mean": "mean"}, {"encoding": ""},
]  # fmt: skip


@pytest.mark.parametrize("values", GOOD, ids=str)
def test_what_is_allowed_passes(values):
    ranges.check(**values)


@pytest.mark.parametrize("values", WRONG, ids=str)
def test_what_is_not_allowed_is_named(values):
    (name,) = values
    with pytest.raises(UserError, match=rf"^{name} is .*; allowed: "):
        ranges.check(**values)


def test_the_message_has_the_value_and_what_is_allowed():
    with pytest.raises(UserError, match=r"^temperature is -4; allowed: above 0, finite$"):
        ranges.check(hard_weight=1, temperature=-4)


def test_the_wrong_entry_of_an_array_is_named():
    with pytest.raises(UserError, match=r"^hard_weight is 2.0; "):
        ranges.check(hard_weight=np.array([0.5, 2.0, 1.0]))


def test_what_is_traced_passes():
    jax.make_jaxpr(lambda temperature: ranges.check(temperature=temperature))(-1.0)


@pytest.mark.parametrize(
    ("allowed", "good", "wrong"),
    [
        (ranges.one_of("a", 1), ["a", 1], ["b", True, 1.0]),
        (ranges.flag(), [True, False], [1, None, "True"]),
        (ranges.count(0, 3), [0, 3], [-1, 4]),
        (ranges.either(ranges.one_of(-1), ranges.count()), [-1, 5], [0, -2]),
        (ranges.several(ranges.count(0), distinct=True), [(0,), [1, 0]], [(), (0, 0), 0, (0.5,)]),
        (ranges.text(), ["a"], ["", 3]),
        (ranges.text(may_be_empty=True), [""], [None]),
    ],
)
def test_constructors(allowed, good, wrong):
    assert all(map(allowed.accepts, good)) and not any(map(allowed.accepts, wrong))
