"""How checkpoints come to the disk: under a temporary name, whole, and behind training's back.

A save costs a step only the copy of what this rank holds into buffers that every save uses again.
The copy ends before the next backward, which changes the tables; a thread does the rest.
"""

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_shards.durable import flush
from data_shards.errors import LostError
from trainer import checkpoint, exporter
from trainer.checkpoint import DENSE, FORMAT, LATEST, MANIFEST, STATE, Snapshot, Tables
from trainer.heartbeat import Watch, leave_out
from trainer.log import RunLog
from trainer.ranks import FaultsConfig, Ranks, together
from trainer.tensor_file import pieces, write_file

LOOK, SAY = 1.0, 60.0  # seconds of a wait for a save until the others are looked at, and it is said


@dataclass(frozen=True)
class Contents:
    """What one rank writes: tensors by file and name, and the state of the run, the first rank's
    alone."""

    files: dict[str, dict[str, Tensor]]
    state: bytes | None

    @classmethod
    def of(
        cls, ranks: Ranks, tables: Tables, snapshot: Snapshot, optimizer: bool = True
    ) -> "Contents":
        """The live tensors. Collective."""
        steps = [part.steps() for part in tables]
        mine = {
            checkpoint.SEPARATOR.join((key, str(row), str(col))): tensor
            for key, row, col, tensor in checkpoint.rectangles(tables)
            if optimizer or key.endswith(f"{checkpoint.SEPARATOR}weight")
        }
        files, state = {f"tables-{ranks.rank:05d}.safetensors": mine}, None
        if ranks.first:
            shapes = checkpoint.shapes(tables)
            values = {**snapshot.values, "tables": shapes, "table_steps": steps}
            files[DENSE], state = snapshot.tensors, json.dumps(values, indent=1).encode()
        return cls(files, state)

    def write(self, folder: Path) -> dict[str, str]:
        """Each file's SHA-256."""
        digests = {name: write_file(folder / name, pieces(t)) for name, t in self.files.items()}
        if self.state is not None:
            digests[STATE] = write_file(folder / STATE, [self.state])
        return digests


def save(
    folder: Path,
    ranks: Ranks,
    tables: Tables,
    snapshot: Snapshot,
    *,
    optimizer: bool = True,
) -> None:
    """Write `folder` whole, and return then. Collective. Without `optimizer` only the tables'
    weights are kept."""
    _write(folder, ranks, Contents.of(ranks, tables, snapshot, optimizer), "")


@dataclass(frozen=True)
class _Aside(Ranks):
    """The same ranks over connections of their own.

    Collectives of two threads on one group would meet in any order. On a group that only saves use
    the order is that of the saves, and the loss of a rank is noticed at once, unlike in files.
    """

    group: dist.ProcessGroup

    def gather(self, value: Any) -> list[Any]:
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value, group=self.group)
        return box


