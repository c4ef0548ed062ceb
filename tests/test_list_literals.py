"""Lists written out in the cells of a CSV."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from data_shards import Field, UserError
from data_shards.sources import TableConfig
from data_shards.sources.list_literals import literal_lists
from tests.toy_log import read_log, write_file

VALUES = st.lists(st.text(max_size=6) | st.integers(), max_size=4, unique_by=str)


@given(st.lists(st.none() | VALUES))
def test_what_pandas_writes_is_read_back(lists: list[list[Any] | None]) -> None:
    cells = pa.array([one if one is None else str(one) for one in lists], pa.string())
    read, bad = literal_lists(cells)
    told = [one if one is None else [*map(str, one)] for one in lists]
    assert read.to_pylist() == told
    assert not bad.any()


@given(VALUES, VALUES)
def test_several_lists_in_a_cell_are_one(left: list[Any], right: list[Any]) -> None:
    cell = f"{left}; {right}"
    assume("];" not in cell.removeprefix(f"{left};"))
    read, bad = literal_lists(pa.array([cell]))
    assert read.to_pylist() == [[*map(str, dict.fromkeys([*left, *right]))]] and not bad.any()


REFUSED = ("plain", "a|b", "['a'", "['a'] x", "[None]", "[['a']]", "{'a': 1}", "[f()]", "[" * 999)


@pytest.mark.parametrize("cell", REFUSED)
def test_anything_else_is_refused_with_its_row(cell: str, tmp_path: Path) -> None:
    read, bad = literal_lists(pa.array([cell, "['a']"]))
    assert bad.tolist() == [True, False] and read.to_pylist() == [None, ["a"]]
    log = write_file(tmp_path, "log.csv", f"click,d,tags\n1,x,['a']\n1,x,\"{cell}\"\n")
    config = TableConfig(log, label="click", domain="d")
    with pytest.raises(UserError, match="log.csv row 3: tags is .*; expected a list of val"):
        read_log(config, (Field("tags", "id", multi=True),))
