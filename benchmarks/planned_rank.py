"""`launch train` with scales, for some steps: `python -m benchmarks.planned_rank train RUN_FILE`

BANYAN_PLANNED names a folder, where each rank leaves what its steps took: bytes that are live when
forward ends and at the most, both above those at the step's begin; bytes over the loopback, which
is that of a network of its own; seconds. No line of the product knows of it.
"""

import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = "BANYAN_PLANNED"
WEIGHED, FIRST, STEPS = 3, 5, 20  # the step whose memory is weighed; those that are timed


@dataclass(frozen=True)
class Taken:
    """By one rank; `sent` is of all ranks, a step."""

    forward: int
    peak: int
    sent: float
    seconds: float


class MeasuredError(BaseException):
    """There is nothing more to see."""


class Scales:
    """Around the steps of a rank."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._forward = self._peak = self._forward_ended = 0
        self._sent, self._began = 0, 0.0

    def listen(self) -> None:
        """From now on."""
        from trainer.engine import Engine
        from trainer.fit import Trainee

        step, backward = Trainee.step, Engine.backward

        def scaled(*args: Any) -> Any:
            self._count += 1
            if self._count == FIRST:
                self._begin()
            if self._count == FIRST + STEPS:
                self._end()
            return self._weigh(step, args) if self._count == WEIGHED else step(*args)

        def noted(*args: Any) -> Any:
            self._forward_ended = time.time_ns()
            return backward(*args)

        Trainee.step, Engine.backward = scaled, noted  # pyright: ignore[reportAttributeAccessIssue]

    def _weigh(self, step: Any, args: Any) -> Any:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            loss = step(*args)
        events = found.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
        moves = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        live = 0
        for at, size in moves:
            live += size
            self._peak = max(self._peak, live)
            if at < self._forward_ended:
                self._forward = live
        return loss

    def _begin(self) -> None:
        self._meet()
        self._sent, self._began = _sent(), time.monotonic()

    def _end(self) -> None:
        self._meet()
        seconds, sent = time.monotonic() - self._began, _sent() - self._sent
        self._meet()  # or the first to read would be gone with bytes of the others
        taken = Taken(self._forward, self._peak, sent / STEPS, seconds / STEPS)
        path = self._folder / os.environ["RANK"]
        path.write_text(json.dumps(asdict(taken)), encoding="utf-8")
        raise MeasuredError

    def _meet(self) -> None:
        import torch.distributed as dist

        dist.barrier()


def _sent() -> int:
    """Bytes over the loopback so far; /proc has those of this process's own network."""
    lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    (loopback,) = [line.split(":")[1] for line in lines if line.strip().startswith("lo:")]
    return int(loopback.split()[8])


if __name__ == "__main__":
    from launch.__main__ import main

    Scales(Path(os.environ[FOLDER])).listen()
    with suppress(MeasuredError):
        sys.exit(main(sys.argv[1:]))
