"""The report of a suite of runs that `compare` has made, from its results.json."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_shards import UserError
from launch.report_figures import rates, reliability_trace
from launch.report_page import Cell, Figure, Page, Section, Table, metric, named, ranked
from launch.report_pairs import DOUBT, against, changes, dots, over_axis, reached, trade_offs
from trainer.report import figure

KEYS = {"suite", "title", "note", "metric", "base", "models", "settings", "cells", "table"}
LOWER = ("log_loss",)


def suite_page(folder: Path) -> Page:
    """What there is to say of a suite, as far as it has come."""
    file = folder / "results.json"
    try:
        suite = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); run the suite again") from None
    if not isinstance(suite, dict) or not suite.keys() >= KEYS:
        raise UserError(
            f"{file}: not the results of a suite as `compare` writes them; give the folder that it "
            "made"
        )
    plots = [figure for make in (dots, changes, over_axis) for figure in make(suite)]
    sections = [
        Section("Results", [_table(suite), *plots]),
        Section("What it costs", [*trade_offs(suite), _costs(suite)]),
        *_calibration(suite),
        Section("Single runs", [*_picked(suite), _cells(suite, folder)]),
    ]
    links = [name for name in ("results.json", "results.csv") if (folder / name).exists()]
    every = len(suite["models"]) * len(suite["settings"]) * len(_seeds(suite))
    whole = suite.get("wanted", every)  # a model may have some of the settings alone
    missing = whole - len(suite["cells"])
    return Page(
        title=suite["title"],
        what=f"suite {suite['suite']}: {metric(suite['metric'])} on test rows, {_runs(suite)}",
        headlines=_headlines(suite),
        sections=[section for section in sections if section.parts],
        facts=_facts(suite),
        links=[(name, name) for name in links],
        status=f"Not finished: {missing} of {whole} cells are still missing." if missing else "",
        note="\n\n".join(" ".join(part.split()) for part in suite["note"].split("\n\n")),
    )


def _seeds(suite: Mapping[str, Any]) -> list[int]:
    """That each place is to have; results of before do not say it, so those that some have."""
    return suite.get("seeds") or sorted({cell["seed"] for cell in suite["cells"]})


def _runs(suite: Mapping[str, Any]) -> str:
    seeds = {cell["seed"] for cell in suite["cells"]}
    return f"{len(suite['cells'])} runs, {len(seeds)} seed{'s' if len(seeds) != 1 else ''}"


def _by_place(suite: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(one["model"], one["setting"]): one for one in suite["table"]}


def _comparable(places: Sequence[dict[str, Any] | None]) -> list[float | None]:
    """The mean of each; None for one of fewer seeds than another has."""
    most = max((one["seeds"] for one in places if one), default=0)
    return [one["mean"] if one and one["seeds"] == most else None for one in places]


def _headlines(suite: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The best of all, and of each setting its mean change and where it is sure."""
    table = suite["table"]
    told, marks = [], ranked(_comparable(table), suite["metric"] in LOWER)
    for one, mark in zip(table, marks, strict=True):
        if mark == "best" and not told:
            told.append(("Best", figure(one["mean"]), f"{one['model']}, {one['setting']}"))
    for setting in suite["settings"]:
        some = [o for o in table if o["setting"] == setting and o["change"] is not None]
        if some:
            mean = sum(one["change"] for one in some) / len(some)
            sure = sum(one["p"] is not None and one["p"] < DOUBT for one in some)
            more = f"mean change against {suite['base']}; p < {DOUBT} in {sure} of {len(some)}"
            told.append((setting, f"{mean:+.4f}", more))
    return told


def _table(suite: Mapping[str, Any]) -> Table:
    """Models down, settings across: mean and deviation, change and p, and what was published."""
    places = _by_place(suite)
    published = (suite.get("published") or {}).get("figures", {})
    rows = []
    for model in suite["models"]:
        found = [places.get((model, setting)) for setting in suite["settings"]]
        marks = ranked(_comparable(found), suite["metric"] in LOWER)
        row = [Cell(model)]
        for setting, one, mark in zip(suite["settings"], found, marks, strict=True):
            paper = published.get(model, {}).get(setting)
            row.append(_place(suite, one, mark, paper))
        rows.append(row)
    note = "Mean ± standard deviation over seeds, best and second best of each row marked, among "
    note += "places of most seeds. "
    note += f"Below: change against {suite['base']}, with p of a paired test over seeds"
    note += f" (n.s.: p ≥ {DOUBT})."
    if suite.get("published"):
        note += f" “published”: {suite['published']['source']}."
    brief = tuple(range(len(suite["settings"]) + 1))
    return Table(
        metric(suite["metric"]),
        ["model", *suite["settings"]],
        rows,
        note,
        brief=brief,
    )


