"""A published run: its rows and trained nets are kept in the project, and can be measured again.

A study's folder then holds

    reference.json          the rows, with the name of the machine
    history.json            the errors of its nets by epoch
    *.png                   the figures of its README
    published/NAME/         one trained net of each kind that is small enough
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from distill_jax import files, nets
from distill_jax.errors import UserError
from distill_jax.nets import Net
from experiments.common.report import Row, load_rows
from experiments.common.training import curve

_RECORDS = 50
_INPUTS = 16  # kept with a net, to compare exported forms on

PRESET = "full"
"""The preset whose results are published."""


class Published(NamedTuple):
    """A net that is kept, the first one of its training, and the row that it has a value of.

    training: its folder in a working directory. row: its table, name and metric. measure: that
    metric of the net alone, on data of the project. within: what another machine's rounding may change.
    beside: files of its stage that are kept with it.
    """

    training: str
    row: tuple[str, str, str]
    measure: Callable[[Net], float]
    within: float = 0.0
    beside: Sequence[str] = ()


Figures = Callable[[Sequence[Row], Mapping[str, Any]], Mapping[str, Any]]
"""`(rows, history) -> {name: Figure, or None where rows are missing}`."""


class Checked(NamedTuple):
    """A published value and the one that is measured now."""

    name: str
    row: str
    metric: str
    published: float
    measured: float
    agrees: bool


def publish(workdir: Path, study: Path, published: Mapping[str, Published], device: str) -> None:
    """Copies a finished run's rows, history and first nets into the study's folder.

    Raises:
        UserError: for a run that lacks a row or a net that is published.
    """
    rows = load_rows(workdir / "results.json")
    for one in published.values():
        _value(rows, one, workdir / "results.json")
    for name, one in published.items():
        folder = workdir / "stages" / one.training
        net = nets.load(folder)
        inputs = jax.tree.map(lambda field: field[:_INPUTS], nets.load_inputs(folder))
        first = net if net.members is None else net.member(0)
        first = first._replace(history=first.history[-1:])
        kept = study / "published" / name
        nets.save(kept, first, inputs=inputs, overwrite=True)
        for path in one.beside:
            shutil.copyfile(workdir / "stages" / path, kept / Path(path).name)
    _write_lines(study / "reference.json", [{**row, "device": device} for row in rows])
    files.write_json(study / "history.json", history(workdir))


def history(workdir: Path) -> dict[str, Any]:
    """The epochs and the errors of each training and member: up to `_RECORDS` of its reports."""
    found = {}
    folders = sorted(path.parent for path in workdir.glob("stages/*/*/net.json"))
    names = [folder.name for folder in folders]
    for folder in folders:
        columns = curve(nets.read_meta(folder)["history"])
        size = len(columns["epoch"])
        kept = sorted({round(x) for x in np.linspace(0, size - 1, min(size, _RECORDS))})
        # Trainings of two stages may have the same name.
        alone = names.count(folder.name) == 1
        found[folder.name if alone else f"{folder.parent.name}/{folder.name}"] = {
            name: [column[i] for i in kept]
            for name, column in columns.items()
            if name == "epoch" or "errors" in name
        }
    return found


def draw(study: Path, figures: Figures) -> None:
    """Draws the figures of the study's README from its published rows and history."""
    drawn = figures(load_rows(study / "reference.json"), files.read_json(study / "history.json"))
    for name, figure in drawn.items():
        if figure is None:
            raise UserError(f"{study / 'reference.json'} has no rows for the figure {name}")
        path = study / f"{name}.png"
        figure.savefig(path, dpi=110, facecolor="white", metadata={"Software": None})


def check(study: Path, published: Mapping[str, Published]) -> list[Checked]:
    """Measures the published nets of a study's folder again.

    Raises:
        UserError: for a net or a row that isn't there.
    """
    reference = study / "reference.json"
    rows, found = load_rows(reference), []
    for name, one in published.items():
        net = nets.load_net(study / "published" / name)
        before, now = _value(rows, one, reference), one.measure(net)
        agrees = abs(now - before) <= one.within
        found.append(Checked(name, one.row[1], one.row[2], before, now, agrees))
    return found


def _value(rows: Sequence[Row], one: Published, path: Path) -> float:
    """The first seed's value of the row."""
    for row in rows:
        if (row["table"], row["row"], row["metric"]) == one.row and row.get("values"):
            return row["values"][0]
    raise UserError(f"{path} has no row {', '.join(one.row)} with the values of each seed")


def _write_lines(path: Path, rows: Sequence[Row]) -> None:
    """JSON with a line for each row, so that versions can be compared."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    with files.write_whole(path) as partial:
        partial.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
