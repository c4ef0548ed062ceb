"""The process group of one verb."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from data_shards import UserError
from data_shards.errors import LostError
from trainer import preemption, ranks
from trainer.heartbeat import Heartbeat, where
from trainer.ranks import FaultsConfig

FAILED = "banyan/failed"
STOPPED = "stopped, because another rank did"
PATIENCE = 3.0  # seconds in which a rank that fails tells the others, and one that lives beats
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


@contextmanager
def joined(faults: FaultsConfig | None = None) -> Iterator[ranks.Ranks]:
    """Join torchrun's group, or be a group of one, until SIGTERM or for good.

    When one rank stops at a user's mistake that it alone met, such as a corrupt block, the
    others lose it in the middle of a collective: they say so in one line, and the mistake
    itself is not buried under their tracebacks. When one is lost or hangs, they say which.
    """
    _require_own_store()
    faults = faults or FaultsConfig()
    with preemption.listening(faults.grace_seconds):
        with _grouped(faults) as group:
            yield group


@contextmanager
def _grouped(faults: FaultsConfig) -> Iterator[ranks.Ranks]:
    heart = None
    try:
        group = ranks.start(faults)
        heart = Heartbeat() if group.world > 1 else None
        yield group
    except LostError:  # no mistake: the others end as it does
        raise
    except UserError:
        _tell()
        raise
    except RuntimeError as error:
        reason = _reason(heart, faults) if heart else None
        if reason is not None:
            raise reason from error
        raise
    finally:
        if heart:
            heart.stop()
        ranks.stop()


def _require_own_store() -> None:
    """Ranks that torchrun starts again may meet keys of those before them in its own store: of ten
    restarts of two ranks over gloo, 5 of 5 came back with a store of their own, 2 of 5 without."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            f"torchrun --max-restarts {restarts}: a restart may hang on what the ranks before left "
            f"in torchrun's store; set {OWN_STORE}=1 in torchrun's environment"
        )


def _tell() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.distributed_c10d._get_default_store().set(FAILED, "1")


def _reason(heart: Heartbeat, faults: FaultsConfig) -> UserError | None:
    """Why the others were lost: by a mistake that another start would repeat, or another way."""
    deadline = time.monotonic() + PATIENCE
    try:
        before = heart.heard()
        while time.monotonic() < deadline:
            if preemption.asked():
                return LostError(f"{where()[0]}: {STOPPED}, and SIGTERM came")
            if heart.told(FAILED):
                return UserError(f"{STOPPED}; its message says why")
            time.sleep(0.05)
        missing = heart.missing(before)
    except dist.DistError:
        missing = f"{STOPPED}: rank 0, which keeps the store of the group, is gone or hangs"
    if not missing:
        return None
    return LostError(
        f"{where()[0]}: {missing}; this rank waits {faults.timeout_seconds:g} s at most "
        "(faults.timeout_seconds): look at that rank's messages and machine, then start the same "
        "command again"
    )
