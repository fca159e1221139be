"""Teachers that tell a few log-probabilities: kept as they are, never made dense."""

import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from stores import DIGESTS, N, content

from distill_jax import losses, soft_targets, step_losses
from distill_jax.errors import UserError

C, K = 30, 4
P = np.asarray(losses.softmax(jnp.asarray(2 * np.random.default_rng(0).standard_normal((N, C)))))
CLASSES, KEPT, _ = map(np.asarray, soft_targets.top_k(jnp.asarray(P), K))
CLASSES = CLASSES.astype(np.int64)
LOGS = np.log(np.take_along_axis(P, CLASSES, axis=1).astype(np.float64))


def write(folder, classes=CLASSES, logs=LOGS, digests=DIGESTS, **options):
    more = {"teacher": "service", "num_classes": C, **options}
    soft_targets.write_top_k(folder, classes, logs, digests, **more)
    return soft_targets.load(folder)


def as_arrays(fields):
    return [jnp.asarray(field) for field in fields.values()]


@pytest.mark.parametrize("tail", ["spread", "drop"])
def test_a_loss_is_that_of_the_dense_targets(tail, tmp_path):
    store = write(tmp_path, tail=tail, shard_rows=16)
    examples = {"id": np.arange(N)[::-1]}
    joined = soft_targets.attach(examples, store, 1.0, DIGESTS[::-1])
    np.testing.assert_array_equal(joined["teacher_ids"], CLASSES[::-1])
    dense = np.full((N, C), 0.0)
    np.put_along_axis(dense, CLASSES, np.exp(LOGS), axis=1)
    rest = 1 - dense.sum(axis=1, keepdims=True)
    if tail == "drop":
        dense /= dense.sum(axis=1, keepdims=True)
    else:
        dense += np.where(dense == 0, rest / (C - K), 0)
    fields = as_arrays({name: joined[name] for name in soft_targets.TOP_K_FIELDS})
    found = soft_targets.densify(*fields, store.tail_weights[1.0], C)
    np.testing.assert_allclose(found, dense[::-1], rtol=2**-8, atol=1e-6)
    z = jnp.asarray(np.random.default_rng(1).standard_normal((N, C)), jnp.float32)
    loss = step_losses.top_k_distillation_loss(store.tail_weights[1.0])
    value = loss(z, joined, {"temperature": 1.0, "hard_weight": 0.0})
    expected = losses.soft_cross_entropy(z, jnp.asarray(dense[::-1], jnp.float32), 1.0)
    np.testing.assert_allclose(value, expected, rtol=2**-8)
    measured = soft_targets.compare.against_dense(
        jnp.asarray(dense[::-1], jnp.float32), [tuple(fields)], z, 1.0, None
    )
    assert measured["total_variation"] < 2**-9
    if tail == "spread":  # what `write` keeps of the same probabilities
        soft_targets.write(
            tmp_path / "dense",
            P,
            DIGESTS,
            teacher="t",
            encoding="top_k",
            k=K,
            probabilities=True,
            temperatures=1.0,
        )
        other = soft_targets.rows(soft_targets.load(tmp_path / "dense"), examples["id"], 1.0)
        np.testing.assert_array_equal(joined["teacher_ids"], other["teacher_ids"])
        np.testing.assert_allclose(joined["teacher_tail"], other["teacher_tail"], rtol=1e-5)


def test_arrays_of_any_program_make_the_same_store(tmp_path):
    write(tmp_path)
    before = content(tmp_path)
    for classes, logs in (
        (CLASSES.astype(np.uint16), LOGS),
        (jnp.asarray(CLASSES), jnp.asarray(LOGS, jnp.float32)),
        (CLASSES.tolist(), LOGS.tolist()),
    ):
        write(tmp_path, classes, logs)
        assert content(tmp_path) == before


