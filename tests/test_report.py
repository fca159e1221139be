import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from distill_jax.errors import UserError
from experiments import report
from experiments.mnist import figures

DASH, DAGGER, PLUS_MINUS = "\u2013", "\u2020", "\u00b1"


def make_row(table="mnist", row="teacher 2x1200", metric="test_errors", value=70.0, **keys):
    defaults = {
        "paper": None,
        "std": None,
        "seeds": 1,
        "selection": "last",
        "preset": "smoke",
        "source": "embedded",
        "seconds": 2.5,
    }
    return {"table": table, "row": row, "metric": metric, "value": value} | defaults | keys


def temperature_rows(widths=(30, 300), temperatures=(1.0, 2.5, 8.0, 20.0)):
    return [
        make_row(
            "mnist_temperature",
            f"2x{width}, T = {t:g}",
            value=9000.0 / width + t,
            std=2.0,
            seeds=3,
            width=width,
            temperature=t,
        )
        for width in widths
        for t in reversed(temperatures)
    ]


def bias_rows():
    shifted = "without 3s, bias of 3 shifted (best on test)"
    sevens = "only 7s and 8s, biases of 7 and 8 shifted (best on test)"
    return [
        make_row("mnist_without_3", "without 3s", "test_errors", 221.0, paper=206),
        make_row("mnist_without_3", "without 3s", "errors_on_3", 150.0, paper=133),
        make_row("mnist_without_3", shifted, "test_errors", 111.0, paper=109, selection="test"),
        make_row("mnist_without_3", shifted, "errors_on_3", 15.0, paper=14, selection="test"),
        make_row("mnist_without_3", shifted, "bias_shift", 3.3, paper=3.5, selection="test"),
        make_row("mnist_only_7_8", "only 7s and 8s", "test_error_percent", 44.1, paper=47.3),
        make_row("mnist_only_7_8", sevens, "test_error_percent", 14.2, selection="test"),
    ]


def fraction_rows():
    return [
        make_row("mnist_fraction", f"{f}%, {t}", value=v / f, fraction=f, targets=t)
        for t, v in (("hard", 900.0), ("soft", 500.0))
        for f in (100, 3, 10)
    ]


def make_curves():
    return {
        "teacher": {"epoch": [1, 2, 3], "train_loss": [[1.0]] * 3, "test_errors": [[300.0]] * 3},
        "baseline": {
            "epoch": [1, 2],
            "test_errors": [[400.0, 500.0, 480.0], [150.0, 160.0, 155.0]],
        },
    }


def make_digits(count=2):
    soft = {"1": [1e-9] * 10, "20": [0.05] * 10}
    soft["1"][2], soft["1"][3] = 1.0, 1e-6
    image = np.arange(784).reshape(28, 28) % 256
    return [{"image": image.tolist(), "label": 2, "soft_targets": soft} for _ in range(count)]


def plain_figure():
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2], label="a line")
    return figure


def write(workdir, rows, captions=None, reference_rows=(), drawn=()):
    report.write(workdir, "A title", captions or {}, rows, reference_rows, drawn)
    read = [(workdir / f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "html")]
    return read[0], read[1]


def markdown_cells(markdown):
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in markdown.splitlines()
        if line.startswith("|")
    ]


class Cells(HTMLParser):
    """The text of every table's cells, line by line, and all tags with their attributes."""

    VOID = ("meta",)

    def __init__(self, text):
        super().__init__()
        self.lines, self.tags, self.open = [], [], []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.lines.append([])
        if tag in ("td", "th"):
            self.lines[-1].append("")
            self.inside = True

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.lines[-1][-1] += data


# The contract.


def test_load_rows_gives_the_rows_with_their_further_keys(tmp_path):
    rows = [make_row(), make_row(row="other", width=30, value=None)]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    assert report.load_rows(tmp_path / "results.json") == rows


def test_load_rows_names_the_file_and_every_missing_key(tmp_path):
    rows = [make_row(), make_row()]
    del rows[1]["std"], rows[1]["selection"]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError) as caught:
        report.load_rows(path)
    assert str(path) in str(caught.value)
    assert "row 1 lacks std, selection" in str(caught.value)


