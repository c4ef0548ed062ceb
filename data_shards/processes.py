"""Pieces done by several processes, with a count of rows that all of them add to."""

import time
from collections.abc import Callable
from concurrent.futures import (
    BrokenExecutor,
    Executor,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized

import pyarrow as pa

from data_shards.errors import InterruptedWriteError
from data_shards.pieces import Job, Tick

Progress = Callable[[str], None]
Stage = Callable[[Job, int, Tick], None]
SAY_EVERY = 5.0  # seconds
_context = get_context("forkserver")


def do_pieces(
    name: str, act: Stage, job: Job, todo: list[int], jobs: int, rows: int | None, say: Progress
) -> None:
    """`act` on each of these pieces, `jobs` at a time; `rows` is what they hold, where known."""
    done = _context.Value("q", 0)
    with _executor(min(jobs, len(todo)), done) as pool:
        futures = {pool.submit(_act, act, job, piece) for piece in todo}
        bar = _Bar(name, rows, say)
        try:
            while futures:
                finished, futures = wait(futures, timeout=0.2, return_when="FIRST_COMPLETED")
                for future in finished:
                    future.result()
                bar.show(done.value)
        except BrokenExecutor:
            raise InterruptedWriteError(
                "a writing process was killed, perhaps for want of memory; "
                "start the same command again with fewer --jobs"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_rows_done: "Synchronized[int] | None" = None


def _executor(jobs: int, done: "Synchronized[int]") -> Executor:
    if jobs <= 1:
        return ThreadPoolExecutor(1, "write", initializer=_begin, initargs=(done, 0))
    return ProcessPoolExecutor(jobs, _context, initializer=_begin, initargs=(done, 1))


def _begin(done: "Synchronized[int]", threads: int) -> None:
    global _rows_done
    _rows_done = done
    if threads:  # one of several processes: they share the cores
        pa.set_cpu_count(threads)
        pa.set_io_thread_count(threads)


def _act(act: Stage, job: Job, piece: int) -> None:
    act(job, piece, _tick)


def _tick(rows: int) -> None:
    assert _rows_done is not None
    with _rows_done.get_lock():
        _rows_done.value += rows


class _Bar:
    """A line with rate and time left, every few seconds."""

    def __init__(self, what: str, total: int | None, say: Progress) -> None:
        self.what, self.total, self.say = what, total, say
        self.start = self.shown = time.monotonic()

    def show(self, rows: int) -> None:
        now = time.monotonic()
        if now - self.shown < SAY_EVERY:
            return
        self.shown = now
        rate = rows / (now - self.start)
        line = f"{self.what}: {rows:,} rows, {rate:,.0f} rows/s"
        if self.total and rate:
            line += f", {max(self.total - rows, 0) / rate:,.0f} s left"
        self.say(line)
