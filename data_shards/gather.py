"""Rows out of the columns of many blocks, in numba: from the bytes of the blocks into each step's.

A window's steps are laid down lane by lane. A lane's rows stand in few blocks, so that each of
their cache lines is fetched once, and every step has memory of its own, small enough for the
allocator to hand out again: fresh pages cost more than the copy.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import int64, uint64
from numba.core import types
from numba.extending import intrinsic

from data_shards.order import ROW_BITS, ROW_MASK


def _loading(typing: Any, address: Any, index: Any, kind: Any) -> Any:
    """The value of a `kind` of number at `index` behind an address."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = context.get_value_type(kind.dtype)
        pointer = builder.inttoptr(args[0], ir.PointerType(value))
        return builder.load(builder.gep(pointer, [args[1]]))

    return kind.dtype(types.int64, types.int64, kind), code


def _storing(typing: Any, address: Any, index: Any, value: Any, kind: Any) -> Any:
    """Puts a value, as this `kind` of number, at `index` behind an address."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        stored = context.get_value_type(kind.dtype)
        pointer = builder.inttoptr(args[0], ir.PointerType(stored))
        cast = context.cast(builder, args[2], signature.args[2], kind.dtype)
        builder.store(cast, builder.gep(pointer, [args[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, value, kind), code


# Any: numba gives the first argument itself
load: Any = intrinsic(_loading)
_store: Any = intrinsic(_storing)


@numba.njit(cache=True, nogil=True)
def gather(
    sources: np.ndarray,
    targets: np.ndarray,
    kinds: tuple[Any, Any],
    place: np.ndarray,
    edges: np.ndarray,
    blank: int,
) -> None:
    """The rows at `place` [steps, share] (see `order.Window`) of columns of one kind of number.

    `sources` [columns, blocks] and `targets` [columns, steps] are addresses, of numbers of the two
    `kinds`; `edges` [lanes + 1] are the lanes' bounds in a step. Padding becomes `blank`.
    """
    stored, kind = kinds
    for lane in range(len(edges) - 1):
        start, stop = uint64(edges[lane]), uint64(edges[lane + 1])
        for column in range(len(sources)):
            source = sources[column]
            for step in range(len(place)):
                target, places = targets[column, step], place[step]
                for at in range(start, stop):
                    where = uint64(places[at])
                    if int64(where) < 0:
                        _store(target, at, blank, kind)
                    else:
                        block, row = where >> uint64(ROW_BITS), where & uint64(ROW_MASK)
                        _store(target, at, load(source[block], row, stored), kind)


@numba.njit(cache=True, nogil=True)
def ends(offsets: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Where the lists at `place` [n] end, laid end to end: [n + 1] int64 from 0; padding has none.

    `offsets` [blocks] are addresses.
    """
    found = np.zeros(len(place) + 1, np.int64)
    for at in range(len(place)):
        found[at + 1] = found[at]
        if place[at] >= 0:
            first, row = offsets[place[at] >> ROW_BITS], place[at] & ROW_MASK
            found[at + 1] += load(first, row + 1, np.int32) - load(first, row, np.int32)
    return found


@numba.njit(cache=True, nogil=True)
def flat(
    values: np.ndarray, offsets: np.ndarray, place: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """The values of those lists, int64."""
    found = np.empty(ends[-1], np.int64)
    for at in range(len(place)):
        if place[at] >= 0:
            block = place[at] >> ROW_BITS
            first = load(offsets[block], place[at] & ROW_MASK, np.int32)
            for i in range(ends[at], ends[at + 1]):
                found[i] = load(values[block], first + i - ends[at], np.int32)
    return found


@numba.njit(cache=True, nogil=True)
def of_blocks(values: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The value of each place's block, [steps, share]; 0 for padding."""
    found = np.zeros(place.shape, values.dtype)
    for step in range(place.shape[0]):
        for at in range(place.shape[1]):
            if place[step, at] >= 0:
                found[step, at] = values[place[step, at] >> ROW_BITS]
    return found
