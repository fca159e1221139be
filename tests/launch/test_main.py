"""The command lines, as a user meets them."""

import gzip
import shutil
from pathlib import Path

import notebooks
import numpy as np
import pytest
import training_notes
from command import QUICK_TRAINING, ROOT, SMOKE, fails, run

from experiments.common.study import read_json
from experiments.mnist.config import get_config
from experiments.mnist.programs import programs

TINY = ("--config.data.train_examples=500", "--config.data.test_examples=200")
BASELINE = (SMOKE, *TINY, "--stages=baseline", "--config.baseline.epochs=1")
SHORT = (
    "--config.data.train_examples=1000",
    "--config.teacher.epochs=4",
    "--config.omissions.epochs=4",
)
TABLES = {
    "mnist",
    "mnist_costs",
    "mnist_temperature",
    "mnist_without_3",
    "mnist_only_7_8",
    "mnist_fraction",
    "mnist_unlabelled",
    "mnist_objectives",
    "mnist_shifts",
    "mnist_distorted",
}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    """The whole smoke preset, run once."""
    workdir = tmp_path_factory.mktemp("smoke")
    run(SMOKE, f"--workdir={workdir}", flags=QUICK_TRAINING)
    return workdir


def test_the_listed_programs_are_those_that_are_run(smoke):
    training_notes.check(smoke, programs, get_config("smoke"))


def test_the_study_measures_every_table(smoke):
    rows = read_json(smoke / "results.json")
    assert {row["table"] for row in rows} == TABLES
    costs = [row for row in rows if row["table"] == "mnist_costs"]  # of one net each
    rows = [row for row in rows if row not in costs]
    assert len({row["row"] for row in costs}) == 3
    assert all(np.isfinite(row["value"]) for row in rows + costs)
    members = [row for row in rows if row["row"].endswith("on labels of distorted images")]
    assert [row["seeds"] for row in members] == [2]
    one_seed = [row for row in rows if row not in members]
    assert all(len(row["values"]) == row["seeds"] == 1 for row in one_seed)
    paper = {(row["row"], row["metric"]): row["paper"] for row in rows if row["paper"] is not None}
    assert sorted(paper.values()) == [-7.6, 3.5, 13.2, 14, 47.3, 67, 74, 109, 133, 146, 206]
    assert {row["selection"] for row in rows if "best on test" not in row["row"]} == {"last"}


def test_several_seeds_and_held_out_examples(tmp_path):
    flags = ("--config.data.validation=300", "--config.seeds=(0,1)")
    stages = "--stages=teacher,soft_targets,without_3"
    run(SMOKE, f"--workdir={tmp_path}", *flags, *SHORT, stages)
    rows = read_json(tmp_path / "results.json")
    assert all(len(row["values"]) == row["seeds"] == 2 and row["std"] >= 0 for row in rows)
    shifted = [row for row in rows if "shifted" in row["row"]]
    for way, selection in (("best on test", "test"), ("validation", "validation")):
        assert {row["selection"] for row in shifted if way in row["row"]} == {selection}
    others = {row["selection"] for row in rows if row not in shifted or "prior" in row["row"]}
    assert others == {"last"}


def test_the_nets_learn_and_a_shifted_bias_brings_a_missing_digit_back(smoke):
    rows = read_json(smoke / "results.json")
    values = {(row["row"], row["metric"]): row["value"] for row in rows}
    assert values["teacher 2x256", "test_errors"] < 0.2 * 2000
    missing = values["without 3s", "errors_on_3"]
    best = values["without 3s, bias of 3 shifted (best on test)", "errors_on_3"]
    assert best < missing
    both = [
        values[f"only 7s and 8s{how}", "test_error_percent"]
        for how in ("", ", biases of 7 and 8 shifted (best on test)")
    ]
    assert both[1] < both[0]
    moved = ", images moved by up to 1 pixels"
    best = values[f"without 3s{moved}, bias of 3 shifted (best on test)", "errors_on_3"]
    assert best < values[f"without 3s{moved}", "errors_on_3"]


def test_a_second_run_finishes_at_once_and_changes_nothing(smoke):
    before = (smoke / "results.json").read_bytes()
    output = run(SMOKE, f"--workdir={smoke}")
    assert "running" not in output and output.count("finished before") == 17
    assert (smoke / "results.json").read_bytes() == before


def test_the_notebook_runs_from_top_to_bottom(smoke, tmp_path):
    rows, printed, pictures = notebooks.run("mnist", smoke, tmp_path)
    [row] = [row for row in rows if row["table"] == "mnist" and row["row"].startswith("distilled")]
    assert printed["student"] == f"{row['value']:.0f} errors of 2000 test examples\n"
    assert len(pictures["digits"]) == 1


def test_the_report_and_its_parts_are_there(smoke):
    html = (smoke / "report.html").read_text()
    for text in ("teacher 2x256", "146", "without 3s", "<svg"):
        assert text in html
    assert (smoke / "report.md").exists()
    assert list(smoke.glob("stages/teacher/teacher/events.out.tfevents.*"))


