"""What a model reads: one batch of rows, cut out of columns that hold many batches.

Shapes: B rows of this rank, F keys, n numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from data_shards.gather import gather
from data_shards.order import ROW_BITS, ROW_MASK
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
class Lists:
    """Lists of many rows: row i holds values[offsets[i]:offsets[i + 1]]."""

    values: np.ndarray
    offsets: np.ndarray

    def rows(self, start: int, stop: int, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(values, lengths) of some rows; those not `real` have none."""
        offsets = self.offsets[start : stop + 1]
        values, lengths = self.values[offsets[0] : offsets[-1]], np.diff(offsets)
        return values[real.repeat(lengths)], lengths * real


@dataclass(frozen=True)
class Columns:
    """The rows of some steps. `ids`, `numbers`, `label` and `row_id` are [columns, share] for each
    step; ids are those with one value, the others are among the `lists`, as are tokens."""

    schema: Schema
    ids: Sequence[np.ndarray]
    numbers: Sequence[np.ndarray]
    label: Sequence[np.ndarray]
    row_id: Sequence[np.ndarray]
    domain: np.ndarray
    """[steps, share], as is `real`, which is False for padding."""
    real: np.ndarray
    lists: Mapping[str, Lists]
    """By field: the rows of all steps, end to end."""
    sidecars: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By column: [steps, share]."""

    def batch(self, step: int, rows: int) -> Batch:
        """The rows of one step as a batch whose global batch has `rows` real rows."""
        real = self.real[step]
        return Batch(
            ids=self._keyed(step),
            numbers=torch.from_numpy(self.numbers[step].T),
            domain=torch.from_numpy(self.domain[step]),
            label=torch.from_numpy(self.label[step][0]),
            weight=torch.from_numpy(real.astype(np.float32)),
            row_id=torch.from_numpy(self.row_id[step][0]),
            rows=rows,
            tokens={f.name: _jagged(*self._list(f, step)) for f in self.schema.tokens},
            columns={k: torch.from_numpy(column[step]) for k, column in self.sidecars.items()},
        )

    def _keyed(self, step: int) -> KeyedJaggedTensor:
        fields, ids, real = self.schema.ids, self.ids[step], self.real[step]
        if len(ids) == len(fields) and real.all():
            values, lengths = torch.from_numpy(ids.reshape(-1)), _ones(ids.size)
        else:
            single = iter(ids)
            parts = [self._list(f, step) if f.multi else (next(single)[real], real) for f in fields]
            values, lengths = zip(*parts, strict=True)
            values, lengths = _joined(values, np.int64), _joined(lengths, np.int32)
        keys = [f.name for f in fields]
        return KeyedJaggedTensor(keys, values, lengths=lengths, stride=len(real))

    def _list(self, field: Field, step: int) -> tuple[np.ndarray, np.ndarray]:
        share = len(self.real[step])
        return self.lists[field.name].rows(step * share, (step + 1) * share, self.real[step])


@lru_cache
def _ones(rows: int) -> Tensor:
    return torch.ones(rows, dtype=torch.int32)


def columns_of(
    schema: Schema,
    tables: Sequence[pa.Table],
    first: np.ndarray,
    place: np.ndarray,
    edges: np.ndarray,
    domain: np.ndarray,
) -> Columns:
    """The rows at `place` [steps, share] (see `order.Window`) of these tables of one chunk.

    Row 0 of a place's table is its row `first[table]`; `domain` is per table.
    """
    real = place >= 0
    arrays = [_arrays(table) for table in tables]

    def laid(names: Sequence[str], kind: type[np.generic], blank: int = 0) -> list[np.ndarray]:
        columns = [[table[name] for table in arrays] for name in names]
        return gather(columns, first, place, edges, kind, blank)

    several = [f.name for f in schema.fields if f.multi or f.kind == "tokens"]
    return Columns(
        schema=schema,
        ids=laid([f.name for f in schema.ids if not f.multi], np.int64),
        numbers=laid([f.name for f in schema.numbers], np.float32),
        label=laid(["label"], np.float32),
        row_id=laid(["row_id"], np.int64, -1),
        domain=np.where(real, domain[np.maximum(place, 0) >> ROW_BITS], 0),
        real=real,
        lists=_lists(tables, several, first, place),
    )


def _arrays(table: pa.Table) -> dict[str, pa.Array]:
    """The columns of a table of one chunk, which it hands out faster all at once."""
    return dict(zip(table.column_names, table.to_batches()[0].columns, strict=True))


def _lists(
    tables: Sequence[pa.Table], names: Sequence[str], first: np.ndarray, place: np.ndarray
) -> dict[str, Lists]:
    """Of padding any row's list."""
    if not names:
        return {}
    ends = np.cumsum([0, *(len(table) for table in tables)])
    where = np.maximum(place.reshape(-1), 0)
    take = pa.array((ends[:-1] + first)[where >> ROW_BITS] + (where & ROW_MASK))
    joined = pa.concat_tables([table.select(names) for table in tables]).combine_chunks()
    taken = {name: joined[name].chunk(0).take(take) for name in names}
    return {
        k: Lists(lists.values.to_numpy(), lists.offsets.to_numpy()) for k, lists in taken.items()
    }


def _joined(parts: Sequence[np.ndarray], kind: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts, dtype=kind))


def _jagged(values: np.ndarray, lengths: np.ndarray) -> JaggedTensor:
    return JaggedTensor(_joined([values], np.int64), lengths=_joined([lengths], np.int32))


def encode_batch(schema: Schema, table: pa.Table, domain: np.ndarray) -> Batch:
    """An encoded table (`Vocabulary.encode`) with label and row_id as one batch, without padding.

    `domain` is per row the index that the model knows it by.
    """
    rows = len(table)
    place, zero = np.arange(rows)[None], np.zeros(1, np.int64)
    columns = columns_of(schema, [table.combine_chunks()], zero, place, np.array([0, rows]), zero)
    return replace(columns, domain=domain[None]).batch(0, rows)
