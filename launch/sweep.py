"""Runs a named sweep of config overrides, one working directory each, and joins their results.

    python -m launch.sweep --config=experiments/mnist/config.py:default \\
        --sweep=experiments/mnist/config.py:temperature --workdir=runs/temperature

The sweep is what `sweep(NAME)` in the named file returns: a list of {dotted key: value}. Every override
is checked against the locked config before anything runs. Points that are finished are skipped; what
they share (the teacher, when only the student is swept) is trained once and taken over. The same
command again goes on where the last one stopped.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from distill_jax.errors import UserError
from experiments.study import read_json, write_json
from experiments.sweeps import Overrides
from launch import command

_CONFIG = command.define_config()
_SWEEP = flags.DEFINE_string("sweep", None, "FILE:NAME of the sweep.", required=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Holds a directory per point, sweep.json and sweep.md.", required=True
)
_STAGES = flags.DEFINE_list("stages", [], "Stages to run for every point; all if not given.")


def main(argv: Sequence[str]) -> None:
    """Checks all points, runs those that are not finished, and joins their rows."""
    workdir = Path(_WORKDIR.value)
    points = load_sweep(_SWEEP.value)
    for point in points:
        check_point(_CONFIG.value, point)
    for number, point in enumerate(points, 1):
        print(f"point {number} of {len(points)}: {point_name(point)}", flush=True)
        _run_point(workdir, point, [workdir / point_name(other) for other in points])
    rows = join_rows(workdir, points)
    write_json(workdir / "sweep.json", rows)
    table = markdown(points, rows)
    (workdir / "sweep.md").write_text(table)
    print(table)


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


def check_point(config: ConfigDict, point: Overrides) -> None:
    """Raises a UserError for a key that the config lacks, or a value of another type."""
    for key, value in point.items():
        try:
            config.copy_and_resolve_references().update_from_flattened_dict({key: value})
        except (KeyError, AttributeError) as error:
            raise UserError(f"the config has no field {key!r}, which the sweep sets") from error
        except TypeError as error:
            raise UserError(f"the sweep sets {key} to {value!r}: {error}") from error


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
    """One table: a line per row and metric that differs between points, a column per point."""
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


def _run_point(workdir: Path, point: Overrides, others: Sequence[Path]) -> None:
    """Runs a point as a process of its own, as `launch.main` would be by hand."""
    directory = workdir / point_name(point)
    given = config_flags.get_override_values(flags.FLAGS["config"])
    overrides = [f"--config.{key}={value}" for key, value in {**given, **point}.items()]
    reuse = [str(other) for other in others if other != directory and other.exists()]
    process = [
        sys.executable,
        "-m",
        "launch.main",
        f"--config={config_flags.get_config_filename(flags.FLAGS['config'])}",
        f"--workdir={directory}",
        f"--stages={','.join(_STAGES.value)}",
        f"--reuse={','.join(reuse)}",
        *overrides,
    ]
    if subprocess.run(process, check=False).returncode != 0:
        raise UserError(f"{point_name(point)} failed; its message is above")


if __name__ == "__main__":
    command.run(main)
