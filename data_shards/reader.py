"""One block at a time from a shard, by position, checked against the index."""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from data_shards.errors import UserError
from data_shards.index import Block, Index
from data_shards.schema import Field, Schema
from data_shards.storage import BlockCache, Storage, open_storage
from data_shards.stored import Layouts, Stored

_ROW = (("row_id", pa.int64()), ("label", pa.float32()), ("time", pa.int64()))
_TYPES = {
    "id": pa.int32(),
    "anonymous": pa.int32(),
    "number": pa.float32(),
    "text": pa.string(),
    "tokens": pa.list_(pa.int32()),
}
T = TypeVar("T")
_LEAST = 20  # bytes of a row: those of `_ROW`


class CorruptBlockError(UserError):
    """A block whose bytes are not those that were written; all else may be well."""


@dataclass(frozen=True)
class ShardReader:
    """Reads the blocks of the shard set at `folder`, a path or a URL.

    Without `verify` bytes are not trusted either: Arrow's own full validation stands in.
    """

    folder: Path | str
    index: Index
    verify: bool = True
    cache: BlockCache | None = None

    @cached_property
    def storage(self) -> Storage:
        """Where the shards lie."""
        return open_storage(self.folder)

    def read(self, block: Block) -> pa.Table:
        """The rows of a block, one chunk per column.

        CorruptBlockError where its bytes are not those that were written.
        """
        return self._again(block, self._read)

    def stored(self, block: Block) -> Stored:
        """The `batch_columns` of a block, in the memory that its bytes were read to.

        CorruptBlockError where its bytes are not those that were written.
        """
        return self._again(block, self._stored)

    def _again(self, block: Block, read: Callable[[Block], T]) -> T:
        """What cannot be read is read once more: the way here may have spoiled it, not the disk."""
        try:
            return read(block)
        except CorruptBlockError:
            return read(block)

    def _read(self, block: Block) -> pa.Table:
        data = self._bytes(block)
        if self.verify:
            self.check(block, data)
        return self.parse(block, data, trusted=self.verify)

    def _stored(self, block: Block) -> Stored:
        data = self._bytes(block)
        self.check(block, data)
        found = self._layouts.find(data, block.rows)
        return found or Stored.of(self.parse(block, data), self._layouts.columns)

    def check(self, block: Block, data: bytes) -> None:
        """CorruptBlockError unless the bytes have the block's XXH3, a tenth of SHA-256's time."""
        if xxhash.xxh3_64_hexdigest(data) != block.xxh3:
            raise self.corrupt(block, "its XXH3 differs from the index")

    def fetch(self, block: Block) -> bytes:
        """The bytes of a block as they lie there; CorruptBlockError where there are too few."""
        self._require_possible(block)
        data = self.storage.read_range(block.shard, block.offset, block.bytes)
        if len(data) != block.bytes:
            raise self.corrupt(block, f"the shard ends after {len(data)} of {block.bytes} bytes")
        return data

    def parse(self, block: Block, data: bytes, trusted: bool = False) -> pa.Table:
        """The rows in the bytes of a block; CorruptBlockError whatever is wrong with them."""
        try:
            table = _parse(data, self._columns, trusted)
        except Exception as error:  # Arrow raises a dozen classes on garbage
            raise self.corrupt(block, str(error) or type(error).__name__) from error
        if len(table) != block.rows:
            raise self.corrupt(block, f"{len(table)} rows, the index says {block.rows}")
        return table

    def corrupt(self, block: Block, why: str) -> CorruptBlockError:
        """The error that names shard, member and byte."""
        return CorruptBlockError(
            f"{self.storage}/{block.shard}, member {block.member} at byte {block.offset}: {why}; "
            "restore the shard from its source or write the shards again"
        )

    def _require_possible(self, block: Block) -> None:
        """Before anything is allocated for a block whose index is damaged."""
        room = self.index.shards.get(block.shard, 0) - block.offset
        if block.offset < 0 or not max(block.rows, 0) * _LEAST <= block.bytes <= room:
            raise self.corrupt(block, f"{block.rows} rows in {block.bytes} bytes cannot lie there")

    def _bytes(self, block: Block) -> bytes:
        if self.cache is None:
            return self.fetch(block)
        return self.cache.get(block.sha256, block.xxh3, lambda: self.fetch(block))

    @cached_property
    def _columns(self) -> pa.Schema:
        return block_columns(self.index.schema)

    @cached_property
    def _layouts(self) -> Layouts:
        return Layouts(batch_columns(self.index.schema))


def block_columns(schema: Schema) -> pa.Schema:
    """Names and types of a block's columns; `probability` may stand among them besides."""
    return pa.schema([*_ROW, *((field.name, _type(field)) for field in schema.fields)])


def batch_columns(schema: Schema) -> pa.Schema:
    """The columns that batches are made of: ids, numbers, label and row_id, and then the lists."""
    columns = block_columns(schema)
    plain = [f.name for f in (*schema.ids, *schema.numbers) if not f.multi]
    lists = [f.name for f in schema.fields if f.multi or f.kind == "tokens"]
    return pa.schema([columns.field(name) for name in (*plain, "label", "row_id", *lists)])


def _type(field: Field) -> pa.DataType:
    return pa.list_(pa.int32()) if field.multi else _TYPES[field.kind]


def _parse(data: bytes, columns: pa.Schema, trusted: bool) -> pa.Table:
    """The table in `data`; its schema is looked at before any of its rows are decoded."""
    stream = pa.ipc.open_stream(data)
    if not stream.schema.equals(columns):
        _require_columns(stream.schema, columns)
    table = stream.read_all()
    if not trusted:
        table.validate(full=True)
        # compressed or shared buffers could swell far beyond the bytes that were read
        if table.nbytes > len(data):
            raise ValueError(f"{table.nbytes} bytes of columns in {len(data)} bytes")
    _require_values(table, columns)
    return table if table.column(0).num_chunks == 1 else table.combine_chunks()


def _require_columns(schema: pa.Schema, columns: pa.Schema) -> None:
    names, found = columns.names, dict(zip(schema.names, schema.types, strict=True))
    if found.pop("probability", pa.float32()) != pa.float32():
        raise ValueError("its column 'probability' is not float32")
    if list(found) != names or len(schema.names) != len(set(schema.names)):
        raise ValueError(f"its columns are {', '.join(schema.names)}, not {', '.join(names)}")
    for name, kind in zip(names, columns.types, strict=True):
        if found[name] != kind:
            raise ValueError(f"its column {name!r} is {found[name]}, not {kind}")


def _require_values(table: pa.Table, columns: pa.Schema) -> None:
    """A missing text is an empty one and a missing list has no values; a number must be there."""
    for column in columns:
        found = table[column.name]
        if pa.types.is_list(column.type):
            found = pc.list_flatten(found)
        if found.null_count and not pa.types.is_string(column.type):
            raise ValueError(f"its column {column.name!r} holds a null")


def blank_row(schema: Schema) -> pa.Table:
    """One encoded row that stands for padding: row_id -1, label 0, no ids."""
    columns = block_columns(schema)
    values = {c.name: [[] if pa.types.is_list(c.type) else 0] for c in columns}
    values |= {"row_id": [-1], **{field.name: [""] for field in schema.texts}}
    return pa.table(values, schema=columns)
