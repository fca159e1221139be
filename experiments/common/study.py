"""A study: named stages that run once each, are resumed, and write results.json.

A working directory holds

    config.json             the config that it belongs to
    data.json               what names the content of its data's folder, if that may change
    stages/NAME/            a stage's own files; stage.json is there once the stage is finished
    results.json            the rows of all finished stages
"""

import contextlib
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from distill_jax import files, processes
from distill_jax.errors import UserError
from distill_jax.files import read_json
from experiments.common import report
from experiments.common.config import flat, is_brought

Row = dict[str, Any]
"""One line of a table: table, row, metric, paper, value, std, seeds, selection, preset, source,
seconds; the values of each seed; and by table what it is plotted against."""


_STAGE = ("experiments.stage", 1)

ANY_STAGE = ("preset", "mesh")
"""What every stage may read of the config. Both are free: no part of what a stage is known by."""


class Context(NamedTuple):
    """What a stage is given: its part of the config, its directory, and those of the stages it needs.

    stage: its number in random keys (`Stage`).
    """

    config: ConfigDict
    directory: Path
    inputs: Mapping[str, Path]
    stage: int = 0

    def keys(self, seeds: Sequence[int], training: int = 0) -> Array:
        """Random keys, one for each seed, of one of the stage's trainings.

        Functions of the seed, the stage's number and the training's alone: no name has a part in them.
        Trainings of one number begin alike and see the same batches, which makes their results easier to
        compare.
        """
        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        fold = jax.vmap(jax.random.fold_in, (0, None))
        return fold(fold(keys, self.stage), training)


class Sections(ConfigDict):
    """The part of a config that a stage may read. To read anything else is an error, also with `get`."""

    def __init__(self, stage: str, part: Mapping[str, Any]) -> None:
        super().__init__(part)
        object.__setattr__(self, "_stage", stage)

    def __getitem__(self, name: str) -> Any:
        """A section; a RuntimeError that names it and the stage if it isn't declared."""
        if name not in self:
            raise RuntimeError(
                f"stage {self._stage} reads the config's {name!r}, which neither it nor a stage that it "
                "needs has among its sections"
            )
        return super().__getitem__(name)


class Stage(NamedTuple):
    """A step of a study.

    run: does the work and gives its rows. It may be killed at any moment and is then run again.
    needs: the stages whose files it reads.
    sections: what it reads of the config, beside what the stages that it needs read; no more is there.
    groups: what trains each group of its nets, or reads it if it is finished; `run` calls all. None: it
    has no groups. number: of the stage in random keys; another number trains other nets. So it stays as
    it is when stages are renamed, moved or added. extends: whether, when only the
    epochs in its own sections grow, it continues with what it trained; else it is run from the start.
    """

    name: str
    run: Callable[[Context], list[Row]]
    needs: tuple[str, ...] = ()
    sections: tuple[str, ...] = ()
    groups: Callable[[Context], Sequence[Callable[[], Any]]] | None = None
    number: int = 0
    extends: bool = False


def draw_report(
    workdir: Path,
    rows: Sequence[Row],
    figures: Sequence[report.NamedFigure],
    *,
    title: str,
    captions: Mapping[str, str],
    reference: Path,
) -> None:
    """`report.write` with the time of all finished stages, and the published rows of the same set."""
    found = [read_stage(path.parent) for path in workdir.glob("stages/*/stage.json")]
    seconds = sum(stage["seconds"] for stage in found if stage)
    comparable = reference.exists() and not any(is_brought(row["source"]) for row in rows)
    published = report.load_rows(reference) if comparable else []
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
        reuse: other working directories; a finished stage there whose sections (and those of all
            that it builds on) are the same is copied instead of being run.

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
            context = make_context(config, workdir, stages, stage)
            key = stage_key(config, stage, {n: finished_key(workdir, n) for n in stage.needs})
            copied = processes.is_main() and _copy_finished(directory, key, reuse)
            if not processes.agree(copied):
                print(f"{stage.name}: running")
                directory.mkdir(parents=True, exist_ok=True)
                begun = time.monotonic()
                rows = stage.run(context)
                seconds = time.monotonic() - begun
                _write_stage(directory, {"key": key, "seconds": seconds, "rows": rows})
                print(f"{stage.name}: done in {seconds:.0f} s")
            write_json(workdir / "results.json", finished_rows(workdir, stages))
            processes.wait()


