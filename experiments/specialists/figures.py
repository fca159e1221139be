"""The specialist study's figures: pure functions from plain data to matplotlib Figures.

Each takes what the study wrote (rows, curves, clusters, examples) and gives None where there is nothing
to draw. The generalist is black everywhere, what specialists give blue and what it is held against
orange.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.common.plots import (
    OTHER,
    OURS,
    PAPER,
    SMALL,
    Row,
    draw_bars,
    draw_curves,
    draw_line,
    make_panels,
    note,
    select,
    spreads,
    tidy,
    widen,
)
from experiments.common.report import NamedFigure
from experiments.specialists import pictures

_CURVES = ("generalist", "from_generalist", "on_labels")
"""The nets whose curves the README has."""

_CAPTIONS = {
    "table3": "Accuracy of the generalist, of the generalist with its specialists and of controls that "
    "cost as much, and its relative change, beside the paper's (diamonds; its data set is another). "
    "Conditional accuracy is that on examples of special classes with predictions restricted to these. "
    "The lines are the generalist's; bars are one standard deviation over seeds.",
    "comparison": "What specialists, and single nets taught by them, add to other systems: differences "
    "of test accuracy relative to the generalist's, with 95 % confidence intervals over seeds and over "
    "test typefaces (grey). Right of the line the first is better; a bar that meets it leaves it open.",
    "coverage": "Relative change of top-1 accuracy against the number of specialists whose classes "
    "include the true one, beside the paper's Table 4, and the share of the test examples at each "
    "number: where that is small, the change is uncertain. Bars are one standard deviation over seeds.",
    "clusters": "Classes of the first specialists, each shown by a picture: a row has the classes "
    "nearest to the centroid of one cluster, the nearest first.",
    "covariance": "Correlation of the generalist's predictions, on a logarithmic scale, with the "
    "classes of a cluster side by side and each cluster framed. A dot that stands for several pairs "
    "of classes shows the largest. A bright frame holds classes that are predicted together; bright "
    "spots outside are classes that are confused with those of another cluster.",
    "gallery": "Test examples whose most probable class the specialists corrected and broke: the "
    "example above a picture of its true class, and the five most probable classes with their "
    "probabilities in per cent, by the generalist and by Eq. 5. The true class is orange.",
    "soft": "Accuracy of specialists on their special classes against that on all others, for a "
    "dustbin and for a full softmax with hard and with soft targets (section 6.1), and while they are "
    "trained where that was recorded. Hollow: with early stopping. The lines are the generalist's; "
    "bars are one standard deviation over seeds, bands go from the lowest to the highest seed.",
    "distilled": "Single nets that learn from the generalist with its specialists: their accuracy, and "
    "the share that they keep of what the specialists add to the generalist. The lines are the "
    "generalist's and, in blue, what the nets learn from; bars are one standard deviation over seeds.",
}


def all_figures(
    rows: Sequence[Row],
    clusters: Mapping[str, np.ndarray] | None = None,
    gallery: Mapping[str, np.ndarray] | None = None,
    curves: Mapping[str, Any] | None = None,
) -> list[NamedFigure]:
    """Every figure that the data allows, as (name, caption, figure).

    Args:
        rows: the study's, of whichever stages are done.
        clusters: as `pictures.clusters` and `pictures.covariance` take them.
        gallery: as `pictures.gallery` takes it; the pictures of classes are those of `clusters`.
        curves: as `soft` takes them.
    """
    clusters = clusters or {}
    drawn = {
        "table3": table3(rows),
        "comparison": comparison(rows),
        "coverage": coverage(rows),
        "clusters": pictures.clusters(clusters),
        "covariance": pictures.covariance(clusters),
        "gallery": pictures.gallery(gallery or {}, clusters.get("class_images")),
        "soft": soft(rows, curves or {}),
        "distilled": distilled(rows),
    }
    return [(name, _CAPTIONS[name], figure) for name, figure in drawn.items() if figure is not None]


def published_figures(rows: Sequence[Row], history: Mapping[str, Any]) -> dict[str, Figure | None]:
    """Those of the README, from the published run."""
    # A mixture that is far from done would leave the others no room.
    compared = [row for row in rows if "from scratch" not in row["row"]]
    return {"comparison": comparison(compared), "curves": draw_curves(history, _CURVES)}


def table3(rows: Sequence[Row]) -> Figure | None:
    """Accuracies of all systems and their relative change beside the paper's (Table 3)."""
    wanted = {
        "test_accuracy": "test accuracy (%)",
        "conditional_test_accuracy": "conditional test accuracy (%)",
        "relative_change_percent": "relative change of accuracy (%)",
    }
    found = {metric: kept for metric in wanted if (kept := select(rows, "specialists", metric))}
    if not found:
        return None
    systems = list(dict.fromkeys(row["row"] for kept in found.values() for row in kept))
    figure, panels = _make_columns(systems, len(found))
    for axes, (metric, kept) in zip(panels, found.items(), strict=True):
        if metric == "relative_change_percent":
            axes.axvline(0.0, color="black", linewidth=0.8)
            _draw_systems(axes, kept, systems, "+.1f")
            for row in _papers(kept):
                point = (row["value"], systems.index(row["row"]))
                axes.plot(*point, color=PAPER, marker="D", markersize=4)
                note(axes, f"paper: {row['value']:+.1f}", point, (0, 5), ha="center", va="bottom")
        else:
            _draw_references(axes, kept, ["generalist"])
            _draw_systems(axes, kept, systems, ".1f")
        tidy(axes, "", wanted[metric], "", grid="x")
        _widen_across(axes, 1.0)
    return figure


