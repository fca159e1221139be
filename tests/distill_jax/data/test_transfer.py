"""Epochs, jitter and transfer sets."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from distill_jax.data import transfer
from distill_jax.data.augment import jitter
from distill_jax.epochs import make_epoch, steps_per_epoch
from distill_jax.errors import UserError
from distill_jax.train_step import TrainState

N, BATCH = 23, 5
STEPS = N // BATCH


def id_step(state, batch, key, hyper, constants):
    """Trains nothing; its metrics are what it was handed."""
    seen = {"id": batch["id"], "label": batch["label"], "key": jax.random.bits(key)}
    return state._replace(step=state.step + 1), seen


def run(key, first_step=0, passes=1):
    examples = {name: jnp.asarray(field) for name, field in tiny.examples(N).items()}
    state = TrainState(jnp.int32(first_step), {}, ())
    return jax.jit(make_epoch(id_step, BATCH, passes=passes))(state, examples, key, {})


def test_each_example_comes_at_most_once_an_epoch(key):
    state, seen = run(key)
    assert state.step == STEPS == steps_per_epoch(N, BATCH)
    ids = np.asarray(seen["id"])
    assert len(ids) == STEPS * BATCH == len(set(ids))
    assert set(ids) < set(tiny.examples(N)["id"])
    assert list(ids) != sorted(ids)
    np.testing.assert_array_equal(seen["label"], tiny.examples(N)["label"][ids - 100])


def test_the_remainder_is_another_one_every_epoch(key):
    everything = set(tiny.examples(N)["id"])
    left = [frozenset(everything - set(np.asarray(run(key, e * STEPS)[1]["id"]))) for e in range(4)]
    assert {len(ids) for ids in left} == {N % BATCH}
    assert len(set(left)) > 1


def test_order_is_a_function_of_key_and_epoch(key):
    state, both = run(key, passes=2)
    assert state.step == 2 * STEPS
    _, first = run(key)
    _, second = run(key, first_step=STEPS)  # as after a resumption
    for name in both:
        np.testing.assert_array_equal(both[name], np.concatenate([first[name], second[name]]))
    assert list(first["id"]) != list(second["id"])
    assert list(first["id"]) != list(run(jax.random.key(1))[1]["id"])


def test_batch_larger_than_the_set(key):
    assert steps_per_epoch(5, 5) == 1
    with pytest.raises(UserError, match="batch_size 6 is more than the 5 examples"):
        steps_per_epoch(5, 6)
    epoch = make_epoch(id_step, N + 1)
    state = TrainState(jnp.int32(0), {}, ())
    with pytest.raises(UserError, match="batch_size 24 is more than the 23 examples"):
        epoch(state, {"label": jnp.zeros(N, jnp.int32)}, key, {})


def shifts(before, after, pixels):
    """For each image, the one (down, right) that turns `before` into `after`."""
    padding = [(pixels, pixels)] * 2 + [(0, 0)] * (before.ndim - 3)
    side, found = before.shape[1], []
    for old, new in zip(before, after, strict=True):
        padded = np.pad(old, padding)
        fits = [
            (pixels - row, pixels - column)
            for row in range(2 * pixels + 1)
            for column in range(2 * pixels + 1)
            if np.array_equal(padded[row : row + side, column : column + side], new)
        ]
        assert len(fits) == 1
        found += fits
    return found


def move(images, pixels, key):
    batch = {"inputs": jnp.asarray(images), "label": jnp.arange(len(images))}
    moved = jax.jit(jitter(pixels))(batch, key)
    np.testing.assert_array_equal(moved["label"], batch["label"])
    assert moved["inputs"].dtype == images.dtype
    return np.asarray(moved["inputs"])


def test_jitter_moves_by_every_offset_and_fills_with_zeros(key):
    images = np.random.default_rng(0).integers(1, 256, (400, 7, 7), np.uint8)
    found = shifts(images, move(images, 2, key), 2)
    every = {(row, column) for row in range(-2, 3) for column in range(-2, 3)}
    assert set(found) == every
    # 16 expected of each, with a standard deviation of 4.
    assert max(found.count(offset) for offset in every) < 36


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_jitter_moves_all_channels_together(dtype, key):
    images = np.random.default_rng(0).integers(1, 256, (30, 6, 6, 3)).astype(dtype)
    assert len(set(shifts(images, move(images, 1, key), 1))) > 4


def test_jitter_depends_on_its_key_alone(key):
    images = tiny.examples(20)["inputs"]
    first = move(images, 1, key)
    np.testing.assert_array_equal(first, move(images, 1, jax.random.key(0)))
    assert not np.array_equal(first, move(images, 1, jax.random.key(1)))
    np.testing.assert_array_equal(images, move(images, 0, key))


def ids(examples):
    return set(examples["id"].tolist())


def with_targets(count=40):
    return {**tiny.examples(count), "teacher_logits": tiny.teacher_logits(count)}


def assert_rows_stay_together(part, whole):
    rows = np.searchsorted(whole["id"], part["id"])
    for name, field in part.items():
        np.testing.assert_array_equal(field, whole[name][rows])


def test_fractions_are_nested():
    whole = with_targets()
    shares = [0.001, 0.03, 0.1, 0.5, 0.9, 1.0]
    parts = [transfer.fraction(whole, share, seed=3) for share in shares]
    assert [len(part["id"]) for part in parts] == [1, 1, 4, 20, 36, 40]
    for smaller, larger in itertools.pairwise(parts):
        assert ids(smaller) <= ids(larger)
    for part in parts:
        assert_rows_stay_together(part, whole)
    again, other = (transfer.fraction(whole, 0.5, seed=seed) for seed in (3, 4))
    assert ids(again) == ids(parts[3]) != ids(other)


@pytest.mark.parametrize("share", [0, -0.1, 1.1])
def test_fraction_out_of_range(share):
    with pytest.raises(UserError, match=f"at most 1, not {share}"):
        transfer.fraction(tiny.examples(4), share, seed=0)


def test_classes_split_a_set():
    whole = with_targets()
    without, only = (f(whole, [0, 2]) for f in (transfer.without_classes, transfer.only_classes))
    assert set(without["label"]) == {1} and set(only["label"]) == {0, 2}
    assert ids(without) | ids(only) == ids(whole) and not ids(without) & ids(only)
    for part in (without, only):
        assert_rows_stay_together(part, whole)


@pytest.mark.parametrize(("share", "count"), [(0, 0), (0.1, 4), (0.5, 20), (1, 40)])
def test_wiped_labels_are_gone(share, count):
    whole = with_targets()
    labels = whole["label"].copy()
    partly = transfer.labels_known(whole, share, seed=1)
    known = partly["label_known"]
    assert known.dtype == bool and known.sum() == count
    assert partly["label"].dtype == np.int32
    np.testing.assert_array_equal(partly["label"], np.where(known, labels, -1))
    np.testing.assert_array_equal(whole["label"], labels)
    for name in ("id", "inputs", "teacher_logits"):
        np.testing.assert_array_equal(partly[name], whole[name])


def test_known_labels_are_nested_and_follow_the_seed():
    known = [transfer.labels_known(tiny.examples(40), s, seed=1)["label_known"] for s in (0.2, 0.5)]
    assert not (known[0] & ~known[1]).any()
    other = transfer.labels_known(tiny.examples(40), 0.5, seed=2)["label_known"]
    assert not np.array_equal(known[1], other)


def test_a_wiped_label_never_becomes_known_again():
    once = transfer.labels_known(tiny.examples(40), 0.5, seed=1)
    twice = transfer.labels_known(once, 0.5, seed=2)
    assert (twice["label"][twice["label_known"]] >= 0).all()
    assert not transfer.labels_known(transfer.labels_known(once, 0.0, seed=0), 1.0, seed=0)[
        "label_known"
    ].any()


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_known_share_out_of_range(share):
    with pytest.raises(UserError, match=rf"must be in 0\.\.1, not {share}"):
        transfer.labels_known(tiny.examples(4), share, seed=0)


def test_no_label_is_known():
    wiped = transfer.labels_known(tiny.examples(10), 0.0, seed=0)
    assert (wiped["label"] == -1).all() and not wiped["label_known"].any()


def test_hold_out_is_disjoint_and_complete():
    whole = with_targets()
    rest, held = transfer.hold_out(whole, 7, seed=0)
    assert len(held["id"]) == 7 and not ids(rest) & ids(held)
    assert ids(rest) | ids(held) == ids(whole)
    for part in (rest, held):
        assert_rows_stay_together(part, whole)
    assert ids(transfer.hold_out(whole, 7, seed=0)[1]) == ids(held)
    assert ids(transfer.hold_out(whole, 7, seed=1)[1]) != ids(held)
    rest, held = transfer.hold_out(whole, 0, seed=0)
    assert ids(rest) == ids(whole) and not ids(held)


@pytest.mark.parametrize("count", [-1, 40, 41])
def test_hold_out_of_too_many(count):
    with pytest.raises(UserError, match=f"can't hold out {count} of 40 examples"):
        transfer.hold_out(tiny.examples(40), count, seed=0)
