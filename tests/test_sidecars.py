"""Sidecars: each row gets its own value back, and nothing that does not belong is read."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.errors import UserError
from data_shards.index import Index
from data_shards.loader import Cursor, Loader, Reading, Rows
from data_shards.reader import ShardReader
from data_shards.sidecars import Sidecar, SidecarWriter
from data_shards.splits import SplitConfig
from data_shards.writer import write_shards
from tests.toy_source import SCHEMA, toy_source

READING = Reading(global_batch=48, lanes=12, shuffle_rows=150)
MIXED = dataclasses.replace(READING, mix="temperature", temperature=3.0)
PURE = dataclasses.replace(READING, sampler="domain_pure")
KINDS = {"score": "float32", "number": "int64"}
MADE_BY = {"model": "m1", "layers": (1, 2)}
TRAIN = Rows(("train",))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sidecars") / "shards"
    write_shards(toy_source(), SCHEMA, SplitConfig(), out, block_rows=32)
    return out


@pytest.fixture(scope="module")
def index(shards: Path) -> Index:
    return Index.load(shards)


def _row_ids(shards: Path, index: Index, block: int) -> np.ndarray:
    return ShardReader(shards, index).read(index.blocks[block])["row_id"].to_numpy()


def _put(writer: SidecarWriter, shards: Path, index: Index, blocks: Sequence[int]) -> None:
    """score = row_id + 1/2, number = 2**40 + row_id."""
    for block in blocks:
        ids = _row_ids(shards, index, block)
        writer.put(block, {"number": ids + 2**40, "score": ids + np.float32(0.5)})


def _written(folder: Path, shards: Path, index: Index) -> Sidecar:
    writer = SidecarWriter(folder, index, KINDS, MADE_BY)
    _put(writer, shards, index, writer.todo)
    writer.finish()
    return Sidecar.open(folder, index, MADE_BY)


@pytest.fixture(scope="module")
def sidecar(shards: Path, index: Index, tmp_path_factory: pytest.TempPathFactory) -> Sidecar:
    return _written(tmp_path_factory.mktemp("sidecars") / "sidecar", shards, index)


def _check_batches(loader: Loader, epoch: int = 0) -> int:
    """Whether each row has its own values and padding has 0; the number of real rows."""
    rows = 0
    for batch in loader.batches(Cursor(epoch)):
        real = batch.weight == 1
        assert batch.columns["score"].dtype == torch.float32
        assert batch.columns["number"].dtype == torch.int64
        ids = batch.row_id
        zero = torch.zeros_like(ids)
        assert torch.equal(batch.columns["score"], torch.where(real, ids + 0.5, 0.0))
        assert torch.equal(batch.columns["number"], torch.where(real, ids + 2**40, zero))
        rows += int(real.sum())
    return rows


@pytest.mark.parametrize("reading", [READING, PURE, MIXED])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shuffle", [True, False])
def test_each_row_gets_its_own_value(
    shards: Path, sidecar: Sidecar, reading: Reading, ranks: int, shuffle: bool
) -> None:
    for rows in (TRAIN, Rows(("valid", "train"), ("music", "toys"))):
        loaders = [
            Loader(shards, rows, reading, rank, ranks, shuffle, sidecars=[sidecar])
            for rank in range(ranks)
        ]
        read = sum(_check_batches(loader, epoch=1) for loader in loaders)
        if reading is not MIXED or not shuffle:
            assert read == loaders[0].total_rows
        assert read % reading.global_batch, "a case without padding shows nothing about it"


def test_columns_of_several_sidecars_stand_side_by_side(
    shards: Path, index: Index, sidecar: Sidecar, tmp_path: Path
) -> None:
    writer = SidecarWriter(tmp_path / "more", index, {"block": "int64"}, {})
    for block in writer.todo:
        writer.put(block, {"block": np.full(index.blocks[block].rows, block)})
    writer.finish()
    more = Sidecar.open(tmp_path / "more", index)
    loader = Loader(shards, TRAIN, READING, 0, 1, sidecars=[sidecar, more])
    assert _check_batches(loader)
    batch = next(loader.batches(Cursor()))
    assert list(batch.columns) == ["score", "number", "block"]
    assert batch.to(torch.device("cpu")).columns.keys() == batch.columns.keys()
    with pytest.raises(UserError, match="column 'score' stands in .*sidecar too; give one"):
        Loader(shards, TRAIN, READING, 0, 1, sidecars=[sidecar, sidecar])


def test_rows_of_a_skipped_block_are_zero(tmp_path: Path) -> None:
    out = tmp_path / "shards"
    write_shards(toy_source(), SCHEMA, SplitConfig(), out, block_rows=32)
    index = Index.load(out)
    sidecar = _written(tmp_path / "sidecar", out, index)
    block = index.select(("train",))[3]
    with (out / block.shard).open("r+b") as file:
        file.seek(block.offset + block.bytes // 2)
        file.write(b"\xff" * 9)
    reading = dataclasses.replace(READING, corrupt="skip")
    loader = Loader(out, TRAIN, reading, 0, 1, say=lambda _: None, sidecars=[sidecar])
    assert _check_batches(loader) == loader.total_rows - block.rows


def test_each_of_several_sets_has_its_own(tmp_path: Path) -> None:
    split = SplitConfig()
    trunk, toys = tmp_path / "trunk", tmp_path / "toys"
    first = write_shards(toy_source(), SCHEMA, split, trunk, block_rows=32, hold_out=("toys",))
    base = first.load_vocabulary(trunk)
    second = write_shards(
        toy_source(), SCHEMA, split, toys, block_rows=32, only_domains=("toys",), base=base
    )
    one = _written(tmp_path / "one", trunk, first)
    two = _written(tmp_path / "two", toys, second)
    both = Loader([trunk, toys], TRAIN, READING, 0, 1, sidecars=[two, one])
    assert _check_batches(both) == both.total_rows
    only = Rows(("train",), ("toys",))
    assert _check_batches(Loader([trunk, toys], only, READING, 0, 1, sidecars=[two]))
    assert _check_batches(Loader([trunk, toys], only, READING, 0, 1, sidecars=[one, two]))
    with pytest.raises(UserError, match=r"set 1 has the columns none, shard set 0 has number \(i"):
        Loader([trunk, toys], TRAIN, READING, 0, 1, sidecars=[one])
    with pytest.raises(UserError, match="two: made for another shard set than those that are read"):
        Loader(trunk, TRAIN, READING, 0, 1, sidecars=[one, two])
    with pytest.raises(UserError, match="two: its shard set is .*, expected "):
        Sidecar.open(tmp_path / "two", first)


@settings(max_examples=10)
@given(data=st.data())
def test_any_ranks_write_the_same_bytes_after_any_stop(
    tmp_path_factory: pytest.TempPathFactory,
    shards: Path,
    index: Index,
    sidecar: Sidecar,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("ranks") / "sidecar"
    for _ in range(data.draw(st.integers(0, 2))):  # killed at some block each time
        ranks = data.draw(st.integers(1, 3))
        for rank in range(ranks):
            writer = SidecarWriter(folder, index, KINDS, MADE_BY, rank, ranks)
            _put(writer, shards, index, writer.todo[: data.draw(st.integers(0, 9))])
            with (folder / f"done-{rank}.i64").open("ab") as file:
                file.write(b"\1" * data.draw(st.integers(0, 7)))
    ranks = data.draw(st.integers(1, 3))
    writers = [SidecarWriter(folder, index, KINDS, MADE_BY, rank, ranks) for rank in range(ranks)]
    for writer in writers:
        _put(writer, shards, index, writer.todo)
    writers[0].finish()
    again = Sidecar.open(folder, index, MADE_BY)
    again.verify()
    assert again.sha256 == sidecar.sha256
    assert {path.name for path in folder.iterdir()} == {"sidecar.json", "score.f32", "number.i64"}


def test_what_is_not_whole_is_refused(shards: Path, index: Index, tmp_path: Path) -> None:
    folder = tmp_path / "sidecar"
    writer = SidecarWriter(folder, index, KINDS, MADE_BY)
    _put(writer, shards, index, writer.todo[:-2])
    with pytest.raises(UserError, match="sidecar.json: missing, so it was never finished"):
        Sidecar.open(folder, index)
    last = len(index.blocks) - 2
    with pytest.raises(UserError, match=f"2 of {last + 2} blocks are not written, first .* {last}"):
        writer.finish()
    _put(writer, shards, index, [last, last + 1, 4])
    with pytest.raises(UserError, match=f"1 of {last + 2} blocks are written twice, first block 4"):
        writer.finish()
    assert not (folder / "sidecar.json").exists()


def test_a_writer_is_told_the_same_and_ends_once(
    shards: Path, index: Index, tmp_path: Path
) -> None:
    folder = tmp_path / "sidecar"
    SidecarWriter(folder, index, KINDS, MADE_BY)
    with pytest.raises(UserError, match="begun with other choices .they differ in made_by.; rep"):
        SidecarWriter(folder, index, KINDS, {"model": "m2"})
    with pytest.raises(UserError, match="sidecar column '../x': a name is letters, digits and _"):
        SidecarWriter(folder, index, {"../x": "int64"}, {})
    with pytest.raises(UserError, match="unknown type of a sidecar column 'float64'; the nearest"):
        SidecarWriter(folder, index, {"x": "float64"}, {})
    _written(folder, shards, index)
    with pytest.raises(UserError, match="sidecar: exists already; give another path or delete it"):
        SidecarWriter(folder, index, KINDS, MADE_BY)


def test_a_disk_that_fails_is_said(shards: Path, index: Index, tmp_path: Path) -> None:
    writer = SidecarWriter(tmp_path / "sidecar", index, KINDS, MADE_BY)
    (tmp_path / "sidecar" / "score.f32").unlink()
    with pytest.raises(UserError, match="could not be written .No such file.*goes on where it was"):
        _put(writer, shards, index, [0])


def test_columns_of_another_kind_or_size_are_no_user_mistake(index: Index, tmp_path: Path) -> None:
    writer = SidecarWriter(tmp_path / "sidecar", index, {"x": "int64"}, {})
    rows = index.blocks[0].rows
    with pytest.raises(TypeError):
        writer.put(0, {"x": np.zeros(rows, np.float32)})
    with pytest.raises(AssertionError):
        writer.put(0, {"x": np.zeros(rows + 1, np.int64)})
    with pytest.raises(AssertionError):
        writer.put(0, {"y": np.zeros(rows, np.int64)})


def test_what_was_made_by_another_model_is_refused(sidecar: Sidecar, index: Index) -> None:
    with pytest.raises(UserError, match="its made_by.model is 'm1', expected 'm2'; give the one"):
        Sidecar.open(sidecar.folder, index, {**MADE_BY, "model": "m2"})
    with pytest.raises(UserError, match="its made_by.layers is .1, 2., expected None"):
        Sidecar.open(sidecar.folder, index, {"model": "m1"})
    assert Sidecar.open(sidecar.folder, index).made_by == {"model": "m1", "layers": [1, 2]}


def test_damage_is_refused(shards: Path, index: Index, tmp_path: Path) -> None:
    sidecar = _written(tmp_path / "sidecar", shards, index)
    sidecar.verify()
    path, manifest = sidecar.folder / "score.f32", sidecar.folder / "sidecar.json"
    whole, said = path.read_bytes(), manifest.read_text()
    path.write_bytes(whole[:99] + b"?" + whole[100:])
    with pytest.raises(UserError, match="score.f32: its sha256 is .*write it again"):
        Sidecar.open(sidecar.folder, index).verify()
    for size in (len(whole) - 4, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"score.f32: its size in bytes is {size}, expected"):
            Sidecar.open(sidecar.folder, index)
    path.unlink()
    with pytest.raises(UserError, match="score.f32: its size in bytes is None, expected"):
        Sidecar.open(sidecar.folder, index)
    content = json.loads(said)
    wrongs = {
        said[:40]: "cut or corrupt .JSONDecodeError",
        "[]": "cut or corrupt .TypeError",
        "{}": "cut or corrupt .KeyError: 'format'",
        json.dumps(content | {"columns": 3}): "cut or corrupt .columns is 3.; write it again",
        json.dumps(content | {"format": 9}): "its format is 9, expected 1",
        json.dumps(content | {"rows": 7}): f"its rows is 7, expected {index.rows}",
        json.dumps(content | {"columns": {"x": [1]}}): "unknown type of a sidecar column",
    }
    for text, message in wrongs.items():
        manifest.write_text(text)
        with pytest.raises(UserError, match=message):
            Sidecar.open(sidecar.folder, index)
