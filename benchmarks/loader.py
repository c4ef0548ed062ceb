"""Rows per second of the loader beside WebDataset, Parquet and a copy of the same bytes.

    python -m benchmarks.loader

One process, warm page cache, 20 id fields with label and domain. Ours is shuffled and checks every
block by XXH3; WebDataset is shuffled; Parquet is read in its own order, by
all of Arrow's threads and by one. Sides take turns, so that the machine's other work falls on all.
"""

import argparse
import io
import json
import os
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from webdataset.compat import WebDataset

from benchmarks.measure import Claim, Side, compared, table
from data_shards import (
    Batch,
    Cursor,
    Field,
    Index,
    Loader,
    Reading,
    Rows,
    Schema,
    ShardReader,
    SplitConfig,
    write_shards,
)
from trainer.machine import machine
from trainer.ranks import keep_freed_memory

FIELDS = tuple(f"f{number}" for number in range(19)) + ("domain",)
SCHEMA = Schema(tuple(Field(name, "id") for name in FIELDS))
ROW_GROUP = 131_072
TRAIN = SplitConfig(parts={"train": 1.0})
RESULTS = Path(__file__).parent / "results"
Pass = Callable[[], Iterator[int]]
"""Reads or writes everything once and yields numbers of rows."""


class Drawn:
    """Random rows: skewed ids in fields of 10 to 100,000 values, four domains."""

    def __init__(self, rows: int) -> None:
        rng = np.random.default_rng(1)
        columns: dict[str, Any] = {
            "row_id": np.arange(rows),
            "domain": _strings((4 * rng.random(rows) ** 2).astype(np.int32)),
            "label": (rng.random(rows) < 0.2).astype(np.float32),
            "time": np.arange(rows),
        }
        for number, name in enumerate(FIELDS[:-1]):
            values = 10 ** (1 + number % 5)
            columns[name] = _strings((values * rng.random(rows) ** 3).astype(np.int32))
        self.table = pa.table(columns)

    def state(self) -> list[Any]:
        return []

    def describe(self) -> dict[str, Any]:
        return {"kind": "drawn", "rows": len(self.table)}

    def tables(self) -> Iterator[pa.Table]:
        for start in range(0, len(self.table), 65_536):
            yield self.table.slice(start, 65_536)

    def pieces(self) -> tuple[str, ...]:
        return ("all",)

    def read(self, piece: int, dropped: Counter[str]) -> Iterator[pa.Table]:
        return self.tables()


def _strings(numbers: np.ndarray) -> pa.Array:
    return pa.array(numbers).cast(pa.string())


def ours(loader: Loader) -> Iterator[int]:
    """An epoch of shuffled batches."""
    for batch in loader.batches(Cursor()):
        yield batch.rows


def parquet(path: Path, batch: int, threads: bool = True) -> Iterator[int]:
    """The same batches, unshuffled: row group after row group."""
    with pq.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            columns = _columns(file.read_row_group(number, use_threads=threads))
            for start in range(0, len(columns["label"]), batch):
                yield len(_batch({k: v[start : start + batch] for k, v in columns.items()}).label)


def _columns(table: pa.Table) -> dict[str, np.ndarray]:
    return {name: table[name].to_numpy() for name in ("row_id", "label", *FIELDS)}


def _batch(columns: dict[str, np.ndarray]) -> Batch:
    rows = len(columns["label"])
    values = np.concatenate([columns[name] for name in FIELDS], dtype=np.int64)
    lengths = np.ones(len(FIELDS) * rows, np.int32)
    ids = KeyedJaggedTensor(
        list(FIELDS), torch.from_numpy(values), lengths=torch.from_numpy(lengths)
    )
    return Batch(
        ids=ids,
        numbers=torch.empty(rows, 0),
        domain=torch.from_numpy(columns["domain"].astype(np.int64)),
        label=torch.from_numpy(columns["label"]),
        weight=torch.ones(rows),
        row_id=torch.from_numpy(columns["row_id"]),
        rows=rows,
    )


def gather(columns: dict[str, np.ndarray], batch: int) -> Iterator[int]:
    """Everything in memory: a permutation and one gather per batch."""
    order = np.random.default_rng(1).permutation(len(columns["label"]))
    ids = np.stack([columns[name] for name in FIELDS])
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        values = torch.from_numpy(ids[:, rows].astype(np.int64))
        yield len(torch.from_numpy(columns["label"][rows])) if len(values) else 0


def copy(size: int, rows: int) -> Pass:
    """A copy in memory of as many bytes as the blocks hold."""
    source, target = np.ones(size, np.uint8), np.empty(size, np.uint8)

    def run() -> Iterator[int]:
        np.copyto(target, source)
        yield rows

    return run


def webdataset(tar: Path, batch: int) -> Iterator[int]:
    """One JSON row per member, shuffled."""
    rows: Iterable[dict] = WebDataset(str(tar), shardshuffle=False).shuffle(10_000)  # pyright: ignore
    values: list[list[int]] = []
    for sample in rows:
        row = json.loads(sample["json"])
        values.append([row[name] for name in (*FIELDS, "label")])
        if len(values) == batch:
            yield len(torch.tensor(values))
            values = []
    if values:
        yield len(torch.tensor(values))


