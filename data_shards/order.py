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

import numpy as np

# Tags keep the random streams apart: seeds are padded with zeros, so [1, 0] equals [1, 0, 0].
_BLOCKS, _ROWS, _STEPS = 1, 2, 3
# A place is one number, so that it is permuted in one go: a block above these bits, a row in them.
_ROW = 32
_ROW_MASK = (1 << _ROW) - 1


@dataclass(frozen=True)
class Window:
    """Places of some steps, `rows_per_step` each, step after step; not `real` is padding.

    `blocks` are those that the window touches, one may stand there twice; `which` of them and which
    `row` of it are per place.
    """

    first_step: int
    steps: int
    blocks: np.ndarray
    which: np.ndarray
    row: np.ndarray
    real: np.ndarray

    @property
    def block(self) -> np.ndarray:
        """The block of each place."""
        return self.blocks[self.which]


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
        blocks, lanes = [], []
        for lane in range(lane_start, lane_stop):
            own, places = self._lane(lane, number, steps, len(blocks))
            blocks += own
            lanes.append(places)
        place = np.concatenate(lanes, axis=1).reshape(-1)
        real = place >= 0
        place[~real] = 0
        return Window(first, steps, np.array(blocks or [0]), place >> _ROW, place & _ROW_MASK, real)

    def _lane(self, lane: int, number: int, steps: int, seen: int) -> tuple[list[int], np.ndarray]:
        """(blocks, places [steps, share]): a place is (seen + which block) << _ROW | row, or -1."""
        start, stop = (place * self.global_batch // self.lanes for place in (lane, lane + 1))
        share = stop - start
        begin, end = (self.rows * place // self.global_batch for place in (start, stop))
        begin += number * self.window_steps * share
        blocks, rows = self._stretch(begin, min(begin + steps * share, end), seen)
        if self.shuffle:
            rows = self._rng(_ROWS, lane, number).permutation(rows)
        places = np.full(steps * share, -1, np.int64)
        places[: len(rows)] = rows
        return blocks, places.reshape(steps, share)

    def _stretch(self, begin: int, end: int, seen: int) -> tuple[list[int], np.ndarray]:
        """(blocks, places) of the neighbours [begin, end) in the virtual sequence."""
        if begin >= end:
            return [], np.empty(0, np.int64)
        low, high = np.searchsorted(self._starts, (begin, end - 1), side="right")
        starts = self._starts[low - 1 : high]
        counts = np.diff([begin, *starts[1:], end])
        first = (np.arange(seen, seen + len(starts)) << _ROW) - starts
        return self._blocks[low - 1 : high].tolist(), np.arange(begin, end) + first.repeat(counts)

    def _rng(self, *tags: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, self.stream, *tags])

    @cached_property
    def _blocks(self) -> np.ndarray:
        count = len(self.block_rows)
        return self._rng(_BLOCKS).permutation(count) if self.shuffle else np.arange(count)

    @cached_property
    def _starts(self) -> np.ndarray:
        rows = self.block_rows[self._blocks]
        return np.cumsum(rows) - rows


@dataclass(frozen=True)
class Schedule:
    """Which order each step of an epoch reads (`order`), and which of its steps (`step`)."""

    order: np.ndarray
    step: np.ndarray


def schedule(steps: Sequence[int], seed: int, epoch: int, shuffle: bool) -> Schedule:
    """Mix the steps of several orders, each in its own sequence, into one epoch."""
    order = np.repeat(np.arange(len(steps)), steps)
    if shuffle:
        order = np.random.default_rng([seed, epoch, 0, _STEPS]).permutation(order)
    step = np.empty_like(order)
    step[np.argsort(order, kind="stable")] = np.concatenate([np.arange(n) for n in steps])
    return Schedule(order, step)
