"""Small tables, some with fewer rows than ranks, and global batches of repeated ids and no ids."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec import KeyedJaggedTensor

from embeddings import ShardedTables, TablesConfig, trunk_tables

ROWS = {"user": 37, "item": 23, "genre": 3, "city": 1}
WIDTH = 8
BATCH = 16  # rows of a global batch
CPU = torch.device("cpu")

Bags = dict[str, list[list[int]]]
"""Per field, the ids of each row of a global batch."""


def config(sharding: str = "table_wise", **changes: Any) -> TablesConfig:
    return TablesConfig(**{"init_std": 0.1, "lr": 0.01, "sharding": sharding, **changes})


def toy_tables(
    config: TablesConfig, rows: Mapping[str, int] = ROWS, seed: int = 5
) -> ShardedTables:
    return ShardedTables(trunk_tables(rows, config, WIDTH), config, CPU, seed)


def bags(seed: int, rows: Mapping[str, int] = ROWS, batch: int = BATCH) -> Bags:
    """Zero to four ids each, drawn with repeats; the last id of a field is never drawn."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: [
            torch.randint(max(count - 1, 1), (int(length),), generator=generator).tolist()
            for length in torch.randint(5, (batch,), generator=generator)
        ]
        for key, count in rows.items()
    }


def jagged(bags: Bags, rows: slice = slice(None)) -> KeyedJaggedTensor:
    """These rows of a global batch."""
    chosen = [row for key in bags for row in bags[key][rows]]
    return KeyedJaggedTensor(
        keys=list(bags),
        values=torch.tensor([i for row in chosen for i in row], dtype=torch.int64),
        lengths=torch.tensor([len(row) for row in chosen], dtype=torch.int64),
    )


def mine(batch: int = BATCH) -> slice:
    """This rank's rows of a global batch."""
    size = batch // dist.get_world_size()
    return slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)


def pooled(weights: Mapping[str, Tensor], bags: Bags) -> Tensor:
    """Sum-pooled vectors [batch, fields, width], by the definition."""
    return torch.stack(
        [torch.stack([weights[key][ids].sum(0) for ids in bags[key]]) for key in bags], dim=1
    )


def loss(vectors: Tensor, rows: slice, seed: int) -> Tensor:
    """A share of the loss of a global batch: each row and float has a weight of its own."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, *vectors.shape[1:])
    slope, bend = (torch.randn(shape, generator=generator)[rows].to(vectors) for _ in range(2))
    return (slope * vectors + bend * vectors.square()).sum() / BATCH


def train(tables: ShardedTables, seeds: Sequence[int]) -> None:
    """A step on each of these global batches, as the trainer does it."""
    for seed in seeds:
        vectors = tables(jagged(bags(seed), mine()))
        (loss(vectors, mine(), seed) * dist.get_world_size()).backward()