def make_context(
    config: ConfigDict, workdir: Path, stages: Sequence[Stage], stage: Stage
) -> Context:
    """What a stage is given; a UserError if a stage that it needs isn't finished."""
    inputs = stage_inputs(workdir, stage)
    part = {name: config[name] for name in config if name in _readable(stages, stage)}
    directory = workdir / "stages" / stage.name
    return Context(Sections(stage.name, part), directory, inputs, stage.number)


def _readable(stages: Sequence[Stage], stage: Stage) -> set[str]:
    """The sections that a stage may read: all that its key covers, and those of any stage."""
    needed = [_readable(stages, other) for other in stages if other.name in stage.needs]
    return {*ANY_STAGE, *stage.sections}.union(*needed)


def fields_read(stages: Sequence[Stage], only: Sequence[str] = ()) -> set[str]:
    """The sections that stages, all or `only` some, read beside those of the stages that they need."""
    chosen = [stage for stage in stages if not only or stage.name in only]
    return {*ANY_STAGE}.union(*(stage.sections for stage in chosen))


def stage_inputs(workdir: Path, stage: Stage) -> dict[str, Path]:
    """The directories of the stages that one needs; a UserError if one of them isn't finished."""
    check_needs(workdir, stage)
    for name in stage.needs:
        _checked_stage(workdir / "stages" / name)
    return {name: workdir / "stages" / name for name in stage.needs}


def check_needs(workdir: Path, stage: Stage, planned: Collection[str] = ()) -> None:
    """Raises a UserError if a stage that one needs is neither finished nor `planned` to be run."""
    missing = [n for n in stage.needs if n not in planned and not finished_key(workdir, n)]
    if missing:
        raise UserError(
            f"stage {stage.name} needs {', '.join(missing)}, not finished in {workdir}: "
            f"--stages={','.join([*missing, stage.name])}"
        )


def finished_rows(workdir: Path, stages: Sequence[Stage]) -> list[Row]:
    """The rows of all finished stages, in the stages' order."""
    found = [_checked_stage(workdir / "stages" / stage.name) for stage in stages]
    return [row for stage in found if stage for row in stage["rows"]]


def make_row(
    config: ConfigDict,
    table: str,
    row: str,
    metric: str,
    values: Sequence[float] | np.ndarray,
    *,
    seconds: float,
    paper: float | None = None,
    selection: str | None = None,
    **more: Any,
) -> Row:
    """A row from one value per seed: their mean and sample standard deviation (None for one seed).

    `selection` says on what the value was chosen, if not by the config's selection of checkpoints.
    Among `more` "interval", a pair, is the 95 % confidence interval of the value (`statistics`).
    """
    numbers = np.asarray(values, np.float64)
    return {
        "table": table,
        "row": row,
        "metric": metric,
        "paper": paper,
        "value": float(numbers.mean()),
        "std": float(numbers.std(ddof=1)) if len(numbers) > 1 else None,
        "values": numbers.tolist(),
        "seeds": len(numbers),
        "selection": selection or config.selection,
        "preset": config.preset,
        "source": config.data.source,
        "seconds": round(seconds, 1),
        **more,
    }


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, whole; of several processes, the first does."""
    if processes.is_main():
        files.write_json(path, value)


def write_arrays(path: Path, **arrays: Any) -> None:
    """Writes arrays as an npz file, whole; of several processes, the first does."""
    if processes.is_main():
        with files.write_whole(path) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)


@contextlib.contextmanager
def claim(workdir: Path, config: ConfigDict, shared: bool = False) -> Iterator[None]:
    """Holds the directory for this process, or for those that share it; and for this config for good."""
    check_own(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with hold(workdir / "lock", shared):
        check_same(workdir, config)
        if not (workdir / "config.json").exists():
            write_json(workdir / "config.json", json_of(config))
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


def check_own(workdir: Path) -> None:
    """Raises a UserError for a folder that isn't a study's, and holds more than logs."""
    own = ["lock", r"config\.json", r"data\.json", r".*\.(txt|log|out)", r"\w+-\d+-of-\d+"]
    try:
        if not (workdir / "config.json").exists():
            files.check_own_folder(workdir, own, "a study")
    except UserError:
        if not (workdir / "config.json").exists():  # written meanwhile by another process of it
            raise


def check_same(workdir: Path, config: ConfigDict) -> None:
    """Raises a UserError if the directory belongs to another config, with the fields that differ.

    Where it is run is free: the mesh may be another one each time.
    """
    there, now = configs(workdir, config)
    hint = "Choose another --workdir (with --reuse it copies the stages that are the same), or the "
    hint += "config it was made with"
    if more_epochs(there, now):
        hint += ". With --extend what is trained continues to more epochs"
    files.check_same(f"{workdir} belongs to another config", there, now, hint)


def configs(workdir: Path, config: ConfigDict) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a working directory's config, and of another, by dotted names; of both all."""
    mine, path = json_of(config), workdir / "config.json"
    theirs = read_json(path) if path.exists() else mine
    if not isinstance(theirs, dict):
        raise UserError(f"{path} is damaged: it is no config")
    there, now = (flat({**fields, "mesh": None}) for fields in (theirs, mine))
    return there, {name: now.get(name) for name in sorted({**there, **now})}


