"""Batches of one rank, from any cursor, with the next window read ahead by one thread."""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from data_shards.batch import Batch, Columns, gather
from data_shards.errors import UserError
from data_shards.index import Block, Index
from data_shards.order import EpochOrder, Schedule, Window, schedule
from data_shards.reader import ShardReader


@dataclass(frozen=True)
class Rows:
    """Which rows: these splits, of these domains (None: of all)."""

    splits: tuple[str, ...]
    domains: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Reading:
    """How rows are read. `domain_pure`: every global batch holds rows of one domain only."""

    global_batch: int = 1024
    lanes: int = 24
    shuffle_rows: int = 262144
    sampler: Literal["mixed", "domain_pure"] = "mixed"
    seed: int = 1

    def __post_init__(self) -> None:
        if min(self.global_batch, self.lanes, self.shuffle_rows) < 1:
            raise UserError("reading: global_batch, lanes and shuffle_rows are 1 or more")
        if self.seed < 0:
            raise UserError(f"reading: seed is 0 or more, not {self.seed}")
        if self.sampler not in ("mixed", "domain_pure"):
            raise UserError(f"reading: sampler is mixed or domain_pure, not {self.sampler!r}")
        if self.lanes > self.global_batch:
            raise UserError(
                f"reading: {self.lanes} lanes cannot share a global batch of "
                f"{self.global_batch}; set lanes to at most {self.global_batch}"
            )


@dataclass(frozen=True)
class Cursor:
    """The next step to read, and nothing else."""

    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class _Located:
    """A block, the reader of its shard set, and the index of its domain."""

    reader: ShardReader
    block: Block
    domain: int


