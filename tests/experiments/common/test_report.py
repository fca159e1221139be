import html
import json
import os
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from distill_jax.errors import UserError
from experiments.common import report
from experiments.common.plots import draw_curves
from experiments.mnist import figures

DASH, DAGGER, PLUS_MINUS = "\u2013", "\u2020", "\u00b1"


def make_row(table="mnist", row="teacher 2x1200", metric="test_errors", value=70.0, **keys):
    defaults = {"paper": None, "std": None, "seeds": 1, "selection": "last", "seconds": 2.5}
    place = {"table": table, "row": row, "metric": metric, "value": value}
    return place | defaults | {"preset": "smoke", "source": "embedded"} | keys


def temperature_rows(widths=(30, 300)):
    ways = [{"width": w, "temperature": t} for w in widths for t in (20.0, 8.0, 2.5, 1.0)]
    return [
        make_row("mnist_temperature", value=9000 / way["width"] + way["temperature"], **way)
        for way in ways
    ]


def bias_rows():
    table, shifted = "mnist_without_3", "without 3s, bias of 3 shifted (best on test)"
    test = {"selection": "test"}
    return [
        make_row(table, "without 3s", "test_errors", 221.0, paper=206),
        make_row(table, "without 3s", "errors_on_3", 150.0, paper=133),
        make_row(table, shifted, "test_errors", 111.0, paper=109, **test),
        make_row(table, shifted, "errors_on_3", 15.0, paper=14, **test),
        make_row(table, shifted, "bias_shift", 3.3, paper=3.5, **test),
        make_row("mnist_only_7_8", "only 7s and 8s", "test_error_percent", 44.1, paper=47.3),
        make_row("mnist_only_7_8", "shifted", "test_error_percent", 14.2, **test),
    ]


def fraction_rows():
    return [
        make_row("mnist_fraction", f"{f}%, {t}", value=v / f, fraction=f, targets=t)
        for t, v in (("hard", 900.0), ("soft", 500.0))
        for f in (100, 3, 10)
    ]


def make_curves():
    several = [[400.0, 500.0, 480.0], [150.0, 160.0, 155.0]]
    return {
        "shifts_soft": {"epoch": [1, 2], "test_errors": several},
        "width_800": {"epoch": [1, 2], "test_errors": several},
        "teacher": {"epoch": [1, 2, 3], "test_errors": [[900.0], [500.0], [300.0]]},
    }


def make_digits(count=2):
    soft = {"1": [1e-9] * 10, "20": [0.05] * 10}
    soft["1"][2], soft["1"][3] = 1.0, 1e-6
    image = np.arange(784).reshape(28, 28) % 256
    return [{"inputs": image.tolist(), "label": 2, "soft_targets": soft} for _ in range(count)]


def plain_figure():
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2], label="a line")
    return figure


def write(workdir, rows, captions=None, reference_rows=(), drawn=(), title="A title"):
    report.write(
        workdir,
        title,
        captions or {},
        rows,
        reference_rows=reference_rows,
        figures=drawn,
        seconds=1234.5,
    )
    read = [(workdir / f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "html")]
    return read[0], read[1]


def markdown_cells(markdown):
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def html_cells(text):
    tables = re.findall("<table>.*?</table>", text, re.DOTALL)
    lines = [line for table in tables for line in ElementTree.fromstring(table).iter("tr")]
    return [["".join(cell.itertext()) for cell in line] for line in lines]


def without(key):
    return json.dumps([make_row(), {k: v for k, v in make_row().items() if k != key}])


# The contract.


def test_load_rows_gives_the_rows_with_their_further_keys(tmp_path):
    rows = [make_row(), make_row(row="other", width=30, value=None)]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    assert report.load_rows(tmp_path / "results.json") == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "r.json can't be read"),
        ("{", "r.json is damaged"),
        ("{}", "JSON list"),
        ("[1]", "JSON list"),
        *[(without(k), f"r.json: row 1 lacks {k}$") for k in report.KEYS],
        (json.dumps([make_row(selection="tset")]), "selection 'tset'"),
        (json.dumps([make_row(value="70")]), "number or null for value"),
        (json.dumps([make_row(seeds=0)]), "at least 1 for seeds"),
        (json.dumps([make_row(preset=3)]), "text for preset"),
        (json.dumps([make_row(interval=[2.0])]), "two numbers, the lower first, for interval"),
    ],
)
def test_load_rows_refuses_what_is_no_list_of_rows(tmp_path, text, message):
    if text is not None:
        (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=message):
        report.load_rows(tmp_path / "r.json")


