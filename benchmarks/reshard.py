"""Every change of ranks, ZeRO stage and sharding: 48 forms of a run, each loaded by each of them.

    python -m benchmarks.reshard

The run and what is asked of it are those of tests/test_reshard.py, which takes 17 pairs. Each form
saves once; then each form loads all checkpoints in turn, so 2,304 pairs take minutes. --sources
names the ranks whose checkpoints are loaded, where there is time for a part alone.
"""

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure import machine
from tests.toy_reshard import SHARDINGS, STAGES, WORLDS, Form, Joined, Went, name_of, resharded
from tests.toy_run import write_toy

ROOT = Path(__file__).parents[1]
NEAR = 1e-6


def wrong(whole: Went, one: Joined) -> list[str]:
    """What a pair's second half did otherwise than the undisturbed run."""
    found = [f"not bit-equal: {name}" for name in one.differences]
    losses = zip(one.losses, whole.losses, strict=True)
    found += ["losses"] if any(abs(a - b) > NEAR * abs(b) for a, b in losses) else []
    found += ["weights at the end"] if one.distance >= NEAR else []
    return found + (["rows"] if Counter(one.rows) != Counter(whole.rows) else [])


def table(right: dict[str, bool], pairs: Sequence[tuple[Form, Form]]) -> Iterator[str]:
    """Right pairs of all, by the ranks of the save (down) and of the load (across)."""
    yield "saved by \\ loaded by" + "".join(f"{world:>14} ranks" for world in WORLDS)
    for source in WORLDS:
        cells = []
        for target in WORLDS:
            mine = [
                right[name_of(*p)] for p in pairs if (p[0].world, p[1].world) == (source, target)
            ]
            cells.append(f"{sum(mine)} of {len(mine)}")
        yield f"{source:>13} ranks" + "".join(f"{cell:>20}" for cell in cells)


def main() -> None:
    """Measure, print, write."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--sources", type=int, nargs="+", default=WORLDS, choices=WORLDS)
    parser.add_argument("--stages", type=int, nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/reshard.json")
    args = parser.parse_args()
    load, began = os.getloadavg()[0], time.monotonic()
    targets = [Form(n, stage, how) for n in WORLDS for stage in args.stages for how in SHARDINGS]
    sources = [form for form in targets if form.world in args.sources]
    pairs = list(product(sources, targets))
    with TemporaryDirectory() as folder:
        write_toy(Path(folder))
        whole, others = resharded(Path(folder), Path(folder) / "runs", pairs, aloud=True)
    failed = {name: wrong(whole, one) for name, one in others.items()}
    found: dict[str, Any] = {
        "load average before": load,
        "seconds": round(time.monotonic() - began),
        "pairs": len(pairs),
        "wrong": {name: what for name, what in failed.items() if what},
        "largest distance of a weight": max(one.distance for one in others.values()),
    }
    date = datetime.now(UTC).isoformat(timespec="minutes")
    content = json.dumps({"date": date, "machine": machine(), **found}, indent=1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(content + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    print("\n".join(table({name: not what for name, what in failed.items()}, pairs)))


if __name__ == "__main__":
    main()
