"""The folder in which a set is made: whose it is, and when it stays to be gone on with."""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_shards.durable import unfinished
from data_shards.errors import InterruptedWriteError, UserError
from data_shards.pieces import Job

_PLAN = "plan.json"


@contextmanager
def work_folder(job: Job, out: Path, part: int, parts: int) -> Iterator[None]:
    """The folder in which the set is made; it stays where the same command could go on."""
    failure = job.folder / f"failed-{part}.txt"
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        with _alone(job.folder / f"part-{part}.lock", out):
            _check_plan(job)
            failure.unlink(missing_ok=True)
            yield
    except InterruptedWriteError:
        raise
    except UserError as error:
        if parts > 1 and (job.folder / _PLAN).exists():
            failure.write_text(f"part {part}: {error}", encoding="utf-8")
        elif (job.folder / _PLAN).exists() and _same_plan(job):
            shutil.rmtree(job.folder, ignore_errors=True)
        raise
    except OSError as error:
        problem = (
            f"{out}: could not be written ({error.strerror or error}); free some space, or give "
            f"another path. The same command goes on where it was; {job.folder} holds what is done"
        )
        with suppress(OSError):
            failure.write_text(f"part {part}: {problem}", encoding="utf-8")
        raise UserError(problem) from error


@contextmanager
def _alone(lock: Path, out: Path) -> Iterator[None]:
    """Refuse a second writer of the same part; the system frees the lock of one that is gone."""
    with lock.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InterruptedWriteError(
                f"{out}: {lock.stem.replace('-', ' ')} is being written by another process "
                f"({file.read()}); wait for it or stop it (several machines take a --part each)"
            ) from None
        file.truncate(0)
        since = datetime.now(UTC).isoformat(" ", "seconds")
        print(f"pid {os.getpid()} on {socket.gethostname()} since {since}", end="", file=file)
        file.flush()
        yield


def _plan(job: Job) -> dict[str, Any]:
    choices = {
        "source": job.describe_source(),
        "pieces": list(job.source.pieces()),
        "input files": job.source.state(),
        "schema": job.schema.to_json(),
        "split": asdict(job.split),
        "base": job.base_fingerprint,
        "only": list(job.only),
        "hold_out": list(job.hold_out),
        "block_rows": job.block_rows,
        "shard_bytes": job.shard_bytes,
    }
    return json.loads(json.dumps(choices))


def _same_plan(job: Job) -> bool:
    return json.loads((job.folder / _PLAN).read_text(encoding="utf-8")) == _plan(job)


def _check_plan(job: Job) -> None:
    """Refuse to go on with what was begun with other choices."""
    path, plan = job.folder / _PLAN, _plan(job)
    if not path.exists():
        beside = unfinished(path)
        beside.write_text(json.dumps(plan), encoding="utf-8")
        beside.replace(path)
        return
    theirs = json.loads(path.read_text(encoding="utf-8"))
    differs = [key for key in plan if plan[key] != theirs.get(key)]
    if differs and not any(job.folder.glob("*-*.json")):  # nothing was done under the other plan
        for stale in (path, *job.folder.glob("failed-*")):
            stale.unlink()
        _check_plan(job)
    elif differs:
        raise UserError(
            f"{job.folder}: holds shards begun with other choices (they differ in "
            f"{', '.join(differs)}); repeat that command to end them, or delete the folder"
        )
