"""Columns of a log, whatever their types there, as the types of a row.

Each function gives the column and a mask of the values that it could not read; a null is a value
that was read. Spelling of an id: text as it is, an integer as its digits (also where a table
library made it a float: 3.0 is "3"), a boolean as true or false, a date or time as ISO 8601.
"""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from collections import Counter
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_shards.errors import UserError
from data_shards.schema import Field
from data_shards.sources.list_literals import literal_lists
from data_shards.sources.table_files import Chunk, Files

Read = tuple[pa.Array, np.ndarray]
"""A column and the mask [n] of the values that could not be read."""

NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})?\s*$"
INTEGER = r"^[+-]?\d{1,18}$"
DATE, SECOND = "%Y-%m-%d", "%Y-%m-%d %H:%M:%S"
TEXTS = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
)


def is_text(column: pa.Array) -> bool:
    """Whether the values are text, or bytes that may be text."""
    return any(is_one(column.type) for is_one in TEXTS)


def is_list(column: pa.Array) -> bool:
    """Whether the values are lists."""
    return pa.types.is_list(column.type) or pa.types.is_large_list(column.type)


def as_text(column: pa.Array) -> Read:
    """Any column of single values as text."""
    if is_list(column) or pa.types.is_struct(column.type):
        return _unreadable(column, pa.string())
    try:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column.validate(full=True)  # Parquet's writers may have put any bytes there
        return column.cast(pa.string()), _none(column)
    except pa.ArrowException:
        return _decoded(column) if is_text(column) else _unreadable(column, pa.string())


def _decoded(column: pa.Array) -> Read:
    """Bytes that are not all UTF-8: the slow way, to know which."""
    texts = [_utf8(value) for value in column.cast(pa.large_binary()).to_pylist()]
    read = pa.array(texts, pa.string())
    return read, mask(pc.and_(pc.is_null(read), pc.is_valid(column)))


def _unreadable(column: pa.Array, kind: pa.DataType) -> Read:
    """A column of a type that says nothing here."""
    return pa.nulls(len(column), kind), mask(pc.is_valid(column))


def _utf8(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def as_number(column: pa.Array) -> Read:
    """Numbers, booleans as 0 and 1, or numbers written out: float64, finite."""
    if is_text(column):
        column, bad = _matching(column, NUMBER)
        return pc.utf8_trim_whitespace(column).cast(pa.float64()), bad
    try:
        numbers = column.cast(pa.float64(), safe=False)
    except pa.ArrowException:
        return _unreadable(column, pa.float64())
    return numbers, mask(pc.invert(pc.is_finite(numbers)))


def as_float32(column: pa.Array) -> Read:
    """Numbers as float32."""
    numbers, bad = as_number(column)
    floats = numbers.cast(pa.float32(), safe=False)
    return floats, bad | mask(pc.invert(pc.is_finite(floats)))


def as_seconds(column: pa.Array) -> Read:
    """Integers as they are; timestamps, dates and ISO 8601 text (UTC) as seconds since 1970."""
    if is_text(column):
        return _seconds_in_text(column)
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        return column.cast(pa.timestamp("s"), safe=False).cast(pa.int64()), _none(column)
    return as_integer(column)


def as_integer(column: pa.Array) -> Read:
    """Integers, also written out or as whole floats: int64."""
    if is_text(column):
        digits, bad = _matching(column, INTEGER)
        return pc.utf8_ltrim(digits, "+").cast(pa.int64()), bad
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64(), safe=False), _none(column)
    numbers, bad = as_number(column)
    whole = pc.floor(numbers)
    bad = bad | mask(pc.not_equal(whole, numbers)) | mask(pc.greater(pc.abs(numbers), 2.0**53))
    return pc.if_else(pa.array(bad), None, whole).cast(pa.int64()), bad


def _seconds_in_text(column: pa.Array) -> Read:
    texts, bad = as_text(column)
    digits, _ = as_integer(texts)
    plain = pc.replace_substring_regex(
        texts, r"^(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(\.\d+)?(Z|\+00:00)?$", r"\1 \2"
    )
    times = [_parsed(plain, form) for form in (SECOND, DATE)]
    seconds = pc.coalesce(digits, *times)
    return seconds, bad | mask(pc.and_(pc.is_null(seconds), pc.is_valid(texts)))


def _parsed(texts: pa.Array, form: str) -> pa.Array:
    """Seconds since 1970, null for other forms and for days that no calendar has."""
    times = pc.strptime(texts, format=form, unit="s", error_is_null=True)
    exact = pc.equal(pc.strftime(times, format=form), texts)
    return pc.if_else(exact, times.cast(pa.int64()), None)


