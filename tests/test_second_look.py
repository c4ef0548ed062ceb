"""A block is corrupt when two readings say so: what passes costs no row, whatever it was."""

import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_shards import Block, Index, ShardReader, UserError
from data_shards.batch import Batch
from data_shards.errors import LostError
from data_shards.loader import Cursor, Loader, Reading, Rows
from data_shards.splits import SplitConfig
from data_shards.storage import LocalStorage, RemoteStorage
from data_shards.writer import write_shards
from tests.toy_source import SCHEMA, toy_source

TRAIN = Rows(("train",))
FAR = "memory://second-look"
Answer = Callable[[int, bytes], bytes]
"""What a store gives for the n-th reading (from 1) of a block, and what lies there."""
WRONG: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "short": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "flipped": lambda data: bytes([*data[:-40], data[-40] ^ 1, *data[-39:]]),
    "zeros": lambda data: bytes(len(data)),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A set in a folder, and the same one at FAR."""
    out = tmp_path_factory.mktemp("look") / "shards"
    write_shards(toy_source(), SCHEMA, SplitConfig(), out, block_rows=32)
    store = fsspec.filesystem("memory")
    store.put(f"{out}/", "/second-look/", recursive=True)
    yield out
    store.rm("/second-look", recursive=True)


@contextmanager
def _answering(answers: dict[tuple[str, int], Answer]) -> Iterator[Counter[tuple[str, int]]]:
    """Blocks, by shard and offset, of which every reading is answered so; how many there were."""
    readings: Counter[tuple[str, int]] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for kind in (LocalStorage, RemoteStorage):

            def read(self, name: str, offset: int, size: int, whole=kind.read_range) -> bytes:
                data, place = whole(self, name, offset, size), (name, offset)
                readings[place] += 1
                return answers[place](readings[place], data) if place in answers else data

            patch.setattr(kind, "read_range", read)
        yield readings


def _once(wrong: Callable[[bytes], bytes]) -> Answer:
    return lambda reading, data: wrong(data) if reading == 1 else data


def _blocks(shards: Path) -> list[Block]:
    return list(Index.load(shards).select(TRAIN.splits))


def _tensors(batch: Batch) -> list[Tensor]:
    rest = (batch.numbers, batch.domain, batch.label, batch.weight, batch.row_id)
    return [batch.ids.values(), batch.ids.lengths(), *rest]


def _read(where: str | Path, reading: Reading) -> tuple[list[Tensor], Loader]:
    loader = Loader(where, TRAIN, reading, 0, 1)
    return [t for batch in loader.batches(Cursor()) for t in _tensors(batch)], loader


def _small(corrupt: str, cache: str = "") -> Reading:
    return Reading(48, 24, 150, corrupt=corrupt, cache_dir=cache)  # type: ignore[arg-type]


@pytest.mark.parametrize("corrupt", ["error", "skip"])
@pytest.mark.parametrize("way", ["folder", "url", "cache", "damaged cache"])
@settings(max_examples=8)
@given(data=st.data())
def test_a_reading_that_goes_wrong_once_changes_no_bit(
    shards: Path, way: str, corrupt: str, data: st.DataObject
) -> None:
    wrong = st.sampled_from(sorted(WRONG))
    places = st.sampled_from([(block.shard, block.offset) for block in _blocks(shards)])
    chosen = data.draw(st.dictionaries(places, wrong, min_size=1))
    answers = {place: _once(WRONG[name]) for place, name in chosen.items()}
    wanted, as_ever = _read_by(way, shards, corrupt, {})
    found, readings = _read_by(way, shards, corrupt, answers)
    assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))
    assert readings == as_ever + Counter(dict.fromkeys(chosen, 1))


def _read_by(
    way: str, shards: Path, corrupt: str, answers: dict[tuple[str, int], Answer]
) -> tuple[list[Tensor], Counter[tuple[str, int]]]:
    """All tensors of an epoch of which no block was left out, and the readings of each block."""
    with TemporaryDirectory() as folder:
        reading = _small(corrupt, folder if "cache" in way else "")
        if way == "damaged cache":
            _read(FAR, reading)
            for path in Path(folder).iterdir():
                path.write_bytes(WRONG["flipped"](path.read_bytes()))
        with _answering(answers) as readings:
            found, loader = _read(shards if way == "folder" else FAR, reading)
    assert loader.skipped == []
    return found, readings


@pytest.mark.parametrize("where", ["folder", "url"])
def test_what_is_wrong_twice_is_corrupt_and_read_no_third_time(shards: Path, where: str) -> None:
    bad = _blocks(shards)[3]
    place = bad.shard, bad.offset
    location = shards if where == "folder" else FAR
    for wrong in WRONG.values():
        with _answering({place: lambda _, data, wrong=wrong: wrong(data)}) as readings:
            _, loader = _read(location, _small("skip"))
            assert readings[place] == 2
            assert [(b.member, b.rows) for b in loader.skipped] == [(bad.member, bad.rows)]
            with pytest.raises(UserError, match="restore the shard"):
                _read(location, _small("error"))
            assert readings[place] == 4


def _unanswered(*, first: bool) -> Answer:
    """A disk that does not answer the first reading, or the one after a wrong one."""

    def answer(reading: int, data: bytes) -> bytes:
        if first or reading > 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return WRONG["short"](data)

    return answer


@pytest.mark.parametrize("corrupt", ["error", "skip"])
@pytest.mark.parametrize("first", [True, False])
def test_a_disk_that_does_not_answer_is_never_taken_for_damage(
    shards: Path, corrupt: str, first: bool
) -> None:
    answer, pread = _unanswered(first=first), os.pread
    bad = _blocks(shards)[3]
    readings: Counter[int] = Counter()

    def failing(file: int, size: int, offset: int) -> bytes:
        data = pread(file, size, offset)
        if (size, offset) != (bad.bytes, bad.offset):
            return data
        readings[offset] += 1
        return answer(readings[offset], data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", failing)
        with pytest.raises(LostError, match="start the same command again when its disk answers"):
            _read(shards, _small(corrupt))


def test_tables_of_rows_are_looked_at_twice_too(shards: Path) -> None:
    """Teachers and texts are made of them."""
    index = Index.load(shards)
    for verify in (True, False):
        reader, block = ShardReader(shards, index, verify=verify), index.blocks[1]
        wanted, place = reader.read(block), (block.shard, block.offset)
        for wrong in ("nothing", "short", "zeros"):
            with _answering({place: _once(WRONG[wrong])}) as readings:
                assert reader.read(block).equals(wanted) and readings[place] == 2


def test_a_shard_that_is_gone_is_no_damage(shards: Path, tmp_path: Path) -> None:
    """Even where it goes between the two readings."""
    copy, bad = tmp_path / "copy", _blocks(shards)[3]
    shutil.copytree(shards, copy)

    def gone(reading: int, data: bytes) -> bytes:
        (copy / bad.shard).unlink(missing_ok=True)
        return b""

    with (
        _answering({(bad.shard, bad.offset): gone}),
        pytest.raises(UserError, match="could not be read"),
    ):
        _read(copy, _small("skip"))
