"""Click probabilities for rows: row_id, domain, probability, as Parquet or CSV.

Rows are a Parquet or CSV file with a `domain` column and one column per field of the schema
(lists in CSV joined by "|"); `row_id` is optional. Rows of a domain without an adapter are scored
by the shared part alone, and counted.

Example: python -m launch predict runs/movielens_mlora rows.parquet --out probabilities.csv
"""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from data_shards import Schema, UserError
from launch.progress import say

BATCH = 8192
READERS = {".csv": pyarrow.csv.read_csv, ".parquet": pyarrow.parquet.read_table}
WRITERS = {".csv": pyarrow.csv.write_csv, ".parquet": pyarrow.parquet.write_table}


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
    WRITERS[args.out.suffix](found, args.out)
    say(
        f"{args.out}: {len(found):,} rows; {alone:,} of domains without an adapter, "
        "scored by the shared part alone"
    )


def _read(path: Path, schema: Schema) -> pa.Table:
    try:
        table = READERS[path.suffix](path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: not readable as {path.suffix[1:]}: {error}") from None
    needed = ["domain", *(f.name for f in (*schema.ids, *schema.numbers) if f.name != "domain")]
    missing = [name for name in needed if name not in table.column_names]
    if missing:
        raise UserError(f"{path}: no column {missing[0]!r}; needed: {', '.join(needed)}")
    if len(table) == 0:
        raise UserError(f"{path}: no rows")
    columns = {name: table[name] for name in needed}
    for field in schema.ids:
        text = pc.cast(columns[field.name], pa.string()) if not field.multi else columns[field.name]
        if field.multi and pa.types.is_string(text.type):
            text = pc.split_pattern(text, "|")
        columns[field.name] = text
    columns["domain"] = pc.cast(columns["domain"], pa.string())
    ids = table["row_id"] if "row_id" in table.column_names else pa.array(range(len(table)))
    return pa.table({"row_id": pc.cast(ids, pa.int64()), **columns})


def _parts(rows: pa.Table):  # noqa: ANN202
    for start in range(0, len(rows), BATCH):
        yield rows.slice(start, BATCH)
