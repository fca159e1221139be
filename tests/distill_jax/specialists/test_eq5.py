"""Eq. 5 against float64 NumPy and SciPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from distill_jax.specialists import eq5, inference
from distill_jax.specialists.inference import Evidence

DIRECTIONS = ["forward", "reverse"]

seeds = st.integers(0, 2**31)
few = settings(deadline=None, max_examples=25)


def draw(seed, batch=20, classes=12, active=3, special=5, sharpness=2.0):
    """Evidence with overlapping sets that all hold the generalist's first choice; A may be 0."""
    random = np.random.default_rng(seed)
    generalist = sharpness * random.standard_normal((batch, classes)).astype(np.float32)
    order = random.permuted(np.tile(np.arange(classes), (batch, active, 1)), axis=-1)
    first = generalist.argmax(-1)[:, None, None]
    sets = np.concatenate([np.broadcast_to(first, (batch, active, 1)), order], -1)
    # The first choice, then the first others in the order.
    rank = np.where(order == first, classes, np.arange(classes))
    others = np.take_along_axis(order, rank.argsort(-1), -1)[..., : special - 1]
    sets = np.concatenate([sets[..., :1], others], -1).astype(np.int32)
    logits = sharpness * random.standard_normal((batch, active, special + 1)).astype(np.float32)
    logits[..., -1] += 1
    return Evidence(generalist, logits, sets, np.ones((batch, active), bool))


def softmax64(logits):
    z = np.asarray(logits, np.float64)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def one_of(evidence, i):
    """Example i in float64: p^g, and of each active specialist its set, p over it, and d."""
    g, logits, sets, active = (x[i] for x in evidence)
    specialists = []
    for logit, chosen in zip(logits[active], sets[active], strict=True):
        p, real = np.maximum(softmax64(logit), eq5.SMALLEST), chosen < len(g)
        specialists.append((chosen[real], p[:-1][real], p[-1]))
    return np.maximum(softmax64(g), eq5.SMALLEST), specialists


def equation_5(example, q, direction):
    """The objective and its gradient by q, both as the paper writes them, over all pairs."""
    g, specialists = example
    total, slope = 0.0, np.zeros_like(q)
    ones = [(np.arange(len(g)), g, None)] + specialists
    for chosen, p, dustbin in ones:
        outside = np.setdiff1d(np.arange(len(g)), chosen)
        groups = [([i], p_i) for i, p_i in zip(chosen, p, strict=True)]
        if dustbin is not None and len(outside):
            groups.append((outside, dustbin))
        for members, p_i in groups:
            q_i = q[members].sum()
            if direction == "forward" and p_i > 0:
                total += p_i * np.log(p_i / q_i)
                slope[members] -= p_i / q_i
            elif direction == "reverse" and q_i > 0:
                total += q_i * np.log(q_i / p_i)
                slope[members] += np.log(q_i / p_i) + 1
    return total, slope


def by_scipy(example, direction):
    def objective(z):
        q = softmax64(z)
        total, slope = equation_5(example, q, direction)
        return total, q * (slope - q @ slope)

    start = np.log(example[0])
    found = minimize(objective, start, jac=True, method="BFGS", options={"gtol": 1e-9})
    return softmax64(found.x)


def combined(evidence, method, tolerance=1e-6, max_passes=1000):
    q, passes = inference.combine(evidence, method, tolerance, max_passes)
    assert q.dtype == jnp.float32 and passes.dtype == jnp.int32
    return np.asarray(q), np.asarray(passes)


@pytest.mark.parametrize("active", [1, 3, 5])  # 2^5 patterns are more than the 12 classes
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_newton_finds_what_scipy_finds(direction, active):
    evidence = draw(active, batch=10, active=active)
    q, passes = combined(evidence, eq5.newton(direction))
    for i in range(len(q)):
        expected = by_scipy(one_of(evidence, i), direction)
        np.testing.assert_allclose(q[i], expected, atol=1e-6)
    assert passes.max() <= 12


