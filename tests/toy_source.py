"""A source over rows in memory, for tests that need rows of a known kind."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from data_shards.schema import Field, Schema

SCHEMA = Schema(
    (
        Field("user", "id", "user"),
        Field("item", "anonymous", "item", min_count=2),
        Field("tags", "id", "item", multi=True),
        Field("page", "id", vocabulary="hash", buckets=50),
        Field("price", "number", "item"),
        Field("title", "text", "item"),
        Field("domain", "id"),
    )
)


class ToySource:
    """Yields the rows of one table in so many pieces, in tables of 97 rows."""

    def __init__(self, rows: pa.Table, pieces: int) -> None:
        self.rows = rows
        self.cuts = [len(rows) * i // pieces for i in range(pieces + 1)]

    def pieces(self) -> tuple[str, ...]:
        return tuple(map(str, self.cuts[1:]))

    def read(self, piece: int, dropped: Counter[str]) -> Iterator[pa.Table]:
        dropped["unreadable"] += 3
        start, stop = self.cuts[piece : piece + 2]
        for first in range(start, stop, 97):
            yield self.rows.slice(first, min(97, stop - first))

    def state(self) -> list[Any]:
        return []

    def describe(self) -> dict[str, Any]:
        return {"kind": "toy", "rows": len(self.rows)}


def toy_rows(sizes: dict[str, int] | None = None, seed: int = 0) -> pa.Table:
    """Rows of three domains in random order; the price of a row is its row_id."""
    sizes = sizes or {"books": 700, "toys": 300, "music": 41}
    rng = np.random.default_rng(seed)
    domain = rng.permutation(np.repeat(list(sizes), list(sizes.values())))
    n = len(domain)
    tags = [rng.choice(["a", "b", "c", "d"], rng.integers(0, 4)).tolist() for _ in range(n)]
    return pa.table(
        {
            "row_id": np.arange(n),
            "domain": domain.tolist(),
            "label": rng.integers(0, 2, n).astype(np.float32),
            "time": rng.integers(0, 1000, n),
            "user": [f"u{i}" for i in rng.integers(0, 60, n)],
            "item": [f"{d}-{i}" for d, i in zip(domain, rng.integers(0, 90, n), strict=True)],
            "tags": pa.array(tags, pa.list_(pa.string())),
            "page": [f"p{i}" for i in rng.integers(0, 500, n)],
            "price": np.arange(n).astype(np.float32),
            "title": [f"title {i}" for i in range(n)],
        }
    )


def toy_source(rows: pa.Table | None = None, pieces: int = 1) -> ToySource:
    """The source over `rows`, or over the rows of `toy_rows()`."""
    return ToySource(toy_rows() if rows is None else rows, pieces)
