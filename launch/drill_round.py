"""One run of a drill: started until it ends, and compared with the one that was left alone."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_shards import UserError
from launch.drilled import COUNTS, DEAD, FOLDER, LEDGER, PLAN, Death
from launch.group import OWN_STORE

PATIENCE = 1800.0  # seconds of one torchrun
TIMES = ("seconds", "pretrain_seconds")

Steps = dict[tuple[str, int], Counter[int]]


class Round:
    """A run in a folder of its own, whose ranks die as planned."""

    def __init__(
        self, run_file: Path, changes: list[str], folder: Path, ranks: int, deaths: list[Death]
    ) -> None:
        self.folder, self.run = folder, folder / "run"
        self.ranks, self.deaths = ranks, deaths
        self.seconds = 0.0
        changes = [*changes, f"output={folder}", "name=run"]
        self._command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
            *("--max-restarts", str(len(deaths)), "-m", "launch.drilled", "train", str(run_file)),
            *(argument for change in changes for argument in ("--set", change)),
        ]

    def play(self) -> None:
        """Start it, and again as often as torchrun itself is killed."""
        self.folder.mkdir(parents=True)
        plan = json.dumps([asdict(death) for death in self.deaths])
        (self.folder / PLAN).write_text(plan, encoding="utf-8")
        began = time.monotonic()
        for _ in range(1 + sum(death.agent for death in self.deaths)):
            if self._start() == 0:
                break
        self.seconds = time.monotonic() - began

    def _start(self) -> int:
        environment = {OWN_STORE: "1", "OMP_NUM_THREADS": "1", **os.environ}
        with (self.folder / "log").open("ab") as log:
            job = subprocess.Popen(
                self._command,
                env={**environment, FOLDER: str(self.folder)},
                stdout=log,
                stderr=log,
            )
            try:
                return job.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                raise UserError(
                    f"{self.folder}: no end after {PATIENCE:g} s; see its log there"
                ) from None
            finally:
                job.kill()

    def ended(self) -> bool:
        return (self.run / "summary.json").exists()

    def counts(self) -> list[dict[str, int]]:
        """What each rank has done, by kind of event."""
        if not self.ended():
            raise UserError(f"{self.folder}: the run left alone did not end; see its log there")
        files = (self.folder / f"{COUNTS}.{rank}" for rank in range(self.ranks))
        return [json.loads(path.read_text(encoding="utf-8")) for path in files]

    def died(self) -> list[float]:
        """When ranks have died."""
        path = self.folder / DEAD
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line)["time"] for line in lines]

    def learned(self) -> dict[str, Any]:
        """The summary but for times, and the SHA-256 of every adapter; the trunk's is in it."""
        if not self.ended():
            return {}
        summary = json.loads((self.run / "summary.json").read_text(encoding="utf-8"))
        files = sorted((self.run / "adapters").rglob("*.safetensors"))
        digests = {
            str(path.relative_to(self.run)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        }
        return digests | {key: value for key, value in summary.items() if key not in TIMES}

    def steps(self) -> tuple[Steps, list[tuple[int, float]]]:
        """The rows of each step as it was last taken, by all ranks; (start, time) of all steps."""
        last: dict[tuple[str, int], int] = {}
        steps: Steps = {}
        times = []
        files = [(*map(int, path.stem.split("-")), path) for path in self._ledgers()]
        for start, _, path in sorted(files):
            for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
                key = line["phase"], line["step"]
                if last.get(key) != start:
                    last[key], steps[key] = start, Counter()
                steps[key].update(line["rows"])
                times.append((start, line["time"]))
        return steps, times

    def _ledgers(self) -> list[Path]:
        return list((self.folder / LEDGER).glob("*.jsonl"))


@dataclass(frozen=True)
class Compared:
    """How one round ended beside the run left alone. Without deaths it proves nothing."""

    deaths: int
    survived: bool
    lost: int
    repeated: int
    seconds: list[float]
    """From each death to the first step of a later start."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        waits = ", ".join(f"{wait:.1f}" for wait in self.seconds)
        end = "bit-equal" if self.survived else "NOT equal"
        return (
            f"{self.deaths} deaths, {end}, {self.lost} rows lost, {self.repeated} repeated"
            f"{f'; {waits} s to the next step' if waits else ''}"
        )


def compared(whole: Round, one: Round) -> Compared:
    """Digests, scores and rows of a round against those of the run left alone."""
    wanted, _ = whole.steps()
    found, times = one.steps()
    nothing: Counter[int] = Counter()
    lost = sum((rows - found.get(key, nothing)).total() for key, rows in wanted.items())
    repeated = sum((rows - wanted.get(key, nothing)).total() for key, rows in found.items())
    same = bool(one.learned()) and one.learned() == whole.learned()
    died = one.died()
    waits = [_wait(death, times) for death in died]
    return Compared(
        deaths=len(died),
        survived=same and not lost and not repeated,
        lost=lost,
        repeated=repeated,
        seconds=[round(wait, 2) for wait in waits if wait is not None],
    )


def _wait(death: float, times: list[tuple[int, float]]) -> float | None:
    """To the first step of a start that began after this death, if there was one."""
    later = [at for start, at in times if start / 1e9 > death]
    return min(later) - death if later else None
