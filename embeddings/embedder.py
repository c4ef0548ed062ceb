"""From a batch's ids to its vectors: the shared tables, and beside them what domains own.

An id below its field's trunk rows is a row of the shared table. An id at or above them is known
to one added domain only: the shared table then gives its reserved row, and the extension
table the domain's own row; both are summed. An adapter may also have tables for itself, with a row
for every id. One range of rows per domain, so a lookup costs the same for 10 or 1,000 domains.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from embeddings.placement import OnTheWay, ShardedTables


class Extension:
    """Tables in which each domain has a range of rows.

    `rows` gives, for each adapter slot, the domain's own rows per field, in the order of the
    tables' keys; `first` per field the id that is row 0 of each range.
    """

    def __init__(
        self, tables: ShardedTables, rows: Sequence[Sequence[int]], first: Sequence[int]
    ) -> None:
        self.tables = tables
        self.size = torch.tensor(rows, dtype=torch.int64).view(-1, len(tables.keys))
        self.start = self.size.cumsum(0) - self.size
        self.first = torch.tensor(first)

    @staticmethod
    def table_rows(keys: Sequence[str], rows: Sequence[Sequence[int]]) -> dict[str, int]:
        """Rows that each field's table needs."""
        return {key: sum(domain[i] for domain in rows) for i, key in enumerate(keys)}

    def send(self, ids: KeyedJaggedTensor, slot: Tensor) -> OnTheWay:
        """Start to move the ids that lie in the ranges of their rows' domains; slot -1 has none."""
        values, lengths = ids.values(), ids.lengths()
        field, device = _field(ids), values.device
        slot_of_id = slot.repeat(len(ids.keys())).repeat_interleave(lengths)
        size, start = self.size.to(device), self.start.to(device)
        local = values - self.first.to(device)[field]
        # Slot -1 reads the last row of `size` here, and is masked by the first condition.
        own = (slot_of_id >= 0) & (local >= 0) & (local < size[slot_of_id, field])
        bag = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        rows = (local + start[slot_of_id, field])[own]
        own_lengths = torch.bincount(bag[own], minlength=len(lengths)).to(lengths.dtype)
        return self.tables.send(_with(ids, rows, own_lengths))


@dataclass(frozen=True)
class SentIds:
    """Ids on their way to the tables that read them."""

    trunk: OnTheWay | None = None
    extension: OnTheWay | None = None
    own: OnTheWay | None = None

    def announced(self) -> None:
        """Let the ids go, now that every rank knows how many it gets."""
        for ids in (self.trunk, self.extension, self.own):
            if ids is not None:
                ids.announced()


class Embedder:
    """Batch ids and adapter slots to vectors [B, fields, width].

    `extension`: rows for ids that only added domains have; `own`: tables that adapters have for
    themselves, with all id fields as keys.
    """

    def __init__(
        self,
        trunk: ShardedTables,
        trunk_rows: Mapping[str, int],
        extension: Extension | None = None,
        own: Extension | None = None,
    ) -> None:
        self.trunk = trunk
        self.extension = extension
        self.own = own
        self._trunk_rows = torch.tensor([trunk_rows[key] for key in trunk.keys])

    def __call__(self, ids: KeyedJaggedTensor, slot: Tensor | None) -> Tensor:
        """Vectors of a batch; see `send`."""
        found = self.vectors(self.send(ids, slot, extended=slot is not None))
        assert found is not None
        return found

    def send(self, ids: KeyedJaggedTensor, slot: Tensor | None, extended: bool) -> SentIds:
        """Start to move a batch's ids to their tables.

        `slot` [B]: the adapter slot of each row's domain, -1 where it has none. Where no shard set
        in use holds ids of an added domain's own, `extended` is False, which saves the look for
        them.
        """
        own = self.own.send(ids, slot) if self.own is not None and slot is not None else None
        if not self.trunk.keys:
            return SentIds(own=own)
        ids = _only(ids, self.trunk.keys)
        if not extended:
            return SentIds(self.trunk.send(ids), own=own)
        values = ids.values()
        added = values >= self._trunk_rows.to(values.device)[_field(ids)]
        known = self.trunk.send(_with(ids, values.masked_fill(added, 0), ids.lengths()))
        if self.extension is None or slot is None:
            return SentIds(known, own=own)
        return SentIds(known, self.extension.send(ids, slot), own)

    def vectors(self, sent: SentIds) -> Tensor | None:
        """[B, fields, width] of the trunk's tables and their extensions; None without tables."""
        if sent.trunk is None:
            return None
        vectors = self.trunk.vectors(sent.trunk)
        if sent.extension is not None:
            assert self.extension is not None
            vectors = vectors + self.extension.tables.vectors(sent.extension)
        return vectors

    def own_vectors(self, sent: SentIds) -> Tensor | None:
        """[B, fields, width] of the tables that adapters have for themselves."""
        if sent.own is None:
            return None
        assert self.own is not None
        return self.own.tables.vectors(sent.own)

    def forget(self, sent: SentIds) -> None:
        """These vectors were looked up to train, and then no backward came."""
        parts = ((sent.trunk, self.trunk), (sent.extension, self.extension), (sent.own, self.own))
        for ids, part in parts:
            tables = part.tables if isinstance(part, Extension) else part
            if ids is not None and tables is not None and not tables.frozen:
                tables.uncount()


def _field(ids: KeyedJaggedTensor) -> Tensor:
    """The place of each id's field among the keys."""
    keys = torch.arange(len(ids.keys()), device=ids.values().device)
    return keys.repeat_interleave(ids.stride()).repeat_interleave(ids.lengths())


def _only(ids: KeyedJaggedTensor, keys: Sequence[str]) -> KeyedJaggedTensor:
    """The ids of these fields."""
    if ids.keys() == list(keys):
        return ids
    return ids.permute([ids.keys().index(key) for key in keys])


def _with(ids: KeyedJaggedTensor, values: Tensor, lengths: Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(keys=ids.keys(), values=values, lengths=lengths)
