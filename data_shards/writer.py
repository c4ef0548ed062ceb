"""Rows to tar shards of columnar blocks, with the index last and the whole set renamed into place.

A block holds rows of one domain and one split, so that choosing blocks chooses rows. Three passes
over the source: labels and times (17 bytes a row are kept) decide the splits, training rows the
vocabulary, and the third pass writes; buffers hold at most a block per domain and split.
"""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_shards.errors import UserError, unknown
from data_shards.index import Block, Index, VocabularyInfo
from data_shards.schema import Schema
from data_shards.sources.source import Source
from data_shards.splits import SplitConfig, assign
from data_shards.vocabulary import Vocabulary, count_values

Progress = Callable[[str], None]
_HEADER = 512


def write_shards(  # noqa: PLR0913  keyword-only: each is one choice of the user
    source: Source,
    schema: Schema,
    split: SplitConfig,
    out: Path,
    *,
    block_rows: int = 4096,
    shard_bytes: int = 256 << 20,
    only_domains: tuple[str, ...] = (),
    hold_out: tuple[str, ...] = (),
    base: Vocabulary | None = None,
    progress: Progress = lambda _: None,
) -> Index:
    """Write a shard set into the new folder `out`; nothing is left behind on an error.

    `hold_out` domains are left out and count in no vocabulary; with `only_domains` all others
    are. With `base` ids extend the vocabulary of the trunk.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; give another path or delete it")
    if base is not None and base.schema != schema:
        field = base.schema.first_difference(schema)
        raise UserError(f"the base vocabulary is of another schema: field {field!r} differs")
    rows = _Rows(source, split, only_domains, hold_out)
    progress(f"{rows.kept:,} rows of {len(rows.domains)} domains")
    vocabulary = _vocabulary(rows, schema, base)
    progress("vocabulary: " + ", ".join(f"{k} {v:,}" for k, v in vocabulary.sizes.items()))
    with _new_folder(out) as folder:
        vocabulary.save(folder / "vocabulary")
        tar = _ShardWriter(folder, shard_bytes)
        for group, table in _blocks(rows, vocabulary, block_rows):
            domain, part = divmod(group, len(split.names))
            tar.add(rows.domains, domain, split.names[part], table)
        tar.close()
        index = Index(
            schema=schema,
            domains=rows.domains,
            blocks=tuple(tar.blocks),
            shards=tar.shards,
            vocabulary=VocabularyInfo.of(vocabulary),
            source=source.config.describe(),
            split=split,
            dropped=source.dropped() | rows.dropped,
        )
        index.save(folder)
    progress(f"{index.rows:,} rows in {len(index.blocks):,} blocks, {len(index.shards)} shards")
    return index


class _Rows:
    """The rows that are kept, each with its group: domain number * parts + part."""

    def __init__(
        self, source: Source, split: SplitConfig, only: tuple[str, ...], hold_out: tuple[str, ...]
    ) -> None:
        self.source = source
        self.split = split
        names, code, label, time = _first_pass(source)
        for name in (*only, *hold_out):
            if name not in names:
                raise unknown("domain", name, names)
        kept = [n for n in sorted(names) if n not in hold_out and (not only or n in only)]
        if not kept:
            raise UserError("no domain is left to write; hold out fewer")
        self.domains = tuple(kept)
        self.group = np.full(len(code), -1, np.int32)
        order = np.argsort(code, kind="stable")
        ends = np.cumsum(np.bincount(code))
        for number, name in enumerate(kept):
            place = names[name]
            rows = order[ends[place - 1] if place else 0 : ends[place]]
            part = assign(split, name, label[rows], time[rows])
            self.group[rows] = number * len(split.names) + part
        self.kept = int((self.group >= 0).sum())
        left_out = len(code) - self.kept
        self.dropped = {"other_domains": left_out} if left_out else {}

    def tables(self) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """(raw rows, their groups), without the rows that are left out."""
        start = 0
        for table in self.source.tables():
            group = self.group[start : start + len(table)]
            start += len(table)
            yield table.filter(pa.array(group >= 0)), group[group >= 0]


def _first_pass(source: Source) -> tuple[dict[str, int], np.ndarray, np.ndarray, np.ndarray]:
    """Number of each domain name, and per row the number of its domain, label and time."""
    names: dict[str, int] = {}
    code, label, time = [], [], []
    for table in source.tables():
        domains = table["domain"].combine_chunks().dictionary_encode()
        numbers = [names.setdefault(n, len(names)) for n in domains.dictionary.to_pylist()]
        code.append(np.array(numbers, np.int32)[domains.indices.to_numpy()])
        label.append(table["label"].to_numpy() > 0.5)
        time.append(table["time"].to_numpy())
    if not names:
        raise UserError("the source has no rows")
    return names, np.concatenate(code), np.concatenate(label), np.concatenate(time)


def _vocabulary(rows: _Rows, schema: Schema, base: Vocabulary | None) -> Vocabulary:
    parts = rows.split.names
    training = [parts.index(name) for name in rows.split.vocabulary_parts]
    tables = (
        table.filter(pa.array(np.isin(group % len(parts), training)))
        for table, group in rows.tables()
    )
    counts = reduce(lambda before, table: count_values(schema, table, before), tables, None)
    assert counts is not None
    return base.extend(counts) if base else Vocabulary.build(schema, counts)


def _blocks(rows: _Rows, vocabulary: Vocabulary, block_rows: int) -> Iterator[tuple[int, pa.Table]]:
    """(group, encoded rows) of at most `block_rows`, each group in the order of the source."""
    columns = ["row_id", "label", "time", *(f.name for f in vocabulary.schema.fields)]
    buffers: dict[int, pa.Table] = {}
    for table, group in rows.tables():
        encoded = vocabulary.encode(table).select(columns)
        for number, part in _by_group(encoded, group):
            buffer = pa.concat_tables([buffers[number], part]) if number in buffers else part
            full = len(buffer) - len(buffer) % block_rows
            for start in range(0, full, block_rows):
                yield number, buffer.slice(start, block_rows)
            # `take` copies, so that the rest does not keep the whole encoded table alive
            buffers[number] = buffer.take(np.arange(full, len(buffer)))
    for number in sorted(buffers):
        if len(buffers[number]):
            yield number, buffers[number]


def _by_group(table: pa.Table, group: np.ndarray) -> Iterator[tuple[int, pa.Table]]:
    order = np.argsort(group, kind="stable")
    table, group = table.take(order), group[order]
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(group)], strict=True):
        yield int(group[start]), table.slice(start, stop - start)


class _ShardWriter:
    """Appends blocks to tar shards of about `shard_bytes` and remembers where each lies."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.blocks: list[Block] = []
        self.shards: dict[str, int] = {}
        self._tar: tarfile.TarFile | None = None
        self._name = ""

    def add(self, domains: tuple[str, ...], domain: int, split: str, table: pa.Table) -> None:
        """Append one block."""
        data = _ipc(table)
        # one dot only: WebDataset takes what follows the first dot for the extension
        member = f"{split}-{domain:05d}-{len(self.blocks):08d}.arrow"
        tar = self._open_for(len(data))
        block = Block(
            shard=self._name,
            member=member,
            offset=tar.offset + _HEADER,
            bytes=len(data),
            rows=len(table),
            positives=int(pc.sum(table["label"]).as_py()),
            domain=domains[domain],
            split=split,
            sha256=hashlib.sha256(data).hexdigest(),
        )
        header = tarfile.TarInfo(member)
        header.size = len(data)
        tar.addfile(header, io.BytesIO(data))
        self.blocks.append(block)

    def _open_for(self, size: int) -> tarfile.TarFile:
        if self._tar is not None and self._tar.offset + size > self.shard_bytes:
            self.close()
        if self._tar is None:
            self._name = f"shard-{len(self.shards):05d}.tar"
            self._tar = tarfile.open(self.folder / self._name, "w", format=tarfile.USTAR_FORMAT)
        return self._tar

    def close(self) -> None:
        """End the shard being written."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None
            self.shards[self._name] = (self.folder / self._name).stat().st_size


def _ipc(table: pa.Table) -> memoryview:
    sink = pa.BufferOutputStream()
    batch = table.combine_chunks()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_table(batch)
    return memoryview(sink.getvalue())


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` at the end, or is removed on an error."""
    folder = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True)
        yield folder
        for path in sorted(folder.rglob("*")):
            _flush(path)
        folder.rename(out)
    except OSError as error:
        raise UserError(
            f"{out}: could not be written ({error.strerror or error}); nothing is left there; "
            "free some space or give another path"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
