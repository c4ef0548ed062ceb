"""Nodes that may come and go: `launch run --nodes 1:2`, an agent of which is lost in training."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from launch.drill_round import Round
from launch.drilled import LEDGER, Death, Ledger, Toll, keep_ledgers
from tests.gang import _CONTEXT, _free_port, gang
from tests.test_run import _run_quietly
from tests.toy_run import here, toy_config
from trainer.schedule import train

pytestmark = pytest.mark.dist

SHORT = ("phases=['pretrain']", "pretrain.max_epochs=1", "pretrain.checkpoint_every=4")
SAVED, LOST = 4, 7  # the last checkpoint's step, and the one in which the node goes


class _Node:
    """`launch run` with one rank, on this machine. One that is lost gets its SIGKILL in a step."""

    def __init__(self, toy: Path, folder: Path, port: int, lost: bool) -> None:
        words = ["run", str(toy / "run.toml"), "--nodes", "1:2", "--ranks", "1"]
        words += ["--max-restarts", "1", "--host", "127.0.0.1", "--port", str(port)]
        words += [word for one in (*SHORT, f"output={folder}") for word in ("--set", one)]
        self._log = folder / f"log-{lost}"
        self.process: BaseProcess = _CONTEXT.Process(
            target=_agent, args=(folder, words, self._log, lost)
        )
        self.process.start()

    def end(self) -> int | None:
        self.process.join(240)
        return self.process.exitcode

    def told(self) -> str:
        return self._log.read_text(encoding="utf-8")


def _agent(folder: Path, words: list[str], log: Path, lost: bool) -> None:
    keep_ledgers(folder / LEDGER)
    if lost:  # with its rank, which is of this process
        Toll(Death("step", LOST, rank=0, agent=True), lambda death: None).listen()
    _run_quietly(words, log)


@contextmanager
def _nodes(toy: Path, folder: Path, lost: tuple[bool, bool]) -> Iterator[list[_Node]]:
    """Two of them; the first keeps the store that they meet at."""
    port, nodes = _free_port(), []
    try:
        for one in lost:
            nodes.append(_Node(toy, folder, port, one))
            _await_store(port)
        yield nodes
    finally:
        for node in nodes:
            node.process.kill()
            node.process.join()


def _await_store(port: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    raise AssertionError("the first node opened no store")


def _alone(toy: Path, folder: Path) -> None:
    Ledger(folder / LEDGER, 0, 0).keep()
    train(toy_config(toy, folder, *SHORT), here())


def _starts(folder: Path) -> list[int]:
    """How many ranks each start had; its number is its time."""
    found = [path.stem.split("-")[0] for path in sorted((folder / LEDGER).iterdir())]
    return [found.count(start) for start in dict.fromkeys(found)]


def test_a_run_goes_on_without_a_node_that_is_lost(toy: Path, tmp_path: Path) -> None:
    two, alone = tmp_path / "two", tmp_path / "alone"
    two.mkdir()
    with _nodes(toy, two, lost=(False, True)) as (stays, goes):
        assert (goes.end(), stays.end()) == (-9, 0), stays.told()
    assert f"continues from step-{SAVED:010}" in stays.told()
    assert (two / "toy" / "summary.json").exists()
    gang(1, _alone, toy, alone)
    assert _starts(two) == [2, 1]
    found, wanted = (Round(Path("unused"), [], folder, 1, []).steps() for folder in (two, alone))
    assert found[0] == wanted[0], "each step has the rows that one rank alone would have read"
    again = [at for start, at in found[1] if start == max(found[1])[0]]
    assert len(again) == len(wanted[0]) - SAVED, "no step before the checkpoint was taken again"


def test_a_lost_first_node_is_not_taken_for_one_that_never_came(toy: Path, tmp_path: Path) -> None:
    with _nodes(toy, tmp_path, lost=(True, False)) as (goes, stays):
        assert (goes.end(), stays.end()) == (-9, 1), stays.told()
    assert "the nodes had met, but the first one, by which they find each other" in stays.told()
    assert "did not meet" not in stays.told()
