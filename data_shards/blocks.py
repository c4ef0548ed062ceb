"""The chosen blocks of one or several shard sets, by number, and what became of corrupt ones."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data_shards.errors import UserError
from data_shards.index import Block, Index
from data_shards.reader import CorruptBlockError, ShardReader
from data_shards.reading import Rows
from data_shards.storage import BlockCache
from data_shards.stored import Stored


@dataclass(frozen=True)
class Skipped:
    """A corrupt block that was left out: the rows [first_row, first_row + rows) of its set."""

    shard: str
    member: str
    first_row: int
    rows: int
    why: str


class Blocks:
    """Blocks by number, in the order of the sets; `domain` and `rows` are per block."""

    def __init__(
        self,
        chosen: Sequence[tuple[ShardReader, Block]],
        corrupt: Literal["error", "skip"],
        say: Callable[[str], None],
    ) -> None:
        self._chosen = chosen
        self._corrupt = corrupt
        self._say = say
        self._skipped: dict[int, Skipped] = {}
        self.domains = tuple(sorted({block.domain for _, block in chosen}))
        numbers = {name: number for number, name in enumerate(self.domains)}
        self.domain = np.array([numbers[block.domain] for _, block in chosen])
        self.rows = np.array([block.rows for _, block in chosen])

    @property
    def skipped(self) -> list[Skipped]:
        """The corrupt blocks met so far."""
        return [self._skipped[number] for number in sorted(self._skipped)]

    def read(self, numbers: Sequence[int], pool: Executor, threads: int) -> list[Stored | None]:
        """These blocks, fetched and checked by so many threads; None for a skipped one.

        Each thread has its share at once: to hand out a block takes half as long as to read it.
        """
        shares = np.array_split(np.array(numbers, np.int64), threads)
        found = [one for share in pool.map(self._read_all, shares) for one in share]
        for number, stored in zip(numbers, found, strict=True):
            if isinstance(stored, CorruptBlockError):
                self._skip(number, stored)
        return [None if isinstance(stored, CorruptBlockError) else stored for stored in found]

    def _read_all(self, numbers: np.ndarray) -> list[Stored | CorruptBlockError]:
        return [self._read(number) for number in numbers.tolist()]

    def _read(self, number: int) -> Stored | CorruptBlockError:
        reader, block = self._chosen[number]
        try:
            return reader.stored(block)
        except CorruptBlockError as error:
            if self._corrupt == "error":
                raise
            return error

    def _skip(self, number: int, error: CorruptBlockError) -> None:
        if number in self._skipped:
            return
        reader, block = self._chosen[number]
        index = reader.index
        first = int(index.row_starts[index.blocks.index(block)])
        self._skipped[number] = Skipped(block.shard, block.member, first, block.rows, str(error))
        self._say(f"left out the rows {first:,} to {first + block.rows - 1:,}: {error}")


def choose(
    folders: Sequence[Path | str],
    indexes: Sequence[Index],
    rows: Rows,
    cache: BlockCache | None,
) -> list[tuple[ShardReader, Block]]:
    """The blocks of all sets; with several sets a domain may be in some of them only."""
    everywhere = {domain for index in indexes for domain in index.domains}
    chosen = []
    for folder, index in zip(folders, indexes, strict=True):
        reader = ShardReader(folder, index, cache=cache if "://" in str(folder) else None)
        domains = rows.domains
        if domains is not None:
            domains = tuple(d for d in domains if d in index.domains or d not in everywhere)
        selected = index.select(rows.splits, domains)
        chosen += [(reader, block) for block in selected if block.rows]
    if not chosen:
        raise UserError(
            f"no rows in the splits {', '.join(rows.splits) or 'none'}"
            f" of the domains {'all' if rows.domains is None else ', '.join(rows.domains)}; "
            "choose others (`inspect` lists the rows of each)"
        )
    return chosen


def require_one_schema(folders: Sequence[Path | str], indexes: Sequence[Index]) -> None:
    """UserError unless all sets have the same fields, the ids of one vocabulary, and other rows."""
    if not indexes:
        raise UserError("no shard set is given; name one folder at least")
    known: dict[str, Path | str] = {}
    for folder, index in zip(folders, indexes, strict=True):
        if index.fingerprint in known:
            raise UserError(
                f"{folder}: is {known[index.fingerprint]} or a copy of it, whose rows would be "
                "read twice; name it once"
            )
        known[index.fingerprint] = folder
        index.require_schema(indexes[0].schema)
        if index.vocabulary.trunk != indexes[0].vocabulary.trunk:
            raise UserError(
                f"{folder}: its ids are not those of {folders[0]} (another vocabulary); "
                "write it with the base vocabulary of the first"
            )
