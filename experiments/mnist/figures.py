"""The MNIST study's figures: pure functions from plain data to matplotlib Figures.

Each takes what the study wrote (rows, curves, digits) and gives None where there is nothing to
draw. Figures are made without pyplot, so nothing is registered globally. Ink is black and
backgrounds are left empty, so that a report can show them on a light and on a dark page.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from distill_jax.errors import UserError

Row = Mapping[str, Any]

_OURS = "#3f86c9"
_OTHER = "#dd7a2e"
_PAPER = "#949ba3"
_WIDTH = 7.4
_SMALL = 8
_TEXT = 9

# Section 3: temperatures in this range worked best for 30 units, and all above this one gave fairly
# similar results for 300 units or more.
_BEST_FOR_30 = (2.5, 4.0)
_SIMILAR_ABOVE = 8.0


def all_figures(
    rows: Sequence[Row],
    curve_data: Mapping[str, Any] | None = None,
    digit_data: Sequence[Mapping[str, Any]] | None = None,
) -> list[tuple[str, str, Figure]]:
    """Every figure that the data allows, as (name, caption, figure)."""
    drawn = [
        (
            "temperature",
            "Test errors of distilled nets against the temperature, a panel for each width; the "
            "vertical axes differ. Bars are one standard deviation over seeds. Shaded: the range "
            "that the paper found best for 30 units (2.5 to 4), and the one in which it found "
            "fairly similar results for 300 or more units (above 8).",
            temperature(rows),
        ),
        (
            "bias_shift",
            "Errors of nets distilled without some digits, with the biases as learned and shifted, "
            "beside the paper's. Shifts marked \u2020 were chosen on the test set, as the paper "
            "did. Bars are one standard deviation over seeds.",
            bias_shift(rows),
        ),
        (
            "fractions",
            "Test errors of nets trained on a part of the training set with hard and with soft "
            "targets. Both axes are logarithmic; bars are one standard deviation over seeds.",
            fractions(rows),
        ),
        (
            "curves",
            "Test errors during training: mean over seeds, with a band from the lowest to the "
            "highest seed. The vertical axis is logarithmic and shared.",
            curves(curve_data or {}),
        ),
        (
            "digits",
            "Test images and the teacher's soft targets. At temperature 1 the other classes differ "
            "by orders of magnitude (logarithmic axis) yet hardly enter the cost; at a higher "
            "temperature they do. The correct class is orange.",
            digits(digit_data or []),
        ),
    ]
    return [(name, caption, figure) for name, caption, figure in drawn if figure is not None]


def temperature(rows: Sequence[Row]) -> Figure | None:
    """Test errors against temperature, a panel for each width, with the paper's ranges shaded."""
    kept = [
        row
        for row in _select(rows, "mnist_temperature", "test_errors")
        if row.get("temperature") is not None and row.get("width") is not None
    ]
    widths = sorted({row["width"] for row in kept})
    if not widths:
        return None
    figure, panels = _panels(len(widths), height=2.1, extra=0.5)
    every = [row["temperature"] for row in kept]
    low, high = min(every) / 1.25, max(every) * 1.25
    for axes, width in zip(panels, widths, strict=True):
        line = sorted((r for r in kept if r["width"] == width), key=lambda r: r["temperature"])
        x = [row["temperature"] for row in line]
        y = np.array([row["value"] for row in line], float)
        std = _spreads(line)
        if width == 30:
            axes.axvspan(*_BEST_FOR_30, color=_OTHER, alpha=0.18, linewidth=0)
        elif width >= 300 and high > _SIMILAR_ABOVE:
            axes.axvspan(_SIMILAR_ABOVE, high, color=_OTHER, alpha=0.18, linewidth=0)
        axes.errorbar(x, y, std, color=_OURS, marker="o", markersize=3.5, linewidth=1.5, capsize=2)
        best = int(np.argmin(y))
        title = f"2 x {width}, fewest at T = {x[best]:g}"
        _tidy(axes, title, "temperature", "test errors")
        _log_axis(axes.xaxis)
        axes.set_xlim(low, high)
        # The view spans at least a fifth of the errors, lest seed noise look like an effect.
        bottom, top = float(np.min(y - std)), float(np.max(y + std))
        pad = max(0.08 * (top - bottom), 0.1 * float(np.mean(y)) - 0.5 * (top - bottom))
        axes.set_ylim(max(bottom - pad, 0), top + pad)
    if any(width == 30 or (width >= 300 and high > _SIMILAR_ABOVE) for width in widths):
        label = "paper: best for 30 units, fairly similar for 300 or more"
        shade = Patch(color=_OTHER, alpha=0.18, linewidth=0, label=label)
        figure.legend(handles=[shade], loc="outside lower left", frameon=False, fontsize=_SMALL)
    return figure


