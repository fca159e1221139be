"""Shared by the studies' figures: colours, sizes, and functions that draw rows as lines and bars.

Figures are made without pyplot, so nothing is registered globally. Ink is black and backgrounds are
left empty, so that a report can show them on a light and on a dark page.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

Row = Mapping[str, Any]

OURS = "#3f86c9"
OTHER = "#dd7a2e"
PAPER = "#949ba3"

WIDTH = 7.4
"""Inches, of a figure that has three panels side by side."""

SMALL = 8
TEXT = 9
"""Points, of titles; all other text is SMALL."""


def select(rows: Sequence[Row], table: str, metric: str) -> list[Row]:
    """The measured rows of a table with a metric."""
    kept = [row for row in rows if row["table"] == table and row["metric"] == metric]
    return [row for row in kept if row["value"] is not None]


def spreads(rows: Sequence[Row]) -> np.ndarray:
    """Lengths of error bars; without a spread the length is 0 and no bar shows."""
    return np.array([row["std"] or 0.0 for row in rows], float)


def draw_line(axes: Axes, rows: Sequence[Row], key: str, **style: Any) -> None:
    """A line of the rows' values against their `key`, with error bars."""
    line = sorted(rows, key=lambda row: row[key])
    x, y = [row[key] for row in line], [row["value"] for row in line]
    style = {"yerr": spreads(line), "markersize": 4, "linewidth": 1.5, "capsize": 2, **style}
    axes.errorbar(x, y, **style)


def draw_bars(axes: Axes, y: np.ndarray, values: Sequence[float | None], **style: Any) -> None:
    """Horizontal bars with their numbers at their ends; None is neither."""
    bars = axes.barh(y, [value or 0.0 for value in values], 0.36, **style)
    whole = all(value is None or float(value).is_integer() for value in values)
    text = ["" if value is None else f"{value:.{0 if whole else 1}f}" for value in values]
    axes.bar_label(bars, text, padding=3, fontsize=SMALL)


def draw_levels(axes: Axes, levels: Sequence[tuple[Row, str, str]]) -> None:
    """Horizontal lines at rows' values in bands of their spreads, named and numbered at the right.

    Args:
        axes: to draw on.
        levels: row, colour and name.
    """
    ordered = sorted(levels, key=lambda level: level[0]["value"])
    for index, (row, color, name) in enumerate(ordered):
        value, std = row["value"], row["std"] or 0.0
        axes.axhline(value, color=color, linewidth=1.2)
        if std:
            axes.axhspan(value - std, value + std, color=color, alpha=0.2, linewidth=0)
        # Names of close lines: the lower one's below, the upper one's above.
        va = "center" if len(ordered) == 1 else ("bottom" if index else "top")
        place, system = (1.0, value), axes.get_yaxis_transform()
        note(axes, f"{name}: {value:.1f}", place, (4, 0), system, ha="left", va=va)


def note(
    axes: Axes,
    text: str,
    place: tuple[float, float],
    offset: tuple[float, float],
    system: Any = "data",
    **style: Any,
) -> None:
    """A text at an offset in points from a place in a coordinate system, of data or another."""
    style = {"fontsize": SMALL, "textcoords": "offset points", **style}
    axes.annotate(text, place, offset, xycoords=system, annotation_clip=False, **style)


def widen(axes: Axes, least: float, *, horizontal: bool = False) -> None:
    """Lets an axis span `least` or more, so that noise does not look like an effect."""
    low, high = axes.get_xlim() if horizontal else axes.get_ylim()
    missing = max(least - (high - low), 0.0) / 2
    (axes.set_xlim if horizontal else axes.set_ylim)(low - missing, high + missing)


def make_panels(
    count: int, height: float, extra: float = 0.0, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of up to three panels a row; the unused places of the last row are removed.

    Args:
        count: of panels.
        height: of a row of panels, in inches.
        extra: added to the figure's height, for a legend.
        sharey: whether all panels have one vertical axis.
    """
    columns = min(count, 3)
    lines = math.ceil(count / columns)
    width = WIDTH if columns == 3 else 0.6 + columns * 2.9
    figure = Figure(figsize=(width, height * lines + extra), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=sharey).ravel()
    for axes in grid[count:]:
        axes.remove()
    return figure, list(grid[:count])


def draw_curves(curves: Mapping[str, Any], names: Sequence[str]) -> Figure | None:
    """Test errors by epoch, a panel for each net: the seeds' mean in a band from lowest to highest.

    Args:
        curves: by net `{"epoch": [E], "test_errors": [E][seeds]}`.
        names: of the nets to draw, where they are there.
    """
    names = [name for name in names if name in curves]
    if not names:
        return None
    figure, panels = make_panels(len(names), height=2.0, sharey=True)
    every = [np.array(curves[name]["test_errors"], float) for name in names]
    steep = max(each.max() for each in every) > 3 * min(each.min() for each in every)
    for index, (axes, name) in enumerate(zip(panels, names, strict=True)):
        epochs, errors = curves[name]["epoch"], every[index]
        mean, low, high = errors.mean(axis=1), errors.min(axis=1), errors.max(axis=1)
        axes.fill_between(epochs, low, high, color=OURS, alpha=0.3, linewidth=0)
        marker = "o" if len(epochs) == 1 else ""
        axes.plot(epochs, mean, color=OURS, linewidth=1.5, marker=marker, markersize=3.5)
        title = f"{name.replace('_', ' ').replace('/', ' ')}, ends at {mean[-1]:.0f}"
        tidy(axes, title, "epoch", "" if index % 3 else "test errors")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        if steep:
            log_axis(axes, "y")
    return figure


def tidy(axes: Axes, title: str, xlabel: str, ylabel: str, grid: str = "y") -> None:
    """Title, labels and a faint grid, without the box around them."""
    axes.set_title(title, fontsize=TEXT, loc="left")
    axes.set_xlabel(xlabel, fontsize=SMALL)
    axes.set_ylabel(ylabel, fontsize=SMALL)
    axes.tick_params(labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis=grid, color=PAPER, alpha=0.25, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def log_axis(axes: Axes, which: str, ticks: Sequence[float] = ()) -> None:
    """A logarithmic axis with plain numbers at `ticks`, or else at 1, 2, 5, 10, ..."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    if ticks:
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
