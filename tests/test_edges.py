"""What is cut off, damaged or changed between two starts, at the places where a start could be
misled by what it finds: it comes to the same end, or says what was lost."""

import fcntl
import json
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pytest
import torch

from data_shards import UserError
from tests.gang import gang
from tests.toy_run import digests, here, recording, refused, toy_config
from trainer import adding, preemption, saving, schedule
from trainer.checkpoint import Snapshot
from trainer.config import RunConfig, TrackingConfig
from trainer.log import RunLog
from trainer.ranks import FaultsConfig
from trainer.run_folder import RunFolder
from trainer.saving import Saver, step_name
from trainer.tensor_file import write_file

pytestmark = pytest.mark.dist

EVALUATED, NEWEST, CUT, LAST = 13, 15, 17, 26
PLAIN = ("engine.zero_stage=0", "pretrain.checkpoint_every=5", "keep_checkpoints=99")


class _CutError(Exception):
    """Stands for whatever ends a process."""


def _one_phase(toy: Path, output: Path, name: str) -> RunConfig:
    phase = ("pretrain.one_phase=true", "phases=['pretrain']", "pretrain.max_epochs=1")
    return toy_config(toy, output, f"name={name}", *PLAIN, *phase)


def _cut_before_the_trunk(toy: Path, output: Path) -> dict[str, dict[str, str]]:
    """Files of the trunk and of the adapters of a one-phase run, left alone and cut between."""
    for name in ("whole", "cut"):
        config = _one_phase(toy, output, name)
        with pytest.MonkeyPatch.context() as patch:
            if name == "cut":
                patch.setattr(RunFolder, "save_trunk", _cut)
                with pytest.raises(_CutError):
                    schedule.train(config, here())
        schedule.train(config, here())
    return {name: digests(output / name, ("trunk", "adapters")) for name in ("whole", "cut")}


def _cut(*_: Any) -> None:
    raise _CutError


def _other_ids(toy: Path, output: Path) -> str:
    """What an added domain's second start says that has other ideas of its own ids."""
    config = _one_phase(toy, output, "whole")
    own = replace(config.adapt, own_ids=True, checkpoint_every=1)

    def cut(at: int) -> None:
        if at == 2:
            raise _CutError

    with recording(cut), pytest.raises(_CutError):
        _add(config, own, toy)
    return refused(lambda: _add(config, replace(own, own_ids=False), toy))


def _add(config: RunConfig, adapt: Any, toy: Path) -> dict[str, Any]:
    config = replace(config, adapt=adapt)
    return adding.add_domain(config, RunFolder(config.folder), "games", toy / "added", here())


def _told_where_nothing_is_saved(toy: Path, output: Path) -> tuple[list[Any], bool]:
    """What phase 2 without checkpoints says to SIGTERM, and whether it took that for saved."""
    config, left, gone = _one_phase(toy, output, "whole"), [], Event()

    def leave(*words: Any) -> None:
        left.append(words)
        gone.set()

    def tell(at: int) -> None:
        if at == 1:
            signal.raise_signal(signal.SIGTERM)
            assert gone.wait(30)

    with pytest.MonkeyPatch.context() as patch, preemption.listening(60), recording(tell):
        patch.setattr(preemption, "_leave", leave)
        try:
            _add(config, config.adapt, toy)
        except preemption.PreemptedError:
            return left, True
    preemption._asked.clear()  # for this process has not left
    RunFolder(config.folder).adapters.remove("mlora", "games")
    return left, False


def _told_in_the_last_save(root: Path) -> list[Any]:
    """With which words a process leaves that was told to in its last save, with no step after it,
    and which checkpoints are there then."""
    go, left = Event(), []

    def held(path: Path, content: Iterable[Any]) -> str:
        assert go.wait(60)
        return write_file(path, content)

    def leave(*words: Any) -> None:
        left.append((words, sorted(path.name for path in root.glob("step-*"))))

    log = RunLog(False, root, TrackingConfig(wandb="disabled"), "toy")
    with pytest.MonkeyPatch.context() as patch, preemption.listening(60):
        patch.setattr(saving, "write_file", held)
        patch.setattr(preemption, "_leave", leave)
        with preemption.saving(), Saver(root, here(), [], 9, log) as saver:
            saver.save(1, Snapshot({"w": torch.zeros(1)}, {}))
            signal.raise_signal(signal.SIGTERM)
            Timer(5 * preemption.LOOK, go.set).start()
        while not left:
            time.sleep(preemption.LOOK)
    preemption._asked.clear()  # for this process has not left
    return left


