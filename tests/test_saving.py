"""A save takes what was there when it was asked for, and wherever it is cut off, a checkpoint is
there to go back to."""

import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor

from data_shards import UserError
from embeddings import ShardedTables
from tests.gang import gang
from tests.toy_run import checkpoint_at, here, refused
from tests.toy_tables import config, toy_tables, train
from trainer import saving
from trainer.checkpoint import Snapshot, checked, newest
from trainer.config import TrackingConfig
from trainer.log import RunLog
from trainer.preemption import PreemptedError
from trainer.saving import Saver, step_name
from trainer.tensor_file import write_file

pytestmark = pytest.mark.dist

WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


class _DeadError(BaseException):
    """Stands for SIGKILL: nothing that comes after it reaches the disk either."""


class _Disk:
    """Counts file operations under a folder; from the `until`-th on none is done any more."""

    def __init__(self, root: Path) -> None:
        self.root, self.count, self.until = str(root), 0, sys.maxsize
        sys.addaudithook(self._audit)

    def life(self, until: int, act: Callable[[], None]) -> bool:
        """Whether `act` came to its end before its `until`-th operation."""
        self.count, self.until = 0, until
        try:
            act()
        except _DeadError:
            return False
        finally:
            self.until = sys.maxsize
        return True

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event in WATCHED and self.root in str(args[0]):
            self.count += 1
            if self.count >= self.until:
                raise _DeadError


def _save(root: Path, step: int, tables: ShardedTables) -> None:
    """As a thread of `Saver` does it, in this one."""
    ranks, snapshot = here(), Snapshot({"w": torch.full((3,), float(step))}, {"step": step})
    contents = saving.Contents.of(ranks, [tables], snapshot)
    saving._write(root / step_name(step), ranks, contents, step_name(step))
    saving._mark(root, step_name(step), step_name(step), ranks, 1)


def _cut_anywhere(root: Path) -> tuple[int, list[str]]:
    """Cut a third save at each of its file operations; how many these are, and what went wrong.

    Each time in a folder as it was before, with and without a third one that was given up.
    """
    tables, states, wrong = toy_tables(config()), {}, []
    for step in (9, 1, 2, 3):
        train(tables, [step])
        _save(root / "given_up" if step == 9 else root / "all" / str(step), step, tables)
        if step != 9:
            states[step_name(step)] = checkpoint_at(root / "all" / str(step) / step_name(step))[0]
    disk, cut, ended = _Disk(root / "live"), 0, False
    while not ended:
        cut += 1
        for given_up in (True, False):
            _before(root, given_up)
            ended = disk.life(cut, lambda: _save(root / "live", 3, tables))
            found = newest(root / "live", here(), wrong.append)
            if found is None or not _equal(found.folder, states[found.folder.name]):
                wrong.append(f"cut at {cut}: {found}")
            if ended and found and found.folder.name != step_name(3):
                wrong.append("not cut, and still not there")
            _save(root / "live", 4, tables)
            left = sorted(path.name for path in (root / "live").iterdir())
            wrong += [] if left == ["latest", step_name(4)] else left
    return cut, wrong


def _before(root: Path, given_up: bool) -> None:
    live = root / "live"
    shutil.rmtree(live, ignore_errors=True)
    for step in (1, 2):
        name = step_name(step)
        shutil.copytree(root / "all" / str(step) / name, live / name)
    (live / "latest").write_text(step_name(2))
    if given_up:
        shutil.copytree(root / "given_up" / step_name(9), live / step_name(3))


def _equal(folder: Path, state: dict[str, Tensor]) -> bool:
    tensors = checkpoint_at(folder)[0]
    same = tensors.keys() == state.keys()
    return same and all(torch.equal(tensors[key], state[key]) for key in state)


def test_a_save_cut_at_any_file_operation_leaves_a_checkpoint(tmp_path: Path) -> None:
    [(operations, wrong)] = gang(1, _cut_anywhere, tmp_path)
    assert not wrong
    assert operations > 20


