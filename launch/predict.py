"""Click probabilities for rows: row_id, domain, probability, as Parquet or CSV.

Rows are a Parquet or CSV file with a `domain` column and one column per field of the schema
(lists in CSV joined by "|"); `row_id` is optional. Rows of a domain without an adapter are scored
by the shared part alone, and counted.

Example: python -m launch predict runs/movielens_mlora rows.parquet --out probabilities.csv
"""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from data_shards import Field, Schema, UserError
from launch.progress import say

BATCH = 8192
DOMAIN = Field("domain", "id")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--out", type=Path, required=True)


def run(args: argparse.Namespace) -> None:
    from launch.group import joined
    from trainer.run_folder import RunFolder
    from trainer.serving import Server

    for path, table in ((args.rows, READERS), (args.out, WRITERS)):
        if path.suffix not in table:
            raise UserError(f"{path}: expected a name that ends in {' or '.join(table)}")
    if not args.out.parent.is_dir():
        raise UserError(f"{args.out}: no folder {args.out.parent}; make it, or give another path")
    config = RunFolder.config(args.run_folder)
    with joined() as ranks:
        if ranks.world > 1:
            raise UserError("predict runs in one process; start it without torchrun")
        server = Server(config, RunFolder(args.run_folder), ranks)
        rows = _read(args.rows, server.schema)
        parts = [server.probabilities(part) for part in _parts(rows)]
        alone = sum(part.alone for part in parts)
        probability = np.concatenate([part.probability for part in parts])
    found = pa.table(
        {"row_id": rows["row_id"], "domain": rows["domain"], "probability": probability}
    )
    try:
        WRITERS[args.out.suffix](found, args.out)
    except OSError as error:
        raise UserError(f"{args.out}: could not be written ({error.strerror or error})") from None
    say(
        f"{args.out}: {len(found):,} rows; {alone:,} of domains without an adapter, "
        "scored by the shared part alone"
    )


def _read(path: Path, schema: Schema) -> pa.Table:
    """`row_id`, `domain` and the schema's fields; what cannot be had is named."""
    try:
        table = READERS[path.suffix](path, schema)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not readable as {path.suffix[1:]}: {error}") from None
    fields = {DOMAIN.name: DOMAIN} | {field.name: field for field in schema.fields}
    missing = [name for name in fields if name not in table.column_names]
    if missing:
        raise UserError(f"{path}: no column {missing[0]!r}; needed: {', '.join(fields)}")
    if len(table) == 0:
        raise UserError(f"{path}: no rows")
    if table["domain"].null_count:
        row = pc.index(pc.is_null(table["domain"]), True).as_py()
        raise UserError(f"{path}: row {row} has no domain; every row needs one")
    if "row_id" not in table.column_names:
        table = table.append_column("row_id", pa.array(np.arange(len(table))))
    columns = {name: _column(path, field, table[name]) for name, field in fields.items()}
    return pa.table({"row_id": _cast(path, "row_id", table["row_id"], pa.int64()), **columns})


def _csv(path: Path, schema: Schema) -> pa.Table:
    # Left to itself Arrow would read the id 00123 as the number 123.
    types = {field.name: pa.string() for field in (DOMAIN, *schema.ids)}
    options = pyarrow.csv.ConvertOptions(column_types=types)
    return pyarrow.csv.read_csv(path, convert_options=options)


def _parquet(path: Path, _: Schema) -> pa.Table:
    return pyarrow.parquet.read_table(path)


def _column(path: Path, field: Field, column: pa.ChunkedArray) -> pa.ChunkedArray:
    if field.kind == "number":
        return _cast(path, field.name, column, pa.float32())
    if not field.multi:
        return _cast(path, field.name, column, pa.string())
    if not isinstance(column.type, pa.ListType | pa.LargeListType):
        text = _cast(path, field.name, column, pa.string())
        none = pa.scalar(None, pa.string())
        column = pc.split_pattern(pc.if_else(pc.equal(text, ""), none, text), "|")
    return _cast(path, field.name, column, pa.list_(pa.string()))


def _cast(path: Path, name: str, column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    try:
        return pc.cast(column, kind)
    except pa.ArrowException as error:
        raise UserError(f"{path}: column {name!r} is not {kind}: {error}") from None


READERS = {".csv": _csv, ".parquet": _parquet}
WRITERS = {".csv": pyarrow.csv.write_csv, ".parquet": pyarrow.parquet.write_table}


def _parts(rows: pa.Table) -> Iterator[pa.Table]:
    for start in range(0, len(rows), BATCH):
        yield rows.slice(start, BATCH)
