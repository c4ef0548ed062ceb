"""Click probabilities for rows: row_id, domain, probability, as Parquet or CSV.

Rows are a Parquet or CSV file with a `domain` column and one column per field of the schema, those
of the prompt in place of its tokens (lists in CSV joined by "|"); `row_id` is optional. Where the
run read a log of its own, columns may be named as in that log. Rows of a domain without an adapter
are scored by the shared part alone, and counted.

Example: python -m launch predict runs/movielens_mlora rows.parquet --out probabilities.csv
"""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import argparse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from data_shards import Field, Schema, SourceConfig, UserError
from data_shards.sources import TableConfig
from launch.progress import say

BATCH = 8192
DOMAIN = Field("domain", "id")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--strict", action="store_true", help="refuse domains without an adapter")


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
        rows = _read(args.rows, server.raw, _log_names(config.data.source))
        alone = _without_adapter(rows, server.domains, args.strict)
        probability = np.concatenate([server.probabilities(part) for part in _parts(rows)])
    found = pa.table(
        {"row_id": rows["row_id"], "domain": rows["domain"], "probability": probability}
    )
    try:
        WRITERS[args.out.suffix](found, args.out)
    except OSError as error:
        raise UserError(f"{args.out}: could not be written ({error.strerror or error})") from None
    say(
        f"{args.out}: {len(found):,} rows; {sum(alone.values()):,} of domains without an adapter, "
        f"scored by the shared part alone{_named(alone)}"
        + (f"; {server.encoded:,} texts encoded on the spot" if server.encoded else "")
    )


def _without_adapter(rows: pa.Table, known: tuple[str, ...], strict: bool) -> Counter[str]:
    """Rows by domain, of domains that have no adapter; an error if they are not wanted."""
    counts = Counter(rows["domain"].to_pylist())
    alone = Counter({name: count for name, count in counts.items() if name not in known})
    if alone and strict:
        raise UserError(
            f"--strict: {sum(alone.values()):,} rows are of domains without an adapter"
            f"{_named(alone)}; those with one: {', '.join(known) or 'none'}; "
            "add the domain (`add-domain`), or leave --strict away"
        )
    return alone


def _named(alone: Counter[str]) -> str:
    first = [f"{name} {count:,}" for name, count in alone.most_common(5)]
    more = [f"and {len(alone) - 5} more"] if len(alone) > 5 else []
    return f" ({', '.join(first + more)})" if alone else ""


def _log_names(source: SourceConfig) -> dict[str, str]:
    """Field to the log's column; not of local fields, whose values are not those of the log."""
    if not isinstance(source, TableConfig):
        return {}
    fixed = {key: column for key, column in source.fixed.items() if key in ("domain", "row_id")}
    own = {name: column for name, column in source.columns.items() if name not in source.local}
    return {**own, **fixed}


def _read(path: Path, schema: Schema, log_names: dict[str, str]) -> pa.Table:
    """`row_id`, `domain` and the schema's fields; what cannot be had is named."""
    fields = {DOMAIN.name: DOMAIN} | {field.name: field for field in schema.fields}
    texts = [field.name for field in fields.values() if field.kind != "number"]
    try:
        table = READERS[path.suffix](path, [*texts, *(log_names.get(name, name) for name in texts)])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not readable as {path.suffix[1:]}: {error}") from None
    for name, column in log_names.items():
        if name not in table.column_names and column in table.column_names:
            table = table.append_column(name, table[column])
    missing = [name for name in fields if name not in table.column_names]
    if missing:
        also = {name: f" (in the log: {column})" for name, column in log_names.items()}
        raise UserError(
            f"{path}: no column {missing[0]!r}; needed: "
            f"{', '.join(name + also.get(name, '') for name in fields)}"
        )
    if len(table) == 0:
        raise UserError(f"{path}: no rows")
    if table["domain"].null_count:
        row = pc.index(pc.is_null(table["domain"]), True).as_py()
        raise UserError(f"{path}: row {row} has no domain; every row needs one")
    if "row_id" not in table.column_names:
        table = table.append_column("row_id", pa.array(np.arange(len(table))))
    columns = {name: _column(path, field, table[name]) for name, field in fields.items()}
    return pa.table({"row_id": _cast(path, "row_id", table["row_id"], pa.int64()), **columns})


def _csv(path: Path, texts: list[str]) -> pa.Table:
    # Left to itself Arrow would read the id 00123 as the number 123.
    options = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string()))
    return pyarrow.csv.read_csv(path, convert_options=options)


def _parquet(path: Path, _: list[str]) -> pa.Table:
    return pyarrow.parquet.read_table(path)


def _column(path: Path, field: Field, column: pa.ChunkedArray) -> pa.ChunkedArray:
    if field.kind == "number":
        return _cast(path, field.name, column, pa.float32())
    if not field.multi and field.kind != "tokens":
        return _cast(path, field.name, column, pa.string())
    if not isinstance(column.type, pa.ListType | pa.LargeListType):
        text = _cast(path, field.name, column, pa.string())
        none = pa.scalar(None, pa.string())
        column = pc.split_pattern(pc.if_else(pc.equal(text, ""), none, text), "|")
    values = pa.int32() if field.kind == "tokens" else pa.string()
    return _cast(path, field.name, column, pa.list_(values))


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
