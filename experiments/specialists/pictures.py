"""The specialist study's figures that are made of pictures: class sets, covariance, examples.

No machine need have a font with the classes' names, so a class is shown as one picture of it. Pictures
carry their own ground; between them there is none, so a page of any colour shows through.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments.common.plots import OTHER, OURS, SMALL, TEXT, WIDTH, note

_MOST_SETS = 12
_MOST_CLASSES = 20
_MOST_EXAMPLES = 6  # of each kind
_MOST_PIXELS = 48  # of a picture's side: more would make a report heavy and show nothing
_MOST_BLOCKS = 400  # of the covariance's side, for the same reason
_TINY = 7  # points

# Of an example in the gallery, in widths of a class's picture: where the most probable classes start at
# the right of it, where it and the bars stand, how tall it and a bar of probability 1 are, and the top.
_BEFORE, _AFTER = 3, 9
_BASE, _TALL, _TOP = 1.15, 2.0, 3.7

_LEAST = 0.01  # correlation: what is smaller looks like none
# Few steps, so that a page stays small, from near black, on which frames and bright spots stand out.
_CORRELATION = LinearSegmentedColormap.from_list(
    "correlation", ["#10172b", "#1d3f72", "#3f86c9", "#a9d0ee", "#ffffff"], 12
)


def clusters(found: Mapping[str, np.ndarray]) -> Figure | None:
    """Table 2 in pictures: a row for each of the first sets, the class nearest to its centroid first.

    Args:
        found: "central" int32 `[K, S]`, sets in that order, padded with C; "class_images" uint8
            `[C, H, W]` or `[C, H, W, 3]`.
    """
    if not found:
        return None
    shown = np.asarray(found["central"])[:_MOST_SETS, :_MOST_CLASSES]
    sheet = _sheet(_tiles(found["class_images"]), shown)
    width = 0.5 + (WIDTH - 0.5) * shown.shape[1] / _MOST_CLASSES
    figure = Figure(
        figsize=(width, 0.2 + (width - 0.5) * sheet.shape[0] / sheet.shape[1]), layout="constrained"
    )
    axes = figure.subplots()
    _draw(axes, sheet, (0.0, float(shown.shape[1])), (0.0, float(len(shown))))
    axes.set_yticks(np.arange(len(shown)) + 0.5, [f"{m + 1}" for m in range(len(shown))][::-1])
    axes.tick_params(length=0, labelsize=SMALL)
    axes.set_xticks([])
    axes.set_ylabel("specialist", fontsize=SMALL)
    axes.spines[:].set_visible(False)
    return figure


def covariance(found: Mapping[str, np.ndarray]) -> Figure | None:
    """Which classes are predicted together, those of a cluster side by side.

    Args:
        found: "matrix" float `[C, C]`, the covariance of predictions; "assignment" int `[C]`, the
            cluster of each class.
    """
    if not found:
        return None
    assignment = np.asarray(found["assignment"])
    order = np.argsort(assignment, kind="stable")
    correlation = _correlation(np.asarray(found["matrix"]))[np.ix_(order, order)]
    figure = Figure(figsize=(6.2, 5.4), layout="constrained")
    axes = figure.subplots()
    size = len(order)
    image = axes.imshow(
        _largest(correlation, -(-size // _MOST_BLOCKS)),
        cmap=_CORRELATION,
        norm=LogNorm(_LEAST, 1.0, clip=True),
        interpolation="none",
        extent=(0.0, size, size, 0.0),
    )
    numbers, starts, counts = np.unique(assignment[order], return_index=True, return_counts=True)
    for start, count in zip(starts, counts, strict=True):
        frame = Rectangle((start, start), count, count, fill=False, edgecolor=OTHER, linewidth=0.8)
        axes.add_patch(frame)
    named = counts > 0.025 * size  # those with room for a number
    names = [f"{m + 1}" for m in numbers[named]]
    axes.set_yticks((starts + counts / 2)[named], names, fontsize=_TINY)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.set_xlabel(f"{size} classes, in the same order", fontsize=SMALL)
    axes.set_ylabel("cluster", fontsize=SMALL)
    ticks = [0.01, 0.03, 0.1, 0.3, 1.0]
    bar = figure.colorbar(image, ax=axes, shrink=0.6, ticks=ticks, extend="min")
    bar.ax.set_yticklabels([f"{tick:g}" for tick in ticks], fontsize=SMALL)
    bar.ax.minorticks_off()
    bar.set_label("correlation of predictions", fontsize=SMALL)
    return figure


def gallery(found: Mapping[str, np.ndarray], class_images: np.ndarray | None) -> Figure | None:
    """Examples that the specialists put right and spoiled, with the most probable classes.

    Args:
        found: of G examples "image" uint8 `[G, H, W]` or `[G, H, W, 3]`, "label" int `[G]`,
            "corrected" bool `[G]` (the others are broken), and by the generalist and by Eq. 5 the most
            probable classes, "before_class" and "after_class" int `[G, 5]`, with their probabilities,
            "before" and "after" float `[G, 5]`.
        class_images: uint8 `[C, H, W]` or `[C, H, W, 3]`.
    """
    if not found or class_images is None:
        return None
    corrected = np.asarray(found["corrected"], bool)
    kinds = {"corrected": np.flatnonzero(corrected), "broken": np.flatnonzero(~corrected)}
    drawn = {kind: rows[:_MOST_EXAMPLES] for kind, rows in kinds.items() if len(rows)}
    if not drawn:
        return None
    pictures, classes = _tiles(found["image"]), _tiles(class_images)
    lines = max(len(rows) for rows in drawn.values())
    figure = Figure(figsize=(len(drawn) * WIDTH / 2, 0.25 + 1.08 * lines), layout="constrained")
    grid = figure.subplots(lines, len(drawn), squeeze=False)
    for column, (kind, rows) in zip(grid.T, drawn.items(), strict=True):
        for axes, row in zip(column, rows, strict=False):
            _draw(axes, pictures[row], (0.0, 2.0), (_BASE, _BASE + _TALL))
            _draw_classes(axes, found, row, classes)
            axes.set(xlim=(-0.1, _AFTER + 5), ylim=(-0.1, _TOP))
        for axes in column:
            axes.set_axis_off()
        column[0].set_title(kind, fontsize=TEXT, loc="left")
        for left, name in ((_BEFORE, "generalist"), (_AFTER, "with specialists")):
            note(column[0], name, (left, _TOP), (0, 3), va="bottom")
    return figure


def _draw_classes(
    axes: Axes, found: Mapping[str, np.ndarray], row: int, classes: np.ndarray
) -> None:
    """The true class of an example, and the most probable ones under bars of their probabilities."""
    label = found["label"][row]
    line = np.full(_AFTER + 5, len(classes))  # empty places
    line[0] = label
    for left, name in ((_BEFORE, "before"), (_AFTER, "after")):
        shown, probability = found[f"{name}_class"][row], np.asarray(found[name][row], float)
        line[left : left + 5] = shown
        x = left + np.arange(5) + 0.5
        colors = [OTHER if one == label else OURS for one in shown]
        bars = axes.bar(x, _TALL * probability, 0.8, bottom=_BASE, color=colors)
        numbers = [f"{100 * value:.0f}" for value in probability]
        axes.bar_label(bars, numbers, padding=1, fontsize=_TINY)
        axes.plot([left, left + 5], [_BASE, _BASE], color="black", linewidth=0.7)
    _draw(axes, _sheet(classes, line[None]), (0.0, float(len(line))), (0.0, 1.0))
    axes.add_patch(Rectangle((0, 0), 1, 1, fill=False, edgecolor=OTHER, linewidth=1.5))


def _draw(axes: Axes, image: np.ndarray, x: tuple[float, float], y: tuple[float, float]) -> None:
    """A picture in a place; without resampling, a page holds a pixel for each of its own."""
    axes.imshow(image, extent=(*x, *y), interpolation="none")


def _tiles(images: np.ndarray) -> np.ndarray:
    """Pictures `[N, H, W]` or `[N, H, W, 3]` as squares, uint8 RGBA `[N, side, side, 4]`.

    Large ones are reduced; what a square has beyond its picture is transparent.
    """
    colored = np.asarray(images)
    if colored.ndim == 3:
        colored = np.repeat(colored[..., None], 3, axis=3)
    by = -(-max(colored.shape[1:3]) // _MOST_PIXELS)
    count, height, width = len(colored), colored.shape[1] // by, colored.shape[2] // by
    cut = colored[:, : height * by, : width * by].reshape(count, height, by, width, by, 3)
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    tiles = np.zeros((count, side, side, 4), np.uint8)
    inside = tiles[:, top : top + height, left : left + width]
    inside[..., :3] = cut.mean(axis=(2, 4)).round()
    inside[..., 3] = 255
    return tiles


def _sheet(tiles: np.ndarray, classes: np.ndarray | Sequence[Sequence[int]]) -> np.ndarray:
    """Tiles of classes `[R, N]` in rows, with a gap around each; class C is an empty place.

    Returns:
        uint8 RGBA, R by N squares of the same size.
    """
    gap = max(tiles.shape[1] // 24, 1)
    around = ((0, 1), (gap, gap), (gap, gap), (0, 0))
    placed = np.pad(tiles, around)[np.asarray(classes)].swapaxes(1, 2)
    rows, height, columns, width, _ = placed.shape
    return placed.reshape(rows * height, columns * width, 4)


def _correlation(covariance: np.ndarray) -> np.ndarray:
    """From a covariance `[C, C]`; a class that is never predicted correlates with none."""
    deviation = np.sqrt(np.diag(covariance))
    scale = np.outer(deviation, deviation)
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)


def _largest(matrix: np.ndarray, by: int) -> np.ndarray:
    """The largest value of each block of `by` rows and columns: a mean would lose single pairs."""
    starts = np.arange(0, len(matrix), by)
    return np.maximum.reduceat(np.maximum.reduceat(matrix, starts, axis=0), starts, axis=1)
