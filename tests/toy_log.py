"""Small logs of one shape in every form the table source reads."""

import gzip
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from data_shards.schema import Field
from data_shards.sources.table import Table, TableConfig
from data_shards.sources.table_join import JoinConfig

FIELDS = (
    Field("user", "anonymous", side="user"),
    Field("item", "id", side="item"),
    Field("price", "number"),
    Field("genres", "id", multi=True),
    Field("title", "text"),
    Field("domain", "id"),
)
BASE: dict[str, Any] = {
    "label": "click",
    "domain": "surface",
    "time": "ts",
    "columns": {"item": "sku"},
    "separators": {"genres": "|"},
}
ROW = {
    "user": 7,
    "sku": "a",
    "price": 1.5,
    "genres": ["x", "y"],
    "title": "T",
    "surface": "home",
    "click": 1,
    "ts": 10,
}


def read_log(
    config: TableConfig, fields: tuple[Field, ...] = FIELDS
) -> tuple[pa.Table, Counter[str]]:
    source, dropped = Table(config, fields), Counter()
    pieces = range(len(source.pieces()))
    tables = [table for piece in pieces for table in source.read(piece, dropped)]
    return pa.concat_tables(tables), dropped


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=3)
    return sink.getvalue()


def csv_of(rows: list[dict[str, Any]]) -> bytes:
    flat = [
        {name: "|".join(v) if isinstance(v, list) else v for name, v in row.items()} for row in rows
    ]
    sink = io.BytesIO()
    pa_csv.write_csv(pa.Table.from_pylist(flat), sink)
    return sink.getvalue()


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FORMS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "log.parquet": parquet,
    "log.csv": csv_of,
    "log.csv.gz": lambda rows: gzip.compress(csv_of(rows)),
    "log.jsonl": jsonl,
    "log.json.gz": lambda rows: gzip.compress(jsonl(rows)),
}


def write_file(folder: Path, name: str, data: bytes | str) -> str:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def clicks(count: int) -> list[dict[str, Any]]:
    return [{**ROW, "user": n, "click": n % 2} for n in range(count)]


ITEMS = "sku,maker,cost\na,Acme,2.5\nb,,\n"
JOINED = (Field("item", "id"), Field("brand", "id", side="item"), Field("cost", "number"))


def joined(folder: Path, items: str, **options: Any) -> TableConfig:
    log = write_file(folder, "log.csv", "sku,click,d\na,1,x\nb,0,x\nz,1,x\n")
    columns = {"brand": "maker", "cost": "cost"}
    join = JoinConfig(write_file(folder, "items.csv", items), "item", columns, **options)
    return TableConfig(log, label="click", domain="d", columns={"item": "sku"}, join=(join,))
