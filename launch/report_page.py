"""What a report is made of, and its two forms: one HTML page and some lines in a terminal.

The page is one file that asks the network for nothing, and says so to the browser. Names that come
from data are escaped by the template, as JSON in its script, and once more (`named`) where
plotly.js would read them as its own HTML.
"""

import base64
import html
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

_METRICS = {"wauc": "WAUC", "mean_auc": "mean AUC", "auc": "AUC", "log_loss": "log loss"}
MARKS = ("", "best", "second")
ROWS_IN_A_TERMINAL = 24


@dataclass(frozen=True)
class Cell:
    """One of a table; `sort` is its value where it is a figure, and `more` are small lines."""

    text: str
    sort: float | None = None
    mark: str = ""
    more: tuple[str, ...] = ()
    link: str = ""


@dataclass(frozen=True)
class Table:
    """The first column names the row. `folded` waits for a click; `brief` are the columns that a
    terminal has room for, if any."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    folded: bool = False
    brief: Sequence[int] = ()
    total: Sequence[Cell] = ()
    kind: str = "table"


@dataclass(frozen=True)
class Figure:
    """A plotly figure: `traces` stay, and with `choices` a reader picks one more set of them.

    Colours are names of the page's own (`--series-1`), which follow its light and dark.
    """

    title: str
    note: str
    traces: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    choices: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    axis_of_choice: bool = False
    """Whether a choice also names the x axis."""
    wide: bool = False
    kind: str = "figure"


@dataclass(frozen=True)
class Spark:
    """A curve without axes: points in a box of 100 by 32, and where its zero line lies."""

    name: str
    told: str
    points: str
    zero: float
    kept: bool


@dataclass(frozen=True)
class Sparks:
    """Small multiples."""

    title: str
    note: str
    items: Sequence[Spark]
    kind: str = "sparks"


@dataclass(frozen=True)
class Image:
    """A PNG file, embedded."""

    alt: str
    caption: str
    data: str
    link: str
    kind: str = "image"


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    parts: Sequence[Table | Figure | Sparks | Image]
    note: str = ""


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    what: str
    """In a line"""
    headlines: Sequence[tuple[str, str, str]]
    """Label, figure, and what goes with it"""
    sections: Sequence[Section]
    facts: Mapping[str, str]
    links: Sequence[tuple[str, str]]
    status: str = ""
    """Why it is not all there; empty for what is finished"""
    note: str = ""
    source: str = ""
    """The run file, folded away"""

    def html(self) -> str:
        """The page, which holds everything that it shows."""
        loader = jinja2.FileSystemLoader(Path(__file__).parent)
        environment = jinja2.Environment(
            loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
        )
        environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
        figures = [
            {
                "traces": part.traces,
                "layout": part.layout,
                "choices": list(part.choices.values()),
                "names": list(part.choices) if part.axis_of_choice else None,
            }
            for section in self.sections
            for part in section.parts
            if isinstance(part, Figure)
        ]
        return environment.get_template("report.html.j2").render(
            page=self, figures=_finite(figures), plotly=get_plotlyjs(), nonce=secrets.token_hex(8)
        )

    def print(self, console: Console) -> None:
        """The same, shorter."""
        console.rule(Text(self.title, "bold"))
        console.print(Text(self.what))
        if self.status:
            console.print(Text(self.status, "yellow"))
        for label, value, more in self.headlines:
            console.print(Text.assemble((f"{label}: ", "dim"), (value, "bold"), f"  {more}"))
        tables = [part for s in self.sections for part in s.parts if isinstance(part, Table)]
        for table in tables:
            if table.brief:
                console.print(_rich(table))


def _finite(value: Any) -> Any:
    """As JSON has it: what is no number or without end is null."""
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rich(table: Table) -> RichTable:
    styles = {"best": "bold green", "second": "green", "": ""}
    hidden = len(table.rows) - ROWS_IN_A_TERMINAL
    caption = f"and {hidden} more on the page" if hidden > 0 else None
    shown = RichTable(box=box.SIMPLE_HEAD, caption=caption)
    for place in table.brief:
        shown.add_column(Text(table.head[place]), justify="right" if place else "left")
    for row in [*table.rows[:ROWS_IN_A_TERMINAL], *([table.total] if table.total else [])]:
        cells = [row[place] for place in table.brief]
        shown.add_row(
            *(Text("\n".join([cell.text, *cell.more[:1]]), styles[cell.mark]) for cell in cells)
        )
    return shown


def image(path: Path, alt: str, link: str) -> Image:
    """A picture of a run, with its words."""
    data = base64.b64encode(path.read_bytes()).decode()
    return Image(alt, path.stem.replace("_", " "), f"data:image/png;base64,{data}", link)


def named(name: str) -> str:
    """A name as plotly.js shows it to the letter, cut where it would not fit."""
    short = name if len(name) <= 40 else f"{name[:39]}…"
    return html.escape(short, quote=False)


def metric(name: str) -> str:
    """A metric in words."""
    return _METRICS.get(name, name)


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with its title, which may be a name."""
    return {"title": {"text": named(title)}, "automargin": True, **more}


def thinned(points: Sequence[Any], most: int, also: Sequence[int] = ()) -> list[Any]:
    """At most so many, evenly, with the first and the last; and those at the places of `also`."""
    if len(points) <= most:
        return list(points)
    places = {round(i * (len(points) - 1) / (most - 1)) for i in range(most)}
    return [points[place] for place in sorted(places.union(also))]


def ranked(values: Sequence[float | None], lower_is_better: bool = False) -> list[str]:
    """The marks of best and second best; none for a value alone, and equal ones share theirs."""
    known = sorted({v for v in values if v is not None}, reverse=not lower_is_better)
    places = {value: MARKS[place] for place, value in enumerate(known[:2], 1)}
    return [places[v] if v in places and len(known) > 1 else "" for v in values]
