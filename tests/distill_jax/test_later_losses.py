"""The losses of later papers against their definitions in float64 NumPy, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import (
    later_losses,
    losses,
    models,
    optimizers,
    sharding,
    step_losses,
    train_step,
)
from distill_jax.errors import UserError

LABELS = np.array([0, 3, 1, 4, 2], np.int32)
WEIGHT = np.array([1, 0, 2, 0.5, 1], np.float32)


def probs(logits, temperature=1.0):
    z = logits / temperature
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1)), 0).sum(-1)


def reverse64(z, v, t):
    return t**2 * kl(probs(z, t), probs(v, t))


def jensen64(z, v, t, b=0.3):
    p, q = probs(v, t), probs(z, t)
    m = b * p + (1 - b) * q
    return t**2 * (b * kl(p, m) + (1 - b) * kl(q, m))


def decoupled64(z, v, t, alpha=0.7, beta=3.0):
    values = []
    for n, label in enumerate(LABELS[: len(z)]):
        p, q = probs(v[n], t), probs(z[n], t)
        both = kl(np.array([p[label], 1 - p[label]]), np.array([q[label], 1 - q[label]]))
        others = [np.delete(x, label) / (1 - x[label]) for x in (p, q)]
        values.append(alpha * both + beta * kl(*others))
    return t**2 * np.array(values)


def standardised64(z, v, t):
    z, v = ((x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) for x in (z, v))
    return t**2 * kl(probs(v, t), probs(z, t))


def transformed64(z, v, t):
    powers = probs(v) ** (1 / t)
    total = powers.sum(-1, keepdims=True)
    return total[..., 0] * kl(powers / total, probs(z))


def correlation64(z, v, t, b=0.8, c=0.6):
    p, q = probs(v, t), probs(z, t)
    rows = np.array([np.corrcoef(p[n], q[n])[0, 1] for n in range(len(z))])
    weight = WEIGHT[: len(z)].astype(np.float64)
    columns = []
    for x, y in zip(p.T, q.T, strict=True):
        cov = np.cov(x, y, aweights=weight)
        columns.append(cov[0, 1] / np.sqrt(cov[0, 0] * cov[1, 1]))
    return t**2 * (b * (1 - rows) + c * (1 - np.mean(columns)))


LOSSES = {
    "reverse_kl": (later_losses.reverse_kl, reverse64),
    "jensen_shannon": (
        functools.partial(later_losses.jensen_shannon, teacher_share=0.3),
        jensen64,
    ),
    "decoupled": (
        lambda z, v, t: later_losses.decoupled(
            z, v, jnp.asarray(LABELS), t, target_weight=0.7, other_weight=3.0
        ),
        decoupled64,
    ),
    "standardised_kl": (later_losses.standardised_kl, standardised64),
    "transformed_teacher": (later_losses.transformed_teacher, transformed64),
    "correlation": (
        lambda z, v, t: later_losses.correlation(
            z, v, t, inter_weight=0.8, intra_weight=0.6, weight=jnp.asarray(WEIGHT)
        ),
        correlation64,
    ),
}


@functools.cache
def run(name):
    """The loss's values, and the gradients of their weighted sum in both nets' logits."""
    loss = LOSSES[name][0]

    @jax.jit
    def both(z, v, t):
        values, pull_back = jax.vjp(lambda z, v: loss(z, v, t), z, v)
        return values, *pull_back(1 + jnp.arange(len(z), dtype=jnp.float32))

    return both


def draw(seed=0, scale=3.0):
    return scale * np.random.default_rng(seed).standard_normal((2, 5, 6)).astype(np.float32)


def slope64(function, z):
    """Central differences of sum_n (n + 1) function(z)_n."""
    weights, found, step = 1 + np.arange(len(z)), np.zeros(z.shape), 1e-6
    for at in np.ndindex(z.shape):
        d = np.zeros(z.shape)
        d[at] = step
        found[at] = (weights * (function(z + d) - function(z - d))).sum() / (2 * step)
    return found


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_values_and_gradients_are_those_of_float64(name, temperature):
    z, v = draw()
    values, slope, of_teacher = run(name)(z, v, temperature)
    z64, v64, reference = z.astype(np.float64), v.astype(np.float64), LOSSES[name][1]
    assert values.dtype == jnp.float32 and values.shape == (5,)
    np.testing.assert_allclose(values, reference(z64, v64, temperature), rtol=2e-5)
    expected = slope64(lambda z: reference(z, v64, temperature), z64)
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-5)
    assert not of_teacher.any()


@pytest.mark.parametrize("name", LOSSES)
def test_a_class_of_minus_infinity_is_left_out(name):
    z, v = draw(1)
    kept = [0, 1, 2, 3, 4]  # the labels' classes
    expected = LOSSES[name][1](*(x[:, kept].astype(np.float64) for x in (z, v)), 2.0)
    z[:, 5] = v[:, 5] = -np.inf
    values, slope, _ = run(name)(z, v, 2.0)
    np.testing.assert_allclose(values, expected, rtol=2e-5)
    assert np.isfinite(slope).all() and not slope[:, 5].any()


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_equal_and_short_logits(name):
    z, v = draw(2)
    for scale in (1e4, 0.0):
        for found in run(name)(scale * z, -scale * v, 1.0):
            assert np.isfinite(found).all()
    short = [jnp.asarray(x, jnp.bfloat16) for x in (z, v)]
    values, slope, _ = run(name)(*short, 2.0)
    expected = LOSSES[name][1](*(np.asarray(x).astype(np.float64) for x in short), 2.0)
    assert values.dtype == jnp.float32 and slope.dtype == jnp.bfloat16
    np.testing.assert_allclose(values, expected, rtol=2e-5)


def test_limits_of_the_divergences():
    z, v = map(jnp.asarray, draw(3))
    forward, reverse = (
        losses.soft_kl(z, losses.softmax(v, 2.0), 2.0),
        later_losses.reverse_kl(z, v, 2.0),
    )
    jensen = functools.partial(later_losses.jensen_shannon, z, v, 2.0)
    np.testing.assert_allclose(jensen(1e-3) / 1e-3, forward, rtol=0.02)
    np.testing.assert_allclose(jensen(1 - 1e-3) / 1e-3, reverse, rtol=0.02)
    np.testing.assert_allclose([jensen(0.0), jensen(1.0)], 0, atol=1e-6)
    for name in ("reverse_kl", "jensen_shannon", "standardised_kl", "decoupled"):
        np.testing.assert_allclose(run(name)(z, z, 2.0)[0], 0, atol=1e-5)
    plain = later_losses.transformed_teacher(z, v, 2.0, weighted=False)
    p = losses.softmax(v, 2.0)
    expected = losses.soft_cross_entropy(z, p, 1.0) - losses.soft_cross_entropy(jnp.log(p), p, 1.0)
    np.testing.assert_allclose(plain, expected, rtol=1e-4)


def test_decoupled_parts_make_up_the_divergence_and_unknown_labels_leave_it():
    z, v = map(jnp.asarray, draw(4))
    labels = jnp.asarray(LABELS)
    p_label = jnp.take_along_axis(losses.softmax(v, 2.0), labels[:, None], -1)[:, 0]
    whole = losses.soft_kl(z, losses.softmax(v, 2.0), 2.0)
    found = later_losses.decoupled(z, v, labels, 2.0, other_weight=1.0 - p_label)
    np.testing.assert_allclose(found, whole, rtol=1e-4)
    mixed = later_losses.decoupled(z, v, labels.at[1].set(-1).at[2].set(6), 2.0)
    np.testing.assert_allclose(mixed[1], whole[1], rtol=1e-4)
    assert np.isnan(mixed[2]) and np.isfinite(mixed[jnp.array([0, 3, 4])]).all()


def test_correlation_counts_no_padding():
    z, v = map(jnp.asarray, draw(5))
    padded = [jnp.concatenate([x, jnp.full((2, 6), jnp.nan)]) for x in (z, v)]
    weight = jnp.asarray([1.0] * 5 + [0.0] * 2)
    found = later_losses.correlation(*padded, 2.0, weight=weight)
    np.testing.assert_allclose(found[:5], later_losses.correlation(z, v, 2.0), rtol=1e-5)
    sequences = later_losses.correlation(z[:4].reshape(2, 2, 6), v[:4].reshape(2, 2, 6), 2.0)
    expected = later_losses.correlation(z[:4], v[:4], 2.0)
    np.testing.assert_allclose(sequences.ravel(), expected, rtol=1e-5)


def test_correlation_over_devices_is_that_of_the_whole_batch():
    z, v = (jnp.asarray(x[:4].repeat(2, axis=0)) for x in draw(6))
    z += jnp.arange(8.0)[:, None] * jnp.linspace(0.0, 1.0, 6)[None]
    shard = sharding.shard_batch(sharding.make_mesh(), 8)

    @jax.jit
    def spread(batch):
        batch = shard(batch)
        return later_losses.correlation(batch["z"], batch["v"], 2.0)

    found = spread({"z": z, "v": v})
    np.testing.assert_allclose(found, later_losses.correlation(z, v, 2.0), rtol=1e-5)


def test_the_losses_of_a_step_weigh_the_labels_in():
    z, v = map(jnp.asarray, draw(7))
    batch = {"teacher_logits": v, "label": jnp.asarray(LABELS), "weight": jnp.asarray(WEIGHT)}
    batch["inputs"] = z
    hyper = {"temperature": 2.0, "hard_weight": 0.25, "teacher_share": 0.3, "target_weight": 0.7}
    hyper |= {"other_weight": 3.0, "inter_weight": 0.8, "intra_weight": 0.6}
    ready = (
        step_losses.reverse_kl_loss,
        step_losses.jensen_shannon_loss,
        step_losses.decoupled_loss,
        step_losses.standardised_loss,
        step_losses.transformed_teacher_loss,
        step_losses.correlation_loss,
    )
    hard = losses.hard_cross_entropy(z, batch["label"])
    for loss, name in zip(ready, LOSSES, strict=True):
        soft = run(name)(z, v, 2.0)[0]
        np.testing.assert_allclose(loss(z, batch, hyper), 0.75 * soft + 0.25 * hard, rtol=1e-5)
    with pytest.raises(UserError, match="hyper has no intra_weight"):
        step_losses.correlation_loss(z, batch, {"temperature": 2.0, "inter_weight": 1.0})
    with pytest.raises(UserError, match="one temperature for teacher and student"):
        step_losses.reverse_kl_loss(z, batch, {**hyper, "teacher_temperature": 3.0})


def test_a_correlation_over_the_batch_is_not_fused():
    model, optimizer = models.mlp([4], 6), optimizers.sgd(lambda step: 1.0)
    batch = {"inputs": jnp.ones((8, 2)), "teacher_logits": jnp.ones((8, 6))}
    state = train_step.init_state(model, optimizer, jax.random.key(0), batch["inputs"])
    loss = train_step.Fused(step_losses.correlation_loss, rows=4)
    hyper = {"learning_rate": jnp.float32(1.0), "temperature": jnp.float32(1.0)}
    with pytest.raises(UserError, match="can't be fused with the output layer"):
        train_step.make_train_step(model, optimizer, loss)(state, batch, jax.random.key(0), hyper)


def test_what_is_not_allowed_is_named():
    z, v = map(jnp.asarray, draw())
    with pytest.raises(UserError, match=r"teacher_share is 2\.0; allowed"):
        later_losses.jensen_shannon(z, v, 1.0, 2.0)
    with pytest.raises(UserError, match=r"temperature is 0\.0; allowed"):
        later_losses.correlation(z, v, 0.0)
    with pytest.raises(UserError, match=r"teacher_logits is float32 \(5, 5\)"):
        later_losses.reverse_kl(z, v[:, 1:], 1.0)
