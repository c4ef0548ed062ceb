"""A user's own logs: Parquet, CSV or JSON lines, joined with user and item tables.

Rows stream: a piece is a file, or a range of a Parquet file's row groups, and at most some chunks
of 65,536 rows are held. Nothing is left out in silence: a row that cannot be read ends the run
with its file and row, or (bad_rows = "drop") is counted. In a CSV an empty cell is null.

The row's id is `file << 40 | row in the file` (both from 0; a blank or malformed line counts), so
the row number alone for one file.
"""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_shards.errors import UserError, unknown
from data_shards.schema import Field
from data_shards.sources.per_user import LAST_ID, PerUser, PerUserConfig
from data_shards.sources.table_columns import (
    Checked,
    as_integer,
    as_label,
    as_seconds,
    as_text,
    count,
    mask,
    reader_of,
)
from data_shards.sources.table_files import Chunk, Files
from data_shards.sources.table_join import Join, JoinConfig, local_values

ROW_BITS = 40


@dataclass(frozen=True)
class TableConfig:
    """`[data.source]` with kind = "table"."""

    path: str
    """A file, a folder, a glob, or an fsspec URL of one."""
    kind: Literal["table"] = "table"
    format: Literal["", "parquet", "csv", "jsonl"] = ""
    """Empty: by the suffix."""
    label: str = ""
    """Column of 0 and 1, or of ratings where `positive_above` is given."""
    positive_above: float | None = None
    drop_labels: tuple[float, ...] = ()
    """Labels whose rows are left out, counted as dropped_label: (3,) of five stars."""
    all_positive: bool = False
    """Every row is a positive; there is no label column."""
    domain: str = ""
    domain_from_file: bool = False
    """The domain is the file's name up to its first dot."""
    local: tuple[str, ...] = ()
    """Fields whose values mean something within a domain only: written "<domain>:<value>"."""
    time: str = ""
    row_id: str = ""
    """A column of unique integers from 0."""
    columns: dict[str, str] = field(default_factory=dict)
    """Field to column, where the names differ."""
    separators: dict[str, str] = field(default_factory=dict)
    """Multi-valued field to what stands between its values, where they are text (other than a list
    written out: ['a', 'b'])."""
    delimiter: str = ","
    quoted: bool = True
    """Whether " quotes a CSV value; false where it is a plain character."""
    bad_rows: Literal["error", "drop"] = "error"
    join: tuple[JoinConfig, ...] = ()
    per_user: PerUserConfig | None = None

    def __post_init__(self) -> None:
        if bool(self.label) == self.all_positive:
            raise UserError("table: give label = 'column', or all_positive = true without one")
        if bool(self.domain) == self.domain_from_file:
            raise UserError("table: give domain = 'column', or domain_from_file = true without one")
        if len(self.delimiter) != 1:
            raise UserError(f"table: delimiter is one character, not {self.delimiter!r}")

    @property
    def fixed(self) -> dict[str, str]:
        """Key to column, of those columns that are no fields."""
        named = {"label": self.label, "domain": self.domain, "time": self.time}
        named["row_id"] = self.row_id
        return {key: column for key, column in named.items() if column}

    def describe(self) -> dict[str, Any]:
        """What decides the rows, without the places where files lie."""
        described = asdict(self)
        del described["path"]
        for join in described["join"]:
            del join["path"]
        return described