def comparison(rows: Sequence[Row]) -> Figure | None:
    """Differences of pairs of systems, with their intervals."""
    table, metric = "specialists_comparison", "difference_percent"
    found = {
        end: {row["row"]: row for row in select(rows, table, metric + end)}
        for end in ("", "_over_typefaces")
    }
    if not any(row.get("interval") for row in found[""].values()):
        return None
    figure, (axes,) = _make_columns(names := list(found[""]), 1, 5.0)
    axes.set_yticks(range(len(names)), ["\n".join(textwrap.wrap(name, 44)) for name in names])
    axes.axvline(0.0, color="black", linewidth=0.8)
    for end, place, color in (("", 0.0, OURS), ("_over_typefaces", 0.2, PAPER)):
        for row in found[end].values():
            (low, high), value = row["interval"], row["value"]
            line = names.index(row["row"]) + place
            bar = [[value - low], [high - value]]
            axes.errorbar(value, line, xerr=bar, marker="o", markersize=4, color=color, capsize=2)
    tidy(axes, "", "difference of accuracy (%)", "", grid="x")
    _widen_across(axes, 1.0)
    return figure


def coverage(rows: Sequence[Row]) -> Figure | None:
    """Relative change of accuracy, and examples, by the number of covering specialists (Table 4)."""
    every = [row for row in rows if row["table"] == "specialists_coverage"]
    change, examples = (
        [row for row in every if row["metric"] == metric]
        for metric in ("relative_change_percent", "examples")
    )
    if not _ours(change):
        return None
    figure = Figure(figsize=(5.6, 3.9), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.2])
    upper.axhline(0.0, color="black", linewidth=0.8)
    for kept, name, color, marker, side in (
        (_papers, "paper", PAPER, "D", 0.2),
        (_ours, "ours", OURS, "o", -0.2),
    ):
        if not (line := kept(change)):  # the paper's numbers may be left out
            continue
        bars = {} if spreads(line).any() else {"yerr": None}
        draw_line(upper, line, "cover", color=color, marker=marker, label=name, **bars)
        counts = np.array([row["value"] for row in kept(examples)], float)
        x = np.array([row["cover"] for row in kept(examples)], float) + side
        lower.bar(x, 100 * counts / counts.sum(), 0.36, color=color)
    tidy(upper, "", "", "relative change\nof accuracy (%)")
    widen(upper, 1.0)
    upper.legend(frameon=False, fontsize=SMALL, loc="upper left")
    tidy(lower, "", "specialists that cover the true class", "share of\nexamples (%)")
    names = {
        row["cover"]: row["row"].removeprefix("covered by ").replace(" or ", " or\n")
        for row in every
    }
    lower.set_xticks(list(names), list(names.values()))
    return figure


