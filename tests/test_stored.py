"""Blocks by address: what stands there is what Arrow reads, and all of it inside of the block."""

import ctypes
import dataclasses
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.errors import UserError
from data_shards.index import Block, Index
from data_shards.reader import ShardReader, batch_columns
from data_shards.splits import SplitConfig
from data_shards.stored import Layouts, Stored
from data_shards.writer import write_shards
from tests.test_fuzz import damages
from tests.toy_source import SCHEMA, toy_rows, toy_source

COLUMNS = batch_columns(SCHEMA)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    out = tmp_path_factory.mktemp("stored") / "shards"
    source = toy_source(toy_rows({"books": 90, "toys": 30}))
    return ShardReader(out, write_shards(source, SCHEMA, SplitConfig(), out, block_rows=32))


def _stream(*tables: pa.Table, **options: str) -> bytes:
    sink = pa.BufferOutputStream()
    kind = pa.ipc.IpcWriteOptions(**options)
    with pa.ipc.new_stream(sink, tables[0].schema, options=kind) as writer:
        for table in tables:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _numbers(address: np.integer, count: int, kind: pa.DataType) -> np.ndarray:
    stored = np.dtype(kind.to_pandas_dtype())
    return np.frombuffer(ctypes.string_at(int(address), count * stored.itemsize), stored)


def _read(stored: Stored, rows: int) -> dict[str, list]:
    """What stands at the addresses."""
    found = {}
    for column, first, offsets in zip(COLUMNS, stored.values, stored.offsets, strict=True):
        if pa.types.is_list(column.type):
            ends = _numbers(offsets, rows + 1, pa.int32())
            values = _numbers(first, ends[-1], column.type.value_type)
            found[column.name] = [part.tolist() for part in np.split(values, ends[1:-1])]
        else:
            found[column.name] = _numbers(first, rows, column.type).tolist()
    return found


def _expected(table: pa.Table) -> dict[str, list]:
    return table.select(COLUMNS.names).to_pydict()


def test_a_block_is_what_arrow_reads(reader: ShardReader) -> None:
    layouts = Layouts(COLUMNS)
    for block in reader.index.blocks:
        data = reader.fetch(block)
        found = layouts.find(data, block.rows)
        assert found is not None, "our own blocks need no Arrow"
        assert _read(found, block.rows) == _expected(reader.read(block))
        assert layouts.find(data, block.rows + 1) is None


def _nulls(table: pa.Table) -> pa.Table:
    lists = table["tags"].combine_chunks()
    mask = pa.array(np.arange(len(table)) % 2 == 0)
    tags = pa.ListArray.from_arrays(lists.offsets, lists.values, mask=mask)
    return table.set_column(table.column_names.index("tags"), "tags", tags)


@pytest.mark.parametrize(
    ("change", "known"),
    [
        (lambda t: _stream(t), True),
        (lambda t: _stream(t)[:-8], True),  # without a mark of the end
        (lambda t: _stream(t.add_column(3, "probability", t["label"])), True),
        (lambda t: _stream(t, compression="zstd"), False),
        (lambda t: _stream(t.slice(0, 9), t.slice(9)), False),
        (lambda t: _stream(_nulls(t)), False),
    ],
)
def test_other_writers_blocks_are_read_too(
    reader: ShardReader, tmp_path: Path, change: Callable[[pa.Table], bytes], known: bool
) -> None:
    block = reader.index.blocks[0]
    data = change(reader.read(block))
    other, block = _alone(reader.index, block, data, tmp_path)
    rows = _expected(other.parse(block, data))
    rows["tags"] = [tags or [] for tags in rows["tags"]]
    assert (Layouts(COLUMNS).find(data, block.rows) is not None) == known
    assert _read(other.stored(block), block.rows) == rows


def _alone(index: Index, block: Block, data: bytes, folder: Path) -> tuple[ShardReader, Block]:
    """A block of these bytes, which its index knows."""
    (folder / "x.tar").write_bytes(data)
    block = dataclasses.replace(
        block, shard="x.tar", offset=0, bytes=len(data), xxh3=xxhash.xxh3_64_hexdigest(data)
    )
    index = dataclasses.replace(index, blocks=(block,), shards={"x.tar": len(data)})
    return ShardReader(folder, index), block


def _with_null(table: pa.Table, name: str) -> pa.Table:
    place, column = table.column_names.index(name), table[name].to_pylist()
    column[1] = [3, None] if name == "tags" else None
    return table.set_column(place, name, pa.array(column, table.schema.field(name).type))


