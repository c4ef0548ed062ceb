"""The table source: the same rows from every form, joins, and streaming."""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import io
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.errors import UserError
from data_shards.schema import Field
from data_shards.sources import json_lines, table_files
from data_shards.sources.negatives import NegativesConfig
from data_shards.sources.per_user import HistoryConfig, PerUserConfig
from data_shards.sources.table import Table, TableConfig
from data_shards.sources.table_join import JoinConfig
from tests.toy_log import (
    BASE,
    FIELDS,
    FORMS,
    ITEMS,
    JOINED,
    clicks,
    joined,
    parquet,
    read_log,
    write_file,
)

WORDS = st.text("ab \"',é\n", min_size=1, max_size=5)
GIVEN = st.fixed_dictionaries(
    {
        "user": st.integers(0, 1 << 40),
        "sku": st.none() | WORDS,
        "price": st.none() | st.integers(-8, 8).map(lambda number: number / 4),
        "genres": st.none() | st.lists(st.sampled_from("pqr"), min_size=1, max_size=3),
        "title": WORDS,
        "surface": st.sampled_from(["home", "feed"]),
        "click": st.integers(0, 1),
        "ts": st.integers(0, 1 << 40),
    }
)


@settings(max_examples=25)
@given(st.lists(GIVEN, min_size=1, max_size=12))
def test_every_form_gives_the_same_rows(rows: list[dict[str, Any]]) -> None:
    expected = [
        {
            "row_id": number,
            "domain": row["surface"],
            "label": float(row["click"]),
            "time": row["ts"],
            "user": str(row["user"]),
            "item": row["sku"],
            "price": row["price"],
            "genres": row["genres"],
            "title": row["title"],
        }
        for number, row in enumerate(rows)
    ]
    for name, write in FORMS.items():
        with fsspec.open(f"memory://same/{name}", "wb") as file:
            file.write(write(rows))  # pyright: ignore[reportAttributeAccessIssue]
        found, dropped = read_log(TableConfig(f"memory://same/{name}", **BASE))
        assert found.to_pylist() == expected, name
        assert not dropped
        types = {found.schema.field(place).name: found.schema.types[place] for place in range(9)}
        assert types == TYPES, name


TYPES = {
    "row_id": pa.int64(),
    "domain": pa.string(),
    "label": pa.float32(),
    "time": pa.int64(),
    "user": pa.string(),
    "item": pa.string(),
    "price": pa.float32(),
    "genres": pa.list_(pa.string()),
    "title": pa.string(),
}


