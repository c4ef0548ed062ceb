"""Ranks that are killed, told to go, or hang: the run ends as it would have, or says who hung."""

import math
import os
import re
import signal
import time
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data_shards import UserError
from launch import group
from launch.drilled import Death, Toll
from tests.gang import _free_port, gang
from tests.toy_run import digests, here, recording, toy_config
from trainer import heartbeat, preemption, ranks, saving
from trainer.checkpoint import Snapshot
from trainer.config import TrackingConfig
from trainer.engine import Engine, EngineConfig
from trainer.log import RunLog
from trainer.model import Model
from trainer.preemption import PreemptedError
from trainer.ranks import FaultsConfig
from trainer.run_folder import RunFolder
from trainer.saving import Saver, step_name
from trainer.schedule import train
from trainer.tensor_file import write_file

pytestmark = pytest.mark.dist

CUT = 17
SETTINGS = (
    *("adapt.min_rows=80", "adapt.max_epochs=2"),
    *("pretrain.checkpoint_every=5", "adapt.checkpoint_every=5"),
)
LEARNED = ("trunk", "adapters")


def _run(toy: Path, output: Path, name: str) -> dict[str, Any]:
    summary = train(toy_config(toy, output, f"name={name}", *SETTINGS), here())
    return {**summary, "pretrain_seconds": None}


def _digests(run: Path) -> dict[str, str]:
    """Of all that was learned, without the files that hold seconds and the hidden folders of saves
    that were cut off."""
    times = ("state.json", "manifest.json", "adapter.json")
    found = digests(run, LEARNED)
    return {k: v for k, v in found.items() if not k.endswith(times) and "/." not in k}


