"""Every byte of a shard set against its index: what `inspect --verify` runs."""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from data_shards.errors import UserError
from data_shards.index import Block, Index
from data_shards.reader import ShardReader
from data_shards.storage import Storage, open_storage
from data_shards.tars import Member, members

MOST = 1000  # problems that are listed


@dataclass(frozen=True)
class Report:
    """What was read, and each thing that is not as the index says."""

    location: str
    shards: int
    blocks: int
    rows: int
    positives: int
    problems: tuple[str, ...]
    tokens: dict[str, tuple[float, int]]
    """Mean and largest number of a row's tokens, by field."""

    @property
    def sound(self) -> bool:
        """Whether everything is as the index says."""
        return not self.problems

    def require_sound(self) -> None:
        """UserError with the problems, unless there are none."""
        if self.problems:
            listed = "; ".join(self.problems[:10])
            more = f"; and {len(self.problems) - 10} more" if len(self.problems) > 10 else ""
            raise UserError(f"{self.location}: {len(self.problems)} problems: {listed}{more}")


def verify(location: str | Path, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Read every shard and compare it with the index, in memory for one block at a time."""
    check = _Check(ShardReader(location, Index.load(location), verify=False))
    for number, shard in enumerate(check.index.shards, 1):
        check.shard(shard)
        progress(f"{number} of {len(check.index.shards)} shards, {check.total['rows']:,} rows")
    check.totals()
    return Report(
        location=str(location),
        shards=len(check.index.shards),
        blocks=check.total["blocks"],
        rows=check.total["rows"],
        positives=check.total["positives"],
        problems=tuple(check.problems),
        tokens={
            name: (total / max(check.total["rows"], 1), check.longest[name])
            for name, total in check.tokens.items()
        },
    )


class _Check:
    """The problems found so far, and totals of what was sound."""

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader
        self.index = reader.index
        self.problems: list[str] = []
        self.total: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.longest: Counter[str] = Counter()
        self._by_shard: dict[str, list[Block]] = {name: [] for name in self.index.shards}
        for block in self.index.blocks:
            if block.shard in self._by_shard:
                self._by_shard[block.shard].append(block)
            else:
                self._add(f"block {block.member}: its shard {block.shard} is not in the index")

    def _add(self, problem: str) -> None:
        if len(self.problems) < MOST:
            self.problems.append(problem)

    def shard(self, name: str) -> None:
        """Members against blocks, one to one; then each block's content."""
        where = f"{self.reader.storage}/{name}"
        found = self._members(name)
        twice = [member for member, count in Counter(m.name for m in found).items() if count > 1]
        for member in twice:
            self._add(f"{where}, member {member}: stands twice in the tar")
        at = {(member.name, member.offset): member for member in found}
        for block in self._by_shard[name]:
            member = at.pop((block.member, block.offset), None)
            if member is None or member.size != block.bytes:
                self._add(
                    f"{where}, member {block.member} at byte {block.offset}: the tar has no member "
                    f"of this name and {block.bytes} bytes there"
                )
            self._block(block)
        for member in at.values():
            self._add(f"{where}, member {member.name} at byte {member.offset}: not in the index")

    def _members(self, name: str) -> list[Member]:
        found: list[Member] = []
        try:
            found.extend(members(self.reader.storage, name))
        except UserError as error:
            self._add(str(error))
        return found

    def _block(self, block: Block) -> None:
        try:
            data = self.reader.fetch(block)
            if hashlib.sha256(data).hexdigest() != block.sha256:
                raise self.reader.corrupt(block, "its SHA-256 differs from the index")
            self.reader.check(block, data)
            table = self.reader.parse(block, data)
            if (problem := _wrong_rows(self.index, block, table)) is not None:
                raise self.reader.corrupt(block, problem)
        except UserError as error:
            self._add(str(error))
            return
        self.total.update(blocks=1, rows=block.rows, positives=block.positives)
        for field in self.index.schema.tokens:
            lengths = pc.list_value_length(table[field.name])
            self.tokens[field.name] += pc.sum(lengths).as_py()
            self.longest[field.name] = max(self.longest[field.name], pc.max(lengths).as_py())

    def totals(self) -> None:
        """What was read against what the index says of the whole."""
        if not self.problems and self.total["rows"] != self.index.rows:
            self._add(f"{self.total['rows']} rows were read, the index says {self.index.rows}")


def _wrong_rows(index: Index, block: Block, table: pa.Table) -> str | None:
    """What a block's rows break of what the index says; None if nothing."""
    solid = [field.name for field in index.schema.fields if field.kind != "text"]
    if empty := [name for name in solid if table[name].null_count]:
        return f"{empty[0]!r} has rows without a value"
    for field in index.schema.ids:
        ids = pc.list_flatten(table[field.name]) if field.multi else table[field.name]
        if not _within(ids, 0, index.vocabulary.sizes[field.name] - 1):
            return f"an id of {field.name!r} is outside of its table"
    for number in index.schema.numbers:
        if not pc.all(pc.is_finite(table[number.name])).as_py():
            return f"a number of {number.name!r} is not finite"
    return _wrong_labels(block, table) or _wrong_row_ids(table)


def _wrong_labels(block: Block, table: pa.Table) -> str | None:
    label = table["label"]
    if not pc.all(pc.is_in(label, pa.array([0, 1], pa.float32()))).as_py():
        return "a label is neither 0 nor 1"
    positives = int(pc.sum(label).as_py() or 0)
    if positives != block.positives:
        return f"{positives} positives, the index says {block.positives}"
    return None


def _wrong_row_ids(table: pa.Table) -> str | None:
    ids = table["row_id"]
    if not _within(ids, 0, None) or pc.count_distinct(ids).as_py() < len(table):
        return "a row_id is negative or stands twice"
    return None


def _within(values: pa.ChunkedArray, least: float, most: float | None) -> bool:
    ends = pc.min_max(values).as_py()
    if values.null_count or ends["min"] is None:
        return not values.null_count
    return ends["min"] >= least and (most is None or ends["max"] <= most)


def reindexed(index: Index, location: str | Path, shards: list[str]) -> Index:
    """The index of the same blocks where they lie now: in these tars, written by any tool.

    Blocks are known by their SHA-256; UserError where one is missing.
    """
    storage = open_storage(location)
    found = dict(_digests(storage, shards))
    missing = [block.member for block in index.blocks if block.sha256 not in found]
    if missing:
        raise UserError(
            f"{storage}: {len(missing)} blocks of the index are in none of the tars, the first is "
            f"{missing[0]}; name all tars that hold them"
        )
    moved = tuple(
        dataclasses.replace(block, shard=shard, member=member.name, offset=member.offset)
        for block in index.blocks
        for shard, member in [found[block.sha256]]
    )
    sizes = {shard: storage.size(shard) or 0 for shard in shards}
    return dataclasses.replace(index, blocks=moved, shards=sizes)


def _digests(storage: Storage, shards: list[str]) -> Iterator[tuple[str, tuple[str, Member]]]:
    for shard in shards:
        for member in members(storage, shard):
            data = storage.read_range(shard, member.offset, member.size)
            yield hashlib.sha256(data).hexdigest(), (shard, member)
