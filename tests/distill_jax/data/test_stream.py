"""Streamed sets of records: which examples a block holds, on which process; and that they train."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow_datasets as tfds
import tiny
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import write_folders
from tfds_sets import grey, prepare_tiny

from distill_jax import models, optimizers, sharding, step_losses, train_step
from distill_jax.data import images, records, stream
from distill_jax.data.records import Records
from distill_jax.errors import UserError

SIZE, BATCH, BLOCK, SEED = 100, 8, 40, 3
STEPS, BLOCKS = 4, 3
SET = tiny.examples(SIZE)


def write_files(folder, sizes=(40, 0, 25, 35)):
    """ArrayRecord files of the tiny set: 16 bytes of an image, and one of its label."""
    paths, row = [], 0
    for number, size in enumerate(sizes):
        paths.append(folder / f"{number}.array_record")
        writer = ArrayRecordWriter(str(paths[-1]), "group_size:1")
        for image, label in zip(SET["inputs"][row:][:size], SET["label"][row:], strict=False):
            writer.write(image.tobytes() + bytes([label]))
        writer.close()
        row += size
    return paths


def parse(record):
    return {
        "inputs": np.frombuffer(record[:16], np.uint8).reshape(4, 4),
        "label": np.int32(record[16]),
    }


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def files(paths):
    return records.from_files(paths, parse, tiny.CLASSES)


def test_reading_by_number(files):
    assert files.size == SIZE
    numbers = np.random.default_rng(0).permutation(SIZE)
    read = files.read(numbers)
    expected = {name: field[numbers] for name, field in SET.items()}
    tiny.assert_equal(read, {**expected, "id": numbers})
    assert {name: field.dtype for name, field in read.items()} == {
        name: field.dtype for name, field in SET.items()
    }
    many = np.repeat(numbers, 3)  # more than are read together
    np.testing.assert_array_equal(files.read(many)["inputs"], SET["inputs"][many])
    assert files.read(numbers[:0])["inputs"].shape == (0, 4, 4)


def test_a_part_keeps_its_ids(files):
    part = records.select(files, np.array([7, 90, 3]))
    assert part.size == 3 and part.read(np.array([2, 0])).pop("id").tolist() == [3, 7]


def places(size):
    return np.arange(size)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 10**6))
def test_an_order_is_a_permutation(size, seed, epoch):
    order = stream.order(size, seed, epoch, places(size))
    assert sorted(order.tolist()) == list(range(size))


def test_order_is_a_function_of_seed_and_epoch():
    orders = {
        (seed, epoch): stream.order(1000, seed, epoch, places(1000)).tolist()
        for seed in (0, 1, 2)
        for epoch in (0, 1, 2)
    }
    assert len(set(map(tuple, orders.values()))) == 9
    for (seed, epoch), whole in orders.items():
        some = np.array([999, 0, 17])
        assert stream.order(1000, seed, epoch, some).tolist() == [whole[place] for place in some]


def test_orders_are_mixed_and_need_no_list():
    whole = stream.order(10_000, 0, 0, places(10_000))
    assert abs(np.corrcoef(whole[:-1], whole[1:])[0, 1]) < 0.04  # four standard deviations
    assert abs(np.corrcoef(whole, places(10_000))[0, 1]) < 0.04
    large = stream.order(2**31 - 1, 0, 0, places(1000))
    assert len(set(large.tolist())) == 1000 and large.min() >= 0 and large.max() < 2**31 - 1
    assert np.quantile(large, [0.25, 0.75]) == pytest.approx(
        [2**29, 3 * 2**29], abs=2**31 * 4 * np.sqrt(0.25 * 0.75 / 1000)
    )


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 3000))
def test_how_an_epoch_is_cut(size, batch_size, block_examples):
    epoch, most = size // batch_size, block_examples // batch_size
    if not epoch or not most:
        with pytest.raises(UserError, match="batch"):
            stream.cut(size, batch_size, block_examples)
        return
    steps, blocks = stream.cut(size, batch_size, block_examples)
    assert min(most, epoch) / 2 < steps <= most and steps * blocks <= epoch
    left = epoch - steps * blocks
    assert left == min(
        epoch % other for other in range(min(most, epoch) // 2 + 1, min(most, epoch) + 1)
    )


def test_messages_of_cut():
    with pytest.raises(
        UserError, match="block_examples is 31, less than one batch of 32: set it to"
    ):
        stream.cut(100, 32, 31)
    with pytest.raises(UserError, match="batch_size 101 is more than the 100 examples"):
        stream.cut(100, 101, 1000)


def read(source, first=0, end=2 * BLOCKS, rows=None, **kwargs):
    rows = np.arange(BATCH) if rows is None else rows
    return list(
        stream.blocks(source, BATCH, BLOCK, SEED, rows, first_block=first, end=end, **kwargs)
    )


def test_batches_take_the_places_of_the_order_in_turn(files):
    assert stream.cut(SIZE, BATCH, BLOCK) == (STEPS, BLOCKS)
    left = []
    for epoch in (0, 1):
        order = stream.order(SIZE, SEED, epoch, places(SIZE))
        found = read(files, epoch * BLOCKS, (epoch + 1) * BLOCKS)
        ids = np.concatenate([block["id"] for block in found])
        assert ids.shape == (STEPS * BLOCKS, BATCH)
        np.testing.assert_array_equal(ids.ravel(), order[: ids.size])
        left.append(set(order[ids.size :].tolist()))
        for block in found:
            assert block["inputs"].shape == (STEPS, BATCH, 4, 4)
            np.testing.assert_array_equal(block["inputs"], SET["inputs"][block["id"]])
            np.testing.assert_array_equal(block["label"], SET["label"][block["id"]])
    assert left[0] != left[1] and len(left[0]) == SIZE % BATCH


@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_read_their_own_rows_alone(files, count):
    seen = []

    def counted(numbers):
        seen.append(len(numbers))
        return files.read(numbers)

    parts = np.split(np.arange(BATCH), count)
    found = [read(Records(SIZE, counted), end=4, rows=rows) for rows in parts]
    for number, whole in enumerate(read(files, end=4)):
        joined = {
            name: np.concatenate([process[number][name] for process in found], axis=1)
            for name in whole
        }
        tiny.assert_equal(joined, whole)
    # What is read ahead of the last block counts too, and nothing else.
    assert set(seen) == {STEPS * BATCH // count} and len(seen) == 4 * count


@pytest.mark.parametrize("stopped", [1, 2, 4])
def test_a_resumed_epoch_sees_each_example_once(files, stopped):
    """Stopped after some blocks as one process, and resumed as two."""
    before = read(files, 0, stopped)
    after = [read(files, stopped, 2 * BLOCKS, rows) for rows in np.split(np.arange(BATCH), 2)]
    blocks = [block["id"] for block in before] + [
        np.concatenate([one["id"], other["id"]], axis=1) for one, other in zip(*after, strict=True)
    ]
    for epoch in (blocks[:BLOCKS], blocks[BLOCKS:]):
        ids = np.concatenate(epoch).ravel().tolist()
        assert len(set(ids)) == len(ids) == STEPS * BLOCKS * BATCH
    for block, whole in zip(blocks, read(files), strict=True):
        np.testing.assert_array_equal(block, whole["id"])


def test_threads_read_the_same_blocks(files):
    tiny.assert_equal(read(files), read(files, read_threads=0, prefetch=0))


MODEL = models.mlp([6], tiny.CLASSES, hidden_dropout=0.2)
OPTIMIZER = optimizers.sgd(optax.constant_schedule(1.0))


def logits_of(members):
    return np.stack([tiny.teacher_logits(SIZE, seed) for seed in range(members)])


def train(files, member, data, units=5, members=2):
    """Members distilled each from a teacher of its own, for some blocks on a mesh."""
    mesh = sharding.make_mesh(member, data)
    step = train_step.make_train_step(MODEL, OPTIMIZER, step_losses.distillation_loss)
    shard = sharding.shard_batch(mesh, BATCH)
    own = {"id": False, "inputs": False, "label": False, "teacher_logits": True}
    targets = logits_of(members)

    def put(block):
        logits = {"teacher_logits": targets[:, block["id"]]}
        return sharding.put_rows(block, mesh, 1) | sharding.put_rows(logits, mesh, 2)

    keys = jax.random.split(jax.random.key(0), members)
    rows = sharding.own_rows(mesh, BATCH)
    hyper = {name: jnp.full(members, value) for name, value in tiny.hyper().items()}
    run = sharding.compile_epoch(stream.make_block_epoch(step, shard), mesh, own)
    advance = stream.make_advance(
        lambda states, block: run(states, block, keys, hyper, {}),
        lambda first: stream.blocks(files, BATCH, BLOCK, SEED, rows, first_block=first),
        put,
    )
    images = jnp.zeros((1, 4, 4), jnp.uint8)
    states = sharding.init_members(
        lambda key: train_step.init_state(MODEL, OPTIMIZER, key, images), keys, mesh
    )
    for unit in range(units):
        states, metrics = advance(states, unit)
    assert metrics["loss"].shape == (members, STEPS)
    return jax.device_get(states)


@pytest.fixture(scope="module")
def trained(files):
    return train(files, 2, 4)


def test_a_block_trains_as_its_batches_do(files, trained):
    step = jax.jit(train_step.make_train_step(MODEL, OPTIMIZER, step_losses.distillation_loss))
    keys = jax.random.split(jax.random.key(0), 2)
    for member, key in enumerate(keys):
        state = train_step.init_state(MODEL, OPTIMIZER, key, jnp.zeros((1, 4, 4), jnp.uint8))
        for block in read(files, end=5):
            for ids in block["id"]:
                batch = {name: jnp.asarray(field[ids]) for name, field in SET.items()}
                batch["teacher_logits"] = jnp.asarray(logits_of(2)[member, ids])
                state, _ = step(state, batch, key, tiny.hyper())
        tiny.assert_close(
            jax.tree.map(lambda leaf, m=member: leaf[m], trained), jax.device_get(state)
        )


def test_meshes_train_alike(files, trained):
    tiny.assert_close(train(files, 1, 8), trained)


def test_the_blocks_of_a_folder_of_images(tmp_path):
    """Read by several processes, and by one that was stopped, they are those of the set in memory."""
    source = write_folders(tmp_path, (SET["inputs"], SET["label"]), (SET["inputs"], SET["label"]))
    whole, folder = images.load(source).train, images.open_set(source).train
    blocks = read(folder, end=4)
    for block in blocks:
        tiny.assert_equal(block, {name: field[block["id"]] for name, field in whole.items()})
    tiny.assert_equal(read(folder, 2, 4), blocks[2:])
    halves = [read(folder, 3, 4, rows)[0] for rows in np.split(np.arange(BATCH), 2)]
    joined = {name: np.concatenate([half[name] for half in halves], axis=1) for name in whole}
    tiny.assert_equal(joined, blocks[3])


class TestDamage:
    """Each message names the file."""

    def message(self, source, numbers=None):
        with pytest.raises(UserError) as caught:
            source.read(places(SIZE) if numbers is None else numbers)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def damage(self, path, number):
        content = bytearray(path.read_bytes())
        content[content.index(SET["inputs"][number].tobytes())] ^= 0xFF
        path.write_bytes(content)

    def test_a_damaged_record(self, tmp_path):
        paths = write_files(tmp_path)
        self.damage(paths[2], 50)
        source = records.from_files(paths, parse, tiny.CLASSES, "digits")
        expected = f"digits: record 50, in {paths[2]}, can't be read (Corrupted"
        assert self.message(source).startswith(expected)
        source.read(np.delete(places(SIZE), 50))  # all others can be read
        with pytest.raises(UserError, match=f"record 50, in {paths[2]}"):  # through threads
            read(source)

    def test_a_damaged_first_record_is_noticed_at_once(self, tmp_path):
        paths = write_files(tmp_path)
        self.damage(paths[0], 0)
        with pytest.raises(UserError, match=f"record 0, in {paths[0]}, can't be read"):
            records.from_files(paths, parse, tiny.CLASSES)

    def test_a_missing_file(self, tmp_path):
        paths = write_files(tmp_path)
        paths[2].unlink()
        with pytest.raises(UserError, match=f"{paths[2]} is no readable .*No such file"):
            records.from_files(paths, parse, tiny.CLASSES)

    @pytest.mark.parametrize("content", [b"", b"text\n" * 20_000])
    def test_another_file(self, tmp_path, content):
        paths = write_files(tmp_path)
        paths[3].write_bytes(content)
        with pytest.raises(UserError, match=f"{paths[3]} is no readable ArrayRecord file"):
            records.from_files(paths, parse, tiny.CLASSES)

    @pytest.mark.parametrize("sizes", [(), (0,)])
    def test_no_records(self, tmp_path, sizes):
        with pytest.raises(UserError, match=f"digits: no records in {len(sizes)} files"):
            records.from_files(write_files(tmp_path, sizes), parse, tiny.CLASSES, "digits")

    def test_a_parser_that_fails(self, paths):
        def fails(record):
            if record[:16] == SET["inputs"][41].tobytes():
                raise KeyError("no such key")
            return parse(record)

        source = records.from_files(paths, fails, tiny.CLASSES, "digits")
        assert self.message(source) == (
            f"digits: record 41, in {paths[2]}, is damaged ('no such key')"
        )

    def test_records_that_are_not_alike(self, paths):
        def grows(record):
            wide = record[:16] == SET["inputs"][99].tobytes()
            return {"inputs": np.zeros((4, 4 + wide), np.uint8), "label": np.int32(0)}

        message = self.message(records.from_files(paths, grows, tiny.CLASSES, "digits"))
        assert message.startswith(
            f"digits: record 99, in {paths[3]}, has inputs uint8 [4, 5], label int32 [], id int32 [], "
            "but record 0 has inputs uint8 [4, 4], "
        )

    def test_labels_outside(self, paths):
        source = records.from_files(paths, parse, 2, "digits")
        first = int(np.argmax(SET["label"] == 2))
        assert f"labels are outside 0..1, the first is 2 at id {first}" in self.message(source)


class TestTfds:
    IMAGES = np.random.default_rng(5).integers(0, 256, (60, 6, 6), np.uint8)

    def prepare(self, folder, images=IMAGES):
        labels = [number % 3 for number in range(len(images))]
        return prepare_tiny(folder, {"train": (images, labels), "test": (images[:6], labels[:6])})

    @pytest.mark.parametrize("side", [0, 3])
    def test_the_records_are_those_of_the_resident_set(self, tmp_path, side):
        self.prepare(tmp_path)
        whole = images.load("tfds:tiny", str(tmp_path), side)
        opened = images.open_set("tfds:tiny", str(tmp_path), side)
        source = opened.train
        assert (source.size, opened.num_classes) == (60, whole.num_classes)
        numbers = np.random.default_rng(0).permutation(60)
        found = source.read(numbers)
        assert found["inputs"].dtype == np.uint8 and found["id"].dtype == np.int32
        tiny.assert_equal(found, {name: field[numbers] for name, field in whole.train.items()})
        tiny.assert_equal(records.read_all(opened.test), whole.test)

    def test_colour_images_of_many_sizes(self, tmp_path):
        pictures = [np.full((side, 2 * side, 3), side, np.uint8) for side in (4, 7, 12)]
        data = (pictures, [0, 1, 2])
        feature = tfds.features.Image(shape=(None, None, 3))
        prepare_tiny(tmp_path, {"train": data, "test": data}, image_feature=feature)
        found = images.open_set("tfds:tiny", str(tmp_path), 5).train.read(places(3))
        assert found["inputs"].shape == (3, 5, 5, 3)
        assert found["inputs"][:, 2, 2, 1].tolist() == np.array([4, 7, 12])[found["label"]].tolist()
        with pytest.raises(UserError, match=r"tiny, train: record \d, in .*data\.side"):
            images.open_set("tfds:tiny", str(tmp_path)).train.read(places(3))

    def test_damaged_truncated_and_missing_files(self, tmp_path):
        folder = self.prepare(tmp_path)

        def opened():
            return images.open_set("tfds:tiny", str(tmp_path)).train

        (path,) = folder.glob("*train*")
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[3000] ^= 0xFF
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"train: record \d+, in {path}, can't be read"):
            opened().read(places(60))
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=rf"train: record 0, in {path}, is damaged"):
            opened()
        path.unlink()
        with pytest.raises(UserError, match=rf"train: record 0, in {path}, can't be read"):
            opened()

    def test_unlabelled_examples(self, tmp_path):
        data = ([grey(4)] * 2, [1, -1])
        prepare_tiny(tmp_path, {"train": data, "test": data})
        source = images.open_set("tfds:tiny", str(tmp_path)).train
        with pytest.raises(UserError, match=r"tiny, train: 1 of 2 labels are outside 0\.\.2"):
            source.read(places(2))