# Numbers.


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, DASH),
        (67, "67"),
        (146.0, "146"),
        (0.0, "0"),
        (146.33, "146.3"),
        (13.24, "13.2"),
        (3.456, "3.46"),
        (0.01234, "0.0123"),
        (1.25e-7, "1.25e-07"),
        (float("nan"), "nan"),
    ],
)
def test_format_number(value, text):
    assert report.format_number(value) == text


@pytest.mark.parametrize(
    ("value", "std", "seeds", "selection", "text"),
    [
        (67.0, None, 1, "last", "67 (1 seed)"),
        (69.4, 4.13, 5, "validation", f"69.4 {PLUS_MINUS} 4.1 (5 seeds)"),
        (74.0, 2.55, 2, "last", f"74.0 {PLUS_MINUS} 2.5 (2 seeds)"),
        (74.0, 3.0, 2, "last", f"74 {PLUS_MINUS} 3 (2 seeds)"),
        (74.0, 0.0, 2, "last", f"74 {PLUS_MINUS} 0 (2 seeds)"),
        (13.2, 0.04, 5, "last", f"13.20 {PLUS_MINUS} 0.04 (5 seeds)"),
        (0.0123, 0.0004, 5, "last", f"0.0123 {PLUS_MINUS} 0.0004 (5 seeds)"),
        (1.2e-7, 3e-8, 5, "last", f"1.20e-07 {PLUS_MINUS} 3.00e-08 (5 seeds)"),
        (109.0, None, 1, "test", f"109 {DAGGER} (1 seed)"),
        (None, None, 1, "test", DASH),
    ],
)
def test_a_measured_number(value, std, seeds, selection, text):
    row = make_row(value=value, std=std, seeds=seeds, selection=selection)
    assert "".join(report._measured(row)) == text


# The two documents.


def test_both_documents_show_the_same_lines_and_group_a_rows_metrics(tmp_path):
    rows = [
        make_row(value=69.4, paper=67, std=4.1, seeds=5),
        make_row(metric="train_loss", value=0.5, seeds=5),
        make_row(row="baseline", value=147.0, paper=146, seeds=5),
    ]
    markdown, text = write(tmp_path, rows)
    cells = markdown_cells(markdown)
    assert cells[0] == ["row", "metric", "paper", "ours", "selection", "seconds"]
    ours = f"69.4 {PLUS_MINUS} 4.1 (5 seeds)"
    assert cells[2] == ["teacher 2x1200", "test errors", "67", ours, "last", "2.5"]
    assert cells[3] == ["", "train loss", DASH, "0.500 (5 seeds)", "last", ""]
    # The second metric has no cells of its own for the row's name and seconds: they span.
    assert html_cells(text) == [cells[0], cells[2], cells[3][1:-1], cells[4]]
    for document in (markdown, text):
        assert "preset smoke; source embedded; 5 seeds; 1,234 s in all" in document


def test_tables_stand_in_the_rows_order_with_their_captions(tmp_path):
    rows = [make_row("b_table"), make_row("a_table"), make_row("b_table", row="second")]
    markdown, text = write(tmp_path, rows, {"a_table": "The paper claims this."})
    assert re.findall(r"^## (.*)$", markdown, re.MULTILINE) == ["b table", "a table"]
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["b table", "a table"]
    assert "## a table\n\nThe paper claims this.\n\n|" in markdown
    assert "<h2>a table</h2>\n<p>The paper claims this.</p>" in text


def test_numbers_chosen_on_the_test_set_are_marked_and_only_they(tmp_path):
    rows = [
        make_row("plain", selection="validation"),
        make_row("tuned", row="as learned", value=206.0),
        make_row("tuned", row="shifted", value=109.0, selection="test"),
    ]
    note = f"{DAGGER} chosen on the test set, as the paper did"
    markdown, text = write(tmp_path, rows)
    plain, tuned = markdown.split("## tuned")
    assert DAGGER not in plain and tuned.count(note) == 1
    assert re.sub("<[^>]*>", "", text).count(note) == 1
    for cells in (markdown_cells(tuned)[2:], html_cells(text)[3:]):
        assert [line[3] for line in cells] == ["206 (1 seed)", f"109 {DAGGER} (1 seed)"]
    assert text.count('<tr class="tuned">') == 1


def test_a_confidence_interval_stands_in_brackets_and_is_explained(tmp_path):
    rows = [make_row(std=2.0, seeds=3, interval=[64.5, 75.5]), make_row(row="other")]
    report.write(tmp_path, "t", {}, rows, reference_rows=[], figures=[], seconds=1.0)
    for name in ("report.md", "report.html"):
        text = html.unescape((tmp_path / name).read_text()).replace("\\", "")
        assert f"70 {PLUS_MINUS} 2 [64.5, 75.5]" in text
        assert "95 % confidence" in text


