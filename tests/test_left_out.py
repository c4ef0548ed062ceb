"""Rows that a run leaves out as corrupt are counted and told, whichever rank met them."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest

from data_shards import Cursor, Index, Loader, Reading, Rows
from data_shards.index import Block
from data_shards.reader import ShardReader
from tests.gang import gang
from tests.toy_run import here, recording, toy_config
from trainer import schedule
from trainer.log import lines_of
from trainer.report import final_table

pytestmark = pytest.mark.dist

RUN = ("pretrain.max_epochs=2", "pretrain.checkpoint_every=2", "phases=['pretrain']")
CUTS = (5, 15)  # in each of the epochs


class _CutError(Exception):
    """Stands for whatever ends a process."""


def _spoiled(toy: Path, shards: Path) -> dict[str, Block]:
    """A copy of the toy's shards with a corrupt block in three of its splits, and those blocks."""
    index = Index.load(shutil.copytree(toy / "shards", shards))
    spoiled = {}
    for split in ("train", "valid", "test"):
        block = max(index.select((split,)), key=lambda block: block.rows)
        path = shards / block.shard
        data = bytearray(path.read_bytes())
        data[block.offset + block.bytes // 2] ^= 255
        path.write_bytes(data)
        spoiled[split] = block
    return spoiled


def _runs(toy: Path, output: Path, shards: Path) -> list[dict[str, Any]]:
    """Summaries of a run that is left alone and of one that is cut."""
    found = []
    for name, cuts in (("whole", ()), ("cut", CUTS)):
        config = toy_config(
            toy, output, f"data.shards={shards}", f"name={name}", *RUN, "reading.corrupt=skip"
        )
        for stop in cuts:

            def cut(at: int, stop: int = stop) -> None:
                if at == stop:
                    raise _CutError

            with recording(cut), pytest.raises(_CutError):
                schedule.train(config, here())
        found.append(schedule.train(config, here()))
    return found


def test_rows_that_are_left_out_are_told(toy: Path, tmp_path: Path) -> None:
    blocks = _spoiled(toy, tmp_path / "shards")
    lost = {split: block.rows for split, block in blocks.items()}
    wanted = {"pretrain": lost["train"] + lost["valid"], "test": lost["test"]}
    tests = Index.load(toy / "shards").select(("test",))
    for whole, cut in gang(2, _runs, toy, tmp_path, tmp_path / "shards"):
        assert whole["trunk"] == cut["trunk"] and whole["shared"] == cut["shared"]
        rows = sum(domain["rows"] for domain in whole["shared"]["domains"])
        assert rows == sum(block.rows for block in tests) - lost["test"]
        if whole["corrupt_rows"] or cut["corrupt_rows"]:  # the first rank's
            assert whole["corrupt_rows"] == cut["corrupt_rows"] == wanted
            said = final_table(cut)
            assert f"corrupt, and left out: {wanted['pretrain']} rows of pretrain" in said
    for name in ("whole", "cut"):
        lines = lines_of(tmp_path / name / "metrics.jsonl")
        told = {(one["shard"], one["member"]) for line in lines for one in line.get("corrupt", ())}
        assert told == {(block.shard, block.member) for block in blocks.values()}


@pytest.mark.parametrize("corrupt", ["error", "skip"])
def test_a_block_that_was_spoiled_on_its_way_is_read_again(
    toy: Path, corrupt: Literal["error", "skip"], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = Reading(global_batch=48, lanes=24, shuffle_rows=150, corrupt=corrupt)
    loaders = [Loader(toy / "shards", Rows(("train",)), reading, 0, 1) for _ in range(2)]
    wanted = [batch.row_id.tolist() for batch in loaders[0].batches(Cursor())]
    fetch, seen = ShardReader.fetch, Counter[str]()

    def spoiled(reader: ShardReader, block: Block) -> bytes:
        seen[block.member] += 1
        data = fetch(reader, block)
        return data[:-1] + b"?" if seen[block.member] % 2 else data

    monkeypatch.setattr(ShardReader, "fetch", spoiled)
    assert [batch.row_id.tolist() for batch in loaders[1].batches(Cursor())] == wanted
    assert seen and not loaders[1].skipped and not any(times % 2 for times in seen.values())
