"""Rows that a run leaves out as corrupt are counted and told, whichever rank met them."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data_shards import Cursor, Index, Loader, Rows
from data_shards.index import Block
from data_shards.reader import ShardReader
from tests.gang import gang
from tests.toy_run import here, recording, toy_config
from trainer import schedule
from trainer.adding import add_domain
from trainer.log import lines_of
from trainer.report import added_table, final_table
from trainer.run_folder import RunFolder

pytestmark = pytest.mark.dist

RUN = (
    "pretrain.max_epochs=1",
    "pretrain.checkpoint_every=2",
    "phases=['pretrain']",
    "reading.shuffle_rows=64",
)
CUTS = (5, 12)  # after checkpoints; what goes on from the last one meets no corrupt block again


class _CutError(Exception):
    """Stands for whatever ends a process."""


def _spoiled(toy: Path, shards: Path) -> dict[str, Block]:
    """A copy of the toy's shards with a corrupt block in three of its splits, and those blocks."""
    index = Index.load(shutil.copytree(toy / "shards", shards))
    reading = toy_config(toy, shards, *RUN).reading
    loader = Loader(shards, Rows(("train",)), reading, 0, 1)
    late = {row for batch in loader.batches(Cursor(0, CUTS[-1])) for row in batch.row_id.tolist()}
    reader, spoiled = ShardReader(shards, index), {}
    for split in ("train", "valid", "test"):
        blocks = [
            block
            for block in index.select((split,))
            if not late & set(reader.read(block)["row_id"].to_pylist())
        ]
        spoiled[split] = _spoil(shards, blocks)
    return spoiled


def _spoil(shards: Path, blocks: Sequence[Block]) -> Block:
    """The largest of them, one byte of which is another now."""
    block = max(blocks, key=lambda block: block.rows)
    path = shards / block.shard
    data = bytearray(path.read_bytes())
    data[block.offset + block.bytes // 2] ^= 255
    path.write_bytes(data)
    return block


def _runs(toy: Path, output: Path, shards: Path) -> list[dict[str, Any]]:
    """Summaries of a run that is left alone and of one that is cut."""
    found = []
    for name, cuts in (("whole", ()), ("cut", CUTS)):
        changes = (f"data.shards={shards}", f"name={name}", *RUN)
        config = toy_config(toy, output, *changes, "reading.corrupt=skip")
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


def _adds(toy: Path, output: Path, shards: Path) -> dict[str, Any]:
    config = toy_config(toy, output, *RUN, "reading.corrupt=skip")
    schedule.train(config, here())
    return add_domain(config, RunFolder(config.folder), "games", shards, here())


def test_rows_of_an_added_domain_that_are_left_out_are_told(toy: Path, tmp_path: Path) -> None:
    shards = tmp_path / "added"
    index = Index.load(shutil.copytree(toy / "added", shards))
    spoiled = {split: _spoil(shards, index.select((split,))) for split in ("adapt", "test")}
    wanted = {"adapt games": spoiled["adapt"].rows, "test games": spoiled["test"].rows}
    tests = sum(block.rows for block in index.select(("test",)))
    found = gang(2, _adds, toy, tmp_path, shards)
    assert wanted in [one["corrupt_rows"] for one in found]
    for one in found:
        assert one["adapted"]["domains"][0]["rows"] == tests - wanted["test games"]
        if one["corrupt_rows"]:  # the first rank's
            assert f"left out: {wanted['adapt games']} rows of adapt games" in added_table(one)
