"""S7: a run that was cut off, and continued by any number of ranks, is the run that was not."""

import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_shards import write_shards
from tests.gang import gang
from tests.toy_run import (
    SCHEMA,
    SIZES,
    SPLIT,
    Step,
    adapters_at,
    checkpoint_at,
    here,
    planted_rows,
    recording,
    refused,
    toy_config,
)
from tests.toy_source import toy_source
from trainer import saving
from trainer.run_folder import RunFolder
from trainer.schedule import train

pytestmark = pytest.mark.dist

# Steps of phase 1: all, at the end of the first epoch, at a checkpoint, and where a run is cut.
STEPS, EVALUATED, SAVED, CUT = 26, 13, 15, 17
PLAIN = "engine.zero_stage=0"
LAST = f"step-{STEPS:010d}"
SETTINGS = (
    "seed=20260101",
    "pretrain.checkpoint_every=5",
    "adapt.checkpoint_every=3",
    "keep_checkpoints=99",
    "adapt.min_rows=80",
)
DROPOUT = {
    1: ("backbone.dropout=0.5", "method.dropout=0.2", "engine.zero_stage=0"),
    2: ("backbone.dropout=0.5", "method.dropout=0.2", "engine.zero_stage=2"),
}


class _CutError(Exception):
    """Stands for whatever ends a process between two steps."""


def _run(toy: Path, output: Path, name: str, *overrides: str) -> dict[str, Any]:
    config = toy_config(toy, output, f"name={name}", *SETTINGS, *overrides)
    return {**train(config, here()), "pretrain_seconds": None}


def _story(toy: Path, output: Path) -> list[dict[str, Any]]:
    """A run in one go, and the same one cut in its first phase and again in its second."""
    settings = DROPOUT[here().world]
    whole = _run(toy, output, "whole", *settings)
    adapters = output / "cut" / "adapters" / "mlora"

    def in_first_phase(at: int) -> None:
        if at == CUT:
            raise _CutError

    def in_second_adapter(at: int) -> None:
        if at == 3 and (adapters / "books").exists() and not (adapters / "music").exists():
            raise _CutError

    for cut in (in_first_phase, in_second_adapter):
        with recording(cut), pytest.raises(_CutError):
            _run(toy, output, "cut", *settings)
    with recording() as steps:
        cut = _run(toy, output, "cut", *settings)
    assert [step.at for step in steps[:2]] == [3, 4], "the third start goes on with an adapter"
    return [whole, cut]


@pytest.mark.parametrize("world", [1, 2])
def test_cut_and_continued_is_bit_equal_to_uncut(toy: Path, tmp_path: Path, world: int) -> None:
    stories = gang(world, _story, toy, tmp_path)
    assert all(whole == cut for whole, cut in stories)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert names == sorted(path.name for path in (cut / "checkpoints").iterdir())
    for name in names[1:]:  # after `latest`
        (tensors, values), (expected, wanted) = (
            checkpoint_at(run / "checkpoints" / name) for run in (cut, whole)
        )
        assert {**values, "seconds": 0} == {**wanted, "seconds": 0}
        _require_equal(tensors, expected)
    _, values = checkpoint_at(cut / "checkpoints" / LAST)
    assert [values["steps"]] == values["table_steps"] == [STEPS] and values["cursor"]["epoch"] == 2
    _require_equal(checkpoint_at(cut / "trunk")[0], checkpoint_at(whole / "trunk")[0])
    found, expected = adapters_at(cut), adapters_at(whole)
    assert found.keys() == expected.keys() == {"books", "music"}
    for domain, tensors in found.items():
        _require_equal(tensors, expected[domain])


