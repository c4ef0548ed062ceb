"""What a run's metrics file says over steps and over time, as figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.report_page import Figure, Spark, Sparks, axis, metric, named, thinned

POINTS = 120
"""Of a curve, at most: a page holds hundreds of them."""
SPARKS = 60
ADAPT, TEACHER, ALIGN = "adapt ", "teacher of ", "align"
SECTIONS = {ADAPT: "adapt", TEACHER: "teacher", ALIGN: "align"}
"""Of the run file, by what a phase's name begins with."""
BOX = 100, 32


@dataclass(frozen=True)
class Curve:
    """The evaluations of one phase, by rising step; None stands for undefined."""

    phase: str
    metric: str
    steps: list[int]
    values: list[float | None]
    log_loss: list[float]
    loss: list[float | None]
    domains: dict[str, list[float | None]]

    @property
    def sign(self) -> int:
        """Of what is better."""
        return _sign(self.metric)

    @property
    def best(self) -> int | None:
        """The place of the best value."""
        return _best(self.values, self.metric)


def _sign(name: str) -> int:
    return -1 if name == "log_loss" else 1


def _best(values: Sequence[float | None], name: str) -> int | None:
    told = [(value, place) for place, value in enumerate(values) if value is not None]
    return max(told, key=lambda one: _sign(name) * one[0])[1] if told else None


