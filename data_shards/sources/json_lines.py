"""JSON lines in blocks: Arrow reads a block whose lines agree, Python one whose lines do not.

Arrow alone would not do: it names no line of the file, stops at the first value of another type,
and takes two objects on one line for two rows.
"""

import io
import json
import re
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pa_json

BadLine = Callable[[int, str], None]
"""Told of a row (0-based) that is no row, and what is wrong with it; may raise."""

Parse = Callable[[bytes], dict[str, Any]]
"""A line's object; ValueError where it is none, RecursionError where it is nested too deep."""

BLANK_LINE = re.compile(rb"(?m)^[ \t\r]*$")


def line_blocks(stream: IO[bytes], size: int) -> Iterator[tuple[int, bytes]]:
    """Whole lines of about `size` bytes at a time, with the 0-based number of the first."""
    first, rest = 0, b""
    while data := stream.read(size):
        cut = data.rfind(b"\n") + 1
        if not cut:
            rest += data
            continue
        block, rest = rest + data[:cut], data[cut:]
        yield first, block
        first += block.count(b"\n")
    if rest:
        yield first, rest


def read_block(
    first: int, block: bytes, columns: tuple[str, ...], bad_line: BadLine, parse: Parse
) -> tuple[pa.Table, np.ndarray]:
    """The columns of a block's objects, and each one's line; blank lines hold no row.

    A key that an object lacks is null. Where values of a column differ in type, all are text.
    """
    body = block.removesuffix(b"\n")
    lines = body.count(b"\n") + 1
    try:
        body.decode()
        table = _by_arrow(body, columns)
        if len(table) == lines and not BLANK_LINE.search(body):
            return table, np.arange(first, first + lines)
    except (ValueError, RecursionError):
        pass  # which line it is, is found below
    return _by_python(first, body, columns, bad_line, parse)


def _by_arrow(body: bytes, columns: tuple[str, ...]) -> pa.Table:
    sample = json.loads(body[: body.find(b"\n") % (len(body) + 1)])
    types = pa.schema([(name, _type_of(sample.get(name))) for name in columns])
    read = pa_json.ReadOptions(use_threads=False, block_size=len(body) + 1)
    parse = pa_json.ParseOptions(explicit_schema=types, unexpected_field_behavior="ignore")
    return pa_json.read_json(io.BytesIO(body), read, parse).select(list(columns))


def _type_of(value: object) -> pa.DataType:
    if isinstance(value, list):
        return pa.list_(_type_of(value[0] if value else None))
    types = {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    return types.get(type(value), pa.string())


def _by_python(
    first: int, body: bytes, columns: tuple[str, ...], bad_line: BadLine, parse: Parse
) -> tuple[pa.Table, np.ndarray]:
    objects: list[dict[str, Any]] = []
    rows: list[int] = []
    shapes: dict[str, bool] = {}
    for row, line in enumerate(body.split(b"\n"), first):
        if not line.strip():
            continue
        try:
            found = parse(line)
            _check_shapes(found, columns, shapes)
            objects.append(found)
            rows.append(row)
        except (ValueError, RecursionError) as error:
            bad_line(row, f"is no row: {error}")
    table = pa.table({name: _column([row.get(name) for row in objects]) for name in columns})
    return table, np.array(rows, np.int64)


def _check_shapes(found: dict[str, Any], columns: tuple[str, ...], shapes: dict[str, bool]) -> None:
    """A column of lists has lists alone: what the first value of the block is, the others are.

    Half of a surrogate pair, which JSON can spell and no text can hold, is a ValueError too.
    """
    needed = [found.get(name) for name in columns]
    json.dumps(needed, ensure_ascii=False, default=repr).encode()
    for name, value in zip(columns, needed, strict=True):
        if isinstance(value, dict):
            raise ValueError(f"{name} is an object")
        if value is not None and shapes.setdefault(name, isinstance(value, list)) != isinstance(
            value, list
        ):
            raise ValueError(f"{name} is a list in some lines and a single value in others")
        if isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
            raise ValueError(f"{name} is a list of lists or objects")


def json_object(line: bytes) -> dict[str, Any]:
    """A line of JSON; a key that stands twice is refused."""
    value = json.loads(line.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    if not isinstance(value, dict):
        raise ValueError(f"it is {line[:40]!r}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)!r} stands twice")
    return found


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, OverflowError):
        return pa.array([_spelled(value) for value in values])


def _spelled(value: Any) -> Any:
    if isinstance(value, list):
        return [_spelled(item) for item in value]
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else f"{value:.17g}"
    return value if value is None or isinstance(value, str) else json.dumps(value)
