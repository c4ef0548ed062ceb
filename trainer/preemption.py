"""A machine that is wanted back: SIGTERM asks all ranks to save and to leave within a grace time.

A thread of its own hears the signal, because a rank that waits for others runs no Python. Where
nothing is saved it ends the process at once, and says so.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SAVED, LATE = 75, 143  # 75: sysexits.h, "try again later"; 143: what SIGTERM itself gives
LOOK = 0.05  # seconds
STATUS = "BANYAN_STATUS"

_asked = threading.Event()
_saves = threading.Event()
_saved = threading.Event()


class PreemptedError(Exception):
    """All ranks have agreed to stop, and what they have learned is saved."""


@contextmanager
def listening(grace_seconds: float) -> Iterator[None]:
    """Inside, SIGTERM is a request. Only the main thread may ask for that."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    hearing = threading.Thread(target=_hear, args=(reader, grace_seconds), daemon=True)
    hearing.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGTERM, handler)
        writer.close()
        hearing.join(LOOK)
        reader.close()


def asked() -> bool:
    """Whether this rank has been told to stop, and saves; others may not have been."""
    return _asked.is_set() and _saves.is_set()


def saves() -> bool:
    """Whether this is inside `saving`, the same on every rank."""
    return _saves.is_set()


@contextmanager
def saving() -> Iterator[None]:
    """Inside, the steps ask for `asked` and save; outside, SIGTERM ends the process at once.

    After an error it is left to that error how the process ends.
    """
    _saves.set()
    try:
        yield
    except PreemptedError:
        _saved.set()
        raise
    _saves.clear()


def forget() -> None:
    """What failed inside `saving` is dealt with: there is nothing to save any more."""
    _saves.clear()


def _hear(reader: socket.socket, grace_seconds: float) -> None:
    heard = reader.recv(64)
    while heard and signal.SIGTERM not in heard:  # other signals come by the same way
        heard = reader.recv(64)
    if not heard:
        return
    _asked.set()
    deadline = time.monotonic() + grace_seconds
    while _saves.is_set() and time.monotonic() < deadline:
        time.sleep(LOOK)
    _leave(*_last_words(grace_seconds))


def _last_words(grace_seconds: float) -> tuple[int, str]:
    """Exit status, and what is true then."""
    from trainer import heartbeat  # brings torch, which the launcher sets up before it comes

    phase, _ = heartbeat.where()
    if not _saves.is_set():
        return SAVED, f"{phase}: not saved, it begins anew; what was finished before it is stored"
    if _saved.is_set():  # and something else takes its time
        return SAVED, f"{phase}: saved; a dashboard may lack the last lines (see `wandb sync`)"
    return LATE, f"{phase}: not saved within {grace_seconds:g} s; the checkpoint before stands"


def _leave(status: int, text: str) -> None:
    print(f"stopped by SIGTERM: {text}", file=sys.stderr, flush=True)
    tell(status)
    os._exit(status)


def tell(status: int) -> None:
    """With what this process ends, in the file that BANYAN_STATUS names, if it does: torchrun's
    agent does not say it after a signal."""
    if STATUS in os.environ:
        with suppress(OSError):
            Path(os.environ[STATUS]).write_text(str(status), encoding="utf-8")
