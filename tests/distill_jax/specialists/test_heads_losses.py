"""A specialist's losses: on collapsed logits, and of a full softmax; against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from distill_jax import losses
from distill_jax.errors import UserError
from distill_jax.specialists import heads

seeds = st.integers(0, 2**31)
few = settings(deadline=None, max_examples=20)
C = 9
SETS = jnp.array([[1, 4, 7], [0, 8, C], [2, C, C]], jnp.int32)


def softmax64(logits):
    logits = np.asarray(logits, np.float64)
    return np.exp(logits - logsumexp(logits, axis=-1, keepdims=True))


def test_collapse_by_hand():
    p = np.array([0.1, 0.2, 0.3, 0.4])
    found = heads.collapse(jnp.log(jnp.asarray(p, jnp.bfloat16)), jnp.array([2, 0, 4]))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(np.exp(found), [0.3, 0.1, 0, 0.6], rtol=0.01)
    np.testing.assert_array_equal(jnp.isneginf(found), [False, False, True, False])


@few
@given(seeds)
def test_a_collapsed_distribution_is_the_generalists_with_the_others_summed(seed):
    z = np.random.default_rng(seed).uniform(-60, 60, (2, 5, C)).astype(np.float32)
    found = jax.vmap(heads.collapse, (None, 0))(z, SETS)
    assert found.shape == (3, 2, 5, 4)
    p = softmax64(z)
    for class_set, collapsed in zip(np.asarray(SETS), softmax64(found), strict=True):
        real = class_set[class_set < C]
        np.testing.assert_allclose(collapsed[..., : len(real)], p[..., real], rtol=1e-4)
        assert (collapsed[..., len(real) : 3] == 0).all()
        outside = np.delete(p, real, axis=-1).sum(-1)
        np.testing.assert_allclose(collapsed[..., 3], outside, rtol=1e-4)


def test_collapsing_all_classes_leaves_a_dustbin_of_no_probability():
    z = jnp.asarray(np.random.default_rng(0).standard_normal((4, C)), jnp.float32)
    found = heads.collapse(z, jnp.arange(C)[::-1])
    np.testing.assert_array_equal(found[:, :-1], z[:, ::-1])
    assert jnp.isneginf(found[:, -1]).all()


def values_and_gradients(loss, logits):
    values, pullback = jax.vjp(loss, logits)
    return np.asarray(values), np.asarray(pullback(jnp.ones_like(values))[0])


@few
@given(seeds, st.sampled_from([1.0, 30.0, 1e4]))
def test_collapsed_loss_and_its_gradient(seed, scale):
    random = np.random.default_rng(seed)
    z = jnp.asarray(scale * random.uniform(-1, 1, (3, 12, C)), jnp.float32)
    label = jnp.asarray(random.integers(0, C, (3, 12)), jnp.int32)

    def loss(z):
        loss = jax.vmap(heads.collapsed_loss, (0, 0, None, 0))
        return loss(z, {"label": label}, {}, {"class_set": SETS})

    values, gradients = values_and_gradients(loss, z)
    assert values.shape == (3, 12) and values.dtype == np.float32
    # A log-sum-exp is as large as its logits, so float32 rounds it by half of this. A value has two,
    # the dustbin's logit and the normaliser; a probability p moves with the first by p (1 - p) <= 1/4.
    rounding = np.finfo(np.float32).eps * (scale + np.log(C))
    z64 = np.asarray(z, np.float64)
    for m, class_set in enumerate(np.asarray(SETS)):
        others = ~np.isin(np.arange(C), class_set)
        named = np.where(others[label[m]][:, None], others, np.eye(C, dtype=bool)[label[m]])
        kept = np.where(named, z64[m], -np.inf)  # what the label stands for
        expected = logsumexp(z64[m], axis=1) - logsumexp(kept, axis=1)
        np.testing.assert_allclose(values[m], expected, rtol=1e-5, atol=2e-6 + rounding)
        slopes = softmax64(z64[m]) - softmax64(kept)
        np.testing.assert_allclose(gradients[m], slopes, atol=2e-6 + rounding / 8)
        targets = heads.dustbin_labels(jnp.asarray(class_set), C)[label[m]]
        alone = losses.hard_cross_entropy(heads.collapse(z[m], SETS[m]), targets)
        np.testing.assert_allclose(values[m], alone, rtol=1e-6, atol=2 * rounding)


def test_collapsed_loss_without_others_is_the_plain_cross_entropy():
    z = jnp.asarray(np.random.default_rng(0).standard_normal((C, C)), jnp.float32)
    label, class_set = jnp.arange(C, dtype=jnp.int32), jnp.arange(C, dtype=jnp.int32)

    def loss(z):
        return heads.collapsed_loss(z, {"label": label}, {}, {"class_set": class_set})

    plain = values_and_gradients(lambda z: losses.hard_cross_entropy(z, label), z)
    for found, expected in zip(values_and_gradients(loss, z), plain, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_collapsed_loss_of_classes_left_out_by_their_logits():
    z = jnp.asarray(np.random.default_rng(0).standard_normal((4, C)), jnp.float32)
    outside = np.setdiff1d(np.arange(C), SETS[0])
    batch, constants = {"label": jnp.array([1, 4, 7, 1], jnp.int32)}, {"class_set": SETS[0]}
    for out in (outside, outside[1:], np.array([4])):  # class 4 costs the example of it inf
        values, gradients = values_and_gradients(
            lambda z: heads.collapsed_loss(z, batch, {}, constants), z.at[:, out].set(-jnp.inf)
        )
        possible = ~np.isin(batch["label"], out)
        assert np.isfinite(values[possible]).all() and np.isfinite(gradients[possible]).all()
        assert (gradients[possible][:, out] == 0).all()


def test_collapsed_loss_names_what_is_missing():
    z, label = jnp.zeros((4, C)), jnp.zeros(4, int)
    with pytest.raises(UserError, match=r"'class_set' in the constants, which has nothing"):
        jax.jit(heads.collapsed_loss)(z, {"label": label}, {})
    with pytest.raises(UserError, match=r"'label' in the batch, which has only \['id'\]"):
        jax.jit(heads.collapsed_loss)(z, {"id": label}, {}, {"class_set": SETS[0]})


@few
@given(seeds, st.floats(0.5, 10, width=32))
def test_full_softmax_loss_is_hard_for_special_examples_and_soft_for_others(seed, temperature):
    random = np.random.default_rng(seed)
    z, v = jnp.asarray(2 * random.standard_normal((2, 12, C)), jnp.float32)
    label = jnp.asarray(random.integers(-1, C, 12), jnp.int32)  # an unknown one is soft, too
    class_set = np.asarray(SETS[random.integers(len(SETS))])
    special = np.isin(label, class_set)
    batch, constants = {"label": label, "teacher_logits": v}, {"class_set": jnp.asarray(class_set)}
    hyper = {"temperature": jnp.float32(temperature)}
    found = heads.full_softmax_loss(z, batch, hyper, constants)
    assert found.shape == (12,) and found.dtype == jnp.float32
    log_q, soft_log_q = (np.log(softmax64(np.asarray(z) / t)) for t in (1.0, temperature))
    hard = -log_q[np.arange(12), label]
    soft = -(temperature**2) * (softmax64(np.asarray(v) / temperature) * soft_log_q).sum(1)
    np.testing.assert_allclose(found, np.where(special, hard, soft), rtol=1e-4, atol=1e-4)
    teacher = jax.grad(
        lambda v: heads.full_softmax_loss(z, {**batch, "teacher_logits": v}, hyper, constants).sum()
    )(v)
    assert (np.asarray(teacher) == 0).all()


def test_full_softmax_loss_names_what_is_missing():
    z, hyper, batch = jnp.zeros((4, C)), {"temperature": 2.0}, {"label": jnp.zeros(4, jnp.int32)}
    with pytest.raises(UserError, match=r"'teacher_logits' in the batch, .* only \['label'\]"):
        jax.jit(heads.full_softmax_loss)(z, batch, hyper, {"class_set": SETS[0]})
    with pytest.raises(UserError, match=r"'class_set' in the constants, .* only \['teacher'\]"):
        jax.jit(heads.full_softmax_loss)(z, batch, hyper, {"teacher": z})