def more_epochs(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The fields "SECTION.epochs" that grew, if nothing else differs; else none."""
    differ = [name for name in now if there.get(name) != now[name]]
    grew = [
        name
        for name in differ
        if name.endswith(".epochs") and isinstance(there.get(name), int) and now[name] > there[name]
    ]
    return grew if grew == differ else []


def json_of(config: ConfigDict) -> dict[str, Any]:
    """A config as config.json has it."""
    return json.loads(config.to_json())


def stage_key(config: ConfigDict, stage: Stage, keys: Mapping[str, str | None]) -> str:
    """A hash of all that a stage's result depends on: its sections, and the `keys` of what it needs."""
    sections = {name: json_of(config)[name] for name in stage.sections}
    return hashlib.sha256(
        json.dumps([stage.name, stage.number, sections, keys], sort_keys=True).encode()
    ).hexdigest()


def finished_key(workdir: Path, stage: str) -> str | None:
    """The key of a finished stage; None if it isn't finished there."""
    found = read_stage(workdir / "stages" / stage)
    return found["key"] if found else None


def read_stage(directory: Path) -> dict[str, Any] | None:
    """What a finished stage noted, "key", "seconds", "rows" and "files"; None if it isn't finished.

    Raises:
        UserError: if the file is damaged.
    """
    path = directory / "stage.json"
    if not path.exists():
        return None
    if not {"format", "sha256"} & {*read_json(path)}:  # of an earlier version
        return read_json(path)
    return files.read_sealed(path, _STAGE, f"delete {directory} and run the stage again")


def _checked_stage(directory: Path) -> dict[str, Any] | None:
    """`read_stage`; a UserError if a file of the stage is not the one that it noted."""
    found = read_stage(directory)
    for name, sha256 in found.get("files", {}).items() if found else ():
        again = f"delete {directory} and run the stage again"
        files.check_sha256(directory / name, sha256, again)
    return found


@processes.main_only
def _write_stage(directory: Path, result: Mapping[str, Any]) -> None:
    """Writes stage.json, with the SHA-256 of the files beside it; nets and stores have their own."""
    own = [path for path in sorted(directory.iterdir()) if path.suffix in (".json", ".npz")]
    hashes = {path.name: files.sha256(path) for path in own if path.is_file()}
    files.write_sealed(directory / "stage.json", _STAGE, {**result, "files": hashes})


def _copy_finished(directory: Path, key: str, reuse: Sequence[Path]) -> bool:
    """Copies a finished stage of the same key from another working directory, if one has it."""
    for other in reuse:
        if finished_key(other, directory.name) == key:
            directory.parent.mkdir(parents=True, exist_ok=True)
            with files.write_whole(directory, replace=True) as partial:  # of what a kill left
                shutil.copytree(other / "stages" / directory.name, partial)
            print(f"{directory.name}: reused from {other}")
            return True
    return False
