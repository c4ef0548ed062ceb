"""Side-by-side timing on a machine that others use too, and what a profile says of one side."""

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch.profiler import ProfilerActivity, profile

OUTSIDE = "Python, numpy (dropout's bits) and waiting"  # what no torch operator accounts for
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "table lookup": ("fbgemm::", "aten::embedding", "aten::_embedding_bag_forward_only"),
    "table update": ("_UpdateInBackward",),
    "dense optimizer": ("aten::_fused_adam", "Optimizer."),
    "gradients spread over rows": ("aten::embedding_dense_backward", "aten::_embedding_bag_dense"),
    "gather and scatter": ("aten::index", "aten::_index", "aten::sort", "aten::unique"),
    "random numbers": ("aten::bernoulli", "aten::native_dropout"),
    "collectives": ("c10d::", "gloo:"),
    "element-wise passes": ("aten::",),
}


@dataclass(frozen=True)
class Figure:
    """Of several repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Claim:
    """That the time of side `over` is at least (or at most) `bound` times that of side `under`.

    Without a bound the ratio is only reported.
    """

    text: str
    over: str
    under: str
    bound: float | None = None
    at_least: bool = True

    def judged(
        self, seconds: Mapping[str, Sequence[float]], sides: Mapping[str, "Side"]
    ) -> dict[str, Any]:
        """The ratio is the median over rounds, so that noise that lasts hits both sides alike."""
        pairs = zip(seconds[self.over], seconds[self.under], strict=True)
        ratio = Figure.of([over / under for over, under in pairs])
        met = None
        if self.bound is not None:
            met = ratio.median >= self.bound if self.at_least else ratio.median <= self.bound
        ours = self.under if self.at_least else self.over
        limit = f"{ours}: {(sides[ours].profiled or partial(where_time_goes, sides[ours]))()}"
        return {**asdict(self), "ratio": asdict(ratio), "met": met, "limit": limit}


@dataclass(frozen=True)
class Side:
    """Something timed: `run` takes `steps` steps of `rows` rows in all.

    `profiled` tells where its time goes, for a side that does not run in this process.
    """

    run: Callable[[], object]
    steps: int
    rows: int
    profiled: Callable[[], str] | None = None


def interleaved(sides: Mapping[str, Side], rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each side, a value per round, after one round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            began = time.perf_counter()
            sides[name].run()
            took = time.perf_counter() - began
            if number:
                seconds[name].append(took / sides[name].steps)
    return seconds


def compared(
    title: str, sides: Mapping[str, Side], claims: Sequence[Claim], rounds: int
) -> dict[str, Any]:
    """Time the sides in turns, judge the claims, and profile the side that each is about."""
    load = os.getloadavg()[0]
    seconds = interleaved(sides, rounds)
    figures = {name: _figures(side, seconds[name]) for name, side in sides.items()}
    judged = [claim.judged(seconds, sides) for claim in claims]
    return {"title": title, "load": load, "rounds": rounds, "sides": figures, "claims": judged}


def _figures(side: Side, seconds: Sequence[float]) -> dict[str, Any]:
    rows = side.rows / side.steps
    return {
        "step_ms": asdict(Figure.of([1000 * s for s in seconds])),
        "rows_per_second": asdict(Figure.of([rows / s for s in seconds])),
    }


def where_time_goes(side: Side) -> str:
    """Shares of the wall time by kind of work, the largest first."""
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        side.run()
    wall = time.perf_counter() - began
    spent: dict[str, float] = defaultdict(float)
    for event in found.key_averages():
        spent[_kind(event.key)] += event.self_cpu_time_total / 1e6
    spent[OUTSIDE] = max(wall - sum(spent.values()), 0) + spent.pop("", 0)
    shares = sorted(((time / wall, kind) for kind, time in spent.items()), reverse=True)
    return ", ".join(f"{kind} {share:.0%}" for share, kind in shares[:4] if share > 0.01)


def _kind(operator: str) -> str:
    return next((kind for kind, starts in KINDS.items() if operator.startswith(starts)), "")


def table(part: Mapping[str, Any]) -> str:
    """One part's figures and claims, for people."""
    lines = [f"\n{part['title']} (load average before: {part['load']:.1f})"]
    for name, side in part["sides"].items():
        rows, step = side["rows_per_second"], side["step_ms"]
        lines.append(
            f"  {name:<46} {rows['median']:>10,.0f} rows/s {step['median']:>9.2f} ms a step "
            f"({step['low']:.2f} to {step['high']:.2f})"
        )
    for claim in part["claims"]:
        ratio = claim["ratio"]
        lines.append(
            f"  {claim['text']}: {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            f"{_verdict(claim)}\n    {claim['limit']}"
        )
    return "\n".join(lines)


def _verdict(claim: Mapping[str, Any]) -> str:
    if claim["bound"] is None:
        return ", no target"
    relation = "at least" if claim["at_least"] else "at most"
    return f", target {relation} {claim['bound']:g}: {'met' if claim['met'] else 'MISSED'}"