def _write_json_members(target: Path, table: pa.Table) -> None:
    with tarfile.open(target, "w") as tar:
        for number, row in enumerate(table.select([*FIELDS, "label"]).to_pylist()):
            data = json.dumps(row).encode()
            member = tarfile.TarInfo(f"{number:08d}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def _side(read: Pass, rows: int, batch: int) -> Side:
    """`rows` are whole batches, each of which counts as a step."""
    return Side(lambda: sum(read()), rows // batch, rows, lambda: _cpu_time(read))


def _cpu_time(read: Pass) -> str:
    """What a row costs all threads together, whoever else uses the machine."""
    before = os.times()
    rows = sum(read())
    after = os.times()
    user, system = (after[i] - before[i] for i in (0, 1))
    return f"{1e9 * user / rows:.0f} ns of CPU a row, {1e9 * system / rows:.0f} in the system"


def _writing(source: Drawn, folder: Path) -> dict[str, Side]:
    """Raw rows to disk: splits, vocabulary and ids on our side, strings on the other."""

    def shards() -> Iterator[int]:
        out = folder / f"written-{time.monotonic_ns()}"
        yield write_shards(source, SCHEMA, TRAIN, out).rows

    def raw() -> Iterator[int]:
        with pq.ParquetWriter(folder / "raw.parquet", source.table.schema) as writer:
            for table in source.tables():
                writer.write_table(table)
        yield len(source.table)

    sides = {"write_shards, one process": shards, "Parquet of the raw strings": raw}
    return {
        name: Side(lambda write=write: sum(write()), 1, len(source.table))
        for name, write in sides.items()
    }


def _reading(root: Path, source: Drawn, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is read, in turns."""
    shards = root / "shards"
    index: Index = write_shards(source, SCHEMA, TRAIN, shards)
    reader = ShardReader(shards, index)
    rows = pa.concat_tables([reader.read(block) for block in index.blocks])
    flat, tar = root / "rows.parquet", root / "rows.tar"
    pq.write_table(rows.drop(["time"]), flat, row_group_size=ROW_GROUP)
    _write_json_members(tar, rows.slice(0, args.json_rows))
    size = sum(block.bytes for block in index.blocks)
    mixed = Reading(global_batch=args.batch, threads=args.threads)

    def loader(reading: Reading) -> Loader:
        return Loader(shards, Rows(("train",)), reading, 0, 1)

    known, pure = loader(mixed), loader(replace(mixed, sampler="domain_pure"))
    memory = _columns(rows.combine_chunks())
    first, later, parquet_, json_, copied = (
        "loader, mixed, first epoch",
        "loader, mixed, later epochs",
        "pyarrow, Parquet row groups, in order",
        "webdataset, one JSON row per member, shuffled",
        "copy of the blocks' bytes",
    )
    reads: dict[str, Pass] = {
        first: lambda: ours(loader(mixed)),
        later: lambda: ours(known),
        "loader, domain_pure, later epochs": lambda: ours(pure),
        parquet_: lambda: parquet(flat, args.batch),
        "pyarrow, the same, one thread": lambda: parquet(flat, args.batch, threads=False),
        "numpy gather, all rows in memory": lambda: gather(memory, args.batch),
        copied: copy(size, index.rows),
    }
    sides = {name: _side(read, index.rows, args.batch) for name, read in reads.items()}
    sides[json_] = _side(lambda: webdataset(tar, args.batch), args.json_rows, args.batch)
    return compared(
        f"{index.rows:,} rows, {len(FIELDS)} id fields, {size / index.rows:.0f} bytes a row, "
        f"batches of {args.batch}",
        sides,
        [
            Claim("times the speed of Parquet, first epoch", parquet_, first, 1.0),
            Claim("times the speed of Parquet, later epochs", parquet_, later, 1.0),
            Claim("times the speed of JSON rows, first epoch", json_, first, 300),
            Claim("of the speed of a memory copy", copied, later),
        ],
        args.rounds,
    )


def main() -> None:
    """Write all forms into a temporary folder, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=1000 * 4096, help="whole batches")
    parser.add_argument("--json-rows", type=int, default=5 * 4096, help="whole batches")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=Reading.threads)
    parser.add_argument("--out", type=Path, default=RESULTS / "loader.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as a training process does
    source = Drawn(args.rows)
    with tempfile.TemporaryDirectory() as temporary:
        parts = [_reading(Path(temporary), source, args)]
        print(table(parts[0]), flush=True)
        sides = _writing(source, Path(temporary))
        parts.append(compared("the same rows written", sides, [], 2))
        print(table(parts[1]))
    date = datetime.now(UTC).isoformat(timespec="minutes")
    content = {"date": date, "machine": machine(), "threads": args.threads, "parts": parts}
    args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
