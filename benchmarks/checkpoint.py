"""Checkpoints of large tables: what a save costs the steps, and bytes a second beside a plain copy.

    python -m benchmarks.checkpoint

One process, one table under row-wise Adagrad. In each round: steps alone, a blocking save, an
asynchronous save with steps until it is on the disk, a plain write and fsync of the same bytes, a
load, and a plain read of the same files. The last two find the files in the page cache.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torchrec import KeyedJaggedTensor

from benchmarks.measure import Figure
from embeddings import ShardedTables, TablesConfig, trunk_tables
from trainer import ranks as groups
from trainer.checkpoint import Snapshot, checked
from trainer.config import TrackingConfig
from trainer.log import RunLog
from trainer.machine import machine
from trainer.saving import Saver, save, step_name

ROOT = Path(__file__).parents[1]
WIDTH, BATCH, ALONE = 64, 4096, 20
PIECE = 16 << 20
NOTHING = Snapshot({"w": torch.zeros(1)}, {})


class Bench:
    """One table in one process, and what is timed on it."""

    def __init__(self, gigabytes: float, folder: Path) -> None:
        self.ranks = groups.start()
        self.rows = int(gigabytes * 10**9 / 4 / WIDTH)
        config = TablesConfig(optimizer="rowwise_adagrad", init_std=0.1)
        tables = trunk_tables({"id": self.rows}, config, WIDTH)
        self.tables = ShardedTables(tables, config, self.ranks.device, 0)
        self.folder, self.draw = folder, torch.Generator().manual_seed(0)
        log = RunLog(False, folder, TrackingConfig(wandb="disabled"), "checkpoint")
        self.saver = Saver(folder, self.ranks, [self.tables], 1, log)
        self.saves = 0

    def step(self) -> float:
        ids = torch.randint(self.rows, (BATCH,), generator=self.draw)
        lengths = torch.ones(BATCH, dtype=torch.int64)
        batch = KeyedJaggedTensor(keys=["id"], values=ids, lengths=lengths)
        return timed(lambda: self.tables(batch).square().mean().backward())

    def round(self) -> dict[str, float]:
        """Seconds of each part."""
        alone = statistics.median(self.step() for _ in range(ALONE))
        blocking = self.folder / "blocking"
        found = {"step": alone}
        found["blocking"] = timed(lambda: save(blocking, self.ranks, [self.tables], NOTHING))
        self.saves += 1
        found["waits"] = timed(lambda: self.saver.save(self.saves, NOTHING))
        began, steps = time.perf_counter(), []
        while self.saver.busy:
            steps.append(self.step())
        found["in background"] = time.perf_counter() - began
        found["slower steps"] = max(sum(steps) - alone * len(steps), 0.0)
        found["plain write"] = timed(lambda: plain_write(self.folder / "plain", self.tables))
        whole = self.folder / step_name(self.saves)
        found["load"] = timed(lambda: checked(whole, self.ranks).load([self.tables]))
        found["plain read"] = timed(lambda: plain_read(whole))
        shutil.rmtree(blocking)
        return found


def timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def plain_write(path: Path, tables: ShardedTables) -> None:
    with path.open("wb", buffering=0) as file:
        for shard in tables.shards():
            for tensor in shard.tensors.values():
                content = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
                for at in range(0, len(content), PIECE):
                    file.write(content[at : at + PIECE])
        os.fsync(file.fileno())


def plain_read(folder: Path) -> None:
    buffer = bytearray(PIECE)
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def summary(rounds: list[dict[str, float]], size: int) -> dict[str, Any]:
    """Figures over rounds; ratios are of one round each, so that noise that lasts hits both."""

    def ratio(over: Callable[[dict[str, float]], float], under: str) -> dict[str, float]:
        return asdict(Figure.of([over(one) / one[under] for one in rounds]))

    return {
        "seconds": {name: asdict(Figure.of([r[name] for r in rounds])) for name in rounds[0]},
        "megabytes": size / 10**6,
        "stall of a step by blocking": ratio(lambda r: r["waits"], "blocking"),
        "stall and slower steps by blocking": ratio(
            lambda r: r["waits"] + r["slower steps"], "blocking"
        ),
        "blocking save by plain write": ratio(lambda r: r["blocking"], "plain write"),
        "load by plain read": ratio(lambda r: r["load"], "plain read"),
    }


def main() -> None:
    """Measure, print, write."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/checkpoint.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with TemporaryDirectory(dir=args.folder) as folder:
        bench = Bench(args.gigabytes, Path(folder))
        bench.round()  # makes the buffers
        rounds = [bench.round() for _ in range(args.rounds)]
        size = sum(p.stat().st_size for p in (Path(folder) / step_name(bench.saves)).iterdir())
    found = {"load average before": load, "rounds": args.rounds, **summary(rounds, size)}
    date = datetime.now(UTC).isoformat(timespec="minutes")
    content = {"date": date, "machine": machine(), "threads": 1, **found}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    groups.stop()


if __name__ == "__main__":
    main()