@pytest.fixture(scope="module")
def whole(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The summary and the folder of a run that nothing has disturbed."""
    output = tmp_path_factory.mktemp("whole")
    return gang(2, _run, toy, output, "run")[0], output / "run"


# What rank 1 does not live to do in each start.
DEATHS = [
    Death("read", 2, rank=1),
    Death("step", 8, rank=1),  # the tables have moved, the dense part has not
    Death("save", 3, rank=1),
    Death("evaluation", 2, rank=1),
    Death("save", 10, rank=0),
    Death("step", 2, rank=1),  # of an adapter
]


def _killed(toy: Path, output: Path, death: Death) -> None:
    toll = Toll(death if here().rank == death.rank else None, lambda death: None)
    toll.listen()
    _run(toy, output, "run")
    raise AssertionError(f"lived through {toll.counts}")


def test_a_rank_killed_anywhere_changes_no_bit(
    toy: Path, tmp_path: Path, whole: tuple[dict[str, Any], Path]
) -> None:
    for death in DEATHS:
        with pytest.raises(AssertionError, match=f"rank {death.rank} died without a word"):
            gang(2, _killed, toy, tmp_path, death)
    [summary, _] = gang(2, _run, toy, tmp_path, "run")
    assert summary == whole[0]
    assert _digests(tmp_path / "run") == _digests(whole[1])


def _told_to_go(toy: Path, output: Path, phase: str) -> tuple[str, int]:
    """What a run says when one of its ranks gets SIGTERM in this phase, and its last step."""

    def tell(at: int) -> None:
        if heartbeat.where() == (phase, CUT % 16 + 1) and not here().first:
            os.kill(os.getpid(), signal.SIGTERM)
            while not preemption.asked():
                time.sleep(0.001)

    with preemption.listening(60), recording(tell) as steps:
        with pytest.raises(PreemptedError) as stopped:
            _run(toy, output, "run")
    return str(stopped.value), steps[0].at if steps else -1


def _told_to_go_in_an_evaluation(toy: Path, output: Path) -> tuple[str, int]:
    """What a run says when one of its ranks gets SIGTERM in its first evaluation, and the batches
    that this rank still scores."""
    scored, logits = 0, Model.logits

    def tell(*given: Any) -> torch.Tensor:
        nonlocal scored
        scored += preemption.saves()
        if preemption.saves() and not here().first:
            os.kill(os.getpid(), signal.SIGTERM)
            while not preemption.asked():
                time.sleep(0.001)
        return logits(*given)

    with pytest.MonkeyPatch.context() as patch, preemption.listening(60):
        patch.setattr(Model, "logits", tell)
        with pytest.raises(PreemptedError) as stopped:
            _run(toy, output, "run")
    return str(stopped.value), scored


def test_sigterm_saves_on_all_ranks_and_loses_no_step(
    toy: Path, tmp_path: Path, whole: tuple[dict[str, Any], Path]
) -> None:
    assert (
        gang(2, _told_to_go, toy, tmp_path, "pretrain") == [("pretrain: saved after step 1", 0)] * 2
    )
    said = gang(2, _told_to_go_in_an_evaluation, toy, tmp_path)
    assert said == [("pretrain: saved after step 13, before its evaluation", 1)] * 2
    said = gang(2, _told_to_go_in_an_evaluation, toy, tmp_path)
    assert said == [("pretrain: saved after step 13, before its evaluation", 1)] * 2, "again there"
    said = gang(2, _told_to_go, toy, tmp_path, "adapt books")
    assert said == [("adapt books: saved after step 1", 13)] * 2, (
        "13 steps were saved, none is lost"
    )
    [summary, _] = gang(2, _run, toy, tmp_path, "run")
    assert summary == whole[0]
    assert _digests(tmp_path / "run") == _digests(whole[1])
    # by a start that was cut off when its adapter was stored: a domain added anew would go on there
    left = RunFolder(tmp_path / "run").adapters.home("mlora", "books") / "adapting" / step_name(1)
    left.mkdir(parents=True)
    gang(2, _run, toy, tmp_path, "run")
    assert not left.exists()


def _signalled(does: str) -> None:
    """Gets SIGTERM, and hangs then: before it saves, or after it, as where a dashboard does not
    take the last lines."""
    with preemption.listening(0.1), preemption.saving():
        if does == "nothing":
            preemption._saves.clear()
        try:
            with preemption.saving() if does == "saved" else nullcontext():
                os.kill(os.getpid(), signal.SIGTERM)
                if does == "saved":
                    raise PreemptedError
        finally:
            time.sleep(30)


def test_what_failed_while_it_would_have_saved_is_not_asked_again() -> None:
    preemption._asked.set()
    with suppress(ValueError), preemption.saving():
        assert preemption.asked()
        raise ValueError
    preemption.forget()
    assert not preemption.asked()
    preemption._asked.clear()


@pytest.mark.parametrize(("does", "status"), [("nothing", 75), ("saves", 143), ("saved", 75)])
def test_sigterm_ends_a_process_in_time_whatever_it_does(does: str, status: int) -> None:
    child = os.fork()
    if child == 0:
        with suppress(PreemptedError):
            _signalled(does)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status


def _hangs(how: str, port: int, root: Path) -> None:
    """Rank 1 never comes to the second collective, or stops in the last save of a phase."""
    ranks.stop()
    os.environ["MASTER_PORT"] = str(port)
    group.PATIENCE, heartbeat.EVERY = 1.0, 0.1
    with group.joined(FaultsConfig(timeout_seconds=2)) as mine:
        heartbeat.at("pretrain", 7)
        dist.all_reduce(torch.ones(1))
        time.sleep(0.3)
        if how == "saving":
            _stops_in_its_last_save(root)
        if how == "training":
            _stops_in_a_step()
        if how == "asleep":
            _saves_behind(root)
        if not mine.first and how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if not mine.first:
            time.sleep(60)
        dist.all_reduce(torch.ones(1))


def _stops_in_a_step() -> None:
    module = torch.nn.Linear(2, 1)
    engine = Engine(module, [*module.parameters()], EngineConfig(zero_stage=1), 0.1, 0.0, 1)
    loss = engine._engine(torch.ones(1, 2)).sum()
    time.sleep(0 if here().first else 60)
    engine.backward(loss)


def _stops_in_its_last_save(root: Path) -> None:
    def stop(path: Path, content: Iterable[Any]) -> str:
        if not here().first:
            os.kill(os.getpid(), signal.SIGSTOP)
        return write_file(path, content)

    saving.write_file = stop
    log = RunLog(False, root, TrackingConfig(wandb="disabled"), "toy")
    with Saver(root, here(), [], 2, log, faults=FaultsConfig(timeout_seconds=2)) as saver:
        saver.save(7, Snapshot({"w": torch.zeros(1)}, {}))


def _saves_behind(root: Path) -> None:
    """The first rank's disk is the slower one: its thread has begun fewer collectives."""

    def slow(path: Path, content: Iterable[Any]) -> str:
        time.sleep(60 if here().first else 0)
        return write_file(path, content)

    saving.write_file = slow
    log = RunLog(False, root, TrackingConfig(wandb="disabled"), "toy")
    Saver(root, here(), [], 2, log).save(7, Snapshot({"w": torch.zeros(1)}, {}))


HANGS = {
    "stopped": "pretrain: no sign of life of",
    "asleep": "pretrain: the others wait for",
    "training": "pretrain: the others wait for",
    "saving": "the save of step 7 is not through after .* s: no sign of life of",
}


@pytest.mark.parametrize("how", HANGS)
def test_what_hangs_ends_and_names_who_was_missing(how: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as failed:
        gang(2, _hangs, how, _free_port(), tmp_path)
    wanted = rf"{HANGS[how]} rank 1 \(pretrain, step 7; last heard \d+ s ago\); (this rank|the che)"
    assert re.search(wanted, str(failed.value))
    assert "LostError" in str(failed.value), "so that whatever started it starts it again"


def test_restarts_need_a_store_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(UserError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's"):
        with group.joined():
            pass


def test_times_of_faults_are_positive() -> None:
    with pytest.raises(UserError, match="timeout_seconds = 0 and grace_seconds = 25; the first is"):
        FaultsConfig(timeout_seconds=0)
    with pytest.raises(UserError, match="timeout_seconds = inf and .* and both below 1e9"):
        FaultsConfig(timeout_seconds=math.inf)
    with pytest.raises(UserError, match=r"faults.save_seconds = 0; it is above 0 and below 1e9"):
        FaultsConfig(save_seconds=0)
