"""Labels that are unknown, wrong or not there, and classes that soft targets name wrongly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from distill_jax import (
    logs,
    loop,
    losses,
    metrics,
    models,
    optimizers,
    soft_targets,
    step_losses,
    top_k_losses,
    train_step,
)
from distill_jax.errors import UserError
from distill_jax.specialists import heads

C, T, WEIGHT = 5, 2.0, 0.25
RANDOM = np.random.default_rng(0)
Z, V = (jnp.asarray(RANDOM.standard_normal((4, C)), jnp.float32) for _ in range(2))
P = losses.softmax(V, T)
LABELS = jnp.array([3, -1, -100, 0])
SET = {"class_set": jnp.array([0, 3, C])}
HYPER = {"temperature": jnp.float32(T), "hard_weight": jnp.float32(WEIGHT)}
MODEL, OPTIMIZER = models.mlp([6], tiny.CLASSES), optimizers.sgd(optax.constant_schedule(1.0))


def of_head(loss):
    return lambda z, labels: loss(z, {"label": labels, "teacher_logits": V}, HYPER, SET)


SOFT = (1 - WEIGHT) * losses.soft_cross_entropy(Z, P, T)
UNKNOWN = {  # what is left of a loss where the label is unknown
    "hard": (losses.hard_cross_entropy, jnp.zeros(4)),
    "distillation": (lambda z, labels: losses.distillation(z, P, labels, T, WEIGHT), SOFT),
    "top_k": (
        lambda z, labels: top_k_losses.distillation(
            z, *soft_targets.top_k(P, C), labels, temperature=T, hard_weight=WEIGHT
        ),
        None,
    ),
    "modified": (
        lambda z, labels: losses.soft_cross_entropy(z, losses.label_modified(P, labels, WEIGHT), T),
        SOFT / (1 - WEIGHT),
    ),
    "collapsed": (of_head(heads.collapsed_loss), jnp.zeros(4)),
    "full": (of_head(heads.full_softmax_loss), SOFT / (1 - WEIGHT)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_label_below_0_is_unknown_and_one_beyond_the_classes_is_loud(name):
    loss, left = UNKNOWN[name]

    @jax.jit
    def run(labels):
        values, pull_back = jax.vjp(lambda z: loss(z, labels), Z)
        return values, pull_back(jnp.ones(4))[0]

    values, slope = run(LABELS)
    all_known, known_slope = run(jnp.maximum(LABELS, 0))
    for found, expected in ((values, all_known), (slope, known_slope)):
        np.testing.assert_array_equal(found[jnp.array([0, 3])], expected[jnp.array([0, 3])])
    if left is not None:
        np.testing.assert_allclose(values[1:3], left[1:3], rtol=1e-6)
    if name in ("hard", "collapsed"):
        assert not slope[1:3].any()
    for label in (C, 2**30):
        wrong, wrong_slope = run(LABELS.at[1].set(label))
        assert np.isnan(wrong[1]) and np.isnan(wrong_slope[1]).all()
        rest = jnp.array([0, 2, 3])
        np.testing.assert_array_equal(wrong[rest], values[rest])
        np.testing.assert_array_equal(wrong_slope[rest], slope[rest])


def test_no_labels_are_unknown_labels():
    expected = losses.distillation(Z, P, jnp.full(4, -1), T, WEIGHT)
    np.testing.assert_array_equal(losses.distillation(Z, P, None, T, WEIGHT), expected)


@pytest.mark.parametrize("labels", [jnp.zeros(5, int), jnp.zeros((4, 1), int), jnp.array(0)])
def test_labels_of_another_shape(labels):
    for run in (
        lambda: losses.hard_cross_entropy(Z, labels),
        lambda: losses.label_modified(P, labels, 0.5),
        lambda: metrics.error_counts(Z, labels),
    ):
        with pytest.raises(UserError, match=r"labels is .*expected int \.\.\."):
            run()


def top_k_loss(ids, probabilities, tail, z=Z[:1]):
    fields = jnp.array([ids]), jnp.array([probabilities]), jnp.array([tail])
    return jax.value_and_grad(lambda z: top_k_losses.soft_cross_entropy(z, *fields, T)[0])(z)


def test_padding_of_top_k_targets_has_no_part_and_takes_nothing_from_the_tail():
    found = top_k_loss([0, 4, -1, -7], [0.4, 0.2, 0.0, 0.0], 0.4)
    tiny.assert_close(found, top_k_loss([0, 4], [0.4, 0.2], 0.4))
    kept = jnp.array([0, 4, -1]), jnp.array([0.4, 0.2, 0.0]), jnp.array(0.4)
    dense = soft_targets.densify(*kept, None, C)
    np.testing.assert_allclose(dense, [0.4, 0.4 / 3, 0.4 / 3, 0.4 / 3, 0.2], rtol=1e-6)


@pytest.mark.parametrize(
    ("ids", "probabilities"), [([0, C], [0.4, 0.2]), ([0, C], [0.6, 0.0]), ([0, -1], [0.4, 0.2])]
)
def test_a_class_that_does_not_exist_is_loud(ids, probabilities):
    value, slope = top_k_loss(ids, probabilities, 0.4)
    assert np.isnan(value) and np.isnan(slope).any()
    kept = jnp.array(ids), jnp.array(probabilities), jnp.array(0.4)
    assert np.isnan(soft_targets.densify(*kept, None, C)).any()


def test_errors_are_counted_among_known_labels():
    counts = metrics.error_counts(jnp.zeros((5, C)), jnp.array([3, 0, -1, -100, 2]))
    assert (counts["errors"], counts["count"]) == (2, 3)


def batch_of(**fields):
    examples = {**tiny.examples(8), "teacher_logits": tiny.teacher_logits(8), **fields}
    return {name: field for name, field in examples.items() if field is not None}


@functools.partial(jax.jit, static_argnums=0)
def one_step(loss, batch):
    state = train_step.init_state(MODEL, OPTIMIZER, jax.random.key(0), batch["inputs"])
    step = train_step.make_train_step(MODEL, OPTIMIZER, loss)
    return step(state, batch, jax.random.key(1), tiny.hyper())


FUSED = train_step.Fused(step_losses.distillation_loss, rows=3)


@pytest.mark.parametrize("loss", [step_losses.distillation_loss, FUSED], ids=["dense", "fused"])
def test_a_batch_without_labels_is_one_of_unknown_labels(loss):
    state, sums = one_step(loss, batch_of(label=None))
    expected, with_labels = one_step(loss, batch_of(label=np.full(8, -1)))
    tiny.assert_close(state, expected)
    assert set(sums) == {"loss", "examples"} and sums["examples"] == 8
    assert (with_labels["errors"], with_labels["count"]) == (0, 0)
    wiped = {"label": np.full(8, 99), "label_known": np.zeros(8, bool)}
    tiny.assert_close(one_step(loss, batch_of(**wiped)), (expected, with_labels))


def test_a_loss_of_labels_says_that_there_are_none():
    batch = batch_of(label=None)
    for loss in (step_losses.label_loss, step_losses.label_modified_loss):
        with pytest.raises(UserError, match=r"the batch has no label, only .*'inputs'"):
            one_step(loss, batch)
    with pytest.raises(UserError, match="the batch has no inputs"):
        train_step.make_eval_step(MODEL)({}, {"label": batch_of()["label"]})


def test_records_have_no_error_rate_where_no_label_is_known(capsys, tmp_path):
    sums = {
        "loss": jnp.array([[4.0, 2.0], [6.0, 6.0]]),
        "examples": jnp.array([[4, 4], [4, 4]]),
        "errors": jnp.array([[1, 0], [0, 0]]),
        "count": jnp.array([[2, 2], [0, 0]]),
    }
    state = train_step.TrainState(jnp.array([2, 2]), {}, ())

    def record(sums, **how):
        return loop.fit(lambda state, unit: (state, sums), state, 1, **how)[1][0]

    shown = [logs.print_progress("net", 1), logs.tensorboard(tmp_path)]
    found = record(sums, on_record=shown)
    assert found["train_loss"] == [0.75, 1.5] and found["train_errors"] == [0.25, None]
    assert "loss 1.1250, train errors none" in capsys.readouterr().out
    unlabelled = record({name: sums[name] for name in ("loss", "examples")})
    assert unlabelled["train_errors"] == [None, None]
