"""Rows where they lie in memory: batches are laid out by address, without an object per column.

Arrow takes longer to hand out a block's columns than the rows take to be gathered. A block that is
laid out as `write-shards` does it is found here; whatever else Arrow reads goes through Arrow.
"""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import struct
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numba import int64, uint64

from data_shards.gather import load

# Arrow's numbers: of a record batch among messages, of a batch's compression among its fields, and
# what may stand at the end of a stream
_BATCH, _COMPRESSION, _END = 3, 3, 0xFFFFFFFF
_OFFSET = 4  # bytes of a list's offset


@dataclass(frozen=True)
class Stored:
    """Addresses of each column's first value and, of lists, first offset (else 0): [columns] int64.

    The columns are those that were asked for, in their order; `owner` holds the memory.
    """

    values: np.ndarray
    offsets: np.ndarray
    owner: object

    @classmethod
    def of(cls, table: pa.Table, columns: pa.Schema) -> "Stored":
        """These columns of a table."""
        arrays = [_one(table[column.name], column.type) for column in columns]
        found = np.array([_addresses(array) for array in arrays], np.int64).reshape(-1, 2)
        return cls(found[:, 0], found[:, 1], arrays)


def _one(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    array = column.cast(kind).combine_chunks()
    if array.null_count and pa.types.is_list(kind):  # a null list may span values
        return pc.fill_null(array, pa.scalar([], kind))
    return array


def _addresses(array: pa.Array) -> tuple[int, int]:
    if not pa.types.is_list(array.type):
        return _address(array, array.buffers()[1]), 0
    offsets, values = array.buffers()[1], array.buffers()[3]
    start = offsets.address + array.offset * _OFFSET if offsets else 0
    return _address(array.values, values), start


def _address(array: pa.Array, values: pa.Buffer | None) -> int:
    return values.address + array.offset * array.type.byte_width if values else 0


class Layouts:
    """Where the `columns` lie in blocks, by the schema with which the bytes of each begin."""

    def __init__(self, columns: pa.Schema) -> None:
        self.columns = columns
        self._last: tuple[bytes, np.ndarray, tuple[int, int]] | None = None

    def find(self, data: bytes, rows: int) -> Stored | None:
        """The columns of a block of so many rows; None where they lie in a way not known here.

        Whatever the bytes, all values and all lists that are found lie inside of them.
        """
        try:
            last = self._last  # of any thread's block
            if last is None or not data.startswith(last[0]):
                last = self._last = _layout(data, self.columns)
            message, columns, counts = last
            whole = np.frombuffer(data, np.uint8)
            return Stored(*_find(whole, len(message), rows, columns, counts), data)
        except Exception:  # Arrow raises a dozen classes on garbage, and tells what is wrong
            return None


def _layout(data: bytes, columns: pa.Schema) -> tuple[bytes, np.ndarray, tuple[int, int]]:
    """(the message that tells the schema, each column's part in a batch, nodes and buffers of all).

    A part is the numbers of the column's node, of its values' node, of its buffers of values and of
    offsets (-1 where it has no lists), and the bytes of a value.
    """
    message = data[: 8 + struct.unpack_from("<i", data, 4)[0]]
    schema = pa.ipc.read_schema(pa.py_buffer(message))
    if not schema.equals(pa.schema(list(schema))) or len(set(schema.names)) < len(schema):
        raise ValueError  # of the other byte order, or which column is meant?
    node = buffer = 0
    parts: dict[str, tuple[int, ...]] = {}
    for column in schema:
        lists = pa.types.is_list(column.type)
        if column in columns:
            width = (column.type.value_type if lists else column.type).bit_width // 8
            offsets, values = (buffer + 1, buffer + 3) if lists else (-1, buffer + 1)
            parts[column.name] = node, node + lists, values, offsets, width
        node += 2 if lists else 1
        buffer += 4 if lists else 3 if pa.types.is_string(column.type) else 2
    return message, np.array([parts[name] for name in columns.names]), (node, buffer)


@numba.njit(cache=True, nogil=True)
def _find(
    data: np.ndarray, at: int, rows: int, columns: np.ndarray, counts: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Addresses of values and offsets in the record batch whose message is at byte `at`.

    ValueError if it is no plain one, not the last message, or has other rows or columns.
    """
    length = _number(data, at + 4, 4)
    body, message = at + 8 + length, _target(data, at + 8)
    batch, size = _target(data, _field(data, message, 2)), _field(data, message, 3)
    size = _number(data, size, 8)
    if _number(data, at, 4) != -1 or _number(data, _field(data, message, 1), 1) != _BATCH:
        raise ValueError
    if length < 0 or not 0 <= size <= len(data) - body or _field(data, batch, _COMPRESSION) >= 0:
        raise ValueError
    if len(data) > body + size and (
        len(data) != body + size + 8 or _number(data, body + size, 8) != _END
    ):
        raise ValueError
    nodes = _vector(data, _field(data, batch, 1), counts[0])
    buffers = _vector(data, _field(data, batch, 2), counts[1])
    values, offsets = np.zeros(len(columns), np.int64), np.zeros(len(columns), np.int64)
    start = data.ctypes.data + body
    for column in range(len(columns)):
        node, value_node, value_part, offset_part, width = columns[column]
        count = _number(data, nodes + 16 * value_node, 8)
        if _number(data, nodes + 16 * node, 8) != rows or not 0 <= count <= size:
            raise ValueError
        # a null list may span values, and a null number is none
        if _number(data, nodes + 16 * node + 8, 8) or _number(data, nodes + 16 * value_node + 8, 8):
            raise ValueError
        values[column] = start + _span(data, buffers + 16 * value_part, count * width, size)
        if offset_part >= 0:
            place = start + _span(data, buffers + 16 * offset_part, (rows + 1) * _OFFSET, size)
            if not _rising(place, rows, count):
                raise ValueError
            offsets[column] = place
    return values, offsets


@numba.njit(cache=True, nogil=True)
def _number(data: np.ndarray, at: int, size: int) -> Any:
    """The integer of 1, 2, 4 or 8 bytes at a place, signed; ValueError outside of the data."""
    if at < 0 or at + size > len(data):
        raise ValueError
    number = uint64(0)
    for i in range(size):
        number |= uint64(data[at + i]) << uint64(8 * i)
    unused = uint64(64 - 8 * size)
    return int64(number << unused) >> int64(unused)


# Arrow's messages are FlatBuffers: a table begins with the distance back to a list that tells, of
# each field, how far from the table's start it lies.


@numba.njit(cache=True, nogil=True)
def _target(data: np.ndarray, at: int) -> int:
    """The place that the distance at `at` leads to."""
    return at + _number(data, at, 4)


@numba.njit(cache=True, nogil=True)
def _field(data: np.ndarray, table: int, field: int) -> int:
    """The place of a table's field; -1 where it is left out."""
    fields = table - _number(data, table, 4)
    if 4 + 2 * field >= _number(data, fields, 2):
        return -1
    distance = _number(data, fields + 4 + 2 * field, 2)
    return table + distance if distance else -1


@numba.njit(cache=True, nogil=True)
def _vector(data: np.ndarray, at: int, count: int) -> int:
    """The place of the first of `count` pairs of int64."""
    vector = _target(data, at)
    if _number(data, vector, 4) != count:
        raise ValueError
    return vector + 4


@numba.njit(cache=True, nogil=True)
def _span(data: np.ndarray, at: int, needed: int, size: int) -> int:
    """Where in the body of `size` bytes a buffer begins that holds the bytes that are needed."""
    first, count = _number(data, at, 8), _number(data, at + 8, 8)
    if first < 0 or not needed <= count <= size - first:
        raise ValueError
    return first


@numba.njit(cache=True, nogil=True)
def _rising(offsets: int, rows: int, most: int) -> bool:
    """Whether a column's offsets rise from 0 or more to at most `most`."""
    before = 0
    for row in range(rows + 1):
        offset = load(offsets, row, np.int32)
        if offset < before:
            return False
        before = offset
    return before <= most