def test_many_files_have_ids_of_their_own(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.csv", "_SUCCESS", ".hidden.csv"):
        write = FORMS.get(f"log.{name.split('.')[-1]}")
        write_file(tmp_path, name, write(clicks(2)) if write else b"")
    rows, _ = read_log(TableConfig(str(tmp_path), **BASE))
    assert rows["row_id"].to_pylist() == [0, 1, 1 << 40, (1 << 40) + 1]
    glob, _ = read_log(TableConfig(str(tmp_path / "*.parquet"), **BASE))
    assert glob["row_id"].to_pylist() == [0, 1]


def test_domain_from_file_and_local_ids(tmp_path: Path) -> None:
    for stem in ("uk", "de"):
        write_file(tmp_path, f"{stem}.log.csv", "user,click\n1,0\n")
    config = TableConfig(str(tmp_path), label="click", domain_from_file=True, local=("user",))
    rows, _ = read_log(config, (Field("user", "id"),))
    assert rows["domain"].to_pylist() == ["de", "uk"]
    assert rows["user"].to_pylist() == ["de:1", "uk:1"] and rows["time"].to_pylist() == [0, 0]


def test_local_ids_of_two_domains_are_never_the_same(tmp_path: Path) -> None:
    """The user b:1 of the domain a is not the user 1 of a domain a:b."""
    path = write_file(tmp_path, "log.csv", "user,d,click\nb:1,a,0\n1,a:b,1\n")
    config = TableConfig(path, label="click", domain="d", local=("user",))
    with pytest.raises(UserError, match="the domain 'a:b' has a ':', .*rename the domain, or leav"):
        read_log(config, (Field("user", "id"),))


def test_ratings(tmp_path: Path) -> None:
    path = write_file(tmp_path, "log.csv", "stars,d\n1,x\n3,x\n4,x\n3.0,x\n5,x\n")
    rules: dict[str, Any] = {
        "label": "stars",
        "positive_above": 3.0,
        "drop_labels": (3.0,),
        "domain": "d",
    }
    rows, dropped = read_log(TableConfig(path, **rules), ())
    assert rows["label"].to_pylist() == [0, 1, 1] and dropped == {"dropped_label": 2}
    assert rows["row_id"].to_pylist() == [0, 2, 4]


def test_booleans_timestamps_and_own_ids(tmp_path: Path) -> None:
    moment = "2024-02-29 12:00:01"
    seconds = 1709208001
    texts = (
        f"i,d,l,t\n5,x,true,{moment}\n6,x,False,{moment.replace(' ', 'T')}.25Z\n7,x,1,{seconds}\n"
    )
    config: dict[str, Any] = {"label": "l", "domain": "d", "time": "t", "row_id": "i"}
    rows, _ = read_log(TableConfig(write_file(tmp_path, "a.csv", texts), **config), ())
    assert rows["time"].to_pylist() == [seconds] * 3
    assert rows["label"].to_pylist() == [1, 0, 1] and rows["row_id"].to_pylist() == [5, 6, 7]
    typed = pa.table(
        {
            "i": [5],
            "d": pa.array(["x"]).dictionary_encode(),
            "l": [True],
            "t": pa.array([seconds * 1000], pa.timestamp("ms")),
        }
    )
    pq.write_table(typed, tmp_path / "a.parquet")
    again, _ = read_log(TableConfig(str(tmp_path / "a.parquet"), **config), ())
    assert again.to_pylist() == rows.slice(0, 1).to_pylist()


def test_one_spelling_of_ids(tmp_path: Path) -> None:
    columns = {"int": [3, None], "float": [3.0, None], "bool": [True, None]}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({**columns, "l": [1, 1], "d": ["x", "x"]}), path)
    fields = tuple(Field(name, "id") for name in columns)
    rows, _ = read_log(TableConfig(str(path), label="l", domain="d"), fields)
    assert rows.select(list(columns)).to_pylist() == [
        {"int": "3", "float": "3", "bool": "true"},
        dict.fromkeys(columns),
    ]