def test_reference_column_where_table_row_and_metric_match(tmp_path):
    rows = [make_row(), make_row(metric="train_loss"), make_row("other")]
    how = {"preset": "full", "source": "tfds", "selection": "test"}
    reference = [
        make_row(value=68.2, std=1.5, seeds=5, **how),
        make_row("other", row="elsewhere", preset="unseen"),
    ]
    markdown, text = write(tmp_path, rows, reference_rows=reference)
    first, second = markdown.split("## other")
    theirs = ["reference", f"68.2 {PLUS_MINUS} 1.5 {DAGGER} (5 seeds)", DASH]
    assert [line[4] for line in markdown_cells(first) if ":--" not in line] == theirs
    assert [html_cells(text)[0][4], html_cells(text)[1][4], html_cells(text)[2][3]] == theirs
    assert "chosen on the test set" in first and "reference" not in markdown_cells(second)[0]
    for document in (markdown, text):
        assert "Reference, a published run: preset full; source tfds; 5 seeds" in document
        assert "unseen" not in document


def test_everything_is_escaped(tmp_path):
    nasty = '<script>alert("x")</script> & a|b *c* `d` [e](f)'
    row = make_row(nasty, nasty, nasty, selection="last", preset=nasty, source=nasty)
    drawn = [("fig", nasty, plain_figure())]
    markdown, text = write(tmp_path, [row], {nasty: nasty}, drawn=drawn, title=nasty)
    assert "<script" not in text
    assert html_cells(text)[1][:2] == [nasty, nasty]
    assert html.unescape(re.search(r'aria-label="([^"]*)" viewBox', text).group(1)) == nasty
    # No character that means something in markdown stands bare.
    assert not re.search(r"(?<!\\)[<>`*]", markdown)
    tables = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in tables] == [7, 7, 7]


def test_html_asks_for_nothing_outside_itself(tmp_path):
    drawn = figures.all_figures(
        temperature_rows() + bias_rows() + fraction_rows(), make_curves(), make_digits()
    )
    _, text = write(tmp_path, [make_row()], drawn=drawn)
    assert not re.search(r"https?:|@import|<link|<script|<iframe", text)
    for target in re.findall(r'\b(?:src|srcset|href|data)="([^"]*)', text):
        assert target.startswith(("#", "data:image/png;base64,")), target[:40]
    for target in re.findall(r"url\(([^)]*)\)", text):
        assert target.startswith("#")


def test_figures_are_named_files_and_elements_with_text_for_those_who_cannot_see(tmp_path):
    drawn = [("first", "One line.", plain_figure()), ("second", "Same line.", plain_figure())]
    markdown, text = write(tmp_path, [make_row()], drawn=drawn)
    assert "![One line.](figures/first.png)" in markdown
    for name, _, _ in drawn:
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    labels = re.findall(r'<svg role="img" aria-label="([^"]*)"', text)
    assert labels == ["One line.", "Same line."]
    # Figures drawn alike share the page: every id is its own, every reference finds one.
    ids = re.findall(r'\bid="([^"]*)', text)
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:href="|url\()#([^")]*)', text)
    assert references and set(references) <= set(ids)
    # Ink follows the page's text colour.
    assert "currentColor" in text and not re.search("#000000|fill: #fff", text)


def test_writing_again_gives_the_same_bytes_and_leaves_nothing_else(tmp_path):
    def files():
        return {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    rows = temperature_rows()
    write(tmp_path, rows, drawn=figures.all_figures(rows, {}, []))
    before = files()
    write(tmp_path, rows, drawn=figures.all_figures(rows, {}, []))
    assert files() == before
    assert sorted(before) == ["report.html", "report.md", "temperature.png"]


def test_a_write_that_fails_keeps_the_old_report(tmp_path, monkeypatch):
    write(tmp_path, [make_row(value=1.0)])
    before = (tmp_path / "report.md").read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, [make_row(value=2.0)])
    assert (tmp_path / "report.md").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures", "report.html", "report.md"]


def test_no_rows_say_so(tmp_path):
    for document in write(tmp_path, []):
        assert "No results." in document and "<table" not in document


# The MNIST study's figures.


