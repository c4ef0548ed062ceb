"""One vector per text of a text table, in a plain memory-mapped array.

The folder holds `vectors.bin`, little-endian [texts, width], and `vectors.json`, written last.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from data_shards.errors import UserError, unknown
from data_shards.row_files import (
    RowFiles,
    file_digest,
    load_manifest,
    mapped,
    require,
    require_made_by,
)
from data_shards.texts import TextTable

FORMAT = 1
BLOCK = 4096  # texts whose vectors are written together
_MANIFEST, _FILE = "vectors.json", "vectors.bin"
# numpy has no bfloat16: its bits pass as integers
_DTYPES = {
    "float32": (torch.float32, np.dtype("<f4")),
    "float16": (torch.float16, np.dtype("<f2")),
    "bfloat16": (torch.bfloat16, np.dtype("<i2")),
}
_CONTENT = {
    "format": int,
    "texts": str,
    "made_by": dict,
    "count": int,
    "width": int,
    "dtype": str,
    "sha256": dict,
}


class VectorWriter:
    """Writes vectors by block of `BLOCK` texts; see `RowFiles` for ranks and resuming."""

    def __init__(  # noqa: PLR0913  what it holds, what made it, and whose part this is
        self,
        folder: Path,
        table: TextTable,
        width: int,
        dtype: str,
        made_by: Mapping[str, Any],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if width < 1:
            raise UserError(f"{folder}: the width of vectors is 1 or more, not {width}")
        self._width, (self._dtype, kind) = width, _dtype(dtype)
        self._texts = table.texts
        plan = {
            "format": FORMAT,
            "texts": table.fingerprint,
            "made_by": made_by,
            "count": len(table),
            "width": width,
            "dtype": dtype,
        }
        starts = np.append(np.arange(0, len(table), BLOCK), len(table))
        sizes = {_FILE: width * kind.itemsize}
        self._rows = RowFiles(folder / _MANIFEST, plan, sizes, starts, rank, world_size)

    @property
    def todo(self) -> list[int]:
        """This rank's blocks that are not written yet."""
        return self._rows.todo

    @property
    def left(self) -> int:
        """Texts of this rank's blocks that are not written yet."""
        return sum(min(BLOCK, len(self._texts) - block * BLOCK) for block in self.todo)

    def texts(self, block: int) -> list[str]:
        """The texts of a block."""
        return self._texts.slice(block * BLOCK, BLOCK).to_pylist()

    def put(self, block: int, vectors: Tensor) -> None:
        """The vectors [texts of the block, width], on any device and of any float type."""
        assert vectors.shape[1] == self._width
        self._rows.put(block, {_FILE: _bits(vectors.detach().to("cpu", self._dtype))})

    def finish(self) -> None:
        """The end, by one rank when all are done."""
        self._rows.finish()


@dataclass(frozen=True)
class TextVectors:
    """The vectors of a text table."""

    folder: Path
    table: TextTable
    made_by: dict[str, Any]
    dtype: torch.dtype
    bits: np.ndarray
    """[texts, width], memory-mapped; integers where numpy has no such type"""
    sha256: str

    @classmethod
    def open(
        cls, folder: Path, table: TextTable, expect: Mapping[str, Any] | None = None
    ) -> "TextVectors":
        """UserError unless whole, of this table and (if given) made by what is expected."""
        made = load_manifest(folder / _MANIFEST, _CONTENT)
        require(folder, "format", made["format"], FORMAT)
        require(folder, "text table", made["texts"], table.fingerprint)
        require_made_by(folder, made["made_by"], expect)
        require(folder, "count", made["count"], len(table))
        dtype, kind = _dtype(made["dtype"])
        bits = mapped(folder / _FILE, kind, (len(table), made["width"]))
        return cls(folder, table, made["made_by"], dtype, bits, made["sha256"].get(_FILE, ""))

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return self.bits.shape[1]

    def gather(self, ids: np.ndarray) -> tuple[Tensor, int]:
        """([n, width] the vectors of these texts, zeros for a missing one; how many are missing).

        Id 0, which padding has, is not counted as missing.
        """
        places = self.table.lookup(ids)
        found = places >= 0
        vectors = torch.zeros(len(ids), self.width, dtype=self.dtype)
        vectors[torch.from_numpy(found)] = self.take(places[found])
        return vectors, int((~found & (ids != 0)).sum())

    def take(self, places: np.ndarray) -> Tensor:
        """[n, width] the vectors at these places of the table."""
        # each a bag of its own: torch fetches the rows of bags ahead
        ends = torch.arange(len(places) + 1)
        where = torch.from_numpy(places)
        return embedding_bag(where, self._values, ends, mode="sum", include_last_offset=True)

    @cached_property
    def _values(self) -> Tensor:
        """All vectors, never written to: a map for that would need memory for all of them."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(self.bits).view(self.dtype)

    def verify(self) -> None:
        """UserError unless every byte is the one that was written."""
        require(self.folder / _FILE, "sha256", file_digest(self.folder / _FILE), self.sha256)


def _bits(vectors: Tensor) -> np.ndarray:
    plain = vectors.view(torch.int16) if vectors.dtype == torch.bfloat16 else vectors
    return plain.numpy()


def _dtype(name: str) -> tuple[torch.dtype, np.dtype]:
    if name not in _DTYPES:
        raise unknown("type of vectors", name, _DTYPES)
    return _DTYPES[name]
