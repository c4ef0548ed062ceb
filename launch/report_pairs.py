"""Figures of a suite: seeds and intervals, changes against base, an axis, quality against cost."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from scipy.stats import t as student

from launch.report_page import Figure, axis, metric, named
from trainer.metrics import Scores

DOUBT = 0.05
"""From this p on, a change is called not significant."""
COLOURS = 8
NEXT = 0.7
"""Of the room between two models, what their settings take."""


def against(suite: Mapping[str, Any], one: Mapping[str, Any]) -> list[str]:
    """A place's change against base, and whether it is sure."""
    if one["change"] is None:
        return []
    if one["p"] is None:
        alone = len(_changes(suite, one["model"], one["setting"])) == 1
        return [f"{one['change']:+.4f}{', 1 seed' if alone else ''}"]
    sure = "n.s." if one["p"] >= DOUBT else "p < 0.001" if one["p"] < 0.001 else f"p {one['p']:.3f}"
    return [f"{one['change']:+.4f}, {sure}"]


def reached(suite: Mapping[str, Any], cell: Mapping[str, Any]) -> float | None:
    """The suite's metric in one of its cells."""
    return Scores.from_dict(cell["scores"]).metric(suite["metric"])


def _values(suite: Mapping[str, Any], model: str, setting: str) -> dict[int, float]:
    """The metric of each seed that has it."""
    return {
        cell["seed"]: value
        for cell in suite["cells"]
        if (cell["model"], cell["setting"]) == (model, setting)
        and (value := reached(suite, cell)) is not None
    }


def _changes(suite: Mapping[str, Any], model: str, setting: str) -> dict[int, float]:
    """The same less that of the base, seed by seed."""
    own, base = (_values(suite, model, one) for one in (setting, suite["base"]))
    return {seed: own[seed] - base[seed] for seed in own.keys() & base.keys()}


