"""Long drills: ranks, torchrun and a node are killed, and the run ends as if they had not been.

    python -m benchmarks.faults --out DIR --minutes 10

Planted logs and a small network, so that a start costs what libraries and processes cost. At 2 and
4 ranks as many rounds of `drill` as fit in the time; then one run on two nodes (agents) of two
ranks, of which one is killed for good. `benchmarks/results/faults.json` has the figures of one go.
"""

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from launch.__main__ import main as launch
from launch.drill import drawn
from launch.drill_round import Round, compared
from launch.drilled import FOLDER, PLAN
from launch.group import OWN_STORE
from trainer.machine import machine

RUN_FILE = Path(__file__).parents[1] / "launch" / "runs" / "planted_mlora.toml"
RESULTS = Path(__file__).parent / "results" / "faults.json"
SMALL = (
    "data.source.rows=12000",
    "data.source.domains=3",
    "reading.global_batch=256",
    "reading.lanes=4",
    "reading.shuffle_rows=2048",
    "backbone.hidden=[32, 16]",
    "pretrain.max_epochs=1",
    "pretrain.checkpoint_every=10",
    "pretrain.evaluate_every=25",
    "adapt.max_epochs=1",
    "tracking.wandb=disabled",
    "tracking.pictures=false",
)
KEEP_ALIVE = "keep_alive_interval=2,keep_alive_max_attempt=3,last_call_timeout=2"


def rounds(changes: list[str], out: Path, ranks: int, seconds: float) -> dict[str, Any]:
    """Drills on so many ranks, until the time is over."""
    ends = time.monotonic() + seconds
    whole = Round(RUN_FILE, changes, out / "whole", ranks, [])
    whole.play()
    counts, found = whole.counts(), []
    while time.monotonic() < ends or not found:
        deaths = drawn(random.Random(f"{ranks}/{len(found)}"), 3, counts, whole.seconds * 0.7)
        one = Round(RUN_FILE, changes, out / f"round-{len(found)}", ranks, deaths)
        one.play()
        found.append(compared(whole, one))
        print(f"{ranks} ranks: {found[-1]}", file=sys.stderr, flush=True)
    found = [round for round in found if round.deaths]  # of a planned one that came to nothing
    waits = sorted(wait for round in found for wait in round.seconds)
    return {
        "ranks": ranks,
        "rounds": len(found),
        "survived": sum(round.survived for round in found),
        "deaths": sum(round.deaths for round in found),
        "rows_lost": sum(round.lost for round in found),
        "rows_repeated": sum(round.repeated for round in found),
        "seconds_to_first_step": waits
        and {"median": round(statistics.median(waits), 1), "worst": round(waits[-1], 1)},
        "seconds_undisturbed": round(whole.seconds, 1),
    }


def node_leaves(changes: list[str], out: Path, whole: Round) -> dict[str, Any]:
    """Two nodes of two ranks; one is gone for good after some steps, the other ends the run."""
    one = Round(RUN_FILE, changes, out, 2, [])
    out.mkdir(parents=True)
    (out / PLAN).write_text("[]", encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = [_node(changes, out, port, host) for host in (True, False)]
    try:
        while not one.steps()[1]:
            time.sleep(0.1)
        time.sleep(1)
        left, before = time.time(), len(list((out / "ledger").iterdir()))
        nodes[1].send_signal(signal.SIGKILL)
        status = nodes[0].wait(600)
    finally:
        for node in nodes:
            node.kill()
    steps, times = one.steps()
    wanted, _ = whole.steps()
    return {
        "ranks_before": before,
        "ranks_after": len(list((out / "ledger").iterdir())) - before,
        "status": status,
        "rows_lost_or_repeated": sum(
            (steps[key] - wanted[key]).total() + (wanted[key] - steps[key]).total()
            for key in wanted
        ),
        "seconds_to_first_step": round(
            min(at for start, at in times if start / 1e9 > left) - left, 1
        ),
        "rendezvous": KEEP_ALIVE,
    }


def _node(changes: list[str], out: Path, port: int, host: bool) -> subprocess.Popen[bytes]:
    settings = [*changes, f"output={out}", "name=run"]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2"),
        *("--nproc-per-node", "2", "--max-restarts", "3", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"),
        *("--rdzv-conf", f"{KEEP_ALIVE},is_host={str(host).lower()}", "-m", "launch.drilled"),
        *("train", str(RUN_FILE), *(a for one in settings for a in ("--set", one))),
    ]
    environment = {**os.environ, OWN_STORE: "1", "OMP_NUM_THREADS": "1", FOLDER: str(out)}
    with (out / "log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="an empty folder")
    parser.add_argument("--minutes", type=float, default=10)
    args = parser.parse_args()
    changes = [*SMALL, f"data.shards={args.out / 'shards'}"]
    settings = [argument for change in changes for argument in ("--set", change)]
    assert launch(["write-shards", str(RUN_FILE), *settings]) == 0
    found: dict[str, Any] = {"machine": machine(), "load": os.getloadavg()[0]}
    share = args.minutes * 60 / 2
    found["drills"] = [
        rounds(changes, args.out / f"{ranks}-ranks", ranks, share) for ranks in (2, 4)
    ]
    whole = Round(RUN_FILE, changes, args.out / "2-ranks" / "whole", 2, [])
    found["a node leaves"] = node_leaves(changes, args.out / "node", whole)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
