"""The specialist study's figures draw what the rows and the study's files hold, and enter a report."""

import re

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from specialist_pictures import FIGURES, make_clusters, make_gallery, texts

from experiments.common import report
from experiments.common.plots import OTHER, OURS, PAPER
from experiments.specialists import figures

SYSTEMS = {
    "generalist": "#000000",
    "generalist + 20 specialists": OURS,
    "generalist + 20 specialists of random classes": OTHER,
    "generalist, trained as much longer": OTHER,
    "ensemble of 2 generalists at equal cost": OTHER,
}


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


def comparison_rows():
    """The same values with another interval."""
    return [
        make_row(
            "specialists_comparison", name, metric, value, interval=(value - half, value + half)
        )
        for name, value in (("specialists, against generalist", 4.0), ("a, against b", -1.0))
        for metric, half in (
            ("difference_percent", 1.5),
            ("difference_percent_over_typefaces", 3.0),
        )
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


def every_row():
    return system_rows() + comparison_rows() + coverage_rows() + soft_rows() + distilled_rows()


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


def test_comparisons_are_drawn_with_both_intervals():
    (axes,) = figures.comparison(comparison_rows()).axes
    ends = [container.lines[2][0].get_segments()[0][:, 0] for container in axes.containers]
    assert np.round(ends, 6).tolist() == [[2.5, 5.5], [-2.5, 0.5], [1.0, 7.0], [-4.0, 2.0]]
    one_seed = [{**row, "interval": None} for row in comparison_rows()]
    assert figures.comparison(one_seed) is None


def test_all_figures_have_names_captions_and_figures():
    drawn = everything()
    assert [name for name, _, _ in drawn] == FIGURES
    assert all(caption.endswith(".") and isinstance(one, Figure) for _, caption, one in drawn)
    assert len({caption for _, caption, _ in drawn}) == len(FIGURES)


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
        ([], {"clusters": make_clusters(), "gallery": make_gallery(())}, FIGURES[3:5]),
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
    report.write(
        tmp_path, "Specialists", {}, every_row(), reference_rows=[], figures=drawn, seconds=1.0
    )
    assert sorted(p.stem for p in (tmp_path / "figures").iterdir()) == sorted(FIGURES)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall('<figure id="figure-([^"]*)"', text) == FIGURES
    assert "currentColor" in text and not re.search("#000000|https?:", text)
