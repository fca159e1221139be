"""Streamed blocks of utterances: who is in them, what is drawn of them, and that they train."""

import itertools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax import loop, models, optimizers, sharding, step_losses, train_step
from distill_jax.data.stream import make_advance
from distill_jax.epochs import make_epoch
from distill_jax.errors import UserError
from experiments.speech import frames, stream

LENGTHS = np.random.default_rng(0).integers(1, 60, 60)
FIRST = np.cumsum(LENGTHS) - LENGTHS
TOTAL, LONGEST = int(LENGTHS.sum()), int(LENGTHS.max())
BLOCK, BATCH = 600, 16


class Utterances:
    """Each made when it is read; its frames say the class in their first three features."""

    def __init__(self, lengths=LENGTHS):
        self.lengths, self.readers = lengths, set()

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, number):
        self.readers.add(threading.current_thread())
        random = np.random.default_rng(number)
        count = self.lengths[number]
        states = random.integers(0, tiny.CLASSES, count).astype(np.int32)
        rows = random.integers(0, 200, (count, 40), np.uint8)
        rows[np.arange(count), states] += 50
        return {
            "frames": rows,
            "states": states,
            "teacher_ids": random.integers(0, 9, (count, 2)).astype(np.uint16),
            "teacher_tail": random.random(count, np.float32),
        }


def read(first=0, end=6, seed=3, **kwargs):
    return list(
        stream.blocks(Utterances(), LENGTHS, BLOCK, seed, first_block=first, end=end, **kwargs)
    )


def windows(examples, rows):
    return examples["frames"][examples["position"][rows, None] + np.arange(-20, 6)]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(51, 500), st.integers(0, 9)
)
def test_plans_keep_to_the_sizes(lengths, block_frames, epoch):
    try:
        sizes = stream.block_sizes(lengths, block_frames)
    except UserError:
        assert block_frames < 3 * max(lengths)  # only where blocks are small beside an utterance
        return
    planned = stream.plan(lengths, block_frames, 0, epoch)
    assert len(planned) == sizes.epoch
    assert sorted(np.concatenate(planned)) == list(range(len(lengths)))  # each in one block
    counts = [sum(lengths[i] for i in block) for block in planned]
    assert sizes.least <= min(counts) and max(counts) <= sizes.most <= block_frames
    assert max(len(block) for block in planned) <= sizes.utterances
    spread = max(lengths) * (1 - 1 / sizes.epoch)
    assert sum(lengths) / sizes.epoch - spread <= sizes.least
    if sizes.epoch > 1:  # one block fewer could be too large
        fewer = sizes.epoch - 1
        assert sum(lengths) / fewer + max(lengths) * (1 - 1 / fewer) > block_frames


def test_plan_is_a_function_of_seed_and_epoch():
    plans = [stream.plan(LENGTHS, BLOCK, *which) for which in ((3, 0), (3, 0), (3, 1), (4, 0))]
    lists = [[block.tolist() for block in plan] for plan in plans]
    assert lists[0] == lists[1]
    assert lists[0] != lists[2] and lists[0] != lists[3] and lists[2] != lists[3]


def test_a_set_that_fits_is_one_block():
    assert stream.block_sizes(LENGTHS, TOTAL) == (1, TOTAL, TOTAL, len(LENGTHS))
    assert stream.block_sizes(LENGTHS, TOTAL - 1).epoch == 2
    assert stream.block_sizes([7], 7) == (1, 7, 7, 1)


