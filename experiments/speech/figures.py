"""The speech study's figures: pure functions from plain data to matplotlib Figures.

Each takes what the study wrote (rows, curves, an utterance, confusions) and gives None where there is
nothing to draw. The ensemble is orange everywhere, what was learned from it blue.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from experiments.common.plots import (
    OTHER,
    OURS,
    PAPER,
    SMALL,
    TEXT,
    Row,
    draw_bars,
    draw_curves,
    draw_levels,
    draw_line,
    log_axis,
    make_panels,
    note,
    select,
    spreads,
    tidy,
    widen,
)
from experiments.common.report import NamedFigure

_COLORS = {"ensemble": OTHER, "distilled": OURS}
_FRAME = 0.01  # seconds
_SHARE = 0.3  # of a frame's probability: phones with more are shown though not aligned
_MOST_CONFUSIONS = 15
_TINY = 7  # points
_UTTERANCE_WIDTH = 9.2
# From the darkest of a night sky to the palest blue: it stands out from white and from black.
_ENERGY = LinearSegmentedColormap.from_list(
    "energy", ["#141c33", "#1d3f72", "#3f86c9", "#a9d0ee", "#eef7fd"]
)

_CURVES = ("member_0", "distilled", "control")
"""The nets whose curves the README has."""

_CAPTIONS = {
    "temperature": "Frame accuracy of nets distilled from the ensemble at each temperature. The "
    "horizontal lines are accuracies on the test set: of single nets trained on labels, within one "
    "standard deviation of the members, and of the ensemble.",
    "ensemble_size": "Frame accuracy of ensembles of some of the members and of all. Bars are one "
    "standard deviation over ensembles that share no member. The diamond is the geometric mean of "
    "all members in place of the arithmetic one; the horizontal line is one net distilled from them.",
    "overfitting": "Frame accuracy while nets learn from a small part of the training set, with "
    "hard and with soft targets: mean over seeds, with a band from the lowest to the highest seed. "
    "The horizontal line is the test accuracy of nets trained on all data with hard targets.",
    "compression": "What becomes of a distilled net when few numbers of each frame's soft targets "
    "are kept: the k largest or drawn classes, their number at each point. Its frame accuracy, with "
    "one standard deviation over seeds, shaded for dense targets; how far the targets of a frame are "
    "from the dense ones; and what all frames' gradients with respect to the logits are off by.",
    "utterance": "From top to bottom: the log-mel energies that the nets see, brighter if louder, "
    "below the words; the phones of the forced alignment, with ticks where its HMM state changes; "
    "each net's probability of every phone in each frame, the aligned phone framed (full colour is a "
    "probability of 1 and the phones stand as they are first spoken, so that a sure net fills the "
    "frames and leaves the rest empty); and for each net the frames, of 10 ms, whose most probable "
    "state is the aligned one: those are filled. Vertical lines are word boundaries.",
    "confusions": "The phones most often taken for others: the share of the test frames of the first "
    "phone in which the most probable state is one of the second's, for the ensemble and for the net "
    "distilled from it.",
}


def all_figures(
    rows: Sequence[Row],
    curves: Mapping[str, Any] | None = None,
    example: Mapping[str, Any] | None = None,
    confusions: Sequence[Mapping[str, Any]] | None = None,
) -> list[NamedFigure]:
    """Every figure that the data allows, as (name, caption, figure).

    Args:
        rows: the study's, of whichever stages are done.
        curves: as `overfitting` takes them.
        example: as `utterance` takes it.
        confusions: as `confused_phones` takes them.
    """
    drawn = {
        "temperature": temperature(rows),
        "ensemble_size": ensemble_size(rows),
        "overfitting": overfitting(curves or {}, rows),
        "compression": compression(rows),
        "utterance": utterance(example or {}),
        "confusions": confused_phones(confusions or []),
    }
    return [(name, _CAPTIONS[name], figure) for name, figure in drawn.items() if figure is not None]


def published_figures(rows: Sequence[Row], history: Mapping[str, Any]) -> dict[str, Figure | None]:
    """Those of the README, from the published run."""
    return {"temperature": temperature(rows), "curves": draw_curves(history, _CURVES)}


def temperature(rows: Sequence[Row]) -> Figure | None:
    """Frame accuracy against temperature, between those of the baseline and of the ensemble."""
    table = "speech_temperature"
    test = select(rows, table, "frame_accuracy")
    if not test:
        return None
    figure = Figure(figsize=(6.2, 3.2), layout="constrained")
    axes = figure.subplots()
    validation = select(rows, table, "validation_frame_accuracy")
    style = {"color": OURS, "label": "distilled, validation", "linestyle": "--", "linewidth": 1}
    _draw_line(axes, validation, "temperature", marker="o", markerfacecolor="none", **style)
    _draw_line(axes, test, "temperature", marker="o", color=OURS, label="distilled, test")
    single = select(rows, "speech", "frame_accuracy")
    draw_levels(
        axes,
        [(row, PAPER, row["row"]) for row in single if row["row"] == "baseline"]
        + [(row, OTHER, row["row"]) for row in single if row["row"].endswith("xEnsemble")],
    )
    picked = [
        f"validation picks T = {row['value']:g}" for row in select(rows, table, "temperature")
    ]
    tidy(axes, "".join(picked), "temperature", "frame accuracy (%)")
    log_axis(axes, "x", sorted({row["temperature"] for row in test}))
    axes.margins(x=0.08)
    widen(axes, 1.0)
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=SMALL)
    return figure


def ensemble_size(rows: Sequence[Row]) -> Figure | None:
    """Frame accuracy against the number of members, and that of their geometric mean."""
    every = select(rows, "speech_mean", "frame_accuracy")
    sized = [row for row in every if "size" in row]
    if not sized:
        return None
    figure = Figure(figsize=(6.2, 3.0), layout="constrained")
    axes = figure.subplots()
    _draw_line(axes, sized, "size", color=OTHER, marker="o", label="arithmetic mean")
    largest = max(row["size"] for row in sized)
    for row in every:
        if "size" not in row:
            beside = {**row, "size": 1.25 * largest}
            style: dict[str, Any] = {"linestyle": "", "markerfacecolor": "none", "markersize": 6}
            _draw_line(axes, [beside], "size", color=OTHER, marker="D", label=row["row"], **style)
    distilled = select(rows, "speech", "frame_accuracy")
    draw_levels(
        axes, [(r, OURS, "distilled") for r in distilled if r["row"].startswith("distilled")]
    )
    tidy(axes, "", "members of the ensemble", "frame accuracy (%)")
    log_axis(axes, "x", sorted({row["size"] for row in sized}))
    axes.margins(x=0.08)
    widen(axes, 1.0)
    axes.legend(frameon=False, fontsize=SMALL, loc="lower right")
    return figure


def overfitting(curves: Mapping[str, Any], rows: Sequence[Row]) -> Figure | None:
    """Train and test accuracy by epoch on little data, a panel for hard and one for soft targets.

    Args:
        curves: for "hard" and "soft" `{"epoch": [E], "train": [E][seeds], "test": [E][seeds]}`, per
            cent.
        rows: for the accuracy with all data.
    """
    names = [name for name in ("hard", "soft") if name in curves]
    if not names:
        return None
    figure, panels = make_panels(len(names), height=2.5, extra=0.3, sharey=True)
    complete = select(rows, "speech_fraction", "frame_accuracy")
    for axes, name in zip(panels, names, strict=True):
        epochs = curves[name]["epoch"]
        for split, color, width in (("train", "black", 1.0), ("test", OURS, 1.8)):
            found = np.array(curves[name][split], float)
            low, high = found.min(axis=1), found.max(axis=1)
            axes.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
            marker = "o" if len(epochs) == 1 else ""
            style: dict[str, Any] = {"marker": marker, "markersize": 3.5, "label": split}
            axes.plot(epochs, found.mean(axis=1), color=color, linewidth=width, **style)
        for row in complete:
            if row["row"] == "hard targets, all data":
                label = f"test, all data and hard targets: {row['value']:.1f}"
                axes.axhline(row["value"], color=PAPER, linestyle="--", linewidth=1.2, label=label)
        last = np.mean(curves[name]["test"][-1])
        ylabel = "" if axes is not panels[0] else "frame accuracy (%)"
        tidy(axes, f"{name} targets, test ends at {last:.1f}", "epoch", ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    handles = panels[0].get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=SMALL)
    return figure


def compression(rows: Sequence[Row]) -> Figure | None:
    """What the k largest soft targets and drawn ones cost and lose, by the bytes that they take."""
    sized = [row for row in rows if "bytes" in row]
    accuracies = select(sized, "speech_compression", "frame_accuracy")
    if not accuracies:
        return None
    titles = {
        "frame_accuracy": ("accuracy of the distilled net", "frame accuracy (%)"),
        "total_variation": ("distance of a frame's targets", "total variation"),
        "gradient_bias": ("bias of the gradient", "relative to a frame's gradient"),
    }
    figure, panels = make_panels(3, height=2.7, extra=0.3)
    for axes, (metric, (title, label)) in zip(panels, titles.items(), strict=True):
        found = select(sized, "speech_compression", metric)
        for name, kind, below, style in (
            ("the k largest", "k=", True, {}),
            ("drawn", "draws=", False, {"linestyle": "--", "markerfacecolor": "none"}),
        ):
            some = [row for row in found if row["row"].startswith(kind)]
            _draw_line(axes, some, "bytes", color=OURS, marker="o", label=name, **style)
            for row in some if metric == "frame_accuracy" else []:
                place = (row["bytes"], row["value"])
                offset, va = ((-4, -3), "top") if below else ((-4, 3), "bottom")
                note(axes, row["row"].removeprefix(kind), place, offset, ha="right", va=va)
        tidy(axes, title, "bytes a frame", label)
        log_axis(axes, "x", sorted({row["bytes"] for row in accuracies if row["row"] != "dense"}))
        axes.margins(x=0.16)
    for row in accuracies:
        if row["row"] == "dense":
            low, high = row["value"] - (row["std"] or 0.0), row["value"] + (row["std"] or 0.0)
            panels[0].axhspan(low, high, color=PAPER, alpha=0.2, linewidth=0)
            _draw_line(panels[0], [row], "bytes", color=PAPER, marker="s", label="dense")
    widen(panels[0], 1.0)
    for axes in panels[1:]:
        axes.set_ylim(bottom=0)
    handles = panels[0].get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=SMALL)
    return figure


def confused_phones(confusions: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Phones taken for others, the ensemble's worst first, as pairs of bars.

    Args:
        confusions: `{"said": phone, "found": phone, "ensemble": per cent, "distilled": per cent}`.
    """
    worst = sorted(confusions, key=lambda pair: -pair["ensemble"])[:_MOST_CONFUSIONS]
    if not worst:
        return None
    figure = Figure(figsize=(6.2, 1.0 + 0.36 * len(worst)), layout="constrained")
    axes = figure.subplots()
    y = np.arange(len(worst))
    for offset, net in ((-0.19, "ensemble"), (0.19, "distilled")):
        values = [float(pair[net]) for pair in worst]
        draw_bars(axes, y + offset, values, color=_COLORS[net], label=net)
    tidy(axes, "", "frames of the phone (%)", "", grid="x")
    axes.set_yticks(y, [f"{pair['said']} taken for {pair['found']}" for pair in worst])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.12, y=0.02)
    axes.set_xlim(left=0)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=SMALL)
    return figure