@pytest.mark.parametrize("key", report.KEYS)
def test_load_rows_needs_each_key(tmp_path, key):
    row = make_row()
    del row[key]
    (tmp_path / "r.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match=rf"lacks {key}$"):
        report.load_rows(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("{}", "JSON list"),
        ("[1]", "JSON list"),
        (json.dumps([make_row(selection="tset")]), "selection 'tset'"),
        (json.dumps([make_row(value="70")]), "number or null for value"),
        (json.dumps([make_row(seeds=0)]), "at least 1 for seeds"),
    ],
)
def test_load_rows_refuses_what_is_no_list_of_rows(tmp_path, text, message):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=message):
        report.load_rows(tmp_path / "r.json")


def test_load_rows_names_an_absent_file(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        report.load_rows(tmp_path / "nowhere.json")


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
        (-7.625, "-7.62"),
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
def test_format_measured(value, std, seeds, selection, text):
    row = make_row(value=value, std=std, seeds=seeds, selection=selection)
    assert report.format_measured(row) == text


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
    assert cells[2] == ["teacher 2x1200", "test errors", "67", ours, "last", "2.50"]
    assert cells[3] == ["", "train loss", DASH, "0.500 (5 seeds)", "last", ""]
    assert cells[4][0] == "baseline"
    page = Cells(text)
    assert not page.open
    # The second metric has no cells of its own for the row's name and seconds: they span.
    assert page.lines == [cells[0], cells[2], cells[3][1:-1], cells[4]]
    spans = [attrs["rowspan"] for tag, attrs in page.tags if "rowspan" in attrs]
    assert spans == ["2", "2"]


def test_tables_stand_in_the_rows_order_with_their_captions(tmp_path):
    rows = [make_row("b_table"), make_row("a_table"), make_row("b_table", row="second")]
    markdown, text = write(tmp_path, rows, {"a_table": "The paper claims this."})
    assert re.findall(r"^## (.*)$", markdown, re.MULTILINE) == ["b table", "a table"]
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["b table", "a table"]
    assert "## a table\n\nThe paper claims this.\n\n|" in markdown
    assert "<p>The paper claims this.</p>" in text


def test_numbers_chosen_on_the_test_set_are_marked_and_only_they(tmp_path):
    rows = [
        make_row("plain", selection="validation"),
        make_row("tuned", row="as learned", value=206.0),
        make_row("tuned", row="shifted", value=109.0, selection="test"),
    ]
    markdown, text = write(tmp_path, rows)
    plain, tuned = markdown.split("## tuned")
    assert DAGGER not in plain
    assert f"109 {DAGGER} (1 seed)" in tuned and "| 206 (1 seed) |" in tuned
    assert tuned.count(f"{DAGGER} chosen on the test set, as the paper did") == 1
    page = Cells(text)
    marked = [line for line in page.lines if any(DAGGER in cell for cell in line)]
    assert [line[0] for line in marked] == ["shifted"]
    assert [attrs.get("class") for tag, attrs in page.tags if tag == "tr"].count("tuned") == 1
    assert text.count("chosen on the test set, as the paper did") == 1


def test_reference_column_where_table_row_and_metric_match(tmp_path):
    rows = [make_row(), make_row(metric="train_loss"), make_row("other")]
    reference = [
        make_row(value=68.2, std=1.5, seeds=5, preset="full", seconds=700.0, device="Some GPU"),
        make_row("other", row="elsewhere", value=1.0, device="Not Shown"),
    ]
    markdown, text = write(tmp_path, rows, reference_rows=reference)
    first, second = markdown.split("## other")
    cells = markdown_cells(first)
    assert cells[0][4] == "reference"
    assert cells[2][4] == f"68.2 {PLUS_MINUS} 1.5 (5 seeds)"
    assert cells[3][4] == DASH
    assert "reference" not in markdown_cells(second)[0]
    for document in (markdown, text):
        assert "preset full; source embedded; 5 seeds; 700 s over all rows; on Some GPU" in document
        assert "Not Shown" not in document


def test_a_reference_chosen_on_the_test_set_is_marked(tmp_path):
    reference = [make_row(value=1.0, selection="test")]
    markdown, _ = write(tmp_path, [make_row(value=2.0)], reference_rows=reference)
    cells = markdown_cells(markdown)[2]
    assert cells[3:5] == ["2 (1 seed)", f"1 {DAGGER} (1 seed)"]
    assert "chosen on the test set" in markdown


def test_header_counts_the_seconds_of_a_row_once(tmp_path):
    rows = [
        make_row(seconds=100.0, seeds=5),
        make_row(metric="train_loss", seconds=100.0, seeds=5),
        make_row(row="other", seconds=20.0, seeds=2, source="tfds"),
        make_row(row="third", seconds=None),
    ]
    markdown, text = write(tmp_path, rows)
    line = "preset smoke; source embedded, tfds; 1 to 5 seeds; 120 s over all rows"
    assert f"\n\n{line}\n" in markdown
    assert f'<p class="summary">{line}</p>' in text


def test_header_takes_the_total_from_who_knows_it(tmp_path):
    rows = [make_row(seconds=100.0), make_row(row="trained with it", seconds=100.0)]
    report.write(tmp_path, "A title", {}, rows, seconds=1234.5)
    assert "1 seed; 1,234 s in all\n" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_everything_is_escaped(tmp_path):
    nasty = '<script>alert("x")</script> & a|b *c* `d` [e](f)'
    row = make_row(nasty, nasty, nasty, selection="last", preset=nasty, source=nasty)
    report.write(tmp_path, nasty, {nasty: nasty}, [row], [], [("fig", nasty, plain_figure())])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    page = Cells(text)
    assert not page.open
    assert page.lines[1][:2] == [nasty, nasty]
    assert next(attrs["aria-label"] for tag, attrs in page.tags if tag == "svg") == nasty
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
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
    for tag, attrs in Cells(text).tags:
        for key, value in attrs.items():
            if key in ("src", "srcset", "href", "xlink:href", "data"):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, key, value[:40])
    for target in re.findall(r"url\(([^)]*)\)", text):
        assert target.startswith("#")


