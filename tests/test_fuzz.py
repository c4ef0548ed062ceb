"""Garbage: whatever happens to the bytes of a set, its rows are read as written or refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.errors import UserError
from data_shards.index import Index
from data_shards.loader import Cursor, Loader, Reading, Rows
from data_shards.reader import ShardReader
from data_shards.splits import SplitConfig
from data_shards.storage import open_storage
from data_shards.tars import members
from data_shards.verify import verify
from data_shards.writer import write_shards
from tests.toy_source import SCHEMA, toy_rows, toy_source

READING = Reading(global_batch=24, lanes=4, shuffle_rows=48)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fuzz") / "shards"
    rows = toy_rows({"books": 90, "toys": 30})
    write_shards(toy_source(rows), SCHEMA, SplitConfig(), out, block_rows=32)
    return out


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Some flips, cuts, insertions and repeated stretches, at places relative to the length."""
    kinds = st.sampled_from(["flip", "set", "cut", "drop", "insert", "repeat"])
    place = st.floats(0, 1, exclude_max=True)
    steps = draw(st.lists(st.tuples(kinds, place, place, st.integers(0, 255)), max_size=4))

    def damage(data: bytes) -> bytes:
        for kind, start, length, value in steps:
            at = int(start * len(data))
            size = 1 + int(length * min(64, len(data)))
            part = data[at : at + size]
            new = {
                "flip": bytes(byte ^ (value or 1) for byte in part),
                "set": bytes([value]) * len(part),
                "cut": None,
                "drop": b"",
                "insert": part + bytes([value]) * size,
                "repeat": part + part,
            }[kind]
            data = data[:at] if new is None else data[:at] + new + data[at + size :]
        return data

    return damage


def _read(folder: Path) -> list[dict]:
    index = Index.load(folder)
    reader = ShardReader(folder, index)
    return [row for block in index.blocks for row in reader.read(block).to_pylist()]


def _batches(folder: Path) -> list[list[int]]:
    loader = Loader(folder, Rows(("train",)), READING, 0, 1)
    return [batch.row_id.tolist() for batch in loader.batches(Cursor())]


def _as_written_or_refused(shards: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    with TemporaryDirectory() as temporary:
        folder = Path(shutil.copytree(shards, Path(temporary) / "shards"))
        (folder / name).write_bytes(damage((folder / name).read_bytes()))
        for read in (_read, _batches):
            try:
                assert read(folder) == read(shards)
            except UserError as error:
                assert name == "index.json" or str(folder) in str(error)
        try:
            verify(folder).require_sound()
        except UserError:
            return
        assert _read(folder) == _read(shards)


@given(damages())
def test_a_damaged_index(shards: Path, damage: Callable[[bytes], bytes]) -> None:
    _as_written_or_refused(shards, "index.json", damage)


@given(damages())
def test_a_damaged_tar(shards: Path, damage: Callable[[bytes], bytes]) -> None:
    _as_written_or_refused(shards, next(iter(Index.load(shards).shards)), damage)


@given(damages())
def test_a_damaged_tar_of_the_same_length(shards: Path, damage: Callable[[bytes], bytes]) -> None:
    """The index cannot tell by its size."""

    def keep_length(data: bytes) -> bytes:
        return damage(data)[: len(data)].ljust(len(data), b"\0")

    _as_written_or_refused(shards, next(iter(Index.load(shards).shards)), keep_length)


@given(damages(), st.integers(0, 5))
@settings(max_examples=300)
def test_a_damaged_block_whose_digest_nobody_checks(
    shards: Path, damage: Callable[[bytes], bytes], number: int
) -> None:
    """Either refused, or a table that Arrow's full validation and every reader can stand."""
    index = Index.load(shards)
    reader = ShardReader(shards, index, verify=False)
    block = index.blocks[number]
    data = damage(reader.fetch(block))
    try:
        table = reader.parse(block, data)
    except UserError as error:
        assert f"member {block.member} at byte {block.offset}" in str(error)
        return
    table.validate(full=True)
    assert len(table) == block.rows and table.nbytes <= len(data)
    assert len(table.to_pylist()) == block.rows


@given(st.binary(max_size=3000), damages())
def test_any_bytes_as_a_tar(content: bytes, damage: Callable[[bytes], bytes]) -> None:
    with TemporaryDirectory() as folder:
        (Path(folder) / "x.tar").write_bytes(damage(content))
        try:
            found = list(members(open_storage(folder), "x.tar"))
        except UserError as error:
            assert "x.tar" in str(error)
        else:
            assert all(m.offset + m.size <= len(damage(content)) for m in found)


@given(st.binary(max_size=500))
def test_any_bytes_as_a_block(shards: Path, content: bytes) -> None:
    index = Index.load(shards)
    with pytest.raises(UserError, match="member .* at byte"):
        ShardReader(shards, index, verify=False).parse(index.blocks[0], content)


def _stream(table: pa.Table, **options: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def test_a_block_that_swells_is_refused(shards: Path) -> None:
    index = Index.load(shards)
    reader = ShardReader(shards, index, verify=False)
    block = index.blocks[0]
    table = reader.parse(block, reader.fetch(block))
    title = pa.array(["a" * 100_000] * len(table))
    swollen = table.set_column(table.column_names.index("title"), "title", title)
    with pytest.raises(UserError, match="bytes of columns in"):
        reader.parse(block, _stream(swollen, compression="zstd"))


def test_a_block_of_other_columns_is_refused(shards: Path) -> None:
    index = Index.load(shards)
    reader = ShardReader(shards, index, verify=False)
    block = index.blocks[0]
    table = reader.parse(block, reader.fetch(block))
    for changed, message in (
        (table.drop(["user"]), "its columns are row_id, .* not row_id"),
        (table.append_column("user", table["user"]), "its columns are"),
        (table.rename_columns({"user": "people"}), "its columns are"),
        (table.set_column(3, "user", table["user"].cast("int64")), "'user' is int64, not int32"),
        (table.add_column(3, "probability", table["label"].cast("int32")), "not float32"),
    ):
        with pytest.raises(UserError, match=message):
            reader.parse(block, _stream(changed))
    with_truth = table.add_column(3, "probability", table["label"])
    assert len(reader.parse(block, _stream(with_truth))) == block.rows
