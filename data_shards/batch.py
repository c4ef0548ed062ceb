"""What a model reads: one batch of rows, cut out of columns that hold many batches.

Shapes: B rows of this rank, F keys, n numbers.
"""

from dataclasses import dataclass
from functools import reduce

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

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
        )


@dataclass(frozen=True)
class IdColumn:
    """Ids of many rows: row i holds values[offsets[i]:offsets[i + 1]], or one value each (None)."""

    values: np.ndarray
    offsets: np.ndarray | None = None

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(values, lengths) of some rows."""
        if self.offsets is None:
            return self.values[start:stop], np.ones(stop - start, np.int32)
        offsets = self.offsets[start : stop + 1]
        return self.values[offsets[0] : offsets[-1]], np.diff(offsets)


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

    def batch(self, start: int, stop: int, rows: int) -> Batch:
        """The rows [start, stop) as a batch whose global batch has `rows` real rows."""
        real = self.real[start:stop]
        parts = [column.rows(start, stop) for column in self.ids]
        if not real.all():
            parts = [_without_padding(values, lengths, real) for values, lengths in parts]
        return Batch(
            ids=KeyedJaggedTensor(
                keys=list(self.keys),
                values=torch.from_numpy(np.concatenate([v for v, _ in parts], dtype=np.int64)),
                lengths=torch.from_numpy(np.concatenate([n for _, n in parts], dtype=np.int32)),
                stride=stop - start,
            ),
            numbers=torch.from_numpy(self.numbers[start:stop]),
            domain=torch.from_numpy(self.domain[start:stop]),
            label=torch.from_numpy(self.label[start:stop]),
            weight=torch.from_numpy(real.astype(np.float32)),
            row_id=torch.from_numpy(self.row_id[start:stop]),
            rows=rows,
        )


def _without_padding(
    values: np.ndarray, lengths: np.ndarray, real: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    return values[np.repeat(real, lengths)], lengths * real


def gather(
    schema: Schema,
    tables: list[pa.Table],
    take: np.ndarray,
    domain: np.ndarray,
    real: np.ndarray,
) -> Columns:
    """The rows `take` of the tables laid end to end; `domain` and `real` are per taken row."""
    return Columns(
        keys=tuple(field.name for field in schema.ids),
        ids=tuple(_id_column(field, tables, take) for field in schema.ids),
        numbers=_numbers(schema, tables, take),
        domain=np.where(real, domain, 0),
        label=np.where(real, _column(tables, "label", take), np.float32(0)),
        row_id=np.where(real, _column(tables, "row_id", take), -1),
        real=real,
    )


def _column(tables: list[pa.Table], name: str, take: np.ndarray) -> np.ndarray:
    return np.concatenate([table[name].to_numpy() for table in tables])[take]


def _id_column(field: Field, tables: list[pa.Table], take: np.ndarray) -> IdColumn:
    if not field.multi:
        return IdColumn(_column(tables, field.name, take))
    chunks = reduce(list.__add__, [table[field.name].chunks for table in tables], [])
    lists = pa.concat_arrays(chunks).take(pa.array(take))
    return IdColumn(lists.values.to_numpy(), lists.offsets.to_numpy())


def _numbers(schema: Schema, tables: list[pa.Table], take: np.ndarray) -> np.ndarray:
    if not schema.numbers:
        return np.empty((len(take), 0), np.float32)
    columns = [_column(tables, field.name, take) for field in schema.numbers]
    return np.stack(columns, axis=1)


def encode_batch(schema: Schema, table: pa.Table, domain: np.ndarray) -> Batch:
    """An encoded table (`Vocabulary.encode`) with label and row_id as one batch, without padding.

    `domain` is per row the index that the model knows it by.
    """
    rows = len(table)
    columns = gather(schema, [table], np.arange(rows), domain, np.ones(rows, bool))
    return columns.batch(0, rows, rows)