def bias_shift(rows: Sequence[Row]) -> Figure | None:
    """Errors with and without bias shifts beside the paper's numbers, as bars."""
    wanted = [
        ("mnist_without_3", "test_errors", "without 3s: test errors (of 10,000)"),
        ("mnist_without_3", "errors_on_3", "without 3s: errors on 3s (of 1,010)"),
        ("mnist_only_7_8", "test_error_percent", "only 7s and 8s: test error (%)"),
    ]
    drawn = [
        (kept, _shifts(rows, table), title)
        for table, metric, title in wanted
        if (kept := _select(rows, table, metric))
    ]
    if not drawn:
        return None
    heights = [0.6 + 0.56 * len(kept) for kept, _, _ in drawn]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.5), layout="constrained")
    panels = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (kept, shifts, title) in zip(panels, drawn, strict=True):
        y = np.arange(len(kept))
        std = [row["std"] or 0.0 for row in kept]
        ours = axes.barh(
            y - 0.19,
            [row["value"] for row in kept],
            0.36,
            xerr=std if any(std) else None,
            error_kw={"linewidth": 1, "capsize": 2},
            color=_OURS,
            label="ours",
        )
        _label_bars(axes, ours, [row["value"] for row in kept])
        paper = [row["paper"] for row in kept]
        theirs = axes.barh(y + 0.19, [p or 0.0 for p in paper], 0.36, color=_PAPER, label="paper")
        _label_bars(axes, theirs, paper)
        _tidy(axes, title, "", "")
        axes.set_yticks(y, [_bias_label(row, shifts) for row in kept], fontsize=_SMALL)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        axes.grid(True, axis="x", color=_PAPER, alpha=0.25, linewidth=0.6)
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=2, frameon=False, fontsize=_SMALL
    )
    return figure


def fractions(rows: Sequence[Row]) -> Figure | None:
    """Test errors against the fraction of the training set, hard beside soft targets."""
    kept = [
        row
        for row in _select(rows, "mnist_fraction", "test_errors")
        if row.get("fraction") is not None and row.get("targets") is not None
    ]
    if not kept:
        return None
    figure = Figure(figsize=(5.4, 3.3), layout="constrained")
    axes = figure.subplots()
    styles = {"hard": (_OTHER, "s"), "soft": (_OURS, "o")}
    for targets in sorted({row["targets"] for row in kept}):
        line = sorted((r for r in kept if r["targets"] == targets), key=lambda r: r["fraction"])
        color, marker = styles.get(targets, (_PAPER, "^"))
        axes.errorbar(
            [row["fraction"] for row in line],
            [row["value"] for row in line],
            _spreads(line),
            color=color,
            marker=marker,
            markersize=4,
            linewidth=1.5,
            capsize=2,
            label=f"{targets} targets",
        )
    _tidy(axes, "", "training set used (%)", "test errors")
    _log_axis(axes.xaxis)
    _log_axis(axes.yaxis)
    ticks = sorted({row["fraction"] for row in kept})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.legend(frameon=False, fontsize=_SMALL)
    return figure


def curves(curves: Mapping[str, Any]) -> Figure | None:
    """Test errors by epoch, a panel for each net: the seeds' mean in a band from lowest to highest.

    Args:
        curves: for each net `{"epoch": [E], "test_errors": [E][seeds]}`; epochs with a null were
            not tested and are left out.
    """
    kept = {}
    for name, net in curves.items():
        epochs = np.array(net.get("epoch", []), float)
        errors = np.array(net.get("test_errors", []), float)
        if errors.size == 0:
            continue
        errors = errors.reshape(len(errors), -1)
        if len(epochs) != len(errors):
            raise UserError(
                f"curves of {name!r}: {len(epochs)} epochs but {len(errors)} of test_errors"
            )
        tested = np.isfinite(errors).all(axis=1)
        if tested.any():
            kept[name] = (epochs[tested], errors[tested])
    if not kept:
        return None
    figure, panels = _panels(len(kept), height=2.0, sharey=True)
    for axes, (name, (epochs, errors)) in zip(panels, kept.items(), strict=True):
        mean = errors.mean(axis=1)
        if errors.shape[1] > 1:
            low, high = errors.min(axis=1), errors.max(axis=1)
            axes.fill_between(epochs, low, high, color=_OURS, alpha=0.3, linewidth=0)
        marker = "o" if len(epochs) == 1 else ""
        axes.plot(epochs, mean, color=_OURS, linewidth=1.5, marker=marker, markersize=3.5)
        _tidy(axes, f"{name}, ends at {mean[-1]:.0f}", "epoch", "test errors")
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        _log_axis(axes.yaxis)
        if axes not in panels[::3]:
            axes.set_ylabel("")
    return figure