class Table:
    """Rows of a log with the fields asked for."""

    def __init__(self, config: TableConfig, fields: tuple[Field, ...]) -> None:
        self.config = config
        self.names = [field.name for field in fields if field.name != "domain"]
        made = config.per_user.made if config.per_user else ()
        joined = _joined_fields(config, self.names)
        own = tuple(f for f in fields if f.name not in {"domain", *made, *joined})
        on = {name: config.join[number].on for name, number in joined.items()}
        per_user = config.per_user and config.per_user.keyed(on)
        self._log = Log(replace(config, per_user=per_user), own)
        self._joins = [
            Join(join, self._log.column_of(join.on), fields, config.separators)
            for join in config.join
        ]
        for join in self._joins:
            join.local = join.config.on in config.local
        self._rows: Log | PerUser = self._log
        if config.per_user and per_user:
            config.per_user.check(fields, on)
            self._rows = PerUser(per_user, self._log)
            history = config.per_user.history
            if history and history.of in joined:
                self._joins[joined[history.of]].lists[history.field] = history.of

    def pieces(self) -> tuple[str, ...]:
        """A file or a range of row groups each; with a per-user stage, a range of users."""
        return self._rows.pieces()

    def read(self, piece: int, dropped: Counter[str]) -> Iterator[pa.Table]:
        """Rows of a piece; left out and counted: bad_row, dropped_label, no_<key of a join>."""
        for rows in self._rows.read(piece, dropped):
            for join in self._joins:
                rows = join.add(rows, self._log.name_of, dropped)
            if len(rows):
                yield rows.select(["row_id", "domain", "label", "time", *self.names])

    def state(self) -> list[Any]:
        """Files of the log and of the joined tables."""
        joined = [Files(join.path, join.format or None).states() for join in self.config.join]
        return [self._log.files.states(), *joined]

    def describe(self) -> dict[str, Any]:
        """What decides the rows, without the places where files lie."""
        return self.config.describe()


