"""Verify: every way in which a shard set can differ from its index is found and named."""

import dataclasses
import hashlib
import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset as wds
import xxhash

from data_shards.errors import UserError
from data_shards.index import Block, Index
from data_shards.loader import Cursor, Loader, Reading, Rows
from data_shards.reader import ShardReader
from data_shards.splits import SplitConfig
from data_shards.storage import open_storage
from data_shards.tars import members
from data_shards.verify import reindexed, verify
from data_shards.writer import write_shards
from tests.toy_source import SCHEMA, toy_source

SMALL = Reading(global_batch=48, lanes=12, shuffle_rows=150)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "shards"
    write_shards(toy_source(), SCHEMA, SplitConfig(), out, block_rows=100, shard_bytes=20_000)
    return out


@pytest.fixture
def shards(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "shards"))


def _say(report_of: Path) -> str:
    return "\n".join(verify(report_of).problems)


def _rewrite(shards: Path, number: int, table: pa.Table, **changes: int) -> Block:
    """Another content for a block, with an index that knows it: only its meaning is wrong."""
    index = Index.load(shards)
    block = index.blocks[number]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    assert len(data) == block.bytes
    with (shards / block.shard).open("r+b") as file:
        file.seek(block.offset)
        file.write(data)
    digests = {"sha256": hashlib.sha256(data).hexdigest(), "xxh3": xxhash.xxh3_64_hexdigest(data)}
    changed = dataclasses.replace(block, **digests | changes)  # pyright: ignore
    blocks = (*index.blocks[:number], changed, *index.blocks[number + 1 :])
    dataclasses.replace(index, blocks=blocks).save(shards)
    return changed


def _column(table: pa.Table, name: str, values: np.ndarray) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values))


def test_a_sound_set_is_sound(sound: Path) -> None:
    index, said = Index.load(sound), []
    report = verify(sound, said.append)
    assert report.sound and report.problems == ()
    assert report.rows == index.rows == 1041 and report.blocks == len(index.blocks)
    assert report.positives == sum(block.positives for block in index.blocks)
    assert report.shards == len(index.shards) == len(said) > 2
    report.require_sound()


@pytest.mark.parametrize("place", [0, 9, 300, -1])
def test_every_flipped_byte_of_a_block_is_found(shards: Path, place: int) -> None:
    index = Index.load(shards)
    block = index.blocks[4]
    data = bytearray((shards / block.shard).read_bytes())
    data[block.offset + place % block.bytes] ^= 1
    (shards / block.shard).write_bytes(data)
    report = verify(shards)
    assert len(report.problems) == 1 and report.rows == 1041 - block.rows
    assert f"member {block.member} at byte {block.offset}: its SHA-256" in report.problems[0]
    with pytest.raises(UserError, match=f"1 problems: .*{block.member}"):
        report.require_sound()
    with pytest.raises(UserError, match=f"member {block.member} .*: its XXH3 differs from the ind"):
        list(Loader(shards, Rows(index.splits), SMALL, 0, 1).batches(Cursor()))


