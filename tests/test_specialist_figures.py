"""The specialist study's figures draw what the rows and the study's files hold, and enter a report."""

import base64
import io
import re

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from experiments import report
from experiments.plots import OTHER, OURS, PAPER
from experiments.specialists import figures, pictures

NAMES = ["table3", "coverage", "clusters", "covariance", "gallery", "soft", "distilled"]
SYSTEMS = {
    "generalist": "#000000",
    "generalist + 20 specialists": OURS,
    "generalist + 20 specialists of random classes": OTHER,
    "generalist, trained as much longer": OTHER,
    "ensemble of 2 generalists at equal cost": OTHER,
}
C = 24


def make_row(table, row, metric, value, std=None, paper=None, **keys):
    numbers = {"value": value, "std": std, "paper": paper, "seconds": 1.0, "seeds": 3}
    words = {"preset": "smoke", "source": "embedded", "selection": "last"}
    return {"table": table, "row": row, "metric": metric, **numbers, **words, **keys}


def system_rows():
    generalist, specialists, *controls = SYSTEMS
    found = [
        (generalist, "test_accuracy", 66.2, 0.2, 25.0),
        (generalist, "conditional_test_accuracy", 71.1, 0.1, 43.1),
        (generalist, "seen_accuracy", 70.0, 0.1, None),
        (specialists, "test_accuracy", 67.6, 0.1, 26.1),
        (specialists, "conditional_test_accuracy", 72.6, 0.1, 45.9),
        (specialists, "relative_change_percent", 2.1, 0.2, 4.4),
        (specialists, "errors_removed_percent", 4.1, 0.2, None),
        *[(name, "test_accuracy", 66.5 + i, None, None) for i, name in enumerate(controls)],
        *[
            (name, "relative_change_percent", -0.5 + i, 0.1, None)
            for i, name in enumerate(controls)
        ],
    ]
    return [make_row("specialists", *one) for one in found]


def coverage_rows():
    """Ours end at 2 specialists; the paper's do not."""
    found = [
        ("0", 0, (500, 0.0, None), (350037, 0.0)),
        ("1", 1, (300, 1.5, 0.3), (141993, 3.4)),
        ("2", 2, (200, 2.5, 0.4), (67161, 7.4)),
        ("10 or more", 10, (None, None, None), (9082, 14.1)),
    ]
    rows = []
    for name, cover, (examples, change, std), paper in found:
        place = ("specialists_coverage", f"covered by {name}")
        rows += [
            make_row(*place, "examples", examples, None, paper[0], cover=cover),
            make_row(*place, "change_in_top1_correct", 3, None, 7, cover=cover),
            make_row(*place, "relative_change_percent", change, std, paper[1], cover=cover),
        ]
    return rows


def soft_rows():
    found = [
        ("generalist", 66.0, 66.5),
        ("dustbin", 69.0, 50.0),
        ("full softmax, hard targets", 69.5, 44.0),
        ("full softmax, hard targets, early stopping", 69.0, 55.0),
        ("full softmax, the generalist's soft targets", 70.0, 64.0),
    ]
    return [
        make_row("specialists_soft", name, metric, value, 0.5)
        for name, *values in found
        for metric, value in zip(("special_accuracy", "other_accuracy"), values, strict=True)
    ]


def distilled_rows():
    found = [
        ("generalist", 66.0, None),
        ("generalist + 20 specialists", 67.5, None),
        ("distilled, from the generalist", 67.2, 80.0),
        ("distilled, from scratch", 66.5, 33.3),
        ("trained as long on labels", 65.9, -6.7),
    ]
    rows = [make_row("specialists_distilled", n, "test_accuracy", v, 0.1) for n, v, _ in found]
    return rows + [
        make_row("specialists_distilled", name, "gain_kept_percent", share, 8.0)
        for name, _, share in found
        if share is not None
    ]


def make_curves():
    special = [[64.0, 68.0], [70.0, 72.0], [67.0, 68.0]]
    return {
        "full softmax, hard targets": {
            "step": [0, 100, 200],
            "special_accuracy": special,
            "other_accuracy": [66.0, 60.0, 50.0],
        },
        "generalist": {"epoch": [1, 2], "test_errors": [[5], [4]]},
    }


def make_pictures(count, shape=(8, 8)):
    """Each of one brightness of its own, below white."""
    values = 10 * np.arange(1, count + 1)
    return np.broadcast_to(values.reshape(-1, *[1] * len(shape)), (count, *shape)).astype(np.uint8)


