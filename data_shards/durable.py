"""Files that are whole or not there: names while they are written, and the wait for the disk."""

import os
from pathlib import Path
from uuid import uuid4


def unfinished(path: Path) -> Path:
    """A name beside `path` that no other writer has: on another machine a pid may be the same."""
    return path.with_name(f".{path.name}.{uuid4().hex}.tmp")


def flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
