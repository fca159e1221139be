"""Checkpoints: exact, asynchronous, and safe against damage and full disks."""

import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from command import ROOT
from jax.sharding import NamedSharding, PartitionSpec

from distill_jax import checkpoints, files, sharding
from distill_jax.errors import UserError
from distill_jax.train_step import TrainState

# Orbax leaves coroutines behind when it meets a damaged file.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_state(seed=0, width=32):
    random = np.random.default_rng(seed)
    weights = jnp.asarray(random.standard_normal((64, width)), jnp.float32)
    params = {"hidden_0": {"kernel": weights, "bias": weights[0].astype(jnp.bfloat16)}}
    return TrainState(jnp.int32(seed), params, (jax.tree.map(jnp.negative, params), ()))


def save(manager, step, **metrics):
    checkpoints.save(
        manager, step, make_state(step), [{"unit": step, "loss": 0.1}], metrics or None
    )
    checkpoints.wait(manager)


def assert_restored(restored, step):
    assert restored.step == step and restored.history == [{"unit": step, "loss": 0.1}]
    assert jax.tree.structure(restored.state) == jax.tree.structure(make_state())
    tiny.assert_equal(restored.state, make_state(step))
    jax.tree.map(lambda x, y: x.dtype == y.dtype or pytest.fail(), restored.state, make_state())


def steps_in(directory):
    return sorted(int(path.name) for path in directory.iterdir())


def test_an_empty_folder_has_no_checkpoint(tmp_path):
    with checkpoints.open_dir(tmp_path / "new", "error") as manager:
        assert checkpoints.restore_newest(manager, make_state()) is None
        assert checkpoints.restore_best(manager, make_state(), "error") is None


def test_a_state_comes_back_exactly(tmp_path):
    with checkpoints.open_dir(tmp_path) as manager:
        save(manager, 3)
        assert_restored(checkpoints.restore_newest(manager, make_state()), 3)
    with checkpoints.open_dir(tmp_path) as manager:  # as another process would
        assert_restored(checkpoints.restore_newest(manager, make_state()), 3)


def test_a_checkpoint_holds_the_state_as_it_was_when_saved(tmp_path):
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x + x, state), donate_argnums=0)
    with checkpoints.open_dir(tmp_path) as manager:
        state = make_state(5, width=4096)
        history = [{"unit": 4}]
        checkpoints.save(manager, 5, state, history)
        history.append({"unit": 5})
        deleted = []
        for _ in range(3):
            donated, state = state, advance(state)
            deleted.append(donated.params["hidden_0"]["kernel"].is_deleted())
        assert any(deleted)  # a buffer that is just being read may be kept
        checkpoints.wait(manager)
        restored = checkpoints.restore_newest(manager, state)
    tiny.assert_equal(restored.state, make_state(5, width=4096))
    assert restored.history == [{"unit": 4}]


def test_the_last_two_and_the_best_are_kept(tmp_path):
    with checkpoints.open_dir(tmp_path, "error") as manager:
        for step, error in [(1, 0.5), (2, 0.1), (3, 0.4), (4, 0.3)]:
            save(manager, step, error=error)
        assert steps_in(tmp_path) == [2, 3, 4]
    with checkpoints.open_dir(tmp_path, "error") as manager:  # as after a resumption
        save(manager, 5, error=0.2)
        assert steps_in(tmp_path) == [2, 4, 5]
        assert_restored(checkpoints.restore_newest(manager, make_state()), 5)
        assert_restored(checkpoints.restore_best(manager, make_state(), "error"), 2)
        assert checkpoints.restore_best(manager, make_state(), "other") is None


def test_without_a_metric_the_last_two_are_kept(tmp_path):
    with checkpoints.open_dir(tmp_path) as manager:
        for step in (1, 2, 3, 4):
            save(manager, step)
        assert steps_in(tmp_path) == [3, 4]
        assert checkpoints.restore_best(manager, make_state(), "error") is None


