"""Runs the points of a sweep, or the parts of a stage, as jobs; and joins the results of a sweep.

    python -m launch.sweep --config=experiments/mnist/config.py:default \\
        --sweep=experiments/mnist/config.py:temperature --workdir=runs/temperature

The sweep is what `sweep(NAME)` in the named file returns: a list of {dotted key: value}. Every override
is checked against the locked config before anything runs. Each point has a directory of its own. Points
that are finished are skipped. What points share (the teacher, when only the student is swept) is trained
once, by the first of them, and reused by the others, which wait for it. The same command again resumes
where the last one stopped; when all points are finished it prints one table.

--backend=local runs --at_once=N processes side by side, and each sees its share of the GPUs that
CUDA_VISIBLE_DEVICES lists. slurm submits job arrays and returns; sbatch's own variables, such as
SBATCH_PARTITION and SBATCH_GRES, say where. print prints the commands for you to run, in an order in
which what points share is trained first.

    python -m launch.sweep --config=experiments/specialists/config.py:paper \\
        --parts=specialists:8 --workdir=runs/specialists --backend=slurm

trains the groups of nets of one stage (specialists, members of an ensemble) as 8 jobs in one working
directory, and says which command then finishes the study.
"""

import hashlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from distill_jax import files
from distill_jax.command import describe
from distill_jax.errors import UserError
from experiments.common import extras, parts
from experiments.common.config import Overrides, check_config
from experiments.common.run import POINTS, check_names, stage_keys
from experiments.common.study import (
    check_same,
    fields_read,
    finished_key,
    read_json,
    write_json,
)
from launch import backends, command
from launch.backends import Job

_CONFIG = command.define_config()
_SWEEP = flags.DEFINE_string("sweep", None, "FILE:NAME of the sweep.")
_PARTS = flags.DEFINE_string("parts", None, "STAGE:N, to train a stage's groups of nets as N jobs.")
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Holds a directory per point, sweep.json and sweep.md; with --parts, the study's.",
    required=True,
)
_STAGES = command.define_stages()
_BACKEND = flags.DEFINE_enum("backend", "local", ["local", "slurm", "print"], "What runs the jobs.")
_AT_ONCE = flags.DEFINE_integer(
    "at_once",
    None,
    "Jobs that run in parallel. Default: 1 on this machine (more write to WORKDIR/JOB/log.txt); all on "
    "Slurm.",
    lower_bound=1,
)


_LONGEST = 200  # bytes of a directory's name; file systems take 255


class Point(NamedTuple):
    """One config of a sweep, and the directory that it is run in."""

    overrides: Overrides
    config: ConfigDict
    workdir: Path


def main(argv: Sequence[str]) -> None:
    """Runs the unfinished points of a sweep, or parts of a stage."""
    sweep, stage_and_count, workdir = _SWEEP.value, _PARTS.value, files.local_path(_WORKDIR.value)
    files.check_writable(workdir, "--workdir")
    check_names(_stages(), _STAGES.value)
    if sweep and not stage_and_count:
        _run_sweep(load_sweep(sweep), workdir)
    elif stage_and_count and not sweep:
        _run_parts(stage_and_count, workdir)
    else:
        raise UserError("give either --sweep=FILE:NAME or --parts=STAGE:N")


def _run_sweep(overrides: Sequence[Overrides], workdir: Path) -> None:
    """Checks all points, runs those that are not finished, and joins the rows once all are."""
    points = [
        Point(own, _checked_config(own, name), workdir / name)
        for name, own in zip(point_names(overrides), overrides, strict=True)
    ]
    unfinished = [point for point in points if not _is_finished(point)]
    if unfinished:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / POINTS, [point.workdir.name for point in points])
        made = {finished_key(point.workdir, s.name) for point in points for s in _stages()}
        turns = rounds([_wanted(point) - made for point in unfinished])
        _run([[_point_job(unfinished[i], workdir) for i in turn] for turn in turns], workdir)
    left = [point.workdir.name for point in points if not _is_finished(point)]
    if left:
        _say(f"not finished: {', '.join(left)}. The same command joins the results of all.")
        return
    rows = join_rows(points)
    write_json(workdir / "sweep.json", rows)
    table = markdown(overrides, rows)
    (workdir / "sweep.md").write_text(table)
    _say(table)


