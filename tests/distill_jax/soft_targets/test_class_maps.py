"""Teachers with other classes than the student's, and members that count differently."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stores import DIGESTS, N

from distill_jax import losses, soft_targets, step_losses
from distill_jax.errors import UserError

# The teacher has 5 classes. The student has 4: the teacher's 3 and 0, one of its own, and the 4.
MAP, SHARED, LACKING = [3, 0, -1, 4], [0, 1, 3], 2
HYPER = {"temperature": 2.0, "hard_weight": 0.25}


def logits_of(count, classes, seed=0):
    return 3 * np.random.default_rng(seed).standard_normal((count, classes)).astype(np.float32)


def test_soft_targets_of_shared_classes_are_renormalised():
    teacher = logits_of(6, 5)
    for temperature in (1.0, 4.0):
        p = np.asarray(losses.softmax(jnp.asarray(teacher), temperature), np.float64)[:, [3, 0, 4]]
        mapped = soft_targets.map_classes(jnp.asarray(teacher), MAP)
        found = losses.softmax(mapped, temperature)
        np.testing.assert_allclose(found[:, SHARED], p / p.sum(1, keepdims=True), rtol=1e-5)
        assert not found[:, LACKING].any()


@pytest.mark.parametrize("loss", [step_losses.shared_classes_loss, step_losses.reverse_kl_loss])
def test_a_class_that_the_teacher_lacks_is_left_out_exactly(loss):
    student, teacher = jnp.asarray(logits_of(6, 4, 1)), jnp.asarray(logits_of(6, 5))
    mapped = soft_targets.map_classes(teacher, MAP)

    def soft(z, v):
        batch = {"teacher_logits": v}
        return jax.value_and_grad(lambda z: jnp.sum(loss(z, batch, HYPER)))(z)

    columns = jnp.asarray(SHARED)
    (value, slope), (expected, slope_of_subset) = (
        soft(student, mapped),
        soft(student[:, columns], mapped[:, columns]),
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(slope[:, columns], slope_of_subset, rtol=1e-5, atol=1e-6)
    assert not slope[:, LACKING].any()
    labels = jnp.full(6, LACKING)
    with_labels = loss(student, {"teacher_logits": mapped, "label": labels}, HYPER)
    hard = losses.hard_cross_entropy(student, labels)
    np.testing.assert_allclose(jnp.sum(with_labels), value + 0.25 * jnp.sum(hard), rtol=1e-5)


def test_a_student_told_of_it_is_pushed_away_from_that_class():
    student, teacher = jnp.asarray(logits_of(6, 4, 1)), jnp.asarray(logits_of(6, 5))
    batch = {"teacher_logits": soft_targets.map_classes(teacher, MAP)}
    slope = jax.grad(lambda z: jnp.sum(step_losses.distillation_loss(z, batch, HYPER)))(student)
    assert (slope[:, LACKING] > 0).all()


def test_class_maps_of_any_dtype():
    teacher, expected = jnp.asarray(logits_of(2, 5)), [[3, 0, 4]] * 2
    for class_map in (np.uint8([3, 0, 4]), jnp.array([3, 0, 4]), (3, 0, 4)):
        found = soft_targets.map_classes(teacher, class_map)
        np.testing.assert_array_equal(
            found, np.take_along_axis(np.asarray(teacher), np.array(expected), 1)
        )


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        ([0, 0], "the teacher's class 0 for several"),
        ([0, 5], "has a class 5; the teacher has 5"),
        ([-1, -1], "no class that the teacher and the student share"),
        ([[0, 1]], r"class_map is int64 \(1, 2\); expected whole numbers \[S\]"),
        ([0.5], "expected whole numbers"),
    ],
)
def test_class_maps_that_are_none(class_map, message):
    with pytest.raises(UserError, match=message):
        soft_targets.map_classes(jnp.zeros((2, 5)), class_map)


def test_stores_of_mapped_classes(tmp_path):
    logits = [logits_of(N, 5, seed) for seed in (0, 1)]
    mapped = [soft_targets.map_classes(jnp.asarray(one), MAP) for one in logits]
    ids = np.arange(N)

    def stored(name, source, **how):
        soft_targets.write(tmp_path / name, source, DIGESTS, teacher="t", class_map=MAP, **how)
        return soft_targets.load(tmp_path / name, num_classes=4)

    store = stored("one", logits[0])
    np.testing.assert_array_equal(soft_targets.rows(store, ids)["teacher_logits"], mapped[0])
    assert store.meta["class_map"] == MAP
    for mean in ("arithmetic", "geometric"):
        at = {"temperatures": 2.0} if mean == "arithmetic" else {}
        store = stored(mean, logits, mean=mean, **at)
        found = soft_targets.rows(store, ids, 2.0)["teacher_logits"]
        expected = soft_targets.mean_probs(jnp.stack(mapped), 2.0, mean)
        np.testing.assert_allclose(losses.softmax(jnp.asarray(found), 2.0), expected, rtol=1e-5)
    kept = {"encoding": "top_k", "k": 2, "temperatures": 2.0}
    store = stored("top_k", lambda rows: logits[0][rows], num_classes=5, **kept)
    found = soft_targets.rows(store, ids, 2.0)
    p = losses.softmax(mapped[0], 2.0)
    np.testing.assert_array_equal(found["teacher_ids"], soft_targets.top_k(p, 2)[0])
    assert store.tail_weights[2.0][LACKING] == 0
    with pytest.raises(UserError, match=r"class_map is \[3, 0, -1, 4\] there and \[0, 1\] now"):
        soft_targets.write(
            tmp_path / "one", logits[0], DIGESTS, teacher="t", class_map=[0, 1], num_classes=5
        )
    with pytest.raises(UserError, match="class_map is for logits"):
        stored("p", losses.softmax(jnp.asarray(logits[0])), probabilities=True, temperatures=1.0)


@pytest.mark.parametrize("weights", [[3, 1], np.random.default_rng(2).random((N, 2))])
def test_stores_of_weighted_members(weights, tmp_path):
    logits = np.stack([logits_of(N, 4, seed) for seed in (0, 1)])
    for mean, encoding in (
        ("arithmetic", "dense"),
        ("geometric", "dense"),
        ("arithmetic", "top_k"),
    ):
        folder, how = tmp_path / f"{mean}_{encoding}", {"mean": mean, "weights": weights}
        if (mean, encoding) != ("geometric", "dense"):
            how["temperatures"] = 2.0
        if encoding == "top_k":
            how |= {"encoding": encoding, "k": 4}
        source = list(logits) if mean == "geometric" else lambda rows: logits[:, rows]
        more = {} if mean == "geometric" else {"num_classes": 4}
        soft_targets.write(folder, source, DIGESTS, teacher="t", batch_size=7, **how, **more)
        store = soft_targets.load(folder)
        given = jnp.asarray(weights, jnp.float32)
        expected = soft_targets.mean_probs(jnp.asarray(logits), 2.0, mean, given)
        found = soft_targets.rows(store, np.arange(N), 2.0)
        if encoding == "dense":
            p = losses.softmax(jnp.asarray(found["teacher_logits"]), 2.0)
            np.testing.assert_allclose(p, expected, rtol=1e-5, atol=1e-7)
        else:
            p = soft_targets.densify(*map(jnp.asarray, found.values()), None, 4)
            np.testing.assert_allclose(p, expected, rtol=2**-8, atol=1e-6)
        with pytest.raises(UserError, match=r"weights is .* there and None now"):
            soft_targets.write(
                folder, source, DIGESTS, teacher="t", **{**how, "weights": None}, **more
            )
    for wrong, message in (
        ([1, 2, 3], r"weights are int\d+ \(3,\)"),
        ([0, 0], "sum of an example"),
    ):
        with pytest.raises(UserError, match=message):
            soft_targets.write(
                tmp_path / "x", list(logits), DIGESTS, teacher="t", mean="geometric", weights=wrong
            )
    with pytest.raises(UserError, match="give its mean too"):
        soft_targets.write(tmp_path / "x", logits[0], DIGESTS, teacher="t", weights=[1, 2])
