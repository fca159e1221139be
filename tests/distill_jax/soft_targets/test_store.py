"""The store with the k largest and with drawn classes: written in shards, damaged, joined by id."""

import functools
import json
import re

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stores import BATCH, CLASSES, DIGESTS, RUN, SHARD, N, content, never, tiny_targets, write

from distill_jax import losses, soft_targets, train_step
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


def joined(store, name):
    return np.concatenate([shard[name] for shard in store.shards])


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


def test_another_run_can_not_continue_a_store(whole):
    before = content(whole)
    write(whole, never)
    for name, there, here in (
        ("temperatures", [2.0], [4.0]),
        ("k", 3, 4),
        ("teacher", "'abc'", "xyz"),
        ("probabilities", True, False),
        ("data", {"alignment": "ab12"}, {"alignment": "cd34"}),
        ("shard_rows", 16, 8),
        ("encoding", "'top_k'", "sampled"),
    ):
        with pytest.raises(UserError, match=re.escape(f"{name} is {there} there and {here!r} now")):
            write(whole, never, **{name: here})
    with pytest.raises(UserError, match=r"ids is None there and '[0-9a-f]{16}' now"):
        write(whole, never, ids=np.arange(N) + 1)
    with pytest.raises(UserError, match="num_examples is 50 there and 49 now"):
        write(whole, never, DIGESTS[:-1])
    changed = DIGESTS.copy()
    changed[20] += np.uint64(1)
    with pytest.raises(UserError, match=r"1 of 16 examples are not .* first row 20: the data have"):
        write(whole, never, changed)
    assert content(whole) == before


def test_targets_that_are_none(tmp_path):
    with pytest.raises(UserError, match="at least one example"):
        write(tmp_path, digests=DIGESTS[:0])
    with pytest.raises(
        UserError, match=r"\(6, 11\) for 6 rows of 12 classes, .* expected \(6, 12\)"
    ):
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


def test_several_temperatures_are_one_pass_and_what_each_alone_is(tmp_path):
    logits, asked = 3 * np.random.default_rng(0).standard_normal((2, N, CLASSES)), []

    def members(rows):
        asked.extend(rows)
        return logits[:, rows].astype(np.float32)

    how = {"probabilities": False, "mean": "arithmetic"}
    for encoding in ("top_k", "sampled"):
        asked.clear()
        temperatures = np.array([5.0, 1.0, 2.0])
        write(tmp_path / encoding, members, encoding=encoding, temperatures=temperatures, **how)
        assert sorted(set(asked)) == list(range(N)) and len(asked) < N + 4 * BATCH
        every = soft_targets.load(tmp_path / encoding)
        assert every.meta["temperatures"] == [1.0, 2.0, 5.0]
        size = 3 if encoding == "sampled" else 3 * (2 + 2) + 4
        assert soft_targets.bytes_per_example(every) == 8 + 3 * size
        for temperature in (1.0, 2.0, 5.0):
            folder = tmp_path / f"{encoding}_{temperature}"
            write(folder, members, encoding=encoding, temperatures=temperature, **how)
            one = soft_targets.load(folder)
            found, expected = (
                soft_targets.rows(store, np.arange(N), temperature) for store in (every, one)
            )
            for name, field in expected.items():
                np.testing.assert_array_equal(found[name], field)
            weights = every.tail_weights[temperature], one.tail_weights[temperature]
            np.testing.assert_array_equal(*weights)


def test_arguments_that_do_not_fit_together(tmp_path):
    for changes, message in (
        ({"encoding": "some"}, "encoding must be one of 'dense', 'top_k', 'sampled', not 'some'"),
        ({"encoding": "dense"}, "k is 3, but a dense store keeps all classes"),
        ({"temperatures": [1.0, 2.0]}, "probabilities are those of one teacher at one temperature"),
        (
            {"mean": "arithmetic"},
            "mean is 'arithmetic', but probabilities are those of one teacher",
        ),
        ({"probabilities": False, "mean": "median"}, "'arithmetic' or 'geometric', not 'median'"),
        ({"probabilities": False, "temperatures": None}, "temperatures are None; expected one or"),
        ({"temperatures": 0.0}, r"temperatures are \[0.0\]; expected one or several above 0"),
        ({"temperatures": np.nan}, r"temperatures are \[nan\]; expected one or several above 0"),
        ({"probabilities": False, "temperatures": [2, 2]}, "expected each once"),
        ({"num_classes": None}, "the teacher is a function: give num_classes too"),
    ):
        with pytest.raises(UserError, match=message):
            write(tmp_path / "store", never, **changes)
    assert not (tmp_path / "store").exists()
    with pytest.raises(UserError, match=r"an array \(6, 12\) .* expected \(members, 6, 12\)"):
        write(tmp_path / "store", probabilities=False, mean="geometric")


