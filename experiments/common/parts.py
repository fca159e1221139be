"""Independent jobs of one study: the groups of a stage's nets, trained side by side in one workdir.

An ensemble's members and the specialists are "trained completely independently" (section 5.5). Any
number of processes, on machines that share the working directory's file system, each train a part of
a stage's groups; the study, run as usual, then restores them all and finishes the stage.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from distill_jax import processes
from distill_jax.errors import UserError
from experiments.common.study import Stage, claim, hold, make_context, stage_inputs


class Part(NamedTuple):
    """The groups first, first + step, first + 2 step and so on of a stage."""

    first: int
    step: int


def parse_part(text: str) -> Part:
    """Reads `I,N`; a UserError if that isn't 0 <= I < N."""
    numbers = re.fullmatch(r"(\d+),(\d+)", text)
    part = Part(*map(int, numbers.groups())) if numbers else Part(0, 0)
    if part.first >= part.step:
        raise UserError(f"--part={text}: expected I,N with 0 <= I < N, such as 0,4")
    return part


def find_stage(workdir: Path, stages: Sequence[Stage], only: Sequence[str]) -> Stage:
    """The one stage named, whose groups can be trained now.

    Raises:
        UserError: if it isn't one, has no groups, or needs a stage that is not finished.
    """
    grouped = [stage.name for stage in stages if stage.groups]
    if len(only) != 1 or only[0] not in grouped:
        raise UserError(
            f"parts are of one stage with groups of nets, not of {', '.join(only) or 'all'}; "
            f"this study has {', '.join(grouped) or 'none'}"
        )
    stage = next(stage for stage in stages if stage.name == only[0])
    stage_inputs(workdir, stage)
    return stage


def run_part(
    config: ConfigDict, workdir: Path, stages: Sequence[Stage], only: Sequence[str], part: Part
) -> None:
    """Trains a part of a stage's groups, and leaves the stage unfinished.

    Args:
        config: of the study.
        workdir: its working directory, which other parts may be at work in.
        stages: of the study.
        only: the stage's name.
        part: which of its groups.

    Raises:
        UserError: as `find_stage`; or if another process trains one of these groups, or the study.
    """
    stage = find_stage(workdir, stages, only)
    directory = workdir / "stages" / stage.name
    with claim(workdir, config, shared=True):
        if processes.agree((directory / "stage.json").exists()):
            print(f"{stage.name}: finished before")
            return
        directory.mkdir(parents=True, exist_ok=True)
        assert stage.groups is not None
        groups = stage.groups(make_context(config, workdir, stages, stage))
        if part.first >= len(groups):
            print(
                f"{stage.name}: {len(groups)} groups, so none for part {part.first} of {part.step}"
            )
        for number in range(part.first, len(groups), part.step):
            processes.stop_if_asked()
            with hold(directory / f"group_{number}.lock"):
                print(f"{stage.name}: group {number + 1} of {len(groups)}")
                groups[number]()
