"""What a person and a dashboard see of a run: console, metrics as JSON lines, wandb."""

import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import wandb
from wandb.errors import AuthenticationError, UsageError

from data_shards import Loader, UserError
from data_shards.errors import LostError
from trainer import exporter
from trainer.config import TrackingConfig
from trainer.ranks import Ranks

UPLOAD = 300.0
"""Seconds that a run's end waits for wandb; what is not there by then `wandb sync` sends later."""


def require_login(tracking: TrackingConfig) -> None:
    """That wandb takes the key, if the run is sent while it goes on; the first rank asks, before it
    joins the others. UserError: there is no key; LostError: an expired one, or no answer."""
    if tracking.wandb != "online" or os.environ.get("RANK", "0") != "0":
        return
    way = 'or set tracking.wandb = "offline" and send the run later, by `wandb sync`'
    try:
        wandb.login(verify=True)
    except AuthenticationError as error:
        raise LostError(
            f"tracking.wandb: the key is not taken: {error}; put a valid one into WANDB_API_KEY "
            f"(on a cluster: into the secret banyan-wandb), {way}"
        ) from None
    except UsageError as error:
        raise UserError(
            f"tracking.wandb: {error} Put it into WANDB_API_KEY (on a cluster: into the secret "
            f"banyan-wandb), {way}"
        ) from None


class RunLog:
    """Only the first rank speaks; on the others every call does nothing."""

    def __init__(self, speaks: bool, folder: Path, tracking: TrackingConfig, name: str) -> None:
        self.speaks = speaks
        self._file: TextIO | None = None
        self._wandb = None
        self._left_out: set[tuple[Any, ...]] = set()
        if not speaks:
            return
        exporter.serve()
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        self._file = self._path.open("a", encoding="utf-8")
        if tracking.wandb != "disabled":
            self._wandb = wandb.init(
                project=tracking.project,
                name=name,
                dir=folder,
                mode=tracking.wandb,
                settings=wandb.Settings(
                    console="off", silent=True, x_disable_meta=True, finish_timeout=UPLOAD
                ),
            )

    def say(self, text: str) -> None:
        """One line on the console."""
        if self.speaks:
            print(text, file=sys.stderr, flush=True)

    def metrics(self, phase: str, values: dict[str, Any]) -> None:
        """One line of the metrics file; its numbers also go to wandb as `<phase>/<name>`."""
        if self._file is None:
            return
        exporter.evaluated(phase, values)
        line = json.dumps({"time": round(time.time(), 3), "phase": phase, **values}) + "\n"
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:  # which does not know the file
            file, self._file = self._file, None
            with suppress(OSError):  # the same one, for the line that is still waiting
                file.close()
            raise OSError(error.errno, error.strerror, file.name) from error
        if self._wandb is not None:
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
            self._wandb.log({f"{phase}/{name}": value for name, value in numbers.items()})

    def bad_step(self, phase: str, step: int, rows: dict[str, list[int]]) -> None:
        """A line for a step that was skipped: the ids of the rows that spoiled it, by domain."""
        self.metrics(phase, {"step": step, "bad_rows": rows})

    def bad_steps(self) -> dict[str, int]:
        """How many steps of each phase were skipped, in all starts of the run together."""
        if not self.speaks:
            return {}
        lines = lines_of(self._path)
        # a step is taken again, and skipped again, after a restart
        skipped = {(line["phase"], line["step"]) for line in lines if "bad_rows" in line}
        return dict(Counter(phase for phase, _ in sorted(skipped)))

    def left_out(self, phase: str, step: int, ranks: Ranks, *loaders: Loader) -> None:
        """A line for corrupt blocks that loaders of any rank have left out since the line before.
        Collective."""
        mine = {(one.shard, one.member, one.rows) for read in loaders for one in read.skipped}
        found = {(phase, *one) for rank in ranks.gather(mine) for one in rank} - self._left_out
        self._left_out |= found
        if found:
            keys = ("shard", "member", "rows")
            blocks = [dict(zip(keys, one, strict=True)) for _, *one in sorted(found)]
            self.metrics(phase, {"step": step, "corrupt": blocks})

    def corrupt_rows(self) -> dict[str, int]:
        """How many rows of each phase were left out as corrupt, in all starts of the run together;
        a row counts once, however often it was to be read."""
        if not self.speaks:
            return {}
        blocks = {
            (line["phase"], block["shard"], block["member"]): block["rows"]
            for line in lines_of(self._path)
            for block in line.get("corrupt", ())
        }
        rows: Counter[str] = Counter()
        for (phase, *_), count in sorted(blocks.items()):
            rows[phase] += count
        return dict(rows)

    def pictures(self, files: Sequence[Path]) -> None:
        """These PNG files go to wandb, each by its own name."""
        if self._wandb is not None and files:
            self._wandb.log({f"pictures/{file.stem}": wandb.Image(str(file)) for file in files})

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of the same columns, in wandb alone."""
        if self._wandb is not None and rows:
            data = [list(row.values()) for row in rows]
            self._wandb.log({name: wandb.Table(columns=list(rows[0]), data=data)})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Of a metrics file, if it is there; without the halves that a killed run leaves."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return [line for line in map(_parsed, text.splitlines()) if line is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "phase" in found else None


class Progress:
    """A line with rate and time left: redrawn on a terminal, every few seconds elsewhere."""

    def __init__(self, what: str, total: int, unit: str, speaks: bool = True) -> None:
        self.what, self.total, self.unit, self.speaks = what, total, unit, speaks
        self._terminal = sys.stderr.isatty()
        self._start = time.monotonic()
        self._shown = self._start
        self._done = 0

    def add(self, count: int, note: str = "") -> None:
        """`count` more units are done."""
        self._done += count
        exporter.dealt_with(self.what, count)
        now = time.monotonic()
        if self.speaks and now - self._shown >= (0.5 if self._terminal else 5):
            self._shown = now
            end = "\r" if self._terminal else "\n"
            print(f"{self._line(now)} {note}", end=end, file=sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        rate = self._done / max(now - self._start, 1e-9)
        left = math.ceil((self.total - self._done) / rate) if rate else 0
        share = self._done / max(self.total, 1)
        return f"  {self.what}: {share:4.0%} {rate:,.0f} {self.unit}/s, {left} s left"