def interval(values: Sequence[float]) -> float:
    """Half the width of the mean's 95 % interval; 0 for one value."""
    if len(values) < 2:
        return 0.0
    return float(student.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def dots(suite: Mapping[str, Any]) -> list[Figure]:
    """Every seed, and the mean with its interval."""
    note = "Small: seeds. Large: their mean, with its 95 % interval."
    name = metric(suite["metric"])
    title = "Every seed"
    settings = suite["settings"]
    return _dots(suite, title, note, name, settings, _values, None)


def changes(suite: Mapping[str, Any]) -> list[Figure]:
    """The same of changes against base."""
    note = f"Each seed less {suite['base']} of that seed; an interval that meets 0 proves nothing."
    name = f"change against {suite['base']}"
    title = f"Change against {suite['base']}"
    settings = [setting for setting in suite["settings"] if setting != suite["base"]]
    return _dots(suite, title, note, name, settings, _changes, 0.0)


def _dots(
    suite: Mapping[str, Any],
    title: str,
    note: str,
    name: str,
    settings: Sequence[str],
    of: Callable[[Mapping[str, Any], str, str], Mapping[int, float]],
    level: float | None,
) -> list[Figure]:
    models, traces = suite["models"], []
    for place, setting in enumerate(settings):
        colour = f"--series-{suite['settings'].index(setting) % COLOURS + 1}"
        offset = (place + 0.5) / len(settings) * NEXT - NEXT / 2
        found = [
            (row + offset, model, of(suite, model, setting)) for row, model in enumerate(models)
        ]
        found = [one for one in found if one[2]]
        traces += _seeds(found, setting, colour) if found else []
    if not traces:
        return []
    shapes = [] if level is None else [_upright(level)]
    y = {
        "tickvals": list(range(len(models))),
        "ticktext": [named(model) for model in models],
        "range": [len(models) - 0.5, -0.5],
    }
    height = 150 + len(models) * max(34, 13 * len(suite["settings"]))
    layout = {"xaxis": axis(name), "yaxis": axis("", **y), "height": height, "shapes": shapes}
    return [Figure(title, note, traces, layout)]


def _seeds(
    found: Sequence[tuple[float, str, Mapping[int, float]]], setting: str, colour: str
) -> Iterator[dict[str, Any]]:
    """A faint point for each seed, and the mean."""
    single = [(value, y, f"{named(m)}, seed {s}") for y, m, v in found for s, value in v.items()]
    if len(single) > len(found):
        marker = {"color": colour, "size": 6, "opacity": 0.45}
        yield _trace(single, setting, marker) | {"showlegend": False}
    means = [(mean(v.values()), y, f"{named(m)}, mean") for y, m, v in found]
    wide = [interval(list(v.values())) for _, _, v in found]
    bars = {"type": "data", "array": wide, "color": colour, "thickness": 1.5, "width": 4}
    marker = {"color": colour, "size": 10}
    yield _trace(means, setting, marker) | ({"error_x": bars} if any(wide) else {})


def _trace(
    points: Sequence[tuple[float, float, str]], setting: str, marker: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [point[0] for point in points],
        "y": [point[1] for point in points],
        "text": [point[2] for point in points],
        "name": named(setting),
        "legendgroup": named(setting),
        "marker": marker,
        "hovertemplate": "%{text}: %{x:.5~f}",
    }


def _upright(value: float) -> dict[str, Any]:
    line = {"color": "--grey", "width": 1}
    ends = {"x0": value, "x1": value, "y0": 0, "y1": 1, "yref": "paper"}
    return {"type": "line", **ends, "line": line, "layer": "below"}


def over_axis(suite: Mapping[str, Any]) -> list[Figure]:
    """Where models or settings are a quantity: the change against base over it, or the metric
    itself where the base is one of its values."""
    if not suite.get("axis"):
        return []
    name, at = suite["axis"]["name"], suite["axis"]["values"]
    models_are_it = set(at) <= set(suite["models"])
    of = _changes if models_are_it else _values
    y = f"change of {metric(suite['metric'])}" if models_are_it else metric(suite["metric"])
    lines = suite["settings"] if models_are_it else suite["models"]
    traces = []
    for number, line in enumerate(lines):
        points = []
        for key in at:
            pair = (key, line) if models_are_it else (line, key)
            values = list(of(suite, *pair).values())
            if values and not (models_are_it and line == suite["base"]):
                points.append((at[key], mean(values), interval(values)))
        traces += [_band(sorted(points), line, number)] if points else []
    shapes = [{**_upright(0), "x0": 0, "x1": 1, "xref": "paper", "y0": 0, "y1": 0, "yref": "y"}]
    layout = {"xaxis": axis(name), "yaxis": axis(y), "shapes": shapes if models_are_it else []}
    note = "Means over seeds with their 95 % intervals."
    return [Figure(f"Over {name}", note, traces, layout, wide=True)] if traces else []


def _band(points: Sequence[tuple[float, float, float]], name: str, number: int) -> dict[str, Any]:
    x, y, wide = (list(column) for column in zip(*points, strict=True))
    bars = {"type": "data", "array": wide, "thickness": 1.2, "width": 4}
    colour = f"--series-{number % COLOURS + 1}"
    trace = {"type": "scatter", "mode": "lines+markers", "x": x, "y": y, "name": named(name)}
    hover = {"hovertemplate": "%{x}: %{y:.5~f}", "marker": {"color": colour, "size": 8}}
    return trace | hover | ({"error_y": bars | {"color": colour}} if any(wide) else {})


def trade_offs(suite: Mapping[str, Any]) -> list[Figure]:
    """The metric against one cost, to be picked."""
    costs = {name: name.replace("_", " ") for name in ("parameters", "seconds", "rows_per_second")}
    sizes = sorted({int(n) for one in suite["table"] for n in one["latency_ms"] or {}})
    choices = {title: _quality(suite, lambda one, k=key: one[k]) for key, title in costs.items()}
    for n in sizes:
        title = f"milliseconds for {n:,} row{'s' if n > 1 else ''}"
        choices[title] = _quality(suite, lambda one, k=str(n): (one["latency_ms"] or {}).get(k))
    choices = {title: traces for title, traces in choices.items() if traces}
    if not choices:
        return []
    name = metric(suite["metric"])
    layout = {"xaxis": axis("", type="log"), "yaxis": axis(name)}
    note = "Each model in each setting, means over seeds."
    title = "Quality against cost"
    return [Figure(title, note, [], layout, choices, axis_of_choice=True, wide=True)]


def _quality(
    suite: Mapping[str, Any], cost: Callable[[Mapping[str, Any]], float | None]
) -> list[dict[str, Any]]:
    """A trace for each setting; a model's name stands once, over its highest point."""
    traces, top = [], {}
    for one in suite["table"]:
        if cost(one) and one["mean"] is not None:
            name = named(one["model"])
            top[name] = max(top.get(name, -math.inf), one["mean"])
    for number, setting in enumerate(suite["settings"]):
        told = [one for one in suite["table"] if one["setting"] == setting]
        pairs = [(cost(one), one["mean"], named(one["model"])) for one in told]
        some = [(x, y, name) for x, y, name in pairs if x and y is not None]
        marker = {"size": 9, "color": f"--series-{number % COLOURS + 1}"}
        names = [one[2] for one in some]
        shown = [one[2] if one[1] == top[one[2]] else "" for one in some]
        words = {"mode": "markers+text", "textposition": "top center", "text": shown}
        hover = {"customdata": names, "hovertemplate": "%{customdata}: %{y:.5~f} at %{x:,.4~g}"}
        line = _trace(some, setting, marker) | words | hover | {"cliponaxis": False}
        traces += [line] if some else []
    return traces
