"""Files that are whole or not there: names while they are written, and the wait for the disk."""

import os
from pathlib import Path
from uuid import uuid4


def unfinished(path: Path) -> Path:
    """A name beside `path` that no other writer has: on another machine a pid may be the same."""
    return path.with_name(f".{path.name}.{uuid4().hex}.tmp")


def write_whole(path: Path, text: str) -> None:
    """The whole file or none of it, for good; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = unfinished(path)
    try:
        beside.write_text(text, encoding="utf-8")
        flush(beside)
        beside.replace(path)
        flush(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
