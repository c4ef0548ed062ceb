"""Raw values to table rows, with Arrow's hash tables: never a Python loop over rows.

Row 0 is for values unseen, rare or missing. A frequency field's known values are rows 1..n, most
frequent first. A vocabulary extended from a base keeps every row of the base and appends, so
`id < base_size` tells a row of the trunk from a row that an added domain brought.
"""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from data_shards.errors import UserError
from data_shards.schema import Field, Schema

Counts = Mapping[str, pa.Table]
"""Per frequency field a table (value string, count int64), values unique."""

_NO_COUNTS = pa.table({"value": pa.array([], pa.string()), "count": pa.array([], pa.int64())})


def _flat(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return array.flatten() if pa.types.is_list(array.type) else array


def count_values(schema: Schema, table: pa.Table, counts: Counts | None = None) -> Counts:
    """`counts` (or none) with the values of one raw table added."""
    frequency = [field.name for field in schema.ids if field.vocabulary == "frequency"]
    before = counts or dict.fromkeys(frequency, _NO_COUNTS)
    return {name: _merge(before[name], _flat(table[name])) for name in frequency}


def _merge(before: pa.Table, values: pa.Array) -> pa.Table:
    new = pc.value_counts(values.drop_null())
    added = pa.table({"value": new.field("values"), "count": new.field("counts")})
    total = pa.concat_tables([before, added]).group_by("value").aggregate([("count", "sum")])
    return total.rename_columns({"count_sum": "count"})


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
        found = pc.index_in(values, value_set=self.values[field.name], skip_nulls=True)
        return pc.add(pc.fill_null(found, -1), pa.scalar(1, pa.int32()))

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
        folder: Path,
        schema: Schema,
        base_sizes: Mapping[str, int],
        base_fingerprint: str | None,
    ) -> "Vocabulary":
        """The inverse of `save`; a file that is missing or cut is a UserError."""
        frequency = [field.name for field in schema.ids if field.vocabulary == "frequency"]
        loaded = cls(schema, {name: _load(folder / f"{name}.arrow") for name in frequency})
        loaded.base_sizes = dict(base_sizes)
        loaded.base_fingerprint = base_fingerprint
        return loaded


def _load(path: Path) -> pa.Array:
    try:
        with pa.OSFile(str(path), "rb") as file:
            return pa.ipc.open_file(file).read_all()["value"].combine_chunks()
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: not a readable vocabulary; write the shards again") from error


def _digest(digest: "hashlib._Hash", values: pa.Array) -> None:
    for start in range(0, len(values), 65536):
        part = values.slice(start, 65536)
        digest.update(pc.binary_length(part).to_numpy().astype("<i4").tobytes())
        digest.update("".join(part.to_pylist()).encode())


def _numbers(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    numbers = pc.fill_null(pc.cast(column, pa.float32()), 0.0)
    bad = pc.index(pc.is_finite(numbers), False).as_py()
    if bad >= 0:
        raise UserError(f"field {name!r}: the number in row {bad} of its table is not finite")
    return numbers


def _hashed(field: Field, values: pa.Array) -> pa.Array:
    """1 + hash % buckets, hashed once per distinct value."""
    seed = zlib.crc32(field.name.encode())
    encoded = values.dictionary_encode()
    distinct = encoded.dictionary.cast(pa.binary()).to_pylist()
    rows = [1 + xxhash.xxh64_intdigest(value, seed) % field.buckets for value in distinct]
    return pc.fill_null(pa.array(rows, pa.int32()).take(encoded.indices), 0)