def test_errors_puts_distilled_nets_beside_those_on_labels_and_the_papers():
    rows = [
        make_row(value=70.0, std=2.0, seeds=3, paper=67),
        make_row("mnist_shifts", row="2x800 on labels, moved", value=90.0),
        make_row("mnist_shifts", row="distilled 2x800, moved", value=80.0),
        make_row("mnist_objectives", row="distilled, another table", value=1.0),
    ]
    (axes,) = figures.errors(rows).axes
    ours, paper = np.split(np.array(axes.patches), 2)
    assert [bar.get_width() for bar in ours] == [70.0, 90.0, 80.0]
    assert [bar.get_width() for bar in paper] == [67.0, 0.0, 0.0]
    colors = [bar.get_facecolor() for bar in ours]
    assert colors[0] == colors[1] != colors[2]


def test_temperature_has_a_panel_for_each_width_and_shades_the_papers_ranges():
    figure = figures.temperature(temperature_rows(widths=(300, 30, 100)))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [f"2 x {w}, fewest at T = 1" for w in (30, 100, 300)]
    assert {axes.get_xscale() for axes in figure.axes} == {"log"}
    line = figure.axes[0].containers[0].lines[0]
    assert line.get_xdata().tolist() == [1.0, 2.5, 8.0, 20.0]
    assert line.get_ydata().tolist() == [301.0, 302.5, 308.0, 320.0]
    shaded = [[p.get_x() for p in axes.patches] for axes in figure.axes]
    assert shaded == [[2.5], [], [8.0]]
    assert figure.axes[0].patches[0].get_width() == pytest.approx(1.5)
    assert len({axes.get_xlim() for axes in figure.axes}) == 1


def test_bias_shift_puts_the_papers_numbers_beside_ours():
    figure = figures.bias_shift(bias_rows())
    assert len(figure.axes) == 3
    ours, paper = (
        [bar.get_width() for bar in bars]
        for bars in figure.axes[0].containers
        if hasattr(bars, "patches")
    )
    assert ours == [221.0, 111.0] and paper == [206, 109]
    labels = [text.get_text().replace("\n", " ") for text in figure.axes[0].get_yticklabels()]
    assert labels[0] == "without 3s"
    assert labels[1].endswith(f"(best on test) {DAGGER} shift +3.3 (paper +3.5)")
    written = [text.get_text() for text in figure.axes[2].texts]
    # Where the paper has no number there is none.
    assert written == ["44.1", "14.2", "47.3", ""]


def test_fractions_has_a_line_for_hard_and_for_soft_targets():
    (axes,) = figures.fractions(fraction_rows()).axes
    assert axes.get_xscale() == "log"
    lines = {c.get_label(): c.lines[0].get_xydata().tolist() for c in axes.containers}
    assert lines["hard targets"] == [[3, 300], [10, 90], [100, 9]]
    assert list(lines) == ["hard targets", "soft targets"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["3", "10", "100"]


def test_curves_show_the_listed_nets_means_in_a_band_of_the_seeds():
    one, several = draw_curves(make_curves(), ("teacher", "absent", "shifts_soft")).axes
    assert one.get_title(loc="left") == "teacher, ends at 300"
    assert several.get_title(loc="left") == "shifts soft, ends at 155"
    assert several.lines[0].get_ydata().tolist() == [460.0, 155.0]
    band = several.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (150.0, 500.0)


def test_digits_show_small_probabilities_on_a_logarithmic_axis():
    figure = figures.digits(make_digits(3))
    images, cold, hot = np.array(figure.axes).reshape(3, 3)
    assert images[0].get_title() == "2, most like 3"
    assert images[0].images[0].get_array().shape == (28, 28)
    assert cold[0].get_yscale() == "log" and hot[0].get_yscale() == "linear"
    assert cold[0].get_ylim()[0] < 1e-9
    assert [bar.get_height() for bar in hot[2].patches] == [0.05] * 10
    colors = [bar.get_facecolor() for bar in cold[1].patches]
    assert colors.count(colors[2]) == 1


def test_all_figures_leaves_out_what_has_no_data():
    rows = [make_row(), *temperature_rows(), *bias_rows(), *fraction_rows()]
    drawn = figures.all_figures(rows, make_curves(), make_digits())
    names = ["errors", "temperature", "bias_shift", "fractions", "curves", "digits"]
    assert [name for name, _, _ in drawn] == names
    assert all(caption.endswith(".") and isinstance(fig, Figure) for _, caption, fig in drawn)
    assert [name for name, _, _ in figures.all_figures(bias_rows(), {}, [])] == ["bias_shift"]
    assert [name for name, _, _ in figures.all_figures([], {}, make_digits())] == ["digits"]
    # A row that was not measured draws nothing.
    assert figures.all_figures([row | {"value": None} for row in rows], {}, []) == []
