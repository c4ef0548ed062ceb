"""What `launch run` refuses before any rank is started, each in one line."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_shards import Reading
from launch.__main__ import main
from launch.run import Nodes, _ranks, _set_environment


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another program has."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield listener.getsockname()[1]


MISTAKES = {
    "--ranks 3": "global batch 64 is not divisible by 3 ranks; set it to 63 or 66",
    "--ranks 8": "number of lanes 4 is not divisible by 8 ranks",
    "--ranks some": "--ranks some: give a number of 1 or more, or auto",
    "--ranks 0": "--ranks 0: give a number of 1 or more, or auto",
    "--nodes two": "--nodes two: give a number such as 4, or a range such as 2:4",
    "--nodes 4:2": "--nodes 4:2: give a number",
    "--nodes 2": "--nodes 2: no node to meet at; give the first node's name or address",
    "--nodes 2 --host localhost --node-rank 2": "of 2 nodes the ranks are 0 to 1, one each",
    "--nodes 3 --host localhost --node-rank 1 --ranks 1": "not divisible by 3 ranks",
    "--nodes 2:4 --host localhost --node-rank 1 --ranks 1": "not divisible by 3 ranks",
    "--nodes 2 --host localhost --port {taken}": "port {taken} of this node cannot be had (Address",
}


@pytest.mark.parametrize("given", MISTAKES)
def test_a_mistake_is_one_line(
    given: str, toy: Path, taken: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(toy / "run.toml"), *given.format(taken=taken).split()]) == 2
    told = capsys.readouterr().err
    assert MISTAKES[given].format(taken=taken) in told and told.count("\n") == 1


def test_a_host_that_is_not_there_yet_is_worth_another_start(
    toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = "--nodes 2 --host nowhere.invalid --node-rank 1 --patience 0"
    assert main(["run", str(toy / "run.toml"), *given.split()]) == 1
    assert "no such host after 0 s" in capsys.readouterr().err


def test_nodes_that_do_not_meet_are_told(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = "--nodes 2 --host localhost --node-rank 0 --patience 2 --ranks 1 --port 29417"
    assert main(["run", str(toy / "run.toml"), *given.split()]) == 1, "another start may do better"
    assert "localhost:29417: the nodes did not meet within 2 s" in capsys.readouterr().err


def test_ranks_of_a_machine_divide_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)))
    reading = Reading(global_batch=96, lanes=12)
    assert _ranks("auto", Nodes.parse("1"), reading) == 6
    assert _ranks("auto", Nodes.parse("2"), reading) == 6
    assert _ranks("auto", Nodes.parse("4"), reading) == 3


def test_what_somebody_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        _set_environment()
        assert os.environ["OMP_NUM_THREADS"] == "5"
        assert os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
