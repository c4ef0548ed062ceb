"""In what order rows are read: pure functions of (block sizes, seed, epoch), nothing remembered.

An epoch's blocks are permuted into one virtual sequence of N rows, which is cut into L lanes. Of
a global batch of G rows, lane l gives the places [a_l, a_l+1) with a_l = l*G//L, and it owns the
rows [N*a_l//G, N*a_l+1//G) of the sequence, so that all lanes run out in the same last step:
every step but the last is full. Rows are shuffled within windows of K steps of a lane. Ranks
hold neighbouring lanes, so any number of ranks that divides L and G reads the same global batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np

from data_shards.permute import permute

# Tags keep the random orders apart.
_BLOCKS, _ROWS, _STEPS = 1, 2, 3
ROW_BITS = 32
"""A place is one number, so that it is permuted in one go: a block above these bits, a row in them;
-1 is padding."""
ROW_MASK = (1 << ROW_BITS) - 1


@dataclass(frozen=True)
class Window:
    """Places [steps, share] of some steps, in the `blocks` that they touch, one of which may stand
    there twice; `edges` [lanes + 1] are the lanes' bounds in a step."""

    first_step: int
    blocks: np.ndarray
    place: np.ndarray
    edges: np.ndarray

    @property
    def end(self) -> int:
        """The step after the last one."""
        return self.first_step + len(self.place)

    @property
    def real(self) -> np.ndarray:
        """Whether a place is no padding."""
        return self.place >= 0

    @property
    def which(self) -> np.ndarray:
        """Which of `blocks` each place is in; 0 for padding."""
        return np.maximum(self.place, 0) >> ROW_BITS

    @property
    def row(self) -> np.ndarray:
        """The row of its block that each place is; 0 for padding."""
        return np.maximum(self.place, 0) & ROW_MASK


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """The order of one epoch over blocks of `block_rows` rows; `stream` tells orders apart."""

    block_rows: np.ndarray
    seed: int
    epoch: int
    global_batch: int
    lanes: int
    shuffle_rows: int
    shuffle: bool
    stream: int = 0

    @cached_property
    def rows(self) -> int:
        """N, the rows of the epoch."""
        return int(self.block_rows.sum())

    @property
    def steps(self) -> int:
        """Steps of the epoch: ceil(N / G)."""
        return -(-self.rows // self.global_batch)

    @property
    def window_steps(self) -> int:
        """K, the steps that are shuffled together."""
        return max(1, self.shuffle_rows // self.global_batch)

    def rows_in_step(self, step: int) -> int:
        """Real rows of the global batch, on every rank the same."""
        return min(self.global_batch, self.rows - step * self.global_batch)

    def window(self, number: int, lane_start: int, lane_stop: int) -> Window:
        """The places of window `number` that the lanes [lane_start, lane_stop) fill."""
        first = number * self.window_steps
        steps = min(self.window_steps, self.steps - first)
        edges = np.arange(lane_start, lane_stop + 1) * self.global_batch // self.lanes
        edges -= edges[0]
        place = np.empty((steps, edges[-1]), np.int64)
        blocks: list[int] = []
        for lane, begin, end in zip(range(lane_start, lane_stop), edges, edges[1:], strict=False):
            blocks += self._lane(lane, number, len(blocks), place[:, begin:end])
        return Window(first, np.array(blocks or [0]), place, edges)

    def _lane(self, lane: int, number: int, seen: int, out: np.ndarray) -> list[int]:
        """The blocks of a lane's rows; their places go into `out` [steps, share]."""
        start, stop = (place * self.global_batch // self.lanes for place in (lane, lane + 1))
        begin, end = (self.rows * place // self.global_batch for place in (start, stop))
        begin += number * self.window_steps * (stop - start)
        end = min(begin + out.size, end)
        if begin >= end:
            out[:] = -1
            return []
        low, high = np.searchsorted(self._starts, (begin, end - 1), side="right")
        places = _stretch(self._starts[low - 1 : high], begin, end, seen, out.size)
        if self.shuffle:
            permute(places[: end - begin], *self._key, _ROWS, lane, number)
        out[:] = places.reshape(out.shape)
        return self._blocks[low - 1 : high].tolist()

    @property
    def _key(self) -> tuple[int, ...]:
        return self.seed, self.epoch, self.stream

    @cached_property
    def _blocks(self) -> np.ndarray:
        blocks = np.arange(len(self.block_rows))
        if self.shuffle:
            permute(blocks, *self._key, _BLOCKS)
        return blocks

    @cached_property
    def _starts(self) -> np.ndarray:
        rows = self.block_rows[self._blocks]
        return np.cumsum(rows) - rows


@numba.njit(cache=True, nogil=True)
def _stretch(starts: np.ndarray, begin: int, end: int, seen: int, size: int) -> np.ndarray:
    """Places [size] of the neighbours [begin, end) in the virtual sequence, and then padding.

    `starts` are those of their blocks, the first of which is number `seen` of the window's.
    """
    places = np.full(size, -1, np.int64)
    for block in range(len(starts)):
        stop = end if block + 1 == len(starts) else starts[block + 1]
        first = ((seen + block) << ROW_BITS) - starts[block]
        for row in range(max(begin, starts[block]), stop):
            places[row - begin] = first + row
    return places


@dataclass(frozen=True)
class Schedule:
    """Which order each step of an epoch reads (`order`), and which of its steps (`step`)."""

    order: np.ndarray
    step: np.ndarray


def schedule(steps: Sequence[int], seed: int, epoch: int, shuffle: bool) -> Schedule:
    """Mix the steps of several orders, each in its own sequence, into one epoch."""
    order = np.repeat(np.arange(len(steps)), steps)
    if shuffle:
        permute(order, seed, epoch, 0, _STEPS)
    step = np.empty_like(order)
    step[np.argsort(order, kind="stable")] = np.concatenate([np.arange(n) for n in steps])
    return Schedule(order, step)
