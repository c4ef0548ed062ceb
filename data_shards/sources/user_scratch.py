"""Rows sorted out by user: scratch files, each with all rows of some users, small enough to hold.

The files lie in a folder of the run, made by the first process that needs them, found by those it
starts, and removed when it ends.
"""

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from data_shards.errors import UserError
from data_shards.hashing import xxh64
from data_shards.schema import canonical

BUCKETS = 256
"""More than that many pieces are never made: above 500 million rows they grow."""
BUCKET_ROWS = 8192
"""Rows that a bucket holds before it writes them."""
PIECE_ROWS = 2_000_000
ROOT = "BANYAN_SCRATCH"


class Rows(Protocol):
    """Rows before the per-user stage: what a source's `pieces` and `read` give."""

    def pieces(self) -> tuple[str, ...]: ...

    def read(self, piece: int, dropped: Counter[str]) -> Iterator[pa.Table]: ...

    def identity(self) -> dict[str, Any]:
        """What decides the rows, places and times of change included."""
        ...


class Scratch:
    """Rows by user, on disk: `pieces` of about two million rows."""

    def __init__(self, rows: Rows, user: str, item: str) -> None:
        """`item`: whose distinct values per domain are kept; empty: none."""
        identity = canonical([rows.identity(), user, item])
        self.folder = _root() / hashlib.sha256(identity).hexdigest()
        _make_once(self.folder, lambda folder: _spread(rows, user, item, folder))
        manifest = json.loads((self.folder / "manifest.json").read_text())
        self.pieces: list[list[int]] = manifest["pieces"]
        self.dropped: dict[str, int] = manifest["dropped"]

    def read(self, piece: int) -> pa.Table:
        """All rows of a piece's users, in no order that means anything."""
        files = (self.folder / f"{bucket}.arrow" for bucket in self.pieces[piece])
        return pa.concat_tables(_load(file) for file in files)

    def items(self) -> pa.Table:
        """The distinct pairs of domain and item."""
        return _load(self.folder / "items.arrow")


def _load(path: Path) -> pa.Table:
    with pa.OSFile(str(path), "rb") as file:
        return pa.ipc.open_stream(file).read_all()


def _root() -> Path:
    """The run's folder: child processes find it in the environment, strangers cannot guess it."""
    if ROOT not in os.environ or not Path(os.environ[ROOT]).is_dir():
        os.environ[ROOT] = tempfile.mkdtemp(prefix="banyan-")
        atexit.register(_remove, os.environ[ROOT], os.getpid())
    return Path(os.environ[ROOT])


def _remove(folder: str, maker: int) -> None:
    if os.getpid() == maker:  # a forked child leaves its parent's files alone
        shutil.rmtree(folder, ignore_errors=True)


def _make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """A folder, made under another name; of two that make it at once, one is kept."""
    if folder.is_dir():
        return
    made = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        make(made)
        made.rename(folder)
    except OSError as error:
        if not folder.is_dir():
            raise UserError(
                f"{folder.parent}: no room for rows sorted by user ({error.strerror}); set TMPDIR "
                "to a folder with as much space as the log takes"
            ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _spread(rows: Rows, user: str, item: str, folder: Path) -> None:
    """Every row into the bucket of its user, and the distinct items beside them."""
    dropped: Counter[str] = Counter()
    buckets = _Buckets(folder)
    items = _Distinct()
    for piece in range(len(rows.pieces())):
        for table in rows.read(piece, dropped):
            buckets.add(table, xxh64(table[user].combine_chunks()))
            if item:
                items.add(table.select(["domain", item]).rename_columns(["domain", "item"]))
    sizes = buckets.close()
    _write(folder / "items.arrow", items.table())
    manifest = {"pieces": _grouped(sizes), "dropped": dropped}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _write(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def _grouped(sizes: dict[int, int]) -> list[list[int]]:
    """Neighbouring buckets together, up to `PIECE_ROWS`."""
    groups: list[list[int]] = []
    rows = 0
    for bucket in sorted(sizes):
        if not groups or rows + sizes[bucket] > PIECE_ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(bucket)
        rows += sizes[bucket]
    return groups


class _Buckets:
    """Rows on their way to the files of their buckets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.waiting: dict[int, list[pa.Table]] = {}
        self.waiting_rows: Counter[int] = Counter()
        self.sizes: Counter[int] = Counter()
        self.writers: dict[int, pa.RecordBatchStreamWriter] = {}

    def add(self, table: pa.Table, hashes: np.ndarray) -> None:
        bucket = (hashes % np.uint64(BUCKETS)).astype(np.int64)
        order = np.argsort(bucket, kind="stable")
        sorted_out = table.take(pa.array(order))
        ends = np.cumsum(np.bincount(bucket, minlength=BUCKETS))
        for number in np.unique(bucket).tolist():
            start = int(ends[number - 1]) if number else 0
            rows = int(ends[number]) - start
            self.waiting.setdefault(number, []).append(sorted_out.slice(start, rows))
            self.waiting_rows[number] += rows
            if self.waiting_rows[number] >= BUCKET_ROWS:
                self._flush(number)

    def _flush(self, number: int) -> None:
        table = pa.concat_tables(self.waiting.pop(number)).combine_chunks()
        if number not in self.writers:
            path = str(self.folder / f"{number}.arrow")
            self.writers[number] = pa.ipc.new_stream(path, table.schema)
        self.writers[number].write_table(table)
        self.sizes[number] += self.waiting_rows.pop(number)

    def close(self) -> dict[int, int]:
        """Rows of each bucket that has any."""
        for number in list(self.waiting):
            self._flush(number)
        for writer in self.writers.values():
            writer.close()
        return self.sizes


class _Distinct:
    """The distinct rows of many tables: merged whenever they have doubled."""

    def __init__(self) -> None:
        empty = pa.table({"domain": pa.array([], pa.string()), "item": pa.array([], pa.string())})
        self.parts = [empty]
        self.rows = self.merged_rows = 0

    def add(self, table: pa.Table) -> None:
        self.parts.append(table.group_by(table.column_names).aggregate([]))
        self.rows += len(self.parts[-1])
        if self.rows > 2 * self.merged_rows + BUCKETS * BUCKET_ROWS:
            self.parts = [self.table()]
            self.rows = self.merged_rows = len(self.parts[0])

    def table(self) -> pa.Table:
        table = pa.concat_tables(self.parts)
        return table.group_by(table.column_names).aggregate([]).drop_null()
