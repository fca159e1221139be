"""What teachers predict: the ensemble's means, logits over a set; and what names a teacher."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax import losses, models, soft_targets
from distill_jax.errors import UserError

N = 12


def log_probs64(logits, temperature):
    z = np.asarray(logits, np.float64) / temperature
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def mean64(logits, temperature, mean):
    log_probs = log_probs64(logits, temperature)
    if mean == "arithmetic":
        top = log_probs.max(0)
        return top + np.log(np.exp(log_probs - top).mean(0))
    return log_probs64(log_probs.mean(0), 1.0)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
@settings(deadline=None, max_examples=20)
@given(st.floats(0.5, 100, width=32), st.sampled_from([1.0, 10.0, 3000.0]), st.integers(0, 2**31))
def test_means_are_those_of_float64(mean, temperature, scale, seed):
    random = np.random.default_rng(seed)
    logits = (scale * random.standard_normal((5, 3, 4))).astype(np.float32)
    expected = mean64(logits, temperature, mean)
    found = soft_targets.mean_log_probs(jnp.asarray(logits), temperature, mean)
    # Logarithms down to -20000, many of probabilities that are 0 in float32. Each is a difference of
    # numbers of the logits' size, which are rounded: twice, of a geometric mean.
    rounding = 2 * np.finfo(np.float32).eps * np.abs(logits).max() / temperature
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 + rounding)
    probabilities = soft_targets.mean_probs(jnp.asarray(logits), temperature, mean)
    # What a logarithm is wrong by is its probability's relative error.
    np.testing.assert_allclose(probabilities, np.exp(expected), rtol=1e-5 + rounding, atol=1e-6)
    merged = soft_targets.ensemble_logits(jnp.asarray(logits), temperature, mean)
    again = losses.log_softmax(merged, temperature)
    np.testing.assert_allclose(again, expected, rtol=1e-5, atol=1e-5 + rounding)


@pytest.mark.parametrize("temperature", [1.0, 7.0])
def test_geometric_mean_is_the_softmax_of_mean_logits(temperature):
    logits = jnp.asarray(tiny.teacher_logits(20).reshape(5, 4, 3))
    log_probs = soft_targets.mean_log_probs(logits, temperature, "geometric")
    expected = losses.softmax(jnp.mean(logits, axis=0), temperature)
    np.testing.assert_allclose(jnp.exp(log_probs), expected, rtol=1e-5)


def test_hidden_layers_without_a_bias():
    hidden = jnp.asarray(tiny.teacher_logits(12).reshape(3, 2, 6))
    layer = {"kernel": jnp.asarray(tiny.teacher_logits(8, 2).reshape(2, 6, 2))}
    found = soft_targets.mean_probs_of_hidden(hidden, layer, 2.0, "arithmetic")
    zeros = {**layer, "bias": jnp.zeros((2, 2))}
    expected = soft_targets.mean_probs_of_hidden(hidden, zeros, 2.0, "arithmetic")
    np.testing.assert_array_equal(found, expected)


def test_unknown_mean():
    with pytest.raises(UserError, match="'arithmetic' or 'geometric', not 'median'"):
        soft_targets.mean_log_probs(jnp.zeros((2, 3)), 1.0, "median")


@pytest.mark.parametrize("batch_size", [1, 4, 5, 12, 1000])
def test_logits_over_is_the_model_in_evaluation_mode(key, batch_size):
    model = models.mlp([5], 3, input_dropout=0.5, hidden_dropout=0.5)
    images = tiny.examples(N)["inputs"]
    params = model.init(key, jnp.asarray(images))
    found = soft_targets.logits_over(model.apply, params, images, batch_size)
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    np.testing.assert_allclose(found, model.apply(params, images), rtol=1e-5, atol=1e-6)


def test_logits_over_is_one_program_for_all_batches_and_teachers():
    traces = []

    def apply(params, inputs):
        traces.append(inputs.shape)
        return inputs.reshape(len(inputs), -1)[:, :3] * params

    images = np.ones((10, 2, 2), np.float32)
    for scale in (1.0, 2.0):
        found = soft_targets.logits_over(apply, jnp.float32(scale), images, 4)
        np.testing.assert_array_equal(found, np.full((10, 3), scale))
    assert traces == [(4, 2, 2)]


def test_logits_over_sequences_and_inputs_that_a_model_divides_by():
    inputs = np.arange(1, 31, dtype=np.float32).reshape(5, 2, 3)  # none is 0, as padding would be
    found = soft_targets.logits_over(lambda p, x: p / x, jnp.float32(2), inputs, 3)
    np.testing.assert_array_equal(found, 2 / inputs)
    with jax.debug_nans(True):
        soft_targets.logits_over(lambda p, x: p * x / jnp.max(x), jnp.float32(2), inputs, 3)


@pytest.mark.parametrize(
    ("apply", "size", "message"),
    [
        (lambda p, x: x[0], 4, r"returned \[3\] for 2 inputs"),
        (lambda p, x: x.reshape(-1, 1), 4, r"returned \[6, 1\] for 2 inputs"),
        (lambda p, x: x, 0, "inputs is float64 .*expected any N"),
    ],
)
def test_logits_over_needs_a_row_for_each_input(apply, size, message):
    with pytest.raises(UserError, match=message):
        soft_targets.logits_over(apply, None, np.zeros((size, 3)), 2)


def test_fingerprint_names_parameters_and_config(key):
    params = {"a": jnp.ones((2, 3)), "b": jnp.zeros(3)}
    name = soft_targets.fingerprint(params, {"hidden": [1], "seed": 0})
    assert re.fullmatch("[0-9a-f]{16}", name)
    assert soft_targets.fingerprint(
        jax.tree.map(np.asarray, params), {"seed": 0, "hidden": [1]}
    ) == (name)
    others = [
        soft_targets.fingerprint({**params, "b": jnp.full(3, 1e-9)}, {"hidden": [1], "seed": 0}),
        soft_targets.fingerprint({**params, "a": jnp.ones((3, 2))}, {"hidden": [1], "seed": 0}),
        soft_targets.fingerprint(params, {"hidden": [1], "seed": 1}),
    ]
    assert len({name, *others}) == 4


def weighted64(logits, temperature, mean, weights):
    log_probs = log_probs64(logits, temperature)
    shares = np.moveaxis(np.broadcast_to(weights, (4, 3)), -1, 0)[..., None]
    shares = shares / shares.sum(0)
    if mean == "arithmetic":
        return np.log((shares * np.exp(log_probs)).sum(0))
    return log_probs64((shares * log_probs).sum(0), 1.0)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
@pytest.mark.parametrize("weights", [[2, 0, 1], np.random.default_rng(1).random((4, 3))])
def test_weighted_members(mean, weights):
    logits = tiny.teacher_logits(3 * 4, 5).reshape(3, 4, 3)
    expected, given = (
        weighted64(logits, 2.0, mean, np.asarray(weights, float)),
        jnp.asarray(weights),
    )
    args = jnp.asarray(logits), 2.0, mean, given
    np.testing.assert_allclose(soft_targets.mean_log_probs(*args), expected, rtol=1e-5, atol=1e-6)
    found = jax.jit(soft_targets.mean_probs, static_argnums=2)(*args)
    np.testing.assert_allclose(found, np.exp(expected), rtol=1e-5)
    merged = losses.log_softmax(soft_targets.ensemble_logits(*args), 2.0)
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)
    layer = {"kernel": jnp.tile(jnp.eye(3), (3, 1, 1))}
    hidden = jnp.moveaxis(jnp.asarray(logits), 0, 1)
    found = soft_targets.mean_probs_of_hidden(hidden, layer, 2.0, mean, given)
    np.testing.assert_allclose(found, np.exp(expected), rtol=1e-5)


def test_a_member_of_no_weight_has_no_part_and_equal_weights_change_nothing():
    logits = jnp.asarray(tiny.teacher_logits(3 * 4, 5).reshape(3, 4, 3))
    absent = logits.at[1].set(jnp.array([-jnp.inf, 0.0, 1e4]))
    for mean in ("arithmetic", "geometric"):
        found = soft_targets.mean_probs(absent, 2.0, mean, [1.0, 0.0, 3.0])
        expected = soft_targets.mean_probs(logits[::2], 2.0, mean, [0.25, 0.75])
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        found = soft_targets.mean_log_probs(logits, 2.0, mean, [7, 7, 7])
        expected = soft_targets.mean_log_probs(logits, 2.0, mean)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], r"weights are float32 \(2,\); expected numbers \[3\].* or \[4, 3\]"),
        ([1.0, -2.0, 1.0], r"a member's weight is -2\.0; allowed: 0 or more"),
        ([0, 0, 0], r"the sum of an example's weights is 0\.0; allowed: above 0"),
        ("equal", "weights are 'equal'; expected numbers"),
    ],
)
def test_weights_that_are_none(weights, message):
    logits = jnp.zeros((3, 4, 3))
    for run in (soft_targets.mean_log_probs, soft_targets.mean_probs):
        with pytest.raises(UserError, match=message):
            run(logits, 1.0, "arithmetic", weights)


def test_traced_weights_that_are_none_are_loud():
    probs = jax.jit(lambda w: soft_targets.mean_probs(jnp.zeros((2, 3)), 1.0, "arithmetic", w))
    assert np.isnan(probs(jnp.array([1.0, -1.0]))).all() and np.isnan(probs(jnp.zeros(2))).all()
