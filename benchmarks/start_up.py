"""Seconds from the command to the first step, by `launch run` and by torchrun, and where they go.

    python -m benchmarks.start_up --shards data/shards/movielens-occupation

MLoRA on MovieLens. `launch run` imports once and forks its ranks; torchrun's agent starts them, and
each imports for itself. Parts are those of the rank that is last to step; what comes before its
first mark is the agent's. CPU seconds are of all processes together.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure import Figure
from benchmarks.started import FOLDER
from trainer.machine import machine

ROOT = Path(__file__).parents[1]
RUN_FILE = ROOT / "launch" / "runs" / "movielens_mlora.toml"
RANKS = (1, 2, 4, 8)
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node")


def started(way: str, ranks: int, shards: Path) -> dict[str, float]:
    """Seconds of one start: in all, by part, and of all processors."""
    with TemporaryDirectory() as folder:
        marks = Path(folder) / "marks"
        marks.mkdir()
        changes = (f"data.shards={shards}", f"output={folder}", "tracking.wandb=disabled")
        words = [str(RUN_FILE), *(word for one in changes for word in ("--set", one))]
        if way == "run":
            command = ["benchmarks.started", "run", *words, "--ranks", str(ranks)]
        else:
            command = [*TORCHRUN, str(ranks), "-m", "benchmarks.started", "train", *words]
        environment = {**os.environ, FOLDER: str(marks), "OMP_NUM_THREADS": "1"}
        began = time.time()
        job = subprocess.Popen([sys.executable, "-m", *command], env=environment, cwd=ROOT)
        _, status, used = os.wait4(job.pid, 0)
        assert status == 0, f"{way} with {ranks} ranks ended with {status}"
        return {**parts(marks, began), "CPU of all": used.ru_utime + used.ru_stime}


def parts(marks: Path, began: float) -> dict[str, float]:
    """Of the rank that is last to step."""
    files = [path.read_text(encoding="utf-8").splitlines() for path in marks.iterdir()]
    last = max(([json.loads(line) for line in file] for file in files), key=lambda m: m[-1]["time"])
    assert last[-1]["part"] == "first step", "a run that ended before it took one"
    found = {"to the first step": last[-1]["time"] - began}
    for one in last:
        found[one["part"]] = one["time"] - began
        began = one["time"]
    return found


def main() -> None:
    """Measure, print, write."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--shards", type=Path, required=True, help="MovieLens, by occupation")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/start_up.json")
    args = parser.parse_args()
    load, starts = os.getloadavg()[0], [(way, n) for n in RANKS for way in ("run", "torchrun")]
    rounds: dict[tuple[str, int], list[dict[str, float]]] = {one: [] for one in starts}
    for _ in range(args.rounds):
        for way, ranks in starts:
            found = started(way, ranks, args.shards.absolute())
            rounds[way, ranks].append(found)
            told = ", ".join(f"{part} {seconds:.1f}" for part, seconds in found.items())
            print(f"{way}, {ranks} ranks: {told}", file=sys.stderr, flush=True)
    content: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": machine(),
        "load average before": load,
        "rounds": args.rounds,
        "seconds": [
            {"way": way, "ranks": ranks, **{p: asdict(_figure(p, found)) for p in found[0]}}
            for (way, ranks), found in rounds.items()
        ],
    }
    args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _figure(part: str, found: list[dict[str, float]]) -> Figure:
    return Figure.of([round(one[part], 2) for one in found])


if __name__ == "__main__":
    main()
