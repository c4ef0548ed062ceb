"""The work on one piece of a source, in whatever process it is done: count, or write its shards.

Every stage reads the piece once and leaves its result under a name of its own, last of all
`<stage>-<piece>.json`, so that a result that is there is whole. A piece's shards depend on the
piece and on what all pieces were counted to together, never on who wrote them or beside whom.
"""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_shards.durable import unfinished
from data_shards.prompted import Prompter
from data_shards.row_ids import RowIds
from data_shards.schema import Schema
from data_shards.sources.source import Source
from data_shards.splits import SplitConfig, count_rows, split_of
from data_shards.stratified import summed
from data_shards.tar_writer import TarShards
from data_shards.vocabulary import ValueCounter, Vocabulary, save_counts

WINDOW = 1 << 20  # encoded rows that are sorted into blocks together
WINDOW_BYTES = 256 << 20  # or fewer of them: long texts
MOST_WAITING = (
    1 << 20
)  # rows that may wait for their block to fill; then the largest blocks go short
COUNTS, BEFORE = "counts.arrow", "before"
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """All that decides the shards, and the folder in which they are made."""

    source: Source
    schema: Schema
    split: SplitConfig
    folder: Path
    block_rows: int
    shard_bytes: int
    only: tuple[str, ...]
    hold_out: tuple[str, ...]
    base_sizes: dict[str, int] | None
    base_fingerprint: str | None
    prompter: Prompter | None = None

    def keeps(self, domain: str) -> bool:
        """Whether the set holds this domain."""
        return domain not in self.hold_out and (not self.only or domain in self.only)

    def describe_source(self) -> dict[str, Any]:
        """What decides the rows, their prompts among it."""
        prompt = {"prompt": self.prompter.describe()} if self.prompter else {}
        return self.source.describe() | prompt

    def result(self, stage: str, piece: int) -> Path:
        """The file whose presence says that the stage is done for the piece."""
        return self.folder / f"{stage}-{piece:05d}.json"

    def table(self, stage: str, piece: int) -> Path:
        """The Arrow file that a stage leaves for the piece."""
        return self.folder / f"{stage}-{piece:05d}.arrow"


@dataclass
class Found:
    """What reading a piece came across: rows per domain (of all domains), and rows left out."""

    domains: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)


def count_piece(job: Job, piece: int, tick: Tick) -> None:
    """Stage `rows`: rows per domain and label or time, of all domains, for the split."""
    found = Found()
    counts = []
    for table in _tables(job, piece, found, tick):
        counts.append(count_rows(job.split, table))
        if len(counts) == 64:
            counts = [summed(counts)]
    write_table(job.table("rows", piece), summed(counts))
    _done(job, "rows", piece, found, {})


def values_piece(job: Job, piece: int, tick: Tick) -> None:
    """Stage `values`: how often each value of each frequency field stands in a training row."""
    found = Found()
    names = job.split.names
    training = [names.index(name) for name in job.split.vocabulary_parts]
    counter = ValueCounter(job.schema)
    for table, part in _kept(job, piece, found, tick):
        counter.add(table.filter(pa.array(np.isin(part, training))))
    save_counts(counter.counts(), job.folder / f"values-{piece:05d}")
    _done(job, "values", piece, found, {})


def write_piece(job: Job, piece: int, tick: Tick) -> None:
    """Stage `blocks`: the piece's tar shards."""
    found, names = Found(), job.split.names
    vocabulary = Vocabulary.load(
        job.folder / "vocabulary", job.schema, job.base_sizes, job.base_fingerprint
    )
    domains: list[str] = []  # as they come: a group is named by its domain's place here
    shards = TarShards(job.folder, piece, job.shard_bytes)
    ids = RowIds(job.folder, piece, job.source.pieces())
    rows = _noted(ids, _prompted(job, found, _kept(job, piece, found, tick)))
    encoded = _encoded(job, vocabulary, rows, domains)
    for group, table in cut(encoded, job.block_rows):
        domain, part = divmod(group, len(names))
        shards.add(domains[domain], names[part], table)
    shards.close()
    ids.close()
    result = {
        "blocks": [astuple(block) for block in shards.blocks],
        "shards": shards.sizes,
        "ids": [astuple(run) for run in ids.runs],
    }
    _done(job, "blocks", piece, found, result)


def _noted(
    ids: RowIds, rows: Iterator[tuple[pa.Table, np.ndarray]]
) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """The same rows, their ids noted."""
    for table, part in rows:
        ids.add(table["row_id"].to_numpy())
        yield table, part


def _prompted(
    job: Job, found: Found, rows: Iterator[tuple[pa.Table, np.ndarray]]
) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """The same rows, with tokens where the set has prompts."""
    for table, part in rows:
        yield job.prompter.add(table, found.dropped) if job.prompter else table, part


def _tables(job: Job, piece: int, found: Found, tick: Tick) -> Iterator[pa.Table]:
    """All raw rows of a piece."""
    for table in job.source.read(piece, found.dropped):
        for count in table["domain"].value_counts():
            found.domains[count["values"].as_py()] += count["counts"].as_py()
        yield table
        tick(len(table))


