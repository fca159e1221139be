"""A study: named stages that run once each, are resumed, and write results.json.

A working directory holds

    config.json             the config that it belongs to
    stages/NAME/            a stage's own files; stage.json is there once the stage is finished
    results.json            the rows of all finished stages
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from distill_jax import processes
from distill_jax.errors import UserError
from experiments.common import report

Row = dict[str, Any]
"""One line of a table: table, row, metric, paper, value, std, seeds, selection, preset, source,
seconds; and by table what it is plotted against."""


class Context(NamedTuple):
    """What a stage is given: the config, its own directory and those of the stages it needs."""

    config: ConfigDict
    directory: Path
    inputs: Mapping[str, Path]


class Stage(NamedTuple):
    """A step of a study.

    run: does the work and gives its rows. It may be killed at any moment and is then run again.
    needs: the stages whose files it reads.
    sections: the config's sections it reads, beside those of the stages it needs.
    groups: what trains each group of its nets, or restores it; `run` calls all. None: it has no groups.
    """

    name: str
    run: Callable[[Context], list[Row]]
    needs: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    groups: Callable[[Context], Sequence[Callable[[], Any]]] | None = None


def run_study(
    config: ConfigDict,
    workdir: Path,
    stages: Sequence[Stage],
    write_report: Callable[[Path], None],
    only: Sequence[str],
    reuse: Sequence[Path],
) -> None:
    """`run_stages`, and then the report; which is also a name for `only`."""
    check_names(stages, only)
    run_stages(config, workdir, stages, only, reuse)
    if not only or "report" in only:
        processes.main_only(write_report)(workdir)


def check_names(stages: Sequence[Stage], only: Sequence[str]) -> None:
    """Raises a UserError for a name that is neither a stage's nor "report"."""
    names = [stage.name for stage in stages] + ["report"]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise UserError(f"no stage {', '.join(unknown)}; there are {', '.join(names)}")


def draw_report(
    workdir: Path,
    title: str,
    captions: Mapping[str, str],
    rows: Sequence[Row],
    reference: Path,
    figures: Sequence[report.NamedFigure],
) -> None:
    """`report.write` with the time of all finished stages, and the published rows if there are any."""
    seconds = sum(read_json(path)["seconds"] for path in workdir.glob("stages/*/stage.json"))
    published = report.load_rows(reference) if reference.exists() else []
    report.write(
        workdir,
        title,
        captions,
        rows,
        reference_rows=published,
        figures=figures,
        seconds=seconds,
    )
    print(f"report: {workdir / 'report.html'}")


def run_stages(
    config: ConfigDict,
    workdir: Path,
    stages: Sequence[Stage],
    only: Sequence[str] = (),
    reuse: Sequence[Path] = (),
) -> None:
    """Runs the stages that are not finished yet, in order, and writes results.json after each.

    Args:
        config: of the study; a working directory belongs to one config for good.
        workdir: made if it isn't there.
        stages: in an order in which each stands behind those it needs.
        only: names of the stages to run; empty for all.
        reuse: other working directories; a finished stage there whose config (and that of all it
            builds on) is the same is copied instead of being run.

    Raises:
        UserError: for a stage that needs an unfinished one, or another config's directory.
    """
    with claim(workdir, config):
        for stage in stages:
            directory = workdir / "stages" / stage.name
            if only and stage.name not in only:
                continue
            processes.stop_if_asked()
            if processes.agree((directory / "stage.json").exists()):
                print(f"{stage.name}: finished before")
                continue
            inputs = stage_inputs(workdir, stage)
            key = _stage_key(config, stage, inputs)
            taken = processes.is_main() and _take_over(stage.name, key, directory, reuse)
            if not processes.agree(taken):
                print(f"{stage.name}: running")
                directory.mkdir(parents=True, exist_ok=True)
                begun = time.monotonic()
                rows = stage.run(Context(config, directory, inputs))
                seconds = time.monotonic() - begun
                write_json(directory / "stage.json", {"key": key, "seconds": seconds, "rows": rows})
                print(f"{stage.name}: done in {seconds:.0f} s")
            write_json(workdir / "results.json", finished_rows(workdir, stages))
            processes.wait()