def _while_training(root: Path) -> tuple[bool, bool, list[float]]:
    """A save that is held up until steps are taken after it."""
    tables, go, writes = toy_tables(config("row_wise")), Event(), []
    log = RunLog(False, root, TrackingConfig(wandb="disabled"), "toy")

    def held(path: Path, content: Iterable[Any]) -> str:
        assert go.wait(60)
        writes.append(path.parent.name)
        return write_file(path, content)

    train(tables, [0])
    whole = tables.whole()
    weights = torch.zeros(4)
    with pytest.MonkeyPatch.context() as patch, Saver(root, here(), [tables], 2, log) as saver:
        patch.setattr(saving, "write_file", held)
        saver.save(1, Snapshot({"w": weights}, {}))
        train(tables, [1, 2])
        weights += 1
        nothing_yet = not list(root.glob("step-*"))
        go.set()
        saver.save(2, Snapshot({"w": weights}, {}))
        first = checked(root / step_name(1), here())
    moved = not torch.equal(tables.whole()["user"], whole["user"])
    snapshot = first.load([tables])
    same = all(torch.equal(tables.whole()[key], part) for key, part in whole.items())
    return nothing_yet and moved, same, snapshot.tensors["w"].tolist()


def test_steps_after_a_save_do_not_change_it(tmp_path: Path) -> None:
    for went_on, same, weights in gang(2, _while_training, tmp_path):
        assert went_on and same and weights == [0.0] * 4


def _slow_and_full(root: Path) -> dict[str, Any]:
    """A slow disk, then one that is full on the last rank."""
    tables, ranks = toy_tables(config()), here()
    said: list[str] = []
    log = RunLog(False, root, TrackingConfig(wandb="disabled"), "toy")
    log.say = said.append  # type: ignore[method-assign]
    snapshot = Snapshot({"w": torch.zeros(1)}, {})

    def slow(path: Path, content: Iterable[Any]) -> str:
        time.sleep(0.6 if path.name.startswith("tables-") else 0)
        return write_file(path, content)

    def full(path: Path, content: Iterable[Any]) -> str:
        if ranks.rank == ranks.world - 1:
            raise OSError(28, "No space left on device")
        return write_file(path, content)

    told: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        saver = Saver(root, ranks, [tables], 9, log)
        patch.setattr(saving, "write_file", slow)
        for step in (1, 1, 2, 3):
            saver.save(step, snapshot)
        told["waited"] = saver.wait() > 0.3
        patch.setattr(saving, "write_file", full)
        saver.save(4, snapshot)
        train(tables, [0])
        told["full"] = refused(lambda: saver.save(5, snapshot))
        told["said"] = [line for line in said if "not saved" in line]
        told["full at the end"] = refused(lambda: _left_early(Saver(root, ranks, [tables], 9, log)))
    found = newest(root, ranks, print)
    told["left"] = found and found.folder.name
    told["there"] = sorted(path.name for path in root.iterdir())
    return told


def _left_early(saver: Saver) -> None:
    with saver:
        saver.save(6, Snapshot({"w": torch.zeros(1)}, {}))
        raise PreemptedError("saved after step 6")


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    first, second = gang(2, _slow_and_full, tmp_path_factory.mktemp("disks"))
    assert first == second
    return first


def test_a_slow_disk_is_waited_for_and_no_save_is_left_out(disks: dict[str, Any]) -> None:
    assert disks["waited"]
    assert disks["there"] == ["latest", *(step_name(step) for step in (1, 2, 3))]


