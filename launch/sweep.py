"""Runs the points of a sweep, or the parts of a stage, as jobs; and joins the results of a sweep.

    python -m launch.sweep --config=experiments/mnist/config.py:default \\
        --sweep=experiments/mnist/config.py:temperature --workdir=runs/temperature

The sweep is what `sweep(NAME)` in the named file returns: a list of {dotted key: value}. Every override
is checked against the locked config before anything runs. Each point has a directory of its own. Points
that are finished are skipped; what they share (the teacher, when only the student is swept) is trained
once, by the first point, which runs alone, and reused by the others. The same command again resumes
where the last one stopped; when all points are finished it prints one table.

--backend=local runs --at_once=N processes side by side, and each sees its share of the GPUs that
CUDA_VISIBLE_DEVICES lists. slurm submits job arrays and returns; sbatch's own variables, such as
SBATCH_PARTITION and SBATCH_GRES, say where. print prints the commands for you to run; the first one
trains what the others reuse.

    python -m launch.sweep --config=experiments/specialists/config.py:paper \\
        --parts=specialists:8 --workdir=runs/specialists --backend=slurm

trains the groups of nets of one stage (specialists, members of an ensemble) as 8 jobs in one working
directory, and says which command then finishes the study.
"""

import importlib.util
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from distill_jax.errors import UserError
from experiments.common import extras, parts
from experiments.common.config import Overrides
from experiments.common.run import check_names
from experiments.common.study import check_same, read_json, write_json
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


def main(argv: Sequence[str]) -> None:
    """Runs the unfinished points of a sweep, or parts of a stage."""
    sweep, stage_and_count, workdir = _SWEEP.value, _PARTS.value, Path(_WORKDIR.value)
    if sweep and not stage_and_count:
        _run_sweep(load_sweep(sweep), workdir)
    elif stage_and_count and not sweep:
        _run_parts(stage_and_count, workdir)
    else:
        raise UserError("give either --sweep=FILE:NAME or --parts=STAGE:N")


def _run_sweep(points: Sequence[Overrides], workdir: Path) -> None:
    """Checks all points, runs those that are not finished, and joins the rows once all are."""
    configs = {point_name(point): apply_point(_CONFIG.value, point) for point in points}
    check_names(_stages(), _STAGES.value)
    jobs = [
        _point_job(point, points, workdir)
        for point in points
        if not _is_finished(workdir / point_name(point), configs[point_name(point)])
    ]
    # The first point trains what all share; in parallel, each would train it again.
    alone = 1 if len(jobs) == len(points) else 0
    _run([jobs[:alone], jobs[alone:]], workdir)
    left = [name for name in configs if not _is_finished(workdir / name, configs[name])]
    if left:
        _say(f"not finished: {', '.join(left)}. The same command joins the results of all.")
        return
    rows = join_rows(workdir, points)
    write_json(workdir / "sweep.json", rows)
    table = markdown(points, rows)
    (workdir / "sweep.md").write_text(table)
    _say(table)


def _run_parts(stage_and_count: str, workdir: Path) -> None:
    """Trains the groups of a stage, unless it is finished."""
    stage, _, number = stage_and_count.partition(":")
    count = int(number) if number.isdecimal() else 0
    if count < 1:
        raise UserError(f"--parts={stage_and_count}: expected STAGE:N, such as specialists:4")
    parts.find_stage(workdir, _stages(), [stage])
    check_same(workdir, _CONFIG.value)
    jobs = [
        Job(
            f"{stage}-{i}-of-{count}",
            _main_command(workdir, {}, f"--stages={stage}", f"--part={i},{count}"),
            workdir / f"{stage}-{i}-of-{count}" / "log.txt",
        )
        for i in range(count)
    ]
    _run([] if (workdir / "stages" / stage / "stage.json").exists() else [jobs], workdir)
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
    path, _, name = file_and_name.partition(":")
    spec = importlib.util.spec_from_file_location("sweep_config", path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise UserError(f"--sweep={file_and_name}: no file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "sweep"):
        raise UserError(f"--sweep={file_and_name}: {path} has no function sweep(name)")
    try:
        return module.sweep(name)
    except ValueError as error:
        raise UserError(f"--sweep={file_and_name}: {error}") from error


def apply_point(config: ConfigDict, point: Overrides) -> ConfigDict:
    """The config of a point; a UserError for a missing key or a value of another type."""
    config = config.copy_and_resolve_references()
    for key, value in point.items():
        try:
            config.update_from_flattened_dict({key: value})
        except (KeyError, AttributeError) as error:
            raise UserError(f"the config has no field {key!r}, which the sweep sets") from error
        except TypeError as error:
            raise UserError(f"the sweep sets {key} to {value!r}: {error}") from error
    return config


def point_name(point: Overrides) -> str:
    """The point's directory: its last key parts and values."""
    parts = [f"{key.rpartition('.')[2]}={value}" for key, value in point.items()]
    return ",".join(parts).replace("/", "_").replace(" ", "")


def join_rows(workdir: Path, points: Sequence[Overrides]) -> list[dict[str, Any]]:
    """All points' rows, each with the point's overrides under "point"."""
    return [
        {**row, "point": point}
        for point in points
        for row in read_json(workdir / point_name(point) / "results.json")
    ]


def markdown(points: Sequence[Overrides], rows: Sequence[dict[str, Any]]) -> str:
    """A table with a column per point, and a line for each row and metric that differs."""
    names = [point_name(point) for point in points]
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        spread = "" if row["std"] is None else f" ± {row['std']:.3g}"
        cells = lines.setdefault((row["table"], _plain(row["row"]), row["metric"]), {})
        cells[point_name(row["point"])] = f"{row['value']:.5g}{spread}"
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


def _is_finished(directory: Path, config: ConfigDict) -> bool:
    """Whether the selected stages are finished; a UserError if they have another config."""
    check_same(directory, config)
    names = _STAGES.value or [stage.name for stage in _stages()]
    files = [directory / "stages" / name / "stage.json" for name in names if name != "report"]
    return all(file.exists() for file in files)


def _point_job(point: Overrides, points: Sequence[Overrides], workdir: Path) -> Job:
    """The job that runs a point by `launch.main`; it reuses what other points have finished."""
    directory = workdir / point_name(point)
    others = [str(workdir / point_name(other)) for other in points if other != point]
    reuse = [f"--reuse={','.join(others)}"] if others else []
    stages = [f"--stages={','.join(_STAGES.value)}"] if _STAGES.value else []
    words = _main_command(directory, point, *stages, *reuse)
    return Job(point_name(point), words, directory / "log.txt")


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
