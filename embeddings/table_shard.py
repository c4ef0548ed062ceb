"""A rectangle of one table on one rank: its first weights and its digest know no plan."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

INIT_ROWS = 1 << 16  # rows whose first weights come from one seed, drawn together
Rows = tuple[Tensor, Tensor]
"""[n] places in a table, and the [n, width] values there."""


@dataclass(frozen=True)
class Place:
    """Ranks that tables are planned for: "cpu" or "cuda", how many in all and on a node, and the
    bytes of memory that each has (None: as TorchRec takes it to be)."""

    device: str
    world: int
    local_world: int
    memory: int | None = None


@dataclass(frozen=True)
class TablePart:
    """A rectangle of one table, planned for one rank."""

    table: str
    rank: int
    row: int
    col: int
    rows: int
    cols: int


@dataclass(frozen=True)
class TableShard:
    """A rectangle of one table on this rank; its tensors are the live ones, not copies.

    `tensors` holds "weight" [rows, cols] and the optimizer's state: [rows, cols] each for Adam,
    [rows] for row-wise Adagrad.
    """

    table: str
    row: int
    col: int
    width: int
    tensors: dict[str, Tensor]


def first_weights(shard: TableShard, start: int, rows: int, std: float, seed: int) -> Tensor:
    """N(0, std) as a pure function of (seed, table, place); the reserved row 0 is zero.

    So a model starts from the same weights on any number of ranks and under any plan.
    """
    cols = shard.tensors["weight"].shape[1]
    if std == 0:
        return torch.zeros(rows, cols)
    first, last = shard.row + start, shard.row + start + rows
    parts = []
    for chunk in range(first // INIT_ROWS, (last - 1) // INIT_ROWS + 1):
        key = hashlib.sha256(f"{seed}/{shard.table}/{chunk}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        whole = torch.empty(INIT_ROWS, shard.width).normal_(0, std, generator=generator)
        if chunk == 0:
            whole[0] = 0
        lo, hi = max(first, chunk * INIT_ROWS), min(last, (chunk + 1) * INIT_ROWS)
        parts.append(whole[lo - chunk * INIT_ROWS : hi - chunk * INIT_ROWS])
    return torch.cat(parts)[:, shard.col : shard.col + cols]


def place_hash(shard: TableShard) -> np.ndarray:
    """Sum over a rectangle of a mix of (table, row, column, bits of the weight), twice."""
    weight = shard.tensors["weight"].detach().cpu()
    name = np.frombuffer(hashlib.sha256(shard.table.encode()).digest()[:16], dtype=np.uint64)
    sums = np.zeros(2, dtype=np.uint64)
    for start in range(0, weight.shape[0], INIT_ROWS):
        bits = weight[start : start + INIT_ROWS].numpy().view(np.uint32).astype(np.uint64)
        rows = np.arange(start, start + len(bits), dtype=np.uint64) + np.uint64(shard.row)
        cols = np.arange(bits.shape[1], dtype=np.uint64) + np.uint64(shard.col)
        place = rows[:, None] * np.uint64(shard.width) + cols
        for i in range(2):
            mixed = _mix(_mix(place ^ name[i]) + bits)
            sums[i] += mixed.sum(dtype=np.uint64)
    return sums


def filled_rows(shard: TableShard) -> tuple[str, int, Rows]:
    """(table, first column, rows) of what is not all zeros in a rectangle."""
    weight = shard.tensors["weight"].detach().cpu()
    place = weight.any(dim=1).nonzero()[:, 0]
    return shard.table, shard.col, (place + shard.row, weight[place])


def joined_rows(parts: Sequence[tuple[str, int, Rows]], table: str, width: int) -> Rows:
    """The rows of one table, ascending, out of all ranks' rectangles."""
    own = [(col, rows) for name, col, rows in parts if name == table]
    place = torch.unique(torch.cat([rows for _, (rows, _) in own]))
    values = torch.zeros(len(place), width)
    for col, (rows, part) in own:
        values[torch.searchsorted(place, rows), col : col + part.shape[1]] = part
    return place, values


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