def _kept(job: Job, piece: int, found: Found, tick: Tick) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """(raw rows that the set holds, the part of each)."""
    counts = _counts(job) if job.split.counted else None
    standing = read_table(job.table(BEFORE, piece)) if job.split.by == "per_domain" else None
    split = split_of(job.split, counts, standing)
    for table in _tables(job, piece, found, tick):
        part = split.parts(table)
        domains = table["domain"].combine_chunks().dictionary_encode()
        kept = np.array([job.keeps(name) for name in domains.dictionary.to_pylist()], bool)
        wanted = kept[domains.indices.to_numpy()]
        found.dropped["other_domains"] += int((~wanted).sum())
        found.dropped["after_the_last_part"] += int((wanted & (part < 0)).sum())
        wanted &= part >= 0
        if wanted.all():
            yield table, part
        elif wanted.any():
            yield table.filter(pa.array(wanted)), part[wanted]


def _counts(job: Job) -> pa.Table:
    """What the split goes by: of domains cut by their own times, those that the set holds."""
    counts = read_table(job.folder / COUNTS)
    if job.split.by != "time_per_domain":
        return counts
    names = counts["domain"].unique().to_pylist()
    kept = pa.array([name for name in names if job.keeps(name)], pa.string())
    return counts.filter(pc.is_in(counts["domain"], kept))


def _encoded(
    job: Job,
    vocabulary: Vocabulary,
    rows: Iterator[tuple[pa.Table, np.ndarray]],
    domains: list[str],
) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """(rows of a block's columns, group of each); new domains are appended to `domains`."""
    numbers: dict[str, int] = {}
    for table, part in rows:
        encoded_domain = table["domain"].combine_chunks().dictionary_encode()
        names = encoded_domain.dictionary.to_pylist()
        places = np.array([numbers.setdefault(name, len(numbers)) for name in names])
        domains.extend(list(numbers)[len(domains) :])
        columns = ["row_id", "label", "time"]
        columns += ["probability"] if "probability" in table.column_names else []
        columns += [one.name for one in job.schema.fields]
        encoded = vocabulary.encode(table).select(columns)
        yield encoded, places[encoded_domain.indices.to_numpy()] * len(job.split.names) + part


def cut(
    rows: Iterator[tuple[pa.Table, np.ndarray]], block_rows: int
) -> Iterator[tuple[int, pa.Table]]:
    """(group, rows) of at most `block_rows`, each group in the order of the source.

    Rows wait until their group fills a block. Memory stays bounded whatever the number of
    groups: where too many wait, the groups with most of them get a short block.
    """
    tables: list[pa.Table] = []
    groups: list[np.ndarray] = []
    fresh = size = 0
    for table, group in rows:
        tables.append(table)
        groups.append(group)
        fresh, size = fresh + len(table), size + table.nbytes
        if fresh >= WINDOW or size >= WINDOW_BYTES:
            blocks, rest = _sorted_out(tables, groups, block_rows, MOST_WAITING)
            yield from blocks
            tables, groups = [rest[0]], [rest[1]]
            fresh = size = 0
    if sum(map(len, tables)):
        yield from _sorted_out(tables, groups, block_rows, 0)[0]


def _sorted_out(
    tables: list[pa.Table], groups: list[np.ndarray], block_rows: int, most_waiting: int
) -> tuple[list[tuple[int, pa.Table]], tuple[pa.Table, np.ndarray]]:
    """(blocks, (rows that wait, their groups))."""
    group = np.concatenate(groups)
    order = np.argsort(group, kind="stable")
    table = pa.concat_tables(tables).combine_chunks().take(pa.array(order))
    group = group[order]
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    sizes = np.diff(starts, append=len(group))
    rest = sizes % block_rows
    if rest.sum() > most_waiting:
        largest = np.argsort(-rest, kind="stable")
        left = rest.sum() - np.cumsum(rest[largest])
        rest[largest[: int((left > most_waiting // 2).sum()) + 1]] = 0
    blocks = [
        (int(group[start]), table.slice(first, min(block_rows, start + size - left - first)))
        for start, size, left in zip(starts, sizes, rest, strict=True)
        for first in range(start, start + size - left, block_rows)
    ]
    waits = np.concatenate(
        [np.arange(s + n - left, s + n) for s, n, left in zip(starts, sizes, rest, strict=True)]
    )
    # `take` copies, so that the rest does not keep the whole window alive
    return blocks, (table.take(pa.array(waits, pa.int64())), group[waits])


def _done(job: Job, stage: str, piece: int, found: Found, result: dict[str, Any]) -> None:
    said = {"domains": found.domains, "dropped": +found.dropped, **result}
    path = job.result(stage, piece)
    beside = unfinished(path)
    beside.write_text(json.dumps(said), encoding="utf-8")
    beside.replace(path)


def write_table(path: Path, table: pa.Table) -> None:
    """An Arrow IPC file, whole or not at all."""
    beside = unfinished(path)
    with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    beside.replace(path)


def read_table(path: Path) -> pa.Table:
    """The inverse of `write_table`."""
    with pa.OSFile(str(path), "rb") as file:
        return pa.ipc.open_file(file).read_all()
