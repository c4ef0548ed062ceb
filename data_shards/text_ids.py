"""The prompt of every row of a shard set: a column of text ids, and the table of unique prompts."""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from data_shards.errors import UserError
from data_shards.index import Index
from data_shards.prompts import PROMPTS, PromptConfig, render, text_id
from data_shards.reader import ShardReader
from data_shards.schema import Field, Schema
from data_shards.sidecars import Sidecar, SidecarWriter
from data_shards.storage import Location
from data_shards.texts import TextTable
from data_shards.vocabulary import Vocabulary


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
    fields = _worded(index.schema, config)
    vocabulary = index.load_vocabulary(location)
    reader = ShardReader(location, index)
    for number in writer.todo:
        block = index.blocks[number]
        rows = in_words(fields, vocabulary, reader.read(block), block.domain)
        texts = render(index.schema.fields, rows, config)
        writer.put(number, {name: text_id(texts)})
        yield texts


def _worded(schema: Schema, config: PromptConfig) -> list[Field]:
    """The fields that the prompt words; hashed ones cannot be turned back into words."""
    kinds = PROMPTS[config.template].kinds
    fields = [
        field
        for field in schema.fields
        if field.kind in kinds and field.side in config.sides and field.name not in config.without
    ]
    for field in fields:
        if field.vocabulary == "hash" and field.name != "domain":
            raise UserError(
                f"prompt: the shards hold the field {field.name!r} as hashes, not as words; add "
                "it to the prompt's `without`, or write the shards with vocabulary = 'frequency'"
            )
    return fields


def in_words(fields: list[Field], vocabulary: Vocabulary, rows: pa.Table, domain: str) -> pa.Table:
    """These fields of a block's rows as raw values; null for ids that are not in the vocabulary."""
    columns = {"row_id": rows["row_id"]}  # a prompt may word no field at all
    for field in fields:
        column = rows[field.name].combine_chunks()
        if field.name == "domain":
            column = pa.repeat(domain, len(rows))
        elif field.multi:
            values = _words(vocabulary.values[field.name], column.values)
            column = pa.ListArray.from_arrays(column.offsets, values)
        elif field.is_id:
            column = _words(vocabulary.values[field.name], column)
        columns[field.name] = column
    return pa.table(columns)


def _words(values: pa.Array, ids: pa.Array) -> pa.Array:
    """The value of each id, null for 0."""
    places = pc.if_else(pc.equal(ids, 0), pa.scalar(None, pa.int32()), pc.subtract(ids, 1))
    return values.take(places)