def test_a_full_disk_stops_training_at_the_next_save(disks: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{step_name(4)}: No space left on device; free some"):
        raise UserError(disks["full"])
    assert "not saved, and training stops at the next save" in disks["said"][0]
    assert disks["left"] == step_name(3)


def _own_rows_that_come_and_go(root: Path) -> list[list[float]]:
    log = RunLog(False, root, TrackingConfig(wandb="disabled"), "toy")
    found = []
    with Saver(root, here(), [], 9, log) as saver:
        for step, rows in enumerate(([], [1.0, 2.0, 3.0], [4.0])):
            saver.save(step, Snapshot({"rows": torch.tensor(rows)}, {}))
            saver.wait()
            at = checked(root / step_name(step), here())
            found.append(at.load([]).tensors["rows"].tolist())
    return found


def test_a_tensor_may_have_another_size_in_the_next_save(tmp_path: Path) -> None:
    assert gang(1, _own_rows_that_come_and_go, tmp_path) == [[[], [1.0, 2.0, 3.0], [4.0]]]


def test_nobody_says_saved_where_the_last_save_failed(disks: dict[str, Any]) -> None:
    assert f"{step_name(6)}: No space left on device" in disks["full at the end"]


def _fallen_back(root: Path) -> dict[str, Any]:
    """What is found, and what is said, after each further damage."""
    tables, ranks, found = toy_tables(config()), here(), {}
    log = RunLog(False, root, TrackingConfig(wandb="disabled"), "toy")
    with Saver(root, ranks, [tables], 9, log) as saver:
        for step in (1, 2, 3, 4):
            saver.save(step, Snapshot({"w": torch.zeros(1)}, {}))

    def look(what: str, damage: Callable[[], Any]) -> None:
        said: list[str] = []
        if ranks.first:
            damage()
        ranks.gather(None)
        try:
            newest_one = newest(root, ranks, said.append)
            found[what] = (newest_one and newest_one.folder.name, said)
        except UserError as error:
            found[what] = (str(error), said)
        ranks.gather(None)

    def cut(step: int) -> None:
        (root / step_name(step) / "tables-00001.safetensors").write_bytes(b"")

    look("whole", lambda: None)
    look("gone back", lambda: (root / "latest").write_text(step_name(2)))
    look("gone back to a damaged one", lambda: cut(2))
    look("damaged", lambda: ((root / "latest").write_text(step_name(4)), cut(4)))
    look("latest away", lambda: (root / "latest").unlink())
    look("latest upwards", lambda: (root / "latest").write_text("../step-1"))
    look("latest a folder", lambda: ((root / "latest").unlink(), (root / "latest").mkdir()))
    look("a folder away", lambda: (root / "latest").rmdir())
    look("latest lost", lambda: (root / "latest").write_text(step_name(7)))
    manifest = root / step_name(4) / "manifest.json"
    written = manifest.read_text()
    look("newer", lambda: manifest.write_text(written.replace('"format": 3', '"format": 4')))
    ranks.gather(None)
    look("as before", lambda: manifest.write_text(written))
    look("none", lambda: [cut(step) for step in (1, 2, 3, 4)])
    return found


def test_the_newest_whole_checkpoint_is_found_and_what_was_not_is_said(tmp_path: Path) -> None:
    first, second = gang(2, _fallen_back, tmp_path)
    assert first == second
    names = {what: name for what, (name, _) in first.items()}
    one, three, four = step_name(2), step_name(3), step_name(4)
    assert names["whole"] == four and names["gone back"] == one
    assert names["gone back to a damaged one"] == four
    for what in ("damaged", "latest away", "latest upwards", "latest a folder", "latest lost"):
        assert names[what] == three
        assert f"{four}/tables-00001.safetensors: missing or changed" in " ".join(first[what][1])
    assert "falling back to the one before it" in first["damaged"][1][0]
    assert "'a folder' is no checkpoint's name" in first["latest a folder"][1][0]
    assert "format 4; this reads 3: go on with the version that wrote it" in names["newer"]
    with pytest.raises(UserError, match="none of its 5 checkpoints is whole; restore one of them"):
        raise UserError(names["none"])