def make_clusters():
    """Class c is in cluster c % 3 alone, of which only the first has all of its S places filled."""
    central = np.arange(C).reshape(-1, 3).T.copy()
    central[1:, -2:] = C
    together = np.arange(C)[:, None] % 3 == np.arange(C) % 3
    scale = np.arange(1.0, C + 1)
    matrix = np.where(together, 0.5, -0.1) + 0.5 * np.eye(C)
    return {
        "sets": central.astype(np.int32),
        "central": central.astype(np.int32),
        "matrix": (matrix * np.outer(scale, scale)).astype(np.float32),
        "assignment": (np.arange(C) % 3).astype(np.int32),
        "class_images": make_pictures(C),
    }


def make_gallery(corrected=(True, False, True)):
    """In each the true class is 3: second before and first after, or the other way round."""
    right, wrong = [3, 9, 5, 6, 7], [8, 3, 5, 6, 7]
    count = len(corrected)
    return {
        "image": make_pictures(count) + np.uint8(5),
        "label": np.full(count, 3, np.int32),
        "before_class": np.array([wrong if one else right for one in corrected], np.int32),
        "after_class": np.array([right if one else wrong for one in corrected], np.int32),
        "before": np.tile(np.float32([0.5, 0.25, 0.125, 0.1, 0.004]), (count, 1)),
        "after": np.tile(np.float32([0.75, 0.2, 0.02, 0.01, 0.0]), (count, 1)),
        "corrected": np.array(corrected),
    }


def every_row():
    return system_rows() + coverage_rows() + soft_rows() + distilled_rows()


def everything():
    return figures.all_figures(every_row(), make_clusters(), make_gallery(), make_curves())


def points(axes):
    """Points with error bars as (x, y, colour)."""
    lines = [container.lines[0] for container in axes.containers]
    return [(*line.get_xydata()[0].tolist(), to_hex(line.get_color())) for line in lines]


def reference_lines(axes):
    """Lines through the whole panel as (direction, place, colour)."""
    found = []
    for line in axes.lines:
        for name, ends, values in (
            ("upright", line.get_ydata(), line.get_xdata()),
            ("level", line.get_xdata(), line.get_ydata()),
        ):
            if list(ends) == [0, 1]:
                found.append((name, values[0], to_hex(line.get_color())))
    return found


def texts(artists):
    return [text.get_text() for text in artists]


