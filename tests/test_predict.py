"""Predict: rows under the names of the fields, or of the log that the run was trained on."""

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from data_shards import Field, Schema, UserError
from data_shards.sources import MovieLensConfig, TableConfig
from launch.predict import WRITERS, _log_names, _read

SCHEMA = Schema((Field("item", "id"), Field("shelf", "id"), Field("price", "number")))
SOURCE = TableConfig(
    "log.csv",
    label="click",
    domain="surface",
    row_id="number",
    columns={"item": "sku", "shelf": "place"},
    local=("shelf",),
)
ROWS = pa.table(
    {
        "row_id": [7, 8],
        "domain": ["home", "feed"],
        "item": ["007", None],
        "shelf": ["home:1", "feed:1"],
        "price": [1.5, 2.0],
    }
)


@pytest.mark.parametrize("suffix", WRITERS)
def test_the_names_of_the_log_are_as_good_as_those_of_the_fields(
    suffix: str, tmp_path: Path
) -> None:
    names = _log_names(SOURCE)
    as_in_log = ROWS.rename_columns({name: names.get(name, name) for name in ROWS.column_names})
    assert as_in_log.column_names == ["number", "surface", "sku", "shelf", "price"]
    read = []
    for number, table in enumerate((ROWS, as_in_log)):
        path = tmp_path / f"{number}{suffix}"
        WRITERS[suffix](table, path)
        read.append(_read(path, SCHEMA, names).to_pylist())
    assert read[0] == read[1] and read[0][0]["item"] == "007" and read[0][1]["row_id"] == 8


def test_a_column_that_is_missing_is_named_with_its_name_in_the_log(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    pyarrow.csv.write_csv(ROWS.drop_columns(["item"]), path)
    needed = "domain .in the log: surface., item .in the log: sku., shelf, price$"
    with pytest.raises(UserError, match=f"no column 'item'; needed: {needed}"):
        _read(path, SCHEMA, _log_names(SOURCE))
    with pytest.raises(UserError, match="no column 'item'; needed: domain, item, shelf, price$"):
        _read(path, SCHEMA, _log_names(MovieLensConfig("ml-1m.zip")))


def test_a_local_value_is_not_taken_for_that_of_the_log(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(ROWS.rename_columns({"shelf": "place"}), path)
    with pytest.raises(UserError, match="no column 'shelf'; needed"):
        _read(path, SCHEMA, _log_names(SOURCE))
