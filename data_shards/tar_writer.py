"""Blocks into the tar shards of one piece."""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import hashlib
import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from data_shards.durable import flush, unfinished
from data_shards.index import Block

_HEADER = 512


class TarShards:
    """Appends blocks to shards of about `shard_bytes`, and remembers where each block lies.

    A shard has its name once it is whole.
    """

    def __init__(self, folder: Path, piece: int, shard_bytes: int) -> None:
        self.folder, self.piece, self.shard_bytes = folder, piece, shard_bytes
        self.blocks: list[Block] = []
        self.sizes: dict[str, int] = {}
        self._tar: tarfile.TarFile | None = None
        self._name, self._beside = "", folder

    def add(self, domain: str, split: str, table: pa.Table) -> None:
        """Append one block."""
        data = _ipc(table)
        # one dot only: WebDataset takes what follows the first dot for the extension
        member = f"{split}-{self.piece:05d}-{len(self.blocks):08d}.arrow"
        tar = self._open_for(len(data))
        block = Block(
            shard=self._name,
            member=member,
            offset=tar.offset + _HEADER,
            bytes=len(data),
            rows=len(table),
            positives=int(pc.sum(table["label"]).as_py()),
            domain=domain,
            split=split,
            sha256=hashlib.sha256(data).hexdigest(),
            xxh3=xxhash.xxh3_64_hexdigest(data),
        )
        header = tarfile.TarInfo(member)
        header.size = len(data)
        tar.addfile(header, io.BytesIO(data))
        self.blocks.append(block)

    def _open_for(self, size: int) -> tarfile.TarFile:
        if self._tar is not None and self._tar.offset + size > self.shard_bytes:
            self.close()
        if self._tar is None:
            self._name = f"shard-{self.piece:05d}-{len(self.sizes):03d}.tar"
            self._beside = unfinished(self.folder / self._name)
            self._tar = tarfile.open(self._beside, "w", format=tarfile.USTAR_FORMAT)
        return self._tar

    def close(self) -> None:
        """End the shard being written."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None
            flush(self._beside)
            self.sizes[self._name] = self._beside.stat().st_size
            self._beside.replace(self.folder / self._name)


def _ipc(table: pa.Table) -> memoryview:
    sink = pa.BufferOutputStream()
    batch = table.combine_chunks()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_table(batch)
    return memoryview(sink.getvalue())
