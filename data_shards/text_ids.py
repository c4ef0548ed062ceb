"""The prompt of every row of a shard set: a column of text ids, and the table of unique prompts."""

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from data_shards.errors import UserError
from data_shards.index import Index
from data_shards.prompts import PromptConfig, text_id
from data_shards.reader import ShardReader
from data_shards.sidecars import Sidecar, SidecarWriter
from data_shards.storage import Location
from data_shards.text_parts import texts_of
from data_shards.texts import TextTable


def write_text_ids(
    location: Location, index: Index, config: PromptConfig, folder: Path, name: str = "text_id"
) -> tuple[Sidecar, TextTable]:
    """Render all rows: the column `name` in `folder`/ids, the texts in `folder`/texts.

    `folder` is there once both are whole.
    """
    if folder.exists():
        raise UserError(f"{folder}: exists already; give another path or delete it")
    beside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    made_by = {"prompt": asdict(config)}
    writer = SidecarWriter(beside / "ids", index, {name: "int64"}, made_by)
    TextTable.build(beside / "texts", _rendered(location, index, config, name, writer))
    writer.finish()
    beside.rename(folder)
    return Sidecar.open(folder / "ids", index, made_by), TextTable.open(folder / "texts")


def _rendered(
    location: Location, index: Index, config: PromptConfig, name: str, writer: SidecarWriter
) -> Iterator[pa.Array]:
    """The prompts of each block, whose ids are written."""
    vocabulary = index.load_vocabulary(location)
    reader = ShardReader(location, index)
    for number in writer.todo:
        block = index.blocks[number]
        rows = reader.read(block)
        texts = texts_of(rows, vocabulary, pa.repeat(block.domain, len(rows)), config)
        writer.put(number, {name: text_id(texts)})
        yield texts
