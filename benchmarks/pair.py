"""Ranks in processes of their own, a thread each, that step when this process asks them to."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch

from benchmarks.measure import where_time_goes
from benchmarks.sides import Setting, phase_1
from trainer import ranks as groups
from trainer.config import RunConfig
from trainer.trunk import new_trunk


@contextmanager
def group_of(world: int, run: RunConfig) -> Iterator[Callable[[str], str]]:
    """So many processes beside this one; asked together, they step, and the first one answers."""
    context = get_context("spawn")
    pipes = [context.Pipe() for _ in range(world)]
    port = free_port()
    processes = [
        context.Process(target=one_of, args=(rank, world, port, run, pipe), daemon=True)
        for rank, (_, pipe) in enumerate(pipes)
    ]
    for process, (_, theirs) in zip(processes, pipes, strict=True):
        process.start()
        theirs.close()  # else a process that dies would leave this one waiting

    def ask(what: str) -> str:
        for pipe, _ in pipes:
            pipe.send_bytes(what.encode())
        return [pipe.recv_bytes() for pipe, _ in pipes][0].decode()

    try:
        ask("step")
        yield ask
    finally:
        for process in processes:
            process.kill()
            process.join()


def one_of(rank: int, world: int, port: int, run: RunConfig, pipe: Connection) -> None:
    size, number = str(world), str(rank)
    os.environ |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size}
    os.environ |= {"LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    setting = Setting(run, groups.start(), 0)
    loader = setting.loader()
    side = phase_1(new_trunk(run, setting.ranks, loader.indexes[0])).from_shards(loader)
    while True:
        profiled = pipe.recv_bytes() == b"profile"
        answer = where_time_goes(side) if profiled else side.run()
        pipe.send_bytes(str(answer).encode())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
