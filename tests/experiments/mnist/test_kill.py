"""Processes that are really killed resume from their last checkpoint, to the same numbers."""

import signal
import time
from pathlib import Path

import pytest
from command import SMOKE, run, start

from distill_jax.nets import read_meta
from experiments.common.study import read_json
from experiments.common.training import curve

# Wide enough that a checkpoint takes a while to write, on few enough examples that epochs are short.
RUN = (
    SMOKE,
    "--stages=baseline",
    "--config.data.train_examples=600",
    "--config.data.test_examples=200",
    "--config.baseline.hidden=(1200,1200)",
    "--config.baseline.epochs=14",
    "--config.baseline.save_every=2",
)
CHECKPOINTS = Path("stages/baseline/baseline/checkpoints")


def outcome(workdir: Path):
    rows = read_json(workdir / "results.json")
    net = read_meta(workdir / "stages/baseline/baseline")
    return [{**row, "seconds": None} for row in rows], curve(net["history"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    run(*RUN, f"--workdir={workdir}")
    return outcome(workdir)


def kill_when(workdir: Path, sighted) -> None:
    """Starts the run and kills it with -9 as soon as `sighted` in its checkpoints' folder."""
    process = start(*RUN, f"--workdir={workdir}")
    deadline = time.monotonic() + 120
    while not sighted(workdir / CHECKPOINTS):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (workdir / "results.json").exists()


def finished_steps(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.glob("*") if path.name.isdigit()]


def test_killed_during_training(tmp_path, undisturbed):
    kill_when(tmp_path, lambda folder: max(finished_steps(folder), default=0) >= 6)
    before = read_json(tmp_path / "config.json")
    output = run(*RUN, f"--workdir={tmp_path}")
    assert "baseline: 2/14" not in output  # it resumed, and did not go back to the start
    assert outcome(tmp_path) == undisturbed
    assert read_json(tmp_path / "config.json") == before


def test_killed_during_a_checkpoint_write(tmp_path, undisturbed):
    def writing(folder: Path) -> bool:
        return bool(finished_steps(folder)) and any(folder.glob("*.orbax-checkpoint-tmp*"))

    for _ in range(5):  # a kill may come just after the write was finished
        kill_when(tmp_path, writing)
        if any((tmp_path / CHECKPOINTS).glob("*.orbax-checkpoint-tmp*")):
            break
    assert any((tmp_path / CHECKPOINTS).glob("*.orbax-checkpoint-tmp*"))
    run(*RUN, f"--workdir={tmp_path}")
    assert outcome(tmp_path) == undisturbed
    assert not any((tmp_path / CHECKPOINTS).glob("*.orbax-checkpoint-tmp*"))
