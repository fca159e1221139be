"""The store of compressed soft targets: written in shards, killed, damaged, joined by id."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stores import BATCH, CLASSES, DIGESTS, RUN, SHARD, N, content, never, tiny_targets, write

from distill_jax import compressed_targets, losses, sampled_targets, soft_targets, train_step
from distill_jax.errors import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("whole") / "store")


def copied(whole, tmp_path):
    for name, data in content(whole).items():
        path = tmp_path / "copy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "copy"


def test_a_store_gives_every_row_whatever_its_shard(whole):
    store = compressed_targets.load(whole, teacher="abc", data=RUN["data"], num_classes=CLASSES)
    assert [len(shard) for shard in store.tail] == [16, 16, 16, 2]
    p = jnp.asarray(tiny_targets(range(N)))
    expected = [np.asarray(x) for x in compressed_targets.top_k(p, 3)]
    for rows in (
        np.arange(N),
        np.array([49, 0, 16, 15, 16, 33]),
        np.array([], int),
        np.uint32([48]),
    ):
        found = compressed_targets.rows(store, rows)
        for name, field in zip(
            ("teacher_ids", "teacher_probabilities", "teacher_tail"), expected, strict=True
        ):
            assert found[name].dtype == field.dtype
            np.testing.assert_array_equal(found[name], field[rows])
    np.testing.assert_allclose(store.tail_weights, jnp.mean(p, axis=0), rtol=1e-6)
    np.testing.assert_array_equal(np.concatenate(store.digests), DIGESTS)
    assert store.meta.items() >= {**RUN, "num_examples": N}.items()
    assert compressed_targets.bytes_per_example(store) == 3 * (2 + 2) + 4 + 8


@pytest.mark.parametrize("batch_size", [1, 16, 1000])
def test_batches_all_have_one_size_and_do_not_change_the_store(batch_size, whole, tmp_path):
    calls, progress = [], []

    def targets_of(rows):
        assert rows.dtype == np.int64 and rows.max() < N
        calls.append(len(rows))
        return jnp.asarray(tiny_targets(rows))

    write(
        tmp_path,
        targets_of,
        batch_size=batch_size,
        progress=lambda done, size: progress.append((done, size)),
    )
    assert set(calls) == {min(batch_size, SHARD)}
    assert progress == [(16, 50), (32, 50), (48, 50), (50, 50)]
    assert content(tmp_path) == content(whole)


def test_another_run_can_not_go_on_with_a_store(whole):
    before = content(whole)
    write(whole, never)
    for name, there, here in (
        ("temperature", 2.0, 4.0),
        ("k", 3, 4),
        ("teacher", "'abc'", "xyz"),
        ("mean", "'arithmetic'", None),
        ("data", {"alignment": "ab12"}, {"alignment": "cd34"}),
        ("shard_rows", 16, 8),
        ("encoding", "'top_k'", "sampled"),
    ):
        with pytest.raises(UserError, match=re.escape(f"{name} {there}, not {here!r}")):
            write(whole, never, **{name: here})
    with pytest.raises(UserError, match="num_examples 50, not 49"):
        write(whole, never, DIGESTS[:-1])
    changed = DIGESTS.copy()
    changed[20] += np.uint64(1)
    with pytest.raises(UserError, match=r"1 of 16 examples are not .* first id 20: the data have"):
        write(whole, never, changed)
    assert content(whole) == before


def test_targets_that_are_none(tmp_path):
    with pytest.raises(UserError, match="at least one example"):
        write(tmp_path, digests=DIGESTS[:0])
    with pytest.raises(UserError, match=r"\(6, 11\) for 6 rows of 12 classes; expected \(6, 12\)"):
        write(tmp_path, lambda rows: tiny_targets(rows)[:, :-1])
    for wrong in (np.nan, 2.0, -0.5):

        def targets_of(rows, wrong=wrong):
            p = tiny_targets(rows)
            p[rows == 20, 0] = wrong
            return p

        with pytest.raises(UserError, match="not probabilities with sum 1, first for example 20"):
            write(tmp_path, targets_of)


@pytest.mark.parametrize("k", [0, CLASSES + 1])
def test_a_k_that_is_none_leaves_no_store(k, tmp_path):
    with pytest.raises(UserError, match=f"k must be 1 to the number of classes, 12, not {k}"):
        write(tmp_path / "store", k=k)
    assert not (tmp_path / "store").exists()


def test_load_refuses_another_teacher_data_class_count_and_version(whole, tmp_path):
    for wanted, message in (
        ({"teacher": "xyz"}, "teacher 'abc', not 'xyz'"),
        ({"data": {"alignment": "cd"}}, "data {'alignment': 'ab12'}, not {'alignment': 'cd'}"),
        ({"num_classes": 10}, "num_classes 12, not 10"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            compressed_targets.load(whole, **wanted)
    store = copied(whole, tmp_path)
    meta = json.loads((store / "meta.json").read_text())
    (store / "meta.json").write_text(json.dumps({**meta, "version": 1}))
    for opened in (compressed_targets.load, write):
        with pytest.raises(
            UserError, match=r"version 1; this program reads .* 2: .* make it again"
        ):
            opened(store)
    with pytest.raises(UserError, match="no readable compressed targets in"):
        compressed_targets.load(tmp_path)


@pytest.mark.parametrize("name", ["ids", "probabilities", "tail", "digests"])
def test_a_damaged_byte_and_a_missing_file_are_noticed_and_put_right(name, whole, tmp_path):
    store = copied(whole, tmp_path)
    path = store / "shards/00001" / f"{name}.npy"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    for damage in (lambda: path.write_bytes(damaged), path.unlink):
        damage()
        for opened in (compressed_targets.load, functools.partial(write, targets_of=never)):
            with pytest.raises(UserError, match=r"shards/00001 is damaged: .* remove it"):
                opened(store)
    for left in path.parent.iterdir():
        left.unlink()
    path.parent.rmdir()
    with pytest.raises(UserError, match="shards/00001 is damaged"):
        compressed_targets.load(store)
    assert content(write(store)) == content(whole)


def test_damaged_tail_weights_are_noticed(whole, tmp_path):
    store = copied(whole, tmp_path)
    np.save(store / "tail_weights.npy", np.ones(CLASSES, np.float32))
    with pytest.raises(UserError, match=r"tail_weights.npy is damaged"):
        compressed_targets.load(store)


def test_attach_joins_by_id(whole):
    store = compressed_targets.load(whole)
    ids = np.array([40, 3, 17])
    examples = {"id": ids, "label": np.zeros(3, np.int32)}
    joined = compressed_targets.attach(examples, store, DIGESTS[ids], 2.0)
    assert joined.keys() == {*examples, "teacher_ids", "teacher_probabilities", "teacher_tail"}
    for name, field in compressed_targets.rows(store, ids).items():
        np.testing.assert_array_equal(joined[name], field)


def test_attach_refuses_what_does_not_fit(whole):
    store, ids = compressed_targets.load(whole), np.array([40, 3, 17])
    attach = compressed_targets.attach
    with pytest.raises(UserError, match=r"teacher abc .* at temperature 2.0 .* temperature 4.0"):
        attach({"id": ids}, store, DIGESTS[ids], 4.0)
    with pytest.raises(
        UserError, match=r"2 of 3 .* teacher abc saw .* first id 3: .* make them again"
    ):
        attach({"id": ids}, store, DIGESTS[[40, 17, 3]], 2.0)
    with pytest.raises(UserError, match="2 digests for 3 examples"):
        attach({"id": ids}, store, DIGESTS[:2], 2.0)
    for stranger in (-1, N):
        changed = np.array([40, stranger, 17])
        message = (
            f"1 of 3 examples have no soft targets, first id {stranger}; .* ids 0 to 49 of teacher"
        )
        with pytest.raises(UserError, match=message):
            attach({"id": changed}, store, DIGESTS[ids], 2.0)
        with pytest.raises(UserError, match=message):
            compressed_targets.rows(store, changed)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sampled") / "store", encoding="sampled", k=5, seed=7)


def test_a_sampled_store_keeps_the_drawn_classes_alone(sampled):
    store = compressed_targets.load(sampled, teacher="abc", data=RUN["data"], num_classes=CLASSES)
    p = jnp.asarray(tiny_targets(range(N)))
    expected = sampled_targets.sample(p, 5, sampled_targets.offsets(7, np.arange(N)))
    rows = np.array([49, 0, 16, 15, 16, 33])
    found = compressed_targets.rows(store, rows)
    assert found["teacher_ids"].dtype == np.uint16
    np.testing.assert_array_equal(found["teacher_ids"], expected[rows])
    assert found["teacher_probabilities"].dtype == found["teacher_tail"].dtype == np.float32
    np.testing.assert_array_equal(found["teacher_probabilities"], np.full((6, 1), np.float32(0.2)))
    np.testing.assert_array_equal(found["teacher_tail"], np.zeros(6))
    assert store.meta.items() >= {**RUN, "encoding": "sampled", "k": 5, "seed": 7}.items()
    assert compressed_targets.bytes_per_example(store) == 5 + 8
    np.testing.assert_allclose(store.tail_weights, jnp.mean(p, axis=0), rtol=1e-6)
    joined = compressed_targets.attach({"id": rows}, store, DIGESTS[rows], 2.0)
    np.testing.assert_array_equal(joined["teacher_ids"], found["teacher_ids"])
    with pytest.raises(UserError, match=r"temperature 2.0 .* temperature 1.0"):
        compressed_targets.attach({"id": rows}, store, DIGESTS[rows], 1.0)
    # The step's loss is that of the shares in which classes were drawn.
    batch = {name: jnp.asarray(field) for name, field in joined.items()}
    batch["label"] = jnp.zeros(6, jnp.int32)
    hyper = {"temperature": jnp.float32(2), "hard_weight": jnp.float32(0)}
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((6, CLASSES)), jnp.float32)
    shares = jnp.mean(jax.nn.one_hot(expected[rows], CLASSES), axis=1)
    np.testing.assert_allclose(
        train_step.top_k_distillation_loss(store.tail_weights)(logits, batch, hyper),
        losses.soft_cross_entropy(logits, shares, 2.0),
        rtol=1e-5,
    )


def test_draws_do_not_depend_on_batches_and_shards_but_on_the_seed(sampled, tmp_path):
    ids = np.concatenate(compressed_targets.load(sampled).ids)
    for batch_size, shard_rows, seed in ((1, 50, 7), (13, 7, 7), (6, 16, 8)):
        directory = tmp_path / f"{batch_size}_{seed}"
        sizes = {"batch_size": batch_size, "shard_rows": shard_rows}
        write(directory, encoding="sampled", k=5, seed=seed, **sizes)
        found = np.concatenate(compressed_targets.load(directory).ids)
        assert (found == ids).all() == (seed == 7)
    with pytest.raises(UserError, match="seed 7, not 8"):
        write(sampled, never, encoding="sampled", k=5, seed=8)


def test_more_classes_drawn_than_there_are(tmp_path):
    write(tmp_path / "store", encoding="sampled", k=64)
    store = compressed_targets.load(tmp_path / "store")
    ids = compressed_targets.rows(store, np.arange(N))["teacher_ids"]
    shares = np.stack([np.bincount(row, minlength=CLASSES) for row in ids]) / 64
    np.testing.assert_array_equal(shares, tiny_targets(range(N)))  # multiples of 1/64
    for wrong in ({"encoding": "sampled", "k": 0}, {"encoding": "sampled", "k": 2**15 + 1}):
        with pytest.raises(UserError, match=f"k must be 1 to 32768 draws, not {wrong['k']}"):
            write(tmp_path / "none", **wrong)
    with pytest.raises(UserError, match="encoding must be 'top_k' or 'sampled', not 'dense'"):
        write(tmp_path / "none", encoding="dense")
    assert not (tmp_path / "none").exists()


def write_logits(directory, logits, digests=DIGESTS, **changes):
    fixed = {
        "k": 3,
        "teacher": "abc",
        "data": RUN["data"],
        "shard_rows": SHARD,
        "batch_size": BATCH,
    }
    compressed_targets.write_logits(directory, logits, digests, **{**fixed, **changes})
    return compressed_targets.load(directory)


def test_a_store_of_any_teachers_logits(tmp_path):
    random = np.random.default_rng(0)
    members = [random.standard_normal((N, CLASSES)).astype(np.float32) for _ in range(2)]
    np.save(tmp_path / "logits.npy", members[0])
    mapped = np.load(tmp_path / "logits.npy", mmap_mode="r")
    one = write_logits(tmp_path / "one", mapped, temperature=3.0)
    p = losses.softmax(jnp.asarray(members[0]), 3.0)
    kept = compressed_targets.rows(one, np.arange(N))
    expected = compressed_targets.top_k(p, 3)
    for found, field in zip(kept.values(), expected, strict=True):
        np.testing.assert_allclose(
            found.astype(np.float32), field.astype(jnp.float32), rtol=2**-7, atol=1e-6
        )
    assert one.meta["mean"] is None and one.meta["temperature"] == 3.0
    for mean in ("arithmetic", "geometric"):
        both = write_logits(
            tmp_path / mean, members, temperature=3.0, mean=mean, encoding="sampled"
        )
        p = soft_targets.mean_probs(jnp.asarray(np.stack(members)), 3.0, mean)
        np.testing.assert_allclose(both.tail_weights, jnp.mean(p, axis=0), rtol=1e-5)
        assert both.meta["mean"] == mean and both.meta["num_classes"] == CLASSES
    double = write_logits(tmp_path / "double", members[0].astype(np.float64), temperature=3.0)
    np.testing.assert_array_equal(np.concatenate(double.ids), np.concatenate(one.ids))


def test_logits_that_are_none(tmp_path):
    logits = np.zeros((N, CLASSES), np.float32)
    with pytest.raises(UserError, match=r"logits are \(50, 12\) for 49 digests; .*\(49, C\)"):
        write_logits(tmp_path / "a", logits, DIGESTS[:-1], temperature=1.0)
    with pytest.raises(UserError, match=r"logits are \(50, 11\), \(50, 12\) for 50"):
        write_logits(tmp_path / "a", [logits, logits[:, 1:]], temperature=1.0, mean="arithmetic")
    with pytest.raises(UserError, match=r"logits are \(50,\) for 50"):
        write_logits(tmp_path / "a", logits[:, 0], temperature=1.0)
    with pytest.raises(UserError, match="logits are none for 50"):
        write_logits(tmp_path / "a", [], temperature=1.0)
    for members, mean in (([logits], "geometric"), ([logits, logits], None)):
        with pytest.raises(UserError, match=f"mean is {mean!r} for {len(members)} arrays"):
            write_logits(tmp_path / "a", members, temperature=1.0, mean=mean)
    assert not (tmp_path / "a").exists()
    for wrong in (np.nan, np.inf, -np.inf):
        broken = logits.copy()
        broken[20, 3] = wrong
        with pytest.raises(UserError, match="logits are not finite, first for example 20"):
            write_logits(tmp_path / "b", broken, temperature=1.0)
