"""Several labels at once: the losses against float64 NumPy, the counts, and a training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import losses, metrics, models, multi_label, step_losses, trainer
from distill_jax.errors import UserError

RANDOM = np.random.default_rng(0)
Z, V = 3 * RANDOM.standard_normal((2, 4, 5)).astype(np.float32)
LABELS = RANDOM.integers(0, 2, (4, 5)).astype(np.int32)


def log_sigmoid64(z):
    return -np.logaddexp(0, -z)


def binary64(z, p):
    return -(p * log_sigmoid64(z) + (1 - p) * log_sigmoid64(-z)).sum(-1)


def objective64(z, t, weight):
    z, v = z.astype(np.float64), V.astype(np.float64)
    soft = t**2 * binary64(z / t, 1 / (1 + np.exp(-v / t)))
    return (1 - weight) * soft + weight * binary64(z, LABELS)


@jax.jit
def value_and_slope(z, v, labels, t, weight):
    def loss(z, v):
        return multi_label.distillation(z, multi_label.sigmoid(v, t), labels, t, weight)

    values, pull_back = jax.vjp(loss, z, v)
    return values, *pull_back(jnp.ones(len(z)))


@pytest.mark.parametrize(("t", "weight"), [(1.0, 0.0), (4.0, 0.3), (20.0, 1.0)])
def test_values_and_gradients_are_those_of_float64(t, weight):
    values, slope, of_teacher = value_and_slope(Z, V, LABELS, t, weight)
    np.testing.assert_allclose(values, objective64(Z, t, weight), rtol=1e-5)
    step = 1e-6 * np.eye(5)
    expected = [
        (objective64(Z + d, t, weight) - objective64(Z - d, t, weight)) / 2e-6
        for d in step.astype(np.float64)
    ]
    np.testing.assert_allclose(slope, np.transpose(expected), rtol=1e-4, atol=1e-5)
    assert values.dtype == jnp.float32 and not of_teacher.any()


def test_at_a_high_temperature_logits_are_matched():
    _, slope, _ = value_and_slope(Z, V, LABELS, 300.0, 0.0)
    np.testing.assert_allclose(slope, (Z - V) / 4, rtol=0.01, atol=1e-3)


def test_unknown_wrong_and_extreme_entries():
    labels = LABELS.copy()
    labels[0, :2], labels[1, 0] = -1, 2
    values = multi_label.cross_entropy(jnp.asarray(Z), jnp.asarray(labels))
    np.testing.assert_allclose(
        values[0], binary64(Z[0, 2:].astype(float), LABELS[0, 2:]), rtol=1e-5
    )
    _, slope, _ = value_and_slope(Z, V, labels, 2.0, 1.0)
    assert not slope[0, :2].any() and slope[0, 2:].all()
    assert np.isnan(values[1]) and np.isnan(slope[1, 0]) and np.isfinite(slope[2:]).all()
    for found in value_and_slope(1e4 * Z, -1e4 * V, LABELS, 1.0, 0.5):
        assert np.isfinite(found).all()
    np.testing.assert_array_equal(
        multi_label.distillation(jnp.asarray(Z), jnp.asarray(V) * 0, None, 2.0, 0.3),
        multi_label.distillation(
            jnp.asarray(Z), jnp.asarray(V) * 0, jnp.full((4, 5), -1), 2.0, 0.3
        ),
    )


def test_a_class_of_minus_infinity_is_left_out():
    z, v, labels = Z.copy(), V.copy(), LABELS.copy()
    z[:, 1] = v[:, 1] = -np.inf
    labels[:, 1] = 0
    others = [0, 2, 3, 4]
    found = value_and_slope(z, v, labels, 2.0, 0.3)
    expected = value_and_slope(Z[:, others], V[:, others], LABELS[:, others], 2.0, 0.3)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert not found[1][:, 1].any() and np.isfinite(found[1]).all()


def test_two_classes_of_a_softmax_are_one_of_a_sigmoid():
    z = jnp.asarray(Z[:, :1])
    pair = jnp.concatenate([jnp.zeros_like(z), z], axis=-1)
    found = multi_label.cross_entropy(z, jnp.asarray(LABELS[:, :1]))
    np.testing.assert_allclose(
        found, losses.hard_cross_entropy(pair, jnp.asarray(LABELS[:, 0])), rtol=1e-5
    )


def test_a_training_of_several_labels(tmp_path):
    inputs = RANDOM.standard_normal((64, 4)).astype(np.float32)
    logits = 4 * inputs @ RANDOM.standard_normal((4, 3)).astype(np.float32)
    labels = (logits > 0).astype(np.int32)
    examples = {"inputs": inputs, "labels": labels, "teacher_logits": logits}
    with jax.numpy_dtype_promotion("standard"):  # for optax's schedules
        nets = trainer.train(
            tmp_path,
            models.mlp([16], 3),
            examples,
            step_losses.multi_label_distillation_loss,
            trainer.Recipe(epochs=20, batch_size=16, report_every=20),
            keys=jax.random.split(jax.random.key(0), 1),
            hyper={"learning_rate": 3e-2, "temperature": 2.0, "hard_weight": 0.5},
            evaluation={"wrong": examples},
            reader=trainer.MULTI_LABEL,
        )
    found = jnp.asarray(nets.member(0).logits(inputs))
    counts = metrics.multi_label_counts(found, jnp.asarray(labels))
    assert nets.history[-1]["wrong"] == [counts["errors"]] and counts["count"] == 192
    assert counts["errors"] < 20
    doubled = metrics.multi_label_counts(found, jnp.asarray(labels), 2 * jnp.ones(64))
    assert {name: int(each) for name, each in doubled.items()} == {
        name: 2 * int(each) for name, each in counts.items()
    }
    with pytest.raises(UserError, match="the batch has no labels"):
        step_losses.multi_label_loss(found, {"label": labels}, {})
