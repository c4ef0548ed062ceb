"""How the models of a suite stand: means over seeds, and tests against the base, seed by seed."""

import csv
import io
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from scipy import stats

from launch.suite import Cell, Point, Suite
from trainer.machine import machine
from trainer.metrics import METRICS, Scores, rela_impr
from trainer.report import grid

Row = dict[str, Any]
BySeed = Mapping[int, float | None]
SIGNIFICANT = 0.05
HEAD = ("model, setting", "seeds", "", "sd", "change", "p", "RelaImpr", "log loss", "steps")


def cell_row(cell: Cell, found: Mapping[str, Any]) -> Row:
    """What the work of a cell has found, as far as it is about the cell."""
    part = found[cell.setting.scores]
    scores = Scores.from_dict(part["scores"])
    scores = scores.of(cell.domain) if cell.domain else scores
    place = {"model": cell.model.label, "setting": cell.setting.label, "seed": cell.seed}
    made = {"run": found["run"], "code": found["code"]}
    return {**place, **made, **part, "scores": scores.to_dict()}


def checked_row(suite: Suite, cell: Cell, found: Mapping[str, Any]) -> Row:
    """Likewise; UserError where the suite's metric is of a domain that has no rows there."""
    row = cell_row(cell, found)
    Scores.from_dict(row["scores"]).metric(suite.metric)
    return row


@dataclass(frozen=True)
class Paired:
    """A setting beside the base, over the seeds at which both are defined."""

    change: float | None
    p: float | None
    """Of a two-sided paired t-test; None for one seed, or where all differences are zero."""
    rela_impr: float | None

    @classmethod
    def of(cls, values: BySeed, base: BySeed) -> "Paired":
        pairs = [
            (value, theirs)
            for seed, value in values.items()
            if value is not None and (theirs := base.get(seed)) is not None
        ]
        if not pairs:
            return cls(None, None, None)
        mine, theirs = (list(side) for side in zip(*pairs, strict=True))
        impr = rela_impr(statistics.mean(mine), statistics.mean(theirs))
        return cls(statistics.mean(mine) - statistics.mean(theirs), _p(mine, theirs), impr)


def _p(mine: Sequence[float], theirs: Sequence[float]) -> float | None:
    if len(mine) < 2:
        return None
    with warnings.catch_warnings():  # of differences that are all the same
        warnings.simplefilter("ignore", RuntimeWarning)
        p = float(stats.ttest_rel(mine, theirs).pvalue)
    return p if math.isfinite(p) else None


def table(suite: Suite, cells: Sequence[Row]) -> list[Row]:
    """A row for each model and setting that has a finished cell; None stands for undefined."""
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for cell in cells:
        found.setdefault((cell["model"], cell["setting"]), {})[cell["seed"]] = cell
    rows = []
    for model in suite.model_labels:
        base = _values(suite.metric, found.get((model, suite.base), {}))
        for setting in suite.setting_labels:
            mine = found.get((model, setting))
            if mine:
                against = None if setting == suite.base else base
                rows.append({"model": model, "setting": setting} | _row(suite, mine, against))
    return rows


def _row(suite: Suite, mine: Mapping[int, Row], base: BySeed | None) -> Row:
    values = _values(suite.metric, mine)
    defined = [value for value in values.values() if value is not None]
    paired = Paired(None, None, None) if base is None else Paired.of(values, base)
    sizes = [sum(cell["sizes"].values()) for cell in mine.values()]
    latency = [cell["latency_ms"] for cell in mine.values() if cell["latency_ms"]]
    return {
        "seeds": len(mine),
        "mean": _mean(defined),
        "sd": statistics.stdev(defined) if len(defined) > 1 else None,
        "change": paired.change,
        "p": paired.p,
        "rela_impr": None if suite.metric == "log_loss" else paired.rela_impr,
        **{name: _mean(_values(name, mine).values()) for name in METRICS},
        **{key: _mean([cell[key] for cell in mine.values()]) for key in ("steps", "seconds")},
        "parameters": max(sizes),
        "rows_per_second": _mean([cell["rows_per_second"] for cell in mine.values()]),
        "latency_ms": latency[0] if latency else None,
    }


def _values(metric: str, cells: Mapping[int, Row]) -> dict[int, float | None]:
    return {seed: Scores.from_dict(one["scores"]).metric(metric) for seed, one in cells.items()}


def _mean(values: Any) -> float | None:
    defined = [value for value in values if value is not None]
    return statistics.mean(defined) if defined else None


def results(
    suite: Suite, cells: Sequence[Row], points: Mapping[tuple[str, str], Point]
) -> dict[str, Any]:
    """All that is known of a suite so far, for `results.json`."""
    published = suite.published
    return {
        "suite": suite.name,
        "title": suite.title,
        "note": suite.note,
        "metric": suite.metric,
        "base": suite.base,
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "models": suite.model_labels,
        "settings": suite.setting_labels,
        "seeds": list(suite.seeds),
        "wanted": len(suite.pairs) * len(suite.seeds),
        "axis": {"name": suite.axis, "values": suite.places} if suite.axis else None,
        "published": {"source": published.source, "figures": published.figures}
        if published
        else None,
        "cells": list(cells),
        "table": table(suite, cells),
        "grid": {"/".join(key): dict(point) for key, point in points.items() if point},
    }


def as_csv(cells: Sequence[Row]) -> str:
    """A line for each cell."""
    text = io.StringIO()
    plain = ("model", "setting", "seed", "run", "seconds", "steps", "rows_per_second")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*plain, *METRICS, "tables", "dense", "frozen", "adapter"])
    for cell in cells:
        scores, sizes = cell["scores"], cell["sizes"].values()
        writer.writerow([*(cell[k] for k in plain), *(scores[k] for k in METRICS), *sizes])
    return text.getvalue()


def printed(suite: Suite, rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    figures = suite.published.figures if suite.published else {}
    head = [text or suite.metric for text in HEAD] + ["parameters"]
    head += [suite.published.source] if suite.published else []
    body = []
    for row in rows:
        theirs = figures.get(row["model"], {}).get(row["setting"])
        line = _line(row, suite.base)
        body.append([*line, _text(theirs)] if suite.published else line)
    lines = [grid(head, body)]
    if any(row["seeds"] == 1 for row in rows):
        lines.append("one seed tells nothing of chance: no deviation, no test")
    if any(row["p"] is not None for row in rows):
        lines.append(f"p: paired t-test over seeds, two-sided; n.s.: not below {SIGNIFICANT:g}")
    return "\n".join([*lines, *([suite.note] if suite.note else [])])


def _line(row: Row, base: str) -> list[str]:
    is_base, impr = row["setting"] == base, row["rela_impr"]
    return [
        f"{row['model']}, {row['setting']}",
        str(row["seeds"]),
        "undefined" if row["mean"] is None else _text(row["mean"]),
        _text(row["sd"], ".5f"),
        "base" if is_base else _text(row["change"], "+.5f"),
        _verdict(row["p"]),
        _text(impr, "+.2%"),
        _text(row["log_loss"]),
        _text(row["steps"], ",.0f"),
        f"{row['parameters']:,}",
    ]


def _verdict(p: float | None) -> str:
    return _text(p, ".2g") + (" n.s." if p is not None and p >= SIGNIFICANT else "")


def _text(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)
