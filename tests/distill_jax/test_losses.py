"""The losses against the paper's equations in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax import losses, top_k_losses

EPSILON = 2.0**-23  # of float32

shapes = st.sampled_from([(2,), (3, 10), (2, 2, 7), (4, 300)])
cuts = st.sampled_from([((2,), 1), ((3, 10), 10), ((2, 2, 7), 3), ((4, 300), 250)])
temperatures = st.floats(0.5, 100, width=32)
seeds = st.integers(0, 2**31)
few = settings(deadline=None, max_examples=25)


def log_softmax64(logits, temperature=1.0):
    z = np.asarray(logits, np.float64) / temperature
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def softmax64(logits, temperature=1.0):
    return np.exp(log_softmax64(logits, temperature))


def soft64(logits, targets, temperature):
    log_q = log_softmax64(logits, temperature)
    return -(temperature**2) * np.where(targets > 0, targets * log_q, 0.0).sum(-1)


def hard64(logits, labels):
    return -np.take_along_axis(log_softmax64(logits), labels[..., None], -1)[..., 0]


def draw(shape, seed, scale=4.0):
    """Float32 logits of a student and a teacher, and labels."""
    random = np.random.default_rng(seed)
    z, v = scale * random.standard_normal((2, *shape)).astype(np.float32)
    return z, v, random.integers(0, shape[-1], shape[:-1]).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def value(loss, z, *args, **options):
    return loss(z, *args, **options)


@functools.partial(jax.jit, static_argnums=0)
def jitted_gradient(loss, z, *args, **options):
    return jax.grad(lambda z: jnp.sum(loss(z, *args, **options)))(z)


def gradient(loss, z, *args, **options):
    return np.asarray(jitted_gradient(loss, z, *args, **options))


zero_meaned = functools.partial(losses.logit_matching, zero_mean=True)


def counted(function):
    """The function, and a list that grows by one with every trace."""
    traces = []

    def count(*args):
        traces.append(1)
        return function(*args)

    return jax.jit(count), traces


@few
@given(shapes, temperatures, seeds)
def test_softmax_is_equation_1(shape, temperature, seed):
    z, _, _ = draw(shape, seed)
    found = value(losses.softmax, z, temperature)
    assert found.dtype == jnp.float32
    # exp turns the absolute rounding error of z / T, up to about 20 / 0.5, into a relative one.
    np.testing.assert_allclose(found, softmax64(z, temperature), rtol=3e-5, atol=1e-30)
    found = value(losses.log_softmax, z, temperature)
    np.testing.assert_allclose(found, log_softmax64(z, temperature), rtol=1e-5, atol=1e-5)


@few
@given(shapes, temperatures, st.floats(0, 1, width=32), seeds)
def test_values_are_those_of_float64(shape, temperature, weight, seed):
    z, v, labels = draw(shape, seed)
    p = softmax64(v, temperature).astype(np.float32)
    soft = soft64(z, p, temperature)
    found = value(losses.soft_cross_entropy, z, p, temperature)
    assert found.shape == shape[:-1] and found.dtype == jnp.float32
    # A log-probability's rounding error is absolute: that of z / T, with a nearly certain class too.
    rounding = EPSILON * temperature**2 * (1 + np.abs(z).max() / temperature)
    np.testing.assert_allclose(found, soft, rtol=1e-5, atol=rounding)
    hard = hard64(z, labels)
    found = value(losses.hard_cross_entropy, z, labels)
    np.testing.assert_allclose(found, hard, rtol=1e-5, atol=1e-5)
    found = value(losses.distillation, z, p, labels, temperature, weight)
    np.testing.assert_allclose(found, (1 - weight) * soft + weight * hard, rtol=1e-5, atol=1e-5)


@few
@given(shapes, temperatures, seeds)
def test_soft_gradient_is_equation_2(shape, temperature, seed):
    z, v, _ = draw(shape, seed)
    p = softmax64(v, temperature).astype(np.float32)
    expected = (softmax64(z, temperature) - p) / temperature
    for loss in (losses.soft_cross_entropy, losses.soft_kl):
        found = gradient(loss, z, p, temperature) / temperature**2
        np.testing.assert_allclose(found, expected, atol=32 * EPSILON / temperature, rtol=1e-5)


def test_high_temperature_limit_is_equation_4():
    z, v, _ = draw((5, 10), 0, scale=2.0)
    temperatures = np.array([20.0, 40.0, 80.0, 160.0, 320.0])
    z0, v0 = (x.astype(np.float64) - x.astype(np.float64).mean(-1, keepdims=True) for x in (z, v))
    errors = []
    for temperature in temperatures:
        p = losses.softmax(jnp.asarray(v), temperature)
        found = gradient(losses.soft_cross_entropy, z, p, temperature) / temperature**2
        limit = (z0 - v0) / (10 * temperature**2)
        errors.append(np.linalg.norm(found - limit) / np.linalg.norm(limit))
    slopes = np.diff(np.log(errors)) / np.diff(np.log(temperatures))
    # The next term of the series is smaller by another 1/T, so the slope itself is near -1.
    np.testing.assert_allclose(slopes, -1.0, atol=0.1)
    assert errors[-1] < 0.01


def test_logit_matching_is_the_high_temperature_limit():
    z, v, _ = draw((5, 10), 1, scale=2.0)
    temperature = 300.0
    p = losses.softmax(jnp.asarray(v), temperature)
    distilled = gradient(losses.soft_cross_entropy, z, p, temperature)
    matched = gradient(zero_meaned, z, v) / 10
    relative = np.linalg.norm(distilled - matched) / np.linalg.norm(matched)
    assert relative < 0.02  # what is left of the series at this temperature, see the slope above
    plain = gradient(losses.logit_matching, z, v) / 10
    assert np.linalg.norm(distilled - plain) > 5 * relative * np.linalg.norm(plain)


def test_gradient_keeps_its_size_when_the_temperature_changes():
    z, v, _ = draw((20, 10), 2)
    sizes, plain = [], []
    for temperature in (10.0, 30.0, 100.0):
        p = losses.softmax(jnp.asarray(v), temperature)
        size = np.linalg.norm(gradient(losses.soft_cross_entropy, z, p, temperature))
        sizes.append(size)
        plain.append(size / temperature**2)
    # At a finite temperature the size is only nearly constant: Eq. 4 is a limit.
    np.testing.assert_allclose(sizes, sizes[-1], rtol=0.1)
    assert plain[0] > 90 * plain[-1]


def test_no_gradient_flows_into_the_teacher():
    z, v, labels = (jnp.asarray(x) for x in draw((4, 5), 3))

    def all_losses(v):
        p = losses.softmax(v, 2.0)
        total = losses.soft_cross_entropy(z, p, 2.0) + losses.soft_kl(z, p, 2.0)
        total += losses.distillation(z, p, labels, 2.0, 0.3)
        return jnp.sum(total + losses.logit_matching(z, v) + losses.logit_matching(z, v, True))

    assert not np.any(jax.jit(jax.grad(all_losses))(v))


@pytest.mark.parametrize("loss", [losses.soft_cross_entropy, losses.soft_kl])
def test_extreme_logits_and_zero_probabilities_are_finite(loss):
    z = np.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 0.0, 0.0]], np.float32)
    p = np.array([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], np.float32)
    entropy = np.array([0.0, np.log(2), 0.0]) if loss is losses.soft_kl else np.zeros(3)
    for temperature in (1.0, 20.0):
        expected = soft64(z, p, temperature) - temperature**2 * entropy
        found = value(loss, z, p, temperature)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        expected = temperature * (softmax64(z, temperature) - p)
        found = gradient(loss, z, p, temperature)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_extreme_logits_with_labels_are_finite():
    z = np.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], np.float32)
    labels = np.array([1, 0], np.int32)
    p = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], np.float32)
    expected = 0.5 * soft64(z, p, 2.0) + 0.5 * hard64(z, labels)
    args = jnp.asarray(p), jnp.asarray(labels), 2.0, 0.5
    np.testing.assert_allclose(value(losses.distillation, z, *args), expected, rtol=1e-6)
    onehot = np.eye(3)[labels]
    expected = (softmax64(z, 2.0) - p) + 0.5 * (softmax64(z) - onehot)
    np.testing.assert_allclose(gradient(losses.distillation, z, *args), expected, atol=1e-6)
    assert np.isfinite(losses.logit_matching(jnp.asarray(z), -jnp.asarray(z), True)).all()


@few
@given(temperatures, seeds)
def test_bfloat16_inputs_are_accumulated_in_float32(temperature, seed):
    z, v, labels = draw((4, 300), seed)
    z, v = jnp.asarray(z, jnp.bfloat16), jnp.asarray(v, jnp.bfloat16)
    p = losses.softmax(v, temperature).astype(jnp.bfloat16)
    # The reference starts from the rounded inputs, so what remains is the arithmetic's error.
    z64, v64, p64 = (np.asarray(x).astype(np.float64) for x in (z, v, p))
    assert losses.softmax(z, temperature).dtype == jnp.float32
    soft = value(losses.soft_cross_entropy, z, p, temperature)
    assert soft.dtype == jnp.float32
    np.testing.assert_allclose(soft, soft64(z64, p64, temperature), rtol=1e-5)
    both = value(losses.distillation, z, p, jnp.asarray(labels), temperature, 0.25)
    expected = 0.75 * soft64(z64, p64, temperature) + 0.25 * hard64(z64, labels)
    np.testing.assert_allclose(both, expected, rtol=1e-5)
    matched = value(losses.logit_matching, z, v)
    np.testing.assert_allclose(matched, 0.5 * ((z64 - v64) ** 2).sum(-1), rtol=1e-5)


MASKED = {
    "soft_cross_entropy": lambda z, v, labels: losses.soft_cross_entropy(
        z, losses.softmax(v, 3.0), 3.0
    ),
    "soft_kl": lambda z, v, labels: losses.soft_kl(z, losses.softmax(v, 3.0), 3.0),
    "hard_cross_entropy": lambda z, v, labels: losses.hard_cross_entropy(z, labels),
    "distillation": lambda z, v, labels: losses.distillation(
        z, losses.softmax(v, 3.0), labels, 3.0, 0.4
    ),
    "label_modified": lambda z, v, labels: losses.soft_cross_entropy(
        z, losses.label_modified(losses.softmax(v, 3.0), labels, 0.4), 3.0
    ),
    "logit_matching": lambda z, v, labels: losses.logit_matching(z, v),
    "logit_matching_zero_mean": lambda z, v, labels: losses.logit_matching(z, v, zero_mean=True),
}


@pytest.mark.parametrize("name", MASKED)
def test_minus_infinity_leaves_a_class_out(name):
    loss = MASKED[name]
    z, v, _ = draw((6, 5), 4)
    out, kept = [0, 3], [1, 2, 4]
    labels = np.array([1, 2, 4, 1, 2, 4], np.int32)
    subset_labels = np.searchsorted(kept, labels).astype(np.int32)
    subset = z[:, kept], v[:, kept], subset_labels
    z[:, out] = v[:, out] = -np.inf
    np.testing.assert_allclose(value(loss, z, v, labels), value(loss, *subset), rtol=1e-5)
    found = gradient(loss, z, v, labels)
    assert not found[:, out].any()
    np.testing.assert_allclose(found[:, kept], gradient(loss, *subset), rtol=1e-5, atol=1e-6)


def test_unknown_label_with_a_masked_first_class():
    z, v, _ = draw((2, 4), 5)
    z[:, 0] = v[:, 0] = -np.inf
    p = losses.softmax(jnp.asarray(v), 2.0)
    unknown = jnp.zeros(2, bool)
    args = p, jnp.array([-1, 0]), 2.0, 0.5
    expected = 0.5 * losses.soft_cross_entropy(jnp.asarray(z), p, 2.0)
    np.testing.assert_array_equal(
        value(losses.distillation, z, *args, label_known=unknown), expected
    )
    assert np.isfinite(gradient(losses.distillation, z, *args, label_known=unknown)).all()


@few
@given(st.lists(st.booleans(), min_size=8, max_size=8), st.sampled_from([-1, 99, 2]), seeds)
def test_unknown_labels_leave_the_soft_term_alone(known, wiped, seed):
    z, v, labels = draw((8, 6), seed)
    known, weight, temperature = np.array(known), 0.3, 4.0
    p = softmax64(v, temperature).astype(np.float32)
    args = p, np.where(known, labels, np.int32(wiped)), temperature, weight
    values = np.asarray(value(losses.distillation, z, *args, label_known=known))
    soft, hard = soft64(z, p, temperature), hard64(z, labels)
    expected = (1 - weight) * soft.mean() + weight * hard[known].sum() / 8
    np.testing.assert_allclose(values.mean(dtype=np.float64), expected, rtol=1e-5)
    # With all labels known, so that every subset has the same shape.
    everything = value(losses.distillation, z, p, labels, temperature, weight)
    np.testing.assert_allclose(values[known], everything[known], rtol=1e-6)
    np.testing.assert_allclose(values[~known], (1 - weight) * soft[~known], rtol=1e-5)
    grads = gradient(losses.distillation, z, *args, label_known=known)
    expected = (1 - weight) * temperature * (softmax64(z, temperature) - p)
    np.testing.assert_allclose(grads[~known], expected[~known], rtol=1e-5, atol=1e-5)


@few
@given(shapes, temperatures, seeds)
def test_kl_is_cross_entropy_less_entropy(shape, temperature, seed):
    z, v, _ = draw(shape, seed)
    p = softmax64(v, temperature).astype(np.float32)
    p64 = p.astype(np.float64)
    entropy = -np.where(p64 > 0, p64 * np.log(np.where(p64 > 0, p64, 1)), 0).sum(-1)
    found = value(losses.soft_kl, z, p, temperature)
    expected = soft64(z, p64, temperature) - temperature**2 * entropy
    # A difference of two numbers of about T^2 log C, each rounded.
    rounding = 8 * EPSILON * temperature**2 * (np.log(shape[-1]) + 20 / temperature)
    np.testing.assert_allclose(found, expected, atol=rounding, rtol=1e-5)
    np.testing.assert_array_equal(
        gradient(losses.soft_kl, z, p, temperature),
        gradient(losses.soft_cross_entropy, z, p, temperature),
    )
    match = losses.softmax(jnp.asarray(z), temperature)
    at_match = value(losses.soft_kl, z, match, temperature)
    np.testing.assert_allclose(at_match, 0, atol=rounding)


def test_label_modified_mixes_the_label_in():
    _, v, labels = draw((6, 5), 6)
    p = softmax64(v, 2.0).astype(np.float32)
    expected = 0.7 * p.astype(np.float64) + 0.3 * np.eye(5)[labels]
    found = losses.label_modified(jnp.asarray(p), jnp.asarray(labels), 0.3)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    known = np.array([True, False] * 3)
    wiped = jnp.asarray(np.where(known, labels, -1))
    found = losses.label_modified(jnp.asarray(p), wiped, 0.3, jnp.asarray(known))
    np.testing.assert_allclose(found, np.where(known[:, None], expected, p), rtol=1e-6)


@few
@given(shapes, seeds)
def test_logit_matching_golden(shape, seed):
    z, v, _ = draw(shape, seed)
    difference = z.astype(np.float64) - v
    found = value(losses.logit_matching, z, v)
    np.testing.assert_allclose(found, 0.5 * (difference**2).sum(-1), rtol=1e-5)
    difference -= difference.mean(-1, keepdims=True)
    expected = 0.5 * (difference**2).sum(-1)
    found = value(zero_meaned, z, v)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    moved = value(zero_meaned, z + 8, v - 8)
    # The shift of 16 is rounded before the mean is taken off again.
    np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-4)


def test_one_trace_serves_all_temperatures_and_weights():
    z, v, labels = (jnp.asarray(x) for x in draw((4, 5), 7))

    def loss(temperature, weight):
        p = losses.softmax(v, temperature)
        return losses.distillation(z, p, labels, temperature, weight)

    temperatures, weights = jnp.array([1.0, 4.0, 20.0]), jnp.array([0.0, 0.5, 1.0])
    sweep, traces = counted(jax.vmap(loss))
    found = sweep(temperatures, weights)
    sweep(2 * temperatures, 1 - weights)
    assert len(traces) == 1
    alone = [loss(float(t), float(w)) for t, w in zip(temperatures, weights, strict=True)]
    np.testing.assert_allclose(found, alone, rtol=1e-5)


def top_k64(logits, ids, probabilities, tail, temperature, weights):
    """The definition, example by example and class by class."""
    values = np.zeros(logits.shape[:-1])
    for at in np.ndindex(values.shape):
        log_q = log_softmax64(logits[at], temperature)
        others = [i for i in range(logits.shape[-1]) if i not in ids[at]]
        values[at] -= sum(p * log_q[i] for p, i in zip(probabilities[at], ids[at], strict=True))
        share = sum(weights[i] for i in others)
        values[at] -= sum(tail[at] * weights[i] / share * log_q[i] for i in others)
    return temperature**2 * values


@few
@given(cuts, temperatures, st.booleans(), seeds)
def test_top_k_values_are_those_of_float64(shape_and_k, temperature, uniform, seed):
    shape, k = shape_and_k
    z, v, labels = draw(shape, seed)
    p = softmax64(v, temperature)
    ids = np.argsort(-p, axis=-1)[..., :k]
    kept = np.take_along_axis(p, ids, -1).astype(np.float32)
    tail = (1 - kept.sum(-1, dtype=np.float64)).clip(0).astype(np.float32)
    weights = 3 * p.reshape(-1, shape[-1]).mean(0).astype(np.float32)  # of any sum
    expected = top_k64(
        z, ids, kept, tail, temperature, np.ones_like(weights) if uniform else weights
    )
    args = ids.astype(np.uint16), kept, tail
    spread = None if uniform else weights
    found = value(top_k_losses.soft_cross_entropy, z, *args, temperature, tail_weights=spread)
    assert found.shape == shape[:-1] and found.dtype == jnp.float32
    # A value near 0 is a difference of numbers as large as the logits, each rounded to float32.
    rounding = 4 * EPSILON * temperature * (temperature + np.abs(z).max())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=rounding)
    known = labels % 2 == 0
    found = value(
        top_k_losses.distillation,
        z,
        *args,
        labels,
        temperature=temperature,
        hard_weight=0.25,
        label_known=known,
        tail_weights=spread,
    )
    expected = 0.75 * expected + 0.25 * np.where(known, hard64(z, labels), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_tail_keeps_its_precision_where_the_named_classes_have_the_weights():
    z, _, _ = draw((1, 300), 8, scale=1e4)
    ids, kept, tail = np.array([[7, 2]]), np.array([[0.5, 0.25]]), np.array([0.25])
    weights = np.full(300, 1e-9, np.float32)
    weights[[2, 7]] = 0.5
    expected = top_k64(z, ids, kept, tail, 2.0, weights)
    args = ids, kept.astype(np.float32), tail.astype(np.float32), 2.0
    found = value(top_k_losses.soft_cross_entropy, z, *args, tail_weights=weights)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