@few
@given(
    st.sampled_from([0, 2, 6]), st.sampled_from([0.3, 3, 20]), st.sampled_from(DIRECTIONS), seeds
)
def test_newton_is_at_a_minimum(active, sharpness, direction, seed):
    evidence = draw(seed, batch=4, classes=80, active=active, special=9, sharpness=sharpness)
    q, _ = combined(evidence, eq5.newton(direction), max_passes=100)
    np.testing.assert_allclose(q.sum(-1), 1, atol=1e-6)
    for i, found in enumerate(q.astype(np.float64)):
        found = np.maximum(found, 1e-38)
        found /= found.sum()
        slope = equation_5(one_of(evidence, i), found, direction)[1]
        # Zero at the minimum, where the slope by q is the same for all classes.
        residual = found * (slope - found @ slope)
        assert np.abs(residual).max() < 2e-5


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_all_methods_agree(direction):
    evidence = draw(0, sharpness=1.0)
    expected, passes = combined(evidence, eq5.newton(direction))
    found, fixed_passes = combined(evidence, eq5.fixed_point(direction), 1e-7)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    for optimizer in (optax.sgd(2.0), optax.adam(0.1)):
        with jax.numpy_dtype_promotion("standard"):  # optax's own arithmetic in adam promotes
            found, descent_passes = combined(
                evidence, eq5.descent(optimizer, direction), 1e-7, 5000
            )
        np.testing.assert_allclose(found, expected, atol=3e-6)
        assert passes.max() < fixed_passes.max() < descent_passes.max()


def test_one_specialist_is_the_closed_form():
    evidence = draw(1, active=1)
    for direction in DIRECTIONS:
        found, passes = combined(evidence, eq5.fixed_point(direction), max_passes=1)
        assert (passes == 1).all()
        for i in range(len(found)):
            g, [(chosen, p, dustbin)] = one_of(evidence, i)
            q, outside = g.copy(), np.setdiff1d(np.arange(len(g)), chosen)
            if direction == "forward":
                q[chosen] = (g[chosen] + p) / 2
                q[outside] *= (g[outside].sum() + dustbin) / 2 / g[outside].sum()
            else:
                q[chosen] = np.sqrt(g[chosen] * p)
                q[outside] *= np.sqrt(g[outside].sum() * dustbin) / g[outside].sum()
                q /= q.sum()
            np.testing.assert_allclose(found[i], q, atol=1e-6)


def everywhere(evidence, dustbin):
    """The same with sets of all classes, in another order for each."""
    batch, active, _ = evidence.class_sets.shape
    classes = evidence.generalist.shape[1]
    random = np.random.default_rng(7)
    sets = random.permuted(np.tile(np.arange(classes, dtype=np.int32), (batch, active, 1)), axis=-1)
    logits = random.standard_normal((batch, active, classes + 1)).astype(np.float32)
    logits[..., -1] = dustbin
    return evidence._replace(specialists=logits, class_sets=sets)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("method", [eq5.newton, eq5.fixed_point])
