"""The plain network: its size, modes, dropout and dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from distill_jax import models


def build(key, **kwargs):
    model = models.mlp([6, 5], tiny.CLASSES, **kwargs)
    images = jnp.asarray(tiny.examples(8)["image"])
    return model, model.init(key, images), images


def test_parameter_count_of_the_paper(key):
    model = models.mlp([1200, 1200], 10)
    shapes = jax.eval_shape(model.init, key, jnp.zeros((1, 28, 28), jnp.uint8))
    assert models.parameter_count(shapes) == 2_395_210


def test_logits_are_those_of_numpy(key):
    model, params, images = build(key)
    x = np.asarray(images, np.float64).reshape(8, -1) / 255
    for name in ("hidden_0", "hidden_1"):
        layer = jax.tree.map(np.float64, params[name])
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
    output = jax.tree.map(np.float64, params["output"])
    expected = x @ output["kernel"] + output["bias"]
    np.testing.assert_allclose(model.apply(params, images), expected, rtol=1e-5, atol=1e-6)


def test_uint8_inputs_are_scaled(key):
    model, params, images = build(key)
    scaled = model.apply(params, images.astype(jnp.float32) / 255)
    np.testing.assert_allclose(model.apply(params, images), scaled, rtol=1e-6, atol=1e-6)


def test_nothing_is_dropped_without_a_key(key):
    model, params, images = build(key, input_dropout=0.5, hidden_dropout=0.5)
    plain, _, _ = build(key)
    np.testing.assert_array_equal(model.apply(params, images), plain.apply(params, images))


def test_dropout_is_a_function_of_its_key(key):
    model, params, images = build(key, input_dropout=0.2, hidden_dropout=0.5)
    first, again = (model.apply(params, images, dropout_key=key) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    other = model.apply(params, images, dropout_key=jax.random.key(1))
    assert not np.allclose(first, other)
    assert not np.allclose(first, model.apply(params, images))


def test_layers_draw_their_own_masks(key):
    ones = jnp.ones((4, 256))
    model = models.mlp([256, 256], 2, hidden_dropout=0.5)
    params = jax.tree.map(jnp.zeros_like, model.init(key, ones))
    params["hidden_0"]["bias"] += 1.0
    params["hidden_1"]["kernel"] += jnp.eye(256)
    params["output"]["kernel"] += 1.0
    kept = model.apply(params, ones, dropout_key=key)[:, 0] / 4  # units that both layers keep
    # Binomial: 64 of 256 kept, with a standard deviation of 7; equal masks would keep 128.
    assert (np.abs(kept - 64) < 35).all()


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.2, 0.5, 0.9])
def test_dropout_keeps_its_rate_and_the_mean(key, rate):
    size = 200_000
    out = np.asarray(models.dropout(key, jnp.ones(size), rate), np.float64)
    kept = out > 0
    deviation = np.sqrt(rate * (1 - rate) / size)
    # Five standard deviations, and the rounding of the rate to 1/256.
    assert abs(kept.mean() - (1 - rate)) <= 5 * deviation + 1 / 512
    assert abs(out.mean() - 1) <= 5 * deviation / (1 - rate) + 1e-5
    assert len(np.unique(out[kept])) == 1


def test_bfloat16_arithmetic_has_float32_parameters_and_logits(key):
    model, params, images = build(key, dtype=jnp.bfloat16, hidden_dropout=0.5)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    exact, _, _ = build(key)
    found = model.apply(params, images)
    assert found.dtype == jnp.float32
    assert model.apply(params, images, dropout_key=key).dtype == jnp.float32
    # bfloat16 has 8 bits: three layers of it are good to about one part in 50.
    expected = exact.apply(params, images)
    np.testing.assert_allclose(found, expected, atol=0.02 * float(jnp.abs(expected).max()))
    assert np.any(found != expected)