def lists_of(read_values: Callable[[pa.Array], Read], separator: str) -> Callable[[pa.Array], Read]:
    """A reader of multi-valued columns: lists, or text that a separator says how to cut, or that
    has a list written out.

    A list's values are read by `read_values`; a list is unreadable where one of its values is, and
    so is a single value where a list belongs.
    """

    def read(column: pa.Array) -> Read:
        bad = _none(column)
        if separator and not is_list(column):
            column, bad = as_text(column)
            column = pc.split_pattern(column, separator)
        elif is_text(column):
            column, bad = as_text(column)
            column, no_list = literal_lists(column)
            bad = bad | no_list
        if pa.types.is_null(column.type):
            column = column.cast(pa.list_(pa.string()))
        if not is_list(column):
            values, _ = read_values(column.slice(0, 0))
            return _unreadable(column, pa.list_(values.type))
        values, bad_values = read_values(column.flatten())
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
        ends = np.cumsum(lengths)
        counts = np.concatenate([[0], np.cumsum(bad_values)])
        offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
        lists = pa.ListArray.from_arrays(offsets, values, mask=pc.is_null(column))
        return lists, bad | (counts[ends] > counts[ends - lengths])

    return read


def as_token(column: pa.Array) -> Read:
    """Token numbers: int32."""
    numbers, bad = as_integer(column)
    outside = pc.or_(pc.less(numbers, 0), pc.greater(numbers, np.iinfo(np.int32).max))
    bad = bad | mask(outside)
    return pc.if_else(pa.array(bad), None, numbers).cast(pa.int32()), bad


def _matching(column: pa.Array, pattern: str) -> Read:
    """Texts of the pattern, null where others stand."""
    texts, bad = as_text(column)
    fits = pc.match_substring_regex(texts, pattern)
    return pc.if_else(fits, texts, None), bad | mask(pc.invert(fits))


def _none(column: pa.Array) -> np.ndarray:
    return np.zeros(len(column), bool)


def mask(values: pa.Array) -> np.ndarray:
    """[n] bool; a null is false."""
    return pc.fill_null(values, False).to_numpy(zero_copy_only=False)


def as_label(column: pa.Array) -> Read:
    """Numbers, and booleans also where they are written out."""
    if is_text(column):
        texts, bad = as_text(column)
        lower = pc.utf8_lower(texts)
        for word, digit in (("true", "1"), ("false", "0")):
            lower = pc.if_else(pc.equal(lower, word), digit, lower)
        numbers, no_number = as_number(lower)
        return numbers, bad | no_number
    return as_number(column)


def count(counter: Counter[str], name: str, rows: np.ndarray) -> None:
    """Adds the rows of a mask under a name, where there are any."""
    if rows.any():
        counter[name] += int(rows.sum())


def reader_of(field: Field, separator: str) -> tuple[Callable[[pa.Array], Read], str]:
    """How a field's column is read, and what is expected there."""
    if field.kind == "number":
        return as_float32, "a finite number"
    if field.kind == "tokens":
        return lists_of(as_token, separator), "a list of token numbers"
    if field.multi:
        hint = f'a list of values (for text: data.source.separators = {{ {field.name} = "|" }})'
        return lists_of(as_text, separator), hint
    return as_text, "one value, in UTF-8"


class Checked:
    """A chunk's columns as they are read; an unreadable value ends the run or marks its row."""

    def __init__(self, files: Files, file: int, chunk: Chunk, *, drop: bool) -> None:
        self.files, self.file = files, file
        self.table, self.rows = chunk.table, chunk.rows
        self.drop = drop
        self.bad = np.zeros(len(chunk.rows), bool)

    def name(self, row: int) -> str:
        """What people call a row of this file, by its 0-based place."""
        return self.files.row_name(self.file, row)

    def column(
        self, name: str, read: Callable[[pa.Array], Read], expected: str, *, null: bool = True
    ) -> pa.Array:
        """A column, read; rows that cannot be are refused, and nulls where `null` is False."""
        raw = self._raw(name)
        try:
            values, bad = read(raw)
        except (pa.ArrowException, UnicodeError, OverflowError) as error:
            raise UserError(
                f"{self.name(self.rows[_culprit(raw, read)])}: {name} cannot be read "
                f"({type(error).__name__}: {error}); mend it, or give the column a plain type"
            ) from error
        if not null:
            bad = bad | mask(pc.is_null(values))
        self.refuse(bad, name, raw, expected)
        return values

    def refuse(self, bad: np.ndarray, name: str, raw: pa.Array | None, expected: str) -> None:
        """Marks rows as bad, or raises for the first."""
        if bad.any() and not self.drop:
            row = int(np.argmax(bad))
            shown = _shown((self._raw(name) if raw is None else raw).slice(row, 1))
            raise UserError(
                f"{self.name(self.rows[row])}: {name} is {shown}; expected {expected}; mend "
                "it, or set bad_rows = 'drop' to leave such rows out and count them"
            )
        self.bad |= bad

    def _raw(self, name: str) -> pa.Array:
        column = self.table[name].combine_chunks()
        return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _culprit(column: pa.Array, read: Callable[[pa.Array], Read]) -> int:
    """The place of a value at which `read` fails."""
    start, count = 0, len(column)
    while count > 1:
        half = count // 2
        try:
            read(column.slice(start, half))
            start, count = start + half, count - half
        except (pa.ArrowException, UnicodeError, OverflowError):
            count = half
    return start


def _shown(one: pa.Array) -> str:
    """An array's single value, as people write it."""
    try:
        value = one[0].as_py()
    except (ValueError, OverflowError, pa.ArrowException):  # what Python cannot hold
        return one.to_string().strip("[] \n")
    return repr(value.decode(errors="replace") if isinstance(value, bytes) else value)