def test_blocks_are_packed_and_filled_up():
    source, sizes = Utterances(), stream.block_sizes(LENGTHS, BLOCK)
    found = read(end=2 * sizes.epoch)
    shapes = [{name: (field.shape, field.dtype) for name, field in b.items()} for b in found]
    assert all(shape == shapes[0] for shape in shapes)
    assert shapes[0]["frames"] == ((sizes.most + 25 * sizes.utterances, 40), np.uint8)
    assert shapes[0]["teacher_ids"] == ((sizes.most, 2), np.uint16)
    for number, block in enumerate(found):
        chosen = stream.plan(LENGTHS, BLOCK, 3, number // sizes.epoch)[number % sizes.epoch]
        items = [source[i] for i in chosen]
        count = block.pop("count")
        assert count == LENGTHS[chosen].sum() >= sizes.least
        fields = {
            "label": np.concatenate([item["states"] for item in items]),
            "id": np.concatenate([np.arange(FIRST[i], FIRST[i] + LENGTHS[i]) for i in chosen]),
            "utterance": np.repeat(chosen, LENGTHS[chosen]),
            "teacher_ids": np.concatenate([item["teacher_ids"] for item in items]),
            "teacher_tail": np.concatenate([item["teacher_tail"] for item in items]),
        }
        for name, field in fields.items():
            np.testing.assert_array_equal(block[name][:count], field)
        resident = frames.pack(*([item[name] for item in items] for name in ("frames", "states")))
        np.testing.assert_array_equal(
            windows(block, slice(0, count)), windows(resident, slice(None))
        )
        for name in ("id", "label", "utterance"):
            assert (block[name][count:] == -1).all()


def test_every_frame_comes_once_an_epoch():
    epoch = stream.block_sizes(LENGTHS, BLOCK).epoch
    for first in (0, epoch):
        ids = np.concatenate([b["id"][: b["count"]] for b in read(first, first + epoch)])
        np.testing.assert_array_equal(np.sort(ids), np.arange(TOTAL))


@pytest.mark.parametrize("first", [1, 4, 5, 13])
def test_a_resumed_run_reads_the_same_blocks(first):
    for found, expected in zip(read(first, 15), read(0, 15)[first:], strict=True):
        tiny.assert_equal(found, expected)


def test_threads_read_the_same_blocks():
    plain = read(end=9, read_threads=0, prefetch=0)
    for threads, prefetch in ((1, 1), (3, 5)):
        tiny.assert_equal(read(end=9, read_threads=threads, prefetch=prefetch), plain)


def test_blocks_are_read_ahead_in_threads():
    source = Utterances()
    iterator = stream.blocks(source, LENGTHS, BLOCK, 0, read_threads=2, prefetch=3)
    assert not source.readers  # nothing until the first is asked for
    next(iterator)
    main = threading.current_thread()
    assert source.readers and main not in source.readers
    readers = list(source.readers)
    del iterator  # and the threads end with it
    deadline = time.monotonic() + 10
    while any(thread.is_alive() for thread in readers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    plain = Utterances()
    next(stream.blocks(plain, LENGTHS, BLOCK, 0, read_threads=0, prefetch=0))
    assert plain.readers == {main}


def id_step(state, batch, key, hyper, constants):
    """Trains nothing; its metrics are what it was handed."""
    seen = {name: batch[name] for name in ("id", "inputs", "label", "teacher_tail")}
    return state._replace(step=state.step + 1), seen


STEPS = stream.steps_per_block(LENGTHS, BLOCK, BATCH)
DRAW = jax.jit(stream.make_block_epoch(id_step, BATCH, STEPS))


def draw(block, key, number=0):
    state = train_step.TrainState(jnp.int32(number * STEPS), {}, ())
    state, seen = DRAW(state, block, key, {})
    assert state.step == (number + 1) * STEPS
    return {name: np.asarray(field).reshape(-1, *field.shape[2:]) for name, field in seen.items()}


def test_what_is_drawn_of_an_epoch(key):
    epoch = stream.block_sizes(LENGTHS, BLOCK).epoch
    seen_of, left = [], []
    for number, block in enumerate(read(end=2 * epoch)):
        seen = draw(block, key, number)
        own = block["id"][: block["count"]]
        assert (seen["id"] >= 0).all() and set(seen["id"]) <= set(own)  # never the filling
        assert len(set(seen["id"])) == len(seen["id"]) == STEPS * BATCH  # each at most once
        assert block["count"] - len(seen["id"]) < 2 * LONGEST + BATCH
        places = {case: row for row, case in enumerate(own)}
        rows = [places[case] for case in seen["id"]]
        np.testing.assert_array_equal(seen["label"], block["label"][rows])
        np.testing.assert_array_equal(seen["teacher_tail"], block["teacher_tail"][rows])
        np.testing.assert_array_equal(seen["inputs"], windows(block, rows))
        seen_of.append(seen["id"])
    for ids in (np.concatenate(seen_of[:epoch]), np.concatenate(seen_of[epoch:])):
        assert len(set(ids)) == len(ids) > TOTAL - epoch * (LONGEST + BATCH)
        left.append(set(range(TOTAL)) - set(ids))
    assert left[0] != left[1]


def test_order_within_a_block(key):
    block = read(end=1)[0]
    first, again = draw(block, key)["id"], draw(block, key)["id"]
    assert list(first) == list(again)
    assert list(first) != list(draw(block, key, number=1)["id"])
    assert list(first) != list(draw(block, jax.random.key(1))["id"])
    owner = np.searchsorted(FIRST, first, side="right")
    assert len(set(owner)) > 10  # and about 8 different ones expected in a batch of 16
    assert np.mean([len(set(batch)) for batch in owner.reshape(-1, BATCH)]) > 7


@pytest.mark.parametrize("count", [1, 37, 50])
def test_the_filling_comes_last(count, key):
    orders = jax.vmap(lambda key: stream._order(key, 50, jnp.int32(count)))(
        jax.random.split(key, 200)
    )
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(50), (200, 1)))
    assert (np.asarray(orders)[:, :count] < count).all()
    if count > 1:  # every case comes first about as often as any other
        firsts = np.bincount(np.asarray(orders)[:, 0], minlength=count)
        assert firsts.max() < 10 + 3 * 200 / count


