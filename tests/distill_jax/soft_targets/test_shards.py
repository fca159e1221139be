"""A store's shards: shared out by writers and processes, killed, written twice, put together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from stores import (
    BATCH,
    DIGESTS,
    RUN,
    SHARD,
    N,
    content,
    never,
    tiny_targets,
    write,
)

from distill_jax import files, processes, soft_targets
from distill_jax.errors import UserError


def write_slowly(directory):
    write(directory, lambda rows: time.sleep(0.1) or tiny_targets(rows))


def write_shards(directory, shards, targets_of=tiny_targets, **changes):
    options = {**RUN, "shard_rows": SHARD, "batch_size": BATCH, "shards": shards, **changes}
    soft_targets.write(directory, targets_of, DIGESTS, **options)


def write_until_killed(directory, *shards):
    """Its teacher doesn't get through with a third shard."""

    def slow(rows):
        time.sleep(600 if rows[-1] >= 2 * SHARD else 0.05)
        return tiny_targets(rows)

    write_shards(directory, shards, slow, encoding="sampled")


def start(call):
    """A process that calls a function of this file."""
    folder = Path(__file__).parent
    return subprocess.Popen(
        [sys.executable, "-c", f"import test_shards as t; t.{call}"],
        env={**os.environ, "PYTHONPATH": f"{folder}:{folder.parents[1]}"},
    )


def wait_for(path, *running):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert all(process.poll() is None for process in running) and time.monotonic() < deadline
        time.sleep(0.01)


def kill(process):
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_a_killed_writer_resumes_to_the_same_bytes(whole, tmp_path):
    process = start(f"write_slowly({str(tmp_path)!r})")
    wait_for(tmp_path / "shards/00001", process)
    kill(process)
    with pytest.raises(UserError, match=r"not finished, \d of 4 shards .* the same command"):
        soft_targets.load(tmp_path)
    asked = []
    write(tmp_path, lambda rows: asked.extend(rows) or tiny_targets(rows))
    assert min(asked) >= 2 * SHARD  # only what was not written
    assert content(tmp_path) == content(whole)


def test_what_a_kill_during_a_shard_leaves_is_written_over(whole, tmp_path):
    def killed_in_the_third_shard(rows):
        if rows[-1] >= 2 * SHARD:
            raise KeyboardInterrupt
        return tiny_targets(rows)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, killed_in_the_third_shard)
    for name in ("00002.0a1b2c3d.partial", "00001.4e5f6071.partial"):
        (tmp_path / "shards" / name).mkdir()
        (tmp_path / "shards" / name / "ids.npy").write_bytes(b"half")
        (tmp_path / "shards" / name / "shard.json").write_text("{")
    (tmp_path / "meta.json.0a1b2c3d.partial").write_text("{")
    asked = []
    write(tmp_path, lambda rows: asked.extend(rows) or tiny_targets(rows))
    assert set(asked) == set(range(2 * SHARD, N))
    assert content(tmp_path) == content(whole)


def test_independent_writers_are_killed_and_resume(tmp_path):
    running = [
        start(f"write_until_killed({str(tmp_path)!r}, {first}, {first + 2})") for first in (0, 1)
    ]
    for number in (0, 1):
        wait_for(tmp_path / f"shards/{number:05d}", *running)
    for process in running:
        kill(process)
    with pytest.raises(UserError, match="not finished, 2 of 4 shards"):
        soft_targets.load(tmp_path)
    asked: list[int] = []
    for shards in ((0, 2), (1, 3)):
        with pytest.raises(UserError, match=r"shards/0000\d is not written yet: other writers"):
            soft_targets.finish(tmp_path, DIGESTS)
        write_shards(
            tmp_path,
            shards,
            lambda rows: asked.extend(rows) or tiny_targets(rows),
            encoding="sampled",
        )
    assert set(asked) == set(range(2 * SHARD, N))
    soft_targets.finish(tmp_path, DIGESTS)
    assert content(tmp_path) == content(write(tmp_path.with_name("one"), encoding="sampled"))


def test_of_two_writers_of_one_shard_the_first_counts(whole, tmp_path, monkeypatch):
    """The other one writes and finishes all while this one asks its teacher, or writes its files."""

    def at_its_first_batch(rows):
        if not tmp_path.joinpath("a").exists():
            write(tmp_path / "a")
        return tiny_targets(rows)

    write(tmp_path / "a", at_its_first_batch)
    assert content(tmp_path / "a") == content(whole)
    hashed = files.sha256

    def at_its_first_hash(path):
        monkeypatch.setattr(files, "sha256", hashed)
        assert path.name.endswith(".partial") and path.exists()
        write(tmp_path / "b")
        assert not path.exists()  # taken for what a killed writer left
        return hashed(path)

    monkeypatch.setattr(files, "sha256", at_its_first_hash)

    def the_first_shard_alone(rows):
        assert rows.max() < SHARD
        return tiny_targets(rows)

    write(tmp_path / "b", the_first_shard_alone)
    assert content(tmp_path / "b") == content(whole)


def test_an_error_of_writing_is_raised(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path)
    assert list((tmp_path / "shards").iterdir()) == []


def test_a_writer_of_other_shards_must_have_the_same_store(tmp_path):
    write_shards(tmp_path, [3])
    with pytest.raises(UserError, match="teacher is 'abc' there and 'xyz' now"):
        write_shards(tmp_path, [0], never, teacher="xyz")
    for number in (-1, 4):
        with pytest.raises(UserError, match=f"no shard {number}; the store has 4"):
            write_shards(tmp_path, [0, number], never)
    with pytest.raises(UserError, match="num_examples is 50 there and 49 now"):
        soft_targets.finish(tmp_path, DIGESTS[:-1])
    (tmp_path / "shards/00003/shard.json").write_text("{")
    with pytest.raises(UserError, match=r"00003/shard.json is damaged: .*; delete .*00003 and run"):
        write_shards(tmp_path, [0], never)


def write_as_one_of_two(how, directory):
    """What each process of a run does: notes which rows it was asked for; then one fails."""
    processes.start(how)
    index, asked = jax.process_index(), []
    write(Path(directory, "store"), lambda rows: asked.extend(rows.tolist()) or tiny_targets(rows))
    Path(directory, f"asked_{index}").write_text(json.dumps(sorted(set(asked))))
    sign = 1 - 2 * index  # process 1 has targets that are none
    try:
        write(Path(directory, "other"), lambda rows: tiny_targets(rows) * np.float32(sign))
    except UserError as error:
        processes.exit_process(1, f"error: {error}")


def test_processes_of_a_run_share_the_shards_out_and_end_together(whole, tmp_path):
    from run_processes import end_all, start_all

    script = "import sys; sys.path[:0] = ['tests', 'tests/distill_jax/soft_targets']; "
    script += "import test_shards as t; "
    script += f"t.write_as_one_of_two('{{}}', {str(tmp_path)!r})"
    ended = end_all(start_all(["-c", script], 2, 1), 120)
    assert [status for status, *_ in ended] == [1, 1], ended
    assert "process 1 of 2 ended with an error, which it has printed" in ended[0][2]
    assert "error: the soft targets are not probabilities with sum 1" in ended[1][2]
    assert content(tmp_path / "store") == content(whole)
    for index in (0, 1):
        expected = [row for row in range(N) if row // SHARD % 2 == index]
        assert json.loads((tmp_path / f"asked_{index}").read_text()) == expected
    assert not (tmp_path / "other/meta.json").exists()
