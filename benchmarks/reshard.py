"""Every change of ranks, ZeRO stage and sharding: 48 forms of a run, each loaded by each of them.

    python -m benchmarks.reshard

The run and what is asked of it are those of tests/test_reshard.py, which takes 20 pairs. Each form
saves once; then each form loads all checkpoints in turn: 2,304 pairs. What was found is printed
and written after each ZeRO stage of each number of ranks, and --targets takes some of them alone.
"""

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.gang import gang
from tests.toy_reshard import (
    SHARDINGS,
    STAGES,
    WORLDS,
    Form,
    Joined,
    Pair,
    Went,
    saved,
    taken_over,
    undisturbed,
)
from tests.toy_run import write_toy
from trainer.machine import machine

ROOT = Path(__file__).parents[1]
NEAR = 1e-6


def wrong(whole: Went, one: Joined) -> list[str]:
    """What a pair's second half did otherwise than the undisturbed run."""
    found = [f"not bit-equal: {name}" for name in one.differences]
    losses = zip(one.losses, whole.losses, strict=True)
    found += ["losses"] if any(abs(a - b) > NEAR * abs(b) for a, b in losses) else []
    found += ["weights at the end"] if one.distance >= NEAR else []
    return found + (["rows"] if Counter(one.rows) != Counter(whole.rows) else [])


def measured(folder: Path, targets: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """All pairs of each number of ranks and ZeRO stage that loads, one after the other."""
    sources = [Form(*one) for one in product(WORLDS, STAGES, SHARDINGS)]
    write_toy(folder)
    [whole] = gang(1, undisturbed, folder, folder / "runs")
    first = saved(folder, folder / "runs", sources)
    for world, stage in targets:
        pairs: list[Pair] = [(a, Form(world, stage, how)) for how in SHARDINGS for a in sources]
        began = time.monotonic()
        found = taken_over(folder, folder / "runs", first, pairs, aloud=True)
        failed = {f"{a} -> {b}": wrong(whole, one) for (a, b), one in found.items()}
        yield {
            "ranks": world,
            "zero stage": stage,
            "pairs": len(pairs),
            "wrong": {name: what for name, what in failed.items() if what},
            "largest distance of a weight": max(one.distance for one in found.values()),
            "seconds": round(time.monotonic() - began),
        }


def main() -> None:
    """Measure, print, write."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--targets", type=int, nargs="+", default=WORLDS, choices=WORLDS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/reshard.json")
    args = parser.parse_args()
    results: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": machine(),
        "load average before": os.getloadavg()[0],
        "loaded by": [],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        for found in measured(Path(folder), list(product(args.targets, STAGES))):
            results["loaded by"].append(found)
            args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            right = found["pairs"] - len(found["wrong"])
            print(
                f"loaded by {found['ranks']} ranks under ZeRO {found['zero stage']}: "
                f"{right} of {found['pairs']} right, {found['seconds']} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
