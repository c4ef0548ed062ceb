"""Rows per second of the loader beside WebDataset, Parquet and a copy of the same bytes.

    python -m benchmarks.loader

One process, warm page cache, 20 id fields with label and domain. Ours is shuffled and checks every
block, by SHA-256 in the first epoch; WebDataset is shuffled; Parquet is read in its own order, by
all of Arrow's threads and by one. Sides take turns, so that the machine's other work falls on all.
"""

import argparse
import io
import json
import statistics
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from webdataset.compat import WebDataset

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
from trainer.ranks import keep_freed_memory

FIELDS = tuple(f"f{number}" for number in range(19)) + ("domain",)
SCHEMA = Schema(tuple(Field(name, "id") for name in FIELDS))
ROW_GROUP = 131_072
TRAIN = SplitConfig(parts={"train": 1.0})
Side = Callable[[], Iterator[int]]
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


def copy(size: int, rows: int) -> Side:
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


def _seconds(side: Side) -> float:
    """Seconds per row of one run."""
    start = time.perf_counter()
    rows = sum(side())
    return (time.perf_counter() - start) / rows


def _compare(sides: dict[str, Side], rounds: int) -> None:
    """Rows per second of each side, and the first side's ratio to it: medians over the rounds."""
    runs = [{name: _seconds(side) for name, side in sides.items()} for _ in range(rounds + 1)][1:]
    first = next(iter(sides))
    for name in sides:
        rate = statistics.median(1 / run[name] for run in runs)
        ratio = statistics.median(run[name] / run[first] for run in runs)
        print(f"{name:<52} {rate:>13,.0f} rows/s  {ratio:>9.2f}", flush=True)


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

    return {"write_shards, one process": shards, "Parquet of the raw strings": raw}


def main() -> None:
    """Write all forms into a temporary folder and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--json-rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=Reading.threads)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        source, shards = Drawn(args.rows), root / "shards"
        index: Index = write_shards(source, SCHEMA, TRAIN, shards)
        reader = ShardReader(shards, index)
        table = pa.concat_tables([reader.read(block) for block in index.blocks])
        pq.write_table(table.drop(["time"]), root / "rows.parquet", row_group_size=ROW_GROUP)
        _write_json_members(root / "rows.tar", table.slice(0, args.json_rows))
        size = sum(block.bytes for block in index.blocks)
        print(f"{index.rows:,} rows, {len(FIELDS)} id fields, {size / index.rows:.0f} bytes a row")
        print("shards", args.batch, "a batch;", "last column: first line / this side")
        mixed = Reading(global_batch=args.batch, threads=args.threads)

        def loader(reading: Reading) -> Loader:
            return Loader(shards, Rows(("train",)), reading, 0, 1)

        known, pure = loader(mixed), loader(replace(mixed, sampler="domain_pure"))
        memory = _columns(table.combine_chunks())
        keep_freed_memory()  # as a training process does
        sides: dict[str, Side] = {
            "loader, mixed, first epoch": lambda: ours(loader(mixed)),
            "loader, mixed, later epochs": lambda: ours(known),
            "loader, domain_pure, later epochs": lambda: ours(pure),
            "pyarrow, Parquet row groups, in order": lambda: parquet(
                root / "rows.parquet", args.batch
            ),
            "pyarrow, the same, one thread": lambda: parquet(
                root / "rows.parquet", args.batch, threads=False
            ),
            "numpy gather, all rows in memory": lambda: gather(memory, args.batch),
            "copy of the blocks' bytes": copy(size, index.rows),
            "webdataset, one JSON row per member, shuffled": lambda: webdataset(
                root / "rows.tar", args.batch
            ),
        }
        _compare(sides, args.rounds)
        _compare(_writing(source, root), 2)


if __name__ == "__main__":
    main()
