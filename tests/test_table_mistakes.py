"""The table source: what it cannot read is named by file and row, or counted."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards.errors import UserError
from data_shards.sources.table import Table, TableConfig
from data_shards.sources.table_columns import Checked, as_integer
from data_shards.sources.table_files import Chunk, Files
from data_shards.sources.table_join import JoinConfig
from tests.toy_log import (
    BASE,
    FIELDS,
    ITEMS,
    JOINED,
    ROW,
    joined,
    jsonl,
    read_log,
    write_file,
)

CSV = "user,sku,price,genres,title,surface,click,ts\n1,a,2,x|y,T,home,1,10\n"
BAD_ROWS = {
    "1,a,2,x,T,home,1\n": "row 3 has 7 cells, the header 8; mend it, or set bad_rows = 'drop'",
    "1,a,2,x,T,home,5,10\n": r"row 3: click is '5'; expected 0 or 1 \(for ratings",
    "1,a,2,x,T,home,,10\n": "row 3: click is None; expected a number",
    "1,a,2,x,T,home,yes,10\n": "row 3: click is 'yes'; expected a number",
    "1,a,2,x,T,,1,10\n": "row 3: surface is None; expected the name of a domain",
    "1,a,2,x,T,home,1,\n": "row 3: ts is None; expected a time",
    "1,a,2,x,T,home,1,2024-02-30\n": "row 3: ts is '2024-02-30'; expected a time",
    "1,a,dear,x,T,home,1,10\n": "row 3: price is 'dear'; expected a finite number",
    "1,a,1e99,x,T,home,1,10\n": "row 3: price is '1e99'; expected a finite number",
    "\n": "row 3: click is None",
}


@pytest.mark.parametrize("line", BAD_ROWS)
def test_bad_rows_of_a_csv(line: str, tmp_path: Path) -> None:
    path = write_file(tmp_path, "log.csv", CSV + line + CSV.splitlines()[1] + "\n")
    with pytest.raises(UserError, match=f"log.csv {BAD_ROWS[line]}"):
        read_log(TableConfig(path, **BASE))
    rows, dropped = read_log(TableConfig(path, **BASE, bad_rows="drop"))
    assert rows["row_id"].to_pylist() == [0, 2] and dropped == {"bad_row": 1}


NO_TEXT = pa.array([b"a", b"b", b"\xff"]).view(pa.string())
ODD: dict[str, tuple[str, pa.Array, str]] = {
    "text": ("sku", NO_TEXT, "row 3: sku is .*�.*; expected one value, in UTF-8"),
    "large text": (
        "sku",
        NO_TEXT.cast(pa.binary()).cast(pa.large_binary()).view(pa.large_string()),
        "row 3: sku",
    ),
    "bytes": (
        "sku",
        NO_TEXT.view(pa.binary()).cast(pa.binary_view()),
        "row 3: sku is '�'; expected",
    ),
    "fixed bytes": (
        "sku",
        pa.array([b"a", b"b", b"\xff"], pa.binary(1)),
        "row 3: sku is '�'; expected",
    ),
    "texts": (
        "genres",
        pa.ListArray.from_arrays([0, 1, 2, 3], NO_TEXT),
        "row 3: genres is .*�.*; expected a list of values",
    ),
    "domain": ("surface", NO_TEXT, "row 3: surface is .*; expected the name of a domain"),
    "label": ("click", NO_TEXT, "row 1: click is 'a'; expected a number"),
    "map": (
        "sku",
        pa.array([None, None, [("a", 1)]], pa.map_(pa.string(), pa.int64())),
        "row 3: sku",
    ),
    "pairs": (
        "sku",
        pa.array([None, None, [1, 2]], pa.list_(pa.int64(), 2)),
        "row 3: sku is .1, 2.;",
    ),
    "duration": ("ts", pa.array([None, None, 5], pa.duration("s")), "row 1: ts is None; expected"),
    "time": ("ts", pa.array([1, 2, 3], pa.time32("s")), "row 1: ts is .*; expected a time"),
    "zone": (
        "sku",
        pa.array([None, None, 5], pa.timestamp("s", "No/Where")),
        "row 3: sku is .*1970",
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_columns_of_parquet_name_the_row(kind: str, tmp_path: Path) -> None:
    name, column, message = ODD[kind]
    table = pa.Table.from_pylist([ROW] * 3)
    table = table.set_column(table.column_names.index(name), name, column)
    path = str(tmp_path / "log.parquet")
    pq.write_table(table, path)
    with pytest.raises(UserError, match=f"log.parquet {message}"):
        read_log(TableConfig(path, **BASE))
    source, dropped = Table(TableConfig(path, **BASE, bad_rows="drop"), FIELDS), Counter()
    rows = sum(len(rows) for rows in source.read(0, dropped))
    assert rows + dropped["bad_row"] == 3 and rows == int(message[4]) - 1


def test_what_no_reader_foresees_names_file_row_and_column(tmp_path: Path) -> None:
    def read(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
        return column.cast(pa.int8()), np.zeros(len(column), bool)

    chunk = Chunk(pa.table({"n": [1, 2, 3, 1000, 5, 2000, 7]}), np.arange(10, 17))
    files = Files(write_file(tmp_path, "log.csv", CSV))
    with pytest.raises(
        UserError, match=r"log.csv row 15: n cannot be read \(ArrowInvalid: Integer"
    ):
        Checked(files, 0, chunk, drop=False).column("n", read, "a small number")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    bad = CSV.encode() + b"1,\xff,2,x,T,home,1,10\n"
    with pytest.raises(UserError, match="row 3: sku is '.'; expected one value, in UTF-8"):
        read_log(TableConfig(write_file(tmp_path, "log.csv", bad), **BASE))


BAD_LINES = {
    '{"user": 1,\n': r"line 2 is no row: Expecting property name",
    "[3]\n": r"line 2 is no row: it is b'\[3\]'",
    '{"click": 1, "click": 0}\n': r"line 2 is no row: the key 'click' stands twice",
    '{"click": NaN}\n': r"line 2 is no row: NaN is no JSON number",
    json.dumps(ROW) + json.dumps(ROW) + "\n": r"line 2 is no row: Extra data",
    json.dumps({**ROW, "genres": "x"}) + "\n": "line 2 is no row: genres is a list in some",
    json.dumps({**ROW, "user": {"a": 1}}) + "\n": "line 2 is no row: user is an object",
    json.dumps({**ROW, "genres": ["x", ["y"]]})
    + "\n": "line 2 is no row: genres is a list of lists",
    json.dumps(ROW).replace('"T"', '"\\ud800"')
    + "\n": "line 2 is no row: .*surrogates not allowed",
    json.dumps(ROW).replace("1.5", "1e999")
    + "\n": "line 2: price is inf; expected a finite number",
    json.dumps({**ROW, "user": "u"}).replace("1.5", "1e999")
    + "\n": "line 2: price is inf; expected",
    "[" * 200_000 + "\n": "line 2 is no row: maximum recursion depth",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_lines_of_json(line: str, tmp_path: Path) -> None:
    path = write_file(tmp_path, "log.jsonl", jsonl([ROW]) + line.encode() + jsonl([ROW]))
    with pytest.raises(UserError, match=BAD_LINES[line]):
        read_log(TableConfig(path, **BASE))
    rows, dropped = read_log(TableConfig(path, **BASE, bad_rows="drop"))
    assert rows["row_id"].to_pylist() == [0, 2] and dropped == {"bad_row": 1}


def _log(folder: Path, text: str = CSV, name: str = "log.csv", **options: Any) -> TableConfig:
    return TableConfig(write_file(folder, name, text), **{**BASE, **options})


FILES: dict[str, Callable[[Path], TableConfig]] = {
    "unknown column 'click'; the nearest is 'clicks'": lambda folder: _log(
        folder, CSV.replace("click", "clicks")
    ),
    "unknown column 'surfaze'; .* mend data.source.domain$": lambda folder: _log(
        folder, domain="surfaze"
    ),
    "unknown column 'when'; .* mend data.source.time$": lambda folder: _log(
        folder, json.dumps(ROW) + "\n", "log.jsonl", time="when"
    ),
    "unknown column 'sko'; .* mend data.source.columns.item$": lambda folder: _log(
        folder, columns={"item": "sko"}
    ),
    r"unknown column 'price'; .* map a field by columns = \{ field = 'column' \}": lambda folder: (
        _log(folder, CSV.replace("price", "cost"))
    ),
    "the column 'price' stands twice": lambda folder: _log(folder, CSV.replace("title", "price")),
    r"log.csv: cannot be read as csv \(Empty CSV file": lambda folder: _log(folder, ""),
    "log.parquet: cannot be read as parquet": lambda folder: _log(folder, CSV, "log.parquet"),
    "log.csv.gz: cannot be read as csv": lambda folder: _log(folder, CSV, "log.csv.gz"),
    "log.txt: the suffix does not tell the form": lambda folder: _log(folder, CSV, "log.txt"),
    "no such file; give a file": lambda folder: TableConfig(str(folder / "no.csv"), **BASE),
    "cannot be opened": lambda folder: TableConfig("nowhere://x/y.csv", **BASE),
    "genres is 'x|y'; expected a list of values .for text, separators": lambda folder: _log(
        folder, separators={}
    ),
    "surface is ''": lambda folder: _log(
        folder, json.dumps({**ROW, "surface": ""}) + "\n", "log.jsonl"
    ),
    "user is -7; expected an integer from 0": lambda folder: _log(
        folder, json.dumps({**ROW, "user": -7}) + "\n", "log.jsonl", row_id="user"
    ),
}


@pytest.mark.parametrize("message", FILES)
def test_mistakes_in_files(message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_log(FILES[message](tmp_path))


def _twice() -> TableConfig:
    return TableConfig("x.csv", **BASE, join=(JoinConfig("y.csv", "user", {"item": "sku"}),))


CONFIGS: dict[str, Callable[[], object]] = {
    "give label = 'column', or all_positive": lambda: TableConfig("x", domain="d"),
    "give label = 'column', or all": lambda: TableConfig("x", label="l", all_positive=True),
    "give domain = 'column', or domain_from_file": lambda: TableConfig("x", label="l"),
    "delimiter is one character": lambda: TableConfig("x", label="l", domain="d", delimiter=""),
    "the field 'item' comes from two tables": lambda: Table(_twice(), FIELDS),
    "'price' is a key, so one id or text; it is number": lambda: Table(
        TableConfig("x.csv", **BASE, join=(JoinConfig("y.csv", "price", {}),)), FIELDS
    ),
    "unknown single-valued field of the log in local 'users'; the nearest is 'user'": lambda: Table(
        TableConfig("x.csv", **BASE, local=("users",)), FIELDS
    ),
}


@pytest.mark.parametrize("message", CONFIGS)
def test_mistakes_in_the_config(message: str) -> None:
    with pytest.raises(UserError, match=message):
        CONFIGS[message]()


def test_a_quote_left_open_hides_no_rows(tmp_path: Path) -> None:
    path = write_file(tmp_path, "log.csv", 'click,d,note\n1,x,a\n1,x,"b\n1,x,c\n')
    with pytest.raises(UserError, match="log.csv: a quote is opened and not closed"):
        read_log(TableConfig(path, label="click", domain="d"), ())


def test_a_text_is_cut_where_a_separator_says_so(tmp_path: Path) -> None:
    config = _log(tmp_path, json.dumps({**ROW, "genres": "x|y"}) + "\n", "log.jsonl")
    assert read_log(config)[0]["genres"].to_pylist() == [["x", "y"]]


def test_quotes_may_be_plain(tmp_path: Path) -> None:
    config = _log(tmp_path, CSV.replace(",T,", ',5" pipe,'), quoted=False)
    assert read_log(config)[0]["title"].to_pylist() == ['5" pipe']


def test_description_names_no_place(tmp_path: Path) -> None:
    config = joined(tmp_path, ITEMS)
    assert str(tmp_path) not in json.dumps(Table(config, JOINED).describe())


def test_a_signed_integer_is_one() -> None:
    read, bad = as_integer(pa.array(["+5", "-5", "5"]))
    assert read.to_pylist() == [5, -5, 5] and not bad.any()
