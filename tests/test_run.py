"""What `launch run` refuses before any rank is started, each in one line."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import DistNetworkError
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousTimeoutError,
)

from data_shards import Reading
from launch.__main__ import main
from launch.nodes import Nodes
from launch.run import _agreed, _ranks, _set_environment
from tests.gang import _CONTEXT
from trainer import preemption

ROOT = Path(__file__).parents[1]


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


# 192.0.2.1 is nobody's: a first node whose machine is not there yet.
APART = {
    "--nodes 2 --host localhost": "localhost:29417: the nodes did not meet within 2 s",
    "--nodes 2:4 --host localhost": "(RendezvousTimeoutError); look whether all 2:4 were started",
    "--nodes 2 --host 192.0.2.1 --node-rank 1 --max-restarts 1": "did not meet within 2 s (The con",
}


TWELVE = ("--set", "reading.lanes=12", "--set", "reading.global_batch=48")


@pytest.mark.timeout(50)  # torch's own patience is 60 s or more
@pytest.mark.parametrize("given", APART)
def test_nodes_that_do_not_meet_are_told_when_patience_ends(
    given: str, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given += " --patience 2 --ranks 1 --port 29417"
    assert main(["run", str(toy / "run.toml"), *TWELVE, *given.split()]) == 1
    told = capsys.readouterr().err
    assert APART[given.split(" --patience")[0]] in told


# What torch raises, whether ranks were started before, and what is said of it.
LATER = [
    (
        RendezvousConnectionError("The connection"),
        False,
        "did not meet within 9 s (The connection)",
    ),
    (RendezvousTimeoutError(), False, "did not meet within 9 s (RendezvousTimeoutError)"),
    (RendezvousConnectionError("The connection"), True, "had met, but the first one, by which"),
    (DistNetworkError("reset"), True, "had met, but the first one, by which they find each other"),
    (RendezvousTimeoutError(), True, "but after a loss fewer than 2 of them met again within 9 s"),
    (RendezvousClosedError(), True, "the run has ended on the other nodes, or was given up there"),
    (RendezvousClosedError(), False, "the run has ended on the other nodes, or was given up there"),
]


@pytest.mark.parametrize(("error", "met", "wanted"), LATER)
def test_nodes_that_had_met_are_told_apart_from_those_that_did_not(
    error: Exception,
    met: bool,
    wanted: str,
    toy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def launched(config: Any, _: Any) -> Any:
        def start(*args: Any) -> None:
            if met:
                (Path(config.logs_specs.root_log_dir) / "toy" / "attempt_0").mkdir(parents=True)
            raise error

        return start

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", launched)
    given = "--nodes 2:4 --host localhost --patience 9 --ranks 1 --max-restarts 1"
    assert main(["run", str(toy / "run.toml"), *TWELVE, *given.split()]) == 1
    told = capsys.readouterr().err
    assert "error: localhost:29400: " in told and wanted in told and told.count("\n") == 1


def test_ranks_of_a_machine_divide_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)))
    reading = Reading(global_batch=96, lanes=12)
    assert _ranks("auto", Nodes.parse("1"), reading) == 6
    assert _ranks("auto", Nodes.parse("2"), reading) == 6
    assert _ranks("auto", Nodes.parse("4"), reading) == 3


def test_no_torch_before_a_verb_asks_for_it() -> None:
    """`run` sets up first what torch reads when it comes; and verbs without it start in less."""
    check = "import sys, launch.__main__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


def test_what_somebody_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        _set_environment()
        assert os.environ["OMP_NUM_THREADS"] == "5"
        assert os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def _run_quietly(words: list[str], log: Path) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.exit(main(words))


@pytest.mark.dist
def test_sigterm_to_the_agent_ends_with_75_where_all_ranks_have_saved(
    toy: Path, tmp_path: Path
) -> None:
    settings = (
        f"output={tmp_path}",
        "pretrain.max_epochs=9999",
        "pretrain.patience=9999",
        "pretrain.checkpoint_every=5",
    )
    words = ["run", str(toy / "run.toml"), "--ranks", "2"]
    words += [word for one in settings for word in ("--set", one)]
    agent = _CONTEXT.Process(target=_run_quietly, args=(words, tmp_path / "log"))
    agent.start()
    while agent.is_alive() and not (tmp_path / "toy" / "checkpoints" / "latest").exists():
        time.sleep(0.1)
    agent.terminate()
    agent.join()
    told = (tmp_path / "log").read_text()
    assert agent.exitcode == 75, told
    assert "stopped by SIGTERM: pretrain: saved after step" in told


def test_a_rank_that_has_not_saved_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, status in enumerate((75, 75, 143)):
        monkeypatch.setenv(preemption.STATUS, str(tmp_path / f"status-{rank}"))
        preemption.tell(status)
        assert _agreed(tmp_path, 3, 128 + signal.SIGTERM) == 143
    assert _agreed(tmp_path, 4, 1) == 1, "one was killed"
    preemption.tell(75)
    assert _agreed(tmp_path, 3, 128 + signal.SIGTERM) == 75
