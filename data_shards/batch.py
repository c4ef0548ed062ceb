"""What a model reads: one batch of rows, cut out of columns that hold many batches.

Shapes: B rows of this rank, F keys, n numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from data_shards.schema import Field, Schema


@dataclass(frozen=True)
class Batch:
    """Rows of one rank's share of a global batch. Padding has weight 0, row_id -1 and no ids."""

    ids: KeyedJaggedTensor
    """Keys are the schema's ids in order; int64 values, int32 lengths."""
    numbers: Tensor
    """[B, n] float32"""
    domain: Tensor
    """[B] int64, an index into the loader's domains"""
    label: Tensor
    """[B] float32"""
    weight: Tensor
    """[B] float32"""
    row_id: Tensor
    """[B] int64"""
    rows: int
    """Real rows of the global batch, the same on all ranks: the loss divides by it."""
    tokens: dict[str, JaggedTensor] = field(default_factory=dict)
    """Per field of token numbers: int64 values, int32 lengths [B]; padding has length 0."""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """[B] sidecar columns by name: float32, or int64 for ids of texts."""

    def __len__(self) -> int:
        return len(self.label)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        return Batch(
            ids=self.ids.to(device, non_blocking=True),
            numbers=self.numbers.to(device, non_blocking=True),
            domain=self.domain.to(device, non_blocking=True),
            label=self.label.to(device, non_blocking=True),
            weight=self.weight.to(device, non_blocking=True),
            row_id=self.row_id.to(device, non_blocking=True),
            rows=self.rows,
            tokens={k: v.to(device, non_blocking=True) for k, v in self.tokens.items()},
            columns={k: v.to(device, non_blocking=True) for k, v in self.columns.items()},
        )


@dataclass(frozen=True)
class IdColumn:
    """Ids of many rows: row i holds values[offsets[i]:offsets[i + 1]], or one value each (None)."""

    values: np.ndarray
    offsets: np.ndarray | None = None

    def rows(self, start: int, stop: int, real: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """(values, lengths) of some rows; those not `real` have none (None: all are)."""
        if self.offsets is None:
            values, lengths = self.values[start:stop], _ones(stop - start)
        else:
            offsets = self.offsets[start : stop + 1]
            values, lengths = self.values[offsets[0] : offsets[-1]], np.diff(offsets)
        return (values, lengths) if real is None else (values[real.repeat(lengths)], lengths * real)


@lru_cache
def _ones(rows: int) -> np.ndarray:
    return np.ones(rows, np.int32)


@dataclass(frozen=True)
class Columns:
    """Encoded rows as plain arrays; ids in key order, `numbers` [rows, n], `real` marks padding."""

    keys: tuple[str, ...]
    ids: tuple[IdColumn, ...]
    numbers: np.ndarray
    domain: np.ndarray
    label: np.ndarray
    row_id: np.ndarray
    real: np.ndarray
    tokens: Mapping[str, IdColumn] = field(default_factory=dict)
    sidecars: Mapping[str, np.ndarray] = field(default_factory=dict)

    def batch(self, start: int, stop: int, rows: int) -> Batch:
        """The rows [start, stop) as a batch whose global batch has `rows` real rows."""
        real = self.real[start:stop]
        some = None if real.all() else real
        values, lengths = zip(*(ids.rows(start, stop, some) for ids in self.ids), strict=True)
        return Batch(
            ids=KeyedJaggedTensor(
                keys=list(self.keys),
                values=_joined(values, np.int64),
                lengths=_joined(lengths, np.int32),
                stride=stop - start,
            ),
            numbers=torch.from_numpy(self.numbers[start:stop]),
            domain=torch.from_numpy(self.domain[start:stop]),
            label=torch.from_numpy(self.label[start:stop]),
            weight=torch.from_numpy(real.astype(np.float32)),
            row_id=torch.from_numpy(self.row_id[start:stop]),
            rows=rows,
            tokens={
                name: _jagged(*column.rows(start, stop, some))
                for name, column in self.tokens.items()
            },
            columns={
                name: torch.from_numpy(column[start:stop]) for name, column in self.sidecars.items()
            },
        )


def _joined(parts: Sequence[np.ndarray], kind: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts, dtype=kind))


def _jagged(values: np.ndarray, lengths: np.ndarray) -> JaggedTensor:
    return JaggedTensor(_joined([values], np.int64), lengths=_joined([lengths], np.int32))


def gather(
    schema: Schema,
    tables: Sequence[pa.Table],
    take: np.ndarray,
    domain: np.ndarray,
    real: np.ndarray,
) -> Columns:
    """The rows `take` of the tables laid end to end; `domain` and `real` are per taken row.

    Rows that are not `real` must be those of a `reader.blank_row`.
    """
    read = [f.name for f in schema.fields if f.kind != "text"]
    selected = [table.select(["row_id", "label", *read]) for table in tables]
    # one copy of everything in C++, so that each column is one array
    table = pa.concat_tables(selected).combine_chunks()
    return Columns(
        keys=tuple(field.name for field in schema.ids),
        ids=_ids(schema, table, take),
        numbers=_numbers(schema, table, take),
        domain=domain,
        label=_taken(table, "label", take),
        row_id=_taken(table, "row_id", take),
        real=real,
        tokens={f.name: _lists(f, table, take) for f in schema.tokens},
    )


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table[name]
    return column.chunk(0) if column.num_chunks else column.combine_chunks()


def _taken(
    table: pa.Table, name: str, take: np.ndarray, out: np.ndarray | None = None
) -> np.ndarray:
    # "clip" goes straight into the result; "raise" goes through a buffer
    return _array(table, name).to_numpy().take(take, out=out, mode="clip")


def _ids(schema: Schema, table: pa.Table, take: np.ndarray) -> tuple[IdColumn, ...]:
    # one large array instead of many: its pages are cheaper to come by
    values = np.empty((len(schema.ids), len(take)), np.int32)
    return tuple(
        _lists(field, table, take)
        if field.multi
        else IdColumn(_taken(table, field.name, take, out))
        for field, out in zip(schema.ids, values, strict=True)
    )


def _lists(field: Field, table: pa.Table, take: np.ndarray) -> IdColumn:
    lists = _array(table, field.name).take(pa.array(take))
    return IdColumn(lists.values.to_numpy(), lists.offsets.to_numpy())


def _numbers(schema: Schema, table: pa.Table, take: np.ndarray) -> np.ndarray:
    numbers = np.empty((len(take), len(schema.numbers)), np.float32)
    for place, number in enumerate(schema.numbers):
        numbers[:, place] = _taken(table, number.name, take)
    return numbers


def encode_batch(schema: Schema, table: pa.Table, domain: np.ndarray) -> Batch:
    """An encoded table (`Vocabulary.encode`) with label and row_id as one batch, without padding.

    `domain` is per row the index that the model knows it by.
    """
    rows = len(table)
    columns = gather(schema, [table], np.arange(rows), domain, np.ones(rows, bool))
    return columns.batch(0, rows, rows)
