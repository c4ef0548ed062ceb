"""Rows out of the columns of many blocks, in numba: straight from Arrow's memory into each step's.

A window's steps are laid down lane by lane. A lane's rows stand in few blocks, so that each of
their cache lines is fetched once, and every step has memory of its own, small enough for the
allocator to hand out again: fresh pages cost more than the copy.
"""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import pyarrow as pa
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from data_shards.order import ROW_BITS, ROW_MASK


def gather(
    columns: Sequence[Sequence[pa.Array]],
    first: np.ndarray,
    place: np.ndarray,
    edges: np.ndarray,
    kind: type[np.generic],
    blank: int = 0,
) -> list[np.ndarray]:
    """[columns, share] of `kind` for each step of `place` [steps, share].

    `columns[c][b]` are the values of column c in block b, whose row `first[b]` is the block's row 0
    for `place`; `edges` [lanes + 1] are the lanes' bounds in a step. Padding becomes `blank`.
    """
    steps, share = place.shape
    laid = [np.empty((len(columns), share), kind) for _ in range(steps)]
    if not columns:
        return laid
    stored = columns[0][0].type.to_pandas_dtype()
    sources = np.array([[_address(array) for array in column] for column in columns], np.int64)
    targets = np.array([step.ctypes.data for step in laid], np.int64)
    like = np.empty(0, stored), np.empty(0, kind)
    _gather(sources + first * like[0].itemsize, place, edges, targets, blank, *like)
    return laid


def _address(array: pa.Array) -> int:
    values = array.buffers()[1]
    return values.address + array.offset * array.type.byte_width if values else 0


def _loading(typing: Any, address: Any, index: Any, like: Any) -> Any:
    """The value at `index` behind an address; `like` is an array of its type."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = context.get_value_type(like.dtype)
        pointer = builder.inttoptr(args[0], ir.PointerType(value))
        return builder.load(builder.gep(pointer, [args[1]]))

    return like.dtype(types.int64, types.int64, like), code


def _storing(typing: Any, address: Any, index: Any, value: Any, like: Any) -> Any:
    """Puts a value at `index` behind an address."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = context.get_value_type(like.dtype)
        pointer = builder.inttoptr(args[0], ir.PointerType(kind))
        cast = context.cast(builder, args[2], signature.args[2], like.dtype)
        builder.store(cast, builder.gep(pointer, [args[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, value, like), code


# Any: numba gives the first argument itself
_load: Any = intrinsic(_loading)
_store: Any = intrinsic(_storing)


@numba.njit(cache=True, nogil=True)
def _gather(
    sources: np.ndarray,
    place: np.ndarray,
    edges: np.ndarray,
    targets: np.ndarray,
    blank: int,
    stored: np.ndarray,
    kind: np.ndarray,
) -> None:
    steps, share = place.shape
    for lane in range(len(edges) - 1):
        for column in range(len(sources)):
            source = sources[column]
            for step in range(steps):
                start = column * share
                for at in range(edges[lane], edges[lane + 1]):
                    where = place[step, at]
                    if where < 0:
                        _store(targets[step], start + at, blank, kind)
                    else:
                        value = _load(source[where >> ROW_BITS], where & ROW_MASK, stored)
                        _store(targets[step], start + at, value, kind)