def soft(rows: Sequence[Row], curves: Mapping[str, Any]) -> Figure | None:
    """Accuracy on special and on other classes, for each kind of specialist (section 6.1).

    Args:
        rows: the study's.
        curves: by kind `{"step": [E], "special_accuracy": [E] or [E][seeds], "other_accuracy":
            likewise}`, per cent. Curves of anything else are not drawn.
    """
    labels = {"special_accuracy": "special classes (%)", "other_accuracy": "other classes (%)"}
    special, other = (
        {row["row"]: row for row in select(rows, "specialists_soft", metric)} for metric in labels
    )
    kinds = [name for name in special if name in other and name != "generalist"]
    traced = {name: curve for name, curve in curves.items() if labels.keys() <= curve.keys()}
    if not kinds and not traced:
        return None
    figure, panels = make_panels(bool(kinds) + 2 * bool(traced), height=2.5, extra=0.5)
    if kinds:
        axes = panels.pop(0)
        for name in kinds:
            _draw_kind(axes, special[name], other[name])
        _draw_level(axes.axvline, special.get("generalist"))
        _draw_level(axes.axhline, other.get("generalist"))
        tidy(axes, "after training", *labels.values())
        _widen_across(axes, 1.0)
        widen(axes, 1.0)
    # Without curves no panels are left.
    for axes, metric, found in zip(panels, labels, (special, other), strict=False):
        for name, curve in traced.items():
            _draw_curve(axes, name, curve["step"], curve[metric])
        _draw_level(axes.axhline, found.get("generalist"))
        tidy(axes, "during training", "step", labels[metric])
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        widen(axes, 1.0)
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    style: dict[str, Any] = {"ncols": 2, "frameon": False, "fontsize": SMALL}
    figure.legend(handles.values(), handles, loc="outside lower left", **style)
    return figure


def distilled(rows: Sequence[Row]) -> Figure | None:
    """What single nets keep of what the specialists add (section 8)."""
    table = "specialists_distilled"
    accuracy, kept = (select(rows, table, name) for name in ("test_accuracy", "gain_kept_percent"))
    if not accuracy:
        return None
    systems = list(dict.fromkeys(row["row"] for row in [*accuracy, *kept]))
    figure, panels = _make_columns(systems, 2 if kept else 1)
    teachers = [name for name in systems if name.startswith("generalist")]
    _draw_references(panels[0], accuracy, teachers)
    _draw_systems(panels[0], accuracy, systems, ".1f")
    tidy(panels[0], "", "test accuracy (%)", "", grid="x")
    _widen_across(panels[0], 1.0)
    if kept:
        std = spreads(kept)
        draw_bars(
            panels[1],
            np.array([systems.index(row["row"]) for row in kept]),
            [row["value"] for row in kept],
            xerr=std if std.any() else None,
            error_kw={"linewidth": 1, "capsize": 2},
            color=[_color(row["row"]) for row in kept],
        )
        panels[1].axvline(0.0, color="black", linewidth=0.8)
        tidy(panels[1], "", "share of the gain kept (%)", "", grid="x")
        panels[1].margins(x=0.15)
    return figure


def _ours(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["value"] is not None]


def _papers(rows: Sequence[Row]) -> list[Row]:
    """The paper's numbers in the place of ours; it gives no spread."""
    found = [row for row in rows if row["paper"] is not None]
    return [{**row, "value": row["paper"], "std": None} for row in found]


