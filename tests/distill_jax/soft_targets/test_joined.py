"""Examples read by number through grain, each with the soft targets that are its own."""

import grain
import numpy as np
import pytest

from distill_jax import compressed_targets, soft_targets
from distill_jax.data import stream
from distill_jax.data.joined import JoinedSource, image_digests, join
from distill_jax.data.stream import Records
from distill_jax.errors import UserError

N, CLASSES = 200, 30
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (N, 5, 4), np.uint8)
LABELS = RANDOM.integers(0, CLASSES, N).astype(np.int32)
TARGETS = RANDOM.dirichlet(np.full(CLASSES, 0.2), N).astype(np.float32)
THREADS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)


class Source:
    def __init__(self, images=IMAGES):
        self.images = images

    def __len__(self):
        return N

    def __getitem__(self, number):
        return {"inputs": self.images[number], "label": LABELS[number]}


def read(numbers):
    return {
        "id": numbers.astype(np.int32),
        "inputs": IMAGES[numbers],
        "label": LABELS[numbers],
    }


@pytest.fixture(scope="module", params=["top_k", "sampled"])
def store(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("joined") / request.param
    compressed_targets.write(
        directory,
        lambda rows: TARGETS[rows],
        soft_targets.digests(IMAGES),
        num_classes=CLASSES,
        k=4,
        temperature=2.0,
        mean=None,
        teacher="t",
        data={},
        encoding=request.param,
        shard_rows=64,
        batch_size=64,
    )
    return compressed_targets.load(directory)


def changed():
    images = IMAGES.copy()
    images[77, 0, 0] += 1
    return images


def assert_own(batch, store):
    """Every example has its own image, label and targets."""
    ids = batch["id"]
    for name, field in (("inputs", IMAGES), ("label", LABELS)):
        np.testing.assert_array_equal(batch[name], field[ids])
    for name, field in compressed_targets.rows(store, ids).items():
        assert batch[name].dtype == field.dtype
        np.testing.assert_array_equal(batch[name], field)


@pytest.mark.parametrize("source", [Source(), Records(N, read)], ids=["source", "records"])
def test_shuffled_and_read_by_several_threads(source, store):
    joined = JoinedSource(source, store, 2.0)
    assert len(joined) == N
    dataset = grain.MapDataset.source(joined).shuffle(seed=3).repeat(2).batch(32)
    batches = list(dataset.to_iter_dataset(THREADS))
    for batch in batches:
        assert_own(batch, store)
    ids = np.concatenate([batch["id"] for batch in batches])
    assert ids.tolist() != sorted(ids.tolist())
    np.testing.assert_array_equal(np.bincount(ids), np.full(N, 2))


def test_joined_as_whole_batches(store):
    def attach(batch):
        return compressed_targets.attach(batch, store, image_digests(batch), 2.0)

    source = [{"id": number, **Source()[number]} for number in range(N)]
    dataset = grain.MapDataset.source(source).shuffle(seed=3).batch(32).map(attach)
    one_by_one = grain.MapDataset.source(JoinedSource(source, store, 2.0)).shuffle(seed=3).batch(32)
    for whole, other in zip(dataset.to_iter_dataset(THREADS), one_by_one, strict=True):
        assert_own(whole, store)
        assert whole.keys() == other.keys()
        np.testing.assert_array_equal(whole["id"], other["id"])


def test_other_data_are_noticed_when_they_are_read(store):
    joined = JoinedSource(Source(changed()), store, 2.0)
    assert_own({name: field[None] for name, field in joined[76].items()}, store)
    with pytest.raises(UserError, match=r"not the inputs that teacher t saw .* first id 77"):
        joined[77]
    dataset = grain.MapDataset.source(joined).shuffle(seed=3).batch(32)
    with pytest.raises(UserError, match="first id 77"):
        list(dataset.to_iter_dataset(THREADS))
    with pytest.raises(UserError, match=r"temperature 2.0 and can't be used at temperature 1.0"):
        JoinedSource(Source(), store, 1.0)


def test_digests_of_what_the_teacher_saw(store):
    """The inputs are under another name, and lie otherwise."""

    def digests_of(examples):
        return soft_targets.digests(examples["pixels"].reshape(-1, 5, 4))

    flat = [{"pixels": image.ravel()} for image in IMAGES]
    item = JoinedSource(flat, store, 2.0, digests_of)[150]
    assert item["id"] == 150 and set(item) - {"id", "pixels"} == {
        "teacher_ids",
        "teacher_probabilities",
        "teacher_tail",
    }


def test_blocks_of_records_carry_their_targets(store):
    joined = join(Records(N, read), store, 2.0)
    some = stream.select(joined, np.arange(20, 180))
    block = next(stream.blocks(some, 8, 40, seed=1, rows=np.arange(8)))
    assert block["teacher_ids"].shape[:2] == block["id"].shape == (5, 8)
    flat = {name: field.reshape(-1, *field.shape[2:]) for name, field in block.items()}
    assert_own(flat, store)
    stranger = join(
        Records(N + 1, lambda numbers: {**read(numbers % N), "id": numbers}), store, 2.0
    )
    with pytest.raises(UserError, match=f"1 of 2 examples have no soft targets, first id {N}"):
        stranger.read(np.array([3, N]))
