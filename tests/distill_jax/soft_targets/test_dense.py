"""The store with all logits: of one teacher and of ensembles, joined by id, damaged."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from distill_jax import losses, soft_targets
from distill_jax.data.augment import jitter
from distill_jax.errors import UserError

N = 12


def write(folder, logits=None, examples=None, **options):
    examples = tiny.examples(N) if examples is None else examples
    soft_targets.write(
        folder,
        tiny.teacher_logits(N) if logits is None else logits,
        soft_targets.digests(examples["inputs"]),
        teacher="abc",
        ids=examples["id"],
        shard_rows=5,
        **options,
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("dense") / "store")


@pytest.fixture(scope="module")
def store(folder):
    return soft_targets.load(folder, teacher="abc", num_classes=tiny.CLASSES)


def take(examples, rows):
    return {name: field[rows] for name, field in examples.items()}


def test_attach_joins_by_id(store):
    for rows in (np.arange(N), np.arange(N)[::-1], np.array([7, 2, 9]), np.array([], int)):
        joined = soft_targets.attach(take(tiny.examples(N), rows), store)
        assert joined["teacher_logits"].dtype == np.float32
        np.testing.assert_array_equal(joined["teacher_logits"], tiny.teacher_logits(N)[rows])
        np.testing.assert_array_equal(joined["id"], tiny.examples(N)["id"][rows])


def test_attach_to_a_store_that_is_not_sorted(tmp_path):
    rows = np.random.default_rng(0).permutation(N)
    write(tmp_path, tiny.teacher_logits(N)[rows], take(tiny.examples(N), rows))
    joined = soft_targets.attach(tiny.examples(N), soft_targets.load(tmp_path))
    np.testing.assert_array_equal(joined["teacher_logits"], tiny.teacher_logits(N))


@pytest.mark.parametrize("stranger", [5, 105.5, 900])
def test_attach_to_an_id_without_targets(stranger, tmp_path):
    examples, stored = tiny.examples(N), np.arange(N) != 5
    write(tmp_path, tiny.teacher_logits(N)[stored], take(examples, stored))
    examples["id"][5] = stranger
    message = (
        f"1 of 12 examples have no soft targets, first id {int(stranger)}; .*11 examples, ids 100 to "
        "111, of teacher abc"
    )
    with pytest.raises(UserError, match=message):
        soft_targets.attach(examples, soft_targets.load(tmp_path))


def test_attach_to_changed_images(store):
    examples = tiny.examples(N)
    examples["inputs"][3, 0, 0] ^= 1
    with pytest.raises(UserError, match=r"1 of 12 .* teacher abc saw .* first id 103"):
        soft_targets.attach(examples, store)


def test_attach_to_images_under_swapped_ids(store):
    examples = tiny.examples(N)
    examples["id"][[2, 4]] = examples["id"][[4, 2]]
    with pytest.raises(UserError, match=r"2 of 12 examples are not the inputs"):
        soft_targets.attach(examples, store)


def test_attach_to_jittered_images(store, key):
    moved = jitter(2)({name: jnp.asarray(x) for name, x in tiny.examples(N).items()}, key)
    with pytest.raises(UserError, match="make them again"):
        soft_targets.attach({name: np.asarray(x) for name, x in moved.items()}, store)


def test_an_ensembles_logits_give_its_mean(tmp_path):
    members = [tiny.teacher_logits(N, seed) for seed in (1, 2, 3)]
    every = jnp.asarray(np.stack(members))

    def at(store, temperature):
        joined = soft_targets.attach(tiny.examples(N), store, temperature)
        return losses.softmax(jnp.asarray(joined["teacher_logits"]), temperature)

    arithmetic = soft_targets.load(
        write(tmp_path / "a", members, mean="arithmetic", temperatures=[4.0, 1.0])
    )
    geometric = soft_targets.load(write(tmp_path / "g", members, mean="geometric"))
    for temperature in (1.0, 4.0):
        for store, mean in ((arithmetic, "arithmetic"), (geometric, "geometric")):
            expected = soft_targets.mean_probs(every, temperature, mean)
            np.testing.assert_allclose(at(store, temperature), expected, rtol=1e-5)
    for temperature in (8.0, None):
        with pytest.raises(
            UserError, match=f"an arithmetic mean at temperature 1.0 and 4.0 .* {temperature}"
        ):
            at(arithmetic, temperature)
    with pytest.raises(UserError, match="geometric mean serve every temperature: leave them out"):
        write(tmp_path / "none", members, mean="geometric", temperatures=2.0)


def test_a_teacher_of_whom_only_probabilities_are_known(tmp_path):
    p = np.array(losses.softmax(jnp.asarray(tiny.teacher_logits(N)), 2.0))
    p[0] = [1.0, 0.0, 0.0]
    write(tmp_path, lambda rows: p[rows], probabilities=True, temperatures=2.0, num_classes=3)
    joined = soft_targets.attach(tiny.examples(N), soft_targets.load(tmp_path), 2.0)
    found = losses.softmax(jnp.asarray(joined["teacher_logits"]), 2.0)
    np.testing.assert_allclose(found, p, rtol=1e-5, atol=1e-37)


def test_write_refuses_what_does_not_fit(tmp_path):
    logits, examples = tiny.teacher_logits(N), tiny.examples(N)
    with pytest.raises(UserError, match=r"logits are \(11, 3\) for 12 digests"):
        write(tmp_path, logits[:-1])
    with pytest.raises(UserError, match="distinct ids"):
        write(tmp_path, examples={**examples, "id": np.full(N, 7)})
    for bad in (np.nan, np.inf, -np.inf):
        broken = logits.copy()
        broken[4, 1] = bad
        with pytest.raises(UserError, match="not finite, first for example 104"):
            write(tmp_path, broken)


def test_load_refuses_another_teacher_and_class_count(folder, tmp_path):
    with pytest.raises(UserError, match="teacher is 'abc' there and 'xyz' now"):
        soft_targets.load(folder, teacher="xyz")
    with pytest.raises(UserError, match="num_classes is 3 there and 10 now"):
        soft_targets.load(folder, num_classes=10)
    with pytest.raises(UserError, match=f"no readable soft targets in {re.escape(str(tmp_path))}"):
        soft_targets.load(tmp_path)


def test_any_flipped_bit_in_the_logits_is_noticed(tmp_path):
    write(tmp_path)
    path = tmp_path / "shards/00001/logits.npy"
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="00001 is damaged"):
            soft_targets.load(tmp_path)


@pytest.mark.parametrize("name", ["ids.npy", "digests.npy", "logits.npy", "meta.json"])
@pytest.mark.parametrize("kept", [0, 20, 0.5, -2])
def test_a_cut_file_is_noticed(tmp_path, name, kept):
    write(tmp_path)
    path = tmp_path / (name if name == "meta.json" else f"shards/00002/{name}")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        soft_targets.load(tmp_path)
