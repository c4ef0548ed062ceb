"""Loader: the law of the order, held on real batches of real shards."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from data_shards.batch import Batch, encode_batch
from data_shards.errors import UserError
from data_shards.index import Block, Index
from data_shards.loader import Cursor, Loader, Reading, Rows
from data_shards.reader import ShardReader
from data_shards.schema import Field, Schema
from data_shards.splits import SplitConfig
from data_shards.stored import Stored
from data_shards.writer import write_shards
from tests.toy_source import SCHEMA, toy_source

READING = Reading(global_batch=48, lanes=12, shuffle_rows=150)
PURE = Reading(global_batch=48, lanes=12, shuffle_rows=150, sampler="domain_pure")
TRAIN = Rows(("train",))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("loader") / "shards"
    write_shards(toy_source(), SCHEMA, SplitConfig(), out, block_rows=32)
    return out


def _loader(
    shards: Path, reading: Reading = READING, rank: int = 0, ranks: int = 1, shuffle: bool = True
) -> Loader:
    return Loader(shards, TRAIN, reading, rank, ranks, shuffle)


def _row_ids(loader: Loader, cursor: Cursor) -> list[list[int]]:
    return [batch.row_id.tolist() for batch in loader.batches(cursor)]


def _same(a: Batch, b: Batch) -> bool:
    tensors = ("numbers", "domain", "label", "weight", "row_id")
    return (
        a.rows == b.rows
        and a.ids.keys() == b.ids.keys()
        and torch.equal(a.ids.values(), b.ids.values())
        and torch.equal(a.ids.lengths(), b.ids.lengths())
        and all(torch.equal(vars(a)[name], vars(b)[name]) for name in tensors)
    )


def _stored(shards: Path) -> dict[int, dict]:
    """row_id -> encoded row and its domain, read block by block."""
    index = Index.load(shards)
    reader = ShardReader(shards, index)
    return {
        row["row_id"]: row | {"domain_name": block.domain}
        for block in index.select(("train",))
        for row in reader.read(block).to_pylist()
    }


@pytest.mark.parametrize("reading", [READING, PURE])
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_hold_what_was_written_every_row_once(
    shards: Path, reading: Reading, shuffle: bool
) -> None:
    loader = _loader(shards, reading, shuffle=shuffle)
    stored, seen = _stored(shards), []
    for batch in loader.batches(Cursor()):
        ids = {key: batch.ids[key].to_dense() for key in batch.ids.keys()}
        assert batch.ids.keys() == [field.name for field in SCHEMA.ids]
        assert batch.ids.values().dtype == torch.int64 and batch.ids.lengths().dtype == torch.int32
        for i, row_id in enumerate(batch.row_id.tolist()):
            if row_id == -1:
                assert batch.weight[i] == batch.label[i] == 0
                assert all(len(values[i]) == 0 for values in ids.values())
                continue
            row = stored[row_id]
            seen.append(row_id)
            assert batch.weight[i] == 1 and batch.label[i] == row["label"]
            assert batch.numbers[i].tolist() == [row["price"]]
            assert loader.domains[batch.domain[i]] == row["domain_name"]
            for field in SCHEMA.ids:
                expected = row[field.name] if field.multi else [row[field.name]]
                assert ids[field.name][i].tolist() == expected
    assert sorted(seen) == sorted(stored)
    assert loader.total_rows == len(stored) == sum(loader.rows_by_domain.values())


@pytest.mark.parametrize("reading", [READING, PURE])
@pytest.mark.parametrize("ranks", [2, 3, 4, 12])
def test_any_number_of_ranks_reads_the_same_global_batches(
    shards: Path, reading: Reading, ranks: int
) -> None:
    for shuffle in (True, False):
        alone = _row_ids(_loader(shards, reading, shuffle=shuffle), Cursor(1, 3))
        slices = [
            _row_ids(_loader(shards, reading, rank, ranks, shuffle), Cursor(1, 3))
            for rank in range(ranks)
        ]
        assert [sum(parts, []) for parts in zip(*slices, strict=True)] == alone


@pytest.mark.parametrize("reading", [READING, PURE])
def test_a_cursor_gives_the_tail_bit_for_bit(shards: Path, reading: Reading) -> None:
    loader = _loader(shards, reading, rank=1, ranks=2)
    whole = list(loader.batches(Cursor(2)))
    assert len(whole) == loader.steps(2) == loader.steps()
    for step in range(loader.steps() + 1):
        tail = list(loader.batches(Cursor(2, step)))
        assert len(tail) == len(whole) - step
        assert all(_same(a, b) for a, b in zip(whole[step:], tail, strict=True))


@pytest.mark.parametrize("reading", [READING, PURE])
def test_all_ranks_know_the_real_rows_of_the_global_batch(shards: Path, reading: Reading) -> None:
    ranks = [list(_loader(shards, reading, rank, 4).batches(Cursor())) for rank in range(4)]
    for parts in zip(*ranks, strict=True):
        assert {part.rows for part in parts} == {sum(int(part.weight.sum()) for part in parts)}
        assert {len(part) for part in parts} == {12}
        assert parts[0].rows > 0


def test_epochs_and_seeds_differ_and_repeat(shards: Path) -> None:
    loader = _loader(shards)
    first = _row_ids(loader, Cursor(0))
    assert first == _row_ids(_loader(shards), Cursor(0))
    assert first != _row_ids(loader, Cursor(1))
    other = Reading(global_batch=48, lanes=12, shuffle_rows=150, seed=2)
    assert first != _row_ids(_loader(shards, other), Cursor(0))


def test_a_domain_pure_batch_holds_one_domain(shards: Path) -> None:
    seen = []
    for batch in _loader(shards, PURE).batches(Cursor()):
        domains = set(batch.domain[batch.weight > 0].tolist())
        assert len(domains) == 1
        seen += domains
    assert set(seen) == {0, 1, 2} and seen != sorted(seen)


def test_fewer_rows_than_ranks_still_make_one_step_everywhere(tmp_path: Path) -> None:
    rows = toy_source().rows.slice(0, 2)
    split = SplitConfig(parts={"train": 1.0})
    write_shards(toy_source(rows), SCHEMA, split, tmp_path / "tiny")
    ranks = [list(_loader(tmp_path / "tiny", rank=r, ranks=4).batches(Cursor())) for r in range(4)]
    assert [len(batches) for batches in ranks] == [1] * 4
    ids = [i for (batch,) in ranks for i in batch.row_id.tolist() if i >= 0]
    assert sorted(ids) == [0, 1] and all(batch.rows == 2 for (batch,) in ranks)


def test_several_sets_are_read_as_one(shards: Path, tmp_path: Path) -> None:
    split = SplitConfig()
    trunk = write_shards(toy_source(), SCHEMA, split, tmp_path / "trunk", hold_out=("toys",))
    base = trunk.load_vocabulary(tmp_path / "trunk")
    choice = {"only_domains": ("toys",), "base": base}
    write_shards(toy_source(), SCHEMA, split, tmp_path / "toys", **choice)  # pyright: ignore
    both = Loader([tmp_path / "trunk", tmp_path / "toys"], TRAIN, READING, 0, 1)
    assert both.domains == ("books", "music", "toys")
    rows = sorted(i for step in _row_ids(both, Cursor()) for i in step if i >= 0)
    assert rows == sorted(_stored(shards))
    only = Loader(
        [tmp_path / "trunk", tmp_path / "toys"], Rows(("train",), ("toys",)), READING, 0, 1
    )
    assert only.domains == ("toys",)
    with pytest.raises(UserError, match="unknown domain 'toyz'; the nearest is"):
        Loader([tmp_path / "trunk", tmp_path / "toys"], Rows(("train",), ("toyz",)), READING, 0, 1)
    with pytest.raises(UserError, match="its ids are not those of .* .another vocabulary."):
        Loader([tmp_path / "trunk", shards], TRAIN, READING, 0, 1)


def test_sets_of_two_schemas_are_refused(shards: Path, tmp_path: Path) -> None:
    write_shards(toy_source(), Schema((Field("user", "id"),)), SplitConfig(), tmp_path / "other")
    with pytest.raises(UserError, match="shards of another schema: the field 'user' differs"):
        Loader([shards, tmp_path / "other"], TRAIN, READING, 0, 1)
    with pytest.raises(UserError, match="no shard set is given"):
        Loader([], TRAIN, READING, 0, 1)


def _reading_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("read-ahead")]


def test_the_thread_ends_with_the_iterator(shards: Path) -> None:
    batches = _loader(shards).batches(Cursor())
    next(batches)
    assert _reading_threads()
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not _reading_threads()
    list(_loader(shards).batches(Cursor()))
    assert not _reading_threads()


def test_a_damaged_shard_reaches_the_consumer(shards: Path, tmp_path: Path) -> None:
    write_shards(toy_source(), SCHEMA, SplitConfig(), tmp_path / "damaged", block_rows=32)
    index = Index.load(tmp_path / "damaged")
    block = index.select(("train",))[3]
    path = tmp_path / "damaged" / block.shard
    data = bytearray(path.read_bytes())
    data[block.offset + 9] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"member {block.member} at byte {block.offset}"):
        list(_loader(tmp_path / "damaged").batches(Cursor()))
    assert not _reading_threads()


def test_an_encoded_table_becomes_one_batch(shards: Path) -> None:
    index = Index.load(shards)
    raw = toy_source().rows.slice(10, 5)
    table = index.load_vocabulary(shards).encode(raw)
    batch = encode_batch(SCHEMA, table, np.array([2, 1, 0, 1, 2]))
    assert batch.row_id.tolist() == [10, 11, 12, 13, 14] and batch.rows == len(batch) == 5
    assert batch.domain.tolist() == [2, 1, 0, 1, 2]
    tags = [values.tolist() for values in batch.ids["tags"].to_dense()]
    assert tags == table["tags"].to_pylist()
    moved = batch.to(torch.device("cpu"))
    assert _same(batch, moved)


def test_a_schema_without_numbers_has_none(tmp_path: Path) -> None:
    schema = Schema((Field("user", "id"),))
    write_shards(toy_source(), schema, SplitConfig(), tmp_path / "shards")
    batch = next(_loader(tmp_path / "shards").batches(Cursor()))
    assert batch.numbers.shape == (48, 0) and isinstance(batch.numbers, torch.Tensor)


@pytest.mark.parametrize(
    ("reading", "ranks", "message"),
    [
        ({"global_batch": 1000, "lanes": 24}, 3, "global batch 1000 is not divisible by 3 ranks"),
        ({"global_batch": 1000, "lanes": 24}, 3, "set it to 999 or 1002, or change the ranks"),
        ({"global_batch": 1000, "lanes": 24}, 5, "number of lanes 24 is not divisible by 5 ranks"),
        ({"global_batch": 8, "lanes": 24}, 1, "24 lanes cannot share a global batch of 8"),
        ({"global_batch": 0}, 1, "global_batch, lanes and shuffle_rows are 1 or more"),
        ({"seed": -1}, 1, "seed is 0 or more, not -1"),
        ({"sampler": "pure"}, 1, "sampler is mixed or domain_pure, not 'pure'"),
    ],
)
def test_wrong_readings_are_refused(shards: Path, reading: dict, ranks: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _loader(shards, Reading(**reading), 0, ranks)


def test_no_rows_is_an_error(shards: Path) -> None:
    with pytest.raises(UserError, match="no rows in the splits none of the domains all"):
        Loader(shards, Rows(()), READING, 0, 1)
    with pytest.raises(UserError, match="unknown split 'vaild'; the nearest is 'valid'"):
        Loader(shards, Rows(("vaild",)), READING, 0, 1)


def test_only_chosen_blocks_are_read_and_each_once(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Block] = []
    original = ShardReader.stored

    def counted(self: ShardReader, block: Block) -> Stored:
        read.append(block)
        return original(self, block)

    monkeypatch.setattr(ShardReader, "stored", counted)
    one_lane = Reading(global_batch=16, lanes=1, shuffle_rows=48)
    loader = Loader(shards, Rows(("train",), ("toys",)), one_lane, 0, 1)
    list(loader.batches(Cursor()))
    chosen = Index.load(shards).select(("train",), ("toys",))
    assert sorted(block.member for block in read) == [block.member for block in chosen]