def test_figures_are_named_files_and_elements_with_text_for_those_who_cannot_see(tmp_path):
    drawn = [("first", "One line.", plain_figure()), ("second", "Same line.", plain_figure())]
    markdown, text = write(tmp_path, [make_row()], drawn=drawn)
    assert "![One line.](figures/first.png)" in markdown
    for name, _, _ in drawn:
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = Cells(text)
    images = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert [(i["role"], i["aria-label"]) for i in images] == [
        ("img", "One line."),
        ("img", "Same line."),
    ]
    # Figures drawn alike share the page: every id is its own, every reference finds one.
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:href="|url\()#([^")]*)', text)
    assert references and set(references) <= set(ids)


def test_ink_follows_the_pages_text_colour(tmp_path):
    _, text = write(tmp_path, [make_row()], drawn=[("fig", "A line.", plain_figure())])
    assert "prefers-color-scheme: dark" in text
    svg = text[text.index("<svg") : text.index("</svg>")]
    assert "currentColor" in svg
    assert "#000000" not in svg and "fill: #ffffff" not in svg


@pytest.mark.parametrize("name", ["../up", "a b", "", '"', "1st"])
def test_a_figures_name_is_a_plain_word(tmp_path, name):
    with pytest.raises(ValueError, match="file name"):
        write(tmp_path, [make_row()], drawn=[(name, "caption", plain_figure())])