def _checked_config(overrides: Overrides, name: str) -> ConfigDict:
    """The config of a point; a UserError that names the point if anything in it is wrong."""
    try:
        config = apply_point(_CONFIG.value, overrides)
        check_config(config, fields_read(_stages(), _STAGES.value))
        check_command(_main_command(Path(name), overrides), config)
    except UserError as error:
        raise UserError(f"point {name}: {error}") from error
    return config


def _wanted(point: Point) -> set[str | None]:
    """The keys of the stages that a point runs or reuses."""
    keys = stage_keys(point.config, _stages())
    return {keys[name] for name in keys if not _STAGES.value or name in _STAGES.value}


def rounds(wanted: Sequence[Collection[Any]]) -> list[list[int]]:
    """Rounds of jobs in which no two jobs make the same thing: later ones find what earlier ones made.

    >>> rounds([{"teacher", "a"}, {"teacher", "b"}, {"other teacher", "c"}])
    [[0, 2], [1]]
    """
    made: set[Any] = set()
    left, found = list(range(len(wanted))), []
    while left:
        begun: set[Any] = set()
        now = []
        for i in left:
            new = set(wanted[i]) - made
            if not new & begun:
                now.append(i)
                begun |= new
        made |= begun
        left = [i for i in left if i not in now]
        found.append(now)
    return found


def _run_parts(stage_and_count: str, workdir: Path) -> None:
    """Trains the groups of a stage, unless it is finished."""
    stage, _, number = stage_and_count.partition(":")
    count = int(number) if number.isdecimal() else 0
    if count < 1:
        raise UserError(f"--parts={stage_and_count}: expected STAGE:N, such as specialists:4")
    if _STAGES.value:
        raise UserError("--parts names its stage: leave --stages out")
    parts.find_stage(workdir, _stages(), [stage])
    check_config(_CONFIG.value, fields_read(_stages(), [stage]))
    check_same(workdir, _CONFIG.value)
    jobs = [
        Job(
            f"{stage}-{i}-of-{count}",
            _main_command(workdir, {}, f"--stages={stage}", f"--part={i},{count}"),
            workdir / f"{stage}-{i}-of-{count}" / "log.txt",
        )
        for i in range(count)
    ]
    _run([] if finished_key(workdir, stage) else [jobs], workdir)
    _say(f"when all parts are trained, continue with: {shlex.join(_main_command(workdir, {}))}")


def _run(rounds: backends.Rounds, workdir: Path) -> None:
    """Runs jobs on the chosen back end."""
    rounds = [jobs for jobs in rounds if jobs]
    if not rounds:
        return
    if _BACKEND.value == "print":
        backends.print_commands(rounds)
    elif _BACKEND.value == "slurm":
        backends.submit(rounds, _AT_ONCE.value, workdir)
    else:
        backends.run_here(rounds, _AT_ONCE.value or 1)


def _say(text: str) -> None:
    """Prints a message; on stderr where stdout has the printed commands."""
    print(text, file=sys.stderr if _BACKEND.value == "print" else sys.stdout)


def load_sweep(file_and_name: str) -> list[Overrides]:
    """The points of `FILE:NAME`."""
    path, _, name = file_and_name.rpartition(":")
    file = files.local_path(path or name)
    if not path or not file.is_file():
        what = "expected FILE:NAME" if not path else f"no file {path}"
        raise UserError(f"--sweep={file_and_name}: {what}")
    spec = importlib.util.spec_from_file_location("sweep_config", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--sweep={file_and_name}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "sweep"):
            raise UserError(f"{path} has no function sweep(name)")
        points = list(module.sweep(name))
    except Exception as error:  # whatever the file raises
        raise UserError(f"--sweep={file_and_name}: {describe(error)}") from error
    if not points or not all(isinstance(point, Mapping) and point for point in points):
        raise UserError(f"--sweep={file_and_name}: expected a list of {{dotted key: value}}")
    return points


def apply_point(config: ConfigDict, point: Overrides) -> ConfigDict:
    """The config of a point; a UserError for a missing key or a value of another type."""
    config = config.copy_and_resolve_references()
    for key, value in point.items():
        try:
            config.update_from_flattened_dict({key: value})
        except (KeyError, AttributeError) as error:
            raise UserError(f"the config has no field {key!r}, which the sweep sets") from error
        except (TypeError, ValueError) as error:
            raise UserError(
                f"the sweep sets {key} to {value!r}: {' '.join(str(error).split())}"
            ) from error
    return config


