"""The store with the k largest and with drawn classes: written in shards, damaged, joined by id."""

import functools
import json
import re

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stores import CLASSES, DIGESTS, RUN, N, content, joined, never, tiny_targets, write

from distill_jax import losses, soft_targets, step_losses
from distill_jax.errors import UserError


def copied(whole, tmp_path):
    for name, data in content(whole).items():
        path = tmp_path / "copy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "copy"


def test_a_store_gives_every_row_whatever_its_shard(whole):
    store = soft_targets.load(whole, teacher="abc", data=RUN["data"], num_classes=CLASSES)
    assert [len(shard["digests"]) for shard in store.shards] == [16, 16, 16, 2]
    p = jnp.asarray(tiny_targets(range(N)))
    expected = [np.asarray(x) for x in soft_targets.top_k(p, 3)]
    for rows in (
        np.arange(N),
        np.array([49, 0, 16, 15, 16, 33]),
        np.array([], int),
        np.uint32([48]),
    ):
        found = soft_targets.rows(store, rows, 2.0)
        for name, field in zip(
            ("teacher_ids", "teacher_probabilities", "teacher_tail"), expected, strict=True
        ):
            assert found[name].dtype == field.dtype
            np.testing.assert_array_equal(found[name], field[rows])
    np.testing.assert_allclose(store.tail_weights[2.0], jnp.mean(p, axis=0), rtol=1e-6)
    np.testing.assert_array_equal(joined(store, "digests"), DIGESTS)
    assert store.meta.items() >= {**RUN, "temperatures": [2.0], "num_examples": N}.items()
    assert soft_targets.bytes_per_example(store) == 3 * (2 + 2) + 4 + 8


