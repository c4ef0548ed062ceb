"""Writer and index: every row lands once, in a pure block, and damage is named."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from webdataset.compat import WebDataset

from data_shards.errors import UserError
from data_shards.index import Index
from data_shards.reader import ShardReader
from data_shards.schema import Field, Schema
from data_shards.splits import SplitConfig
from data_shards.vocabulary import Vocabulary, count_values
from data_shards.writer import write_shards
from tests.toy_source import SCHEMA, toy_rows, toy_source

ROOT = Path(__file__).parents[1]
BLOCK_ROWS = 64


def _write(out: Path, **choices: object) -> Index:
    settings = {"block_rows": BLOCK_ROWS, "shard_bytes": 30_000, **choices}
    return write_shards(toy_source(), SCHEMA, SplitConfig(), out, **settings)  # pyright: ignore


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("writer") / "shards"
    _write(out)
    return out


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "copy")


def _tables(folder: Path) -> list[tuple[str, str, pa.Table]]:
    index = Index.load(folder)
    reader = ShardReader(folder, index)
    return [(block.domain, block.split, reader.read(block)) for block in index.blocks]


def test_every_row_is_written_once_in_a_block_of_its_domain(written: Path) -> None:
    raw = {row["row_id"]: row for row in toy_rows().to_pylist()}
    seen = []
    for domain, _, table in _tables(written):
        for row in table.to_pylist():
            before = raw[row["row_id"]]
            assert before["domain"] == domain
            for name in ("label", "time", "price", "title"):
                assert row[name] == before[name]
            seen.append(row["row_id"])
    assert sorted(seen) == sorted(raw)


def test_ids_are_those_of_the_vocabulary_of_the_training_rows(written: Path) -> None:
    tables = _tables(written)
    train = [i for _, split, t in tables if split == "train" for i in t["row_id"].to_pylist()]
    raw = toy_rows()
    expected = Vocabulary.build(SCHEMA, count_values(SCHEMA, raw.take(sorted(train))))
    index = Index.load(written)
    assert index.load_vocabulary(written).fingerprint == expected.fingerprint
    assert index.vocabulary.sizes == expected.sizes
    names = [field.name for field in SCHEMA.ids]
    for _, _, table in tables:
        rows = raw.take(table["row_id"].combine_chunks())
        assert expected.encode(rows).select(names).to_pylist() == table.select(names).to_pylist()


def test_the_index_counts_what_lies_there(written: Path) -> None:
    index = Index.load(written)
    rows, positives = Counter(), Counter()
    for domain, split, table in _tables(written):
        rows[domain, split] += len(table)
        positives[domain, split] += sum(table["label"].to_pylist())
    assert index.counts() == rows
    assert index.rows == sum(rows.values()) == 1041
    assert index.domains == ("books", "music", "toys")
    for pair, expected in positives.items():
        blocks = [b for b in index.blocks if (b.domain, b.split) == pair]
        assert sum(block.positives for block in blocks) == expected
        assert all(block.rows == BLOCK_ROWS for block in blocks[:-1])
    assert index.dropped == {"unreadable": 3}
    assert len(index.shards) > 1
    assert index.source == {"kind": "toy", "rows": 1041}


def test_stock_webdataset_reads_every_block(written: Path) -> None:
    index = Index.load(written)
    urls = [str(written / name) for name in index.shards]
    samples = list(WebDataset(urls, shardshuffle=False))
    read = {f"{sample['__key__']}.arrow": sample["arrow"] for sample in samples}
    assert len(samples) == len(index.blocks)
    for block in index.blocks:
        assert pa.ipc.open_stream(read[block.member]).read_all().num_rows == block.rows


def test_the_same_rows_give_the_same_bytes(written: Path, tmp_path: Path) -> None:
    again = _write(tmp_path / "again")
    assert again.fingerprint == Index.load(written).fingerprint
    for name in again.shards:
        assert (tmp_path / "again" / name).read_bytes() == (written / name).read_bytes()


def test_domains_do_not_touch_each_other(written: Path, tmp_path: Path) -> None:
    """Leaving a domain out moves no row of the others to another split."""
    _write(tmp_path / "without", hold_out=("toys",))

    def rows(folder: Path) -> dict[tuple[str, str], list[int]]:
        found: dict[tuple[str, str], list[int]] = {}
        for domain, split, table in _tables(folder):
            found.setdefault((domain, split), []).extend(table["row_id"].to_pylist())
        return found

    everything = rows(written)
    assert rows(tmp_path / "without") == {k: v for k, v in everything.items() if k[0] != "toys"}


def test_a_held_out_domain_is_in_no_vocabulary_and_can_be_added_later(tmp_path: Path) -> None:
    trunk = _write(tmp_path / "trunk", hold_out=("toys",))
    assert trunk.domains == ("books", "music")
    assert trunk.dropped == {"unreadable": 3, "other_domains": 300}
    base = trunk.load_vocabulary(tmp_path / "trunk")
    assert not [v for v in base.values["item"].to_pylist() if v.startswith("toys")]

    added = _write(tmp_path / "added", only_domains=("toys",), base=base)
    assert added.domains == ("toys",)
    assert added.vocabulary.base_fingerprint == added.vocabulary.trunk == trunk.vocabulary.trunk
    assert added.vocabulary.base_sizes == trunk.vocabulary.sizes
    items = [i for _, _, t in _tables(tmp_path / "added") for i in t["item"].to_pylist()]
    assert all(i == 0 or i >= trunk.vocabulary.sizes["item"] for i in items) and max(items) > 0
    assert max(items) == added.vocabulary.sizes["item"] - 1
    assert added.vocabulary.sizes["page"] == trunk.vocabulary.sizes["page"]


def test_select_chooses_by_split_and_domain(written: Path) -> None:
    index = Index.load(written)
    chosen = index.select(("valid", "test"), ("toys",))
    assert {(b.domain, b.split) for b in chosen} == {("toys", "valid"), ("toys", "test")}
    assert index.select(("train", "valid", "test")) == index.blocks
    with pytest.raises(UserError, match="unknown split 'trian'; the nearest is 'train'"):
        index.select(("trian",))
    with pytest.raises(UserError, match="unknown domain 'toy'; the nearest is 'toys'"):
        index.select(("train",), ("toy",))


def test_another_schema_is_refused_by_field(written: Path) -> None:
    fields = tuple(Field("item", "id") if f.name == "item" else f for f in SCHEMA.fields)
    index = Index.load(written)
    index.require_schema(SCHEMA)
    with pytest.raises(UserError, match="shards of another schema: the field 'item' differs"):
        index.require_schema(Schema(fields))


def test_wrong_choices_write_nothing(written: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    with pytest.raises(UserError, match="exists already; give another path or delete it"):
        _write(written)
    with pytest.raises(UserError, match="unknown domain 'toyz'; the nearest is 'toys'"):
        _write(out, hold_out=("toyz",))
    with pytest.raises(UserError, match="unknown domain 'bookz'; the nearest is 'books'"):
        _write(out, only_domains=("bookz",))
    with pytest.raises(UserError, match="no domain is left to write"):
        _write(out, only_domains=("toys",), hold_out=("toys",))
    other = Vocabulary.build(Schema((Field("user", "id"),)), {})
    with pytest.raises(UserError, match="base vocabulary is of another schema: field 'user'"):
        _write(out, base=other)
    with pytest.raises(UserError, match="no column for the field 'colour'"):
        schema = Schema((*SCHEMA.fields, Field("colour", "number")))
        write_shards(toy_source(), schema, SplitConfig(), out)
    with pytest.raises(UserError, match="the source has no rows"):
        write_shards(toy_source(toy_rows().slice(0, 0)), SCHEMA, SplitConfig(), out)
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys
from pathlib import Path
from data_shards import SplitConfig, UserError, write_shards
from tests.toy_source import SCHEMA, toy_source
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    write_shards(toy_source(), SCHEMA, SplitConfig(), Path(sys.argv[1]))
except UserError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_lets_the_same_command_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "shards")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "shards: could not be written (File too large); free some space, or give" in ran.stdout
    assert [path.name for path in tmp_path.iterdir()] == [".shards.writing"]
    again = write_shards(toy_source(), SCHEMA, SplitConfig(), tmp_path / "shards")
    assert again.rows == 1041
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_a_damaged_block_is_named(copy: Path) -> None:
    index = Index.load(copy)
    block = index.blocks[5]
    path = copy / block.shard
    data = bytearray(path.read_bytes())
    data[block.offset + block.bytes // 2] ^= 1
    path.write_bytes(data)
    where = f"{block.shard}, member {block.member} at byte {block.offset}: its XXH3 differs"
    with pytest.raises(UserError, match=where):
        ShardReader(copy, index).read(block)
    path.unlink()
    with pytest.raises(UserError, match="could not be read .No such file or directory.; check"):
        ShardReader(copy, index).read(block)


def test_an_unverified_reader_still_checks_form_and_rows(copy: Path) -> None:
    index = Index.load(copy)
    block, other = index.blocks[0], index.blocks[-1]
    path = copy / block.shard
    reader = ShardReader(copy, index, verify=False)
    last = ShardReader(copy, index).read(other)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, last.schema) as writer:
        writer.write_table(last.slice(0, 1))
    data = path.read_bytes()
    short = sink.getvalue().to_pybytes()
    path.write_bytes(data[: block.offset] + short + data[block.offset + len(short) :])
    with pytest.raises(UserError, match=f"1 rows, the index says {block.rows}"):
        reader.read(block)
    path.write_bytes(data[: block.offset + 100])
    with pytest.raises(UserError, match=f"member {block.member} at byte"):
        reader.read(block)


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _of_rows(block: list, rows: int) -> list:
    return [*block[:4], rows, *block[5:]]


def test_a_damaged_index_is_named(copy: Path) -> None:
    path = copy / "index.json"
    whole = path.read_text()
    content = json.loads(whole)
    cases: list[tuple[dict, str]] = [
        ({"format": 2}, "format 2, this version reads 3"),
        ({"rows": 7}, "changed since it was written"),
        ({"dropped": {}}, "changed since it was written"),
        ({"blocks": [["shard", "member"]]}, "not a valid index"),
        (
            {"blocks": [[*content["blocks"][0][:2], "x", *content["blocks"][0][3:]]]},
            "offset is 'x'",
        ),
        ({"blocks": [_of_rows(content["blocks"][0], -1)]}, "-1 rows in the"),
        ({"blocks": [_of_rows(content["blocks"][0], 1 << 40)]}, "1099511627776 rows in the"),
        ({"vocabulary": None}, "not a valid index"),
    ]
    for changes, message in cases:
        _edit(copy, **changes)
        with pytest.raises(UserError, match=message):
            Index.load(copy)
        path.write_text(whole)
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut or corrupt JSON"):
        Index.load(copy)
    path.write_text("[]")
    with pytest.raises(UserError, match="no JSON object"):
        Index.load(copy)
    path.unlink()
    with pytest.raises(UserError, match="index.json: no such file; `write-shards` makes"):
        Index.load(copy)


def test_missing_and_cut_shards_are_named(copy: Path) -> None:
    path = copy / "shard-00000-001.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{size - 1} bytes, the index says {size}"):
        Index.load(copy)
    path.unlink()
    with pytest.raises(UserError, match="shard-00000-001.tar: missing; restore it"):
        Index.load(copy)


def test_a_foreign_vocabulary_is_refused(copy: Path, tmp_path: Path) -> None:
    foreign = Vocabulary.build(SCHEMA, count_values(SCHEMA, toy_rows(seed=9)))
    shutil.rmtree(copy / "vocabulary")
    foreign.save(copy / "vocabulary")
    with pytest.raises(UserError, match="not the vocabulary that encoded these shards"):
        Index.load(copy).load_vocabulary(copy)
