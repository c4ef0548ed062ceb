"""What takes all rows of a user: the history before each row, and negatives.

The log's rows are sorted out by user into scratch files (`user_scratch`), and a piece is a range
of users. Its rows stand by user, time and row id, its negatives behind them. A negative has the
time, the user's side and the history of the positive that it belongs to, and the row id
`1 << 62 | piece << 40 | number in the piece`, above every id of the log.
"""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_shards.errors import UserError, unknown
from data_shards.schema import Field
from data_shards.sources.negatives import NegativesConfig, Pools, draw
from data_shards.sources.user_scratch import Rows, Scratch

CHUNK_ROWS = 1 << 16
FIRST_NEGATIVE = 1 << 62
LAST_ID = FIRST_NEGATIVE - 1
"""The highest row id that a log may have."""


@dataclass(frozen=True)
class HistoryConfig:
    """`history`: the user's earlier positives, as a multi-valued field."""

    field: str = "history"
    of: str = "item"
    """A field of the log, or one that a join brings by a key of the log."""
    last: int = 5
    across_domains: bool = True

    def __post_init__(self) -> None:
        if self.last < 1:
            raise UserError(f"history: last is 1 or more, not {self.last}")


@dataclass(frozen=True)
class PerUserConfig:
    """`[data.source.per_user]`."""

    user: str = "user"
    history: HistoryConfig | None = None
    negatives: NegativesConfig | None = None

    def __post_init__(self) -> None:
        if not (self.history or self.negatives):
            raise UserError("per_user: give history or negatives, or leave per_user out")

    @property
    def made(self) -> tuple[str, ...]:
        """Fields that this stage makes."""
        return (self.history.field,) if self.history else ()

    @property
    def item(self) -> str:
        """The field whose values are drawn; empty without negatives."""
        return self.negatives.item if self.negatives else ""

    @property
    def keys(self) -> tuple[str, ...]:
        """Fields of the log that this stage needs."""
        of = self.history.of if self.history else ""
        return tuple(dict.fromkeys(name for name in (self.user, of, self.item) if name))

    def keyed(self, joined_on: Mapping[str, str]) -> "PerUserConfig":
        """The history of keys, where what it is of comes with a join."""
        if self.history is None:
            return self
        of = joined_on.get(self.history.of, self.history.of)
        return replace(self, history=replace(self.history, of=of))

    def check(self, fields: tuple[Field, ...], joined_on: Mapping[str, str]) -> None:
        """UserError unless all fields can be made; `joined_on`: field to its join's key."""
        multi = {field.name for field in fields if field.multi}
        if self.history and self.history.field not in multi:
            raise unknown("multi-valued field for history", self.history.field, multi)
        if self.history and self.history.of in multi:
            raise UserError(f"history: {self.history.of!r} is multi-valued; name a single value")
        for field in fields:
            own = field.name in (self.item, *self.made, "domain")
            joined = joined_on.get(field.name) == self.item
            if self.item and field.side == "item" and not (own or joined):
                raise UserError(
                    f"per_user: a negative has no {field.name!r}, which is of the item and comes "
                    f"with the log; give it in a join on {self.item!r}"
                )


class PerUser:
    """Rows with the per-user fields and negatives, over the rows of a log."""

    def __init__(self, config: PerUserConfig, rows: Rows) -> None:
        self.config = config
        self.rows = rows

    @cached_property
    def _scratch(self) -> Scratch:
        return Scratch(self.rows, self.config.user, self.config.item)

    @cached_property
    def _pools(self) -> Pools:
        assert self.config.negatives
        return Pools(self._scratch.items(), self.config.negatives.seed)

    def pieces(self) -> tuple[str, ...]:
        """Ranges of users; the first call sorts the whole log out by user."""
        return tuple(f"users {number}" for number in range(len(self._scratch.pieces)))

    def read(self, piece: int, dropped: Counter[str]) -> Iterator[pa.Table]:
        """The piece's rows; with its first piece, what the log itself dropped."""
        if piece == 0:
            dropped.update(self._scratch.dropped)
        rows = self._in_order(self._scratch.read(piece))
        tables = [rows]
        if self.config.negatives:
            tables.append(self._negatives(self.config.negatives, piece, rows, dropped))
        for table in tables:
            for start in range(0, len(table), CHUNK_ROWS):
                yield table.slice(start, CHUNK_ROWS)

    def _in_order(self, rows: pa.Table) -> pa.Table:
        history = self.config.history
        group = _codes(rows[self.config.user])
        if history and not history.across_domains:
            domains = _codes(rows["domain"])
            group = group * (domains.max() + 1) + domains
        time, row_id = rows["time"].to_numpy(), rows["row_id"].to_numpy()
        order = np.lexsort((row_id, time, group))
        rows = rows.take(pa.array(order)).combine_chunks()
        if not history:
            return rows
        column = history_of(history, group[order], time[order], rows)
        return rows.append_column(history.field, column)

    def _negatives(
        self, config: NegativesConfig, piece: int, rows: pa.Table, dropped: Counter[str]
    ) -> pa.Table:
        owners, items = draw(config, self._pools, rows, self.config.user, dropped)
        negatives = rows.take(pa.array(owners))
        ids = np.arange(len(owners)) | (piece << 40) | FIRST_NEGATIVE
        labels = np.zeros(len(owners), np.float32)
        new = {"row_id": pa.array(ids), "label": pa.array(labels), config.item: items}
        for name, column in new.items():
            negatives = negatives.set_column(negatives.column_names.index(name), name, column)
        return negatives


def history_of(
    config: HistoryConfig, group: np.ndarray, time: np.ndarray, rows: pa.Table
) -> pa.Array:
    """[n] lists of the group's positives before each row's time, the last ones, most recent last.

    Rows stand by group, time and row id. Rows of one moment are not in each other's history.
    """
    positive = rows["label"].to_numpy() > 0.5
    before = np.cumsum(positive) - positive
    ends = before[_first_of(group, time)]
    starts = np.maximum(before[_first_of(group)], ends - config.last)
    offsets = np.concatenate([[0], np.cumsum(ends - starts)])
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], ends - starts)
    items = rows[config.of].combine_chunks().filter(pa.array(positive))
    values = items.take(pa.array(np.repeat(starts, ends - starts) + within))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def _first_of(*keys: np.ndarray) -> np.ndarray:
    """[n] the first row of each row's run of equal keys."""
    new = np.zeros(len(keys[0]), bool)
    for key in keys:
        new[1:] |= key[1:] != key[:-1]
    return np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """[n] each value's rank among the distinct ones: the same whatever the order of the rows."""
    encoded = column.combine_chunks().dictionary_encode()
    rank = np.empty(len(encoded.dictionary), np.int64)
    rank[pc.array_sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(rank))
    return rank[encoded.indices.to_numpy()]