def test_writing_again_gives_the_same_bytes_and_leaves_nothing_else(tmp_path):
    def files():
        return {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    rows = temperature_rows()
    write(tmp_path, rows, drawn=figures.all_figures(rows))
    before = files()
    write(tmp_path, rows, drawn=figures.all_figures(rows))
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
    markdown, text = write(tmp_path, [])
    assert "No results." in markdown and "No results." in text
    assert "<table" not in text


# The MNIST study's figures.


def test_temperature_has_a_panel_for_each_width_and_shades_the_papers_ranges():
    rows = [*temperature_rows(widths=(300, 30, 100)), make_row("mnist_temperature", "no width")]
    figure = figures.temperature(rows)
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


def test_temperature_does_not_blow_up_small_differences():
    (axes,) = figures.temperature(temperature_rows(widths=(100,), temperatures=(4.0, 5.0))).axes
    low, high = axes.get_ylim()
    assert high - low >= 0.19 * 94.0


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


def test_bias_shift_of_one_table_alone():
    rows = [row for row in bias_rows() if row["table"] == "mnist_only_7_8"]
    assert len(figures.bias_shift(rows).axes) == 1


def test_fractions_has_a_line_for_hard_and_for_soft_targets():
    (axes,) = figures.fractions(fraction_rows()).axes
    assert axes.get_xscale() == "log"
    lines = {c.get_label(): c.lines[0].get_xydata().tolist() for c in axes.containers}
    assert lines["hard targets"] == [[3, 300], [10, 90], [100, 9]]
    assert list(lines) == ["hard targets", "soft targets"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["3", "10", "100"]


def test_curves_show_the_mean_in_a_band_of_the_seeds():
    one, several = figures.curves(make_curves()).axes
    assert one.get_title(loc="left") == "teacher, ends at 300"
    assert several.lines[0].get_ydata().tolist() == [460.0, 155.0]
    assert not one.collections
    band = several.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (150.0, 500.0)


def test_curves_leave_out_epochs_and_nets_that_were_not_tested():
    nets = {
        "a": {"epoch": [1, 2, 3], "test_errors": [[9.0], [None], [7.0]]},
        "b": {"epoch": [1], "train_loss": [[1.0]]},
        "c": {"epoch": [1], "test_errors": [[None]]},
    }
    (axes,) = figures.curves(nets).axes
    assert axes.lines[0].get_xydata().tolist() == [[1, 9], [3, 7]]


def test_curves_with_unlike_lengths_name_the_net():
    with pytest.raises(UserError, match="'a': 2 epochs but 1"):
        figures.curves({"a": {"epoch": [1, 2], "test_errors": [[1.0]]}})


def test_digits_show_small_probabilities_on_a_logarithmic_axis():
    figure = figures.digits(make_digits(7), most=3)
    images, cold, hot = np.array(figure.axes).reshape(3, 3)
    assert images[0].get_title() == "a 2, most like a 3"
    assert images[0].images[0].get_array().shape == (28, 28)
    assert cold[0].get_yscale() == "log" and hot[0].get_yscale() == "linear"
    assert cold[0].get_ylim()[0] < 1e-9
    assert [bar.get_height() for bar in hot[2].patches] == [0.05] * 10
    colors = [bar.get_facecolor() for bar in cold[1].patches]
    assert colors.count(colors[2]) == 1


def test_digits_draw_probabilities_that_float32_lost():
    digit = make_digits(1)[0]
    digit["soft_targets"] = {"1": [0.0] * 9 + [1.0]}
    figure = figures.digits([digit])
    assert np.isfinite(figure.axes[1].get_ylim()).all()
    figure.draw_without_rendering()


def test_all_figures_leaves_out_what_has_no_data():
    rows = temperature_rows() + bias_rows() + fraction_rows()
    drawn = figures.all_figures(rows, make_curves(), make_digits())
    names = ["temperature", "bias_shift", "fractions", "curves", "digits"]
    assert [name for name, _, _ in drawn] == names
    assert all(caption.endswith(".") and isinstance(fig, Figure) for _, caption, fig in drawn)
    assert [name for name, _, _ in figures.all_figures(bias_rows(), None, None)] == ["bias_shift"]
    assert [name for name, _, _ in figures.all_figures([], {}, make_digits())] == ["digits"]
    assert figures.all_figures([make_row()], {}, []) == []
    # A row that was not measured draws nothing.
    assert figures.all_figures([row | {"value": None} for row in rows], None, None) == []


def test_figures_register_nothing_with_pyplot():
    code = (
        "import sys; from experiments.mnist import figures; from experiments import report; "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