def test_models_of_all_classes_give_the_mean(direction, method):
    evidence = everywhere(draw(2), -np.inf)
    q, _ = combined(evidence, method(direction))
    placed = np.zeros((3, *q.shape))
    for m in range(3):
        p = softmax64(evidence.specialists[:, m, :-1])
        np.put_along_axis(placed[m], evidence.class_sets[:, m], p, -1)
    models = np.stack([softmax64(evidence.generalist), *placed])
    geometric = softmax64(np.log(models).mean(0))
    expected = models.mean(0) if direction == "forward" else geometric
    np.testing.assert_allclose(q, expected, atol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_dustbin_of_no_classes_has_no_term(direction):
    evidence = everywhere(draw(2), 1.0)
    q, _ = combined(evidence, eq5.newton(direction))
    for i in range(3):
        expected = by_scipy(one_of(evidence, i), direction)
        np.testing.assert_allclose(q[i], expected, atol=1e-6)


def test_a_dustbin_of_probability_0():
    evidence = draw(3, active=2)
    evidence.specialists[:, 0, -1] = -np.inf
    q, _ = combined(evidence, eq5.newton())
    for i in range(3):
        expected = by_scipy(one_of(evidence, i), "forward")
        np.testing.assert_allclose(q[i], expected, atol=1e-6)
    q, _ = combined(evidence, eq5.newton("reverse"))
    for found, chosen in zip(q, evidence.class_sets[:, 0], strict=True):
        assert found[chosen].sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_without_active_specialists_q_is_the_generalists(direction):
    evidence = draw(4)
    idle = evidence._replace(active=np.zeros_like(evidence.active))
    cases = [(idle, make(direction)) for make in (eq5.newton, eq5.fixed_point)]
    cases += [(idle, eq5.descent(optax.sgd(2.0), direction))]
    cases += [(draw(4, active=0), eq5.newton(direction))]
    for case, method in cases:
        q, passes = combined(case, method)
        np.testing.assert_allclose(q, softmax64(case.generalist), atol=3e-7)
        assert passes.max() <= 2


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_padding_changes_nothing(direction):
    evidence = draw(5, active=2)
    expected, expected_passes = combined(evidence, eq5.newton(direction))
    noise = draw(6, active=4, special=8)
    specialists, sets, active = noise.specialists, noise.class_sets, np.zeros((20, 4), bool)
    for m, place in enumerate([3, 1]):
        specialists[:, place, :5] = evidence.specialists[:, m, :5]
        specialists[:, place, 5:8] = -np.inf
        specialists[:, place, -1] = evidence.specialists[:, m, -1]
        sets[:, place, :5], sets[:, place, 5:] = evidence.class_sets[:, m], 12
        active[:, place] = True
    padded = Evidence(evidence.generalist, specialists, sets, active)
    found, passes = combined(padded, eq5.newton(direction))
    np.testing.assert_allclose(found, expected, atol=3e-7)
    assert np.abs(passes - expected_passes).max() <= 1  # the sums are in another order


@few
@given(st.permutations(range(4)), st.sampled_from(DIRECTIONS), seeds)
def test_the_order_of_specialists_does_not_matter(order, direction, seed):
    evidence = draw(seed, active=4)
    permuted = Evidence(evidence.generalist, *(x[:, order] for x in evidence[1:]))
    expected, _ = combined(evidence, eq5.newton(direction))
    found, _ = combined(permuted, eq5.newton(direction))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@few
@given(st.sampled_from([1.0, 4.0]), st.sampled_from(DIRECTIONS), seeds)
def test_no_pass_of_the_fixed_point_goes_up(sharpness, direction, seed):
    evidence = draw(seed, batch=4, sharpness=sharpness)
    before = np.full(4, np.inf)
    for passes in (1, 2, 3, 5, 10, 100):
        q, _ = combined(evidence, eq5.fixed_point(direction), 0.0, passes)
        q = q.astype(np.float64) / q.sum(-1, keepdims=True, dtype=np.float64)
        after = [equation_5(one_of(evidence, i), q[i], direction)[0] for i in range(4)]
        assert (after <= before + 1e-6).all()
        before = np.array(after)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nearly_degenerate_predictions(direction):
    """A dustbin has mass that the generalist gives to no class: where the fixed point crawls."""
    evidence = draw(8, classes=40, active=3)
    g = np.full((20, 40), 1e-12, np.float32)
    np.put_along_axis(g, evidence.class_sets[:, 0], 1.0, -1)
    p = np.full((20, 3, 6), 1e-12, np.float32)
    p[..., 0], p[..., -1] = 1.0, 0.1
    evidence = evidence._replace(generalist=np.log(g), specialists=np.log(p))
    q, passes = combined(evidence, eq5.newton(direction))
    assert np.isfinite(q).all() and passes.max() < 40
    with jax.enable_x64(True):
        double = Evidence(*(x.astype(np.float64) for x in evidence[:2]), *evidence[2:])
        expected, _ = inference.combine(double, eq5.newton(direction), 1e-13, 200)
    np.testing.assert_allclose(q, expected, atol=1e-6)
    if direction == "forward":
        _, crawling = combined(evidence, eq5.fixed_point())
        assert np.median(crawling) > 5 * passes.max()
    extreme = evidence._replace(generalist=1e4 * evidence.generalist)
    for method in (eq5.newton(direction), eq5.fixed_point(direction)):
        q, _ = combined(extreme, method, max_passes=100)
        np.testing.assert_allclose(q.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_copies_of_a_specialist_without_a_dustbin_to_speak_of(direction):
    """Newton's equations are singular then, but for rounding."""
    evidence = draw(10, classes=400, active=1, special=40)
    evidence.specialists[..., -1] = -50
    copied = Evidence(evidence.generalist, *(np.repeat(x, 24, 1) for x in evidence[1:]))
    q, passes = combined(copied, eq5.newton(direction), max_passes=100)
    assert passes.max() < 100
    expected, _ = combined(copied, eq5.fixed_point(direction), 1e-7)
    np.testing.assert_allclose(q, expected, atol=3e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_jit_vmap_and_chunks_equal_plain(direction):
    evidence, method = draw(9), eq5.newton(direction)
    expected, passes = combined(evidence, method)
    halves = jax.tree.map(lambda x: jnp.asarray(x).reshape(2, 10, *x.shape[1:]), evidence)
    # Chunks of 4 that don't divide the 10 examples, under vmap, under jit.
    solve = jax.jit(jax.vmap(functools.partial(inference.combine, method=method, batch_size=4)))
    q, found = solve(halves)
    np.testing.assert_allclose(q.reshape(expected.shape), expected, atol=3e-7)
    assert np.abs(found.reshape(-1) - passes).max() <= 1