def brightness(sheet, rows, columns):
    """The middle pixel of each place in a sheet as (red, alpha)."""
    height, width = sheet.shape[0] // rows, sheet.shape[1] // columns
    return sheet[height // 2 :: height, width // 2 :: width][..., [0, 3]].tolist()


def svg_size(figure):
    return len(report._svg("name", "", figure)["drawing"])


# What is drawn, and what is left out.


def test_all_figures_have_names_captions_and_figures():
    drawn = everything()
    assert [name for name, _, _ in drawn] == NAMES
    assert all(caption.endswith(".") and isinstance(one, Figure) for _, caption, one in drawn)
    assert len({caption for _, caption, _ in drawn}) == len(NAMES)


@pytest.mark.parametrize(
    ("rows", "more", "names"),
    [
        ([], {}, []),
        (system_rows(), {}, ["table3"]),
        (coverage_rows(), {}, ["coverage"]),
        (soft_rows(), {}, ["soft"]),
        (soft_rows()[:2], {}, []),  # the generalist alone
        (distilled_rows(), {}, ["distilled"]),
        ([], {"clusters": make_clusters()}, ["clusters", "covariance"]),
        ([], {"gallery": make_gallery()}, []),  # without pictures of the classes
        ([], {"clusters": make_clusters(), "gallery": make_gallery(())}, NAMES[2:4]),
        ([], {"curves": make_curves()}, ["soft"]),
        ([], {"curves": {"generalist": make_curves()["generalist"]}}, []),
        ([row | {"value": None} for row in every_row()], {"clusters": {}, "curves": {}}, []),
    ],
)
def test_figures_without_data_are_left_out(rows, more, names):
    assert [name for name, _, _ in figures.all_figures(rows, **more)] == names


# Rows.


def test_table3_has_a_line_for_each_system_and_the_papers_change():
    accuracy, conditional, change = figures.table3(system_rows()).axes
    assert [text.replace("\n", " ") for text in texts(accuracy.get_yticklabels())] == list(SYSTEMS)
    assert accuracy.get_ylim()[0] > accuracy.get_ylim()[1]  # the first at the top
    colors = list(SYSTEMS.values())
    values = [66.2, 67.6, 66.5, 67.5, 68.5]
    assert points(accuracy) == [(v, i, colors[i]) for i, v in enumerate(values)]
    assert points(conditional) == [(71.1, 0, "#000000"), (72.6, 1, OURS)]
    assert points(change)[:2] == [(2.1, 1, OURS), (-0.5, 2, OTHER)]
    assert texts(accuracy.texts) == ["66.2", "67.6", "66.5", "67.5", "68.5"]
    assert texts(change.texts) == ["+2.1", "-0.5", "+0.5", "+1.5", "paper: +4.4"]
    (paper,) = [line for line in change.lines if line.get_marker() == "D"]
    assert paper.get_xydata().tolist() == [[4.4, 1]] and to_hex(paper.get_color()) == PAPER
    assert reference_lines(accuracy) == [("upright", 66.2, "#000000")]
    assert reference_lines(change) == [("upright", 0.0, "#000000")]
    bars = accuracy.containers[0].lines[2][0].get_segments()
    assert np.ptp(np.array(bars)[..., 0]) == pytest.approx(0.4)


def test_panels_without_rows_are_left_out():
    rows = [row for row in system_rows() if row["metric"] == "test_accuracy"]
    (axes,) = figures.table3(rows).axes
    assert axes.get_xlabel() == "test accuracy (%)"


def test_a_view_of_accuracies_spans_at_least_a_point():
    rows = [{**row, "value": 66 + row["value"] / 1000, "std": 0.01} for row in system_rows()]
    low, high = figures.table3(rows).axes[0].get_xlim()
    assert high - low == pytest.approx(1.0) and low < 66.06 < 66.07 < high


def test_coverage_is_beside_the_papers_with_shares_of_the_examples():
    upper, lower = figures.coverage(coverage_rows()).axes
    lines = {c.get_label(): c.lines[0].get_xydata().tolist() for c in upper.containers}
    assert lines == {
        "paper": [[0, 0.0], [1, 3.4], [2, 7.4], [10, 14.1]],
        "ours": [[0, 0.0], [1, 1.5], [2, 2.5]],
    }
    bars = {to_hex(b.patches[0].get_facecolor()): b.datavalues for b in lower.containers}
    np.testing.assert_allclose(bars[OURS], [50.0, 30.0, 20.0])
    np.testing.assert_allclose(bars[PAPER].sum(), 100.0)
    assert texts(lower.get_xticklabels()) == ["0", "1", "2", "10 or\nmore"]


def test_coverage_without_the_papers_numbers_names_ours_alone():
    upper, lower = figures.coverage([{**row, "paper": None} for row in coverage_rows()]).axes
    assert texts(upper.get_legend().get_texts()) == ["ours"]
    assert len(lower.containers) == 1


def test_soft_places_each_kind_beside_the_generalist():
    figure = figures.soft(soft_rows(), {})
    (axes,) = figure.axes
    colors = ["#000000", OTHER, OTHER, OURS]
    expected = [(69.0, 50.0), (69.5, 44.0), (69.0, 55.0), (70.0, 64.0)]
    assert points(axes) == [(*xy, color) for xy, color in zip(expected, colors, strict=True)]
    hollow = [c.lines[0].get_markerfacecolor() == "none" for c in axes.containers]
    assert hollow == [False, False, True, False]
    generalist = [("upright", 66.0, "#000000"), ("level", 66.5, "#000000")]
    assert reference_lines(axes) == generalist
    names = list(dict.fromkeys(row["row"] for row in soft_rows()))
    assert texts(figure.legends[0].get_texts()) == names


def test_soft_shows_curves_as_means_in_bands_of_the_seeds():
    _, special, other = figures.soft(soft_rows(), make_curves()).axes
    assert special.lines[0].get_xydata().tolist() == [[0, 66.0], [100, 71.0], [200, 67.5]]
    assert to_hex(special.lines[0].get_color()) == OTHER
    band = special.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (64.0, 72.0)
    assert other.lines[0].get_ydata().tolist() == [66.0, 60.0, 50.0]
    assert reference_lines(special) == [("level", 66.0, "#000000")]
    assert reference_lines(other) == [("level", 66.5, "#000000")]
    alone = figures.soft([], make_curves())
    assert [len(axes.lines) for axes in alone.axes] == [1, 1]
    assert texts(alone.legends[0].get_texts()) == ["full softmax, hard targets"]


def test_distilled_shows_the_share_of_the_gain_beside_the_accuracy():
    accuracy, gain = figures.distilled(distilled_rows()).axes
    assert [color for *_, color in points(accuracy)] == ["#000000", OURS, OURS, OURS, OTHER]
    assert reference_lines(accuracy) == [("upright", 66.0, "#000000"), ("upright", 67.5, OURS)]
    middles = [bar.get_y() + bar.get_height() / 2 for bar in gain.patches]
    assert middles == pytest.approx([2, 3, 4])  # in the lines of their systems
    assert [bar.get_width() for bar in gain.patches] == [80.0, 33.3, -6.7]
    assert [to_hex(bar.get_facecolor()) for bar in gain.patches] == [OURS, OURS, OTHER]
    without = [row for row in distilled_rows() if row["metric"] == "test_accuracy"]
    assert len(figures.distilled(without).axes) == 1


# Pictures.


def test_clusters_are_rows_of_pictures_nearest_first_with_empty_places():
    (axes,) = pictures.clusters(make_clusters()).axes
    expected = [[[10 * (c + 1), 255] for c in range(m, C, 3)] for m in range(3)]
    for row in expected[1:]:
        row[-2:] = [[0, 0]] * 2
    assert brightness(axes.images[0].get_array(), 3, 8) == expected
    labels = dict(zip(axes.get_yticks(), texts(axes.get_yticklabels()), strict=True))
    assert labels == {0.5: "3", 1.5: "2", 2.5: "1"}


def test_a_contact_sheet_has_at_most_12_rows_of_20():
    found = {"central": np.tile(np.arange(C), (15, 1)), "class_images": make_pictures(C)}
    (axes,) = pictures.clusters(found).axes
    assert axes.images[0].get_extent() == [0.0, 20.0, 0.0, 12.0]
    assert len(axes.get_yticks()) == 12


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((6, 6), (6, 6)),
        ((6, 10), (6, 10)),
        ((10, 6, 3), (10, 6)),
        ((48, 48, 3), (48, 48)),
        ((96, 96), (48, 48)),
        ((97, 100, 3), (32, 33)),
    ],
)
def test_pictures_of_any_shape_become_small_squares(shape, size):
    tiles = pictures._tiles(make_pictures(2, shape))
    assert tiles.shape == (2, max(size), max(size), 4) and tiles.dtype == np.uint8
    opaque = tiles[..., 3] == 255
    assert opaque.sum(axis=(1, 2)).tolist() == [size[0] * size[1]] * 2
    for tile, inside, value in zip(tiles, opaque, (10, 20), strict=True):
        assert (tile[inside] == [value, value, value, 255]).all()
        assert (tile[~inside] == 0).all()


