"""From a batch's ids to its vectors: the shared tables, and beside them added domains' own rows.

An id below its field's trunk rows is a row of the shared table. An id at or above them is known
to one added domain only: the shared table then gives its reserved row, and the extension
table the domain's own row; both are summed. One range of rows per domain, so a lookup costs
the same for 10 or 1,000 added domains.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from embeddings.placement import OnTheWay, ShardedTables


class Extension:
    """Extension tables and the row range each domain has in them.

    `rows` gives, for each adapter slot, the domain's own rows per field, in the order of the
    trunk's keys.
    """

    def __init__(self, tables: ShardedTables, rows: Sequence[Sequence[int]]) -> None:
        self.tables = tables
        self.size = torch.tensor(rows, dtype=torch.int64).view(-1, len(tables.keys))
        self.start = self.size.cumsum(0) - self.size

    @staticmethod
    def table_rows(keys: Sequence[str], rows: Sequence[Sequence[int]]) -> dict[str, int]:
        """Rows that each field's extension table needs."""
        return {key: sum(domain[i] for domain in rows) for i, key in enumerate(keys)}


class Embedder:
    """Batch ids and adapter slots to vectors [B, fields, width]."""

    def __init__(
        self,
        trunk: ShardedTables,
        trunk_rows: Mapping[str, int],
        extension: Extension | None = None,
    ) -> None:
        self.trunk = trunk
        self.extension = extension
        self._trunk_rows = torch.tensor([trunk_rows[key] for key in trunk.keys])

    def __call__(self, ids: KeyedJaggedTensor, slot: Tensor | None) -> Tensor:
        """Vectors of a batch; see `send`."""
        return self.vectors(self.send(ids, slot))

    def send(self, ids: KeyedJaggedTensor, slot: Tensor | None) -> list[OnTheWay]:
        """Start to move a batch's ids to their tables: the trunk's, then the extension's.

        `slot` [B]: the adapter slot of each row's domain, -1 where it has none; None where no
        shard set in use holds ids of an added domain's own, which saves the look for them.
        Without tables nothing is sent.
        """
        if not self.trunk.keys:
            return []
        if slot is None:
            return [self.trunk.send(ids)]
        values, lengths = ids.values(), ids.lengths()
        keys = torch.arange(len(self.trunk.keys), device=values.device)
        field = keys.repeat_interleave(len(slot)).repeat_interleave(lengths)
        local = values - self._trunk_rows.to(values.device)[field]
        own = local >= 0
        sent = [self.trunk.send(_with(ids, values.masked_fill(own, 0), lengths))]
        if self.extension is None:
            return sent
        slot_of_id = slot.repeat(len(keys)).repeat_interleave(lengths)
        size, start = self.extension.size.to(values.device), self.extension.start.to(values.device)
        # Slot -1 reads the last row of `size` here, and is masked by the first condition.
        own &= (slot_of_id >= 0) & (local < size[slot_of_id, field])
        bag = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths)
        rows = (local + start[slot_of_id, field])[own]
        own_lengths = torch.bincount(bag[own], minlength=len(lengths)).to(lengths.dtype)
        return [*sent, self.extension.tables.send(_with(ids, rows, own_lengths))]

    def vectors(self, sent: Sequence[OnTheWay]) -> Tensor:
        """[B, fields, width] of the ids sent to at least one table."""
        vectors = self.trunk.vectors(sent[0])
        if len(sent) > 1:
            assert self.extension is not None
            vectors = vectors + self.extension.tables.vectors(sent[1])
        return vectors


def _with(ids: KeyedJaggedTensor, values: Tensor, lengths: Tensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(keys=ids.keys(), values=values, lengths=lengths)
