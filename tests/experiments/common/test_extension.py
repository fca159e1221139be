"""A working directory continues to more epochs: which stages continue, run from the start, or stay."""

import json

import pytest
from ml_collections import ConfigDict

from distill_jax.errors import UserError
from experiments.common.run import Study, plan, run_study
from experiments.common.study import Stage, finished_rows

CONFIG = {
    "preset": "smoke",
    "mesh": {"data": -1},
    "teacher": {"epochs": 2, "rate": 0.1},
    "student": {"epochs": 2},
    "other": {"epochs": 2},
}


def stage(name, needs=(), extends=True, section=None):
    """One that notes the epochs of each of its runs in its folder, as a training keeps checkpoints."""

    def run(context):
        path = context.directory / "runs.json"
        runs = json.loads(path.read_text()) if path.exists() else []
        runs.append(context.config[section or name].epochs)
        path.write_text(json.dumps(runs))
        return [{"row": name, "runs": runs}]

    return Stage(name, run, needs, (section or name,), extends=extends)


STAGES = (
    stage("teacher"),
    stage("data", section="teacher", extends=False),
    stage("student", ("teacher",)),
    stage("other"),
)
STUDY = Study(STAGES, write_report=lambda _: None, check_source=lambda _: None)


def config(**epochs):
    fields = {**CONFIG, **{name: {**CONFIG[name], "epochs": n} for name, n in epochs.items()}}
    return ConfigDict(fields).lock()


def run(workdir, config, **more):
    run_study(config, workdir, STUDY, **more)
    return {row["row"]: row["runs"] for row in finished_rows(workdir, STAGES)}


@pytest.fixture(autouse=True)
def no_rules(monkeypatch):
    for name in ("check_config", "check_mesh"):
        monkeypatch.setattr(f"experiments.common.run.{name}", lambda *_: None)


def test_what_is_trained_goes_on_and_what_builds_on_it_is_made_again(tmp_path, capsys):
    assert run(tmp_path, config()) == {stage.name: [2] for stage in STAGES}
    longer = config(teacher=4)
    with pytest.raises(
        UserError, match=r"teacher.epochs is 2 there and 4 now.* With --extend what"
    ):
        run(tmp_path, longer)
    lines = plan(longer, tmp_path, STUDY, extend=True)
    assert lines[:4] == [
        "teacher: will continue",
        "data: will be run again from the start",
        "student: will be run again from the start",
        "other: finished before",
    ]
    capsys.readouterr()
    after = {"teacher": [2, 4], "data": [4], "student": [2], "other": [2]}
    assert run(tmp_path, longer, extend=True) == after
    printed = capsys.readouterr().out
    assert "teacher: continues\n" in printed and "other: finished before\n" in printed
    assert run(tmp_path, longer) == run(tmp_path, longer, extend=True) == after


def test_only_some_stages_are_extended_and_the_rest_later(tmp_path):
    run(tmp_path, config())
    longer = config(teacher=4, other=3)
    assert run(tmp_path, longer, extend=True, only=["other"]) == {"other": [2, 3]}
    with pytest.raises(UserError, match="student needs teacher, not finished"):
        run(tmp_path, longer, only=["student"])
    assert run(tmp_path, longer) == {
        "teacher": [2, 4],
        "data": [4],
        "student": [2],
        "other": [2, 3],
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher": {"epochs": 1, "rate": 0.1}}, "teacher.epochs is 2 there and 1 now"),
        ({"teacher": {"epochs": 4, "rate": 0.2}}, "rate is 0.1 there and 0.2 now"),
        ({"preset": "full"}, "preset is 'smoke' there and 'full' now"),
    ],
)
def test_nothing_else_may_differ(tmp_path, changed, message):
    before = run(tmp_path, config())
    with pytest.raises(UserError, match=message) as error:
        run(tmp_path, ConfigDict({**CONFIG, **changed}), extend=True)
    assert "--extend" not in str(error.value)
    assert run(tmp_path, config()) == before


def test_a_folder_of_somebody_else_is_no_working_directory(tmp_path):
    (tmp_path / "log.txt").touch()
    (tmp_path / "ensemble-0-of-2").mkdir()  # where a job that trains a part has its log
    run(tmp_path, config(), only=["other"])
    for name in ("thesis.tex", "stages/teacher/weights"):
        theirs = tmp_path / name.replace("/", "_")
        (theirs / name).parent.mkdir(parents=True)
        (theirs / name).write_text("mine")
        with pytest.raises(
            UserError, match="so a study is not written there: name an empty folder"
        ):
            run(theirs, config())
        assert (theirs / name).read_text() == "mine" and len(list(theirs.iterdir())) == 1
