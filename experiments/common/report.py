"""Reports made from the rows of a study only: report.md, report.html and the figures.

A row is one measured number, a plain dict with the keys of `KEYS`: the paper's number or null, the
mean and the sample standard deviation (null for one seed) over `seeds` runs, and `selection` saying
what the number was chosen on. It may have an "interval", of 95 % confidence. Any study's rows have this
form, so nothing here knows the studies.
"""

import io
import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distill_jax.errors import UserError
from distill_jax.files import read_json, write_whole

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

Row = dict[str, Any]
NamedFigure = tuple[str, str, "Figure"]

_WORDS = ("table", "row", "metric", "preset", "source")
_NUMBERS = ("paper", "value", "std", "seconds")
KEYS = (*_WORDS, *_NUMBERS, "seeds", "selection")
SELECTIONS = ("last", "validation", "test")

WIDE = "_costs"
"""How the names of tables end that compare a few nets by many metrics, with a column for each net."""

_MISSING = "\u2013"
_MARK = "\u2020"


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
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a JSON list of rows, each an object")
    for index, row in enumerate(rows):
        if problem := _problem(row):
            raise UserError(f"{path}: row {index} {problem}")
    return rows


def write(
    workdir: str | os.PathLike[str],
    title: str,
    captions: Mapping[str, str],
    rows: Sequence[Row],
    *,
    reference_rows: Sequence[Row],
    figures: Sequence[NamedFigure],
    seconds: float,
) -> None:
    """Writes report.md, report.html and figures/NAME.png.

    The HTML is a single file with its style and figures inside. In a figure,
    pure black stands for ink and follows the page's text colour; other colours stay as they are.

    Args:
        workdir: the folder to write to; made if absent.
        title: the report's heading.
        captions: for a table's name, a sentence on what the paper claims.
        rows: the rows to show, in order; one table for each `table`.
        reference_rows: a published run's rows, shown where table, row and metric are the same.
        figures: name (the file's too: a plain word), caption, and a figure without a background.
        seconds: the wall time that everything took.
    """
    references = {_key(row): row for row in reference_rows}
    names = dict.fromkeys(row["table"] for row in rows)
    page = {
        "title": title,
        "summary": _summary(rows, references, seconds),
        "tables": [
            _table(name, captions.get(name), [r for r in rows if r["table"] == name], references)
            for name in names
        ],
        "figures": [_svg(*named) for named in figures],
    }
    workdir = Path(workdir)
    (workdir / "figures").mkdir(parents=True, exist_ok=True)
    for name, _, figure in figures:
        png = _saved(figure, format="png", facecolor="white", metadata={"Software": None})
        with write_whole(workdir / "figures" / f"{name}.png") as partial:
            partial.write_bytes(png)
    templates = _templates()
    for name in ("report.md", "report.html"):
        text = templates.get_template(name).render(page)
        with write_whole(workdir / name) as partial:
            partial.write_text(f"{text.strip()}\n", encoding="utf-8")


def format_number(value: float | None, decimals: int | None = None) -> str:
    """A number with `decimals`, else whole when integral and about three digits otherwise."""
    if value is None or not math.isfinite(value):
        return _MISSING if value is None else f"{value:f}"
    if decimals is not None:
        return f"{value:.{decimals}f}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.{_decimals(value)}f}"


class _Measured(NamedTuple):
    """A measured number in the pieces that a page may style, with the spaces between them."""

    text: str
    mark: str
    seeds: str


def _measured(row: Row | None) -> _Measured:
    """The mean shows as many decimals as the spread needs for one digit of its own."""
    if row is None or row["value"] is None:
        return _Measured(_MISSING, "", "")
    value, std = row["value"], row["std"]
    text = format_number(value)
    if std is not None and math.isfinite(std):
        if "e" in text:
            spread = f"{std:.2e}"
        else:
            # One decimal beside a spread that is not whole, and more for one below 0.1.
            needed = 0 if float(std).is_integer() else max(1, -math.floor(math.log10(std)))
            decimals = min(max(_decimals(value), needed), 6)
            text, spread = format_number(value, decimals), format_number(std, decimals)
        text = f"{text} \u00b1 {spread}"
    if row.get("interval"):
        text += " [{}, {}]".format(*map(format_number, row["interval"]))
    seeds = "1 seed" if row["seeds"] == 1 else f"{row['seeds']} seeds"
    return _Measured(text, f" {_MARK}" if row["selection"] == "test" else "", f" ({seeds})")


def _problem(row: Row) -> str:
    """What is wrong with a row that was read; empty if nothing is."""
    if missing := [key for key in KEYS if key not in row]:
        return f"lacks {', '.join(missing)}"
    # A misspelt "test" would leave a tuned number unmarked.
    if row["selection"] not in SELECTIONS:
        return f"has selection {row['selection']!r}, expected one of {', '.join(SELECTIONS)}"
    if wrong := [key for key in _NUMBERS if not isinstance(row[key], int | float | None)]:
        return f"needs a number or null for {', '.join(wrong)}"
    if wrong := [key for key in _WORDS if not isinstance(row[key], str)]:
        return f"needs text for {', '.join(wrong)}"
    interval = row.get("interval")
    if interval is not None and not _is_pair(interval):
        return "needs two numbers, the lower first, for interval"
    if not isinstance(row["seeds"], int) or row["seeds"] < 1:
        return "needs a count of at least 1 for seeds"
    return ""


