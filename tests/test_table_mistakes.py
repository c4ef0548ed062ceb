"""The table source: what it cannot read is named by file and row, or counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_shards.errors import UserError
from data_shards.sources.table import Table, TableConfig
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


@pytest.mark.parametrize("line", ["[" * 200_000, json.dumps(ROW).replace('"T"', '"\\ud800"')])
def test_what_arrow_and_python_choke_on_is_one_line(line: str, tmp_path: Path) -> None:
    path = write_file(tmp_path, "log.jsonl", (json.dumps(ROW) + "\n" + line + "\n").encode())
    with pytest.raises(UserError, match=r"log.jsonl from row 0: a value cannot be read \(\w+Error"):
        read_log(TableConfig(path, **BASE))


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
