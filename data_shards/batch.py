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

from data_shards.gather import ends, flat, gather, of_blocks
from data_shards.reader import batch_columns
from data_shards.schema import Field, Schema
from data_shards.stored import Stored


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
    """Lists of many rows: row i holds values[offsets[i]:offsets[i + 1]]; padding none."""

    values: np.ndarray
    offsets: np.ndarray

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(values, lengths) of some rows."""
        offsets = self.offsets[start : stop + 1]
        return self.values[offsets[0] : offsets[-1]], np.diff(offsets)


@dataclass(frozen=True)
class Columns:
    """The rows of some steps."""

    schema: Schema
    ids: Sequence[np.ndarray]
    """[fields, share] of each step: ids with one value; the others are `lists`, as are tokens."""
    numbers: np.ndarray
    """[steps, fields, share]"""
    label: np.ndarray
    """[steps, share], as all that follow; `real` is False for padding."""
    row_id: np.ndarray
    domain: np.ndarray
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
            label=torch.from_numpy(self.label[step]),
            weight=torch.from_numpy(real.astype(np.float32)),
            row_id=torch.from_numpy(self.row_id[step]),
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
        return self.lists[field.name].rows(step * share, (step + 1) * share)


@lru_cache
def _ones(rows: int) -> Tensor:
    return torch.ones(rows, dtype=torch.int32)


def columns_of(
    schema: Schema,
    stored: Sequence[Stored],
    first: np.ndarray,
    place: np.ndarray,
    edges: np.ndarray,
    domain: np.ndarray,
) -> Columns:
    """The rows at `place` [steps, share] (see `order.Window`) of blocks with the `batch_columns`.

    Row 0 of a place's block is its row `first[block]`; `domain` is per block.
    """
    steps, share = place.shape
    names = batch_columns(schema).names
    label, row_id = names.index("label"), names.index("row_id")
    values, offsets = (
        np.array(part).T for part in ([s.values for s in stored], [s.offsets for s in stored])
    )
    singles = label - len(schema.numbers)
    ids = [np.empty((singles, share), np.int64) for _ in range(steps)]
    floats = np.empty((steps, row_id - singles, share), np.float32)
    row_ids = np.empty((steps, 1, share), np.int64)
    window = place, edges
    _lay(values[:singles] + 4 * first, ids, (np.int32, np.int64), window, 0)
    _lay(values[singles:row_id] + 4 * first, floats, (np.float32, np.float32), window, 0)
    _lay(values[row_id : row_id + 1] + 8 * first, row_ids, (np.int64, np.int64), window, -1)
    return Columns(
        schema=schema,
        ids=ids,
        numbers=floats[:, :-1],
        label=floats[:, -1],
        row_id=row_ids[:, 0],
        domain=of_blocks(domain, place),
        real=place >= 0,
        lists={
            name: _lists(values[column], offsets[column] + 4 * first, place.reshape(-1))
            for column, name in enumerate(names)
            if column > row_id
        },
    )


def _lay(
    sources: np.ndarray,
    into: Sequence[np.ndarray] | np.ndarray,
    kinds: tuple[type[np.generic], type[np.generic]],
    window: tuple[np.ndarray, np.ndarray],
    blank: int,
) -> None:
    """The rows of some columns into [columns, share] of each step; see `gather`."""
    steps = np.array([step.ctypes.data for step in into])
    columns = np.arange(len(sources))[:, None] * into[0].strides[0]
    gather(sources, columns + steps, kinds, *window, blank)


def _lists(values: np.ndarray, offsets: np.ndarray, place: np.ndarray) -> Lists:
    last = ends(offsets, place)
    return Lists(flat(values, offsets, place, last), last)


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
    stored = Stored.of(table, batch_columns(schema))
    columns = columns_of(schema, [stored], zero, place, np.array([0, rows]), zero)
    return replace(columns, domain=domain[None]).batch(0, rows)
