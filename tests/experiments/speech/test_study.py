"""The speech study as a user runs it, on a part of the embedded recordings."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import notebooks
import numpy as np
import pytest
import training_notes
from command import fails, kill_when, run, start

from distill_jax import models, soft_targets
from experiments.common import report
from experiments.common.study import read_json
from experiments.common.training import build_model
from experiments.speech.config import get_config
from experiments.speech.programs import programs

SMOKE = "--config=experiments/speech/config.py:smoke"
FEW = (
    "--config.data.train_frames=12000",
    "--config.data.validation_frames=2000",
    "--config.data.test_frames=2000",
    "--config.ensemble.at_once=1",
    "--config.ensemble.epochs=3",
    "--config.ensemble.report_every=3",
    "--config.soft_targets.shard_rows=2048",
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("speech") / "run"
    run(SMOKE, f"--workdir={path}")
    return path


def test_the_listed_programs_are_those_that_are_run(workdir):
    training_notes.check(workdir, programs, get_config("smoke"))


def value(rows, table, row, metric):
    """Of the row of that name, or of the only one whose name begins so."""
    found = {
        one["row"]: one["value"]
        for one in rows
        if one["table"] == table and one["metric"] == metric and one["row"].startswith(row)
    }
    assert row in found or len(found) == 1, (table, row, metric, found)
    return found[row] if row in found else next(iter(found.values()))


def test_all_tables_have_their_rows(workdir):
    rows = report.load_rows(workdir / "results.json")
    for row in ("baseline", "3xEnsemble", "distilled, T=2"):
        assert 0 < value(rows, "speech", row, "frame_accuracy") < 100
        errors = sum(
            value(rows, "speech", row, name)
            for name in ("substitutions", "deletions", "insertions")
        )
        words = value(rows, "speech", row, "words")
        assert 0 < words <= 20
        rate = value(rows, "speech", row, "word_error_rate")
        assert rate == pytest.approx(100 * errors / words)
    own = value(rows, "speech", "the decoder's own", "word_error_rate")
    assert 0 <= own < 150
    base, top, student = (
        value(rows, "speech", row, "frame_accuracy")
        for row in ("baseline", "3xEnsemble", "distilled")
    )
    assert value(rows, "speech", "baseline, 6 epochs", "frame_accuracy") > 0
    assert base < min(student, top)  # what the paper shows, in seconds too
    share = value(rows, "speech", "distilled", "gain_transferred_percent")
    assert share == pytest.approx(100 * (student - base) / (top - base))
    picked = value(rows, "speech_temperature", "picked", "temperature")
    by_temperature = {
        t: value(rows, "speech_temperature", f"T={t:g}", "validation_frame_accuracy")
        for t in (1.0, 2.0)
    }
    assert picked == max(by_temperature, key=lambda t: by_temperature[t])
    for row in (
        "hard targets, all",
        "hard targets, 10 % of the training set, early",
        "soft targets",
    ):
        assert value(rows, "speech_fraction", row, "train_frame_accuracy") > 0
    soft, hard, every = (
        value(rows, "speech_fraction", f"{row}", "frame_accuracy")
        for row in (
            "soft targets, 10 %",
            "hard targets, 10 % of the training set, last",
            "hard targets, all",
        )
    )
    assert hard < soft < every
    kept = value(rows, "speech_fraction", "soft targets, 10 %", "kept_percent_of_all_data")
    assert kept == pytest.approx(100 * soft / every, rel=1e-3)
    compared = {
        (row["row"], row["metric"]): row for row in rows if row["table"] == "speech_differences"
    }
    assert len(compared) == 6
    gain = compared["3xEnsemble less baseline", "frame_accuracy"]
    assert gain["value"] == pytest.approx(top - base, rel=1e-3) and gain["seeds"] == 3
    assert gain["interval"][0] < gain["value"] < gain["interval"][1]
    states = (value(rows, "speech_compression", "dense", "bytes_per_frame") - 8) // 4
    draws = [f"draws={soft_targets.most_draws(size, int(states))}" for size in (36, 68)]
    for row, size in (("k=8", 44), (draws[0], 44), ("k=16", 76), (draws[1], 76)):
        assert value(rows, "speech_compression", row, "bytes_per_frame") == size
        own, dense, less = (
            value(rows, "speech_compression", *of)
            for of in (
                (row, "frame_accuracy"),
                ("dense", "frame_accuracy"),
                (row, "frame_accuracy_less_dense"),
            )
        )
        assert less == pytest.approx(own - dense)
    for metric in ("kl", "total_variation", "gradient_bias"):
        lost = [value(rows, "speech_compression", f"k={k}", metric) for k in (8, 16)]
        assert lost[0] > lost[1] > 0
    drawn = [row for row in rows if row["row"].startswith("draws=")]
    assert not [row for row in drawn if row["metric"] == "kl"]  # it is infinite
    assert {row["table"] for row in rows} == {
        "speech",
        "speech_differences",
        "speech_costs",
        "speech_mean",
        "speech_temperature",
        "speech_compression",
        "speech_fraction",
        "speech_unlabelled",
    }
    stopped = [row for row in rows if "early stopping" in row["row"]]
    assert {row["selection"] for row in stopped} == {"validation"}


def test_the_report_has_the_figures(workdir):
    page = (workdir / "report.html").read_text()
    for name in ("temperature", "ensemble_size", "overfitting", "compression", "utterance"):
        assert (workdir / "figures" / f"{name}.png").exists()
        assert name in page
    assert "58.9" in page and "44.5" in page  # the paper's numbers


def test_a_second_run_does_nothing_anew(workdir):
    before = (workdir / "results.json").read_text()
    output = run(SMOKE, f"--workdir={workdir}")
    assert "running" not in output and output.count("finished before") == 9
    assert (workdir / "results.json").read_text() == before


def test_the_notebook_runs_from_top_to_bottom(workdir, tmp_path):
    rows, printed, _ = notebooks.run("speech", workdir, tmp_path)
    accuracy = value(rows, "speech", "distilled", "frame_accuracy")
    assert printed["student"] == f"2 students, frame accuracy {accuracy:.2f} %\n"
    assert re.search(r"^aligned: .+\nfound: +.+\n\d+\.\d %", printed["utterance"], re.MULTILINE)
    [said] = re.findall(r"^said: +(.+)$", printed["utterance"], re.MULTILINE)
    assert printed["words"].startswith(f"said:  {said}\nheard: ")


def test_stores_of_another_alignment_are_refused(workdir, tmp_path):
    """Stages copied by hand into the directory of a config with other classes."""
    other = tmp_path / "other"
    stages = ("ensemble", "soft_targets")
    for name in stages:
        target = other / "stages" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(workdir / "stages" / name)
    config = read_json(workdir / "config.json")
    config["data"]["min_frames"] = 200
    (other / "config.json").write_text(json.dumps(config))
    message = fails(
        SMOKE, f"--workdir={other}", "--config.data.min_frames=200", "--stages=fractions"
    )
    assert "alignment" in message and "classes" in message and "not" in message


def test_the_paper_preset_has_85_million_parameters():
    net = build_model(get_config("paper").ensemble, num_classes=14_000)
    windows = jax.ShapeDtypeStruct((1, 26, 40), jnp.uint8)
    params = jax.eval_shape(net.init, jax.random.key(0), windows)
    layers = [1040] + [2560] * 8 + [14_000]
    expected = sum((a + 1) * b for a, b in itertools.pairwise(layers))
    assert models.parameter_count(params) == expected
    assert 84e6 < expected < 85.5e6


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The ensemble and its soft targets, member by member."""
    path = tmp_path_factory.mktemp("whole") / "run"
    run(SMOKE, *FEW, "--stages=ensemble,soft_targets", f"--workdir={path}")
    return path


