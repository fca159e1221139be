"""Runs a study from its config: what can be checked is checked first, then its stages are run, and a
report is drawn of them.
"""

import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from distill_jax import files, processes, sharding
from distill_jax.errors import UserError
from experiments.common import extension
from experiments.common.config import check_config, refuse
from experiments.common.published import Published
from experiments.common.study import (
    Stage,
    check_needs,
    check_own,
    check_same,
    fields_read,
    finished_key,
    read_json,
    run_stages,
    stage_key,
)

DATA = "data.json"
"""What a working directory holds beside its config: what names the content of its data."""

POINTS = "points.json"
"""What a sweep's folder holds: the names of its points, whose working directories lie beside it."""


class Study(NamedTuple):
    """What is the study's own.

    stages: in an order in which each stands behind those it needs. write_report: of a working directory.
    check_source: names the content of the config's data (None if those can't change); raises a UserError
    if they aren't there. data_conflicts: values of the config that don't fit the data, such as a batch
    that is larger than the training set; they begin with the field. published: the nets that are kept in
    the project, by name.
    """

    stages: Sequence[Stage]
    write_report: Callable[[Path], None]
    check_source: Callable[[ConfigDict], str | None]
    data_conflicts: Callable[[ConfigDict], Iterable[str]] = lambda config: ()
    published: Mapping[str, Published] = types.MappingProxyType({})


class _Plan(NamedTuple):
    """What a run would do: a line for each stage; what names the content of its data; what it reuses."""

    lines: list[str]
    data: str | None
    reuse: list[Path]


def run_study(
    config: ConfigDict,
    workdir: Path,
    study: Study,
    *,
    only: Sequence[str] = (),
    reuse: Sequence[Path] = (),
    extend: bool = False,
) -> None:
    """`run_stages`, and then the report; which is also a name for `only`.

    With `extend` the config may have more epochs than the working directory's (`extension`).

    Raises:
        UserError: before anything is run, as `plan` and `check_mesh`; and as `run_stages`.
    """
    workdir = files.local_path(workdir)
    planned = _plan(config, workdir, study, only=only, reuse=reuse, extend=extend)
    check_mesh(config, fields_read(study.stages, only))
    if extend:
        extension.extend(config, workdir, study.stages)
    processes.main_only(_note_data)(workdir, planned.data)
    run_stages(config, workdir, study.stages, only, planned.reuse)
    if not only or "report" in only:
        processes.main_only(study.write_report)(workdir)


def plan(
    config: ConfigDict,
    workdir: Path,
    study: Study,
    *,
    only: Sequence[str] = (),
    reuse: Sequence[Path] = (),
    extend: bool = False,
) -> list[str]:
    """Checks all that can be checked before a run, and says what `run_study` would do with each stage.

    It needs no devices, reads no data, and writes nothing.

    Args:
        config: of the study.
        workdir: the working directory; it need not be there.
        study: its stages and its data.
        only: names of stages; empty for all.
        reuse: working directories of the study, or sweeps of it.
        extend: as for `run_study`.

    Returns:
        A line for each stage, such as "teacher: finished before".

    Raises:
        UserError: for a wrong field of the config, name of a stage, or folder; for another config's
            working directory, or one of other data than are there now; for a stage that needs one that
            is neither finished nor run.
    """
    return _plan(config, workdir, study, only=only, reuse=reuse, extend=extend).lines


