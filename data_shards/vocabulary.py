"""Raw values to table rows, whole columns at a time: never a Python loop over rows.

Row 0 is for values unseen, rare or missing. A frequency field's known values are rows 1..n, most
frequent first. A vocabulary extended from a base keeps every row of the base and appends, so
`id < base_size` tells a row of the trunk from a row that an added domain brought.
"""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import hashlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_shards.errors import UserError
from data_shards.hashing import StringTable, xxh64
from data_shards.schema import Field, Schema
from data_shards.storage import LocalStorage, Storage, open_storage

Counts = Mapping[str, pa.Table]
"""Per frequency field a table (value string, count int64), values unique."""

_NO_COUNTS = pa.table({"value": pa.array([], pa.string()), "count": pa.array([], pa.int64())})


def _flat(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return array.flatten() if pa.types.is_list(array.type) else array


class ValueCounter:
    """How often each value of each frequency field occurs in the tables added."""

    def __init__(self, schema: Schema) -> None:
        names = [field.name for field in schema.ids if field.vocabulary == "frequency"]
        self._merged: dict[str, pa.Table] = dict.fromkeys(names, _NO_COUNTS)
        self._new: dict[str, list[pa.Table]] = {name: [] for name in names}
        self._waiting = dict.fromkeys(names, 0)

    @property
    def names(self) -> tuple[str, ...]:
        """The fields that are counted."""
        return tuple(self._new)

    def add(self, table: pa.Table) -> None:
        """The values of one raw table."""
        for name in self._new:
            new = pc.value_counts(_flat(table[name]).drop_null())
            counts = {"value": new.field("values"), "count": new.field("counts")}
            self.add_counts(name, pa.table(counts))

    def add_counts(self, name: str, counts: pa.Table) -> None:
        """What was counted elsewhere."""
        self._new[name].append(counts)
        self._waiting[name] += len(counts)
        # as many new as old: so each value is merged a few times, however many tables come
        if self._waiting[name] > max(len(self._merged[name]), 1 << 16):
            self._merge(name)

    def counts(self) -> Counts:
        """All counts so far."""
        for name in self._new:
            self._merge(name)
        return self._merged

    def _merge(self, name: str) -> None:
        if self._new[name]:
            both = pa.concat_tables([self._merged[name], *self._new[name]])
            total = both.group_by("value").aggregate([("count", "sum")])
            self._merged[name] = total.rename_columns({"count_sum": "count"})
            self._new[name], self._waiting[name] = [], 0


def count_values(schema: Schema, *tables: pa.Table) -> Counts:
    """The values of raw tables."""
    counter = ValueCounter(schema)
    for table in tables:
        counter.add(table)
    return counter.counts()


def save_counts(counts: Counts, folder: Path) -> None:
    """One Arrow IPC file per field, in place of what a killed writer left."""
    folder.mkdir(exist_ok=True)
    for name, table in counts.items():
        with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as sink:
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)


def load_counts(schema: Schema, folders: Iterable[Path]) -> Counts:
    """The sum of saved counts."""
    counter = ValueCounter(schema)
    for folder in folders:
        for name in counter.names:
            with pa.OSFile(str(folder / f"{name}.arrow"), "rb") as file:
                counter.add_counts(name, pa.ipc.open_file(file).read_all())
    return counter.counts()


def _ranked(counts: pa.Table, min_count: int) -> pa.Array:
    kept = counts.filter(pc.field("count") >= min_count)
    ranked = kept.sort_by([("count", "descending"), ("value", "ascending")])
    return ranked["value"].combine_chunks()


