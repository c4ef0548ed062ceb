"""Exact shares of each domain and class, row by row, with two counters a domain."""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_shards.errors import UserError

CHANGED = "the source has changed since its rows were counted; start again from the beginning"


_NONE = pa.schema([("domain", pa.string()), ("key", pa.int64()), ("count", pa.int64())])


def summed(counts: Sequence[pa.Table]) -> pa.Table:
    """Several counts as one: columns domain, key, count, each pair of the first two once."""
    total = (
        pa.concat_tables([_NONE.empty_table(), *counts])
        .group_by(["domain", "key"])
        .aggregate([("count", "sum")])
    )
    return total.rename_columns({"count_sum": "count"})


def standing_before(pieces: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """For each piece's counts, how many rows of the same domains and classes earlier ones hold."""
    seen: Counter[tuple[str, int]] = Counter()
    for counts in pieces:
        own = _as_dict(counts)
        yield counts.set_column(2, "count", pa.array([seen[cell] for cell in own], pa.int64()))
        seen.update(own)


class Stratified:
    """Exact counts: each row's place in a pseudo-random permutation of its domain and class.

    Both classes are spread evenly over the domain's places, so every part has its share of each.
    `counts` are of all pieces, `standing` of one piece from `standing_before`.
    """

    def __init__(
        self, seed: int, shares: Sequence[float], counts: pa.Table, standing: pa.Table
    ) -> None:
        names = standing["domain"].unique()
        before = _as_dict(standing)
        total = _as_dict(counts.filter(pc.is_in(counts["domain"], names)))
        self.domains = {name: number for number, name in enumerate(names.to_pylist())}
        cells = [(d, c) for d in self.domains for c in (0, 1)]
        self.seen = np.array([before.get(cell, 0) for cell in cells], np.int64)
        self.size = np.array([total.get(cell, 0) for cell in cells], np.int64)
        self.key = np.array([_key(seed, *cell) for cell in cells], np.uint64)
        ends = np.cumsum(shares)[:-1]
        cuts = [_class_cuts(ends, *self.size[2 * i : 2 * i + 2]) for i in range(len(cells) // 2)]
        self.cuts = np.array(cuts, np.int64).reshape(len(cells), len(ends))

    def parts(self, table: pa.Table) -> np.ndarray:
        encoded = table["domain"].combine_chunks().dictionary_encode()
        names = encoded.dictionary.to_pylist()
        if any(name not in self.domains for name in names):
            raise UserError(CHANGED)
        numbers = [self.domains[name] for name in names]
        cell = 2 * np.array(numbers, np.int64)[encoded.indices.to_numpy()]
        cell += table["label"].to_numpy() > 0.5
        more = np.bincount(cell, minlength=len(self.size))
        if (self.seen + more > self.size).any():
            raise UserError(CHANGED)
        return _places(cell, self.seen, self.size, self.key, self.cuts)


def _as_dict(counts: pa.Table) -> dict[tuple[str, int], int]:
    cells = zip(counts["domain"].to_pylist(), counts["key"].to_pylist(), strict=True)
    return dict(zip(cells, counts["count"].to_pylist(), strict=True))


def _key(seed: int, domain: str, label: int) -> int:
    text = f"{seed} {label} {domain}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _class_cuts(shares: np.ndarray, negatives: int, positives: int) -> list[list[int]]:
    """Per class, how many of its rows stand before each cut of the domain.

    Row k of a class of n stands at (2k + 1) / 2n; where two classes meet, positives come first.
    """
    total = int(negatives + positives)
    rows = [round(share * total) for share in shares]
    first = [_positives_before(r, int(negatives), int(positives)) for r in rows]
    return [[r - p for r, p in zip(rows, first, strict=True)], first]


def _positives_before(rows: int, negatives: int, positives: int) -> int:
    """Of the first `rows` of both classes merged, how many are positives."""
    low, high = max(0, rows - negatives), min(rows, positives)
    while low < high:
        k = (low + high) // 2  # is the k-th positive among the first `rows`?
        ahead = ((2 * k + 1) * negatives + positives - 1) // (2 * positives)
        if k + min(ahead, negatives) < rows:
            low = k + 1
        else:
            high = k
    return low


@numba.njit(cache=True)
def _places(
    cell: np.ndarray, seen: np.ndarray, size: np.ndarray, key: np.ndarray, cuts: np.ndarray
) -> np.ndarray:
    """The part of each row; `seen` counts the rows of each cell so far and moves on."""
    part = np.empty(len(cell), np.int8)
    for i in range(len(cell)):
        c = cell[i]
        place = _permuted(seen[c], size[c], key[c])
        seen[c] += 1
        number = 0
        for cut in cuts[c]:
            number += place >= cut
        part[i] = number
    return part


@numba.njit(cache=True)
def _permuted(number: Any, size: Any, key: Any) -> Any:
    """A permutation of range(size): a Feistel network of four rounds, walked until it is inside."""
    half = 1
    while (1 << (2 * half)) < size:
        half += 1
    mask = np.uint64((1 << half) - 1)
    x = np.uint64(number)
    while True:
        left, right = x >> np.uint64(half), x & mask
        for turn in range(4):
            z = (right + key + np.uint64(turn)) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((z ^ (z >> np.uint64(31))) & mask)
        x = (left << np.uint64(half)) | right
        if x < np.uint64(size):
            return np.int64(x)