class Log:
    """Rows of the log alone: fixed columns, its own fields, and the keys that joins and the
    per-user stage need, as text."""

    def __init__(self, config: TableConfig, fields: tuple[Field, ...]) -> None:
        self.config = config
        per_user = config.per_user
        self.needed = per_user.keys if per_user else ()
        keys = [*(join.on for join in config.join), *self.needed]
        known = {field.name: field for field in fields}
        for name in dict.fromkeys(keys):
            field = known.setdefault(name, Field(name, "id"))
            if field.kind not in ("id", "anonymous", "text") or field.multi:
                raise UserError(f"table: {name!r} is a key, so one id or text; it is {field.kind}")
        self.fields = tuple(known.values())
        for name in config.local:
            if name not in known or known[name].multi or known[name].kind == "number":
                raise unknown("single-valued field of the log in local", name, known)

    @cached_property
    def files(self) -> Files:
        """The log's files."""
        config = self.config
        keys = {column: f"data.source.columns.{name}" for name, column in config.columns.items()}
        keys |= {column: f"data.source.{name}" for name, column in config.fixed.items()}
        return Files(config.path, config.format or None, config.delimiter, config.quoted, keys=keys)

    def column_of(self, name: str) -> str:
        """The log's column of a field."""
        return self.config.columns.get(name, name)

    def name_of(self, row_id: int) -> str:
        """What people call a row of the log."""
        if row_id > LAST_ID:
            return f"a drawn negative of {self.config.path}"
        if self.config.row_id:
            return f"{self.config.path}: the row with {self.config.row_id} {row_id}"
        return self.files.row_name(row_id >> ROW_BITS, row_id & ((1 << ROW_BITS) - 1))

    def identity(self) -> dict[str, Any]:
        """What the log's rows come from, places included."""
        fields = [asdict(field) for field in self.fields]
        return {"config": asdict(self.config), "fields": fields, "files": self.files.states()}

    def pieces(self) -> tuple[str, ...]:
        """Files and ranges of row groups, in order."""
        return tuple(
            f"{self.files.names[piece.file]} from row {piece.first_row}"
            for piece in self.files.pieces
        )

    def read(self, piece: int, dropped: Counter[str]) -> Iterator[pa.Table]:
        """Rows in the order of the file."""
        where = self.files.pieces[piece]
        for chunk in self.files.read(where, self._columns, self._bad_line(where.file, dropped)):
            rows = self._rows(where.file, chunk, dropped)
            if len(rows):
                yield rows

    def _bad_line(self, file: int, dropped: Counter[str]) -> Callable[[int, str], None]:
        def bad_line(row: int, wrong: str) -> None:
            if self.config.bad_rows == "error":
                raise UserError(
                    f"{self.files.row_name(file, row)} {wrong}; mend it, or set "
                    "bad_rows = 'drop' to leave such rows out and count them"
                )
            dropped["bad_row"] += 1

        return bad_line

    @property
    def _columns(self) -> list[str]:
        return [*self.config.fixed.values(), *(self.column_of(field.name) for field in self.fields)]

    def _rows(self, file: int, chunk: Chunk, dropped: Counter[str]) -> pa.Table:
        checked = Checked(self.files, file, chunk, drop=self.config.bad_rows == "drop")
        label, left_out = self._label(checked)
        columns = {
            "row_id": self._row_id(checked),
            "domain": self._domain(checked),
            "label": label,
            "time": self._time(checked),
        }
        for asked in self.fields:
            columns[asked.name] = self._field(checked, asked, columns["domain"])
        count(dropped, "bad_row", checked.bad)
        count(dropped, "dropped_label", left_out & ~checked.bad)
        return pa.table(columns).filter(pa.array(~(checked.bad | left_out)))

    def _row_id(self, checked: Checked) -> pa.Array:
        if not self.config.row_id:
            return pa.array(checked.rows | (checked.file << ROW_BITS), pa.int64())
        expected = f"an integer from 0 to {LAST_ID}"
        ids = checked.column(self.config.row_id, as_integer, expected, null=False)
        outside = mask(pc.or_(pc.less(ids, 0), pc.greater(ids, LAST_ID)))
        checked.refuse(outside, self.config.row_id, None, expected)
        return ids

    def _domain(self, checked: Checked) -> pa.Array:
        if self.config.domain_from_file:
            stem = self.files.stem(checked.file)
            return pa.array([stem]).take(pa.array(np.zeros(len(checked.rows), np.int64)))
        expected = "the name of a domain"
        names = checked.column(self.config.domain, as_text, expected, null=False)
        checked.refuse(mask(pc.equal(names, "")), self.config.domain, None, expected)
        return names

    def _time(self, checked: Checked) -> pa.Array:
        if not self.config.time:
            return pa.array(np.zeros(len(checked.rows), np.int64))
        expected = "a time: seconds, a timestamp, or ISO 8601 in UTC"
        return checked.column(self.config.time, as_seconds, expected, null=False)

    def _label(self, checked: Checked) -> tuple[pa.Array, np.ndarray]:
        """Labels, and which rows the label rule leaves out."""
        config = self.config
        if config.all_positive:
            ones = np.ones(len(checked.rows), np.float32)
            return pa.array(ones), np.zeros(len(checked.rows), bool)
        numbers = checked.column(config.label, as_label, "a number", null=False)
        values = pc.fill_null(numbers, np.nan).to_numpy()
        left_out = np.isin(values, config.drop_labels)
        if config.positive_above is None:
            other = ~np.isin(values, (0.0, 1.0)) & ~left_out
            expected = "0 or 1 (for ratings, set positive_above)"
            checked.refuse(other & ~checked.bad, config.label, None, expected)
        above = 0.5 if config.positive_above is None else config.positive_above
        return pa.array((values > above).astype(np.float32)), left_out

    def _field(self, checked: Checked, field: Field, domain: pa.Array) -> pa.Array:
        read, expected = reader_of(field, self.config.separators.get(field.name, ""))
        null = field.name not in self.needed
        values = checked.column(self.column_of(field.name), read, expected, null=null)
        if field.name in self.config.local:
            return local_values(domain, values)
        return values


def _joined_fields(config: TableConfig, names: list[str]) -> dict[str, int]:
    """The number of the join that each joined field comes from."""
    joined: dict[str, int] = {}
    for number, join in enumerate(config.join):
        for name in join.columns:
            if name in config.columns or name in joined:
                raise UserError(
                    f"table: the field {name!r} comes from two tables; leave one of them out"
                )
            if name in names:
                joined[name] = number
    return joined
