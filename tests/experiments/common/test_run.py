"""What is checked before a study is run, and what a run would do."""

import json
import re
from pathlib import Path

import pytest

from distill_jax import files
from distill_jax.errors import UserError
from experiments.common.run import POINTS, Study, check_mesh, plan, run_study
from experiments.common.study import Stage, stage_key
from experiments.mnist import study
from experiments.mnist.config import get_config

STAGES = {stage.name: stage for stage in study.STAGES}


def plan_of(config, workdir, **more):
    return plan(config, Path(workdir), study.STUDY, **more)


def finish(workdir, config, *names):
    """A working directory in which some stages look finished."""
    (workdir / "stages").mkdir(parents=True)
    (workdir / "config.json").write_text(config.to_json())
    keys = {}
    for name in names:
        keys[name] = stage_key(config, STAGES[name], {n: keys[n] for n in STAGES[name].needs})
        (workdir / "stages" / name).mkdir()
        found = {"key": keys[name], "seconds": 1.0, "rows": []}
        (workdir / "stages" / name / "stage.json").write_text(json.dumps(found))


def test_a_plan_says_what_a_run_would_do_and_writes_nothing(tmp_path):
    config, other = get_config("smoke"), get_config("smoke")
    other.distilled.temperature = 3.0
    finish(tmp_path / "runs", config, "teacher")
    finish(tmp_path / "others", other, "teacher", "soft_targets", "distilled")
    before = sorted(tmp_path.rglob("*"))
    lines = plan_of(config, tmp_path / "runs", reuse=[tmp_path / "others"])
    assert lines[:4] == [
        "teacher: finished before",
        f"soft_targets: will be reused from {tmp_path / 'others'}",
        "baseline: will run",
        "distilled: will run",
    ]
    assert len(lines) == len(STAGES) + 1 and lines[-1] == "report: will be drawn"
    assert sorted(tmp_path.rglob("*")) == before
    lines = plan_of(config, tmp_path / "new", only=["teacher", "soft_targets"])
    assert lines == ["teacher: will run", "soft_targets: will run"]
    assert not (tmp_path / "new").exists()


def test_the_folder_of_a_sweep_stands_for_its_points(tmp_path):
    config = get_config("smoke")
    finish(tmp_path / "sweep/b=1", config, "teacher")
    (tmp_path / "sweep" / POINTS).write_text(json.dumps(["a=1", "b=1"]))
    lines = plan_of(config, tmp_path / "run", reuse=[tmp_path / "sweep"])
    assert lines[0] == f"teacher: will be reused from {tmp_path / 'sweep/b=1'}"


def test_what_is_wrong_ends_before_anything_is_run(tmp_path, monkeypatch):
    config, other = get_config("smoke"), get_config("smoke")
    other.teacher.epochs = 20
    finish(tmp_path / "there", other)
    (tmp_path / "file").touch()
    elsewhere = get_config("smoke")
    elsewhere.data.data_dir = str(tmp_path)
    wrong = get_config("smoke")
    wrong.teacher.learning_rate = -1.0
    for arguments, more, message in (
        ((config, tmp_path / "new"), {"only": ["techer"]}, "no stage 'techer'; there are teacher,"),
        (
            (config, tmp_path / "new"),
            {"only": ["distilled"]},
            "distilled needs soft_targets, not finished",
        ),
        ((wrong, tmp_path / "new"), {}, "--config.teacher.learning_rate is -1.0; allowed: above 0"),
        ((config, tmp_path / "there"), {}, "teacher.epochs is 20 there and 16 now"),
        ((config, tmp_path / "file"), {}, f"{tmp_path / 'file'} is no folder"),
        ((config, tmp_path / "file/run"), {}, f"{tmp_path / 'file'} is no folder"),
        ((config, "/proc/run"), {}, "--workdir=/proc/run: /proc can't be written to"),
        (
            (config, tmp_path / "new"),
            {"reuse": ["a,b"]},
            "--reuse=a,b is no working directory of a study",
        ),
        ((config, tmp_path / "new"), {"reuse": [tmp_path]}, "it has no config.json"),
        (
            (elsewhere, tmp_path / "new"),
            {},
            f"{tmp_path / 'train-images-idx3-ubyte.gz'}: no such file",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            plan_of(*arguments, **more)
    with pytest.raises(UserError, match="gs://bucket/run is not on a local file system"):
        run_study(config, "gs://bucket/run", Study((), print, print))


def test_a_mesh_that_does_not_fit_is_named():
    config = get_config("smoke")
    with pytest.raises(UserError, match=r"teacher\.batch_size is 100, .* over 8 data devices"):
        check_mesh(config, ["teacher"])
    check_mesh(config, ["data", "mesh"])
    config.mesh.data = 3
    with pytest.raises(UserError, match="doesn't fit the 8 devices"):
        check_mesh(config, [])


def test_data_that_were_made_again_are_noticed(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    (data / "set.array_record").write_bytes(bytes(200_000))
    (data / "README.md").write_text("words")

    def run(workdir, **more):
        stages = (Stage("a", lambda context: [], (), ("data",)),)
        made = Study(stages, print, lambda _: files.content_of(data))
        run_study(config, tmp_path / workdir, made, only=["a"], **more)
        return capsys.readouterr().out

    config = get_config("smoke")
    assert "a: running" in run("one") and "a: finished before" in run("one")
    assert "a: reused from" in run("two", reuse=[tmp_path / "one"])
    (data / "README.md").write_text("other words")
    assert "a: finished before" in run("one")
    (data / "set.array_record").write_bytes(bytes(199_999) + b"1")
    with pytest.raises(UserError, match=r"the data were others when .*one was begun"):
        run("one")
    printed = run("three", reuse=[tmp_path / "one"])
    assert "one is not reused: its data were others" in printed and "a: running" in printed
