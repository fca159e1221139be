"""Writing stores: in shards and batches, from any teacher, for several temperatures."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from stores import BATCH, CLASSES, DIGESTS, SHARD, N, content, joined, never, tiny_targets, write

from distill_jax import losses, soft_targets
from distill_jax.errors import UserError
from distill_jax.soft_targets import shard_files


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
    with pytest.raises(UserError, match=r"notes\.txt is no folder"):
        write(tmp_path / "notes.txt", never)
    (tmp_path / "meta.json").write_text("[1]")
    with pytest.raises(UserError, match=r"is None version None"):
        soft_targets.load(tmp_path)


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


def test_the_same_call_goes_on_and_other_logits_under_the_same_name_are_refused(tmp_path):
    random = np.random.default_rng(0)
    old, new = random.standard_normal((2, N, CLASSES)).astype(np.float32)
    folder = tmp_path / "store"
    write_logits(folder, old)
    before = content(folder)
    for same in (old, jnp.asarray(old), old.astype(np.float64)):
        write_logits(folder, same)
        assert content(folder) == before
    with pytest.raises(
        UserError, match=r"made of other logits than these, by .* name 'abc': name an"
    ):
        write_logits(folder, new)
    changed = old.copy()
    changed[-1, 0] += 1
    half = tmp_path / "half"
    write(half, old, shards=[3], probabilities=False)
    with pytest.raises(UserError, match="made of other logits"):
        write_logits(half, changed, temperatures=2.0)
    assert content(folder) == before and not list(tmp_path.glob("*.partial"))


def test_a_store_is_replaced_whole_and_only_where_asked(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    old, new = random.standard_normal((2, N, CLASSES)).astype(np.float32)
    folder = tmp_path / "store"
    write_logits(folder, old)
    before = content(folder)

    def stop(done, size):
        if done > SHARD:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_logits(folder, new, overwrite=True, progress=stop)
    assert content(folder) == before
    asked = []
    monkeypatch.setattr(shard_files, "write", record(asked, shard_files.write))
    store = write_logits(folder, new, overwrite=True, temperatures=[3.0])
    assert asked == [2, 3]  # it resumed where it was stopped
    np.testing.assert_array_equal(joined(store, "classes_T3.0")[:, 0], new.argmax(axis=1))
    after = content(folder)
    write_logits(folder, new, overwrite=True)
    assert content(folder) == after and [path.name for path in tmp_path.iterdir()] == ["store"]
    with pytest.raises(UserError, match="leave shards out"):
        write(folder, old, probabilities=False, overwrite=True, shards=[0])
    (folder / "shards" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"holds thesis\.tex"):
        write_logits(folder, old, overwrite=True)
    assert (folder / "shards" / "thesis.tex").read_text() == "mine"


def record(calls, function):
    def call(store, number, *more):
        calls.append(number)
        return function(store, number, *more)

    return call


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ids": [f"img_{i}.png" for i in range(N)]},
            r"array \(50,\) of <U10; expected whole numb",
        ),
        ({"ids": np.arange(N) + 0.5}, r"array \(50,\) of float64; expected whole numbers"),
        ({"ids": np.arange(2 * N).reshape(N, 2)}, r"array \(50, 2\) of int64; expected whole"),
        ({"ids": np.zeros(N, int)}, "distinct ids"),
        ({"digests": jnp.zeros(N, jnp.uint32)}, "uint32; expected uint64 .* JAX cuts numbers"),
        ({"k": 2.5}, "k is 2.5; expected a whole number"),
        ({"shard_rows": 0}, "shard_rows is 0; expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"temperatures": "warm"}, "temperatures are 'warm'; expected numbers"),
        ({"teacher": None}, "teacher is None; expected its fingerprint"),
        ({"data": {"a": np.zeros(2)}}, "data is .* expected words by name"),
        ({"source": np.zeros((N, CLASSES), complex)}, "logits are of complex128; expected real"),
        ({"source": np.zeros((N, 3, CLASSES))}, r"logits are \(50, 3, 12\) for 50 digests"),
    ],
)
def test_what_no_store_can_be_made_of_is_named(changes, message, tmp_path):
    arguments = {"source": np.zeros((N, CLASSES)), "probabilities": False, "num_classes": None}
    with pytest.raises(UserError, match=message):
        write(tmp_path / "store", **{**arguments, **changes})
    assert not (tmp_path / "store").exists()


def test_numbers_and_arrays_of_any_library(tmp_path):
    logits, ids = np.arange(N * CLASSES).reshape(N, CLASSES) % 7, jnp.arange(N)[::-1] - 5
    how = {"k": np.int64(3), "shard_rows": np.int32(SHARD), "seed": jnp.int32(1)}
    store = write_logits(tmp_path, logits, ids=ids, temperatures=jnp.float32(3.0), **how)
    found = soft_targets.rows(store, jnp.array([-5, 44]), np.float32(3.0))["teacher_ids"][:, 0]
    np.testing.assert_array_equal(found, logits[[49, 0]].argmax(axis=1))
