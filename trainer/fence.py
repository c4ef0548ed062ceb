"""One process at a time writes to a folder."""

import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from data_shards.errors import LostError
from trainer.ranks import FaultsConfig, Ranks, together

LOCK = ".lock"
PATIENCE = 120.0  # seconds; a machine that is lost holds its locks on NFS for 90 more
LOOK = 0.2
WITHOUT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)


@contextmanager
def fence(folder: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Keep other processes out meanwhile, or until this one is killed; make the folder.

    Waits for one that is about to end. LostError if it does not: another start may find it gone.
    """
    file = _taken(folder, patience)
    try:
        yield
    finally:
        file.close()


@contextmanager
def others_kept_out(folder: Path, faults: FaultsConfig, ranks: Ranks) -> Iterator[None]:
    """The first rank's `fence`, for all of them. Collective."""
    patience = min(PATIENCE, faults.timeout_seconds / 2)  # the other ranks wait meanwhile
    with ExitStack() as held:
        fenced = fence(folder, patience)
        together(ranks, folder, lambda: held.enter_context(fenced) if ranks.first else None)
        yield


def _taken(folder: Path, patience: float) -> TextIO:
    file = _opened(folder)
    deadline, said = time.monotonic() + patience, False
    while not _locked(file):
        holder = _holder(file)
        file.close()  # and opened anew: who has a lock whose file was deleted keeps nobody out
        if time.monotonic() > deadline:
            raise LostError(
                f"{folder}: another process writes to it ({holder}); wait for it or stop it, or "
                f"set another output; if its machine is gone for good, delete {folder / LOCK}"
            )
        if not said:
            _say(f"{folder}: waiting {patience:g} s at most for another process ({holder})")
        said = True
        time.sleep(min(LOOK, patience))
        file = _opened(folder)
    file.truncate(0)
    print(f"pid {os.getpid()} on {socket.gethostname()}", end="", file=file, flush=True)
    return file


def _opened(folder: Path) -> TextIO:
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / LOCK).open("a+", encoding="utf-8")


def _locked(file: TextIO) -> bool:
    """Whether the lock is ours; true as well where this file system has none, which is said."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # of a file that was taken away after it was opened (`remove-domain`) it keeps nobody out
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError as error:
        if error.errno not in WITHOUT:
            raise
        _say(
            f"{file.name}: cannot be locked ({error.strerror}): that no other process writes to "
            "this folder is yours to see to"
        )
    return True


def _holder(file: TextIO) -> str:
    file.seek(0)
    return file.read()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
