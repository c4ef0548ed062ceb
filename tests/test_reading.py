"""Loader: mixing of domains, corrupt blocks, URLs, token lists and memory, on real shards."""

import dataclasses
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.batch import Batch, columns_of
from data_shards.errors import UserError
from data_shards.index import Index
from data_shards.loader import Cursor, Loader, Reading, Rows
from data_shards.mixing import quotas
from data_shards.reader import batch_columns
from data_shards.schema import Field, Schema
from data_shards.splits import SplitConfig
from data_shards.stored import Stored
from data_shards.writer import write_shards
from tests.toy_source import SCHEMA, toy_rows, toy_source

TRAIN = Rows(("train",))
SMALL = Reading(global_batch=48, lanes=24, shuffle_rows=150)
MIXES = (
    SMALL,
    dataclasses.replace(SMALL, sampler="domain_pure"),
    dataclasses.replace(SMALL, mix="temperature", temperature=3.0),
    dataclasses.replace(SMALL, mix="temperature", temperature=3.0, sampler="domain_pure"),
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reading") / "shards"
    write_shards(toy_source(), SCHEMA, SplitConfig(), out, block_rows=32)
    return out


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A set of which the training blocks 2 and 5 are corrupt."""
    write_shards(toy_source(), SCHEMA, SplitConfig(), tmp_path / "damaged", block_rows=32)
    for block in np.array(Index.load(tmp_path / "damaged").select(("train",)), object)[[2, 5]]:
        path = tmp_path / "damaged" / block.shard
        data = bytearray(path.read_bytes())
        data[block.offset + block.bytes // 2] ^= 255
        path.write_bytes(data)
    return tmp_path / "damaged"


def _row_ids(loader: Loader, cursor: Cursor) -> list[list[int]]:
    return [batch.row_id.tolist() for batch in loader.batches(cursor)]


def _epoch(shards: Path, reading: Reading, epoch: int = 0) -> list[Batch]:
    return list(Loader(shards, TRAIN, reading, 0, 1).batches(Cursor(epoch)))


@pytest.mark.parametrize("reading", MIXES)
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_any_number_of_ranks_reads_the_same_global_batches(
    shards: Path, reading: Reading, ranks: int
) -> None:
    alone = _row_ids(Loader(shards, TRAIN, reading, 0, 1), Cursor(2))
    loaders = [Loader(shards, TRAIN, reading, rank, ranks) for rank in range(ranks)]
    slices = [_row_ids(loader, Cursor(2)) for loader in loaders]
    assert [sum(parts, []) for parts in zip(*slices, strict=True)] == alone
    assert {loader.steps(2) for loader in loaders} == {len(alone)}


@pytest.mark.parametrize("reading", MIXES)
@settings(max_examples=5)
@given(data=st.data())
def test_a_stop_at_any_step_goes_on_at_any_number_of_ranks(
    shards: Path, reading: Reading, data: st.DataObject
) -> None:
    before = Loader(shards, TRAIN, reading, 0, 1)
    cursor = Cursor(data.draw(st.integers(0, 3)), data.draw(st.integers(0, before.steps())))
    ranks = data.draw(st.sampled_from([1, 2, 3, 4, 8]))
    after = [_row_ids(Loader(shards, TRAIN, reading, r, ranks), cursor) for r in range(ranks)]
    joined = [sum(parts, []) for parts in zip(*after, strict=True)]
    assert joined == _row_ids(before, Cursor(cursor.epoch))[cursor.step :]


@settings(max_examples=15)
@given(data=st.data())
def test_each_row_once_per_epoch_whatever_the_sizes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    names = st.sampled_from(["books", "music", "toys"])
    sizes = data.draw(st.dictionaries(names, st.integers(3, 90), min_size=1))
    out = tmp_path_factory.mktemp("case") / "shards"
    rows = toy_rows(sizes, seed=data.draw(st.integers(0, 9)))
    whole = SplitConfig(parts={"train": 1.0})
    write_shards(toy_source(rows), SCHEMA, whole, out, block_rows=data.draw(st.integers(1, 40)))
    ranks = data.draw(st.sampled_from([1, 2, 3, 4, 8]))
    reading = Reading(
        global_batch=24 * data.draw(st.integers(1, 3)),
        lanes=24,
        shuffle_rows=data.draw(st.integers(1, 300)),
        sampler=data.draw(st.sampled_from(["mixed", "domain_pure"])),
        threads=data.draw(st.integers(1, 3)),
    )
    parts = [_row_ids(Loader(out, TRAIN, reading, r, ranks), Cursor()) for r in range(ranks)]
    read = [row for part in parts for step in part for row in step if row >= 0]
    assert sorted(read) == list(range(sum(sizes.values())))


@pytest.mark.parametrize("sampler", ["mixed", "domain_pure"])
def test_temperature_gives_each_domain_its_share_and_each_row_its_turn(
    shards: Path, sampler: str
) -> None:
    reading = dataclasses.replace(MIXES[2], sampler=sampler, global_batch=24)
    loader = Loader(shards, TRAIN, reading, 0, 1)
    share = quotas(list(loader.rows_by_domain.values()), 3.0)
    names = toy_rows()["domain"].to_pylist()
    counts = Counter()
    for epoch in range(4):
        batches = _epoch(shards, reading, epoch)
        domain = torch.cat([batch.domain[batch.weight > 0] for batch in batches])
        assert torch.bincount(domain).tolist() == share and sum(share) == loader.total_rows
        assert len(batches) == loader.steps(epoch) == loader.steps(0)
        counts.update(int(row) for b in batches for row in b.row_id if row >= 0)
    index = Index.load(shards)
    assert len(counts) <= loader.total_rows
    for domain, rows in loader.rows_by_domain.items():
        quota = share[loader.domains.index(domain)]
        own = [n for row, n in counts.items() if names[row] == domain]
        assert sum(own) == 4 * quota and max(own) == -(-4 * quota // rows)
        assert len(own) == min(rows, 4 * quota) or min(own) >= 4 * quota // rows
    assert index.rows > loader.total_rows


def test_rows_in_order_know_no_temperature(shards: Path) -> None:
    plain, mixed = (
        _row_ids(Loader(shards, TRAIN, reading, 0, 1, shuffle=False), Cursor())
        for reading in (MIXES[0], MIXES[2])
    )
    assert plain == mixed


def test_the_number_of_threads_changes_nothing(shards: Path) -> None:
    one, many = (
        _row_ids(Loader(shards, TRAIN, dataclasses.replace(SMALL, threads=n), 0, 1), Cursor())
        for n in (1, 7)
    )
    assert one == many


@pytest.mark.parametrize("ranks", [1, 4])
def test_corrupt_blocks_are_left_out_counted_and_listed(damaged: Path, ranks: int) -> None:
    index = Index.load(damaged)
    bad = np.array(index.select(("train",)), object)[[2, 5]]
    lost = sum(block.rows for block in bad)
    skip = dataclasses.replace(SMALL, corrupt="skip")
    said: list[str] = []
    loaders = [Loader(damaged, TRAIN, skip, r, ranks, say=said.append) for r in range(ranks)]
    strict = Loader(damaged, TRAIN, SMALL, 0, 1)
    for _ in range(2):
        parts = [list(loader.batches(Cursor())) for loader in loaders]
        assert {len(part) for part in parts} == {strict.steps()}
        read = [int(i) for part in parts for b in part for i in b.row_id if i >= 0]
        assert len(read) == len(set(read)) == strict.total_rows - lost
        for batch in (b for part in parts for b in part):
            padding = batch.row_id < 0
            assert (batch.weight == 0).tolist() == padding.tolist()
            assert batch.label[padding].sum() == 0 and batch.domain[padding].sum() == 0
            for key in batch.ids.keys():
                assert (batch.ids[key].lengths()[padding] == 0).all()
    found = {item.member: item for loader in loaders for item in loader.skipped}
    assert sorted(found) == sorted(block.member for block in bad)
    for block in bad:
        item = found[block.member]
        before = index.blocks[: index.blocks.index(block)]
        assert item.rows == block.rows and item.shard == block.shard
        assert item.first_row == sum(b.rows for b in before)
    assert sum("XXH3 differs" in line for line in said) == sum(len(x.skipped) for x in loaders)
    with pytest.raises(UserError, match="XXH3 differs"):
        list(strict.batches(Cursor()))


def test_only_corrupt_blocks_are_skipped(damaged: Path) -> None:
    """A shard that cannot be read is no reason to go on without its rows."""
    loader = Loader(damaged, TRAIN, dataclasses.replace(SMALL, corrupt="skip"), 0, 1)
    (damaged / loader.indexes[0].blocks[0].shard).unlink()
    with pytest.raises(UserError, match="could not be read"):
        list(loader.batches(Cursor()))


def test_when_all_is_corrupt_all_is_padding(damaged: Path) -> None:
    index = Index.load(damaged)
    for name, size in index.shards.items():
        (damaged / name).write_bytes(b"\0" * size)
    loader = Loader(damaged, TRAIN, dataclasses.replace(SMALL, corrupt="skip"), 0, 1)
    batches = list(loader.batches(Cursor()))
    assert len(batches) == loader.steps() and not any(b.weight.any() for b in batches)
    assert sum(item.rows for item in loader.skipped) == loader.total_rows


@pytest.fixture
def url(shards: Path) -> Iterator[str]:
    store = fsspec.filesystem("memory")
    store.put(f"{shards}/", "/far/", recursive=True)
    yield "memory://far"
    store.rm("/far", recursive=True)


def test_a_url_reads_as_a_folder_does_and_the_cache_reads_it_once(
    shards: Path, url: str, tmp_path: Path
) -> None:
    reading = dataclasses.replace(SMALL, cache_dir=str(tmp_path / "cache"))
    near = _row_ids(Loader(shards, TRAIN, SMALL, 0, 1), Cursor())
    loader = Loader(url, TRAIN, reading, 0, 1)
    assert _row_ids(loader, Cursor()) == near
    for shard in Index.load(shards).shards:
        fsspec.filesystem("memory").rm(f"/far/{shard}")
    assert _row_ids(loader, Cursor()) == near


def test_token_lists_become_jagged_tensors() -> None:
    schema = Schema(
        (
            Field("user", "id"),
            Field("words", "tokens"),
        )
    )
    table = pa.table(
        {
            "row_id": pa.array([7, 8, 9]),
            "label": pa.array([1, 0, 1], pa.float32()),
            "user": pa.array([1, 2, 3], pa.int32()),
            "words": pa.array([[5, 6], [], [7]], pa.list_(pa.int32())),
        }
    )
    zero, place = np.zeros(1, np.int64), np.array([[2, 0, 1, -1], [-1, 0, 1, -1]])
    stored = Stored.of(table, batch_columns(schema))
    columns = columns_of(schema, [stored], zero, place, np.array([0, 4]), zero)
    batch = columns.batch(0, 3).to(torch.device("cpu"))
    words = batch.tokens["words"]
    assert words.values().tolist() == [7, 5, 6] and words.lengths().tolist() == [1, 2, 0, 0]
    assert words.values().dtype == torch.int64 and words.lengths().dtype == torch.int32
    assert columns.batch(1, 2).tokens["words"].values().tolist() == [5, 6]
    assert batch.columns == {}


def _peak(folder: Path, rows: int) -> int:
    schema = Schema((Field("user", "id"), Field("price", "number")))
    table = toy_rows({"books": rows})
    write_shards(toy_source(table), schema, SplitConfig(), folder, block_rows=512)
    reading = Reading(global_batch=512, lanes=8, shuffle_rows=4096)
    loader = Loader(folder, TRAIN, reading, 0, 1)
    before = pa.total_allocated_bytes()
    arrow = 0
    tracemalloc.start()
    for _ in loader.batches(Cursor()):
        arrow = max(arrow, pa.total_allocated_bytes() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak + arrow


def test_memory_grows_with_the_blocks_and_not_with_their_rows(tmp_path: Path) -> None:
    small, large = (_peak(tmp_path / str(rows), rows) for rows in (20_000, 200_000))
    blocks = (200_000 - 20_000) * 0.6 / 512
    assert (large - small) / blocks < 3000, "more than what is known of each block"


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        ({"temperature": 0.5}, "temperature is 1 or more, not 0.5"),
        ({"temperature": float("nan")}, "temperature is 1 or more, not nan"),
        ({"mix": "even"}, "mix is proportional or temperature, not 'even'"),
        ({"corrupt": "ignore"}, "corrupt is error or skip, not 'ignore'"),
        ({"threads": 0}, "threads and cache_bytes are 1 or more"),
    ],
)
def test_wrong_readings_are_refused(reading: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Reading(**reading)
