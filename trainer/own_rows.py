"""What domains look up beside the trunk's tables, while they train and in an adapter's file.

An adapter's tensors are the method's, and beside them, by field, `own_rows/F`: a row for each id
that only its domain has, in the order of `Adapter.vocabulary`; and `own_table/F/rows` and
`own_table/F/values`: what is not zero of a table that the adapter has for itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_shards import Vocabulary
from embeddings import Embedder, Extension, ShardedTables, extension_tables, table_width
from trainer.adapter_store import Adapter
from trainer.trunk import Trunk

OWN_ROWS, OWN_TABLE = "own_rows/", "own_table/"
Words = Mapping[str, Sequence[str]]
"""Per field, the ids that only one domain has, in the order of their rows."""


@dataclass(frozen=True)
class Own:
    """Rows of the domains in slot order: for ids that only one has, and in tables of their own."""

    extension: Extension | None = None
    tables: Extension | None = None

    def parts(self) -> list[ShardedTables]:
        return [part.tables for part in (self.extension, self.tables) if part is not None]

    def tensors(self, words: Words) -> dict[str, Tensor]:
        """Those of the one domain that there is, for its adapter. Collective."""
        rows = self.extension.tables.whole() if self.extension else {}
        found = {OWN_ROWS + key: part for key, part in rows.items() if words.get(key)}
        for key, (place, values) in (self.tables.tables.filled() if self.tables else {}).items():
            found |= {f"{OWN_TABLE}{key}/rows": place, f"{OWN_TABLE}{key}/values": values}
        return found


def new_own(trunk: Trunk, own_width: int, words: Sequence[Words]) -> Own:
    """Rows of zeros for domains with these ids; `own_width` as in `Method`."""
    ids = list(trunk.rows)
    added = [[len(own.get(key, ())) for key in ids] for own in words]
    first = [trunk.rows[key] for key in ids]
    every = [[a + b for a, b in zip(first, own, strict=True)] for own in added]
    read = [ids.index(key) for key in trunk.tables.keys]
    extended = [[own[place] for place in read] for own in added]
    extension = tables = None
    if any(map(any, extended)):
        width, starts = trunk.tables.width, [first[place] for place in read]
        extension = _zeros(trunk, trunk.tables.keys, width, extended, starts)
    if own_width and words:
        width = table_width(own_width, first_order=False)
        tables = _zeros(trunk, ids, width, every, [0] * len(ids))
    return Own(extension, tables)


def own_of(trunk: Trunk, own_width: int, adapters: Sequence[Adapter]) -> Own:
    """The rows of these adapters, which stand still."""
    own = new_own(trunk, own_width, [adapter.vocabulary for adapter in adapters])
    if own.extension is not None:
        extension = own.extension
        keys = extension.tables.keys
        extension.tables.load({key: _joined_rows(adapters, key, extension) for key in keys})
    if own.tables is not None:
        tables, keys = own.tables, own.tables.tables.keys
        start = {key: tables.start[:, field].tolist() for field, key in enumerate(keys)}
        tables.tables.fill({key: _joined_table(adapters, key, start[key]) for key in keys})
    for part in own.parts():
        part.freeze()
    return own


def embedder_of(trunk: Trunk, own: Own) -> Embedder:
    """The lookups of the trunk and of these rows."""
    return Embedder(trunk.tables, trunk.rows, own.extension, own.tables)


def of_method(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors that are the method's."""
    own = (OWN_ROWS, OWN_TABLE)
    return {key: tensor for key, tensor in adapter.tensors.items() if not key.startswith(own)}


def renumbered(adapter: Adapter, vocabulary: Vocabulary) -> Adapter:
    """The adapter with its own rows where these shards' vocabulary puts their ids.

    Each write of an added domain's shards numbers its own ids anew. Ids that the adapter has never
    seen get rows of zeros.
    """
    wanted = {key: vocabulary.added(key).to_pylist() for key in adapter.vocabulary}
    wanted = {key: tuple(values) for key, values in wanted.items() if values}
    tensors = dict(adapter.tensors)
    for key, before in adapter.vocabulary.items():
        here = {value: row for row, value in enumerate(wanted.get(key, ()))}
        place = torch.tensor([here.get(value, -1) for value in before], dtype=torch.int64)
        if OWN_ROWS + key in tensors:
            rows = tensors.pop(OWN_ROWS + key)
            if here:
                tensors[OWN_ROWS + key] = _moved(rows, place, len(here))
        if f"{OWN_TABLE}{key}/rows" in tensors:
            _move_table(tensors, key, place, vocabulary.base_size(key))
    return replace(adapter, tensors=tensors, vocabulary=wanted)


def _moved(rows: Tensor, place: Tensor, count: int) -> Tensor:
    moved = rows.new_zeros(count, rows.shape[1])
    moved[place[place >= 0]] = rows[place >= 0]
    return moved


def _move_table(tensors: dict[str, Tensor], key: str, place: Tensor, base: int) -> None:
    """Rows of the trunk's ids stay where they are, those of the domain's own ids follow `place`."""
    rows, values = (tensors[f"{OWN_TABLE}{key}/{part}"] for part in ("rows", "values"))
    added = rows >= base
    moved = rows.clone()
    moved[added] = place[rows[added] - base]
    kept = moved >= 0
    moved[added] += base
    tensors[f"{OWN_TABLE}{key}/rows"] = moved[kept]
    tensors[f"{OWN_TABLE}{key}/values"] = values[kept]


def _zeros(
    trunk: Trunk,
    keys: Sequence[str],
    width: int,
    rows: Sequence[Sequence[int]],
    first: Sequence[int],
) -> Extension:
    config, device = trunk.config.tables, trunk.ranks.device
    tables = extension_tables(Extension.table_rows(keys, rows), config, width)
    return Extension(ShardedTables(tables, config, device, trunk.config.seed), rows, first)


def _joined_rows(adapters: Sequence[Adapter], key: str, extension: Extension) -> Tensor:
    found = [a.tensors[OWN_ROWS + key] for a in adapters if OWN_ROWS + key in a.tensors]
    return torch.cat(found) if found else torch.zeros(1, extension.tables.width)


def _joined_table(
    adapters: Sequence[Adapter], key: str, start: Sequence[int]
) -> tuple[Tensor, Tensor]:
    own = [adapter.tensors for adapter in adapters]
    rows = [one[f"{OWN_TABLE}{key}/rows"] + at for one, at in zip(own, start, strict=True)]
    return torch.cat(rows), torch.cat([one[f"{OWN_TABLE}{key}/values"] for one in own])
