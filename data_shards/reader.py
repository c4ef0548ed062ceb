"""One block at a time from a shard, by position, checked against the index."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from data_shards.errors import UserError
from data_shards.index import Block, Index


@dataclass(frozen=True)
class ShardReader:
    """Reads the blocks of the shard set in `folder`."""

    folder: Path
    index: Index
    verify: bool = True

    def read(self, block: Block) -> pa.Table:
        """The rows of a block; UserError where its bytes are not those that were written."""
        data = self._bytes(block)
        if self.verify and hashlib.sha256(data).hexdigest() != block.sha256:
            raise self._corrupt(block, "its SHA-256 differs from the index")
        try:
            table = pa.ipc.open_stream(data).read_all()
        except pa.ArrowInvalid as error:
            raise self._corrupt(block, str(error)) from error
        if len(table) != block.rows:
            raise self._corrupt(block, f"{len(table)} rows, the index says {block.rows}")
        return table

    def _bytes(self, block: Block) -> bytes:
        try:
            with (self.folder / block.shard).open("rb", buffering=0) as file:
                return os.pread(file.fileno(), block.bytes, block.offset)
        except OSError as error:
            raise self._corrupt(block, error.strerror or str(error)) from error

    def _corrupt(self, block: Block, why: str) -> UserError:
        return UserError(
            f"{self.folder / block.shard}, member {block.member} at byte {block.offset}: {why}; "
            "restore the shard from its source or write the shards again"
        )
