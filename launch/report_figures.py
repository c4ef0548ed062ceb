"""Figures of what a run has learned: gains, calibration, sizes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from launch.report_page import Figure, axis, named

NAMES = 8
"""Points with their names beside them, at most; the others tell theirs when pointed at."""


def gains(summary: Mapping[str, Any]) -> list[Figure]:
    """What its adapter does for each domain, against how many rows that is measured on."""
    if summary["adapted"] is None:
        return []
    after = {one["domain"]: one["auc"] for one in summary["adapted"]["domains"]}
    told = [
        (one["domain"], one["rows"], after[one["domain"]] - one["auc"])
        for one in summary["shared"]["domains"]
        if one["auc"] is not None and after[one["domain"]] is not None
    ]
    if not told:
        return []
    beside = _named_beside(told)
    traces = []
    for kept, symbol, label in ((True, "circle", "kept"), (False, "circle-open", "not kept")):
        some = [one for one in told if (one[0] in summary["kept"]) is kept]
        names = [named(one[0]) if one[0] in beside else "" for one in some]
        trace = _points([one[1] for one in some], [one[2] for one in some], some, label)
        edge = {"width": 2, "color": "--series-1"}
        marker = {"symbol": symbol, "size": 10, "color": "--series-1", "line": edge}
        places = [beside.get(one[0], "top center") for one in some]
        trace |= {"text": names, "textposition": places, "mode": "markers+text"}
        trace["cliponaxis"] = False
        traces += [trace | {"marker": marker}] if some else []
    layout = {
        "xaxis": row_axis([one[1] for one in told]),
        "yaxis": axis("change of AUC", tickformat="+.4~f"),
        "shapes": [_level(0)],
    }
    note = (
        "AUC on test rows with the domain's adapter, less that of the shared part alone. A domain "
        "whose adapter was not kept is served by the shared part, so it stays at 0."
    )
    return [Figure("What adapters change", note, traces, layout, wide=True)]


def row_axis(rows: Sequence[int]) -> dict[str, Any]:
    """Rows by their magnitude: marks at 1, 2 and 5, or only at 1 over many decades."""
    decades = range(int(math.log10(min(rows))), math.ceil(math.log10(max(rows))) + 1)
    steps = (1, 2, 5) if len(decades) < 5 else (1,)
    marks = [step * 10**decade for decade in decades for step in steps]
    words = [f"{mark:,}" if mark < 1e6 else f"{mark / 1e6:,.0f} M" for mark in marks]
    return axis("test rows", type="log", tickvals=marks, ticktext=words)


def _named_beside(told: Sequence[tuple[str, int, float]]) -> dict[str, str]:
    """Whose names stand beside their points, and where: the farthest from 0 first, none on top of
    another."""
    xs, ys = [math.log(one[1]) for one in told], [one[2] for one in told]
    wide, tall = (max(max(values) - min(values), 1e-12) for values in (xs, ys))
    placed: dict[str, tuple[float, float, str]] = {}
    for name, rows, gain in sorted(told, key=lambda one: -abs(one[2])):
        x, y = (math.log(rows) - min(xs)) / wide, (gain - min(ys)) / tall
        free = all(abs(x - a) > 0.16 or abs(y - b) > 0.09 for a, b, _ in placed.values())
        if gain and free and len(placed) < NAMES:
            side = "middle left" if x > 0.85 else "middle right" if x < 0.15 else "top center"
            placed[name] = x, y, side
    return {name: place[2] for name, place in placed.items()}


def _points(
    x: Sequence[float], y: Sequence[float], some: Sequence[Sequence[Any]], label: str
) -> dict[str, Any]:
    """Points that tell the name of theirs, the first of each of `some`."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": list(x),
        "y": list(y),
        "name": label,
        "customdata": [named(one[0]) for one in some],
        "hovertemplate": "%{customdata}<br>%{x:,}: %{y:.5~f}<extra></extra>",
    }


def _level(value: float) -> dict[str, Any]:
    line = {"color": "--grey", "width": 1}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value} | {
        "line": line,
        "layer": "below",
    }