class Vocabulary:
    """The known values of each frequency field, in row order from row 1."""

    def __init__(
        self, schema: Schema, values: Mapping[str, pa.Array], base: "Vocabulary | None" = None
    ) -> None:
        self.schema = schema
        self.values = dict(values)
        self._tables: dict[str, StringTable] = {}
        self.base_sizes = base.sizes if base else self.sizes
        self.base_fingerprint = base.fingerprint if base else None

    @classmethod
    def build(cls, schema: Schema, counts: Counts) -> "Vocabulary":
        """Values by descending frequency, ties by value; rarer than `min_count` are left out."""
        by_name = {field.name: field for field in schema.ids}
        ranked = {name: _ranked(count, by_name[name].min_count) for name, count in counts.items()}
        return cls(schema, ranked)

    def extend(self, counts: Counts) -> "Vocabulary":
        """A vocabulary on top of this one: its rows stay, new values follow by frequency."""
        fresh = Vocabulary.build(self.schema, counts).values
        values = {
            name: pa.concat_arrays(
                [known, fresh[name].filter(pc.invert(pc.is_in(fresh[name], value_set=known)))]
            )
            for name, known in self.values.items()
        }
        return Vocabulary(self.schema, values, base=self)

    def with_added(self, added: Mapping[str, Sequence[str]]) -> "Vocabulary":
        """This vocabulary as base, with these values of each field after its own."""
        values = {
            name: pa.concat_arrays([known, pa.array(list(added.get(name, ())), pa.string())])
            for name, known in self.values.items()
        }
        return Vocabulary(self.schema, values, base=self)

    @property
    def sizes(self) -> dict[str, int]:
        """Table rows of every id field."""
        return {field.name: self.size(field.name) for field in self.schema.ids}

    def size(self, name: str) -> int:
        """Table rows of a field, the reserved row 0 included."""
        return 1 + (len(self.values[name]) if name in self.values else self._field(name).buckets)

    def base_size(self, name: str) -> int:
        """Table rows of a field in the base; all of them when nothing was extended."""
        return self.base_sizes[name]

    def added(self, name: str) -> pa.Array:
        """Values that the extension brought, in row order from `base_size`."""
        if name not in self.values:
            return pa.array([], pa.string())
        return self.values[name].slice(self.base_size(name) - 1)

    def _field(self, name: str) -> Field:
        return next(field for field in self.schema.ids if field.name == name)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the schema and of every field's values in order."""
        digest = hashlib.sha256(self.schema.fingerprint().encode())
        for name in sorted(self.values):
            digest.update(f"\n{name} {self.base_sizes[name]}\n".encode())
            _digest(digest, self.values[name])
        return digest.hexdigest()

    def encode(self, table: pa.Table) -> pa.Table:
        """A raw table with ids as int32 (lists of them when multi) and numbers as float32.

        Other columns pass unchanged; a field that the table lacks, or a number that is not
        finite, is a UserError.
        """
        for field in self.schema.fields:
            if field.name not in table.column_names:
                raise UserError(
                    f"the rows have no column for the field {field.name!r}; they have: "
                    f"{', '.join(table.column_names)}"
                )
            place = table.column_names.index(field.name)
            column = self._column(field, table[field.name])
            table = table.set_column(place, field.name, column)
        return table

    def _column(self, field: Field, column: pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
        if field.kind == "number":
            return _numbers(field.name, column)
        if field.kind == "tokens":
            return _tokens(field.name, column)
        if not field.is_id:
            return column
        if not field.multi:
            return self._ids(field, column.combine_chunks())
        # a null list is an empty one: row 0 would count as a value
        lists = pc.fill_null(column.combine_chunks(), pa.scalar([], column.type))
        lengths = pc.list_value_length(lists).to_numpy()
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), self._ids(field, lists.flatten()))

    def _ids(self, field: Field, values: pa.Array) -> pa.Array:
        if field.vocabulary == "hash":
            return _hashed(field, values)
        if field.name not in self._tables:
            self._tables[field.name] = StringTable(self.values[field.name])
        return pa.array(self._tables[field.name].find(values) + np.int32(1))

    def save(self, folder: Path) -> None:
        """One Arrow IPC file `<field>.arrow` per frequency field."""
        folder.mkdir()
        for name, values in self.values.items():
            table = pa.table({"value": values})
            with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as sink:
                with pa.ipc.new_file(sink, table.schema) as writer:
                    writer.write_table(table)

    @classmethod
    def load(
        cls,
        folder: Path | str,
        schema: Schema,
        base_sizes: Mapping[str, int] | None,
        base_fingerprint: str | None,
    ) -> "Vocabulary":
        """The inverse of `save`; a file that is missing or cut is a UserError.

        `base_sizes` and `base_fingerprint` are None where nothing was extended.
        """
        frequency = [field.name for field in schema.ids if field.vocabulary == "frequency"]
        loaded = cls(
            schema, {name: _load(open_storage(folder), f"{name}.arrow") for name in frequency}
        )
        if base_sizes is not None:
            loaded.base_sizes = dict(base_sizes)
        loaded.base_fingerprint = base_fingerprint
        return loaded


def _load(storage: Storage, name: str) -> pa.Array:
    try:
        if isinstance(storage, LocalStorage):
            file = pa.memory_map(str(storage.folder / name))
        else:
            file = pa.BufferReader(storage.read(name))
        with file:
            return pa.ipc.open_file(file).read_all()["value"].combine_chunks()
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"{storage}/{name}: not a readable vocabulary; write the shards again"
        ) from error


def _digest(digest: "hashlib._Hash", values: pa.Array) -> None:
    for start in range(0, len(values), 65536):
        part = values.slice(start, 65536)
        digest.update(pc.binary_length(part).to_numpy().astype("<i4").tobytes())
        digest.update("".join(part.to_pylist()).encode())


def _tokens(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    if column.null_count or pc.list_flatten(column).null_count:
        raise UserError(f"field {name!r}: a list of tokens is missing or holds a null")
    return column.cast(pa.list_(pa.int32()))


def _numbers(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    numbers = pc.fill_null(pc.cast(column, pa.float32()), 0.0)
    bad = pc.index(pc.is_finite(numbers), False).as_py()
    if bad >= 0:
        raise UserError(f"field {name!r}: the number in row {bad} of its table is not finite")
    return numbers


def _hashed(field: Field, values: pa.Array) -> pa.Array:
    """1 + hash % buckets; 0 for null."""
    hashes = xxh64(values, zlib.crc32(field.name.encode())) % np.uint64(field.buckets)
    rows = (hashes + np.uint64(1)).astype(np.int32)
    if values.null_count:
        rows[~values.is_valid().to_numpy(zero_copy_only=False)] = 0
    return pa.array(rows)