def utterance(example: Mapping[str, Any]) -> Figure | None:
    """What was said, what the nets saw and what they made of it, over one time axis.

    Args:
        example: of n frames. "words"; "segments", words and fillers such as "<sil>", and "starts",
            their first frames; by frame the aligned "phones" and "states" `[n]` and "log_mels"
            `[n][40]`, normalised; by net "posteriors" `{"phones": [P], "probability": [n][P]}` and
            "top_states" `[n]`.
    """
    if not example:
        return None
    nets = list(example["posteriors"])
    runs = _runs(example["phones"], example["starts"])
    shown = _shown_phones(example)
    strip, row = 0.3, 0.125
    heights = [1.3, strip, *[row * len(shown)] * len(nets), 0.2 * len(nets)]
    figure = Figure(figsize=(_UTTERANCE_WIDTH, sum(heights) + 1.4), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    _draw_energies(panels[0], example)
    _draw_phones(panels[1], example["states"], runs)
    for axes, net in zip(panels[2:-1], nets, strict=True):
        _draw_posteriors(axes, net, example["posteriors"][net], shown, runs)
    _draw_right(panels[-1], {net: example["top_states"][net] for net in nets}, example["states"])
    for axes in panels:
        axes.tick_params(labelsize=SMALL, axis="x", length=0 if axes is not panels[-1] else 3)
        for start in example["starts"][1:]:
            axes.axvline(start * _FRAME, color="black", alpha=0.3, linewidth=0.7)
    panels[-1].set_xlabel("seconds", fontsize=SMALL)
    panels[-1].set_xlim(0, len(example["phones"]) * _FRAME)
    return figure


def _draw_energies(axes: Axes, example: Mapping[str, Any]) -> None:
    """The spectrogram, low bands at the bottom, with the words above their segments."""
    energies = np.array(example["log_mels"], float).T[::-1]
    # Digital silence lies so low that all speech would be of one colour.
    low, high = np.percentile(energies, (4, 99.5))
    _image(axes, energies, _ENERGY, (low, high))
    axes.set_ylabel("mel band", fontsize=SMALL)
    axes.set_yticks([])
    ends = [*example["starts"][1:], len(example["phones"])]
    taken: dict[int, float] = {}
    for name, start, end in zip(example["segments"], example["starts"], ends, strict=True):
        if name[0] in "<[+":  # a silence or a noise
            continue
        word = name.split("(")[0]  # of "last(2)", the second pronunciation of "last"
        # Where neighbours are too short for their names, the second stands higher.
        middle, half = (start + end) / 2, _text_frames(word, TEXT, len(example["phones"])) / 2
        level = next(i for i in range(len(taken) + 1) if taken.get(i, -np.inf) <= middle - half)
        taken[level] = middle + half
        place = (middle * _FRAME, 1.0)
        style: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": TEXT}
        note(axes, word, place, (0, 3 + 11 * level), axes.get_xaxis_transform(), **style)


def _draw_phones(axes: Axes, states: Sequence[int], runs: Sequence[tuple[str, int, int]]) -> None:
    """The aligned phones as boxes, with their names where they fit and ticks between states."""
    for phone, start, end in runs:
        axes.axvline(start * _FRAME, color="black", linewidth=0.7)
        if _text_frames(phone, _TINY, len(states)) <= end - start:
            middle = (start + end) / 2 * _FRAME
            axes.text(middle, 0.6, phone, fontsize=_TINY, ha="center", va="center")
    changes = [i * _FRAME for i in range(1, len(states)) if states[i] != states[i - 1]]
    axes.vlines(changes, 0.0, 0.25, color="black", linewidth=0.6)
    axes.set_ylim(0, 1)
    axes.set_yticks([0.6], ["aligned"], fontsize=SMALL)
    axes.tick_params(axis="y", length=0)


def _draw_posteriors(
    axes: Axes,
    net: str,
    posteriors: Mapping[str, Any],
    shown: Sequence[str],
    runs: Sequence[tuple[str, int, int]],
) -> None:
    """A net's probabilities of the phones that are shown, with the aligned ones framed."""
    columns = [posteriors["phones"].index(phone) for phone in shown]
    probability = np.array(posteriors["probability"], float)[:, columns].T
    # From nothing to the full colour, so that the page shows through what is improbable.
    tint = LinearSegmentedColormap.from_list(net, [(*to_rgba(_COLORS[net])[:3], a) for a in (0, 1)])
    _image(axes, probability, tint, (0.0, 1.0))
    for phone, start, end in runs:
        corner = (start * _FRAME, len(shown) - 1 - shown.index(phone))
        width = (end - start) * _FRAME
        axes.add_patch(Rectangle(corner, width, 1, fill=False, edgecolor="black", linewidth=0.8))
    axes.set_yticks(np.arange(len(shown)) + 0.5, list(shown)[::-1], fontsize=_TINY)
    axes.tick_params(axis="y", length=0, pad=2)
    axes.set_ylabel(f"{net}:\nprobability of phones", fontsize=SMALL)


def _draw_right(axes: Axes, top: Mapping[str, Sequence[int]], states: Sequence[int]) -> None:
    """A line of frames for each net, filled where its most probable state is the aligned one."""
    right = np.array([np.array(found) == np.array(states) for found in top.values()])
    colors = np.array([to_rgba(_COLORS[net]) for net in top])
    image = np.repeat(colors[:, None], len(states), axis=1)
    image[..., 3] = right
    _image(axes, image)
    axes.axhline(1.0, color="black", linewidth=0.7)
    shares = zip(top, right.mean(axis=1), strict=True)
    labels = [f"{net}, {100 * share:.0f} % right" for net, share in shares]
    axes.set_yticks(np.arange(len(labels)) + 0.5, labels[::-1], fontsize=SMALL)
    axes.tick_params(axis="y", length=0)


def _image(
    axes: Axes,
    values: np.ndarray,
    colors: Colormap | None = None,
    limits: tuple[float | None, float | None] = (None, None),
) -> None:
    """An image with its first row at the top: columns are frames, rows are 1 high."""
    extent = (0.0, values.shape[1] * _FRAME, 0.0, float(values.shape[0]))
    # Without resampling a page holds a pixel for each value, not for each dot.
    style: dict[str, Any] = {"aspect": "auto", "interpolation": "none", "extent": extent}
    axes.imshow(values, cmap=colors, vmin=limits[0], vmax=limits[1], **style)


def _runs(phones: Sequence[str], starts: Sequence[int]) -> list[tuple[str, int, int]]:
    """Phones with their first frames and the frames after their last; words part equal ones."""
    new = [i for i in range(len(phones)) if i in starts or i == 0 or phones[i] != phones[i - 1]]
    return [(phones[i], i, end) for i, end in zip(new, [*new[1:], len(phones)], strict=True)]


def _shown_phones(example: Mapping[str, Any]) -> list[str]:
    """The aligned phones as they are spoken, then those that some net takes a frame for."""
    others = [
        posteriors["phones"][phone]
        for posteriors in example["posteriors"].values()
        for phone in np.flatnonzero((np.array(posteriors["probability"]) > _SHARE).any(axis=0))
    ]
    return list(dict.fromkeys([*example["phones"], *others]))


def _text_frames(text: str, size: float, frames: int) -> float:
    """About how many of an utterance's frames a text is wide; a letter is 0.65 of its size."""
    return (0.65 * len(text) + 0.4) * size / 72 * frames / (_UTTERANCE_WIDTH - 1.2)


def _draw_line(axes: Axes, rows: Sequence[Row], key: str, **style: Any) -> None:
    """`draw_line`, without error bars in the legend where no row has a spread."""
    none = {} if spreads(rows).any() else {"yerr": None}
    draw_line(axes, rows, key, **none, **style)