def biggest_file(directory):
    files = [path for path in directory.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_a_damaged_newest_checkpoint_is_skipped(tmp_path, damage, caplog):
    with checkpoints.open_dir(tmp_path) as manager:
        save(manager, 1)
        save(manager, 2)
    damage(biggest_file(tmp_path / "2"))
    with checkpoints.open_dir(tmp_path) as manager:
        with caplog.at_level(logging.WARNING):
            assert_restored(checkpoints.restore_newest(manager, make_state()), 1)
        assert f"checkpoint {tmp_path}/2 is damaged and skipped" in caplog.text
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.damaged"]
        save(manager, 2)  # the run resumes and writes it again
        assert_restored(checkpoints.restore_newest(manager, make_state()), 2)


def test_a_damaged_best_checkpoint_is_named(tmp_path):
    with checkpoints.open_dir(tmp_path, "error") as manager:
        for step, error in [(1, 0.1), (2, 0.4), (3, 0.3)]:
            save(manager, step, error=error)
        flip(biggest_file(tmp_path / "1"))
        with pytest.raises(UserError, match=f"best checkpoint {tmp_path}/1 is damaged"):
            checkpoints.restore_best(manager, make_state(), "error")


def test_when_every_checkpoint_is_damaged_none_is_deleted(tmp_path):
    with checkpoints.open_dir(tmp_path) as manager:
        save(manager, 1)
    flip(biggest_file(tmp_path / "1"))
    message = "delete the folder to start again"
    with checkpoints.open_dir(tmp_path) as manager, pytest.raises(UserError, match=message):
        checkpoints.restore_newest(manager, make_state())
    assert steps_in(tmp_path) == [1]


def test_damage_to_any_file_is_harmless_or_noticed(tmp_path):
    with checkpoints.open_dir(tmp_path / "good") as manager:
        save(manager, 1)
        save(manager, 2)
    names = [
        path.relative_to(tmp_path / "good")
        for path in (tmp_path / "good" / "2").rglob("*")
        if path.is_file()
    ]
    assert len(names) > 5
    for number, name in enumerate(names):
        damaged = tmp_path / str(number)
        subprocess.run(["cp", "-r", tmp_path / "good", damaged], check=True)
        truncate(damaged / name)
        with checkpoints.open_dir(damaged) as manager:
            restored = checkpoints.restore_newest(manager, make_state())
        assert_restored(restored, restored.step)


def test_a_bit_that_the_storage_does_not_check_is_noticed(tmp_path):
    state = make_state()
    bits = jax.lax.bitcast_convert_type(state.params["hidden_0"]["kernel"], jnp.uint32)
    sums = set()
    for row, column, bit in [(0, 0, 0), (0, 0, 31), (5, 7, 0), (7, 5, 0), (63, 31, 12)]:
        changed = bits.at[row, column].set(bits[row, column] ^ jnp.uint32(1 << bit))
        kernel = jax.lax.bitcast_convert_type(changed, jnp.float32)
        params = {"hidden_0": {**state.params["hidden_0"], "kernel": kernel}}
        sums.add(int(checkpoints.checksum(state._replace(params=params))))
    assert len(sums | {int(checkpoints.checksum(state))}) == 6


def test_what_a_killed_save_left_is_cleaned_up(tmp_path):
    with checkpoints.open_dir(tmp_path) as manager:
        save(manager, 1)
    (tmp_path / "1").rename(tmp_path / "2.orbax-checkpoint-tmp-0")
    with checkpoints.open_dir(tmp_path) as manager:
        assert checkpoints.restore_newest(manager, make_state()) is None
        save(manager, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


@pytest.mark.parametrize("metric", [None, "error"])
def test_what_a_killed_deletion_left_is_cleaned_up(tmp_path, metric):
    """Whatever is left of an old checkpoint, an empty folder too, the run resumes from the newest."""
    with checkpoints.open_dir(tmp_path / "good", metric) as manager:
        for step in (1, 2):
            save(manager, step, **({metric: 1 / step} if metric else {}))
    entries = sorted(path.name for path in (tmp_path / "good" / "1").iterdir())
    assert len(entries) >= 4
    for removed in range(1, len(entries) + 1):
        folder = tmp_path / str(removed)
        shutil.copytree(tmp_path / "good", folder)
        for name in entries[:removed]:
            files.remove(folder / "1" / name)
        with checkpoints.open_dir(folder, metric) as manager:
            assert_restored(checkpoints.restore_newest(manager, make_state()), 2)
            if metric:
                assert_restored(checkpoints.restore_best(manager, make_state(), metric), 2)
            for step in (3, 4):
                save(manager, step, **({metric: 1 / step} if metric else {}))
        assert {3, 4} <= set(steps_in(folder))


def test_a_state_of_another_shape_deletes_nothing(tmp_path):
    with checkpoints.open_dir(tmp_path) as manager:
        save(manager, 1)
        save(manager, 2)
        message = re.escape(f"[1, 2] in {tmp_path} can be read as this training state")
        with pytest.raises(UserError, match=message):
            checkpoints.restore_newest(manager, make_state(width=16))
        assert_restored(checkpoints.restore_newest(manager, make_state()), 2)


def every_kind():
    """Leaves of all kinds that an optimizer or a quantised net may hold."""
    random = np.random.default_rng(0)
    dtypes = "bool int2 uint2 int4 uint4 float4_e2m1fn float8_e4m3fn int8 uint8 float16 complex64"
    tree = {name: jnp.asarray(random.integers(0, 2, (8, 3)), name) for name in dtypes.split()}
    keys = {
        impl: jax.random.split(jax.random.key(1, impl=impl), 8) for impl in ("rbg", "threefry2x32")
    }
    empty = {"empty": jnp.zeros((0, 3)), "none": jnp.zeros((2, 0), bool)}
    return {**tree, **keys, **empty, "scalar": jnp.float32(2.5), "key": jax.random.key(7)}


def bits(leaf):
    return (
        np.asarray(leaf) if not checkpoints.is_key(leaf) else np.asarray(jax.random.key_data(leaf))
    )


def test_leaves_of_every_kind_come_back_bit_for_bit_on_a_mesh_too(tmp_path):
    mesh = sharding.make_mesh(1, 8)

    def lay_out(leaf):
        axes = PartitionSpec("data") if leaf.shape[:1] == (8,) else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, axes))

    plain = every_kind()
    spread = jax.tree.map(lay_out, plain)
    with checkpoints.open_dir(tmp_path) as manager:
        checkpoints.save(manager, 1, spread, [])
        checkpoints.wait(manager)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), spread
        )
        for like in (plain, spread, shapes):
            found = checkpoints.restore_newest(manager, like).state
            for name, leaf in found.items():
                assert leaf.dtype == plain[name].dtype
                np.testing.assert_array_equal(bits(leaf), bits(plain[name]))
                assert leaf.sharding.is_equivalent_to(like[name].sharding, leaf.ndim)
    sums = {int(checkpoints.checksum(plain)), int(checkpoints.checksum(spread))}
    assert len(sums) == 1
    for name in ("bool", "int4", "float8_e4m3fn", "complex64"):
        changed = (
            plain[name].at[0, 0].set(jnp.logical_not(plain[name][0, 0]).astype(plain[name].dtype))
        )
        sums.add(int(checkpoints.checksum({**plain, name: changed})))
    sums.add(int(checkpoints.checksum({**plain, "key": jax.random.key(8)})))
    assert len(sums) == 6