class Saver:
    """Writes the checkpoints `step-*` of one phase, one at a time, while the phase goes on.

    To be used in `with`: it ends after the last save, or at once where a rank is gone. `at` is the
    step that the phase begins with, which is on the disk already.
    """

    def __init__(
        self,
        root: Path,
        ranks: Ranks,
        tables: Tables,
        keep: int,
        log: RunLog,
        at: int = -1,
        faults: FaultsConfig | None = None,
    ) -> None:
        self._root, self._ranks, self._tables, self._keep = root, ranks, tables, keep
        self._log, self._at, self._faults = log, at, faults or FaultsConfig()
        group = _connected(self._faults)
        self._aside = _Aside(ranks.rank, ranks.world, ranks.device, group)
        self._buffers: dict[str, Tensor] = {}
        self._thread: Thread | None = None
        self._error: Exception | None = None
        self._note: dict[str, float] = {}

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
            dist.destroy_process_group(self._aside.group)
        elif self._thread is not None and not issubclass(kind, RuntimeError):
            # What ends a phase, such as a mistake in its rows, is no reason to lose the last save;
            # after a failed collective nobody would answer.
            try:
                self.wait()
            except OSError as error:  # of the log
                self._log.say(f"{error}; the save of step {self._at} is through")

    def save(self, step: int, snapshot: Snapshot, best_step: int = -1) -> None:
        """Copy all there is, now; the rest is done later. Collective.

        Waits for the save before this one, and raises what became of it. A step has one state: it
        is not saved twice, so the checkpoint that a phase stands on is never replaced.
        """
        if step == self._at:
            return
        waited, self._at = self.wait(), step
        if waited > 1:
            self._log.say(f"step {step}: waited {waited:.0f} s for the save before, a slow disk")
        began = time.monotonic()
        live = Contents.of(self._ranks, self._tables, snapshot)
        held = {file: self._held(file, tensors) for file, tensors in live.files.items()}
        copied = time.monotonic() - began
        self._note = {"step": step, "waited": waited, "copied": copied}
        best = step_name(best_step) if best_step >= 0 else ""
        work = (step_name(step), replace(live, files=held), best)
        self._thread = Thread(target=self._work, args=work, daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a save is on its way to the disk."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> float:
        """Seconds until the last save was done; raises its error, the same on every rank.

        LostError where a rank gives no sign of life, or the disk takes longer than it may.
        """
        began = said = time.monotonic()
        watch, (thread, self._thread) = Watch(), (self._thread, None)
        while thread is not None and thread.is_alive():
            thread.join(min(LOOK, self._faults.save_seconds))
            waited = time.monotonic() - began
            if thread.is_alive():
                self._require_life(watch, waited)
            if began + waited > said + SAY:
                said = began + waited
                self._log.say(f"waiting for the save of step {self._at} for {waited:.0f} s now")
        if self._error is not None:
            raise self._error
        if thread is not None:  # now it is there; from its own thread nobody writes to the log
            self._log.metrics("checkpoint", self._note)
        return time.monotonic() - began

    def _require_life(self, watch: Watch, waited: float) -> None:
        faults = self._faults
        problem = watch.silent(faults.timeout_seconds)
        if not problem and waited > faults.save_seconds:
            problem = f"a disk slower than faults.save_seconds = {faults.save_seconds:g} allows"
        if problem:
            raise LostError(
                f"{self._root}: the save of step {self._at} is not through after {waited:.0f} s: "
                f"{problem}; the checkpoint before it stands: look at that rank's messages and "
                "machine, then start the same command again"
            )

    def _held(self, file: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._copy(f"{file}/{name}", tensor) for name, tensor in tensors.items()}

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        held = self._buffers.get(name)
        if held is None or held.shape != tensor.shape:  # rows of an adapter's own come and go
            shape, pinned = tensor.shape, tensor.is_cuda
            held = self._buffers[name] = torch.empty(shape, dtype=tensor.dtype, pin_memory=pinned)
        return held.copy_(tensor.detach())

    def _work(self, name: str, contents: Contents, best: str) -> None:
        try:
            _write(self._root / name, self._aside, contents, best)
            _mark(self._root, name, best, self._aside, self._keep)
            exporter.saved()
        except Exception as error:  # of any kind: it is raised again by the next `wait`
            self._error = error
            self._log.say(f"{name}: not saved, and training stops at the next save: {error}")


def _connected(faults: FaultsConfig) -> dist.ProcessGroup:
    """A group whose members wait for each other as long as it takes; `Saver.wait` sets an end to
    that. Collective, and who does not come to it is missed as soon as elsewhere."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=faults.timeout_seconds))
    assert isinstance(group, dist.ProcessGroup)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1e9), group)
    leave_out(group)
    return group


def step_name(step: int) -> str:
    """The folder of a step's checkpoint; in the order of names they are in that of steps."""
    return f"step-{step:010d}"


def _write(folder: Path, ranks: Ranks, contents: Contents, best: str) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")

    def publish() -> None:
        manifest = {"format": FORMAT, "best": best, "files": merged}
        _publish(temporary, folder, json.dumps(manifest, indent=1).encode())

    try:
        together(ranks, folder, lambda: _fresh(temporary) if ranks.first else None)
        digests = together(ranks, folder, lambda: contents.write(temporary))
        merged = {name: digest for rank in digests for name, digest in rank.items()}
        together(ranks, folder, lambda: publish() if ranks.first else None)
    finally:
        if ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _publish(temporary: Path, folder: Path, manifest: bytes) -> None:
    """One rename makes it a checkpoint. One of that name is set aside first: it is damaged, or was
    given up for an older one, which stays until this one is in place."""
    write_file(temporary / MANIFEST, [manifest])
    flush(temporary)
    doomed = _set_aside(folder)
    os.replace(temporary, folder)
    flush(folder.parent)
    flush(folder.parent.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def _mark(root: Path, name: str, best: str, ranks: Ranks, keep: int) -> None:
    """Point `latest` at a checkpoint, and only then remove what nobody goes back to."""

    def mark() -> None:
        temporary = root / f".{LATEST}.tmp"
        write_file(temporary, [name.encode()])
        os.replace(temporary, root / LATEST)
        flush(root)
        _prune(root, name, best, keep)

    together(ranks, root, lambda: mark() if ranks.first else None)


def _prune(root: Path, name: str, best: str, keep: int) -> None:
    """Keep the newest `keep` up to this one and the best of each; what is newer was given up."""
    past = [step for step in checkpoint.steps_in(root) if step <= name]
    others = {step for step in past[:keep] if step != name}
    try:
        kept = {name, best} | others | {checkpoint.best_of(root / step) for step in others}
    except OSError:  # which is the best of one cannot be read now: the next save removes the rest
        return
    for step in checkpoint.steps_in(root):
        if step not in kept:
            _set_aside(root / step)
    for left in root.glob(".step-*"):  # also of saves that were cut off
        shutil.rmtree(left, ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    """Out of sight by one rename, so that no half of a folder is ever seen while it is removed."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        os.rename(folder, doomed)
    return doomed
