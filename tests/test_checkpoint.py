"""Checkpoints are whole or not there: damage is named, a full disk harms nothing that was saved."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from data_shards import Index, UserError
from data_shards.errors import LostError
from tests.gang import gang
from tests.toy_run import here, refused, toy_config
from trainer import checkpoint, saving
from trainer.adapter_store import Adapter
from trainer.checkpoint import Snapshot, checked, newest
from trainer.log import RunLog
from trainer.run_folder import RunFolder
from trainer.saving import Saver, step_name
from trainer.tensor_file import write_file
from trainer.trunk import new_trunk

pytestmark = pytest.mark.dist

CHANGED = "missing or changed .*restore the folder from a copy of it"
CUT = "no complete checkpoint .*restore the folder"
# Name of a damage -> what does it, what it is called.
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda folder: (folder / "tables-00001.safetensors").unlink(), CHANGED),
    "changed": (lambda folder: _flip(folder / "dense.safetensors"), CHANGED),
    "cut": (lambda folder: os.truncate(folder / "state.json", 9), CHANGED),
    "linked": (
        lambda folder: _link(folder / "state.json"),
        "json: a symbolic link is not followed; move",
    ),
    "linked_folder": (lambda folder: _link(folder), "a symbolic link is not followed; move"),
    "no_manifest": (lambda folder: (folder / "manifest.json").unlink(), CUT),
    "cut_manifest": (lambda folder: os.truncate(folder / "manifest.json", 9), CUT),
    "list": (lambda folder: (folder / "manifest.json").write_text("[]"), CUT),
    "format": (
        lambda folder: _edit(folder, {"format": 9}),
        "format 9; this reads 3: go on with the version that wrote it",
    ),
    "old_format": (
        lambda folder: _edit(folder, {"format": 2}),
        "format 2; this reads 3: train it anew",
    ),
    "no_dense": (lambda folder: _edit(folder, {"files": {}}), "names no dense.safetensors or no"),
    "no_tables": (lambda folder: _without_tables(folder), "lacks .* weight of the tables for this"),
    "best_upwards": (
        lambda folder: _edit(folder, {"best": "../step-0000000002"}),
        "'../step-0000000002' is no file of a checkpoint",
    ),
    "upwards": (
        lambda folder: _name(folder, "../step-0000000002/dense.safetensors"),
        "'../step-.*' is no file of a checkpoint; take one from a source you trust",
    ),
    "rooted": (lambda folder: _name(folder, "/etc/hostname"), "'/etc/hostname' is no file of a"),
    "large": (
        lambda folder: os.truncate(folder / "manifest.json", 1 << 30),
        "1,073,741,824 bytes, at most 67,108,864 are read; take a copy from a source you trust",
    ),
}
# Name of a full disk -> the rank that meets it, in which file.
FULL = {
    "tables": (1, "tables-00001.safetensors"),
    "dense": (0, "dense.safetensors"),
    "manifest": (0, "manifest.json"),
    "pointer": (0, ".latest.tmp"),
}
FIRST = step_name(1)


def _attempts(toy: Path, output: Path) -> dict[str, Any]:
    """What this rank is told about damaged checkpoints and full disks, and what is left then."""
    config, ranks = toy_config(toy, output), here()
    trunk = new_trunk(config, ranks, Index.load(toy / "shards"))
    root, log = output / "checkpoints", RunLog(False, output, config.tracking, "toy")

    def save(step: int) -> None:
        snapshot = Snapshot(trunk.dense, {"step": step})
        with Saver(root, ranks, [trunk.tables], 1, log) as saver:
            saver.save(step, snapshot, best_step=2)

    def load(name: str) -> str:
        return refused(lambda: checked(root / name, ranks).load([trunk.tables]))

    save(1)
    told: dict[str, Any] = {}
    for name, (damage, _) in DAMAGES.items():
        if ranks.first:
            shutil.copytree(root / FIRST, root / name)
            damage(root / name)
        dist.barrier()
        told[name] = load(name)
    for name, (victim, file) in FULL.items():
        with pytest.MonkeyPatch.context() as patch:
            if ranks.rank == victim:
                patch.setattr(saving, "write_file", _full_at(file))
            told[name] = refused(lambda: save(2))
        found = newest(root, ranks, print)
        told[f"{name}, left"] = (found and found.folder.name, load(FIRST), _hidden(root))
        dist.barrier()
    told["passing"] = _passing(root, lambda: save(2))
    for step in (2, 3, 4):
        save(step)
    told["pointer of noise"] = _told_of_noise(root)
    told["kept"] = sorted(path.name for path in root.glob("step-*"))
    told["adapter"] = refused(lambda: _save_adapter_on_a_full_disk(output))
    return told


def _told_of_noise(root: Path) -> tuple[list[str], str]:
    """What is said where `latest` names nothing, and what is taken then."""
    said: list[str] = []
    if here().first:
        (root / "latest").write_bytes(b"\xff\x00step")
    dist.barrier()
    found = newest(root, here(), said.append)
    assert found is not None
    return said, found.folder.name


def _passing(root: Path, save: Callable[[], None]) -> list[str]:
    """What is said while one rank's disk does not answer, in a save and in the search for one."""
    said = []
    for room, name, act in (
        (saving, "write_file", save),
        (checkpoint, "_sha256", lambda: newest(root, here(), said.append)),
        (checkpoint, "read_small", lambda: newest(root, here(), said.append)),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if here().rank == 1:
                patch.setattr(room, name, _silent)
            with pytest.raises(LostError) as lost:
                act()
        said.append(str(lost.value))
        dist.barrier()
    return said


def _silent(*unused: Any) -> str:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _hidden(root: Path) -> list[str]:
    """What a failed save left behind; its pointer is small and is written anew."""
    return [path.name for path in root.glob(".step-*")]


def _save_adapter_on_a_full_disk(output: Path) -> None:
    folder = RunFolder(output / "run")
    adapter = Adapter("mlora", "books", 0, "t", "s", "d", {}, True, {})
    with pytest.MonkeyPatch.context() as patch:
        if here().first:
            patch.setattr("trainer.adapter_store.write_file", _full_at("adapter.safetensors"))
        folder.save_adapter(adapter, here())


def _full_at(file: str) -> Callable[[Path, Iterable[bytes]], str]:
    """Writes as the real one does, until the disk is full in the middle of `file`."""
    write = write_file

    def full(path: Path, content: Iterable[bytes]) -> str:
        if path.name != file:
            return write(path, content)
        path.write_bytes(b"".join(content)[:99])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return full


def _edit(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def _name(folder: Path, name: str) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    _edit(folder, {"files": files | {name: files["dense.safetensors"]}})


def _without_tables(folder: Path) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    _edit(folder, {"files": {k: v for k, v in files.items() if not k.startswith("tables-")}})


def _link(path: Path) -> None:
    moved = path.rename(path.with_name("elsewhere"))
    path.symlink_to(moved)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def told(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    first, second = gang(2, _attempts, toy, tmp_path_factory.mktemp("checkpoints"))
    assert first == second, "every rank is told the same"
    return first


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(told: dict[str, Any], damage: str) -> None:
    with pytest.raises(UserError, match=DAMAGES[damage][1]):
        raise UserError(told[damage])
    assert damage in told[damage].split(":")[0], "names the folder"


def test_a_pointer_that_names_nothing_is_said(told: dict[str, Any]) -> None:
    said, taken = told["pointer of noise"]
    [line] = said
    assert line.endswith("is no checkpoint's name; the newest whole one is taken")
    assert "/latest: " in line
    assert taken == step_name(4)


@pytest.mark.parametrize("full", FULL)
def test_a_full_disk_on_one_rank_stops_all_and_harms_nothing(
    told: dict[str, Any], full: str
) -> None:
    assert (
        "No space left on device; free some space, and start the same command again" in told[full]
    )
    assert told[f"{full}, left"] == (FIRST, "", [])


def test_a_disk_that_does_not_answer_is_no_mistake(told: dict[str, Any]) -> None:
    back = "; falling back to the one before it"
    refusals = [message for message in told["passing"] if back not in message]
    assert len(refusals) == 3 and len(told["passing"]) > 3
    for message in refusals:
        assert "Input/output error; what was saved before is whole, and the same command" in message


def test_the_newest_and_the_best_checkpoint_are_kept(told: dict[str, Any]) -> None:
    assert told["kept"] == [step_name(2), step_name(4)]


def test_an_adapter_that_cannot_be_saved_stops_all_ranks(told: dict[str, Any]) -> None:
    assert "could not save adapter" in told["adapter"]
    assert "No space left on device; nothing was written" in told["adapter"]