def _place(
    suite: Mapping[str, Any], one: Mapping[str, Any] | None, mark: str, paper: float | None
) -> Cell:
    more = [] if paper is None else [f"published {paper:.4f}"]
    if one is None:
        return Cell("–", more=tuple(more))
    text = figure(one["mean"]) + ("" if one["sd"] is None else f" ± {one['sd']:.4f}")
    return Cell(text, one["mean"], mark, (*against(suite, one), *more))


def _costs(suite: Mapping[str, Any]) -> Table:
    """One line for each place, with all that was measured there."""
    names = ("wauc", "mean_auc", "auc", "log_loss", "rela_impr")
    counts = ("steps", "seconds", "parameters", "rows_per_second")
    sizes = sorted({int(n) for one in suite["table"] for n in one["latency_ms"] or {}})
    head = ["model, setting", "seeds", *names, *counts, *(f"ms for {n:,}" for n in sizes)]
    rows = []
    for one in suite["table"]:
        row = [Cell(f"{one['model']}, {one['setting']}"), Cell(f"{one['seeds']}", one["seeds"])]
        row += [_number(one[name], ".4f") for name in names]
        row += [_number(one[name], ",.0f") for name in counts]
        row += [_number((one["latency_ms"] or {}).get(str(n)), ".2f") for n in sizes]
        rows.append(row)
    head = [name.replace("_", " ") for name in head]
    return Table("All figures of each place, means over seeds", head, rows, folded=True)


def _number(value: float | None, form: str) -> Cell:
    return Cell("–") if value is None or math.isnan(value) else Cell(f"{value:{form}}", value)


def _calibration(suite: Mapping[str, Any]) -> list[Section]:
    """Reliability of each model's first seed, a line for each setting."""
    first = min((cell["seed"] for cell in suite["cells"]), default=None)
    choices: dict[str, list[dict[str, Any]]] = {}
    for cell in suite["cells"]:
        bins = cell["scores"].get("reliability")
        if cell["seed"] == first and bins:
            choices.setdefault(cell["model"], []).append(
                reliability_trace(bins, named(cell["setting"]))
            )
    if not choices:
        return []
    values = [v for some in choices.values() for t in some for v in (*t["x"], *t["y"])]
    layout = rates("mean prediction", "click rate", 0, max(values))
    note = f"Test rows in bins of about equally many, seed {first}; the dashed line is right."
    return [Section("Calibration", [Figure("Reliability", note, [], layout, choices, wide=True)])]


def _picked(suite: Mapping[str, Any]) -> list[Table]:
    grid = suite.get("grid") or {}
    rows = [
        [Cell(place), Cell(", ".join(f"{key} = {value}" for key, value in picked.items()))]
        for place, picked in grid.items()
    ]
    note = "Each had the same grid, and was picked on validation rows."
    return [Table("What the grid picked", ["place", "values"], rows, note, True)] if rows else []


def _cells(suite: Mapping[str, Any], folder: Path) -> Table:
    head = [
        "run",
        "setting",
        "seed",
        metric(suite["metric"]),
        "log loss",
        "seconds",
    ]
    rows = []
    for cell in suite["cells"]:
        value = reached(suite, cell)
        rows.append(
            [
                Cell(cell["model"], link=_link(folder, cell["run"])),
                Cell(cell["setting"]),
                Cell(f"{cell['seed']}", cell["seed"]),
                Cell(figure(value), value),
                Cell(figure(cell["scores"]["log_loss"]), cell["scores"]["log_loss"]),
                _number(cell["seconds"], ",.1f"),
            ]
        )
    note = "With a link where the run's folder has a page of its own."
    return Table("All runs", head, rows, note, folded=True)


def _link(folder: Path, run: str) -> str:
    """The run's own page, if it lies there; a path that leaves for elsewhere gives none."""
    home, page = folder.resolve(), (folder / run / "report.html").resolve()
    inside = page.is_relative_to(home) and page.exists()
    return page.relative_to(home).as_posix() if inside else ""


def _facts(suite: Mapping[str, Any]) -> dict[str, str]:
    machine: Mapping[str, Any] = suite.get("machine") or {}
    facts = {"date": str(suite.get("date", ""))}
    for key, value in machine.items():
        told = value.items() if isinstance(value, dict) else ()
        facts[key.replace("_", " ")] = ", ".join(f"{a} {b}" for a, b in told) or str(value)
    return facts
