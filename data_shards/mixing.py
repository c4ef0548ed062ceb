"""What an epoch reads of each domain: a pure function of (block sizes, temperature, seed, epoch).

Under a temperature T a domain of n rows gets a share of every epoch that follows n ** (1 / T). It
is an endless sequence of passes over its blocks, each in an order of its own, of which epoch e
reads the places [e * q, (e + 1) * q), q being its rows per epoch. So a small domain is read again,
a large one goes on next epoch where it stopped, and over all epochs no row of a domain is ever
more than one reading ahead of another.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_PASS = 4  # apart from the tags of `order`


@dataclass(frozen=True)
class Pieces:
    """Stretches of blocks: piece i is the rows [first[i], first[i] + rows[i]) of block[i]."""

    block: np.ndarray
    first: np.ndarray
    rows: np.ndarray

    @classmethod
    def whole(cls, block: np.ndarray, rows: np.ndarray) -> "Pieces":
        """Whole blocks."""
        return cls(block, np.zeros_like(rows), rows)

    @classmethod
    def joined(cls, parts: Sequence["Pieces"]) -> "Pieces":
        """The pieces of all parts, by number of their blocks."""
        columns = zip(*((part.block, part.first, part.rows) for part in parts), strict=True)
        block, first, rows = map(np.concatenate, columns)
        order = np.argsort(block, kind="stable")
        return cls(block[order], first[order], rows[order])

    def cut(self, start: int, stop: int) -> "Pieces":
        """The places [start, stop) of these pieces laid end to end."""
        ends = np.cumsum(self.rows)
        begins = ends - self.rows
        low, high = np.maximum(begins, start), np.minimum(ends, stop)
        kept = low < high
        first = self.first + low - begins
        return Pieces(self.block[kept], first[kept], (high - low)[kept])


def quotas(rows: Sequence[int], temperature: float) -> list[int]:
    """Rows of each domain in every epoch; they sum to the rows of all, whatever the temperature."""
    weight = (np.array(rows) / max(rows)) ** (1 / temperature)
    exact = sum(rows) * weight / weight.sum()
    quota = np.floor(exact).astype(np.int64)
    short = sum(rows) - int(quota.sum())
    quota[np.argsort(quota - exact, kind="stable")[:short]] += 1
    return quota.tolist()


def domain_epoch(domain: str, whole: Pieces, quota: int, seed: int, epoch: int) -> Pieces:
    """What an epoch reads of a domain whose blocks are `whole`."""
    size = int(whole.rows.sum())
    start, stop = epoch * quota, (epoch + 1) * quota
    passes = range(start // size, -(-stop // size))
    order = _orders(domain, len(whole.rows), seed, passes)
    read = Pieces(whole.block[order], whole.first[order], whole.rows[order])
    return read.cut(start - passes.start * size, stop - passes.start * size)


def _orders(domain: str, blocks: int, seed: int, passes: range) -> np.ndarray:
    """In which order these passes of a domain take its blocks, one after the other."""
    if blocks == 1:  # a tiny domain is passed over very often
        return np.zeros(len(passes), np.int64)
    name = int.from_bytes(hashlib.sha256(domain.encode()).digest()[:8], "little")
    seeds = ([seed, number, 0, _PASS, name] for number in passes)
    orders = [np.random.default_rng(seed).permutation(blocks) for seed in seeds]
    return np.concatenate([np.empty(0, np.int64), *orders])
