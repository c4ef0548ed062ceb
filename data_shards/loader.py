"""Batches of one rank, from any cursor, with the next window read ahead by threads."""

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from data_shards.batch import Batch, Columns, columns_of
from data_shards.blocks import Blocks, Skipped, choose, require_one_schema
from data_shards.errors import UserError
from data_shards.index import Index
from data_shards.mixing import Pieces, domain_epoch, quotas
from data_shards.order import EpochOrder, Schedule, Window, schedule
from data_shards.reader import batch_columns, blank_row
from data_shards.reading import Cursor, Reading, Rows
from data_shards.sidecars import Sidecar, SidecarColumns
from data_shards.storage import BlockCache
from data_shards.stored import Stored

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
Held = dict[int, Stored | None]
"""Blocks by number; None: corrupt, and left out."""
__all__ = ["Cursor", "Loader", "Reading", "Rows", "Skipped"]


@dataclass(frozen=True)
class _Stream:
    """What an epoch reads of some domains, and in what order: blocks of `order` are `pieces`."""

    pieces: Pieces
    order: EpochOrder


class Loader:
    """Batches of rank `rank` of `world_size` over one or several shard sets of one schema.

    `say` hears of each corrupt block that is left out, once. `sidecars` become `Batch.columns`;
    every set that is read has its own, with the same columns.
    """

    def __init__(
        self,
        folder: Path | str | Sequence[Path | str],
        rows: Rows,
        reading: Reading,
        rank: int,
        world_size: int,
        shuffle: bool = True,
        say: Callable[[str], None] = _LOG.warning,
        sidecars: Sequence[Sidecar] = (),
    ) -> None:
        require_divisible(reading, world_size)
        folders = [folder] if isinstance(folder, Path | str) else list(folder)
        self.indexes = tuple(Index.load(path) for path in folders)
        require_one_schema(folders, self.indexes)
        self.schema = self.indexes[0].schema
        self.reading = reading
        self.shuffle = shuffle
        self._lanes = tuple((rank + i) * reading.lanes // world_size for i in (0, 1))
        chosen = choose(folders, self.indexes, rows, _cache(reading))
        self._blocks = Blocks(chosen, reading.corrupt, say)
        of_sets = [(reader.index, block) for reader, block in chosen]
        self._sidecars = SidecarColumns(sidecars, self.indexes, of_sets) if sidecars else None
        self._blank = Stored.of(blank_row(self.schema), batch_columns(self.schema))
        self.domains = self._blocks.domains
        counts = np.bincount(self._blocks.domain, self._blocks.rows).astype(np.int64).tolist()
        self.rows_by_domain = dict(zip(self.domains, counts, strict=True))
        self.total_rows = sum(counts)

    @property
    def extended(self) -> bool:
        """Whether some of the sets may hold ids that only an added domain has."""
        return any(index.vocabulary.base_fingerprint for index in self.indexes)

    @property
    def skipped(self) -> list[Skipped]:
        """Corrupt blocks that this rank has met and left out, in the order of the sets."""
        return self._blocks.skipped

    def steps(self, epoch: int = 0) -> int:
        """Steps of an epoch, the same in every epoch and on every rank."""
        return sum(stream.order.steps for stream in self._streams(epoch))

    def batches(self, cursor: Cursor) -> Iterator[Batch]:
        """Batches from `cursor.step` to the end of the cursor's epoch.

        Rows of a skipped block are padding yet count in `Batch.rows`: ranks know the index, but
        not each other's corrupt blocks. The loss is smaller by their share of the batch.
        """
        streams = self._streams(cursor.epoch)
        steps = [stream.order.steps for stream in streams]
        plan = schedule(steps, self.reading.seed, cursor.epoch, self.shuffle)
        todo = range(cursor.step, len(plan.order))
        current: dict[int, tuple[Window, Columns]] = {}
        with (
            ThreadPoolExecutor(self.reading.threads, "read-ahead-block") as pool,
            closing(_read_ahead(self._windows(streams, plan, todo, pool))) as read,
            closing(_read_ahead(self._gather(*parts) for parts in read)) as windows,
        ):
            for step in todo:
                number, own = int(plan.order[step]), int(plan.step[step])
                if number not in current or own >= current[number][0].end:
                    current[number] = next(windows)
                window, columns = current[number]
                rows = streams[number].order.rows_in_step(own)
                yield columns.batch(own - window.first_step, rows)

    def _streams(self, epoch: int) -> list[_Stream]:
        pieces = self._pieces(epoch)
        if self.reading.sampler == "mixed":
            pieces = [Pieces.joined(pieces)]
        return [
            _Stream(part, self._order(part, epoch, number, len(pieces)))
            for number, part in enumerate(pieces)
        ]

    def _pieces(self, epoch: int) -> list[Pieces]:
        """What the epoch reads of each domain."""
        blocks, reading = self._blocks, self.reading
        by_domain = np.argsort(blocks.domain, kind="stable")
        own = np.split(by_domain, np.cumsum(np.bincount(blocks.domain))[:-1])
        whole = [Pieces.whole(numbers, blocks.rows[numbers]) for numbers in own]
        if reading.mix == "proportional" or not self.shuffle:
            return whole
        quota = quotas(list(self.rows_by_domain.values()), reading.temperature)
        return [
            domain_epoch(name, pieces, rows, reading.seed, epoch)
            for name, pieces, rows in zip(self.domains, whole, quota, strict=True)
        ]

    def _order(self, pieces: Pieces, epoch: int, number: int, streams: int) -> EpochOrder:
        return EpochOrder(
            block_rows=pieces.rows,
            seed=self.reading.seed,
            epoch=epoch,
            global_batch=self.reading.global_batch,
            lanes=self.reading.lanes,
            # the windows of all streams are held at once
            shuffle_rows=self.reading.shuffle_rows // streams,
            shuffle=self.shuffle,
            stream=number,
        )

    def _windows(
        self, streams: list[_Stream], plan: Schedule, steps: range, pool: Executor
    ) -> Iterator[tuple[_Stream, Window, Held]]:
        """The windows that the steps need, in the order in which they first need them."""
        ends = [0] * len(streams)
        kept: list[Held] = [{} for _ in streams]
        for step in steps:
            number, own = int(plan.order[step]), int(plan.step[step])
            if own < ends[number]:
                continue
            order = streams[number].order
            window = order.window(own // order.window_steps, *self._lanes)
            needed = streams[number].pieces.block[window.blocks] if window.real.any() else []
            # blocks that the next window may need again
            kept[number] = self._read(needed, kept[number], pool)
            ends[number] = window.end
            yield streams[number], window, kept[number]

    def _read(self, numbers: Sequence[int] | np.ndarray, before: Held, pool: Executor) -> Held:
        """The blocks of these numbers, in their order."""
        needed = sorted({int(number) for number in numbers})
        missing = [number for number in needed if number not in before]
        fresh = self._blocks.read(missing, pool, self.reading.threads)
        found = before | dict(zip(missing, fresh, strict=True))
        return {number: found[number] for number in needed}

    def _gather(self, stream: _Stream, window: Window, held: Held) -> tuple[Window, Columns]:
        """The rows of a window; those whose block was left out are padding."""
        numbers, first = (
            part[window.blocks] for part in (stream.pieces.block, stream.pieces.first)
        )
        found = [held.get(number) for number in numbers.tolist()]
        lost = np.array([stored is None for stored in found])
        if lost.any():
            window = replace(window, place=np.where(lost[window.which], -1, window.place))
            first = np.where(lost, 0, first)  # the blank block has one row
        some = [stored or self._blank for stored in found]
        domain = self._blocks.domain[numbers]
        columns = columns_of(self.schema, some, first, window.place, window.edges, domain)
        if self._sidecars is None:
            return window, columns
        which, rows = window.which, first[window.which] + window.row
        sidecars = self._sidecars.gather(numbers[which], rows, window.real)
        return window, replace(columns, sidecars=sidecars)


def _read_ahead(items: Iterator[T]) -> Generator[T]:
    """The same items, the next one made by a thread; closing waits for the thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        ahead = pool.submit(next, items, None)
        while (item := ahead.result()) is not None:
            ahead = pool.submit(next, items, None)
            yield item


def _cache(reading: Reading) -> BlockCache | None:
    return BlockCache(Path(reading.cache_dir), reading.cache_bytes) if reading.cache_dir else None


def require_divisible(reading: Reading, world_size: int) -> None:
    for what, count in (("global batch", reading.global_batch), ("number of lanes", reading.lanes)):
        if count % world_size:
            below, above = count - count % world_size, count + -count % world_size
            raise UserError(
                f"{what} {count} is not divisible by {world_size} ranks; "
                f"set it to {f'{below} or ' if below else ''}{above}, or change the ranks"
            )
