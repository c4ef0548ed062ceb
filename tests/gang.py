"""Several real ranks on this machine: gloo processes that run one function together."""

import io
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from trainer import ranks

# The heavy imports happen once, in the process that all ranks are forked from.
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preload"])


def gang(world: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """What `function(*args)` returns on each of `world` ranks, in order.

    `function` stands at a module's top level. Raises AssertionError with the traceback of a rank
    that fails, or at the time-out; no process outlives the call.
    """
    port = _free_port()
    call = _packed((function, args))
    readers: list[Any] = []
    processes = []
    try:
        for rank in range(world):
            reader, writer = Pipe(duplex=False)
            process = _CONTEXT.Process(target=_rank, args=(rank, world, port, writer, call))
            process.start()
            writer.close()
            readers.append(reader)
            processes.append(process)
        return _answers(readers, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answers(readers: list[Connection], deadline: float) -> list[Any]:
    answers: dict[int, Any] = {}
    while len(answers) < len(readers):
        missing = [reader for rank, reader in enumerate(readers) if rank not in answers]
        ready = wait(missing, max(deadline - time.monotonic(), 0))
        late = [rank for rank, reader in enumerate(readers) if reader in missing]
        assert ready, f"time-out: no answer from ranks {late} of {len(readers)}"
        heard = {rank: _answer(reader) for rank, reader in enumerate(readers) if reader in ready}
        # The first to fail is always among them: the others fail because it left.
        failed = [f"rank {rank} {value}" for rank, (done, value) in heard.items() if not done]
        assert not failed, "\n".join(failed)
        answers |= {rank: value for rank, (_, value) in heard.items()}
    return [answers[rank] for rank in range(len(readers))]


def _answer(reader: Connection) -> tuple[bool, Any]:
    try:
        return _unpacked(reader.recv_bytes())
    except EOFError:
        return False, "died without a word"


def _rank(rank: int, world: int, port: int, writer: Connection, call: bytes) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        function, args = _unpacked(call)
        ranks.start()
        answer = (True, function(*args))
        ranks.stop()
    except BaseException:
        answer = (False, f"failed:\n{traceback.format_exc()}")
    writer.send_bytes(_packed(answer))


def _packed(value: Any) -> bytes:
    """By value: a pipe alone would share a tensor's memory, with a process that may be gone."""
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def _unpacked(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
