"""S7: a run that was cut off, and continued by any number of ranks, is the run that was not."""

import json
import os
import shutil
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data_shards import Index, UserError
from tests.gang import gang
from tests.toy_run import Step, adapters_at, checkpoint_at, here, recording, toy_config
from trainer import checkpoint
from trainer.schedule import train

pytestmark = pytest.mark.dist

CUT, SAVED = 17, 15  # the step at which a run is cut, and the newest checkpoint before it
SETTINGS = ("pretrain.checkpoint_every=5", "keep_checkpoints=99", "adapt.min_rows=80")
DROPOUT = {
    1: ("backbone.dropout=0.5", "method.dropout=0.2", "engine.zero_stage=0"),
    2: ("backbone.dropout=0.5", "method.dropout=0.2", "engine.zero_stage=2"),
}


class _CutOff(Exception):
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
            raise _CutOff

    def in_second_adapter(at: int) -> None:
        if at == 1 and (adapters / "books").exists() and not (adapters / "music").exists():
            raise _CutOff

    for cut in (in_first_phase, in_second_adapter):
        with recording(cut), pytest.raises(_CutOff):
            _run(toy, output, "cut", *settings)
    with recording() as steps:
        cut = _run(toy, output, "cut", *settings)
    assert [step.at for step in steps[:2]] == [0, 1], "the third start begins with an adapter"
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
    assert wanted["steps"] == wanted["table_steps"] == 26 and wanted["cursor"]["epoch"] == 2
    _require_equal(checkpoint_at(cut / "trunk")[0], checkpoint_at(whole / "trunk")[0])
    found, expected = adapters_at(cut), adapters_at(whole)
    assert found.keys() == expected.keys() == {"books", "music"}
    for domain, tensors in found.items():
        _require_equal(tensors, expected[domain])


def _killed_while_saving(toy: Path, output: Path) -> None:
    """Rank 1 dies with half of its part of a checkpoint written."""
    write, ranks = checkpoint._write, here()

    def dying(path: Path, content: bytes) -> str:
        if path.parent.name != f".step-{SAVED:010d}.tmp":
            return write(path, content)
        (output / f"{ranks.rank}.json").write_text(json.dumps([asdict(s) for s in steps], default=list))
        if ranks.first:
            return write(path, content)
        while not (output / "0.json").exists():
            time.sleep(0.01)
        path.write_bytes(content[: len(content) // 2])
        os._exit(9)

    with recording() as steps, pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_write", dying)
        _run(toy, output, "killed")


def _continue(toy: Path, output: Path, name: str) -> tuple[dict[str, Any], list[Step]]:
    with recording() as steps:
        return _run(toy, output, name), steps


def test_killed_while_saving_then_continued_by_another_number_of_ranks(
    toy: Path, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="rank 1 died without a word"):
        gang(2, _killed_while_saving, toy, tmp_path)
    killed = tmp_path / "killed"
    shutil.copytree(killed, tmp_path / "as_it_died")
    before = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    [(_, straight)] = gang(1, _continue, toy, tmp_path, "whole")
    expected, wanted = checkpoint_at(tmp_path / "whole" / "checkpoints" / "step-0000000026")
    rows = {(s.at, row) for s in straight[:26] for row in s.row_ids}
    for world in (1, 4):
        shutil.rmtree(killed)
        shutil.copytree(tmp_path / "as_it_died", killed)
        answers = gang(world, _continue, toy, tmp_path, "killed")
        tensors, values = checkpoint_at(killed / "checkpoints" / "step-0000000026")
        seen = Counter()
        assert answers[0][1][0].at == 13, "step 15 is not complete, and step 13 is the one before"
        seen.update((s["at"], row) for rank in before for s in rank if s["at"] < 13 for row in s["row_ids"])
        seen.update((s.at, row) for _, steps in answers for s in steps[: 26 - 13] for row in s.row_ids)
        assert seen == Counter(rows)
        assert values["cursor"] == wanted["cursor"] and values["table_steps"] == 26
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)


def _require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
