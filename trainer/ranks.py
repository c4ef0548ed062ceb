"""Who this process is among all, and its device."""

import ctypes
import errno
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data_shards.errors import PASSING, LostError, UserError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h


@dataclass(frozen=True)
class FaultsConfig:
    """The `[faults]` section of a run file; it may be another one when a run is continued."""

    timeout_seconds: float = TIMEOUT.total_seconds()
    """How long a rank waits for the others before it ends and says who was missing. More than the
    longest work that the first rank does alone."""
    grace_seconds: float = 25.0
    """From SIGTERM to the end, saved or not. torchrun kills after 30, as Kubernetes does."""
    save_seconds: float = 3600.0
    """How long the ranks wait for a save whose disk is slow, as long as all of them live."""

    def __post_init__(self) -> None:
        if not 0 < self.save_seconds < 1e9:
            raise UserError(
                f"faults.save_seconds = {self.save_seconds:g}; it is above 0 and below 1e9"
            )
        if not (0 < self.timeout_seconds < 1e9 and 0 <= self.grace_seconds < 1e9):
            raise UserError(
                f"faults: timeout_seconds = {self.timeout_seconds:g} and grace_seconds = "
                f"{self.grace_seconds:g}; the first is above 0, the second not below, and both "
                "below 1e9"
            )


@dataclass(frozen=True)
class Ranks:
    """One process of a run."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    def seed(self, seed: int) -> None:
        """Start the device's generator anew. `torch.manual_seed` also asks for every kind of
        device that is not there, which takes a millisecond and a half."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def broadcast(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def agree(self, slot: torch.Tensor) -> tuple[int, ...]:
        """The slots of all ranks' rows, those of rows without an adapter (-1) left out."""
        mine = torch.unique(slot[slot >= 0])
        last = torch.tensor(int(mine[-1]) + 1 if len(mine) else 0)
        dist.all_reduce(last, op=dist.ReduceOp.MAX)
        found = torch.zeros(int(last), dtype=torch.uint8)
        found[mine.cpu()] = 1
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return tuple(found.nonzero()[:, 0].tolist())

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, whether it is up on some rank; one all-reduce of as many bytes."""
        if self.world == 1:
            return flags
        votes = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return tuple(votes.bool().tolist())

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order, on every rank."""
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value)
        return box


def together(ranks: Ranks, where: Path | str, act: Callable[[], T]) -> list[T]:
    """What `act` gives on every rank; if it fails on one, all raise its error and none waits."""
    result, problem, kind = None, None, UserError
    try:
        result = act()
    except UserError as error:
        problem, kind = str(error), type(error)
    except OSError as error:
        problem = f"{where}: {error.strerror or error}; "
        if error.errno is None or error.errno in PASSING:  # none: of a store or a socket
            problem += "what was saved before is whole, and the same command goes on from there"
            kind = LostError
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem += "free some space, and start the same command again"
        else:
            problem += "give it rights, or set another output"
    gathered = ranks.gather((result, problem, kind))
    for _, other, kind in gathered:
        if other is not None:
            raise kind(other)
    return [value for value, *_ in gathered]


def start(faults: FaultsConfig | None = None) -> Ranks:
    """Join the process group that torchrun describes, or be a group of one without it."""
    timeout = timedelta(seconds=(faults or FaultsConfig()).timeout_seconds)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)
    if "MASTER_ADDR" not in os.environ:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    keep_freed_memory()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timeout)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def keep_freed_memory() -> None:
    """Reuse the memory of large tensors. glibc gives it back to the system at once, and every step
    pays for fresh pages: a fifth of its CPU time with the 256-128-64 MLP and batches of 4,096.

    One arena for all threads: what the threads that read ahead free, they find again (a sixth of
    the loader's CPU time, and half of its memory)."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest that it takes
        libc.mallopt(M_TRIM_THRESHOLD, 512 << 20)
        libc.mallopt(M_ARENA_MAX, 1)


def stop() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()