def _killed_while_saving(toy: Path, output: Path) -> None:
    """Rank 1 dies with half of its part of a checkpoint written."""
    write, ranks = saving.write_file, here()

    def dying(path: Path, content: Iterable[bytes]) -> str:
        if path.parent.name != f".step-{SAVED:010d}.tmp":
            return write(path, content)
        rows = [(step.at, step.row_ids) for step in steps]
        (output / f"{ranks.rank}.json").write_text(json.dumps(rows), encoding="utf-8")
        if ranks.first:
            return write(path, content)
        while not (output / "0.json").exists():
            time.sleep(0.01)
        path.write_bytes(b"".join(content)[:99])
        os._exit(9)

    with recording() as steps, pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "write_file", dying)
        _run(toy, output, "killed", PLAIN)


def _continue(toy: Path, output: Path, name: str) -> tuple[dict[str, Any], list[Step]]:
    with recording() as steps:
        return _run(toy, output, name, PLAIN), steps


def test_killed_while_saving_then_continued_by_another_number_of_ranks(
    toy: Path, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="rank 1 died without a word"):
        gang(2, _killed_while_saving, toy, tmp_path)
    killed = tmp_path / "killed"
    shutil.copytree(killed, tmp_path / "as_it_died")
    before = [
        (at, row)
        for rank in range(2)
        for at, rows in json.loads((tmp_path / f"{rank}.json").read_text())
        for row in rows
        if at < EVALUATED
    ]
    [(_, straight)] = gang(1, _continue, toy, tmp_path, "whole")
    expected, wanted = checkpoint_at(tmp_path / "whole" / "checkpoints" / LAST)
    for world in (1, 4):
        shutil.rmtree(killed)
        shutil.copytree(tmp_path / "as_it_died", killed)
        answers = gang(world, _continue, toy, tmp_path, "killed")
        assert answers[0][1][0].at == EVALUATED, "the checkpoint before the one cut short"
        after = [pair for _, steps in answers for pair in _seen(steps[: STEPS - EVALUATED])]
        assert Counter(before + after) == Counter(_seen(straight[:STEPS]))
        tensors, values = checkpoint_at(killed / "checkpoints" / LAST)
        assert values["cursor"] == wanted["cursor"] and values["table_steps"] == [STEPS]
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


def _seen(steps: list[Step]) -> list[tuple[int, int]]:
    return [(step.at, row) for step in steps for row in step.row_ids]


def _restart(toy: Path, output: Path) -> dict[str, str]:
    """What a run says of another run file and of other shards, before and after it has learned."""
    shards = output / "shards"
    shutil.copytree(toy / "shards", shards)
    mine = ("mine", PLAIN, f"data.shards={shards}")

    def cut(at: int) -> None:
        if at == CUT:
            raise _CutError

    def other(*overrides: str) -> str:
        return refused(lambda: _run(toy, output, *mine, *overrides))

    said = {"mistake": other("pretrain.metric=auc/none")}
    with recording(cut), pytest.raises(_CutError):
        _run(toy, output, *mine)
    said["run file"] = other("tables.lr=0.5")
    taught = RunFolder(output / "taught")
    with taught.open(toy_config(toy, output, "name=taught"), here()):
        taught.teachers.mkdir()
    changed = toy_config(toy, output, "name=taught", "tables.lr=0.5")
    said["taught"] = refused(lambda: taught.open(changed, here()).__enter__())
    moved = RunFolder(taught.path.rename(output / "moved"))
    changes = ("engine.zero_stage=3", "engine.bad_steps=skip", "reading.corrupt=skip")
    free = toy_config(toy, output, "name=moved", *changes)
    with moved.open(free, here()):
        assert RunFolder.config(moved.path) == free, "what may change is taken over"
    shutil.rmtree(shards)
    write_shards(toy_source(planted_rows(SIZES, seed=9)), SCHEMA, SPLIT, shards)
    return said | {"shards": other()}


def test_only_the_same_run_on_the_same_shards_is_continued(toy: Path, tmp_path: Path) -> None:
    [said] = gang(1, _restart, toy, tmp_path)
    assert "unknown metric in pretrain.metric 'auc/none'" in said["mistake"]
    for begun in ("run file", "taught"):
        assert re.search("holds a run of another run file .they differ in tables.lr", said[begun])
    assert "learned from other shards than those in data.shards now" in said["shards"]


def _require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