@pytest.mark.parametrize("name", FORMS)
def test_pieces_stream(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first rows only the first blocks of the file are read."""
    monkeypatch.setattr(table_files, "BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(table_files, "CHUNK_ROWS", 100)
    count = 5_000
    path = write_file(tmp_path, name, FORMS[name](clicks(count)))
    source = Table(TableConfig(path, **BASE), FIELDS)
    asked: list[int] = []
    read = source._log._rows
    monkeypatch.setattr(source._log, "_rows", lambda *given: asked.append(1) or read(*given))
    tables = source.read(0, Counter())
    assert 0 < len(next(tables)) <= 100 and len(asked) == 1
    rows = [len(table) for table in tables]
    assert max(rows) <= 100 and len(rows) >= 49


def test_parquet_pieces_are_ranges_of_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_files, "PIECE_ROWS", 7)
    path = write_file(tmp_path, "log.parquet", parquet(clicks(20)))
    source = Table(TableConfig(path, **BASE), FIELDS)
    tables = [pa.concat_tables(list(source.read(piece, Counter()))) for piece in range(4)]
    assert len(source.pieces()) == 4 and [len(table) for table in tables] == [6, 6, 6, 2]
    ids = [number for table in tables for number in table["row_id"].to_pylist()]
    assert ids == list(range(20))


@given(st.lists(st.binary(max_size=9).filter(lambda line: b"\n" not in line)), st.integers(1, 9))
def test_blocks_are_whole_lines(lines: list[bytes], size: int) -> None:
    data = b"\n".join(lines)
    blocks = list(json_lines.line_blocks(io.BytesIO(data), size))
    assert b"".join(block for _, block in blocks) == data
    before = b""
    for first, block in blocks:
        assert first == before.count(b"\n") and (not before or before.endswith(b"\n"))
        before += block


def test_json_lines_of_many_types(tmp_path: Path) -> None:
    """Values that differ in type, blank lines, and a date that stays the text it is."""
    lines = '{"u": 1, "l": 1}\n\n{"u": "2020-01-01", "l": 0}\n{"u": null, "l": true}\n{"l": 0}\n'
    path = write_file(tmp_path, "a.jsonl", lines)
    config = TableConfig(path, label="l", domain_from_file=True)
    rows, _ = read_log(config, (Field("u", "id"),))
    assert rows["u"].to_pylist() == ["1", "2020-01-01", None, None]
    assert rows["row_id"].to_pylist() == [0, 2, 3, 4]


def test_joins(tmp_path: Path) -> None:
    rows, dropped = read_log(joined(tmp_path, ITEMS, missing="null"), JOINED)
    assert rows.select(["item", "brand", "cost"]).to_pylist() == [
        {"item": "a", "brand": "Acme", "cost": 2.5},
        {"item": "b", "brand": None, "cost": None},
        {"item": "z", "brand": None, "cost": None},
    ]
    assert not dropped
    rows, dropped = read_log(joined(tmp_path, ITEMS, missing="drop"), JOINED)
    assert rows["item"].to_pylist() == ["a", "b"] and dropped == {"no_item": 1}
    with pytest.raises(UserError, match=r"log.csv row 4: .*items.csv has no sku 'z'; add it, or"):
        read_log(joined(tmp_path, ITEMS), JOINED)
    with pytest.raises(UserError, match="items.csv row 4: the key 'a' stands twice"):
        read_log(joined(tmp_path, ITEMS + "a,B,1\n"), JOINED)
    with pytest.raises(UserError, match="items.csv row 4 has 2 cells, the header 3; mend it"):
        read_log(joined(tmp_path, ITEMS + "c,B\n"), JOINED)


AMAZON = (
    Field("user", "anonymous", side="user"),
    Field("item", "id", side="item"),
    Field("title", "text", side="item"),
    Field("history", "id", side="user", multi=True),
)


def test_four_amazon_domains(shared_data: Path) -> None:
    """Histories of five and 2 to 5 negatives by MLoRA's rule, titles joined per domain."""
    folder = shared_data / "amazon-text"
    items = JoinConfig(str(folder / "*.items.csv.gz"), "item", {"title": "title"})
    stage = PerUserConfig(
        history=HistoryConfig(across_domains=False), negatives=NegativesConfig(protocol="mlora")
    )
    config = TableConfig(
        str(folder / "*.interactions.csv.gz"),
        all_positive=True,
        domain_from_file=True,
        local=("user", "item"),
        time="position",
        columns={"user": "user_id", "item": "item_id"},
        join=(items,),
        per_user=stage,
    )
    rows, dropped = read_log(config, AMAZON)
    per_label = Counter(zip(rows["domain"].to_pylist(), rows["label"].to_pylist(), strict=True))
    positives = {"beauty": 198_502, "toys": 167_597, "office": 21_188, "industrial": 21_664}
    assert {domain: per_label[domain, 1.0] for domain in positives} == positives
    for domain, count in positives.items():
        assert 2 * count * 0.9 < per_label[domain, 0.0] <= 5 * count
    assert dropped == {} and rows["title"].null_count == 0
    assert len(set(rows["row_id"].to_pylist())) == len(rows)
    sample = rows.slice(0, 20_000).to_pylist()
    assert all(len(row["history"]) == min(5, row["time"]) for row in sample)
    positive = rows.filter(pc.equal(rows["label"], 1.0))
    negative = rows.filter(pc.equal(rows["label"], 0.0))
    touched, drawn = (
        set(zip(part["user"].to_pylist(), part["item"].to_pylist(), strict=True))
        for part in (positive, negative)
    )
    assert len(drawn) == len(negative) and touched.isdisjoint(drawn)
