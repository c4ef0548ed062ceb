"""User and item tables that fit in memory, joined to the rows of a log."""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_shards.errors import UserError
from data_shards.hashing import StringTable
from data_shards.schema import Field
from data_shards.sources.table_columns import Checked, as_text, reader_of
from data_shards.sources.table_files import Files


@dataclass(frozen=True)
class JoinConfig:
    """`[[data.source.join]]`: fields that another table has, one row per key."""

    path: str
    on: str
    """The log's key: a field, or a column where no field is mapped to it."""
    columns: dict[str, str]
    """Field to column, of what this table gives."""
    key: str = ""
    """The key's column in this table; empty: named as in the log."""
    format: Literal["", "parquet", "csv", "jsonl"] = ""
    missing: Literal["error", "null", "drop"] = "error"
    """What becomes of a row whose key this table lacks; drops are counted as no_<on>."""


class Join:
    """One table, read when it is first asked. Keys that are local to a domain are in the file
    named for that domain."""

    def __init__(
        self, config: JoinConfig, key: str, fields: tuple[Field, ...], separators: Mapping[str, str]
    ) -> None:
        self.config = config
        self.key = config.key or key
        self.fields = tuple(field for field in fields if field.name in config.columns)
        self.separators = separators
        self.local = False
        self.lists: dict[str, str] = {}
        """Fields that come as lists of keys -> the field whose values they are to hold."""

    def add(
        self, rows: pa.Table, row_name: Callable[[int], str], dropped: Counter[str]
    ) -> pa.Table:
        """The rows with this table's fields."""
        index, columns = self._table
        keys = rows[self.config.on].combine_chunks()
        found = index.find(keys)
        lost = found < 0
        if lost.any() and self.config.missing == "error":
            row = int(np.argmax(lost))
            raise UserError(
                f"{row_name(rows['row_id'][row].as_py())}: {self.config.path} has no "
                f"{self.key} {keys[row].as_py()!r}; add it, or set missing = 'null' or 'drop'"
            )
        if lost.any() and self.config.missing == "drop":
            dropped[f"no_{self.config.on}"] += int(lost.sum())
            rows, found, lost = rows.filter(pa.array(~lost)), found[~lost], lost[~lost]
        places = pa.array(found, mask=lost)
        for field in self.fields:
            rows = rows.append_column(field.name, columns[field.name].take(places))
        for name, of in self.lists.items():
            lists = _looked_up(rows[name].combine_chunks(), index, columns[of])
            rows = rows.set_column(rows.column_names.index(name), name, lists)
        return rows

    @cached_property
    def _table(self) -> tuple[StringTable, pa.Table]:
        files = Files(self.config.path, self.config.format or None)
        parts: list[pa.Table] = []
        for piece in files.pieces:
            for chunk in files.read(piece, self._columns, _refuse(files, piece.file)):
                checked = Checked(files, piece.file, chunk, drop=False)
                parts.append(self._read(checked, files.stem(piece.file)))
        table = pa.concat_tables(parts)
        keys = table["key"].combine_chunks()
        index = StringTable(keys)
        twice = index.repeated()
        if twice is not None:
            raise UserError(
                f"{files.row_name(table['file'][twice].as_py(), table['row'][twice].as_py())}: the "
                f"key {keys[twice].as_py()!r} stands twice in this table; keep one row per key"
            )
        return index, table

    @property
    def _columns(self) -> list[str]:
        return [self.key, *(self.config.columns[field.name] for field in self.fields)]

    def _read(self, checked: Checked, stem: str) -> pa.Table:
        keys = checked.column(self.key, as_text, "a key", null=False)
        if self.local:
            keys = pc.binary_join_element_wise(stem, keys, ":")
        file = np.full(len(keys), checked.file)
        columns = {"file": pa.array(file), "row": pa.array(checked.rows), "key": keys}
        for field in self.fields:
            read, expected = reader_of(field, self.separators.get(field.name, ""))
            columns[field.name] = checked.column(self.config.columns[field.name], read, expected)
        return pa.table(columns)


def local_values(domain: pa.Array, values: pa.Array) -> pa.Array:
    """Values that mean something else in each domain, told apart by the domain's name."""
    odd = domain.filter(pc.match_substring(domain, ":"))
    if len(odd):
        raise UserError(
            f"the domain {odd[0].as_py()!r} has a ':', which divides a domain's name from its "
            "local values; rename the domain, or leave `local` out"
        )
    return pc.binary_join_element_wise(domain, values, ":")


def _looked_up(lists: pa.ListArray, index: StringTable, column: pa.ChunkedArray) -> pa.ListArray:
    """The lists with each key's value, null where there is none."""
    places = index.find(lists.flatten())
    ends = np.cumsum(pc.list_value_length(lists).to_numpy())
    offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
    values = column.take(pa.array(places, mask=places < 0))
    return pa.ListArray.from_arrays(offsets, values.combine_chunks())


def _refuse(files: Files, file: int) -> Callable[[int, str], None]:
    def refuse(row: int, wrong: str) -> None:
        raise UserError(f"{files.row_name(file, row)} {wrong}; mend it")

    return refuse
