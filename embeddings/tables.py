"""Table layouts: one table per id field, from schema and vocabulary. Nothing distributed here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, PoolingType

from data_shards.errors import UserError, unknown

Sharding = Literal["table_wise", "column_wise", "row_wise"]


@dataclass(frozen=True)
class TablesConfig:
    """The `[tables]` section of a run file."""

    dim: int = 8
    optimizer: Literal["adam", "rowwise_adagrad"] = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    init_std: float = 0.01
    sharding: Sharding = "table_wise"
    pinned: dict[str, Sharding] = field(default_factory=dict)
    """Sharding of single tables, by field name; all others take `sharding`."""

    def __post_init__(self) -> None:
        if self.optimizer == "adam":
            return
        if self.weight_decay:
            raise UserError(
                f"tables.weight_decay: {self.optimizer} has none; set it to 0, or "
                'tables.optimizer to "adam"'
            )
        if "column_wise" in (self.sharding, *self.pinned.values()):
            raise UserError(
                f"tables: {self.optimizer} keeps one number per row of a shard, so with "
                "column_wise the result would depend on the plan; shard table_wise or row_wise, "
                'or set tables.optimizer to "adam"'
            )

    def sharding_of(self, table: str) -> Sharding:
        """How one table is cut."""
        return self.pinned.get(table, self.sharding)


@dataclass(frozen=True)
class Table:
    """One embedding table: `rows` x `width`. Row 0 is the reserved row for unseen values."""

    field: str
    rows: int
    width: int
    sharding: Sharding
    init_std: float


def table_width(dim: int, first_order: bool) -> int:
    """Floats of a row: the vector, one more for a first-order weight if the backbone has one.

    Rounded up to a multiple of 4, because fbgemm reads rows as float4 on GPUs; the spare
    columns get no gradient.
    """
    return -(-(dim + int(first_order)) // 4) * 4


def trunk_tables(rows: Mapping[str, int], config: TablesConfig, width: int) -> tuple[Table, ...]:
    """The shared tables, `rows` by field name in the schema's order."""
    for name in config.pinned:
        if name not in rows:
            raise unknown("id field in tables.pinned:", name, rows)
    return tuple(
        Table(name, count, width, config.sharding_of(name), config.init_std)
        for name, count in rows.items()
    )


def extension_tables(
    rows: Mapping[str, int], config: TablesConfig, width: int
) -> tuple[Table, ...]:
    """Tables beside the frozen ones for ids that only added domains have.

    They start at zero, so that before the first step an added domain predicts what the shared
    part alone predicts.
    """
    return tuple(
        Table(name, max(count, 1), width, config.sharding_of(name), 0.0)
        for name, count in rows.items()
    )


def bags_of(tables: Sequence[Table]) -> EmbeddingBagCollection:
    """The tables as TorchRec knows them, without memory."""
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=table.field,
                embedding_dim=table.width,
                num_embeddings=table.rows,
                feature_names=[table.field],
                pooling=PoolingType.SUM,
            )
            for table in tables
        ],
        device=torch.device("meta"),
    )