def digits(digits: Sequence[Mapping[str, Any]], most: int = 5) -> Figure | None:
    """A few digits, each above its soft targets as bars, a row of panels for each temperature.

    Args:
        digits: `{"image": 28x28 of 0..255, "label": int, "soft_targets": {temperature: [10]}}`.
        most: how many to draw, from the start.
    """
    digits = list(digits)[:most]
    if not digits:
        return None
    temperatures = sorted(digits[0]["soft_targets"], key=float)
    size = (0.5 + 1.38 * most * len(digits) / max(most, 1), 1.3 + 1.5 * len(temperatures))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(
        1 + len(temperatures),
        len(digits),
        squeeze=False,
        sharey="row",
        height_ratios=[1.0] + [1.15] * len(temperatures),
    )
    for column, digit in enumerate(digits):
        label = int(digit["label"])
        image, title = grid[0, column], f"a {label}"
        others = np.array(digit["soft_targets"][temperatures[0]], float)
        others[label] = -1.0
        image.imshow(np.array(digit["image"]), cmap="gray", vmin=0, vmax=255)
        image.set_title(f"{title}, most like a {int(np.argmax(others))}", fontsize=_SMALL)
        image.set_axis_off()
    for axes_row, name in zip(grid[1:], temperatures, strict=True):
        targets = np.array([digit["soft_targets"][name] for digit in digits], float)
        logarithmic = float(name) == 1.0
        for axes, probabilities, digit in zip(axes_row, targets, digits, strict=True):
            colors = [_OTHER if i == int(digit["label"]) else _OURS for i in range(10)]
            axes.bar(range(probabilities.size), probabilities, 0.8, color=colors)
            _tidy(axes, "", "", "")
            axes.set_xticks(range(probabilities.size))
            axes.tick_params(axis="x", length=0, labelsize=7)
            if logarithmic:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(numticks=5))
                axes.yaxis.set_minor_locator(NullLocator())
                axes.set_ylim(_floor(targets), 3.0)
        axes_row[0].set_ylabel(f"probability, T = {float(name):g}", fontsize=_SMALL)
    return figure


def _floor(probabilities: np.ndarray) -> float:
    """The power of ten below the smallest probability; what float32 lost to 0 has no bar."""
    positive = probabilities[probabilities > 0]
    smallest = float(positive.min()) if positive.size else 1e-3
    return max(10.0 ** math.floor(math.log10(smallest) - 0.3), 1e-15)


def _select(rows: Sequence[Row], table: str, metric: str) -> list[Row]:
    """The measured rows of a table with a metric."""
    return [
        row
        for row in rows
        if row["table"] == table and row["metric"] == metric and row["value"] is not None
    ]


def _spreads(rows: Sequence[Row]) -> np.ndarray:
    """Lengths of error bars; without a spread the length is 0 and no bar shows."""
    return np.array([row["std"] or 0.0 for row in rows], float)


def _shifts(rows: Sequence[Row], table: str) -> dict[str, Row]:
    return {row["row"]: row for row in _select(rows, table, "bias_shift")}


def _bias_label(row: Row, shifts: Mapping[str, Row]) -> str:
    """The row's name, wrapped, with the mark of the test set and the shift where there is one."""
    name = str(row["row"]) + (" \u2020" if row["selection"] == "test" else "")
    lines = textwrap.wrap(name, 34)
    shift = shifts.get(row["row"])
    if shift is not None:
        paper = "" if shift["paper"] is None else f" (paper {shift['paper']:+.1f})"
        lines.append(f"shift {shift['value']:+.1f}{paper}")
    return "\n".join(lines)


def _label_bars(axes: Axes, bars: BarContainer, values: Sequence[float | None]) -> None:
    """Writes each bar's number at its end; bars without a number stay bare."""
    known = [value for value in values if value is not None]
    decimals = 0 if all(float(value).is_integer() for value in known) else 1
    text = ["" if value is None else f"{value:.{decimals}f}" for value in values]
    axes.bar_label(bars, text, padding=3, fontsize=_SMALL)


def _panels(
    count: int, height: float, extra: float = 0.0, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of up to three panels a row; the unused places of the last row are removed."""
    columns = min(count, 3)
    lines = math.ceil(count / columns)
    width = _WIDTH if columns == 3 else 0.6 + columns * 2.9
    figure = Figure(figsize=(width, height * lines + extra), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=sharey).ravel()
    for axes in grid[count:]:
        axes.remove()
    return figure, list(grid[:count])


def _tidy(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=_TEXT, loc="left")
    axes.set_xlabel(xlabel, fontsize=_SMALL)
    axes.set_ylabel(ylabel, fontsize=_SMALL)
    axes.tick_params(labelsize=_SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y", color=_PAPER, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _log_axis(axis: Any) -> None:
    """A logarithmic axis with plain numbers at 1, 2, 5, 10, ..."""
    set_scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