MODEL = models.mlp([], tiny.CLASSES)
OPTIMIZER = optimizers.sgd(optax.constant_schedule(1.0))
STEP = train_step.make_train_step(MODEL, OPTIMIZER, step_losses.label_loss)
RATE = 0.02


def init(key):
    return train_step.init_state(MODEL, OPTIMIZER, key, jnp.zeros((1, 26, 40), jnp.uint8))


def resident(numbers):
    items = [Utterances()[i] for i in numbers]
    return frames.pack(*([item[name] for item in items] for name in ("frames", "states")))


def error_rate(params):
    examples = resident(range(60))
    predicted = frames.logits_over_windows(
        MODEL.apply, params, examples, np.arange(len(examples["label"]))
    ).argmax(axis=-1)
    return np.mean(predicted != examples["label"])


def train_streamed(units, first=0, states=None, members=1, opened=None):
    mesh = sharding.make_mesh(members, -1)
    keys = jax.random.split(jax.random.key(7), members)
    block = read(end=1)[0]
    per_member = {name: False for name in block}
    run = stream.make_block_epoch(STEP, BATCH, STEPS, sharding.shard_batch(mesh, BATCH))

    def open_blocks(first):
        if opened is not None:
            opened.append(first)
        return stream.blocks(Utterances(), LENGTHS, BLOCK, 3, first_block=first)

    hyper = {"learning_rate": jnp.full(members, RATE)}
    compiled = sharding.compile_epoch(run, mesh, per_member)
    advance = make_advance(
        lambda states, block: compiled(states, block, keys, hyper, {}),
        open_blocks,
        lambda block: sharding.put_examples(block, mesh, per_member),
    )
    states = sharding.init_members(init, keys, mesh) if states is None else states
    if first:
        for unit in range(first, units):
            states, metrics = advance(states, unit)
        return states, metrics
    return loop.fit(advance, states, units)