def test_load_refuses_another_teacher_data_class_count_and_version(whole, tmp_path):
    for wanted, message in (
        ({"teacher": "xyz"}, "teacher is 'abc' there and 'xyz' now"),
        ({"data": {"a": "b"}}, "data is {'alignment': 'ab12'} there and {'a': 'b'} now"),
        ({"num_classes": 10}, "num_classes is 12 there and 10 now"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            soft_targets.load(whole, **wanted)
    store = copied(whole, tmp_path)
    meta = json.loads((store / "meta.json").read_text())
    (store / "meta.json").write_text(json.dumps({**meta, "version": 1}))
    for opened in (soft_targets.load, write):
        with pytest.raises(
            UserError, match=r"version 1; this program reads .* 2: delete .* same command again"
        ):
            opened(store)
    with pytest.raises(UserError, match="no readable soft targets in"):
        soft_targets.load(tmp_path)


@pytest.mark.parametrize("name", ["classes_T2.0", "probabilities_T2.0", "tail_T2.0", "digests"])
def test_a_damaged_byte_and_a_missing_file_are_noticed_and_put_right(name, whole, tmp_path):
    store = copied(whole, tmp_path)
    path = store / "shards/00001" / f"{name}.npy"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    for damage in (lambda: path.write_bytes(damaged), path.unlink):
        damage()
        for opened in (soft_targets.load, functools.partial(write, source=never)):
            with pytest.raises(UserError, match=r"shards/00001 is damaged: .* delete it and run"):
                opened(store)
    for left in path.parent.iterdir():
        left.unlink()
    path.parent.rmdir()
    with pytest.raises(UserError, match="shards/00001 is damaged"):
        soft_targets.load(store)
    assert content(write(store)) == content(whole)


def test_damaged_tail_weights_are_noticed(whole, tmp_path):
    store = copied(whole, tmp_path)
    np.save(store / "tail_weights_T2.0.npy", np.ones(CLASSES, np.float32))
    with pytest.raises(UserError, match=r"tail_weights_T2.0.npy is damaged"):
        soft_targets.load(store)


def test_attach_joins_by_id(whole):
    store = soft_targets.load(whole)
    ids = np.array([40, 3, 17])
    examples = {"id": ids, "inputs": ids, "label": np.zeros(3, np.int32)}
    for digests in (None, DIGESTS[ids]):
        joined = soft_targets.attach(examples, store, 2.0, digests)
        assert joined.keys() == {*examples, *soft_targets.TOP_K_FIELDS}
        for name, field in soft_targets.rows(store, ids, 2.0).items():
            np.testing.assert_array_equal(joined[name], field)


def test_attach_refuses_what_does_not_fit(whole):
    store, ids = soft_targets.load(whole), np.array([40, 3, 17])
    attach = soft_targets.attach
    for temperature in (4.0, None):
        with pytest.raises(UserError, match=rf"teacher abc .* 2.0 .* temperature {temperature}"):
            attach({"id": ids}, store, temperature, DIGESTS[ids])
    with pytest.raises(
        UserError, match=r"2 of 3 .* teacher abc saw .* first id 3: .* make them again"
    ):
        attach({"id": ids}, store, 2.0, DIGESTS[[40, 17, 3]])
    with pytest.raises(UserError, match="2 digests for 3 examples"):
        attach({"id": ids}, store, 2.0, DIGESTS[:2])
    for stranger in (-1, N):
        changed = np.array([40, stranger, 17])
        message = f"1 of 3 examples have no soft targets, first id {stranger}; .* ids 0 to 49, of t"
        with pytest.raises(UserError, match=message):
            attach({"id": changed}, store, 2.0, DIGESTS[ids])
        with pytest.raises(UserError, match=message):
            soft_targets.rows(store, changed, 2.0)


def test_examples_with_ids_of_their_own(tmp_path):
    ids = np.random.default_rng(0).permutation(10 * N)[:N]
    p = tiny_targets(range(N))
    for encoding in ("top_k", "sampled"):
        store = soft_targets.load(write(tmp_path / encoding, ids=ids, encoding=encoding))
        some = np.array([31, 2, 2, 49])
        kept = soft_targets.top_k(jnp.asarray(p[some]), 3)
        if encoding == "sampled":
            offsets = soft_targets.offsets(0, ids[some])
            kept = [soft_targets.sample(jnp.asarray(p[some]), 3, offsets)]
        found = soft_targets.rows(store, ids[some], 2.0)
        np.testing.assert_array_equal(found["teacher_ids"], kept[0])
        with pytest.raises(UserError, match="1 of 1 examples have no soft targets, first id 500"):
            soft_targets.rows(store, np.array([500]), 2.0)
    with pytest.raises(UserError, match="distinct ids"):
        write(tmp_path / "none", ids=ids // 50)
    with pytest.raises(UserError, match=r"ids are \(49,\) for 50 digests"):
        write(tmp_path / "none", ids=ids[1:])
    assert content(write(tmp_path / "rows", ids=np.arange(N))) == content(write(tmp_path / "none"))


def test_stores_of_older_versions_are_refused(tmp_path):
    for name, version in (
        ("soft_targets", 1),
        ("compressed_targets", 1),
        ("compressed_targets", 2),
    ):
        meta = {"format": f"distill_jax.{name}", "version": version}
        (tmp_path / "meta.json").write_text(json.dumps(meta))
        for opened in (write, soft_targets.load):
            with pytest.raises(
                UserError,
                match=rf"{name} version {version}; .*: delete {tmp_path} and run the same",
            ):
                opened(tmp_path)


def test_grain_joins_batches_in_its_threads(whole):
    store = soft_targets.load(whole)
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)

    def batches(inputs, temperature):
        source = [{"id": number, "inputs": inputs[number]} for number in range(N)]
        dataset = grain.MapDataset.source(source).shuffle(seed=3).repeat(2).batch(8)
        joined = dataset.map(lambda batch: soft_targets.attach(batch, store, temperature))
        return list(joined.to_iter_dataset(options))

    found = batches(np.arange(N), 2.0)
    for batch in found:
        for name, field in soft_targets.rows(store, batch["id"], 2.0).items():
            assert batch[name].dtype == field.dtype
            np.testing.assert_array_equal(batch[name], field)
    ids = np.concatenate([batch["id"] for batch in found])
    assert ids.tolist() != sorted(ids.tolist())
    assert set(ids.tolist()) == set(range(N))
    with pytest.raises(UserError, match=r"not the inputs that teacher abc saw .* first id 17"):
        batches(np.where(np.arange(N) == 17, 0, np.arange(N)), 2.0)
    with pytest.raises(UserError, match=r"temperature 2.0 and can't be used at temperature 1.0"):
        batches(np.arange(N), 1.0)


def test_a_sampled_store_keeps_the_drawn_classes_alone(sampled):
    store = soft_targets.load(sampled, teacher="abc", data=RUN["data"], num_classes=CLASSES)
    p = jnp.asarray(tiny_targets(range(N)))
    expected = soft_targets.sample(p, 5, soft_targets.offsets(7, np.arange(N)))
    rows = np.array([49, 0, 16, 15, 16, 33])
    found = soft_targets.rows(store, rows, 2.0)
    assert found["teacher_ids"].dtype == np.uint16
    np.testing.assert_array_equal(found["teacher_ids"], expected[rows])
    assert found["teacher_probabilities"].dtype == found["teacher_tail"].dtype == np.float32
    np.testing.assert_array_equal(found["teacher_probabilities"], np.full((6, 1), np.float32(0.2)))
    np.testing.assert_array_equal(found["teacher_tail"], np.zeros(6))
    assert store.meta.items() >= {"encoding": "sampled", "k": 5, "seed": 7}.items()
    assert soft_targets.bytes_per_example(store) == 5 + 8
    np.testing.assert_allclose(store.tail_weights[2.0], jnp.mean(p, axis=0), rtol=1e-6)
    joined = soft_targets.attach({"id": rows}, store, 2.0, DIGESTS[rows])
    np.testing.assert_array_equal(joined["teacher_ids"], found["teacher_ids"])
    with pytest.raises(UserError, match=r"temperature 2.0 .* temperature 1.0"):
        soft_targets.attach({"id": rows}, store, 1.0, DIGESTS[rows])
    # The step's loss is that of the shares in which classes were drawn.
    batch = {name: jnp.asarray(field) for name, field in joined.items()}
    batch["label"] = jnp.zeros(6, jnp.int32)
    hyper = {"temperature": jnp.float32(2), "hard_weight": jnp.float32(0)}
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((6, CLASSES)), jnp.float32)
    shares = jnp.mean(jax.nn.one_hot(expected[rows], CLASSES), axis=1)
    np.testing.assert_allclose(
        step_losses.top_k_distillation_loss(store.tail_weights[2.0])(logits, batch, hyper),
        losses.soft_cross_entropy(logits, shares, 2.0),
        rtol=1e-5,
    )


def test_more_classes_drawn_than_there_are(tmp_path):
    write(tmp_path / "store", encoding="sampled", k=64)
    store = soft_targets.load(tmp_path / "store")
    ids = soft_targets.rows(store, np.arange(N), 2.0)["teacher_ids"]
    shares = np.stack([np.bincount(row, minlength=CLASSES) for row in ids]) / 64
    np.testing.assert_array_equal(shares, tiny_targets(range(N)))  # multiples of 1/64
    for wrong in ({"encoding": "sampled", "k": 0}, {"encoding": "sampled", "k": 2**15 + 1}):
        with pytest.raises(UserError, match=f"k must be 1 to 32768 draws, not {wrong['k']}"):
            write(tmp_path / "none", **wrong)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({"inputs": [1]}, "examples have inputs, not 'id'"),
        ({"id": [1], "label": [0]}, "examples have id, label, not 'inputs'"),
        ({}, "examples have no fields, not 'id'"),
        ({"id": ["a.png"], "inputs": [1]}, r"array \(1,\) of <U5; expected whole numbers"),
        ({"id": [1.0], "inputs": [1]}, r"array \(1,\) of float64; expected whole numbers"),
        ({"id": [[1]], "inputs": [1]}, r"array \(1, 1\) of int64; expected whole numbers"),
        ({"id": [1], "inputs": [[1], [1, 2]]}, "inputs are no array"),
        ({"id": [1], "inputs": np.array([None])}, r"an array \(1,\) of object; expected"),
        ({"id": [1], "inputs": 3}, r"an array \(\) of int64; expected"),
    ],
)
def test_examples_that_can_not_be_joined_are_named(examples, message, whole):
    with pytest.raises(UserError, match=message):
        soft_targets.attach(examples, soft_targets.load(whole), 2.0)