def test_padding_has_no_part(tmp_path):
    classes, logs = CLASSES.copy(), LOGS.copy()
    classes[3, 2:], logs[3, 2:] = -1, -np.inf
    logs[5, 1] = -np.inf  # a class of which nothing is said
    fields = soft_targets.rows(write(tmp_path, classes, logs), [3, 5], 1.0)
    assert (fields["teacher_ids"] == -1).sum(axis=1).tolist() == [2, 1]
    rest = 1 - np.exp(logs[[3, 5]]).sum(axis=1)
    np.testing.assert_allclose(fields["teacher_tail"], rest, rtol=1e-5)
    dense = np.asarray(soft_targets.densify(*as_arrays(fields), None, C))
    np.testing.assert_allclose(dense.sum(axis=1), 1, rtol=2**-8)
    np.testing.assert_allclose(dense[1, CLASSES[5, 1]], rest[1] / (C - K + 1), rtol=1e-5)


def test_a_million_classes_are_never_dense(tmp_path):
    many = 1_000_000
    classes = np.random.default_rng(0).permutation(many)[: N * K].reshape(N, K)
    tracemalloc.start()
    store = write(tmp_path, classes, num_classes=many)
    joined = soft_targets.attach({"id": np.arange(N)}, store, 1.0, DIGESTS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < many  # a byte a class; a single row of float32 would take four
    np.testing.assert_array_equal(joined["teacher_ids"], classes)
    assert soft_targets.bytes_per_example(store) == 8 + K * (4 + 2) + 4
    assert sum(map(len, content(tmp_path).values())) < 10_000


def test_another_temperature_teacher_and_other_numbers_are_refused(tmp_path):
    store = write(tmp_path / "store", temperature=0.5)
    for temperature in (1.0, None):
        with pytest.raises(
            UserError, match=r"at temperature 0\.5 and can't be used at temperature"
        ):
            soft_targets.attach({"id": np.arange(N)}, store, temperature, DIGESTS)
    with pytest.raises(UserError, match="not the inputs that teacher service saw"):
        soft_targets.attach({"id": np.arange(N)}, store, 0.5, DIGESTS[::-1])
    before = content(tmp_path / "store")
    write(tmp_path / "store", temperature=0.5)
    assert content(tmp_path / "store") == before
    for changes, message in (
        ({"tail": "drop"}, "tail is 'spread' there and 'drop' now"),
        ({"temperature": 1.0}, r"temperatures is \[0\.5\] there and \[1\.0\] now"),
        ({"logs": LOGS - 0.01}, "made of other logits than these, by a teacher of the same name"),
    ):
        with pytest.raises(UserError, match=message):
            write(tmp_path / "store", **{"temperature": 0.5, **changes})
    write(tmp_path / "store", logs=LOGS - 0.01, overwrite=True)
    assert content(tmp_path / "store") != before


def changed(at, classes=None, logs=None):
    found = CLASSES.copy(), LOGS.copy()
    if classes is not None:
        found[0][at] = classes
    if logs is not None:
        found[1][at] = logs
    return dict(zip(("classes", "logs"), found, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            changed((7, 0), classes=C),
            "1 of 50 examples have a class of 30 or more; the first, id 7",
        ),
        (changed((7, 0), classes=-1), "have padding, a class below 0, whose log-prob"),
        (changed(7, classes=[5, 5, 6, 7]), "have a class twice; the first, id 7, has the classes"),
        (changed((7, 0), logs=np.nan), "a log-probability that is not a number"),
        (changed((7, 0), logs=0.5), "sum to more than 1: are they logarithms"),
        (changed(7, logs=-np.inf), "no class with a probability"),
        ({"logs": LOGS[:, :3]}, r"log_probabilities is float64 \(50, 3\); expected float 50 k"),
        ({"classes": CLASSES[:4]}, r"classes is int64 \(4, 4\); expected int 50 k"),
        ({"tail": "keep"}, "tail is 'keep'; allowed: 'spread' or 'drop'"),
        ({"temperature": 0.0}, r"temperature is 0\.0; allowed: above 0"),
        ({"num_classes": 2.5}, r"num_classes is 2\.5; allowed: a whole number"),
    ],
)
def test_what_is_no_distribution_is_named(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write(tmp_path / "store", **changes)
    assert not list((tmp_path / "store").glob("shards/[0-9]*"))


def test_rounding_above_1_is_no_mistake(tmp_path):
    store = write(tmp_path, **changed(slice(None), logs=np.log(0.25001)))
    fields = soft_targets.rows(store, np.arange(N), 1.0)
    assert not fields["teacher_tail"].any() and (fields["teacher_probabilities"] == 0.25).all()