def test_streamed_training_is_as_good_as_resident():
    epochs, per_epoch = 12, stream.block_sizes(LENGTHS, BLOCK).epoch
    states, records = train_streamed(epochs * per_epoch)
    assert records[-1]["step"] == [epochs * per_epoch * STEPS]
    streamed = error_rate(jax.tree.map(lambda leaf: leaf[0], jax.device_get(states.params)))
    key = jax.random.split(jax.random.key(7), 1)[0]
    state = init(key)
    examples = {name: jnp.asarray(field) for name, field in resident(range(60)).items()}
    run = jax.jit(make_epoch(STEP, BATCH, passes=epochs, gather=frames.gather_windows))
    state, _ = run(state, examples, key, {"learning_rate": jnp.float32(RATE)})
    whole = error_rate(state.params)
    untrained = error_rate(init(key).params)
    assert untrained > 0.5 and whole < 0.25 and abs(streamed - whole) < 0.08


def test_a_resumed_run_is_the_uninterrupted_one():
    whole, records = train_streamed(7, members=2)
    assert np.shape(records[-1]["train_loss"]) == (2,)
    part, _ = train_streamed(4, members=2)
    opened = []
    resumed, _ = train_streamed(7, first=4, states=part, members=2, opened=opened)
    assert opened == [4]  # once, not for every unit
    tiny.assert_equal(jax.device_get(resumed), jax.device_get(whole))


def test_a_unit_out_of_turn_is_read_anew():
    opened, trained = [], []

    def open_blocks(first):
        opened.append(first)
        return ({"count": number} for number in itertools.count(first))

    advance = make_advance(
        lambda state, block: (state, trained.append(block["count"])),
        open_blocks,
        lambda block: block,
    )
    for unit in (0, 1, 2, 1, 2, 5):
        advance(None, unit)
    assert trained == [0, 1, 2, 1, 2, 5] and opened == [0, 1, 5]


@pytest.mark.parametrize(
    ("lengths", "block_frames", "message"),
    [
        ([], 9, "nothing to stream: no utterances"),
        ([4, 0, 3], 9, "nothing to stream: utterance 1 has no frames"),
        ([2**30, 2**30], 9, "2147483648 frames are more than ids of 32 bits can name: 2147483647"),
        ([4, 9, 8], 9, "block_frames is 9, but utterance 1 alone has 9 frames: set it to many"),
        ([4, 9, 8], 10, "block_frames is 10, but utterance 1 alone has 9 frames"),
    ],
)
def test_what_can_not_be_cut(lengths, block_frames, message):
    with pytest.raises(UserError, match=message):
        stream.block_sizes(lengths, block_frames)


def test_blocks_smaller_than_a_batch():
    least = stream.block_sizes(LENGTHS, BLOCK).least
    assert stream.steps_per_block(LENGTHS, BLOCK, least) == 1
    with pytest.raises(
        UserError, match=rf"600 frames .* only {least}, less than one batch of {least + 1}"
    ):
        stream.steps_per_block(LENGTHS, BLOCK, least + 1)


class Changed(Utterances):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def __getitem__(self, number):
        item = super().__getitem__(number)
        return self.change(item) if number == 8 else item


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda item: {name: field[1:] for name, field in item.items()},
            f"utterance 8 has {LENGTHS[8] - 1} frames, but the lengths say {LENGTHS[8]}",
        ),
        (lambda item: {**item, "states": item["states"][1:]}, "utterance 8: .* of states"),
        (
            lambda item: {name: item[name] for name in ("frames", "states", "teacher_tail")},
            r"utterance 8 has the fields \['frames', 'states', 'teacher_tail'\], expected",
        ),
    ],
)
def test_utterances_that_are_not_as_said(change, message):
    epoch = stream.block_sizes(LENGTHS, BLOCK).epoch
    with pytest.raises(UserError, match=message):
        list(stream.blocks(Changed(change), LENGTHS, BLOCK, 0, end=epoch))


def test_arguments_of_blocks():
    with pytest.raises(UserError, match="59 lengths for a source of 60 utterances"):
        stream.blocks(Utterances(), LENGTHS[1:], BLOCK, 0)
    for threads, prefetch in ((3, 2), (0, 1), (1, 0)):
        with pytest.raises(UserError, match=f"prefetch is {prefetch} and read_threads {threads}"):
            stream.blocks(Utterances(), LENGTHS, BLOCK, 0, read_threads=threads, prefetch=prefetch)