def test_members_trained_as_jobs_side_by_side(whole, tmp_path):
    """Two processes train the ensemble's members; the stage then only reads them."""
    arguments = (SMOKE, *FEW, "--stages=ensemble", f"--workdir={tmp_path}")
    jobs = [start(*arguments, f"--part={first},2") for first in (0, 1)]
    outputs = [job.communicate() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    for (output, _), own in zip(outputs, ({0, 2}, {1}), strict=True):
        assert {int(found) for found in re.findall(r"member_(\d): 1/1", output)} == own
    assert not (tmp_path / "stages/ensemble/stage.json").exists()
    assert "member_" not in run(*arguments)
    rows = without_seconds(tmp_path / "results.json")
    assert rows and rows == without_seconds(whole / "results.json")


def test_a_killed_run_ends_with_the_same_numbers(whole, tmp_path):
    """Killed while a member trains and once more while soft targets are written."""
    arguments = (SMOKE, *FEW, "--stages=ensemble,soft_targets")
    killed = tmp_path / "killed"
    for sign in ("stages/ensemble/member_1/checkpoints", "stages/soft_targets/*/shards/00001"):
        kill_when(killed, sign, arguments)
    run(*arguments, f"--workdir={killed}")
    for path in ("results.json", "stages/soft_targets/ensemble/meta.json"):
        assert without_seconds(killed / path) == without_seconds(whole / path)


def without_seconds(path):
    content = json.loads(path.read_text())
    if isinstance(content, list):
        return [{**row, "seconds": None} for row in content]
    return content


def test_streamed_from_disk(tmp_path):
    """The whole chain with blocks of 4000 frames; resumed blocks are tested in test_streaming."""
    output = run(
        SMOKE,
        *FEW,
        "--config.data.block_frames=4000",
        "--stages=ensemble,soft_targets,distilled,fractions",
        f"--workdir={tmp_path / 'run'}",
    )
    assert "member_0: 12/12" in output  # 3 epochs of 4 blocks
    rows = report.load_rows(tmp_path / "run" / "results.json")
    assert value(rows, "speech", "distilled", "frame_accuracy") > 1


def test_bad_sources(tmp_path):
    message = fails(SMOKE, f"--workdir={tmp_path}/run", f"--config.data.source={tmp_path}")
    assert "no prepared speech_frames set" in message and str(tmp_path) in message
    np.testing.assert_equal((tmp_path / "run" / "results.json").exists(), False)