def _too_slow(root: Path) -> str:
    """What a phase says that ends while its last save is not through."""
    go = Event()

    def held(path: Path, content: Iterable[Any]) -> str:
        assert go.wait(60)
        return write_file(path, content)

    def end() -> None:
        with Saver(root, here(), [], 9, log, faults=FaultsConfig(save_seconds=0.1)) as saver:
            saver.save(1, Snapshot({"w": torch.zeros(1)}, {}))
            raise preemption.PreemptedError

    log = RunLog(False, root, TrackingConfig(wandb="disabled"), "toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "write_file", held)
        said = refused(end)
    go.set()
    return said


def _taken(toy: Path, output: Path) -> list[str]:
    """What a second start says while another process writes to the run's folder, and a second
    add-domain while another adds that domain."""
    config = toy_config(toy, output, "name=taken", "faults.timeout_seconds=0.4")
    whole = replace(_one_phase(toy, output, "whole"), faults=config.faults)
    home = whole.folder / "adapters" / "mlora" / "games"
    return [
        _beside_another(config.folder, lambda: schedule.train(config, here())),
        _beside_another(home, lambda: _add(whole, whole.adapt, toy)),
    ]


def _added_twice(toy: Path, output: Path) -> list[Any]:
    """What is found of a domain whose adding was cut off when its adapter was stored, and of one
    that was not; what adding it again says then, and which files its removal leaves."""
    config, found = _one_phase(toy, output, "whole"), []
    folder, steps = RunFolder(config.folder), replace(config.adapt, checkpoint_every=1)
    for cut in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if cut:
                patch.setattr(adding, "_summary", _cut)
                with pytest.raises(_CutError):
                    _add(config, steps, toy)
        summary = _add(config, steps, toy)
        home = folder.adapters.home("mlora", "games")
        assert json.loads((folder.path / "added" / "games.json").read_text()) == summary
        shown = {key: value for key, value in summary.items() if key != "seconds"}
        found.append((shown, _learned(home), sorted(path.name for path in home.iterdir())))
        twice = refused(lambda: _add(config, steps, toy))
        taken = _beside_another(home, lambda: folder.adapters.remove("mlora", "games"))
        folder.adapters.remove("mlora", "games")
        found.append((twice, taken, home.exists()))
    return found


def _learned(home: Path) -> dict[str, str]:
    files = digests(home, ("1",))
    return {name: digest for name, digest in files.items() if name != "1/adapter.json"}  # a time


def _beside_another(folder: Path, act: Callable[[], Any]) -> str:
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print("pid 7 on that machine", end="", file=lock, flush=True)
        return refused(act)


def _stories(toy: Path, output: Path) -> dict[str, Any]:
    return {
        "one phase": _cut_before_the_trunk(toy, output),
        "nothing saved": _told_where_nothing_is_saved(toy, output),  # before a cut while it saves
        "last save": _told_in_the_last_save(output / "saves"),
        "too slow": _too_slow(output / "slow"),
        "added twice": _added_twice(toy, output),
        "other ids": _other_ids(toy, output),
        "taken": _taken(toy, output),
    }


@pytest.fixture(scope="module")
def stories(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return gang(1, _stories, toy, tmp_path_factory.mktemp("edges"), timeout=300)[0]


def test_adapters_of_one_phase_are_stored_once_wherever_it_is_cut(stories: dict[str, Any]) -> None:
    whole, cut = stories["one phase"]["whole"], stories["one phase"]["cut"]
    assert cut.keys() == whole.keys() and any("/1/adapter.safetensors" in name for name in whole)
    assert not [name for name in whole if name.endswith("safetensors") and cut[name] != whole[name]]


def test_a_domain_whose_adding_was_cut_off_is_added_to_the_end(stories: dict[str, Any]) -> None:
    (whole, again), (cut, then) = stories["added twice"][:2], stories["added twice"][2:]
    assert cut == whole and whole[0]["moved"] == [] and whole[2] == [".lock", "1"]
    for twice, taken, left in (again, then):
        assert "'games' has an adapter" in twice and "remove it first: remove-domain" in twice
        assert "games: another process writes to it (pid 7 on that machine)" in taken
        assert not left


def test_own_ids_may_not_change_while_a_domain_learns(stories: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="adapt.own_ids = True, which is False now .*; set it as"):
        raise UserError(stories["other ids"])


def test_nobody_says_saved_where_nothing_is(stories: dict[str, Any]) -> None:
    said, taken_for_saved = stories["nothing saved"]
    assert not taken_for_saved
    begins = "adapt games: not saved, it begins anew; what was finished before it is stored"
    assert said == [(75, begins)]


def test_sigterm_in_the_last_save_waits_for_it(stories: dict[str, Any]) -> None:
    [((status, _), there)] = stories["last save"]
    assert (status, there) == (75, [step_name(1)])


def test_a_save_that_is_not_through_is_not_taken_for_saved(stories: dict[str, Any]) -> None:
    assert "the save of step 1 is not through after 0 s: a disk slower than" in stories["too slow"]
    assert "faults.save_seconds = 0.1 allows; the checkpoint before it" in stories["too slow"]


def test_a_folder_to_which_another_process_writes_is_left_alone(stories: dict[str, Any]) -> None:
    for folder, said in zip(("taken", "games"), stories["taken"], strict=True):
        wanted = rf"/{folder}: another .*\(pid 7 on that machine\); wait for it"
        with pytest.raises(UserError, match=wanted):
            raise UserError(said)
