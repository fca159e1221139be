"""Several processes: the same numbers as one, and what happens when they are stopped or lost."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from command import ROOT, SMOKE, run
from jax.sharding import Mesh
from run_processes import end_all, start_all
from tfds_sets import prepare_tiny
from two_processes import train

from distill_jax import sharding
from distill_jax.data import images
from distill_jax.nets import read_meta
from experiments.common.training import curve

LIMIT = 60  # seconds within which the others must have noticed a lost process
RUN = (
    SMOKE,
    "--stages=teacher,soft_targets,distilled",
    "--config.data.train_examples=800",
    "--config.data.test_examples=200",
    "--config.teacher.hidden=(32,32)",
    "--config.teacher.epochs=12",
    "--config.teacher.save_every=2",
    "--config.distilled.hidden=(16,16)",
    "--config.distilled.epochs=12",
)


def study(workdir: Path, *flags: str) -> list[str]:
    return ["-m", "launch.main", *RUN, *flags, f"--workdir={workdir}", "--distributed={}"]


def outcome(workdir: Path):
    rows = json.loads((workdir / "results.json").read_text())
    curves = [
        curve(read_meta(workdir / f"stages/{stage}/{stage}")["history"])
        for stage in ("teacher", "distilled")
    ]
    return [row["value"] for row in rows], curves


def assert_same(found, expected) -> None:
    """The curves within rounding; a case or two of the 200 may lie on the other side."""
    for own, other in zip(found[1], expected[1], strict=True):
        assert own["epoch"] == other["epoch"]
        np.testing.assert_allclose(own["train_loss"], other["train_loss"], rtol=2e-4)
    np.testing.assert_allclose(found[0], expected[0], atol=2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    run(*RUN, f"--workdir={workdir}")
    return outcome(workdir)


def wait_for_checkpoint(running, workdir: Path, stage: str, step: int) -> None:
    folder = workdir / f"stages/{stage}/{stage}/checkpoints"
    deadline = time.monotonic() + 200
    while max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=0) < step:
        assert all(process.poll() is None for process in running), end_all(running)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_lost_process_a_stop_and_fewer_processes(tmp_path, undisturbed):
    # One is killed: the other says so, once, and in time.
    running = start_all(study(tmp_path), 2, 2)
    wait_for_checkpoint(running, tmp_path, "teacher", 4)
    running[1].kill()
    begun = time.monotonic()
    (status, output, errors), _ = end_all(running, LIMIT)
    assert time.monotonic() - begun < LIMIT
    assert status == 76 and "Traceback" not in errors, errors
    assert errors.count("process 1 of 2 was lost; the same command resumes") == 1
    assert re.search(r"process 0 of 2 is \d+ on .*: 2 of 4 devices", output)

    # Started again, they resume. SIGTERM to one stops both, at the same boundary, all saved.
    running = start_all(study(tmp_path), 2, 2)
    wait_for_checkpoint(running, tmp_path, "teacher", 8)
    running[1].send_signal(signal.SIGTERM)
    ended = end_all(running)
    assert [status for status, *_ in ended] == [75, 75], ended
    saved = {re.search(r"saved after unit (\d+) of 12", errors)[1] for *_, errors in ended}
    assert len(saved) == 1
    assert "teacher: 1/12" not in ended[0][1], ended
    # Process 1 says who it is and no more; but for the runtime, whose lines may come in between.
    assert ended[1][1].count("process 1 of 2 is") == 1 and "teacher" not in ended[1][1]

    # The same command, as one process and on another mesh, ends like a run that nothing happened to.
    run(*RUN, f"--workdir={tmp_path}", "--config.mesh.data=1")
    assert_same(outcome(tmp_path), undisturbed)


@pytest.fixture(scope="module")
def streaming(tmp_path_factory):
    """Flags that have the same digits read by grain from ArrayRecord files, 200 at a time."""
    folder = tmp_path_factory.mktemp("tfds")
    digits = images.load("embedded")
    splits = {
        name: (part["inputs"][:size], part["label"][:size])
        for name, part, size in (("train", digits.train, 800), ("test", digits.test, 200))
    }
    prepare_tiny(folder, splits, label_feature=tfds.features.ClassLabel(num_classes=10))
    return (
        "--config.data.source=tfds:tiny",
        f"--config.data.data_dir={folder}",
        "--config.data.block_examples=200",
    )


def test_first_process_lost_in_a_streamed_study(tmp_path, streaming):
    run(*RUN, *streaming, f"--workdir={tmp_path / 'undisturbed'}")
    workdir = tmp_path / "disturbed"
    running = start_all(study(workdir, *streaming), 2, 2)
    wait_for_checkpoint(running, workdir, "teacher", 6)  # within the second epoch of four blocks
    running[0].kill()
    _, (status, _, errors) = end_all(running, LIMIT)
    assert status == 76 and errors.count("process 0 of 2 was lost") == 1, errors
    ended = end_all(start_all(study(workdir, *streaming), 2, 1))
    assert [status for status, *_ in ended] == [0, 0], ended
    assert "teacher: 1/48" not in ended[0][1]
    assert_same(outcome(workdir), outcome(tmp_path / "undisturbed"))


def test_an_error_of_all_and_of_one(tmp_path):
    ended = end_all(start_all([*study(tmp_path), "--config.data.test_examples=100000"], 2, 1))
    for status, _, errors in ended:
        assert status == 1 and errors.count("error: data.test_examples is 100000") == 1, errors
        assert "lost" not in errors
    # An error of process 1 alone: process 0, which waits for it, gets the message.
    script = "from distill_jax import errors, processes as p; p.start('{}'); "
    script += "p.wait() if p.is_main() else p.exit_process(1, 'error: mine')"
    (status, _, errors), own = end_all(start_all(["-c", script], 2, 1))
    assert own[0] == 1 and own[2].count("error: mine") == 1, own
    assert status == 1 and errors.count("process 1 of 2 ended with an error") == 1, errors


def test_one_process_stops_at_sigterm(tmp_path):
    running = start_all([*study(tmp_path)[:-1], "--distributed=off"], 1, 1)
    wait_for_checkpoint(running, tmp_path, "teacher", 2)
    running[0].send_signal(signal.SIGTERM)
    [(status, _, errors)] = end_all(running)
    assert status == 75 and errors.startswith("stopped by SIGTERM"), errors


def test_same_numbers_on_two_processes_and_across_checkpoints(tmp_path):
    one = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES)
    params, history = train(one, tmp_path / "one", 2)
    expected = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
    losses = [record["train_loss"] for record in history]
    # The last one resumes from a checkpoint of eight devices of one process.
    train(sharding.make_mesh(2, 4, 1), tmp_path / "3", 1)
    runs = ["1,8,1:2", "2,2,2:2", "1,1,8:2", "1,2,4:2"]
    # As a module from the root: beside the script, tests/distill_jax would be found first.
    command = ["-m", "tests.two_processes", "{}", str(tmp_path), *runs]
    ended = end_all(start_all(command, 2, 4))
    assert [status for status, *_ in ended] == [0, 0], ended
    for number in range(len(runs)):
        np.testing.assert_allclose(np.load(tmp_path / f"{number}_loss.npy"), losses, rtol=1e-5)
        np.testing.assert_allclose(np.load(tmp_path / f"{number}.npy"), expected, atol=2e-5)
    # And back: what two processes wrote, split three ways, resumes in one.
    longer, _ = train(one, tmp_path / "one", 3)
    back, records = train(sharding.make_mesh(2, 4, 1), tmp_path / "1", 3)
    assert [record["unit"] for record in records] == [1, 2, 3]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), back, longer)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("127.0.0.1:1,2,2", "expected auto, off or HOST:PORT,COUNT,INDEX"),
        ("somewhere", "expected auto, off or HOST:PORT,COUNT,INDEX"),
        ("127.0.0.1:1,2,1", "process 0 could not be reached within 1 s"),
        ("auto", "the processes of the run could not be connected: coordinator_address"),
    ],
)
def test_a_failed_start_is_an_error(how, message):
    script = "from distill_jax import processes as p; p._CONNECT_SECONDS = 1; p.start({how!r})"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_"))}
    found = subprocess.run(
        [sys.executable, "-c", script.format(how=how)],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    assert found.returncode == 1 and "UserError" in found.stderr and message in found.stderr