def reliability_trace(bins: Sequence[Mapping[str, Any]], label: str) -> dict[str, Any]:
    """Ten bins of rows as one line."""
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [one["predicted"] for one in bins],
        "y": [one["positives"] / one["rows"] for one in bins],
        "name": label,
        "customdata": [one["rows"] for one in bins],
        "hovertemplate": "predicted %{x:.4f}, clicked %{y:.4f}<br>%{customdata:,} rows",
    }


def reliability(summary: Mapping[str, Any]) -> list[Figure]:
    """Click rate against prediction, in ten bins of all test rows; runs of before have none."""
    pairs = (("shared part", summary["shared"]), ("with adapters", summary["adapted"]))
    told = [(label, one["reliability"]) for label, one in pairs if one and "reliability" in one]
    if not told:
        return []
    traces = [reliability_trace(bins, label) for label, bins in told]
    high = max(max([*trace["x"], *trace["y"]]) for trace in traces)
    note = "Test rows in bins of about equally many by prediction; on the dashed line all is right."
    return [Figure("Reliability", note, traces, rates("mean prediction", "click rate", 0, high))]


def rates(x: str, y: str, low: float, high: float) -> dict[str, Any]:
    """Two axes of probabilities and the line on which they agree."""
    margin = 0.05 * (high - low) or 0.01
    span = [max(low - margin, 0), high + margin]
    line = {"color": "--grey", "width": 1, "dash": "dash"}
    ends = {"x0": span[0], "y0": span[0], "x1": span[1], "y1": span[1]}
    return {
        "xaxis": axis(x, range=span, tickformat=".3~f"),
        "yaxis": axis(y, range=span, tickformat=".3~f"),
        "shapes": [{"type": "line", **ends, "line": line, "layer": "below"}],
    }


def domain_rates(summary: Mapping[str, Any]) -> list[Figure]:
    """Each domain's mean prediction and its click rate."""
    scores = summary["adapted"] or summary["shared"]
    told = [
        (one["domain"], one["calibration"], one["positives"] / one["rows"])
        for one in scores["domains"]
        if one["calibration"] is not None
    ]
    if not told:
        return []
    predicted, clicked = [one[1] * one[2] for one in told], [one[2] for one in told]
    trace = _points(predicted, clicked, told, "domain") | {"marker": {"size": 9, "opacity": 0.8}}
    trace["hovertemplate"] = "%{customdata}<br>predicted %{x:.4f}, clicked %{y:.4f}<extra></extra>"
    layout = rates(
        "mean prediction", "click rate", min([*predicted, *clicked]), max([*predicted, *clicked])
    )
    note = "Each domain as it is served: its mean prediction and its click rate."
    return [Figure("Calibration by domain", note, [trace], layout | {"showlegend": False})]


def adapter_sizes(
    adapters: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any]
) -> list[Figure]:
    """Bytes of each adapter's files against the domain's test rows."""
    rows = {one["domain"]: one["rows"] for one in summary["shared"]["domains"]}
    told = [(name, rows[name], one["bytes"]) for name, one in adapters.items() if name in rows]
    if not told:
        return []
    trace = _points([o[1] for o in told], [o[2] / 1000 for o in told], told, "adapter")
    trace["hovertemplate"] = "%{customdata}<br>%{y:,.1f} KB<extra></extra>"
    layout = {
        "xaxis": row_axis([one[1] for one in told]),
        "yaxis": axis("KB", rangemode="tozero"),
        "showlegend": False,
    }
    total = sum(one[2] for one in told)
    counts = summary["sizes"]
    trunk = 4 * (counts["tables"] + counts["dense"] + counts.get("frozen", 0))
    note = (
        f"{len(told)} adapters take {total / 1e6:,.2f} MB on disk, with manifests and ids of their "
        f"own; the trunk's weights are {trunk / 1e6:,.2f} MB."
    )
    return [Figure("Size of each adapter", note, [trace | {"marker": {"size": 9}}], layout)]
