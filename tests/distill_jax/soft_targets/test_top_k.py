"""The k largest of soft targets: the cut, its loss against the dense one; what compression costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax import losses, sampled_targets, top_k_targets
from distill_jax.errors import UserError

# A shape and k each, few enough that compiling takes no time.
cuts = st.sampled_from([((7, 5), 2), ((3, 12), 1), ((3, 12), 12), ((2, 2, 40), 16)])
temperatures = st.floats(0.5, 20, width=32)
seeds = st.integers(0, 2**31)
few = settings(deadline=None, max_examples=25)
cut = jax.jit(top_k_targets.top_k, static_argnums=1)
densify = jax.jit(top_k_targets.densify, static_argnums=4)
sample = jax.jit(sampled_targets.sample, static_argnums=1)


def soft(shape, seed=0, scale=4.0, temperature=1.0):
    """Probabilities float32 of a made-up teacher, who finds some classes likelier than others."""
    random = np.random.default_rng(seed)
    logits = scale * (random.standard_normal(shape) + random.standard_normal(shape[-1]))
    return losses.softmax(jnp.asarray(logits, jnp.float32), temperature)


def student(shape, seed=1, scale=4.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def drawn(ids):
    """Drawn classes as the fields of the k largest."""
    return ids, jnp.full((len(ids), 1), 1 / ids.shape[-1]), jnp.zeros(len(ids))


def draw(probabilities, draws, seed=0):
    offsets = sampled_targets.offsets(seed, np.arange(len(probabilities)))
    return drawn(sample(probabilities, draws, offsets))


def mean_of(probabilities):
    return jnp.mean(probabilities.reshape(-1, probabilities.shape[-1]), axis=0)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(loss, logits, *args):
    values, pull_back = jax.vjp(lambda z: loss(z, *args), logits)
    return values, pull_back(jnp.ones_like(values))[0]


@few
@given(cuts, temperatures, seeds)
def test_top_k_is_that_of_numpy(shape_and_k, temperature, seed):
    shape, k = shape_and_k
    p = soft(shape, seed, temperature=temperature)
    ids, kept, tail = cut(p, k)
    p64 = np.asarray(p, np.float64)
    order = np.argsort(-p64, axis=-1, kind="stable")
    np.testing.assert_array_equal(ids, order[..., :k])
    exact = np.take_along_axis(p64, order[..., :k], -1)
    np.testing.assert_allclose(kept.astype(jnp.float32), exact, rtol=2.0**-8, atol=1e-37)
    rest = np.take_along_axis(p64, order[..., k:], -1).sum(-1)
    np.testing.assert_allclose(tail, rest, rtol=1e-5, atol=1e-37)
    assert (ids.dtype, kept.dtype, tail.dtype) == (jnp.uint16, jnp.bfloat16, jnp.float32)
    total = np.asarray(kept.astype(jnp.float32), np.float64).sum(-1) + np.asarray(tail)
    np.testing.assert_allclose(total, 1.0, atol=2.0**-8)


def test_the_tail_is_not_lost_in_the_rounding_of_a_probability_near_1():
    p = jnp.asarray([[0.9985, 0.001, 0.0005]])
    _, kept, tail = cut(p, 1)
    assert kept[0, 0] == 1  # which leaves nothing, if the tail were 1 less what is kept
    np.testing.assert_allclose(tail, 0.0015, rtol=1e-6)
    found = top_k_targets.compare(p, [cut(p, 1)], jnp.zeros((1, 3)), 1.0, None)
    assert 0 < found["kl"] < 1e-3


def test_class_ids_above_65536_classes_are_not_cut():
    for num_classes, dtype in ((65_536, jnp.uint16), (65_537, jnp.uint32)):
        p = np.zeros((2, num_classes), np.float32)
        p[:, -1], p[:, 3] = 0.75, 0.25
        ids, kept, tail = cut(p, 2)
        assert ids.dtype == dtype and ids.tolist() == [[num_classes - 1, 3]] * 2
        z = student(p.shape)
        found, _ = value_and_gradient(losses.top_k_soft_cross_entropy, z, ids, kept, tail, 2.0)
        expected, _ = value_and_gradient(losses.soft_cross_entropy, z, p, 2.0)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("k", [0, 13])
def test_k_is_at_most_the_number_of_classes(k):
    with pytest.raises(UserError, match=f"k must be 1 to the number of classes, 12, not {k}"):
        top_k_targets.top_k(soft((2, 12)), k)


@few
@given(cuts, temperatures, st.booleans(), seeds)
def test_loss_is_that_of_the_densified_targets(shape_and_k, temperature, uniform, seed):
    shape, k = shape_and_k
    p, z = soft(shape, seed, temperature=temperature), student(shape, seed + 1)
    kept, weights = cut(p, k), None if uniform else mean_of(p)
    dense = densify(*kept, weights, shape[-1])
    found, gradient = value_and_gradient(
        losses.top_k_soft_cross_entropy, z, *kept, temperature, weights
    )
    expected, dense_gradient = value_and_gradient(losses.soft_cross_entropy, z, dense, temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, dense_gradient, rtol=1e-5, atol=1e-5 * temperature)


@pytest.mark.parametrize("uniform", [True, False])
def test_densify_is_the_definition(uniform):
    p = soft((4, 9), scale=2.0)
    ids, kept, tail = cut(p, 3)
    weights = np.ones(9) if uniform else np.asarray(mean_of(p), np.float64)
    expected = np.zeros((4, 9))
    for n in range(4):
        others = [i for i in range(9) if i not in ids[n]]
        for i in others:
            expected[n, i] = tail[n] * weights[i] / weights[others].sum()
        expected[n, np.asarray(ids[n])] = kept[n].astype(jnp.float32)
    found = densify(ids, kept, tail, None if uniform else mean_of(p), 9)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("weights", [None, jnp.eye(6)[0], jnp.zeros(6)])
def test_all_classes_kept_are_the_dense_targets(weights):
    p, z = soft((5, 6)), student((5, 6))
    kept = cut(p, 6)
    assert not kept[2].any()
    rounded = p.astype(jnp.bfloat16)
    expected = value_and_gradient(losses.soft_cross_entropy, z, rounded, 3.0)
    for tail in (kept[2], kept[2] + 0.1):  # a tail that no class can take
        found = value_and_gradient(
            losses.top_k_soft_cross_entropy, z, *kept[:2], tail, 3.0, weights
        )
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_extreme_and_bfloat16_and_left_out_logits():
    z = np.array([[1e4, -1e4, 0, 5], [-1e4, 1e4, 1e4, 0], [0, 0, -np.inf, 3]], np.float32)
    p = np.array([[0, 0.5, 0.25, 0.25], [0.75, 0, 0.25, 0], [0.5, 0.25, 0, 0.25]], np.float32)
    weights = np.array([0.5, 0.25, 0, 0.25], np.float32)
    for k in (1, 2, 4):
        kept = cut(jnp.asarray(p), k)
        dense = np.asarray(densify(*kept, weights, 4), np.float64)
        for dtype in (jnp.float32, jnp.bfloat16):
            logits = jnp.asarray(z, dtype)
            z64 = np.asarray(logits).astype(np.float64) / 2
            log_q = z64 - z64.max(-1, keepdims=True)
            log_q -= np.log(np.exp(log_q).sum(-1, keepdims=True))
            terms = np.multiply(dense, log_q, where=dense > 0, out=np.zeros_like(dense))
            found, gradient = value_and_gradient(
                losses.top_k_soft_cross_entropy, logits, *kept, 2.0, weights
            )
            assert found.dtype == jnp.float32 and gradient.dtype == dtype
            np.testing.assert_allclose(found, -4 * terms.sum(-1), rtol=1e-5)
            expected = 2 * (np.exp(log_q) * dense.sum(-1, keepdims=True) - dense)
            tolerance = 1e-5 if dtype == jnp.float32 else 2.0**-7
            np.testing.assert_allclose(gradient.astype(jnp.float32), expected, atol=tolerance)


def test_no_gradient_flows_into_the_targets():
    ids, kept, tail = cut(soft((4, 6)), 2)

    def loss(kept, tail, weights):
        return jnp.sum(
            losses.top_k_soft_cross_entropy(student((4, 6)), ids, kept, tail, 2.0, weights)
        )

    for gradient in jax.grad(loss, argnums=(0, 1, 2))(kept, tail, jnp.arange(6.0)):
        assert not gradient.any()


def test_more_classes_cost_less_and_a_skewed_teachers_mean_is_nearer_than_equal_shares():
    # A teacher to whom a class matters more than the example does.
    p = losses.softmax(student((200, 300), scale=1.0) + student((1, 300), 2, scale=2.0))
    z = student((200, 300))
    by_mean, equal = (
        [top_k_targets.compare(p, [cut(p, k)], z, 2.0, weights) for k in (8, 16, 64, 300)]
        for weights in (mean_of(p), jnp.ones(300))
    )
    for found in (by_mean, equal):
        assert np.all(np.diff([measured["kl"] for measured in found]) < 0)
        assert np.all(np.diff([measured["total_variation"] for measured in found]) < 0)
        assert np.all(np.diff([measured["loss_difference"] for measured in found]) < 0)
        assert np.all(np.diff([measured["gradient_cosine"] for measured in found]) > 0)
        assert 0 <= found[-1]["kl"] < 1e-5 and found[-1]["gradient_cosine"] > 0.9999
        assert found[-1]["loss_difference"] < 2.0**-8 and found[-1]["gradient_bias"] < 2.0**-8
    for better, worse in zip(by_mean[:3], equal, strict=False):
        assert better["kl"] < 0.7 * worse["kl"]


def test_what_is_drawn_repeatedly_adds_up():
    ids = jnp.asarray([[0, 2, 2, 2], [1, 1, 3, 3]], jnp.uint16)
    expected = [[0.25, 0, 0.75, 0], [0, 0.5, 0, 0.5]]
    np.testing.assert_array_equal(densify(*drawn(ids), None, 4), expected)


@pytest.mark.parametrize("draws", [None, 7])
def test_compare_is_the_definition(draws):
    p, z, weights = soft((6, 20), scale=1.0), student((6, 20)), mean_of(soft((6, 20), scale=1.0))
    kept = [cut(p, 4)] if draws is None else [draw(p, draws, seed) for seed in range(3)]
    q = np.asarray([densify(*one, weights, 20) for one in kept], np.float64)
    p64, z64 = np.asarray(p, np.float64), np.asarray(z, np.float64)
    log_q = z64 / 2 - np.log(np.exp(z64 / 2).sum(-1, keepdims=True))
    dense, *found = (-4 * (targets * log_q).sum(-1) for targets in (p64, *q))
    gradient, *gradients = (2 * (t.sum(-1, keepdims=True) * np.exp(log_q) - t) for t in (p64, *q))
    normalised = q / q.sum(-1, keepdims=True)
    errors = np.array(gradients) - gradient
    means = errors.mean(axis=1)
    if draws is None:
        squared_bias, noise = (means**2).sum(), 0.0
    else:
        squared_bias = np.mean([means[i] @ means[j] for i in range(3) for j in range(3) if i != j])
        noise = ((errors - errors.mean(axis=0)) ** 2).sum() / 2 / len(p)
    scale = np.sqrt((gradient**2).sum(-1).mean())
    with np.errstate(divide="ignore"):
        kl = (p64 * np.log(p64 / normalised)).sum(-1).mean()
    expected = {
        "kl": kl,
        "total_variation": np.abs(p64 - normalised).sum(-1).mean() / 2,
        "loss_difference": np.abs(np.array(found) - dense).mean() / dense.mean(),
        # All have the mean 0.
        "gradient_cosine": np.mean(
            [np.corrcoef(g.ravel(), gradient.ravel())[0, 1] for g in gradients]
        ),
        "gradient_bias": np.sqrt(max(squared_bias, 0.0)) / scale,
        "gradient_noise": np.sqrt(noise) / scale,
    }
    assert np.isinf(kl) == (draws is not None)  # a class with a probability that wasn't drawn
    measured = top_k_targets.compare(p, kept, z, 2.0, weights)
    assert measured.keys() == expected.keys()
    for name, number in expected.items():
        np.testing.assert_allclose(measured[name], number, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_bias_is_found_in_the_noise_of_draws():
    """Draws of other targets: what they have in common is the difference, and is no more with more."""
    p, other, z = soft((500, 40), scale=1.0), soft((500, 40), 5, scale=1.0), student((500, 40))
    everything = jnp.broadcast_to(jnp.arange(40, dtype=jnp.uint16), p.shape)
    known = top_k_targets.compare(p, [(everything, other, jnp.zeros(500))], z, 2.0, None)
    assert known["gradient_noise"] == 0
    for draws in (2, 30):
        kept = [draw(other, draws, seed) for seed in range(3)]
        found = top_k_targets.compare(p, kept, z, 2.0, None)
        np.testing.assert_allclose(found["gradient_bias"], known["gradient_bias"], rtol=0.03)


def test_drawn_targets_are_noisy_but_not_biased_as_the_largest_are():
    p, z = soft((2000, 300), scale=1.0, temperature=2.0), student((2000, 300), scale=0.3)
    # The same bytes: k classes of 4 and a tail of 4, or draws of 2.
    largest = top_k_targets.compare(p, [cut(p, 8)], z, 2.0, None)
    kept = [draw(p, 18, seed) for seed in range(4)]
    found = top_k_targets.compare(p, kept, z, 2.0, None)
    assert found["gradient_bias"] < 0.1 * largest["gradient_bias"]
    assert found["gradient_noise"] > 10 * found["gradient_bias"]
    # Independent draws have the variance (sum p - sum p^2) / draws.
    random = np.random.default_rng(0)
    ends = np.cumsum(np.asarray(p, np.float64), axis=-1)
    alone = [
        drawn(jnp.asarray([np.searchsorted(e, random.uniform(0, e[-1], 18)) for e in ends]))
        for _ in range(4)
    ]
    independent = top_k_targets.compare(p, alone, z, 2.0, None)
    scale = jnp.sqrt(jnp.mean(jnp.sum((2 * (losses.softmax(z, 2.0) - p)) ** 2, axis=-1)))
    exact = 2 * jnp.sqrt(jnp.mean(1 - jnp.sum(p**2, axis=-1)) / 18) / scale
    np.testing.assert_allclose(independent["gradient_noise"], exact, rtol=0.02)
    assert found["gradient_noise"] < independent["gradient_noise"]
