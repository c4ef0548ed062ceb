"""`launch` with a clock, until the first step: `python -m benchmarks.started run|train RUN_FILE`

BANYAN_STARTED names a folder, where each rank leaves when it came to which part of its start, by
the clock and by its own processor time. After the first step of all ranks it ends. No line of the
product knows of it.
"""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

FOLDER = "BANYAN_STARTED"


class SteppedError(BaseException):
    """There is nothing more to see."""


def mark(part: str) -> None:
    """This process has come to the end of this part."""
    line = {"part": part, "time": time.time(), "cpu": time.process_time()}
    with (Path(os.environ[FOLDER]) / str(os.getpid())).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def marked(holder: Any, name: str, part: str) -> None:
    """From now on a mark comes after each call."""
    call = getattr(holder, name)

    def then_marked(*args: Any, **kwargs: Any) -> Any:
        found = call(*args, **kwargs)
        mark(part)
        return found

    setattr(holder, name, then_marked)


def listen() -> None:
    """In a rank, before it joins the others."""
    from trainer import ranks, schedule
    from trainer.fit import Trainee

    mark("libraries")
    marked(ranks, "start", "process group")
    marked(schedule, "new_trunk", "tables")
    step = Trainee.step

    def first(*args: Any) -> None:
        import torch.distributed as dist

        step(*args)
        mark("first step")
        dist.barrier()
        raise SteppedError

    Trainee.step = first  # pyright: ignore[reportAttributeAccessIssue]


def main() -> int:
    from launch import run
    from launch.__main__ import main as verb

    def rank(words: list[str]) -> None:
        mark("start of ranks")
        listen()
        with suppress(SteppedError):
            verb(words)

    if sys.argv[1] == "train":
        rank(sys.argv[1:])
        return 0
    run._rank = lambda agent, logs, words: rank(words)
    return verb(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