def _plan(
    config: ConfigDict,
    workdir: Path,
    study: Study,
    *,
    only: Sequence[str],
    reuse: Sequence[Path],
    extend: bool,
) -> _Plan:
    stages = study.stages
    check_names(stages, only)
    check_config(config, fields_read(stages, only))
    files.check_writable(workdir, "--workdir")
    check_own(workdir)
    changed = extension.changed_stages(config, workdir, stages) if extend else {}
    if not changed:
        check_same(workdir, config)
    data = study.check_source(config)
    refuse(study.data_conflicts(config), fields_read(stages, only))
    _check_data(workdir, data)
    others = _with_data(data, working_directories(reuse))
    keys = stage_keys(config, stages)
    planned, lines = set[str](), []
    for stage in stages:
        if only and stage.name not in only:
            continue
        check_needs(workdir, stage, planned)
        planned.add(stage.name)
        fate = _fate(workdir, stage.name, keys[stage.name], others)
        if stage.name in changed and finished_key(workdir, stage.name):
            fate = "will continue" if changed[stage.name] else "will be run again from the start"
        lines.append(f"{stage.name}: {fate}")
    if not only or "report" in only:
        lines.append("report: will be drawn")
    return _Plan(lines, data, others)


def _data_of(workdir: Path) -> str | None:
    """What names the data of a working directory; None if it isn't noted, or they can't change."""
    path = workdir / DATA
    return read_json(path) if path.exists() else None


def _check_data(workdir: Path, data: str | None) -> None:
    before = _data_of(workdir)
    if before and before != data:
        raise UserError(
            f"the data were others when {workdir} was begun ({before} by its {DATA}, now {data}): bring "
            "those back, or choose another --workdir"
        )


def _note_data(workdir: Path, data: str | None) -> None:
    if data and not (workdir / DATA).exists():
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_json(workdir / DATA, data)


def _with_data(data: str | None, reuse: Sequence[Path]) -> list[Path]:
    """Those working directories whose stages may be reused: not those of other data, which are named."""
    others = [folder for folder in reuse if _data_of(folder) not in (None, data)]
    for folder in others:
        print(f"{folder} is not reused: its data were others")
    return [folder for folder in reuse if folder not in others]


def stage_keys(config: ConfigDict, stages: Sequence[Stage]) -> dict[str, str]:
    """The key that each stage has when it is finished, by its name."""
    keys: dict[str, str] = {}
    for stage in stages:
        keys[stage.name] = stage_key(config, stage, {name: keys[name] for name in stage.needs})
    return keys


def _fate(workdir: Path, stage: str, key: str, reuse: Sequence[Path]) -> str:
    if finished_key(workdir, stage):
        return "finished before"
    having = [other for other in reuse if finished_key(other, stage) == key]
    return f"will be reused from {having[0]}" if having else "will run"


def check_names(stages: Sequence[Stage], only: Sequence[str]) -> None:
    """Raises a UserError for a name that is neither a stage's nor "report"."""
    names = [stage.name for stage in stages] + ["report"]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise UserError(f"no stage {', '.join(map(repr, unknown))}; there are {', '.join(names)}")


def working_directories(reuse: Sequence[Path]) -> list[Path]:
    """Folders whose stages are to be reused: working directories, and those of the points of sweeps.

    Raises:
        UserError: for a folder that is neither.
    """
    found = []
    for folder in map(files.local_path, reuse):
        if (folder / POINTS).is_file():
            names = read_json(folder / POINTS)
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise UserError(f"{folder / POINTS} is damaged: expected a list of folders' names")
            found += [folder / name for name in names]
        elif (folder / "config.json").is_file():
            found.append(folder)
        else:
            why = "it has no config.json" if folder.is_dir() else "there is no such folder"
            hint = "; give --reuse once for each folder" if "," in folder.name else ""
            raise UserError(f"--reuse={folder} is no working directory of a study: {why}{hint}")
    return found


def check_mesh(config: ConfigDict, sections: Collection[str]) -> None:
    """Raises a UserError for a mesh that doesn't fit the devices, or batches that don't fit it."""
    parts = sharding.make_mesh(**config.mesh).shape["data"]
    for name in sorted(sections):
        section = config[name]
        if isinstance(section, ConfigDict) and section.get("batch_size", 0) % parts:
            raise UserError(
                f"--config.{name}.batch_size is {section.batch_size}, which doesn't divide over {parts} "
                "data devices"
            )
