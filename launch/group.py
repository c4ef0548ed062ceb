"""The process group of one verb."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from data_shards import UserError
from trainer import ranks

FAILED = "banyan/failed"
PATIENCE = 3.0  # seconds in which a rank that fails tells the others


@contextmanager
def joined(timeout: timedelta = ranks.TIMEOUT) -> Iterator[ranks.Ranks]:
    """Join torchrun's group, or be a group of one; a rank waits so long for the others.

    When one rank stops at a user's mistake that it alone met, such as a corrupt block, the
    others lose it in the middle of a collective: they say so in one line, and the mistake
    itself is not buried under their tracebacks.
    """
    try:
        yield ranks.start(timeout)
    except UserError:
        _tell()
        raise
    except RuntimeError as error:
        if _another_failed():
            raise UserError("stopped, because another rank did; its message says why") from error
        raise
    finally:
        ranks.stop()


def _tell() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.distributed_c10d._get_default_store().set(FAILED, "1")


def _another_failed() -> bool:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    store = dist.distributed_c10d._get_default_store()
    deadline = time.monotonic() + PATIENCE
    try:
        while not (told := store.check([FAILED])) and time.monotonic() < deadline:
            time.sleep(0.05)
    except dist.DistError:  # the first rank, which keeps the store, is gone
        return True
    return told
