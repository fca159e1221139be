"""Reports drawn from a study's rows alone: report.md, report.html and the figures beside them.

A row is one measured number, a plain dict with the keys of `KEYS`: the paper's number or null, the
mean and the sample standard deviation (null for one seed) over `seeds` runs, and `selection` saying
what the number was chosen on. Any study's rows have this form, so nothing here knows the studies.
"""

import html
import io
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from distill_jax.errors import UserError

Row = dict[str, Any]
NamedFigure = tuple[str, str, Figure]

KEYS = (
    "table",
    "row",
    "metric",
    "paper",
    "value",
    "std",
    "seeds",
    "selection",
    "preset",
    "source",
    "seconds",
)
SELECTIONS = ("last", "validation", "test")

_MISSING = "\u2013"
_MARK = "\u2020"
_NOTE = f"{_MARK} chosen on the test set, as the paper did"


def load_rows(path: str | os.PathLike[str]) -> list[Row]:
    """Reads a list of rows, checked against the contract.

    Args:
        path: a `results.json` or `reference.json`.

    Returns:
        The rows in the file's order, with whatever further keys they carry.

    Raises:
        UserError: the file cannot be read, is no JSON list of rows, or a row lacks a key or holds a
            value of the wrong kind; the message names the file and the keys.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a JSON list of rows, each an object")
    for index, row in enumerate(rows):
        missing = [key for key in KEYS if key not in row]
        if missing:
            raise UserError(f"{path}: row {index} lacks {', '.join(missing)}")
        # A misspelt "test" would leave a tuned number unmarked.
        if row["selection"] not in SELECTIONS:
            raise UserError(
                f"{path}: row {index} has selection {row['selection']!r}, "
                f"expected one of {', '.join(SELECTIONS)}"
            )
        wrong = [key for key in ("paper", "value", "std", "seconds") if not _is_number(row[key])]
        if wrong:
            raise UserError(f"{path}: row {index} needs a number or null for {', '.join(wrong)}")
        if not isinstance(row["seeds"], int) or row["seeds"] < 1:
            raise UserError(f"{path}: row {index} needs a count of at least 1 for seeds")
    return rows


def write(
    workdir: str | os.PathLike[str],
    title: str,
    captions: Mapping[str, str],
    rows: Sequence[Row],
    reference_rows: Sequence[Row] = (),
    figures: Sequence[NamedFigure] = (),
    seconds: float | None = None,
) -> None:
    """Writes report.md, report.html and figures/NAME.png.

    The HTML is one file that asks for nothing else: its style and figures are inside. In a figure,
    pure black stands for ink and follows the page's text colour; other colours stay as they are.

    Args:
        workdir: the folder to write to; made if absent.
        title: the report's heading.
        captions: for a table's name, a sentence on what the paper claims.
        rows: the rows to show, in order; one table for each `table`.
        reference_rows: a published run's rows, shown where table, row and metric are the same.
        figures: name (also the file's), caption, and a figure without a background of its own.
        seconds: what everything took; None sums the rows', too many where rows were trained as one.
    """
    for name, _, _ in figures:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            raise ValueError(f"a figure's name becomes a file name and an id, so not {name!r}")
    workdir = Path(workdir)
    (workdir / "figures").mkdir(parents=True, exist_ok=True)
    for name, _, figure in figures:
        _replace(workdir / "figures" / f"{name}.png", _png(figure))
    tables = _tables(rows, reference_rows)
    summary = _summary(rows, reference_rows, seconds)
    markdown = _markdown(title, summary, captions, tables, figures)
    _replace(workdir / "report.md", markdown.encode())
    _replace(workdir / "report.html", _html(title, summary, captions, tables, figures).encode())


def format_number(value: float | None, decimals: int | None = None) -> str:
    """A number as a reader wants it: whole when integral, about three digits otherwise.

    Args:
        value: the number; None and missing are a dash.
        decimals: how many to show; None lets the size of the number decide.
    """
    if value is None:
        return _MISSING
    if not math.isfinite(value):
        return str(float(value))
    if decimals is not None:
        return f"{value:.{decimals}f}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.{_decimals(value)}f}"


def format_measured(row: Row) -> str:
    """`value` with its spread, the mark of a number chosen on the test set, and the seeds.

    The mean shows as many decimals as the spread needs for one digit of its own.
    """
    value, std = row["value"], row["std"]
    if value is None:
        return _MISSING
    text = format_number(value)
    if std is not None and math.isfinite(value) and math.isfinite(std):
        if 0 < abs(value) < 1e-3:
            spread = f"{std:.2e}"
        else:
            # One decimal beside a spread that is not whole, and more for one below 0.1.
            needed = 0 if float(std).is_integer() else max(1, -math.floor(math.log10(std)))
            decimals = min(max(_decimals(value), needed), 6)
            text, spread = format_number(value, decimals), format_number(std, decimals)
        text = f"{text} \u00b1 {spread}"
    mark = f" {_MARK}" if row["selection"] == "test" else ""
    return f"{text}{mark} ({_count(row['seeds'], 'seed')})"


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _decimals(value: float) -> int:
    """0 for integral numbers, else what gives about three significant digits."""
    if float(value).is_integer():
        return 0
    size = abs(value)
    if size >= 10:
        return 1
    return min(2 - math.floor(math.log10(size)), 6)


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


class _Line:
    """One line of a table, ready to print."""

    def __init__(self, row: Row, reference: Row | None):
        self.row = str(row["row"])
        self.metric = _words(str(row["metric"]))
        # The paper's numbers stay as printed there: 3.5, not 3.50.
        self.paper = _MISSING if row["paper"] is None else f"{row['paper']:.10g}"
        self.ours = format_measured(row)
        self.reference = _MISSING if reference is None else format_measured(reference)
        self.selection = str(row["selection"])
        seconds = row["seconds"]
        # Tenths of a second tell nothing once there are many seconds.
        whole = seconds is not None and seconds >= 100
        self.seconds = format_number(seconds, 0 if whole else None)

    @property
    def marked(self) -> bool:
        """Whether a number of this line carries the mark."""
        return _MARK in self.ours or _MARK in self.reference


class _Table:
    """The lines of one table, with consecutive metrics of a row grouped."""

    def __init__(self, name: str, rows: Sequence[Row], references: Mapping[tuple, Row]):
        self.name = name
        lines = [_Line(row, references.get(_key(row))) for row in rows]
        self.groups = [list(group) for _, group in itertools.groupby(lines, lambda x: x.row)]
        self.has_reference = any(_key(row) in references for row in rows)
        self.has_mark = any(line.marked for line in lines)
        self.columns = ["row", "metric", "paper", "ours", "selection", "seconds"]
        if self.has_reference:
            self.columns.insert(4, "reference")


def _key(row: Row) -> tuple:
    return row["table"], row["row"], row["metric"]


def _tables(rows: Sequence[Row], reference_rows: Sequence[Row]) -> list[_Table]:
    references = {_key(row): row for row in reference_rows}
    names = _unique(row["table"] for row in rows)
    return [_Table(name, [r for r in rows if r["table"] == name], references) for name in names]


def _summary(
    rows: Sequence[Row], reference_rows: Sequence[Row], seconds: float | None
) -> list[str]:
    """The lines under the title: how these rows were made, and the reference where one is shown."""
    if not rows:
        return ["No results."]
    lines = [_origin(rows, seconds)]
    keys = {_key(row) for row in rows}
    shown = [row for row in reference_rows if _key(row) in keys]
    if shown:
        lines.append(f"Reference, a published run: {_origin(shown)}")
    return lines


def _origin(rows: Sequence[Row], seconds: float | None = None) -> str:
    seeds = sorted({row["seeds"] for row in rows})
    many = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    # The metrics of a row come from the same runs, so their seconds count once.
    spent: dict[tuple, float] = {}
    for row in rows:
        key = row["table"], row["row"]
        spent[key] = max(spent.get(key, 0.0), row["seconds"] or 0.0)
    parts = [
        "preset " + ", ".join(str(p) for p in _unique(row["preset"] for row in rows)),
        "source " + ", ".join(str(s) for s in _unique(row["source"] for row in rows)),
        f"{many} seed{'' if seeds == [1] else 's'}",
        f"{sum(spent.values()):,.0f} s over all rows"
        if seconds is None
        else f"{seconds:,.0f} s in all",
    ]
    devices = _unique(row["device"] for row in rows if row.get("device"))
    if devices:
        parts.append("on " + ", ".join(str(device) for device in devices))
    return "; ".join(parts)


# Markdown.


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\|*_~$`<>\[\]])", r"\\\1", " ".join(str(text).split()))


def _markdown(
    title: str,
    summary: Sequence[str],
    captions: Mapping[str, str],
    tables: Sequence[_Table],
    figures: Sequence[NamedFigure],
) -> str:
    blocks = [f"# {_escape_markdown(title)}", *map(_escape_markdown, summary)]
    for table in tables:
        blocks.append(f"## {_escape_markdown(_words(table.name))}")
        if table.name in captions:
            blocks.append(_escape_markdown(captions[table.name]))
        blocks.append(_markdown_table(table))
        if table.has_mark:
            blocks.append(_NOTE)
    if figures:
        blocks.append("## Figures")
    for name, caption, _ in figures:
        text = _escape_markdown(caption)
        blocks += [f"![{text}](figures/{name}.png)", text]
    return "\n\n".join(blocks) + "\n"


def _markdown_table(table: _Table) -> str:
    right = {"paper", "ours", "reference", "seconds"}
    lines = [table.columns, ["--:" if c in right else ":--" for c in table.columns]]
    for group in table.groups:
        for index, line in enumerate(group):
            cells = {c: _escape_markdown(getattr(line, c)) for c in table.columns}
            if index:
                cells["row"] = ""
                if line.seconds == group[index - 1].seconds:
                    cells["seconds"] = ""
            lines.append([cells[c] for c in table.columns])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# HTML.

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1d2125; --soft: #5b646d;
  --line: #d8dde2; --head: #f3f5f7; --mark: #a34a00; --tint: #fff6ea; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181b; --ink: #e5e8ea; --soft: #a0a9b1; --line: #363d44; --head: #1f2428;
    --mark: #ffb066; --tint: #2a2219; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; text-wrap: balance; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; }
.summary, .note, figcaption { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; margin: .8rem 0 .4rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: left; vertical-align: top; }
th:first-child { padding-left: .3rem; }
thead th { background: var(--head); font-weight: 600; white-space: nowrap;
  border-bottom: 2px solid var(--line); }
tbody { border-bottom: 1px solid var(--line); }
.metric { white-space: nowrap; }
tbody th { font-weight: 500; min-width: 8rem; max-width: 20rem; }
.number { text-align: right; white-space: nowrap; }
.seeds { color: var(--soft); }
.tuned { background: var(--tint); }
.mark { color: var(--mark); font-weight: 700; }
figure { margin: 1.5rem 0 2.5rem; }
figcaption { max-width: 46rem; }
svg { display: block; height: auto; width: var(--width);
  max-width: max(100%, min(var(--width), 36rem)); fill: currentColor; }
@media (max-width: 40rem) {
  table { font-size: .82rem; }
  th, td { padding: .3rem .4rem; }
  tbody th { min-width: 5.5rem; }
  .metric { white-space: normal; }
  .seeds { display: block; }
}
"""


def _html(
    title: str,
    summary: Sequence[str],
    captions: Mapping[str, str],
    tables: Sequence[_Table],
    figures: Sequence[NamedFigure],
) -> str:
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts += [f'<p class="summary">{html.escape(line)}</p>' for line in summary]
    for table in tables:
        parts.append(f"<section>\n<h2>{html.escape(_words(table.name))}</h2>")
        if table.name in captions:
            parts.append(f"<p>{html.escape(captions[table.name])}</p>")
        parts.append(_html_table(table))
        if table.has_mark:
            parts.append(f'<p class="note">{_html_mark(_NOTE)}</p>')
        parts.append("</section>")
    if figures:
        parts.append("<h2>Figures</h2>")
    for name, caption, figure in figures:
        text = html.escape(caption)
        parts.append(
            f'<figure id="figure-{name}">\n'
            # The scrolling part takes the keyboard's focus, so that arrows scroll it.
            f'<div class="scroll" tabindex="0">{_svg(name, caption, figure)}</div>\n'
            f"<figcaption>{text}</figcaption>\n</figure>"
        )
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _html_table(table: _Table) -> str:
    right = {"paper", "ours", "reference", "seconds"}

    def attributes(column: str) -> str:
        kind = "number" if column in right else column
        return f' class="{kind}"' if kind in ("number", "metric") else ""

    head = "".join(f'<th scope="col"{attributes(c)}>{c}</th>' for c in table.columns)
    bodies = []
    for group in table.groups:
        span = f' rowspan="{len(group)}"' if len(group) > 1 else ""
        same_seconds = len({line.seconds for line in group}) == 1
        lines = []
        for index, line in enumerate(group):
            cells = []
            if index == 0:
                cells.append(f'<th scope="rowgroup"{span}>{html.escape(line.row)}</th>')
            for column in table.columns[1:]:
                text = _html_mark(html.escape(getattr(line, column)))
                if column in ("ours", "reference"):
                    text = re.sub(r"(\(\d+ seeds?\))$", r'<span class="seeds">\1</span>', text)
                if column == "seconds" and same_seconds:
                    if index == 0:
                        cells.append(f"<td{span}{attributes(column)}>{text}</td>")
                else:
                    cells.append(f"<td{attributes(column)}>{text}</td>")
            tuned = ' class="tuned"' if line.marked else ""
            lines.append(f"<tr{tuned}>{''.join(cells)}</tr>")
        bodies.append("<tbody>\n" + "\n".join(lines) + "\n</tbody>")
    label = html.escape(_words(table.name))
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n" + "\n".join(bodies) + "\n</table>\n</div>"
    )


def _html_mark(text: str) -> str:
    return text.replace(_MARK, f'<span class="mark">{_MARK}</span>')


# Figures.


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _svg(name: str, caption: str, figure: Figure) -> str:
    """The figure as an element to stand in a page, its ids made the page's own by `name`."""
    buffer = io.StringIO()
    # Outlines look alike without the font; the salt makes equal figures equal bytes.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", dpi=150, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("#000000", "currentColor")
    width = re.search(r'\bwidth="([\d.]+)pt"', svg)
    style = f' style="--width: {width.group(1)}pt"' if width else ""
    view = re.search(r'viewBox="[^"]*"', svg)
    box = f" {view.group()}" if view else ""
    label = html.escape(caption)
    opening = f'<svg role="img" aria-label="{label}"{box}{style}>'
    return re.sub(r"^<svg[^>]*>", lambda _: opening, svg)


def _replace(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all: a reader never sees half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