def check_command(words: Sequence[str], config: ConfigDict) -> None:
    """Raises a UserError unless a command's flags are read as just this config."""
    own = flags.FlagValues()
    holder = config_flags.DEFINE_config_file(
        "config", lock_config=True, flag_values=own, sys_argv=list(words)
    )
    try:
        own(list(words), known_only=True)
        differs = holder.value.to_json() != config.to_json()
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(f"its values can't be given as flags: {describe(error)}") from error
    if differs:
        given = [word for word in words if word.startswith("--config.")]
        raise UserError(f"its values aren't the same when given as flags: {shlex.join(given)}")


def point_names(points: Sequence[Overrides]) -> list[str]:
    """A directory for each point: the last parts of its keys, or all of them if need be, and values."""
    for whole in (False, True):
        names = [_point_name(point, whole) for point in points]
        if len(set(names)) == len(names):
            return names
    twice = next(name for name in names if names.count(name) > 1)
    raise UserError(f"two points of the sweep are {twice}; they must differ")


def _point_name(point: Overrides, whole: bool) -> str:
    last = {key.rpartition(".")[2] for key in point}
    whole = whole or len(last) < len(point)
    parts = [f"{key if whole else key.rpartition('.')[2]}={x}" for key, x in point.items()]
    name = re.sub(r"[^\w.,=+:@()'-]", "_", ",".join(parts).replace(" ", ""))
    if len(name.encode()) <= _LONGEST:
        return name
    short = name.encode()[: _LONGEST - 9].decode(errors="ignore")
    return f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def join_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """All points' rows, each with the point's overrides under "point"."""
    return [
        {**row, "point": point.overrides}
        for point in points
        for row in read_json(point.workdir / "results.json")
    ]


def markdown(points: Sequence[Overrides], rows: Sequence[dict[str, Any]]) -> str:
    """A table with a column per point, and a line for each row and metric that differs."""
    names = point_names(points)
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        spread = "" if row["std"] is None else f" ± {row['std']:.3g}"
        cells = lines.setdefault((row["table"], _plain(row["row"]), row["metric"]), {})
        cells[names[points.index(row["point"])]] = f"{row['value']:.5g}{spread}"
    head = ["table", "row", "metric", *names]
    table = [head, ["---"] * len(head)]
    for key, cells in lines.items():
        values = [cells.get(name, "-") for name in names]
        if len(set(values)) > 1 or len(points) == 1:
            table.append([*key, *values])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table) + "\n"


def _plain(row: str) -> str:
    """A row's name without the temperature, so that points of a sweep over it share a line."""
    return row.partition(", T=")[0]


def _stages() -> Any:
    """The study's stages."""
    return extras.import_study(_CONFIG.value.study).STAGES


def _is_finished(point: Point) -> bool:
    """Whether the selected stages are finished; a UserError if they have another config."""
    check_same(point.workdir, point.config)
    names = _STAGES.value or [stage.name for stage in _stages()]
    return all(finished_key(point.workdir, name) for name in names if name != "report")


def _point_job(point: Point, workdir: Path) -> Job:
    """The job that runs a point by `launch.main`; it reuses what other points have finished."""
    stages = [f"--stages={','.join(_STAGES.value)}"] if _STAGES.value else []
    words = _main_command(point.workdir, point.overrides, *stages, f"--reuse={workdir}")
    return Job(point.workdir.name, words, point.workdir / "log.txt")


def _main_command(workdir: Path, point: Overrides, *more: str) -> list[str]:
    """The command of `launch.main` with this command's config and the overrides of a point."""
    given: Mapping[str, Any] = config_flags.get_override_values(flags.FLAGS["config"])
    return [
        sys.executable,
        "-m",
        "launch.main",
        f"--config={config_flags.get_config_filename(flags.FLAGS['config'])}",
        f"--workdir={workdir}",
        *[f"--config.{key}={value}" for key, value in {**given, **point}.items()],
        *more,
    ]


if __name__ == "__main__":
    command.run(main)
