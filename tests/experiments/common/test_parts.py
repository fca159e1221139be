"""The groups of a stage, trained by several processes in one working directory."""

import threading

import pytest
from ml_collections import ConfigDict

from distill_jax.errors import UserError
from experiments.common import parts
from experiments.common.parts import Part, parse_part, run_part
from experiments.common.study import Stage, make_row, read_json, run_stages

CONFIG = ConfigDict(
    {
        "preset": "smoke",
        "mesh": {},
        "selection": "last",
        "data": {"source": "none"},
        "nets": {"count": 5},
    }
)


def train(context, number, tries=None):
    """Leaves a file; one that is there is not made again."""
    path = context.directory / f"net_{number}"
    if not path.exists():
        if tries is not None:
            tries.append(number)
        path.write_text(str(number**2))
    return int(path.read_text())


def make_stages(tries=None, during=lambda number: None):
    def groups(context):
        def one(number):
            during(number)
            return train(context, number, tries)

        return [lambda number=n: one(number) for n in range(context.config.nets.count)]

    def nets(context):
        values = [group() for group in groups(context)]
        return [make_row(context.config, "table", "nets", "square", values, seconds=1.0)]

    return (
        Stage("first", lambda context: []),
        Stage("nets", nets, ("first",), ("selection", "data", "nets"), groups),
        Stage("others", nets, (), ("selection", "data", "nets"), groups),
    )


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_train_every_group_once_and_leave_the_rows_to_the_study(tmp_path, count):
    tries: list[int] = []
    stages = make_stages(tries)
    run_stages(CONFIG, tmp_path / "parts", stages, ["first"])
    for first in reversed(range(count)):
        run_part(CONFIG, tmp_path / "parts", stages, ["nets"], Part(first, count))
        assert tries[-len(range(first, 5, count)) :] == list(range(first, 5, count)) or first > 4
    assert sorted(tries) == list(range(5))
    assert not (tmp_path / "parts/stages/nets/stage.json").exists()
    run_stages(CONFIG, tmp_path / "parts", stages, ["first", "nets"])
    assert sorted(tries) == list(range(5))
    run_stages(CONFIG, tmp_path / "whole", make_stages(), ["first", "nets"])
    assert read_json(tmp_path / "parts/results.json") == read_json(tmp_path / "whole/results.json")


def test_a_finished_stage_has_nothing_left_to_train(tmp_path, capsys):
    stages = make_stages()
    run_stages(CONFIG, tmp_path, stages)
    capsys.readouterr()
    run_part(CONFIG, tmp_path, stages, ["nets"], Part(0, 2))
    assert capsys.readouterr().out == "nets: finished before\n"


def test_parts_run_side_by_side_and_nothing_else_does(tmp_path):
    """While a group is being trained: another part can work, the same group and the study can't."""
    at_work, go_on = threading.Event(), threading.Event()

    def during(number):
        if number == 0:
            at_work.set()
            assert go_on.wait(30)

    slow = threading.Thread(
        target=run_part,
        args=(CONFIG, tmp_path, make_stages(during=during), ["others"], Part(0, 2)),
    )
    slow.start()
    assert at_work.wait(30)
    try:
        quick: list[int] = []
        run_part(CONFIG, tmp_path, make_stages(quick), ["others"], Part(1, 2))
        assert quick == [1, 3]
        for taken in (Part(0, 2), Part(0, 5)):
            with pytest.raises(UserError, match=r"another process is at work in .*others"):
                run_part(CONFIG, tmp_path, make_stages(quick), ["others"], taken)
        with pytest.raises(UserError, match=f"another process is at work in {tmp_path}"):
            run_stages(CONFIG, tmp_path, make_stages(quick))
        other = ConfigDict({**CONFIG.to_dict(), "nets": {"count": 4}})
        with pytest.raises(UserError, match=r"nets\.count is 5 there and 4 now"):
            run_part(other, tmp_path, make_stages(quick), ["others"], Part(1, 2))
        assert quick == [1, 3]
    finally:
        go_on.set()
        slow.join()
    assert all((tmp_path / f"stages/others/net_{n}").exists() for n in range(5))


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (["first"], "not of first; this study has nets, others"),
        (["nets", "others"], "not of nets, others; this study has nets, others"),
        ([], "not of all; this study has nets, others"),
        (["nets"], "stage nets needs first, not finished in .*: --stages=first,nets"),
    ],
)
def test_parts_are_of_one_stage_that_has_groups(tmp_path, only, message):
    with pytest.raises(UserError, match=message):
        run_part(CONFIG, tmp_path, make_stages(), only, Part(0, 2))
    with pytest.raises(UserError, match="this study has none"):
        parts.find_stage(tmp_path, make_stages()[:1], ["first"])


def test_what_a_part_is_called():
    assert parse_part("0,1") == Part(0, 1) and parse_part("3,4") == Part(3, 4)
    for wrong in ("", "1", "4,4", "-1,4", "0,0", "a,b", "1,2,3", "0.5,2"):
        with pytest.raises(UserError, match="expected I,N with 0 <= I < N"):
            parse_part(wrong)
