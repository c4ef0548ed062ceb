"""Rows per second of the loader beside one-row-per-member WebDataset and a plain numpy gather.

    python -m benchmarks.loader --data ml-1m.zip

All three read the same MovieLens rows shuffled, in this one process, and count what they gave.
"""

import argparse
import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from webdataset.compat import WebDataset

from data_shards import (
    Cursor,
    Field,
    Index,
    Loader,
    Reading,
    Rows,
    Schema,
    ShardReader,
    SourceConfig,
    SplitConfig,
    open_source,
    write_shards,
)

# MovieLens has nine single-valued columns; its time makes the tenth.
FIELDS = (
    "user",
    "movie",
    "gender",
    "age",
    "occupation",
    "zip",
    "year",
    "title",
    "domain",
    "time_id",
)
SCHEMA = Schema(tuple(Field(name, "id") for name in FIELDS))


class _TenFields:
    """MovieLens with its time as a tenth id."""

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self._movielens = open_source(config)

    def tables(self) -> Iterator[pa.Table]:
        for table in self._movielens.tables():
            yield table.append_column("time_id", table["time"].cast(pa.string()))

    def dropped(self) -> dict[str, int]:
        return self._movielens.dropped()


def _loader(folder: Path, batch: int, sampler: str) -> Iterator[int]:
    reading = Reading(global_batch=batch, sampler=sampler)  # pyright: ignore[reportArgumentType]
    loader = Loader(folder, Rows(("train",)), reading, rank=0, world_size=1)
    for item in loader.batches(Cursor()):
        yield item.rows


def _gather(columns: np.ndarray, label: np.ndarray, batch: int) -> Iterator[int]:
    """Everything in memory: a permutation and one gather per batch."""
    order = np.random.default_rng(1).permutation(len(label))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        ids = torch.from_numpy(columns[:, rows].astype(np.int64))
        yield len(torch.from_numpy(label[rows])) if len(ids) else 0


def _webdataset(tar: Path, batch: int) -> Iterator[int]:
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


def _memory(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    index = Index.load(folder)
    reader = ShardReader(folder, index)
    table = pa.concat_tables([reader.read(block) for block in index.select(("train",))])
    return np.stack([table[name].to_numpy() for name in FIELDS]), table["label"].to_numpy()


def _write_json_members(target: Path, columns: np.ndarray, label: np.ndarray) -> None:
    with tarfile.open(target, "w") as tar:
        for number, (ids, click) in enumerate(zip(columns.T.tolist(), label, strict=True)):
            row = dict(zip(FIELDS, ids, strict=True)) | {"label": float(click)}
            data = json.dumps(row).encode()
            member = tarfile.TarInfo(f"{number:08d}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def _measure(name: str, read: Callable[[], Iterator[int]], repeats: int) -> float:
    """Rows per second, the best of some runs: the machine's other work only slows."""
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        rows = sum(read())
        best = max(best, rows / (time.perf_counter() - start))
    print(f"{name:<44} {best:>13,.0f} rows/s", flush=True)
    return best


def main() -> None:
    """Write both forms into a temporary folder and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="MovieLens' ml-1m.zip")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--json-rows", type=int, default=50_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "shards"
        source = _TenFields(SourceConfig(path=str(args.data)))
        write_shards(source, SCHEMA, SplitConfig(), folder)
        columns, label = _memory(folder)
        tar = Path(temporary) / "rows.tar"
        _write_json_members(tar, columns[:, : args.json_rows], label[: args.json_rows])
        print(f"{len(label):,} rows, {len(FIELDS)} id fields, batches of {args.batch}")
        for sampler in ("domain_pure", "mixed"):
            name = f"loader, {sampler}, shuffled, from shards"
            ours = _measure(name, lambda s=sampler: _loader(folder, args.batch, s), 3)
        _measure("numpy gather, all rows in memory", lambda: _gather(columns, label, args.batch), 3)
        theirs = _measure(
            "webdataset, one JSON row per member", lambda: _webdataset(tar, args.batch), 1
        )
        print(f"loader / webdataset: {ours / theirs:,.0f} times")


if __name__ == "__main__":
    main()