def stage_inputs(workdir: Path, stage: Stage) -> dict[str, Path]:
    """The directories of the stages that one needs; a UserError if one of them isn't finished."""
    inputs = {name: workdir / "stages" / name for name in stage.needs}
    missing = [name for name in inputs if not (inputs[name] / "stage.json").exists()]
    if missing:
        raise UserError(
            f"stage {stage.name} needs {', '.join(missing)}, not finished in {workdir}: "
            f"--stages={','.join([*missing, stage.name])}"
        )
    return inputs


def finished_rows(workdir: Path, stages: Sequence[Stage]) -> list[Row]:
    """The rows of all finished stages, in the stages' order."""
    paths = [workdir / "stages" / stage.name / "stage.json" for stage in stages]
    return [row for path in paths if path.exists() for row in read_json(path)["rows"]]


def make_row(
    config: ConfigDict,
    table: str,
    row: str,
    metric: str,
    values: Sequence[float] | np.ndarray,
    seconds: float,
    paper: float | None = None,
    selection: str | None = None,
    **more: Any,
) -> Row:
    """A row from one value per seed: their mean and sample standard deviation (None for one seed).

    `selection` says on what the value was chosen, if not by the config's selection of checkpoints.
    """
    numbers = np.asarray(values, np.float64)
    return {
        "table": table,
        "row": row,
        "metric": metric,
        "paper": paper,
        "value": float(numbers.mean()),
        "std": float(numbers.std(ddof=1)) if len(numbers) > 1 else None,
        "seeds": len(numbers),
        "selection": selection or config.selection,
        "preset": config.preset,
        "source": config.data.source,
        "seconds": round(seconds, 1),
        **more,
    }


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is either there whole or not at all; of several processes, the first does."""
    if not processes.is_main():
        return
    # Another run that shares the directory may be writing the same file.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


def write_arrays(path: Path, **arrays: Any) -> None:
    """Writes arrays as an npz file; of several processes, the first does."""
    if processes.is_main():
        np.savez(path, **arrays)


def read_json(path: Path) -> Any:
    """Reads a JSON file; a damaged one is a UserError that names it."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


@contextlib.contextmanager
def claim(workdir: Path, config: ConfigDict, shared: bool = False) -> Iterator[None]:
    """Holds the directory for this process, or for those that share it; and for this config for good."""
    workdir.mkdir(parents=True, exist_ok=True)
    with hold(workdir / "lock", shared):
        check_same(workdir, config)
        if not (workdir / "config.json").exists():
            write_json(workdir / "config.json", json.loads(config.to_json()))
        processes.wait()
        yield


@contextlib.contextmanager
def hold(lock: Path, shared: bool = False) -> Iterator[None]:
    """Holds a file for this run, or for those that share it; a UserError if another has it."""
    if not processes.is_main():
        yield
        return
    with open(lock, "a+") as file:  # some shared file systems want it open for both
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is at work in {lock.parent}") from error
        yield


def check_same(workdir: Path, config: ConfigDict) -> None:
    """Raises a UserError if the directory belongs to another config, with the fields that differ.

    Where it is run is free: the mesh may be another one each time.
    """
    mine, path = json.loads(config.to_json()), workdir / "config.json"
    theirs = read_json(path) if path.exists() else mine
    old, new = (_flat({**fields, "mesh": None}) for fields in (theirs, mine))
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if keys:
        differences = ", ".join(
            f"{key} is {old.get(key)!r} there and {new.get(key)!r} now" for key in keys
        )
        raise UserError(
            f"{workdir} belongs to another config: {differences}. Choose another --workdir "
            "(with --reuse it takes over what is the same), or the config it was made with"
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _stage_key(config: ConfigDict, stage: Stage, inputs: Mapping[str, Path]) -> str:
    """A hash of all that a stage's result depends on: its sections and the stages it builds on."""
    sections = {name: json.loads(config.to_json())[name] for name in stage.sections}
    keys = {name: read_json(path / "stage.json")["key"] for name, path in inputs.items()}
    return hashlib.sha256(
        json.dumps([stage.name, sections, keys], sort_keys=True).encode()
    ).hexdigest()


def _take_over(name: str, key: str, directory: Path, reuse: Sequence[Path]) -> bool:
    """Copies a finished stage of the same key from another working directory, if one has it."""
    for other in reuse:
        theirs = other / "stages" / name
        if (theirs / "stage.json").exists() and read_json(theirs / "stage.json")["key"] == key:
            partial = directory.with_name(name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(theirs, partial)
            shutil.rmtree(directory, ignore_errors=True)
            os.replace(partial, directory)
            print(f"{name}: taken over from {other}")
            return True
    return False
