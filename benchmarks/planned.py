"""`launch plan` beside what steps take: activations, bytes that ranks send, rows a second.

    python -m benchmarks.planned --movielens DIR --prompts DIR --encoder DIR

DIRs are of shards by launch/runs/movielens_mlora.toml and by amazon_unictr.toml (the domain
`industrial` alone will do), and the encoder's. The ranks have a network of their own, whose
loopback counts what they send (root, for its namespace). What is live when forward ends is held
against the plan's activations, and the most that is against these, gradients, their buffer and,
under ZeRO 3, gathered weights.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.planned_rank import FOLDER
from data_shards import Index
from embeddings import Place
from trainer import config as run_files
from trainer.config import RunConfig
from trainer.footprint import Footprint, dense_part, footprint
from trainer.machine import machine

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "launch" / "runs"
# (run, ranks, ZeRO stage, more settings): all stages where the dense part is large enough for them
PASSING = "gathered weights", "dense gradients", "reduction buffer"
AGAIN = "encoder.checkpointing=true"
CASES: list[tuple[str, int, int, tuple[str, ...]]] = [
    *(("movielens_mlora", ranks, 0, ()) for ranks in (1, 2)),
    ("movielens_mlora", 2, 1, ()),
    *(("amazon_unictr", ranks, 1, more) for ranks in (1, 2) for more in ((), (AGAIN,))),
    *(("amazon_unictr", 2, stage, ()) for stage in (2, 3)),
]


def taken(config: RunConfig, ranks: int) -> list[dict[str, float]]:
    """What each rank found in its steps."""
    with TemporaryDirectory() as folder:
        found = Path(folder) / "found"
        found.mkdir()
        run_file = Path(folder) / "run.toml"
        run_file.write_text(run_files.dump(replace(config, output=folder)), encoding="utf-8")
        words = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        words += ["--master-addr", "127.0.0.1", "-m", "benchmarks.planned_rank"]
        command = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        command += [sys.executable, *words, "train", str(run_file)]
        environment = {**os.environ, FOLDER: str(found), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(found.iterdir())]


def planned(config: RunConfig, ranks: int) -> Footprint:
    index = Index.load(config.data.shards)
    dense = dense_part(config, len(index.domains), "cpu")
    return footprint(config, index.vocabulary.sizes, dense, Place("cpu", ranks, ranks))


def compared(config: RunConfig, ranks: int) -> dict[str, dict[str, float]]:
    """Plan, measured, and the plan's error as a share of what was measured."""
    plan, found = planned(config, ranks), taken(config, ranks)
    kept = plan.memory["activations"]
    more = sum(plan.memory[name] for name in PASSING)
    pairs: dict[str, tuple[float, float]] = {
        "activations": (kept, max(one["forward"] for one in found)),
        "most in a step": (kept + more, max(one["peak"] for one in found)),
        "sent by a rank": (sum(plan.wire.values()), found[0]["sent"] / ranks),
        "rows/s": (plan.rows_a_second, config.reading.global_batch / found[0]["seconds"]),
    }
    return {
        name: {"plan": plan, "measured": real, "error": plan / real - 1 if real else 0.0}
        for name, (plan, real) in pairs.items()
    }


def settings(args: argparse.Namespace) -> dict[str, Sequence[str]]:
    """By run."""
    return {
        "movielens_mlora": [f"data.shards={args.movielens.absolute()}"],
        "amazon_unictr": [
            f"data.shards={args.prompts.absolute()}",
            f"encoder.path={args.encoder.absolute()}",
            f"encoder.max_tokens={args.tokens}",
            "encoder.cache_gb=0",
            "data.hold_out=[]",
        ],
    }


def main() -> None:
    """Measure, print, write."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    for name in ("--movielens", "--prompts", "--encoder"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=96, help="of a prompt, as it was written")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/planned.json")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    for name, ranks, stage, more in CASES:
        changes = [*settings(args)[name], *more, f"engine.zero_stage={stage}"]
        changes += ["tracking.wandb=disabled"]
        config = run_files.load(RUNS / f"{name}.toml", changes)
        found = compared(config, ranks)
        case = {"run": name, "ranks": ranks, "zero_stage": stage, "settings": more}
        results.append({**case, **found})
        cells = [name, str(ranks), str(stage), " ".join(more)]
        cells += [
            f"{one['plan']:,.0f} / {one['measured']:,.0f} ({one['error']:+.1%})"
            for one in found.values()
        ]
        print(
            "| " + " | ".join(cells) + " |",
            flush=True,
        )
    now = datetime.now(UTC).isoformat(timespec="minutes")
    content = {"date": now, "machine": machine(), "tokens": args.tokens, "results": results}
    args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