def test_other_files_stay_as_they_are(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"holds notes\.txt, photos, so the store of soft"):
        write(tmp_path, never)
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "meta.json").write_text('{"format": "album", "version": 7}')
    with pytest.raises(UserError, match=r"is album version 7; .*: it is no store of soft targets"):
        write(tmp_path, never)
    with pytest.raises(UserError, match=r"notes\.txt is a file"):
        write(tmp_path / "notes.txt", never)
    (tmp_path / "meta.json").write_text("[1]")
    with pytest.raises(UserError, match=r"is None version None"):
        soft_targets.load(tmp_path)


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


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sampled") / "store", encoding="sampled", k=5, seed=7)


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
        train_step.top_k_distillation_loss(store.tail_weights[2.0])(logits, batch, hyper),
        losses.soft_cross_entropy(logits, shares, 2.0),
        rtol=1e-5,
    )


def test_draws_do_not_depend_on_batches_and_shards_but_on_the_seed(sampled, tmp_path):
    steps = joined(soft_targets.load(sampled), "steps_T2.0")
    for batch_size, shard_rows, seed in ((1, 50, 7), (13, 7, 7), (6, 16, 8)):
        directory = tmp_path / f"{batch_size}_{seed}"
        sizes = {"batch_size": batch_size, "shard_rows": shard_rows}
        write(directory, encoding="sampled", k=5, seed=seed, **sizes)
        found = joined(soft_targets.load(directory), "steps_T2.0")
        assert (found == steps).all() == (seed == 7)
    with pytest.raises(UserError, match="seed is 7 there and 8 now"):
        write(sampled, never, encoding="sampled", k=5, seed=8)


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


def write_logits(directory, logits, digests=DIGESTS, **changes):
    fixed = {"probabilities": False, "num_classes": None, "temperatures": 3.0}
    return soft_targets.load(write(directory, logits, digests, **{**fixed, **changes}))


def test_a_store_of_any_teachers_logits(tmp_path):
    random = np.random.default_rng(0)
    members = [random.standard_normal((N, CLASSES)).astype(np.float32) for _ in range(2)]
    np.save(tmp_path / "logits.npy", members[0])
    mapped = np.load(tmp_path / "logits.npy", mmap_mode="r")
    one = write_logits(tmp_path / "one", mapped)
    p = losses.softmax(jnp.asarray(members[0]), 3.0)
    kept = soft_targets.rows(one, np.arange(N), 3.0)
    expected = soft_targets.top_k(p, 3)
    for found, field in zip(kept.values(), expected, strict=True):
        np.testing.assert_allclose(
            found.astype(np.float32), field.astype(jnp.float32), rtol=2**-7, atol=1e-6
        )
    assert one.meta["mean"] is None and one.meta["temperatures"] == [3.0]
    for mean in ("arithmetic", "geometric"):
        both = write_logits(tmp_path / mean, members, mean=mean, encoding="sampled")
        p = soft_targets.mean_probs(jnp.asarray(np.stack(members)), 3.0, mean)
        np.testing.assert_allclose(both.tail_weights[3.0], jnp.mean(p, axis=0), rtol=1e-5)
        assert both.meta["mean"] == mean and both.meta["num_classes"] == CLASSES
    for name, logits in (
        ("double", members[0].astype(np.float64)),
        ("device", jnp.asarray(members[0])),
        ("function", lambda rows: members[0][rows]),
    ):
        store = write_logits(tmp_path / name, logits, num_classes=CLASSES)
        np.testing.assert_array_equal(joined(store, "classes_T3.0"), joined(one, "classes_T3.0"))


def test_logits_that_are_none(tmp_path):
    logits = np.zeros((N, CLASSES), np.float32)
    with pytest.raises(UserError, match=r"logits are \(50, 12\) for 49 digests; .*\(49, C\)"):
        write_logits(tmp_path / "a", logits, DIGESTS[:-1])
    with pytest.raises(UserError, match=r"logits are \(50, 11\), \(50, 12\) for 50"):
        write_logits(tmp_path / "a", [logits, logits[:, 1:]], mean="arithmetic")
    with pytest.raises(UserError, match=r"logits are \(50,\) for 50"):
        write_logits(tmp_path / "a", logits[:, 0])
    with pytest.raises(UserError, match="logits are none for 50"):
        write_logits(tmp_path / "a", [])
    with pytest.raises(UserError, match="num_classes is 13, but the logits have 12"):
        write_logits(tmp_path / "a", logits, num_classes=13)
    for members, mean in (([logits], "geometric"), ([logits, logits], None)):
        with pytest.raises(UserError, match=f"mean is {mean!r} for {len(members)} arrays"):
            write_logits(tmp_path / "a", members, mean=mean)
    assert not (tmp_path / "a").exists()
    for wrong in (np.nan, np.inf, -np.inf):
        broken = logits.copy()
        broken[20, 3] = wrong
        for source, how in ((broken, {}), ([logits, broken], {"mean": "arithmetic"})):
            with pytest.raises(UserError, match="logits are not finite, first for example 20"):
                write_logits(tmp_path / f"b{len(how)}", source, **how)
