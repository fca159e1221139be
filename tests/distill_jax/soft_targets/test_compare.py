"""What compression costs: the figures against their definitions, bias and noise of known targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stores import drawn, soft, student

from distill_jax import losses
from distill_jax.soft_targets import compare, encodings

cut = jax.jit(encodings.top_k, static_argnums=1)
densify = jax.jit(encodings.densify, static_argnums=4)
sample = jax.jit(encodings.sample, static_argnums=1)


def draw(probabilities, draws, seed=0):
    offsets = encodings.offsets(seed, np.arange(len(probabilities)))
    return drawn(sample(probabilities, draws, offsets))


def mean_of(probabilities):
    return jnp.mean(probabilities.reshape(-1, probabilities.shape[-1]), axis=0)


def test_the_tail_is_not_lost_in_the_rounding_of_a_probability_near_1():
    p = jnp.asarray([[0.9985, 0.001, 0.0005]])
    _, kept, tail = cut(p, 1)
    assert kept[0, 0] == 1  # which leaves nothing, if the tail were 1 less what is kept
    np.testing.assert_allclose(tail, 0.0015, rtol=1e-6)
    found = compare.against_dense(p, [cut(p, 1)], jnp.zeros((1, 3)), 1.0, None)
    assert 0 < found["kl"] < 1e-3


def test_more_classes_cost_less_and_a_skewed_teachers_mean_is_nearer_than_equal_shares():
    # A teacher to whom a class matters more than the example does.
    p = losses.softmax(student((200, 300), scale=1.0) + student((1, 300), 2, scale=2.0))
    z = student((200, 300))
    by_mean, equal = (
        [compare.against_dense(p, [cut(p, k)], z, 2.0, weights) for k in (8, 16, 64, 300)]
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
    measured = compare.against_dense(p, kept, z, 2.0, weights)
    assert measured.keys() == expected.keys()
    for name, number in expected.items():
        np.testing.assert_allclose(measured[name], number, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_bias_is_found_in_the_noise_of_draws():
    """Draws of other targets: what they have in common is the difference, and is no more with more."""
    p, other, z = soft((500, 40), scale=1.0), soft((500, 40), 5, scale=1.0), student((500, 40))
    everything = jnp.broadcast_to(jnp.arange(40, dtype=jnp.uint16), p.shape)
    known = compare.against_dense(p, [(everything, other, jnp.zeros(500))], z, 2.0, None)
    assert known["gradient_noise"] == 0
    for draws in (2, 30):
        kept = [draw(other, draws, seed) for seed in range(3)]
        found = compare.against_dense(p, kept, z, 2.0, None)
        np.testing.assert_allclose(found["gradient_bias"], known["gradient_bias"], rtol=0.03)


def test_drawn_targets_are_noisy_but_not_biased_as_the_largest_are():
    p, z = soft((2000, 300), scale=1.0, temperature=2.0), student((2000, 300), scale=0.3)
    # The same bytes: k classes of 4 and a tail of 4, or draws of 2.
    largest = compare.against_dense(p, [cut(p, 8)], z, 2.0, None)
    kept = [draw(p, 18, seed) for seed in range(4)]
    found = compare.against_dense(p, kept, z, 2.0, None)
    assert found["gradient_bias"] < 0.1 * largest["gradient_bias"]
    assert found["gradient_noise"] > 10 * found["gradient_bias"]
    # Independent draws have the variance (sum p - sum p^2) / draws.
    random = np.random.default_rng(0)
    ends = np.cumsum(np.asarray(p, np.float64), axis=-1)
    alone = [
        drawn(jnp.asarray([np.searchsorted(e, random.uniform(0, e[-1], 18)) for e in ends]))
        for _ in range(4)
    ]
    independent = compare.against_dense(p, alone, z, 2.0, None)
    scale = jnp.sqrt(jnp.mean(jnp.sum((2 * (losses.softmax(z, 2.0) - p)) ** 2, axis=-1)))
    exact = 2 * jnp.sqrt(jnp.mean(1 - jnp.sum(p**2, axis=-1)) / 18) / scale
    np.testing.assert_allclose(independent["gradient_noise"], exact, rtol=0.02)
    assert found["gradient_noise"] < independent["gradient_noise"]
