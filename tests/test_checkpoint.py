"""Checkpoints are whole or not there: damage is named, a full disk harms nothing that was saved."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from data_shards import Index, UserError
from tests.gang import gang
from tests.toy_run import here, refused, toy_config
from trainer import checkpoint
from trainer.adapter_store import Adapter
from trainer.run_folder import RunFolder
from trainer.schedule import save_adapter
from trainer.trunk import new_trunk

pytestmark = pytest.mark.dist

CHANGED = "missing or changed .*take another checkpoint"
# Name of a damage -> what does it, what it is called.
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda folder: (folder / "tables-00001.safetensors").unlink(), CHANGED),
    "changed": (lambda folder: _flip(folder / "dense.safetensors"), CHANGED),
    "cut": (lambda folder: os.truncate(folder / "state.json", 9), CHANGED),
    "no_manifest": (
        lambda folder: (folder / "manifest.json").unlink(),
        "no complete checkpoint .*take another",
    ),
    "cut_manifest": (
        lambda folder: os.truncate(folder / "manifest.json", 9),
        "no complete checkpoint .*take another",
    ),
    "format": (
        lambda folder: (folder / "manifest.json").write_text('{"format": 9, "files": {}}'),
        "format 9; this reads 2: train it anew",
    ),
}
# Name of a full disk -> the rank that meets it, in which file.
FULL = {
    "tables": (1, "tables-00001.safetensors"),
    "dense": (0, "dense.safetensors"),
    "manifest": (0, "manifest.json"),
    "pointer": (0, ".latest.tmp"),
}


def _attempts(toy: Path, output: Path) -> dict[str, Any]:
    """What this rank is told about damaged checkpoints and full disks, and what is left then."""
    config, ranks = toy_config(toy, output), here()
    trunk = new_trunk(config, ranks, Index.load(toy / "shards"))
    root = output / "checkpoints"

    def save(step: str) -> None:
        snapshot = checkpoint.Snapshot(trunk.dense, {"step": step})
        checkpoint.save(root / step, ranks, trunk.tables, snapshot)
        checkpoint.mark_latest(root, step, ranks, 1, "step-2")

    def load(step: str) -> str:
        return refused(lambda: checkpoint.load(root / step, ranks, trunk.tables))

    save("step-1")
    told: dict[str, Any] = {}
    for name, (damage, _) in DAMAGES.items():
        if ranks.first:
            shutil.copytree(root / "step-1", root / name)
            damage(root / name)
        dist.barrier()
        told[name] = load(name)
    for name, (victim, file) in FULL.items():
        with pytest.MonkeyPatch.context() as patch:
            if ranks.rank == victim:
                patch.setattr(checkpoint, "_write", _full_at(file))
            told[name] = refused(lambda: save("step-2"))
        newest = checkpoint.latest(root)
        told[f"{name}, left"] = (newest and newest.name, load("step-1"), list(root.glob(".step-*")))
        dist.barrier()
    for step in ("step-2", "step-3", "step-4"):
        save(step)
    told["kept"] = sorted(path.name for path in root.glob("step-*"))
    told["adapter"] = refused(lambda: _save_adapter_on_a_full_disk(output))
    return told


def _save_adapter_on_a_full_disk(output: Path) -> None:
    folder = RunFolder(output / "run")
    adapter = Adapter("mlora", "books", 0, "t", "s", "d", {}, True, {})
    with pytest.MonkeyPatch.context() as patch:
        if here().first:
            patch.setattr("trainer.adapter_store._write", _full_at("adapter.safetensors"))
        save_adapter(folder, adapter, here())


def _full_at(file: str) -> Callable[[Path, bytes], str]:
    """Writes as the real one does, until the disk is full in the middle of `file`."""
    write = checkpoint._write

    def full(path: Path, content: bytes) -> str:
        if path.name != file:
            return write(path, content)
        path.write_bytes(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return full


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


@pytest.mark.parametrize("full", FULL)
def test_a_full_disk_on_one_rank_stops_all_and_harms_nothing(
    told: dict[str, Any], full: str
) -> None:
    assert "No space left on device; free some space, or set another output" in told[full]
    assert told[f"{full}, left"] == ("step-1", "", [])


def test_the_newest_and_the_best_checkpoint_are_kept(told: dict[str, Any]) -> None:
    assert told["kept"] == ["step-2", "step-4"]


def test_an_adapter_that_cannot_be_saved_stops_all_ranks(told: dict[str, Any]) -> None:
    assert "could not save adapter" in told["adapter"]
    assert "No space left on device; nothing was written" in told["adapter"]