def _color(system: str) -> str:
    """Black for the generalist, blue for what specialists give, orange for what it is held against."""
    if system == "generalist":
        return "black"
    # A control has further words: "... specialists of random classes".
    ours = system.endswith((" specialists", ", n = 1")) or system.startswith("distilled")
    return OURS if ours else OTHER


def _make_columns(
    systems: Sequence[str], count: int, width: float = 2.1
) -> tuple[Figure, list[Axes]]:
    """Panels side by side with a line for each system, the first at the top."""
    figure = Figure(figsize=(2.0 + width * count, 0.7 + 0.42 * len(systems)), layout="constrained")
    grid = {"wspace": 0.08}  # between a panel's numbers and the next panel
    panels = list(figure.subplots(1, count, sharey=True, squeeze=False, gridspec_kw=grid)[0])
    names = ["\n".join(textwrap.wrap(system, 28)) for system in systems]
    panels[0].set_yticks(range(len(systems)), names)
    panels[0].set_ylim(len(systems) - 0.5, -0.7)
    for axes in panels:
        axes.tick_params(axis="y", length=0)
    return figure, panels


def _draw_systems(axes: Axes, rows: Sequence[Row], systems: Sequence[str], form: str) -> None:
    """A point for each row in its system's line, with an error bar; its number at the right."""
    for row in rows:
        place = systems.index(row["row"])
        style: dict[str, Any] = {"color": _color(row["row"]), "markersize": 5, "capsize": 2}
        axes.errorbar(row["value"], place, xerr=row["std"], marker="o", **style)
        number, system = f"{row['value']:{form}}", axes.get_yaxis_transform()
        note(axes, number, (1.0, place), (4, 0), system, va="center")


def _draw_references(axes: Axes, rows: Sequence[Row], systems: Sequence[str]) -> None:
    """Lines through the whole panel at some systems' values."""
    for row in rows:
        if row["row"] in systems:
            color = _color(row["row"])
            axes.axvline(row["value"], color=color, linestyle="--", linewidth=0.8, alpha=0.7)


def _widen_across(axes: Axes, least: float) -> None:
    """Room beside the points, and a horizontal axis that spans `least` or more."""
    axes.margins(x=0.15)
    widen(axes, least, horizontal=True)


def _draw_level(line: Any, row: Row | None) -> None:
    """The generalist's value, drawn by `axhline` or `axvline`, if there is one."""
    if row is not None:
        style: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1}
        line(row["value"], label="generalist", **style)


def _kind_color(kind: str) -> str:
    """Of a full softmax as in the speech study's figures: soft targets blue, hard ones orange."""
    if kind.startswith("dustbin"):
        return "black"
    return OURS if "soft targets" in kind else OTHER


def _draw_kind(axes: Axes, special: Row, other: Row) -> None:
    """A kind of specialist as a point with error bars both ways."""
    color, name = _kind_color(special["row"]), special["row"]
    style: dict[str, Any] = {"marker": "o", "markersize": 6, "linestyle": "", "capsize": 2}
    style["markerfacecolor"] = "none" if "early stopping" in name else color
    x, y = special["value"], other["value"]
    axes.errorbar(x, y, other["std"], special["std"], color=color, label=name, **style)


def _draw_curve(axes: Axes, kind: str, steps: Sequence[int], values: Any) -> None:
    """A mean over seeds in a band from the lowest to the highest; values `[E]` or `[E][seeds]`."""
    found = np.asarray(values, float).reshape(len(steps), -1)
    color = _kind_color(kind)
    axes.fill_between(steps, found.min(axis=1), found.max(axis=1), color=color, alpha=0.2, lw=0)
    marker = "o" if len(steps) == 1 else ""
    axes.plot(steps, found.mean(axis=1), color=color, marker=marker, linewidth=1.5, label=kind)
