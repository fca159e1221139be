"""The store of compressed soft targets: written in shards, killed, damaged, joined by id."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import compressed_targets, soft_targets
from distill_jax.errors import UserError

N, CLASSES, SHARD, BATCH = 50, 12, 16, 6
DIGESTS = soft_targets.digests(np.arange(N))
RUN = {
    "num_classes": CLASSES,
    "k": 3,
    "temperature": 2.0,
    "mean": "arithmetic",
    "teacher": "abc",
    "data": {"alignment": "ab12"},
}


def tiny_targets(rows):
    """Multiples of 1/64, whose sums are exact in any order, so that stores can be compared by bytes."""
    counts = [
        np.random.default_rng(row).multinomial(64, np.arange(1, CLASSES + 1) / 78) for row in rows
    ]
    return np.array(counts, np.float32) / 64


def write(directory, targets_of=tiny_targets, digests=DIGESTS, **changes):
    sizes = {"shard_rows": SHARD, "batch_size": BATCH}
    compressed_targets.write(directory, targets_of, digests, **{**RUN, **sizes, **changes})
    return directory


def write_slowly(directory):
    write(directory, lambda rows: time.sleep(0.1) or tiny_targets(rows))


def content(directory):
    paths = sorted(path for path in Path(directory).rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


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


def test_a_killed_writer_goes_on_to_the_same_bytes(whole, tmp_path):
    command = "import sys, test_compressed_targets as t; t.write_slowly(sys.argv[1])"
    folder = Path(__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", command, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{folder}:{folder.parent}"},
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "shards/00001").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(UserError, match=r"not finished, \d of 4 shards .* the same command"):
        compressed_targets.load(tmp_path)
    asked = []
    write(tmp_path, lambda rows: asked.extend(rows) or tiny_targets(rows))
    assert min(asked) >= SHARD  # at most the shard whose hash was not noted is made again
    assert content(tmp_path) == content(whole)


def test_what_a_kill_during_a_shard_leaves_is_written_over(whole, tmp_path):
    def killed_in_the_third_shard(rows):
        if rows[-1] >= 2 * SHARD:
            raise KeyboardInterrupt
        return tiny_targets(rows)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, killed_in_the_third_shard)
    for name in ("00002.partial", "00002"):  # written in part; whole, but its hash not noted
        (tmp_path / "shards" / name).mkdir()
        (tmp_path / "shards" / name / "ids.npy").write_bytes(b"half")
    (tmp_path / "meta.json.partial").write_text("{")
    asked = []
    write(tmp_path, lambda rows: asked.extend(rows) or tiny_targets(rows))
    assert set(asked) == set(range(2 * SHARD, N))
    assert content(tmp_path) == content(whole)


def never(rows):
    raise AssertionError("nothing was left to do")


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
    (store / "meta.json").write_text(json.dumps({**meta, "version": 2}))
    for opened in (compressed_targets.load, write):
        with pytest.raises(UserError, match=r"version 2; this program reads .* version 1"):
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
