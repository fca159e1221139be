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
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

from experiments.common.plots import (
    OTHER,
    OURS,
    PAPER,
    SMALL,
    WIDTH,
    Row,
    draw_bars,
    draw_curves,
    draw_line,
    log_axis,
    make_panels,
    select,
    spreads,
    tidy,
)

# Section 3: temperatures in this range worked best for 30 units, and all above this one gave fairly
# similar results for 300 units or more.
_BEST_FOR_30 = (2.5, 4.0)
_SIMILAR_ABOVE = 8.0

_CURVES = ("teacher", "baseline", "distilled", "shifts_soft", "distorted_labels", "distorted_soft")
"""The nets whose members are seeds alone, trained on the whole set; only their curves are drawn."""


_NETS = ("mnist", "mnist_shifts", "mnist_distorted")
"""The tables of the nets that `errors` compares."""

_CAPTIONS = {
    "errors": "Test errors of teachers, of small nets on labels, and of the same small nets distilled; "
    "bars are one standard deviation over seeds.",
    "temperature": "Test errors of distilled nets against the temperature, a panel for each width; "
    "the vertical axes differ. Bars are one standard deviation over seeds. Shaded: the range that "
    "the paper found best for 30 units (2.5 to 4), and the one in which it found fairly similar "
    "results for 300 or more units (above 8).",
    "bias_shift": "Errors of nets distilled without some digits, with the biases as learned and "
    "shifted, beside the paper's. Shifts marked \u2020 were chosen on the test set, as the paper "
    "did. Bars are one standard deviation over seeds.",
    "fractions": "Test errors of nets trained on a part of the training set with hard and with soft "
    "targets. Both axes are logarithmic; bars are one standard deviation over seeds.",
    "curves": "Test errors during training: mean over seeds, with a band from the lowest to the "
    "highest seed. The vertical axis is logarithmic and shared.",
    "digits": "Training images and the teacher's soft targets. At temperature 1 the other classes "
    "differ by orders of magnitude (logarithmic axis) yet hardly enter the cost; at a higher "
    "temperature they do. The correct class is orange.",
}


def all_figures(
    rows: Sequence[Row], curve_data: Mapping[str, Any], digit_data: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str, Figure]]:
    """Every figure that the data allows, as (name, caption, figure)."""
    drawn = {
        "errors": errors(rows),
        "temperature": temperature(rows),
        "bias_shift": bias_shift(rows),
        "fractions": fractions(rows),
        "curves": draw_curves(curve_data, _CURVES),
        "digits": digits(digit_data),
    }
    return [(name, _CAPTIONS[name], figure) for name, figure in drawn.items() if figure is not None]


def errors(rows: Sequence[Row]) -> Figure | None:
    """Test errors of teachers and small nets as bars, orange on labels; the paper's beside."""
    kept = [row for table in _NETS for row in select(rows, table, "test_errors")]
    if not kept:
        return None
    figure = Figure(figsize=(WIDTH, 0.9 + 0.42 * len(kept)), layout="constrained")
    axes, y = figure.subplots(), np.arange(len(kept))
    style: dict[str, Any] = {"error_kw": {"linewidth": 1, "capsize": 2}}
    if spreads(kept).any():
        style["xerr"] = spreads(kept)
    own = y - np.where([row["paper"] is None for row in kept], 0.0, 0.19)
    colors = [OURS if "distilled" in row["row"] else OTHER for row in kept]
    draw_bars(axes, own, [row["value"] for row in kept], color=colors, **style)
    draw_bars(axes, y + 0.19, [row["paper"] for row in kept], color=PAPER)
    tidy(axes, "", "errors of 10,000 test examples", "", grid="x")
    axes.set_yticks(y, ["\n".join(textwrap.wrap(row["row"], 44)) for row in kept])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.12)
    kinds = (("distilled", OURS), ("on labels", OTHER), ("the paper's", PAPER))
    handles = [Patch(color=color, label=name) for name, color in kinds]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=SMALL)
    return figure


def temperature(rows: Sequence[Row]) -> Figure | None:
    """Test errors against temperature, a panel for each width, with the paper's ranges shaded."""
    kept = select(rows, "mnist_temperature", "test_errors")
    widths = sorted({row["width"] for row in kept})
    if not widths:
        return None
    figure, panels = make_panels(len(widths), height=2.1, extra=0.5)
    every = [row["temperature"] for row in kept]
    low, high = min(every) / 1.25, max(every) * 1.25
    shade: dict[str, Any] = {"color": OTHER, "alpha": 0.18, "linewidth": 0}
    for axes, width in zip(panels, widths, strict=True):
        line = [row for row in kept if row["width"] == width]
        y, std = np.array([row["value"] for row in line], float), spreads(line)
        if width == 30:
            axes.axvspan(*_BEST_FOR_30, **shade)
        elif width >= 300 and high > _SIMILAR_ABOVE:
            axes.axvspan(_SIMILAR_ABOVE, high, **shade)
        draw_line(axes, line, "temperature", color=OURS, marker="o")
        title = f"2 x {width}, fewest at T = {line[int(np.argmin(y))]['temperature']:g}"
        tidy(axes, title, "temperature", "test errors")
        log_axis(axes, "x")
        axes.set_xlim(low, high)
        # The view spans at least a fifth of the errors, lest seed noise look like an effect.
        bottom, top = float(np.min(y - std)), float(np.max(y + std))
        pad = max(0.08 * (top - bottom), 0.1 * float(np.mean(y)) - 0.5 * (top - bottom))
        axes.set_ylim(max(bottom - pad, 0), top + pad)
    if any(axes.patches for axes in panels):
        label = "paper: best for 30 units, fairly similar for 300 or more"
        handles = [Patch(**shade, label=label)]
        figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize=SMALL)
    return figure