def test_colours_are_kept():
    images = np.broadcast_to(np.uint8([200, 100, 50]), (1, 96, 96, 3))
    assert (pictures._tiles(images) == [200, 100, 50, 255]).all()


def test_covariance_is_a_correlation_with_clusters_side_by_side_and_framed():
    axes, bar = pictures.covariance(make_clusters()).axes
    cluster = np.repeat(np.arange(3), 8)
    expected = np.where(cluster[:, None] == cluster, 0.5, -0.1) + 0.5 * np.eye(C)
    np.testing.assert_allclose(axes.images[0].get_array(), expected, atol=1e-6)
    frames = [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in axes.patches]
    assert frames == [(0, 0, 8, 8), (8, 8, 8, 8), (16, 16, 8, 8)]
    assert texts(axes.get_yticklabels()) == ["1", "2", "3"]
    assert bar.get_ylabel() == "correlation of predictions"


def test_a_class_that_is_never_predicted_correlates_with_none():
    found = make_clusters()
    found["matrix"][4] = found["matrix"][:, 4] = 0.0
    place = 8 + 1  # the second of cluster 1
    image = pictures.covariance(found).axes[0].images[0].get_array()
    assert (image[place] == 0).all() and (image[:, place] == 0).all()
    assert np.isfinite(image).all()


def test_many_classes_share_dots_of_which_the_brightest_counts():
    size = 1003
    matrix = np.eye(size, dtype=np.float32)
    matrix[7, 1002] = matrix[1002, 7] = 0.4
    found = {"matrix": matrix, "assignment": np.zeros(size, np.int32)}
    image = pictures.covariance(found).axes[0].images[0].get_array()
    assert image.shape == (335, 335)
    assert image[2, 334] == image[334, 2] == pytest.approx(0.4)
    assert np.count_nonzero(image) == 335 + 2