def test_a_workdir_belongs_to_one_config(smoke):
    before = (smoke / "results.json").read_bytes()
    message = fails(
        SMOKE,
        f"--workdir={smoke}",
        "--config.distilled.temperature=8",
    )
    assert "distilled.temperature is 20.0 there and 8.0 now" in message and str(smoke) in message
    assert (smoke / "results.json").read_bytes() == before


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(smoke, tmp_path):
    other = "--config.sweep.epochs=3"
    output = run(SMOKE, f"--workdir={tmp_path / 'run'}", f"--reuse={smoke}", other, "--dry-run")
    lines = output.splitlines()
    assert lines[0] == f"teacher: will be reused from {smoke}" and lines[6] == "sweep: will run"
    assert len(lines) == 18 and not list(tmp_path.iterdir())


def test_stages_of_an_equal_config_are_reused(smoke, tmp_path):
    output = run(
        SMOKE,
        f"--workdir={tmp_path}",
        f"--reuse={smoke}",
        "--config.distilled.temperature=8",
        "--stages=teacher,soft_targets,distilled",
    )
    assert output.count("reused") == 2 and "distilled: running" in output
    rows = read_json(tmp_path / "results.json")
    assert [row["row"] for row in rows] == ["teacher 2x256", "distilled 2x128, T=8"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((SMOKE, "--config.distilled.temprature=3"), "no such field; did you mean temperature?"),
        ((SMOKE, "--config.nosuch=3"), "--config.nosuch: no such field"),
        ((SMOKE, "--config.distilled.temperature=hot"), "could not convert string to float: 'hot'"),
        (("--config=experiments/mnist/config.py:tiny",), "there are smoke, default, full, paper"),
        (("--config=experiments/mnst/config.py",), "no config file 'experiments/mnst/config.py'"),
        ((SMOKE, "--stages=techer"), "no stage 'techer'; there are teacher, soft_targets"),
        ((SMOKE, "--stages=distilled"), "needs soft_targets"),
        ((SMOKE, "--config.mesh.data=7", "--stages=baseline"), "doesn't fit the 1 devices"),
        ((SMOKE, "--config.data.source=embeded", "--stages=baseline"), "tfds:"),
        ((SMOKE, "--config.data.test_examples=99999", "--stages=baseline"), "are 10000 examples"),
        ((SMOKE, "--config.baseline.batch_size=9999", "--stages=baseline"), "is 9999, but it is"),
        ((SMOKE, "--config.baseline.optimizer=adamw", "--stages=baseline"), "'adam', 'sgd' or"),
        ((SMOKE, "--config.distilled.temperature=-4"), "temperature is -4.0; allowed: above 0"),
        ((SMOKE, "--stages="), "names of stages are expected"),
        ((SMOKE, "--part=0,2", "--reuse=a"), "leave --reuse out"),
    ],
)  # fmt: skip
def test_mistakes_end_with_one_clear_message(tmp_path, flags, message):
    assert message in fails(*flags, f"--workdir={tmp_path / 'run'}")


def test_a_damaged_data_file_is_named(tmp_path):
    shutil.copytree(ROOT / "distill_jax/data/mnist", tmp_path / "mnist")
    damaged = tmp_path / "mnist/train-images-idx3-ubyte.gz"
    pixels = bytearray(gzip.decompress(damaged.read_bytes()))
    pixels[123456] ^= 1
    damaged.write_bytes(gzip.compress(bytes(pixels), 1))
    message = fails(
        *BASELINE, f"--config.data.data_dir={tmp_path / 'mnist'}", f"--workdir={tmp_path / 'run'}"
    )
    assert str(damaged) in message and "SHA-256" in message


def test_a_diverging_run_stops_and_loses_nothing(tmp_path):
    run(*BASELINE, f"--workdir={tmp_path / 'good'}")
    before = (tmp_path / "good/results.json").read_bytes()
    diverging = (*BASELINE, "--config.baseline.learning_rate=1e38")
    message = fails(*diverging, f"--workdir={tmp_path / 'bad'}")
    assert "the loss of member 0 is" in message and "step" in message
    assert not (tmp_path / "bad/results.json").exists()
    assert (tmp_path / "good/results.json").read_bytes() == before


def test_two_processes_can_not_share_a_workdir(tmp_path):
    import fcntl

    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process is at work" in fails(*BASELINE, f"--workdir={tmp_path}")


def test_help_reads_well():
    import subprocess
    import sys

    text = subprocess.run(
        [sys.executable, "-m", "launch.main", "--help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    for word in ("python -m launch.main", "--config", "--workdir", "--stages", "--reuse"):
        assert word in text


def test_programs_are_compiled_for_another_machine_and_nothing_is_run(tmp_path):
    found = tmp_path / "found.json"
    printed = run(*BASELINE, "--compile_for=cpu:2", f"--json={found}")
    first, training, _, last = printed.splitlines()
    assert first == "cpu:2, mesh 1x2x1"
    assert training.startswith("  training baseline: ") and training.endswith(": fits")
    assert last.startswith("2 programs; what the compilers said is in ")
    record = read_json(found)[0]
    assert (record["what"], record["fits"]) == ("training", True)
    assert record["sent"][-1][:2] == ["all-reduce", "data"]
    assert list(tmp_path.iterdir()) == [found]


def test_what_does_not_fit_the_machine_is_said_before_anything_is_compiled():
    assert "--compile_for=v9:4: expected a chip and how many" in fails(SMOKE, "--compile_for=v9:4")
    message = "baseline: batch_size is 100, which doesn't divide over 3 data devices"
    assert message in fails(*BASELINE, "--config.baseline.batch_size=100", "--compile_for=cpu:3")


def test_a_run_needs_a_workdir():
    assert "--workdir is missing" in fails(SMOKE)