def test_a_folder_with_anything_else_is_refused_and_stays(tmp_path):
    for name in ("thesis.tex", "3/default/weights", "2.partial"):
        folder = tmp_path / name.replace("/", "_")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
        with pytest.raises(UserError, match="checkpoints is not written there"):
            checkpoints.open_dir(folder)
        assert (folder / name).read_text() == "mine"


def test_restore_onto_another_mesh(tmp_path):
    def on(mesh, axis):
        sharding = NamedSharding(mesh, PartitionSpec(axis))
        return jax.device_put({"kernel": make_state().params["hidden_0"]["kernel"]}, sharding)

    state = on(sharding.make_mesh(2, 4), "member")
    like = on(sharding.make_mesh(1, 8), "data")
    with checkpoints.open_dir(tmp_path) as manager:
        checkpoints.save(manager, 1, state, [])
        checkpoints.wait(manager)
        restored = checkpoints.restore_newest(manager, like).state
        single = checkpoints.restore_newest(manager, jax.device_put(state, jax.devices()[0])).state
    tiny.assert_equal(restored, state)
    tiny.assert_equal(single, state)
    assert restored["kernel"].sharding == like["kernel"].sharding
    assert restored["kernel"].sharding.shard_shape((64, 32)) == (8, 32)


# A megabyte in a file system of its own where this process may mount one, else a limit on the size
# of files; both fail in real writes.
FULL_DISK = textwrap.dedent("""
    import os, resource, sys
    import jax.numpy as jnp, numpy as np
    from distill_jax import checkpoints
    from distill_jax.errors import UserError

    disk, mode, mounted = sys.argv[1], sys.argv[2], sys.argv[3] == "mounted"
    directory = f"{disk}/checkpoints"

    def state(kilobytes, seed):
        bits = np.random.default_rng(seed).integers(0, 2**32, kilobytes * 256, np.uint32)
        return {"w": jnp.asarray(bits)}

    kilobytes = 200
    with checkpoints.open_dir(directory) as manager:
        checkpoints.save(manager, 1, state(kilobytes, 1), [])
        checkpoints.wait(manager)
        if mode == "announced":  # the check before the write finds too little room
            kilobytes_wanted = 2000 if mounted else 2**28
            like = type("Huge", (), {"nbytes": kilobytes_wanted * 1024})()
            broken = {"w": like}
        else:  # there is room for the arrays, not for all that goes with them
            broken = state(kilobytes, 2)
            if mounted:
                free = os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize
                with open(f"{disk}/filler", "wb") as file:
                    file.write(bytes(free - kilobytes * 1024 - 8192))
            else:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            checkpoints.save(manager, 2, broken, [])
            checkpoints.wait(manager)
        except UserError as error:
            print("UserError:", error, flush=True)
    with checkpoints.open_dir(directory) as manager:
        restored = checkpoints.restore_newest(manager, state(kilobytes, 0))
        assert restored.step == 1
        np.testing.assert_array_equal(restored.state["w"], state(kilobytes, 1)["w"])
        print("kept", flush=True)
""")


def can_mount():
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.parametrize("mode", ["announced", "in the write"])
def test_a_full_disk_is_one_error_and_keeps_what_there_is(tmp_path, mode):
    mounted = can_mount()
    script = tmp_path / "script.py"
    script.write_text(FULL_DISK)
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [sys.executable, str(script), str(disk), mode, "mounted" if mounted else "limited"]
    if mounted:
        mount = f'mount -t tmpfs -o size=1m none {disk} && exec "$@"'
        command = ["unshare", "-rm", "sh", "-c", mount, "sh", *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and lines[1] == "kept", done.stdout + done.stderr
    assert lines[0].startswith("UserError: ") and str(disk) in lines[0]
    assert "earlier" in lines[0] and "kept" in lines[0]
    assert len(done.stderr.splitlines()) <= 1, done.stderr