def test_a_block_has_both_of_its_digests(shards: Path) -> None:
    index = Index.load(shards)
    for name, said in (("sha256", "SHA-256"), ("xxh3", "XXH3")):
        wrong = dataclasses.replace(index.blocks[0], **{name: "0"})  # pyright: ignore
        dataclasses.replace(index, blocks=(wrong, *index.blocks[1:])).save(shards)
        assert f"{wrong.member} at byte {wrong.offset}: its {said} differs" in _say(shards)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("user", lambda v: v + 1000, "an id of 'user' is outside of its table"),
        ("user", lambda v: v - 1000, "an id of 'user' is outside of its table"),
        ("price", lambda v: v * np.float32(np.nan), "a number of 'price' is not finite"),
        ("label", lambda v: v * np.float32(0.5), "a label is neither 0 nor 1"),
        ("label", lambda v: 1 - v, "positives, the index says"),
        ("row_id", lambda v: v * 0, "a row_id is negative or stands twice"),
        ("row_id", lambda v: v - 10_000, "a row_id is negative or stands twice"),
    ],
)
def test_rows_that_cannot_be_are_found(
    shards: Path, name: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    index = Index.load(shards)
    number, block = next(
        (n, b) for n, b in enumerate(index.blocks) if 2 * b.positives != b.rows and b.rows > 1
    )
    table = ShardReader(shards, index).read(block)
    _rewrite(shards, number, _column(table, name, change(table[name].to_numpy())))
    assert message in _say(shards) and block.member in _say(shards)


def test_totals_that_differ_are_found(shards: Path) -> None:
    index = Index.load(shards)
    table = ShardReader(shards, index).read(index.blocks[0])
    _rewrite(shards, 0, table, rows=index.blocks[0].rows - 1)
    assert f"{len(table)} rows, the index says {len(table) - 1}" in _say(shards)


def _retar(shards: Path, change: Callable[[tarfile.TarFile, list], None]) -> str:
    """Write the first shard's tar again after `change`; its size in the index follows."""
    index = Index.load(shards)
    name = next(iter(index.shards))
    with tarfile.open(shards / name) as tar:
        found = [(m, tar.extractfile(m).read()) for m in tar]  # pyright: ignore
    with tarfile.open(shards / name, "w", format=tarfile.USTAR_FORMAT) as tar:
        change(tar, found)
        for member, data in found:
            tar.addfile(member, io.BytesIO(data))
    sizes = {**index.shards, name: (shards / name).stat().st_size}
    dataclasses.replace(index, shards=sizes).save(shards)
    return name


def test_a_member_that_no_block_knows_is_found(shards: Path) -> None:
    _retar(shards, lambda tar, found: found.append((_info("extra.arrow", 5), b"hello")))
    assert "member extra.arrow at byte" in _say(shards) and "not in the index" in _say(shards)


def test_a_member_that_stands_twice_is_found(shards: Path) -> None:
    _retar(shards, lambda tar, found: found.append(found[0]))
    assert "stands twice in the tar" in _say(shards)


def test_a_member_that_is_missing_is_found(shards: Path) -> None:
    _retar(shards, lambda tar, found: found.pop())
    assert "the tar has no member of this name" in _say(shards)


def test_a_member_of_another_name_is_found(shards: Path) -> None:
    def rename(tar: tarfile.TarFile, found: list) -> None:
        found[1][0].name = "other.arrow"

    _retar(shards, rename)
    assert "the tar has no member of this name" in _say(shards)
    assert "member other.arrow" in _say(shards)


def _info(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, "/etc/passwd" if kind in b"12" else ""
    return info


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.FIFOTYPE, "a named pipe"),
        (tarfile.DIRTYPE, "a folder"),
        (tarfile.CHRTYPE, "of the kind b'3'"),
    ],
)
def test_members_that_are_not_plain_are_refused(shards: Path, kind: bytes, what: str) -> None:
    _retar(shards, lambda tar, found: tar.addfile(_info("odd.arrow", kind=kind)))
    assert f"header at byte 0: it is {what}, no plain file" in _say(shards)


def test_a_member_that_reaches_past_the_end_is_refused(shards: Path) -> None:
    name = next(iter(Index.load(shards).shards))
    with (shards / name).open("r+b") as file:
        file.write(_info("train-big.arrow", 1 << 30).tobuf(tarfile.USTAR_FORMAT))
    assert "reaches past the end" in _say(shards)


def test_a_tar_without_its_end_mark_is_refused(shards: Path) -> None:
    index = Index.load(shards)
    name = next(iter(index.shards))
    last = max((b for b in index.blocks if b.shard == name), key=lambda b: b.offset)
    end = last.offset + last.bytes + -last.bytes % 512
    with (shards / name).open("r+b") as file:
        file.truncate(end)
    dataclasses.replace(index, shards={**index.shards, name: end}).save(shards)
    assert "cut, it has no end mark" in _say(shards)


def test_an_extended_header_may_not_rename(shards: Path) -> None:
    def rename(tar: tarfile.TarFile, found: list) -> None:
        found[0][0].pax_headers = {"path": "other.arrow"}
        tar.format = tarfile.PAX_FORMAT

    _retar(shards, rename)
    assert "an extended header sets 'path'" in _say(shards)


def test_the_members_are_those_that_tarfile_finds(sound: Path) -> None:
    for shard in Index.load(sound).shards:
        with tarfile.open(sound / shard) as tar:
            expected = [(m.name, m.offset_data, m.size) for m in tar]
        assert [dataclasses.astuple(m) for m in members(open_storage(sound), shard)] == expected


def test_tars_of_stock_webdataset_with_our_blocks_are_read(sound: Path, tmp_path: Path) -> None:
    index = Index.load(sound)
    reader = ShardReader(sound, index)
    shutil.copytree(sound / "vocabulary", tmp_path / "vocabulary")
    for name, blocks in (("a.tar", index.blocks[::2]), ("b.tar", index.blocks[1::2])):
        with wds.TarWriter(str(tmp_path / name)) as tar:  # pyright: ignore
            for block in blocks:
                key = block.member.removesuffix(".arrow")
                tar.write({"__key__": key, "arrow": reader.fetch(block)})
    reindexed(index, tmp_path, ["a.tar", "b.tar"]).save(tmp_path)
    assert verify(tmp_path).problems == ()
    theirs, ours = (
        [b.row_id.tolist() for b in Loader(at, Rows(("train",)), SMALL, 0, 1).batches(Cursor())]
        for at in (tmp_path, sound)
    )
    assert theirs == ours
    with pytest.raises(UserError, match="blocks of the index are in none of the tars"):
        reindexed(index, tmp_path, ["a.tar"])