@pytest.mark.parametrize("size", [400, 600, 2000])
def test_a_covariance_of_pure_noise_takes_less_than_400_kilobytes(size):
    random = np.random.default_rng(0)
    matrix = 0.005 * 200 ** random.random((size, size), np.float32)
    np.fill_diagonal(matrix, 1.0)
    found = {"matrix": matrix, "assignment": random.integers(0, 61, size)}
    assert svg_size(pictures.covariance(found)) < 400_000


def test_gallery_has_corrected_examples_beside_broken_ones():
    found = make_gallery((True, False, True))
    grid = pictures.gallery(found, make_pictures(C)).axes
    assert [axes.get_title(loc="left") for axes in grid] == ["corrected", "broken", "", ""]
    shown = [axes.images[0].get_array()[..., 0] for axes in grid[:3]]
    np.testing.assert_array_equal(shown, found["image"][[0, 1, 2]])
    assert not grid[3].images and not grid[3].patches


@pytest.mark.parametrize(("corrected", "true"), [(True, [1, 5]), (False, [0, 6])])
def test_an_example_has_its_class_and_the_most_probable_ones_under_their_bars(corrected, true):
    found = make_gallery((corrected,))
    (axes,) = pictures.gallery(found, make_pictures(C)).axes
    empty = C
    line = [3, empty, empty, *found["before_class"][0], empty, *found["after_class"][0]]
    expected = [[0, 0] if c == empty else [10 * (c + 1), 255] for c in line]
    assert brightness(axes.images[1].get_array(), 1, 14) == [expected]
    bars = [bar for container in axes.containers for bar in container]
    heights = [*found["before"][0], *found["after"][0]]
    assert [bar.get_height() / 2 for bar in bars] == pytest.approx(heights)
    colors = [to_hex(bar.get_facecolor()) for bar in bars]
    assert colors == [OTHER if i in true else OURS for i in range(10)]
    assert texts(axes.texts)[:5] == ["50", "25", "12", "10", "0"]


def test_bars_stand_above_the_pictures_of_their_classes():
    axes = pictures.gallery(make_gallery((True,)), make_pictures(C)).axes[0]
    example, line = axes.images
    assert example.get_extent() == [0.0, 2.0, 1.15, 3.15]
    assert line.get_extent() == [0.0, 14.0, 0.0, 1.0]
    middles = [bar.get_x() + bar.get_width() / 2 for bars in axes.containers for bar in bars]
    assert middles == pytest.approx([3.5, 4.5, 5.5, 6.5, 7.5, 9.5, 10.5, 11.5, 12.5, 13.5])


def test_gallery_shows_at_most_six_of_a_kind_and_no_empty_column():
    grid = pictures.gallery(make_gallery((True,) * 9), make_pictures(C)).axes
    assert [len(axes.images) for axes in grid] == [2] * 6
    mixed = pictures.gallery(make_gallery((True,) * 9 + (False,)), make_pictures(C)).axes
    assert len(mixed) == 12 and sum(len(axes.images) for axes in mixed) == 14


# The report.


def test_ink_is_black_and_other_text_has_no_colour_of_its_own():
    for _, _, figure in everything():
        for axes in figure.axes:
            written = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
            written += [*axes.get_xticklabels(), *axes.get_yticklabels()]
            assert {to_hex(text.get_color()) for text in written} == {"#000000"}
            shown = [spine for spine in axes.spines.values() if spine.get_visible()]
            assert {to_hex(spine.get_edgecolor()) for spine in shown} <= {"#000000"}


def test_a_report_is_written_with_every_figure(tmp_path):
    drawn = everything()
    report.write(tmp_path, "Specialists", {}, every_row(), [], drawn, 1.0)
    assert sorted(p.stem for p in (tmp_path / "figures").iterdir()) == sorted(NAMES)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall('<figure id="figure-([^"]*)"', text) == NAMES
    assert "currentColor" in text and not re.search("#000000|https?:", text)


def test_pictures_enter_a_report_pixel_by_pixel():
    figure = pictures.clusters(make_clusters())
    drawing = report._svg("name", "", figure)["drawing"]
    (encoded,) = re.findall(r"base64,([^\"]*)\"", drawing)
    image = np.array(Image.open(io.BytesIO(base64.b64decode(encoded))))
    sheet = figure.axes[0].images[0].get_array()
    assert image.shape == sheet.shape and sorted(image.ravel()) == sorted(np.ravel(sheet))