def _is_pair(interval: Any) -> bool:
    numbers = isinstance(interval, list | tuple) and all(
        isinstance(x, int | float) for x in interval
    )
    return numbers and len(interval) == 2 and interval[0] <= interval[1]


def _decimals(value: float) -> int:
    """0 for integral numbers, else what gives about three significant digits."""
    if float(value).is_integer():
        return 0
    size = abs(value)
    return 1 if size >= 10 else min(2 - math.floor(math.log10(size)), 6)


def _key(row: Row) -> tuple:
    return row["table"], row["row"], row["metric"]


def _table(
    name: str, caption: str | None, rows: Sequence[Row], references: Mapping[tuple, Row]
) -> dict[str, Any]:
    """What a template shows of a table; the metrics of a row, from the same runs, are a group."""
    groups = []
    for (row, seconds), group in itertools.groupby(rows, lambda r: (r["row"], r["seconds"])):
        # Tenths of a second do not matter for long times.
        decimals = 0 if seconds is not None and seconds >= 100 else 1
        lines = [_line(one, references.get(_key(one))) for one in group]
        groups.append({"row": row, "seconds": format_number(seconds, decimals), "lines": lines})
    return {
        "name": name.replace("_", " "),
        "caption": caption,
        "groups": groups,
        "wide": _wide(rows) if name.endswith(WIDE) else None,
        "reference": any(_key(row) in references for row in rows),
        "tuned": any(line["tuned"] for group in groups for line in group["lines"]),
        "intervals": any(row.get("interval") for row in rows),
    }


def _wide(rows: Sequence[Row]) -> dict[str, Any]:
    """The same numbers with a column for each row's name, and a line for each metric."""
    columns = list(dict.fromkeys(row["row"] for row in rows))
    values = {(row["metric"], row["row"]): row["value"] for row in rows}
    lines = [
        (metric.replace("_", " "), [format_number(values.get((metric, one))) for one in columns])
        for metric in dict.fromkeys(row["metric"] for row in rows)
    ]
    return {"columns": columns, "lines": lines}


def _line(row: Row, reference: Row | None) -> dict[str, Any]:
    ours, theirs = _measured(row), _measured(reference)
    return {
        "metric": row["metric"].replace("_", " "),
        # The paper's numbers stay as printed there: 3.5, not 3.50.
        "paper": _MISSING if row["paper"] is None else f"{row['paper']:.10g}",
        "ours": ours,
        "reference": theirs,
        "selection": row["selection"],
        "tuned": bool(ours.mark or theirs.mark),
    }


def _summary(rows: Sequence[Row], references: Mapping[tuple, Row], seconds: float) -> list[str]:
    """The lines under the title: how these rows were made, and the reference where one is shown."""
    if not rows:
        return ["No results."]
    lines = [f"{_origin(rows)}; {seconds:,.0f} s in all"]
    shown = [references[_key(row)] for row in rows if _key(row) in references]
    if shown:
        lines.append(f"Reference, a published run: {_origin(shown)}")
    return lines


def _origin(rows: Sequence[Row]) -> str:
    presets, sources = (
        ", ".join(dict.fromkeys(r[key] for r in rows)) for key in ("preset", "source")
    )
    seeds = sorted({row["seeds"] for row in rows})
    many = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    devices = "".join(
        f"; on {name}" for name in dict.fromkeys(r["device"] for r in rows if "device" in r)
    )
    return f"preset {presets}; source {sources}; {many} seed{'' if seeds == [1] else 's'}{devices}"


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\|*_~$`<>\[\]])", r"\\\1", " ".join(text.split()))


def _templates() -> "Environment":
    import jinja2  # late, as matplotlib below: without them a study can say which extra it needs

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["md"] = _escape_markdown
    return templates


def _saved(figure: "Figure", **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, **options)
    return buffer.getvalue()


def _svg(name: str, caption: str, figure: "Figure") -> dict[str, Any]:
    """What a template shows of a figure: SVG elements, their ids made the page's own by `name`."""
    import matplotlib

    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # Outlines look alike without the font; the salt makes equal figures equal bytes.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        svg = _saved(figure, format="svg", transparent=True, metadata=nothing).decode()
    drawing = re.sub(r".*<svg[^>]*>(.*)</svg>.*", r"\1", svg, flags=re.DOTALL)
    drawing = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", drawing)
    width, height = (f"{72 * inches:g}" for inches in figure.get_size_inches())
    drawing = drawing.replace("#000000", "currentColor").strip()
    return dict(name=name, caption=caption, width=width, height=height, drawing=drawing)
