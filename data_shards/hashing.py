"""Hashes of strings and of numbers, and an exact table of strings, over whole Arrow columns.

xxHash64 (Collet, 2012) and SplitMix64's finaliser (Steele et al., 2014), in numba: a Python loop
over distinct values would be most of the time of writing.
"""

from typing import Any

import numba
import numpy as np
import pyarrow as pa

_P1, _P2, _P3, _P4, _P5 = (
    np.uint64(p)
    for p in (
        0x9E3779B185EBCA87,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0x85EBCA77C2B2AE63,
        0x27D4EB2F165667C5,
    )
)


def xxh64(values: pa.Array, seed: int = 0) -> np.ndarray:
    """xxHash64 of each string's UTF-8 bytes, [n] uint64; of the empty string for null."""
    data, offsets = _buffers(values)
    return _xxh64_all(data, offsets, np.uint64(seed))


def mixed(numbers: np.ndarray, seed: int) -> np.ndarray:
    """A pseudo-random uint64 for each integer, for each `seed` another."""
    start = np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
    return _mix(numbers.astype(np.uint64), start)


def paired(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """One uint64 for each pair of two, the order of which matters."""
    return mixed(first ^ mixed(second, 0), 0)


class StringTable:
    """Where each of some strings stands among them, the first of those that repeat."""

    def __init__(self, values: pa.Array) -> None:
        self.values = values
        self._data, self._offsets = _buffers(values)
        self._slots = _fill(self._data, self._offsets)

    def find(self, values: pa.Array) -> np.ndarray:
        """Places [n] int32 of these strings; -1 for those that are not there and for null."""
        data, offsets = _buffers(values)
        found = _find(self._slots, self._data, self._offsets, data, offsets)
        if values.null_count:
            found[~values.is_valid().to_numpy(zero_copy_only=False)] = -1
        return found

    def repeated(self) -> int | None:
        """The place of a string that stands a second time; None when all are distinct."""
        places = np.flatnonzero(self.find(self.values) != np.arange(len(self.values)))
        return int(places[0]) if len(places) else None


def _buffers(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """(bytes, offsets) of a string array, without a copy."""
    values = values if values.type == pa.string() else values.cast(pa.string())
    _, offsets, data = values.buffers()
    if not len(values):
        return np.empty(0, np.uint8), np.zeros(1, np.int32)
    ends = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1]
    return np.frombuffer(data, np.uint8) if data else np.empty(0, np.uint8), ends


@numba.njit(cache=True, nogil=True)
def _fill(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Open addressing: a slot holds a place + 1, or 0; at most half of them are taken."""
    count = len(offsets) - 1
    size = 2
    while size < 2 * count:
        size *= 2
    slots = np.zeros(size, np.int32)
    for i in range(count):
        at = np.int64(_xxh64(data, offsets[i], offsets[i + 1], np.uint64(0)) & np.uint64(size - 1))
        while slots[at]:
            at = (at + 1) & (size - 1)
        slots[at] = i + 1
    return slots


@numba.njit(cache=True, nogil=True)
def _find(
    slots: np.ndarray,
    known: np.ndarray,
    known_offsets: np.ndarray,
    data: np.ndarray,
    offsets: np.ndarray,
) -> np.ndarray:
    size = len(slots)
    found = np.full(len(offsets) - 1, -1, np.int32)
    for i in range(len(found)):
        start, stop = offsets[i], offsets[i + 1]
        at = np.int64(_xxh64(data, start, stop, np.uint64(0)) & np.uint64(size - 1))
        while slots[at]:
            place = slots[at] - 1
            begin = known_offsets[place]
            if known_offsets[place + 1] - begin == stop - start and _same(
                known, begin, data, start, stop - start
            ):
                found[i] = place
                break
            at = (at + 1) & (size - 1)
    return found


@numba.njit(cache=True, nogil=True)
def _same(a: Any, i: Any, b: Any, j: Any, count: Any) -> bool:
    for k in range(count):
        if a[i + k] != b[j + k]:
            return False
    return True


@numba.njit(cache=True, nogil=True)
def _mix(x: np.ndarray, start: np.uint64) -> np.ndarray:
    z = x * np.uint64(0x9E3779B97F4A7C15) + start
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def _xxh64_all(data: np.ndarray, offsets: np.ndarray, seed: np.uint64) -> np.ndarray:
    hashes = np.empty(len(offsets) - 1, np.uint64)
    for i in range(len(hashes)):
        hashes[i] = _xxh64(data, offsets[i], offsets[i + 1], seed)
    return hashes


@numba.njit(cache=True, nogil=True)
def _rotated(x: np.uint64, bits: int) -> np.uint64:
    return (x << np.uint64(bits)) | (x >> np.uint64(64 - bits))


@numba.njit(cache=True, nogil=True)
def _word(data: np.ndarray, at: int, count: int) -> np.uint64:
    """`count` bytes, little-endian."""
    word = np.uint64(0)
    for i in range(count):
        word |= np.uint64(data[at + i]) << np.uint64(8 * i)
    return word


@numba.njit(cache=True, nogil=True)
def _round(state: np.uint64, word: np.uint64) -> np.uint64:
    return _rotated(state + word * _P2, 31) * _P1


@numba.njit(cache=True, nogil=True)
def _xxh64(data: np.ndarray, start: int, stop: int, seed: np.uint64) -> np.uint64:
    at, length = start, stop - start
    if length >= 32:
        a, b, c, d = seed + _P1 + _P2, seed + _P2, seed, seed - _P1
        while at + 32 <= stop:
            a = _round(a, _word(data, at, 8))
            b = _round(b, _word(data, at + 8, 8))
            c = _round(c, _word(data, at + 16, 8))
            d = _round(d, _word(data, at + 24, 8))
            at += 32
        h = _rotated(a, 1) + _rotated(b, 7) + _rotated(c, 12) + _rotated(d, 18)
        for state in (a, b, c, d):
            h = (h ^ _round(np.uint64(0), state)) * _P1 + _P4
    else:
        h = seed + _P5
    h += np.uint64(length)
    while at + 8 <= stop:
        h = _rotated(h ^ _round(np.uint64(0), _word(data, at, 8)), 27) * _P1 + _P4
        at += 8
    if at + 4 <= stop:
        h = _rotated(h ^ (_word(data, at, 4) * _P1), 23) * _P2 + _P3
        at += 4
    while at < stop:
        h = _rotated(h ^ (np.uint64(data[at]) * _P5), 11) * _P1
        at += 1
    h = (h ^ (h >> np.uint64(33))) * _P2
    h = (h ^ (h >> np.uint64(29))) * _P3
    return h ^ (h >> np.uint64(32))