def curves(lines: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> list[Curve]:
    """Of each phase that has evaluated, in their order. Where a phase went back to an earlier step,
    what it had told from there on no longer counts."""
    phases: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        if "log_loss" in line and "step" in line:
            found = phases.setdefault(line["phase"], [])
            while found and found[-1]["step"] >= line["step"]:
                found.pop()
            found.append(line)
    return [_curve(phase, found, run) for phase, found in phases.items()]


def _curve(phase: str, found: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> Curve:
    section = next((of for start, of in SECTIONS.items() if phase.startswith(start)), "pretrain")
    name = run[section]["metric"]
    best = _best([line.get(name) for line in found], name)
    told = thinned(found, POINTS, [] if best is None else [best])
    names = dict.fromkeys(one for line in told for one in line.get("domains", {}))
    return Curve(
        phase,
        name,
        [line["step"] for line in told],
        [line.get(name) for line in told],
        [line["log_loss"] for line in told],
        [line.get("loss") for line in told],
        {one: [line.get("domains", {}).get(one) for line in told] for one in names},
    )


Base = Mapping[str, tuple[float | None, bool]]
"""What the shared part reaches on each domain's validation rows, and if its adapter was kept."""


def learning(learned: Sequence[Curve], base: Base) -> list[Figure]:
    """Of each kind of phase: its curve, or one to be picked."""
    shared = [c for c in learned if not c.phase.startswith((ADAPT, TEACHER))]
    figures = [figure for curve in shared for figure in _shared(curve)]
    for start, title in ((TEACHER, "Teachers"), (ADAPT, "Phase 2, one domain")):
        some = [curve for curve in learned if curve.phase.startswith(start)]
        if some:
            choices = {c.phase.removeprefix(start): [_trace(c), *_marked(c)] for c in some}
            for name, traces in choices.items() if start == ADAPT else ():
                traces += _level(base.get(name, (None, False))[0], traces[0]["x"])
            note = "Validation metric against steps; the ring is the best."
            figures.append(Figure(title, note, [], _steps(some[0].metric), choices, wide=True))
    return figures


def _level(value: float | None, steps: Sequence[int]) -> list[dict[str, Any]]:
    """The shared part, where that is known."""
    if value is None:
        return []
    line = _line([0, steps[-1]], [value, value], "shared part") | {"mode": "lines"}
    return [line | {"line": {"color": "--grey", "dash": "dash"}}]


def _shared(curve: Curve) -> list[Figure]:
    choices = {}
    if len(curve.domains) > 1:
        choices["all domains"] = []
        for name, values in curve.domains.items():
            line = {"line": {"dash": "dot", "width": 2}, "marker": {"color": "--series-2"}}
            choices[name] = [_line(curve.steps, values, f"AUC {named(name)}") | line]
    title = curve.phase.capitalize()
    first = Figure(
        f"{title}, validation",
        "Metric on validation rows against steps; the ring is the best, which is kept.",
        [_trace(curve), *_marked(curve)],
        _steps(curve.metric),
        choices,
    )
    losses = [_line(curve.steps, curve.log_loss, "validation")]
    if any(value is not None for value in curve.loss):
        losses.append(_line(curve.steps, curve.loss, "training"))
    note = "Log loss on validation rows, and of the last training steps before, where recorded."
    return [first, Figure(f"{title}, log loss", note, losses, _steps("log loss"))]


def _steps(of: str) -> dict[str, Any]:
    return {
        "xaxis": axis("steps", rangemode="tozero"),
        "yaxis": axis(metric(of)),
        "hovermode": "x",
    }


def _line(x: Sequence[Any], y: Sequence[Any], name: str) -> dict[str, Any]:
    return {"type": "scatter", "mode": "lines+markers", "x": list(x), "y": list(y), "name": name}


def _trace(curve: Curve) -> dict[str, Any]:
    return _line(curve.steps, curve.values, named(metric(curve.metric))) | {
        "line": {"color": "--series-1"},
        "marker": {"size": 5},
    }


def _marked(curve: Curve) -> list[dict[str, Any]]:
    place = curve.best
    if place is None:
        return []
    ring = {"size": 14, "symbol": "circle-open", "color": "--series-1", "line": {"width": 2}}
    dot = _line([curve.steps[place]], [curve.values[place]], "best")
    return [dot | {"mode": "markers", "marker": ring, "hoverinfo": "skip", "showlegend": False}]


def adapter_sparks(learned: Sequence[Curve], base: Base) -> list[Sparks]:
    """Phase 2 of every domain, against the shared part on the same validation rows."""
    some = [curve for curve in learned if curve.phase.startswith(ADAPT) and curve.best is not None]
    gains = [(_gain(curve, base), curve) for curve in some]
    gains.sort(key=lambda one: -one[0])
    shown = gains
    note = (
        "Validation metric by steps, each to its own scale, and what the best gains; the straight "
    )
    note += "line is the shared part. Grey: not kept."
    if len(gains) > SPARKS:
        shown = [*gains[: SPARKS // 2], *gains[-SPARKS // 2 :]]
        note += f" The {SPARKS // 2} that gain most and least, of {len(gains)}."
    items = [_spark(curve, gain, base) for gain, curve in shown]
    return [Sparks("Phase 2, all domains", note, items)] if items else []


def _start(curve: Curve, base: Base) -> float:
    """What the shared part reaches; where nobody has noted that yet, the first evaluation."""
    known = base.get(curve.phase.removeprefix(ADAPT), (None, False))[0]
    return known if known is not None else next(v for v in curve.values if v is not None)


def _gain(curve: Curve, base: Base) -> float:
    """Above 0 where the best is better than the start."""
    assert curve.best is not None
    best = curve.values[curve.best]
    assert best is not None
    return curve.sign * (best - _start(curve, base))


def _spark(curve: Curve, gain: float, base: Base) -> Spark:
    start, name = _start(curve, base), curve.phase.removeprefix(ADAPT)
    told = [(s, v) for s, v in zip(curve.steps, curve.values, strict=True) if v is not None]
    low, high = (end([start, *(value for _, value in told)]) for end in (min, max))
    x = _scale(0, max(step for step, _ in told), 0, BOX[0])
    y = _scale(low, high, BOX[1] - 2, 2)
    points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in [(0, start), *told])
    kept = base.get(name, (None, False))[1]
    return Spark(name, f"{gain:+.4f}", points, round(y(start), 1), kept)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    width = (high - low) or 1.0
    return lambda value: start + (value - low) / width * (end - start)


def pace(lines: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Rows a second and the wait for data, over the time since the run's first line."""
    told = [line for line in lines if "rows_per_second" in line]
    if not told:
        return []
    began = lines[0]["time"]
    kinds: dict[str, list[tuple[float, float, float, str]]] = {}
    for line in told:
        kind = next((k for k in (ADAPT, TEACHER) if line["phase"].startswith(k)), line["phase"])
        point = (line["time"] - began) / 60, line["rows_per_second"], 100 * line["waiting"]
        kinds.setdefault(kind.strip(), []).append((*point, named(line["phase"])))
    return [
        _over_time(kinds, 1, "Rows a second", "rows/s", "All ranks, evaluations left out."),
        _over_time(kinds, 2, "Wait for data", "% of training time", "Of the first rank."),
    ]


def _over_time(
    kinds: Mapping[str, Sequence[tuple[float, float, float, str]]],
    place: int,
    title: str,
    unit: str,
    note: str,
) -> Figure:
    traces = []
    for kind, points in kinds.items():
        some = thinned(points, 10 * POINTS)
        line = _line([point[0] for point in some], [point[place] for point in some], kind)
        mode = "lines+markers" if kind == "pretrain" else "markers"
        words = [point[3] for point in some]
        hover = "%{text}<br>%{y:,.3~f} after %{x:.1f} min<extra></extra>"
        traces.append(line | {"mode": mode, "text": words, "hovertemplate": hover})
    y = axis(unit, rangemode="tozero")
    return Figure(title, note, traces, {"xaxis": axis("minutes", rangemode="tozero"), "yaxis": y})
