"""What is kept of soft targets: the k largest and their loss; classes drawn, packed, and their loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import drawn, soft, student

from distill_jax import losses, top_k_losses
from distill_jax.errors import UserError
from distill_jax.soft_targets import encodings

# A shape and k each, few enough that compiling takes no time.
cuts = st.sampled_from([((7, 5), 2), ((3, 12), 1), ((3, 12), 12), ((2, 2, 40), 16)])
temperatures = st.floats(0.5, 20, width=32)
seeds = st.integers(0, 2**31)
few = settings(deadline=None, max_examples=25)
cut = jax.jit(encodings.top_k, static_argnums=1)
densify = jax.jit(encodings.densify, static_argnums=4)
sample = jax.jit(encodings.sample, static_argnums=1)
UNITS = 64
GRID = jnp.asarray((np.arange(UNITS) + 0.5) / UNITS, jnp.float32)
LAST = np.float32(1 - 2**-24)  # the largest offset


def mean_of(probabilities):
    return jnp.mean(probabilities.reshape(-1, probabilities.shape[-1]), axis=0)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(loss, logits, *args, **options):
    values, pull_back = jax.vjp(lambda z: loss(z, *args, **options), logits)
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


def test_class_ids_above_65536_classes_are_not_cut():
    for num_classes, dtype in ((65_536, jnp.uint16), (65_537, jnp.uint32)):
        p = np.zeros((2, num_classes), np.float32)
        p[:, -1], p[:, 3] = 0.75, 0.25
        ids, kept, tail = cut(p, 2)
        assert ids.dtype == dtype and ids.tolist() == [[num_classes - 1, 3]] * 2
        z = student(p.shape)
        found, _ = value_and_gradient(top_k_losses.soft_cross_entropy, z, ids, kept, tail, 2.0)
        expected, _ = value_and_gradient(losses.soft_cross_entropy, z, p, 2.0)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("k", [0, 13])
def test_k_is_at_most_the_number_of_classes(k):
    with pytest.raises(UserError, match=f"k must be 1 to the number of classes, 12, not {k}"):
        encodings.top_k(soft((2, 12)), k)


@few
@given(cuts, temperatures, st.booleans(), seeds)
def test_loss_is_that_of_the_densified_targets(shape_and_k, temperature, uniform, seed):
    shape, k = shape_and_k
    p, z = soft(shape, seed, temperature=temperature), student(shape, seed + 1)
    kept, weights = cut(p, k), None if uniform else mean_of(p)
    dense = densify(*kept, weights, shape[-1])
    found, gradient = value_and_gradient(
        top_k_losses.soft_cross_entropy, z, *kept, temperature, tail_weights=weights
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
            top_k_losses.soft_cross_entropy, z, *kept[:2], tail, 3.0, tail_weights=weights
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
                top_k_losses.soft_cross_entropy, logits, *kept, 2.0, tail_weights=weights
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
            top_k_losses.soft_cross_entropy(
                student((4, 6)), ids, kept, tail, 2.0, tail_weights=weights
            )
        )

    for gradient in jax.grad(loss, argnums=(0, 1, 2))(kept, tail, jnp.arange(6.0)):
        assert not gradient.any()


def test_what_is_drawn_repeatedly_adds_up():
    ids = jnp.asarray([[0, 2, 2, 2], [1, 1, 3, 3]], jnp.uint16)
    expected = [[0.25, 0, 0.75, 0], [0, 0.5, 0, 0.5]]
    np.testing.assert_array_equal(densify(*drawn(ids), None, 4), expected)


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
    packed = encodings.pack(ids, classes)
    found = encodings.unpack(packed, draws, classes)
    np.testing.assert_array_equal(found, ids)
    assert found.dtype == (np.uint16 if classes <= 65_536 else np.uint32)
    size = packed[0].nbytes
    assert size <= (draws + 1) * found.itemsize
    assert encodings.most_draws(size, classes) == draws
    assert encodings.most_draws(size - 1, classes) < draws


def test_the_mean_loss_and_gradient_are_the_dense_ones():
    p, _ = in_units(12, 3)
    z = jnp.asarray(3 * np.random.default_rng(0).standard_normal(12), jnp.float32)
    draws, temperature = 5, 2.5
    ids = jnp.asarray(over_grid(p, draws))
    share, tail = jnp.full((UNITS, 1), 1 / draws, jnp.float32), jnp.zeros(UNITS)

    def mean(z):
        logits = jnp.broadcast_to(z, (UNITS, 12))
        weights = jnp.ones(12)  # of the others, who have nothing
        values = top_k_losses.soft_cross_entropy(
            logits, ids, share, tail, temperature, tail_weights=weights
        )
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
        ids = sample(p, encodings.MAX_DRAWS, jnp.float32([0, LAST]))
        assert (ids == place).all()


def test_draws_are_the_same_in_any_batch_and_under_vmap():
    p = jax.nn.softmax(3 * jax.random.normal(jax.random.key(0), (6, 7, 50)))
    offsets = encodings.offsets(5, np.arange(42)).reshape(6, 7)
    whole = sample(p, 9, offsets)
    np.testing.assert_array_equal(whole[3, 2], sample(p[3, 2], 9, offsets[3, 2]))
    mapped = jax.vmap(lambda p, offsets: sample(p, 9, offsets), 1, 1)(p, offsets)
    np.testing.assert_array_equal(whole, mapped)
    half = p.astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        sample(half, 9, offsets), sample(half.astype(jnp.float32), 9, offsets)
    )


def test_offsets_are_of_the_seed_and_the_id_alone():
    whole = np.asarray(encodings.offsets(3, np.arange(10_000)))
    assert whole.dtype == np.float32 and whole.min() >= 0 and whole.max() < 1
    some = np.array([9_999, 0, 17, 17])
    np.testing.assert_array_equal(encodings.offsets(3, some), whole[some])
    np.testing.assert_array_equal(jax.jit(encodings.offsets)(3, jnp.asarray(some)), whole[some])
    last = np.array([2**32 - 1])
    assert encodings.offsets(3, last) != encodings.offsets(4, last)
    other = np.asarray(encodings.offsets(4, np.arange(10_000)))
    assert abs(np.corrcoef(whole, other)[0, 1]) < 0.04  # four standard deviations
    for values in (whole, other):
        distance = np.abs(np.sort(values) - (np.arange(10_000) + 0.5) / 10_000).max()
        assert distance < 1.95 / 100  # Kolmogorov and Smirnov, at 0.1 %


@pytest.mark.parametrize("draws", [0, encodings.MAX_DRAWS + 1])
def test_draws_that_are_none(draws):
    with pytest.raises(UserError, match=f"draws must be 1 to 32768, not {draws}"):
        encodings.sample(jnp.ones((1, 4)) / 4, draws, jnp.zeros(1))