class Loader:
    """Batches of rank `rank` of `world_size` over one or several shard sets of one schema."""

    def __init__(
        self,
        folder: Path | Sequence[Path],
        rows: Rows,
        reading: Reading,
        rank: int,
        world_size: int,
        shuffle: bool = True,
    ) -> None:
        _require_divisible(reading, world_size)
        folders = [folder] if isinstance(folder, Path) else list(folder)
        self.indexes = tuple(Index.load(path) for path in folders)
        _require_one_schema(folders, self.indexes)
        self.schema = self.indexes[0].schema
        self.reading = reading
        self.shuffle = shuffle
        self._lanes = tuple((rank + i) * reading.lanes // world_size for i in (0, 1))
        self._share = reading.global_batch // world_size
        chosen = _choose(folders, self.indexes, rows)
        self.domains = tuple(sorted({block.domain for _, block in chosen}))
        numbers = {name: number for number, name in enumerate(self.domains)}
        located = [_Located(reader, block, numbers[block.domain]) for reader, block in chosen]
        self.rows_by_domain = dict.fromkeys(self.domains, 0)
        for item in located:
            self.rows_by_domain[item.block.domain] += item.block.rows
        self.total_rows = sum(self.rows_by_domain.values())
        self._streams = [located]
        if reading.sampler == "domain_pure":
            self._streams = [[i for i in located if i.domain == d] for d in numbers.values()]

    @property
    def extended(self) -> bool:
        """Whether some of the sets may hold ids that only an added domain has."""
        return any(index.vocabulary.base_fingerprint for index in self.indexes)

    def steps(self, epoch: int = 0) -> int:
        """Steps of an epoch, the same in every epoch and on every rank."""
        return sum(order.steps for order in self._orders(epoch))

    def batches(self, cursor: Cursor) -> Iterator[Batch]:
        """Batches from `cursor.step` to the end of the cursor's epoch."""
        orders = self._orders(cursor.epoch)
        plan = schedule([o.steps for o in orders], self.reading.seed, cursor.epoch, self.shuffle)
        steps = range(cursor.step, len(plan.order))
        windows = _read_ahead(self._windows(orders, plan, steps))
        current: dict[int, tuple[Window, Columns]] = {}
        try:
            for step in steps:
                number, own = int(plan.order[step]), int(plan.step[step])
                if number not in current or own >= _end(current[number][0]):
                    current[number] = next(windows)
                window, columns = current[number]
                start = (own - window.first_step) * self._share
                yield columns.batch(start, start + self._share, orders[number].rows_in_step(own))
        finally:
            windows.close()

    def _orders(self, epoch: int) -> list[EpochOrder]:
        reading = self.reading
        return [
            EpochOrder(
                block_rows=np.array([item.block.rows for item in stream]),
                seed=reading.seed,
                epoch=epoch,
                global_batch=reading.global_batch,
                lanes=reading.lanes,
                # the windows of all streams are held at once
                shuffle_rows=reading.shuffle_rows // len(self._streams),
                shuffle=self.shuffle,
                stream=number,
            )
            for number, stream in enumerate(self._streams)
        ]

    def _windows(
        self, orders: list[EpochOrder], plan: Schedule, steps: range
    ) -> Iterator[tuple[Window, Columns]]:
        """The windows that the steps need, in the order in which they first need them."""
        ends = [0] * len(orders)
        kept: list[dict[int, pa.Table]] = [{} for _ in orders]
        for step in steps:
            number, own = int(plan.order[step]), int(plan.step[step])
            if own < ends[number]:
                continue
            order = orders[number]
            window = order.window(own // order.window_steps, *self._lanes)
            stream = self._streams[number]
            kept[number], columns = self._assemble(stream, window, kept[number])
            ends[number] = _end(window)
            yield window, columns

    def _assemble(
        self, stream: list[_Located], window: Window, before: dict[int, pa.Table]
    ) -> tuple[dict[int, pa.Table], Columns]:
        """(blocks that the next window may need again, rows in order)."""
        needed, position = np.unique(window.block, return_inverse=True)
        tables = {
            int(b): before[b] if b in before else stream[b].reader.read(stream[b].block)
            for b in needed
        }
        lengths = [len(table) for table in tables.values()]
        starts = np.cumsum([0, *lengths[:-1]])
        domain = np.array([stream[b].domain for b in needed], np.int64)
        take = starts[position] + window.row
        columns = gather(self.schema, list(tables.values()), take, domain[position], window.real)
        return tables, columns


def _end(window: Window) -> int:
    return window.first_step + window.steps


def _read_ahead(
    items: Iterator[tuple[Window, Columns]],
) -> Generator[tuple[Window, Columns]]:
    """The same items, the next one made by a thread; closing waits for the thread."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        ahead = pool.submit(next, items, None)
        while (item := ahead.result()) is not None:
            ahead = pool.submit(next, items, None)
            yield item


def _require_divisible(reading: Reading, world_size: int) -> None:
    for what, count in (("global batch", reading.global_batch), ("number of lanes", reading.lanes)):
        if count % world_size:
            below, above = count - count % world_size, count + -count % world_size
            raise UserError(
                f"{what} {count} is not divisible by {world_size} ranks; "
                f"set it to {f'{below} or ' if below else ''}{above}, or change the ranks"
            )


def _require_one_schema(folders: list[Path], indexes: tuple[Index, ...]) -> None:
    if not indexes:
        raise UserError("no shard set is given; name one folder at least")
    for folder, index in zip(folders[1:], indexes[1:], strict=True):
        index.require_schema(indexes[0].schema)
        if index.vocabulary.trunk != indexes[0].vocabulary.trunk:
            raise UserError(
                f"{folder}: its ids are not those of {folders[0]} (another vocabulary); "
                "write it with the base vocabulary of the first"
            )


def _choose(
    folders: list[Path], indexes: tuple[Index, ...], rows: Rows
) -> list[tuple[ShardReader, Block]]:
    """The blocks of all sets; with several sets a domain may be in some of them only."""
    everywhere = {domain for index in indexes for domain in index.domains}
    chosen = []
    for folder, index in zip(folders, indexes, strict=True):
        reader = ShardReader(folder, index)
        domains = rows.domains
        if domains is not None:
            domains = tuple(d for d in domains if d in index.domains or d not in everywhere)
        chosen += [(reader, block) for block in index.select(rows.splits, domains)]
    if not chosen:
        raise UserError(
            f"no rows in the splits {', '.join(rows.splits) or 'none'}"
            f" of the domains {'all' if rows.domains is None else ', '.join(rows.domains)}; "
            "choose others (`inspect` lists the rows of each)"
        )
    return chosen
