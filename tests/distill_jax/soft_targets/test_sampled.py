"""Classes drawn as soft targets: how often each, at which points; the loss they give on average."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax import losses, sampled_targets
from distill_jax.errors import UserError

UNITS = 64
GRID = jnp.asarray((np.arange(UNITS) + 0.5) / UNITS, jnp.float32)
LAST = np.float32(1 - 2**-24)  # the largest offset
sample = jax.jit(sampled_targets.sample, static_argnums=1)


def in_units(classes, seed):
    """Probabilities that are multiples of 1/64, so that a grid of 64 offsets has all there is."""
    random = np.random.default_rng(seed)
    counts = random.multinomial(UNITS, random.dirichlet(np.full(classes, 0.3)))
    return jnp.asarray(counts / UNITS, jnp.float32), counts


def over_grid(p, draws):
    """Draws `[64, draws]` of one example at every offset of the grid."""
    return np.asarray(sample(jnp.broadcast_to(p, (UNITS, len(p))), draws, GRID))


def count(ids, classes):
    return np.stack([np.bincount(row, minlength=classes) for row in ids.reshape(-1, ids.shape[-1])])


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([2, 5, 40]), st.sampled_from([1, 3, 8, 100]), st.integers(0, 10**6))
def test_a_class_is_drawn_as_often_as_its_probability_says(classes, draws, seed):
    p, units = in_units(classes, seed)
    ids = over_grid(p, draws)
    assert ids.dtype == np.uint16 and ids.shape == (UNITS, draws)
    assert (np.diff(ids.astype(int), axis=1) >= 0).all()
    found = count(ids, classes)
    np.testing.assert_array_equal(found.sum(axis=0), draws * units)  # exactly, over all offsets
    assert (found >= draws * units // UNITS).all() and (found <= -(-draws * units // UNITS)).all()


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from([1, 2, 255, 256, 257, 511, 14_000, 65_536, 70_000, 2**20]),
    st.sampled_from([1, 5, 300]),
    st.integers(0, 10**6),
)
def test_packed_draws_come_back_and_as_many_as_fit(classes, draws, seed):
    random = np.random.default_rng(seed)
    top = random.choice([1, classes // 100 + 1, classes], 6)[:, None]  # also with long ways between
    ids = np.sort((random.random((6, draws)) ** 3 * top).astype(np.int64), axis=1)
    ids[0], ids[1] = 0, classes - 1
    packed = sampled_targets.pack(ids, classes)
    found = sampled_targets.unpack(packed, draws, classes)
    np.testing.assert_array_equal(found, ids)
    assert found.dtype == (np.uint16 if classes <= 65_536 else np.uint32)
    size = packed[0].nbytes
    assert size <= (draws + 1) * found.itemsize
    assert sampled_targets.most_draws(size, classes) == draws
    assert sampled_targets.most_draws(size - 1, classes) < draws


def test_the_mean_loss_and_gradient_are_the_dense_ones():
    p, _ = in_units(12, 3)
    z = jnp.asarray(3 * np.random.default_rng(0).standard_normal(12), jnp.float32)
    draws, temperature = 5, 2.5
    ids = jnp.asarray(over_grid(p, draws))
    share, tail = jnp.full((UNITS, 1), 1 / draws, jnp.float32), jnp.zeros(UNITS)

    def mean(z):
        logits = jnp.broadcast_to(z, (UNITS, 12))
        weights = jnp.ones(12)  # of the others, who have nothing
        values = losses.top_k_soft_cross_entropy(logits, ids, share, tail, temperature, weights)
        return jnp.mean(values)

    dense = functools.partial(losses.soft_cross_entropy, soft_targets=p, temperature=temperature)
    for found, expected in zip(
        jax.jit(jax.value_and_grad(mean))(z), jax.jit(jax.value_and_grad(dense))(z), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_points_of_many_classes_against_float64():
    """14,000 and 70,000 classes, where a running sum in float32 would be off by several classes."""
    random = np.random.default_rng(0)
    for classes, dtype in ((14_000, np.uint16), (70_000, np.uint32)):
        logits = np.stack([random.standard_normal(classes) * scale for scale in (0, 1, 4)])
        p = np.exp(logits) * (random.random(classes) < 0.7)
        p = (p / p.sum(axis=1, keepdims=True)).astype(np.float32)
        offsets = np.float32([0, 0.3, LAST])
        ids = np.asarray(sample(jnp.asarray(p), 64, jnp.asarray(offsets)))
        assert ids.dtype == dtype
        ends = np.cumsum(p, axis=1, dtype=np.float64)
        starts = ends - p
        points = (np.arange(64) + offsets[:, None].astype(np.float64)) / 64 * ends[:, -1:]
        rows = np.arange(3)[:, None]
        # Half a unit of 2^-31 for each class, whose sum grows as the root of their number.
        allowed = 4 * np.sqrt(classes) * 2**-32 + 2**-24 / 64
        assert (starts[rows, ids] <= points + allowed).all()
        assert (points - allowed <= ends[rows, ids]).all()
        assert (p[rows, ids] > 0).all()


@pytest.mark.parametrize("scale", [0.995, 1.0, 1.005])
@pytest.mark.parametrize("zeros", [0, 1, 20_000])
def test_nothing_is_drawn_of_probability_0(scale, zeros):
    """At both ends and between, at the smallest and largest offset, with a sum that is a little off."""
    random = np.random.default_rng(1)
    p = random.dirichlet(np.ones(3000)) * (np.arange(3000) % 3 > 0)
    p = np.concatenate([np.zeros(zeros), p * scale / p.sum(), np.zeros(zeros)]).astype(np.float32)
    ids = np.asarray(sample(jnp.stack([p, p]), 500, jnp.float32([0, LAST])))
    assert (p[ids] > 0).all()
    positive = np.flatnonzero(p)
    assert ids[0, 0] == positive[0] and positive[-10] < ids[1, -1] <= positive[-1]


def test_one_class_with_all_of_it():
    for place in (0, 4, 8):
        p = jnp.zeros((2, 9)).at[:, place].set(1.0)
        ids = sample(p, sampled_targets.MAX_DRAWS, jnp.float32([0, LAST]))
        assert (ids == place).all()


def test_draws_are_the_same_in_any_batch_and_under_vmap():
    p = jax.nn.softmax(3 * jax.random.normal(jax.random.key(0), (6, 7, 50)))
    offsets = sampled_targets.offsets(5, np.arange(42)).reshape(6, 7)
    whole = sample(p, 9, offsets)
    np.testing.assert_array_equal(whole[3, 2], sample(p[3, 2], 9, offsets[3, 2]))
    mapped = jax.vmap(lambda p, offsets: sample(p, 9, offsets), 1, 1)(p, offsets)
    np.testing.assert_array_equal(whole, mapped)
    half = p.astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        sample(half, 9, offsets), sample(half.astype(jnp.float32), 9, offsets)
    )


def test_offsets_are_of_the_seed_and_the_id_alone():
    whole = np.asarray(sampled_targets.offsets(3, np.arange(10_000)))
    assert whole.dtype == np.float32 and whole.min() >= 0 and whole.max() < 1
    some = np.array([9_999, 0, 17, 17])
    np.testing.assert_array_equal(sampled_targets.offsets(3, some), whole[some])
    np.testing.assert_array_equal(
        jax.jit(sampled_targets.offsets)(3, jnp.asarray(some)), whole[some]
    )
    last = np.array([2**32 - 1])
    assert sampled_targets.offsets(3, last) != sampled_targets.offsets(4, last)
    other = np.asarray(sampled_targets.offsets(4, np.arange(10_000)))
    assert abs(np.corrcoef(whole, other)[0, 1]) < 0.04  # four standard deviations
    for values in (whole, other):
        distance = np.abs(np.sort(values) - (np.arange(10_000) + 0.5) / 10_000).max()
        assert distance < 1.95 / 100  # Kolmogorov and Smirnov, at 0.1 %


@pytest.mark.parametrize("draws", [0, sampled_targets.MAX_DRAWS + 1])
def test_draws_that_are_none(draws):
    with pytest.raises(UserError, match=f"draws must be 1 to 32768, not {draws}"):
        sampled_targets.sample(jnp.ones((1, 4)) / 4, draws, jnp.zeros(1))
