"""The process group of one verb."""

from collections.abc import Iterator
from contextlib import contextmanager

from trainer import ranks


@contextmanager
def joined() -> Iterator[ranks.Ranks]:
    """Join torchrun's group, or be a group of one."""
    try:
        yield ranks.start()
    finally:
        ranks.stop()