def test_lists_and_arrays_of_any_library_are_joined(whole):
    store = soft_targets.load(whole)
    expected = soft_targets.rows(store, np.array([7, 3]), 2.0)
    for ids in ([7, 3], jnp.array([7, 3]), np.array([7, 3], np.uint8)):
        joined = soft_targets.attach({"id": ids, "inputs": [7, 3]}, store, 2.0)
        for name, field in expected.items():
            np.testing.assert_array_equal(joined[name], field)


def test_digests_are_of_the_bytes_of_any_array():
    values = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    expected = soft_targets.digests(values)
    for same in (jnp.asarray(values), np.asfortranarray(values)):
        np.testing.assert_array_equal(soft_targets.digests(same), expected)
    for other in (
        values.astype(jnp.bfloat16),
        values.astype("U3"),
        values.reshape(2, 2, 1)[:, ::-1],
    ):
        found = soft_targets.digests(other)
        assert found.shape == (2,) and (found != expected).all()
    assert soft_targets.digests(values[:0]).shape == (0,)


def test_the_fingerprint_of_parameters_with_random_keys():
    one, other = ({"key": jax.random.key(seed), "w": np.zeros(2)} for seed in (0, 1))
    assert soft_targets.fingerprint(one, {}) != soft_targets.fingerprint(other, {})
