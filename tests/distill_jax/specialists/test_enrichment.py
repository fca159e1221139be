"""Enriched batches, the dustbin and its correction: against posteriors that are known exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import chisquare, norm

from distill_jax import losses, models
from distill_jax.errors import UserError
from distill_jax.specialists import enrichment, heads

seeds = st.integers(0, 2**31)
few = settings(deadline=None, max_examples=20)
C = 9
SETS = jnp.array([[1, 4, 7], [0, 8, C], [2, C, C]], jnp.int32)
PRIORS = np.array([0.1, 0.3, 0.6])  # of three Gaussians in one dimension
MEANS = np.array([-1.0, 0.5, 2.0])
INPUTS = np.linspace(-5, 6, 45)


def softmax64(logits):
    logits = np.asarray(logits, np.float64)
    return np.exp(logits - logsumexp(logits, axis=-1, keepdims=True))


def log_joint(priors):
    """`log P(x, y)` `[N, 3]`, the logits of a Bayes-optimal classifier under some priors."""
    return norm.logpdf(INPUTS[:, None], MEANS) + np.log(priors)


def enriched_priors(special):
    share = PRIORS[special].sum()
    return np.where(special, PRIORS / share, PRIORS / (1 - share)) / 2


def labels_of(seed, size=400):
    """Labels of all classes, of unequal numbers."""
    random = np.random.default_rng(seed)
    labels = random.choice(C, size, p=np.arange(1, C + 1) / 45)
    labels[:C] = np.arange(C)
    return labels.astype(np.int32)


def generalist(seed, hidden=16, num_classes=C):
    """Its parameters, with biases too, and features of its last hidden layer."""
    random = np.random.default_rng(seed)
    model = models.mlp([hidden], num_classes)
    params = model.init(jax.random.key(seed % 1000), jnp.zeros((1, 5)))
    params["output"]["bias"] = jnp.asarray(random.standard_normal(num_classes), jnp.float32)
    return params, jnp.asarray(3 * random.standard_normal((20, 5)), jnp.float32)


def test_dustbin_labels_by_hand():
    found = heads.dustbin_labels(jnp.array([1, 4, 7]), C)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, [3, 0, 3, 3, 1, 3, 3, 2, 3])


def test_dustbin_labels_of_padded_sets():
    found = jax.vmap(functools.partial(heads.dustbin_labels, num_classes=C))(SETS)
    np.testing.assert_array_equal(found[0], [3, 0, 3, 3, 1, 3, 3, 2, 3])
    np.testing.assert_array_equal(found[1], [0, 3, 3, 3, 3, 3, 3, 3, 1])
    np.testing.assert_array_equal(found[2], [3, 3, 0, 3, 3, 3, 3, 3, 3])


def test_the_head_of_one_unit_gets_the_specialists_labels():
    labels = jnp.array([7, 8, -1, 1, 0], jnp.int32)
    found = heads.UNIT.labels(labels, jnp.array([1, 4, 7]), C)
    np.testing.assert_array_equal(found, [2, 3, -1, 0, 3])


@few
@given(seeds)
def test_rows_are_cut_in_two(seed):
    labels = labels_of(seed)
    labels[C : C + 5] = -1
    for class_set in np.asarray(SETS):
        special, other = enrichment.enriched_rows(labels, class_set, C)
        assert special.dtype == other.dtype == np.int32
        assert np.isin(labels[special], class_set).all()
        assert not np.isin(labels[other], class_set).any()
        both = np.sort(np.concatenate([special, other]))
        np.testing.assert_array_equal(both, np.flatnonzero(labels >= 0))


def test_rows_name_what_is_missing():
    labels = np.array([0, 1, 1, 2, 4])
    with pytest.raises(UserError, match=r"class 3 of a .* no example \(2 of 3 classes have none\)"):
        enrichment.enriched_rows(labels, [0, 3, 5], C)
    with pytest.raises(UserError, match="a dustbin of no mass: all 5 examples"):
        enrichment.enriched_rows(labels, [0, 1, 2, 4, C], C)
    with pytest.raises(UserError, match="a dustbin of no mass"):  # one without a label is no help
        enrichment.enriched_rows(np.append(labels, -1), [0, 1, 2, 4], C)


def stacked(labels):
    rows = [enrichment.enriched_rows(labels, s, C) for s in np.asarray(SETS)]
    return rows, enrichment.stack_rows(rows)


def test_rows_are_stacked_with_their_counts():
    rows, fields = stacked(labels_of(0))
    assert all(field.dtype == np.int32 for field in fields.values())
    for m, halves in enumerate(rows):
        for name, half in zip(("special", "other"), halves, strict=True):
            count = fields[f"{name}_count"][m]
            np.testing.assert_array_equal(fields[name][m, :count], half)
            assert (fields[name][m, count:] == -1).all()


def test_every_batch_is_half_special_and_each_half_uniform(key):
    labels = labels_of(0, size=60)
    rows, fields = stacked(labels)
    draw = functools.partial(enrichment.draw_enriched, steps=300, batch_size=16)
    drawn = jax.jit(jax.vmap(draw))(fields, jax.random.split(key, 3))
    assert drawn.shape == (3, 300, 16) and drawn.dtype == jnp.int32
    for batches, halves in zip(np.asarray(drawn), rows, strict=True):
        for place, half in enumerate(halves):
            found = batches[:, place::2]
            assert np.isin(found, half).all()  # so exactly 8 of 16, in every batch
            counts = np.bincount(found.ravel(), minlength=60)[half]
            assert chisquare(counts).pvalue > 1e-3
    alone = draw(jax.tree.map(lambda x: x[1], fields), jax.random.split(key, 3)[1])
    np.testing.assert_array_equal(alone, drawn[1])


def test_batches_are_drawn_with_replacement_and_anew_in_every_step(key):
    fields = {
        "special": jnp.array([3, -1]),
        "special_count": jnp.int32(1),
        "other": jnp.arange(1000),
        "other_count": jnp.int32(1000),
    }
    drawn = np.asarray(enrichment.draw_enriched(fields, key, 50, 8))
    assert (drawn[:, ::2] == 3).all()
    assert len(np.unique(drawn[:, 1::2], axis=0)) == 50


def test_odd_batches_are_refused(key):
    _, fields = stacked(labels_of(0))
    with pytest.raises(UserError, match="must be even to halve it, not 15"):
        enrichment.draw_enriched(jax.tree.map(lambda x: x[0], fields), key, 2, 15)


def test_correction_is_the_log_of_the_oversampling():
    found = enrichment.dustbin_correction(jnp.array([10, 50, 75]), jnp.array([90, 50, 25]))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.log([9, 1, 1 / 3]), atol=1e-6)
    assert enrichment.dustbin_correction(10, 90).shape == ()


@pytest.mark.parametrize("class_set", [[0], [2], [0, 1]], ids=str)
def test_corrected_dustbin_is_bayes_optimal(class_set):
    special = np.isin(np.arange(3), class_set)
    correction = enrichment.dustbin_correction(
        1000 * PRIORS[special].sum(), 1000 * PRIORS[~special].sum()
    )

    def with_dustbin(joint):
        return np.column_stack([joint[:, special], logsumexp(joint[:, ~special], axis=1)])

    enriched, true = (
        with_dustbin(log_joint(priors)) for priors in (enriched_priors(special), PRIORS)
    )
    found = heads.correct_dustbin(jnp.asarray(enriched, jnp.float32), correction)
    np.testing.assert_allclose(softmax64(found), softmax64(true), atol=1e-6)
    assert np.abs(softmax64(enriched) - softmax64(true)).max() > 0.05


@pytest.mark.parametrize("class_set", [[0, 3], [2, 3], [0, 1]], ids=str)
def test_corrected_full_softmax_is_bayes_optimal(class_set):
    special = np.isin(np.arange(3), class_set)
    correction = enrichment.dustbin_correction(PRIORS[special].sum(), PRIORS[~special].sum())
    enriched = log_joint(enriched_priors(special))
    found = jax.jit(heads.correct_others)(
        jnp.asarray(enriched, jnp.float32), jnp.array(class_set), correction
    )
    np.testing.assert_allclose(softmax64(found), softmax64(log_joint(PRIORS)), atol=1e-6)
    np.testing.assert_allclose(found[:, special], enriched[:, special], rtol=1e-6)


def test_correction_of_many_specialists_is_that_of_each():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 4)), jnp.float32)
    corrections = jnp.array([1.0, -2.0, 0.5])
    found = jax.vmap(heads.correct_dustbin)(logits, corrections)
    np.testing.assert_array_equal(found[..., :3], logits[..., :3])
    np.testing.assert_array_equal(found[..., 3], logits[..., 3] + corrections[:, None])


def test_trained_dustbin_has_its_true_share_after_the_correction(key):
    """Two Gaussians, for which logistic regression is exact; special ones are 10 % of 20,000."""
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1], [2000, 18000])
    x = (2.0 * labels - 1.0 + random.standard_normal(20000)).astype(np.float32)
    rows = enrichment.enriched_rows(labels, [0], 2)
    fields = {name: jnp.asarray(x[0]) for name, x in enrichment.stack_rows([rows]).items()}
    drawn = np.asarray(enrichment.draw_enriched(fields, key, 100, 40)).ravel()
    inputs, targets = jnp.asarray(x[drawn]), jnp.asarray(labels[drawn])

    def logits(params, x):
        dustbin = params["slope"] * x + params["intercept"]
        return jnp.stack([jnp.zeros_like(x), dustbin], axis=-1)

    def loss(params):
        return jnp.mean(losses.hard_cross_entropy(logits(params, inputs), targets))

    optimizer = optax.sgd(1.0, momentum=0.9)

    def step(state, _):
        params, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    params = {"slope": jnp.zeros(()), "intercept": jnp.zeros(())}
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=500)
    assert all(abs(g) < 1e-5 for g in jax.tree.leaves(jax.grad(loss)(params)))  # of most likelihood

    raw = logits(params, jnp.asarray(x))
    corrected = heads.correct_dustbin(raw, enrichment.dustbin_correction(*map(len, rows)))
    before, after = (softmax64(z)[:, 1] for z in (raw, corrected))
    # The parameters' covariance is that of maximum likelihood from n independent draws. These come
    # from a training set, whose own deviation counts as if it were of 2,000 examples per half.
    design = np.column_stack([x, np.ones_like(x)])
    p = softmax64(raw)[drawn, 1]
    information = (design[drawn] * (p * (1 - p))[:, None]).T @ design[drawn] / len(drawn)
    slope = (design * (after * (1 - after))[:, None]).mean(0)
    per_draw = slope @ np.linalg.solve(information, slope)
    deviation = np.sqrt(per_draw * (1 / len(drawn) + 1 / 4000))
    assert abs(after.mean() - 0.9) < 4 * deviation < 0.05
    assert abs(before.mean() - 0.9) > 10 * deviation


@few
@given(seeds, st.sampled_from([[1, 4, 7], [0, 8], list(range(8))]))
def test_reduced_output_keeps_special_logits_and_bounds_the_dustbin(seed, class_set):
    params, inputs = generalist(seed)
    reduced = heads.reduce_output(params, jnp.array(class_set), C)
    full = np.asarray(models.mlp([16], C).apply(params, inputs))
    found = np.asarray(models.mlp([16], len(class_set) + 1).apply(reduced, inputs))
    assert found.shape == (20, len(class_set) + 1)
    np.testing.assert_allclose(found[:, :-1], full[:, class_set], rtol=1e-5, atol=1e-5)
    others = np.delete(full, class_set, axis=1)
    expected = others.mean(1) + np.log(others.shape[1])
    np.testing.assert_allclose(found[:, -1], expected, rtol=1e-4, atol=1e-4)
    assert (found[:, -1] <= logsumexp(others, axis=1) + 1e-4).all()


def test_reduced_output_is_exact_for_equal_logits():
    params, inputs = generalist(0)
    others = np.delete(np.arange(C), [1, 4, 7])
    output = params["output"]
    output["kernel"] = output["kernel"].at[:, others].set(output["kernel"][:, :1])
    output["bias"] = output["bias"].at[others].set(0.3)
    reduced = heads.reduce_output(params, jnp.array([1, 4, 7]), C)
    full = softmax64(models.mlp([16], C).apply(params, inputs))
    found = softmax64(models.mlp([16], 4).apply(reduced, inputs))
    np.testing.assert_allclose(found[:, -1], full[:, others].sum(1), atol=1e-5)
    np.testing.assert_allclose(found[:, :-1], full[:, [1, 4, 7]], atol=1e-5)


def test_reduced_output_leaves_the_rest_alone():
    params, _ = generalist(0)
    reduced = heads.reduce_output(params, jnp.array([1, 4, 7]), C)
    assert reduced.keys() == params.keys()
    assert reduced["hidden_0"] is params["hidden_0"]
    assert params["output"]["kernel"].shape == (16, C)
    with pytest.raises(UserError, match=r"kernel is float32 \(16, 9\); expected float D 10"):
        heads.reduce_output(params, jnp.array([1]), 10)


def test_places_of_padding_never_get_probability():
    params, inputs = generalist(0)
    reduce = jax.vmap(functools.partial(heads.reduce_output, params, num_classes=C))
    stack = reduce(SETS)
    model, optimizer = models.mlp([16], 4), optax.sgd(0.1, momentum=0.9)
    for m, class_set in enumerate(np.asarray(SETS)):
        real = class_set[class_set < C]
        alone = heads.reduce_output(params, jnp.asarray(real), C)["output"]
        kept = [*range(len(real)), 3]
        found = jax.tree.map(lambda x, m=m: x[m], stack)
        np.testing.assert_allclose(found["output"]["kernel"][:, kept], alone["kernel"], atol=1e-6)
        np.testing.assert_allclose(
            found["output"]["bias"][jnp.array(kept)], alone["bias"], rtol=1e-6
        )

        def loss(params):
            return jnp.mean(losses.hard_cross_entropy(model.apply(params, inputs), jnp.full(20, 3)))

        opt_state = optimizer.init(found)
        for _ in range(3):
            updates, opt_state = optimizer.update(jax.grad(loss)(found), opt_state)
            found = optax.apply_updates(found, updates)
        assert jnp.isfinite(loss(found))
        probabilities = np.asarray(losses.softmax(model.apply(found, inputs)))
        assert (probabilities[:, len(real) : 3] == 0).all()
        np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)


def test_a_set_of_all_classes_has_a_dustbin_of_no_probability():
    params, inputs = generalist(0)
    reduced = heads.reduce_output(params, jnp.arange(C), C)
    found = losses.softmax(models.mlp([16], C + 1).apply(reduced, inputs))
    assert (np.asarray(found[:, -1]) == 0).all()
    expected = softmax64(models.mlp([16], C).apply(params, inputs))
    np.testing.assert_allclose(found[:, :-1], expected, atol=1e-5)


def test_a_generalist_collapsed_starts_as_itself_where_one_unit_does_not():
    params, inputs = generalist(0, hidden=2)
    logits = models.mlp([2], C).apply(params, inputs)
    expected = np.delete(softmax64(logits), [1, 4, 7], axis=1).sum(1)
    collapsed = softmax64(heads.collapse(logits, SETS[0]))[:, -1]
    unit = models.mlp([2], 4).apply(heads.reduce_output(params, SETS[0], C), inputs)
    np.testing.assert_allclose(collapsed, expected, atol=1e-6)
    assert np.abs(softmax64(unit)[:, -1] - expected).max() > 0.05