def bias_shift(rows: Sequence[Row]) -> Figure | None:
    """Errors with and without bias shifts beside the paper's numbers, as bars."""
    wanted = [
        ("mnist_without_3", "test_errors", "without 3s: test errors"),
        ("mnist_without_3", "errors_on_3", "without 3s: errors on 3s"),
        ("mnist_only_7_8", "test_error_percent", "only 7s and 8s: test error (%)"),
    ]
    drawn = [
        (kept, {row["row"]: row for row in select(rows, table, "bias_shift")}, title)
        for table, metric, title in wanted
        if (kept := select(rows, table, metric))
    ]
    if not drawn:
        return None
    heights = [0.6 + 0.56 * len(kept) for kept, _, _ in drawn]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), layout="constrained")
    panels = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (kept, shifts, title) in zip(panels, drawn, strict=True):
        y = np.arange(len(kept))
        std = spreads(kept)
        draw_bars(
            axes,
            y - 0.19,
            [row["value"] for row in kept],
            xerr=std if std.any() else None,
            error_kw={"linewidth": 1, "capsize": 2},
            color=OURS,
            label="ours",
        )
        draw_bars(axes, y + 0.19, [row["paper"] for row in kept], color=PAPER, label="paper")
        tidy(axes, title, "", "", grid="x")
        axes.set_yticks(y, [_bias_label(row, shifts.get(row["row"])) for row in kept])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
    handles = panels[0].get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False, fontsize=SMALL)
    return figure


def fractions(rows: Sequence[Row]) -> Figure | None:
    """Test errors against the fraction of the training set, hard beside soft targets."""
    kept = select(rows, "mnist_fraction", "test_errors")
    if not kept:
        return None
    figure = Figure(figsize=(5.4, 3.3), layout="constrained")
    axes = figure.subplots()
    for targets, color, marker in (("hard", OTHER, "s"), ("soft", OURS, "o")):
        line = [row for row in kept if row["targets"] == targets]
        draw_line(axes, line, "fraction", color=color, marker=marker, label=f"{targets} targets")
    tidy(axes, "", "training set used (%)", "test errors")
    log_axis(axes, "x", ticks=sorted({row["fraction"] for row in kept}))
    log_axis(axes, "y")
    axes.legend(frameon=False, fontsize=SMALL)
    return figure


def digits(digits: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Digits, each above its soft targets as bars, a row of panels for each temperature.

    Args:
        digits: `{"inputs": 28x28 of 0..255, "label": int, "names": [C] or [], "soft_targets":
            {temperature: [C]}}`.
    """
    if not digits:
        return None
    temperatures = sorted(digits[0]["soft_targets"], key=float)
    figure = Figure(
        figsize=(0.5 + 1.38 * len(digits), 1.3 + 1.5 * len(temperatures)), layout="constrained"
    )
    heights = [1.0] + [1.15] * len(temperatures)
    grid = figure.subplots(
        len(heights), len(digits), squeeze=False, sharey="row", height_ratios=heights
    )
    for axes, digit in zip(grid[0], digits, strict=True):
        others = np.array(digit["soft_targets"][temperatures[0]], float)
        others[digit["label"]] = -1.0
        axes.imshow(np.array(digit["inputs"]), cmap="gray", vmin=0, vmax=255)
        names = digit.get("names") or range(len(others))
        title = f"{names[digit['label']]}, most like {names[int(np.argmax(others))]}"
        axes.set_title(title, fontsize=SMALL)
        axes.set_axis_off()
    for panels, name in zip(grid[1:], temperatures, strict=True):
        targets = np.array([digit["soft_targets"][name] for digit in digits], float)
        for axes, probabilities, digit in zip(panels, targets, digits, strict=True):
            classes = range(len(probabilities))
            colors = [OTHER if i == digit["label"] else OURS for i in classes]
            axes.bar(classes, probabilities, 0.8, color=colors)
            tidy(axes, "", "", "")
            axes.set_xticks(classes[:: math.ceil(len(classes) / 10)])
            axes.tick_params(axis="x", length=0, labelsize=7)
            if float(name) == 1.0:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(numticks=5))
                axes.yaxis.set_minor_locator(NullLocator())
                # From the power of ten below the smallest; what float32 lost to 0 has no bar.
                smallest = float(targets[targets > 0].min())
                axes.set_ylim(max(10.0 ** math.floor(math.log10(smallest) - 0.3), 1e-15), 3.0)
        panels[0].set_ylabel(f"probability, T = {float(name):g}", fontsize=SMALL)
    return figure


def _bias_label(row: Row, shift: Row | None) -> str:
    """The row's name, wrapped, with the mark of the test set and the shift where there is one."""
    name = row["row"] + (" \u2020" if row["selection"] == "test" else "")
    lines = textwrap.wrap(name, 34)
    if shift is not None:
        paper = "" if shift["paper"] is None else f" (paper {shift['paper']:+.1f})"
        lines.append(f"shift {shift['value']:+.1f}{paper}")
    return "\n".join(lines)


def published_figures(rows: Sequence[Row], history: Mapping[str, Any]) -> dict[str, Figure | None]:
    """Those of the READMEs, from the published run."""
    return {
        "errors": errors(rows),
        "fractions": fractions(rows),
        "temperature": temperature(rows),
        "curves": draw_curves(history, _CURVES),
    }