@pytest.mark.parametrize("name", ["user", "price", "label", "row_id", "tags"])
def test_a_null_is_no_number(reader: ShardReader, tmp_path: Path, name: str) -> None:
    block = reader.index.blocks[0]
    data = _stream(_with_null(reader.read(block), name))
    other, block = _alone(reader.index, block, data, tmp_path)
    for read in (other.read, other.stored):
        with pytest.raises(UserError, match=f"its column '{name}' holds a null"):
            read(block)


def test_a_column_that_stands_twice_is_refused(reader: ShardReader, tmp_path: Path) -> None:
    block = reader.index.blocks[0]
    table = reader.read(block)
    data = _stream(table.append_column("label", pa.array(1 - table["label"].to_numpy())))
    other, block = _alone(reader.index, block, data, tmp_path)
    with pytest.raises(UserError, match="its columns are .*label, not row_id"):
        other.stored(block)


def test_the_other_byte_order_is_left_to_arrow(reader: ShardReader, tmp_path: Path) -> None:
    """Which turns the numbers round, and refuses the lists, whose offsets were right before."""
    block = reader.index.blocks[0]
    data = reader.fetch(block)
    place = data.index(struct.pack("<4h", 8, 8, 0, 4)) + 4  # of the schema's byte order: left out
    one = data.index(b"\1\0", place + 100)
    data = data[:place] + struct.pack("<h", one - place - 4) + data[place + 2 :]
    assert Layouts(COLUMNS).find(data, block.rows) is None
    other, block = _alone(reader.index, block, data, tmp_path)
    with pytest.raises(UserError, match="restore"):
        other.stored(block)


@pytest.mark.parametrize("bad", [[1 << 20], [-1, 2]])
def test_lists_that_leave_their_block_are_refused(
    reader: ShardReader, tmp_path: Path, bad: list[int]
) -> None:
    """A digest only tells that the bytes are those that somebody wrote."""
    block = reader.index.blocks[0]
    data = bytearray(reader.fetch(block))
    found = Layouts(COLUMNS).find(bytes(data), block.rows)
    assert found is not None
    first = np.int64(found.offsets[COLUMNS.names.index("tags")])
    offsets = _numbers(first, block.rows + 1, pa.int32())
    at = data.index(offsets.tobytes()) + 4
    data[at : at + 4 * len(bad)] = np.array(bad, np.int32).tobytes()
    other, block = _alone(reader.index, block, bytes(data), tmp_path)
    with pytest.raises(UserError, match=f"x.tar, member {block.member} at byte 0: .*restore"):
        other.stored(block)


@given(damages(), st.integers(0, 3), st.floats(0.1, 1))
@settings(max_examples=100)
def test_whatever_the_bytes_nothing_outside_of_them_is_read(
    reader: ShardReader, damage: Callable[[bytes], bytes], number: int, share: float
) -> None:
    """The messages are damaged more than the rows, of which any are as good as others."""
    block = reader.index.blocks[number]
    data = reader.fetch(block)
    cut = int(share * len(data))
    data = damage(data[:cut]) + data[cut:]
    layouts = Layouts(COLUMNS)
    found = layouts.find(data, block.rows)
    if found is not None:
        _require_inside(found, block.rows)


def _require_inside(found: Stored, rows: int) -> None:
    data = pa.py_buffer(found.owner)
    low, high = data.address, data.address + data.size
    for column, first, offsets in zip(COLUMNS, found.values, found.offsets, strict=True):
        kind, count = column.type, rows
        if pa.types.is_list(kind):
            assert low <= offsets <= high - 4 * (count + 1)
            ends = _numbers(offsets, count + 1, pa.int32())
            assert ends[0] >= 0 and (np.diff(ends) >= 0).all()
            kind, count = kind.value_type, int(ends[-1])
        assert low <= first <= high - count * kind.bit_width // 8


@pytest.mark.parametrize("length", [-(1 << 31), -(1 << 26), -8])
def test_no_rows_lie_before_their_block(reader: ShardReader, length: int) -> None:
    """A message of less than no bytes, and rows that fill all from there to the block's end."""
    block = reader.index.blocks[0]
    data = reader.fetch(block)
    at = data.index(b"\xff" * 4, 8)
    size = len(data) - 8 - at - 8 - struct.unpack_from("<i", data, at + 4)[0]
    place = data.index(struct.pack("<q", size))
    damaged = bytearray(data)
    struct.pack_into("<i", damaged, at + 4, length)
    struct.pack_into("<q", damaged, place, len(data) - at - 8 - length)
    assert Layouts(COLUMNS).find(bytes(damaged), block.rows) is None


def test_bytes_that_are_no_block(reader: ShardReader) -> None:
    whole = reader.fetch(reader.index.blocks[0])
    for data in (b"", b"\0" * 7, whole[:1500], b"\xff\xff\xff\xff\0\1\0\0" + b"\0" * 500):
        assert Layouts(COLUMNS).find(data, reader.index.blocks[0].rows) is None
