"""Row-aligned columns that a model wrote to a shard set, read as further columns of a batch.

A sidecar is a folder with one plain little-endian array per column (`<name>.f32`, `<name>.i64`),
one value per row in the order of the index, and `sidecar.json`, which is written last.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.errors import UserError, unknown
from data_shards.index import Block, Index
from data_shards.row_files import (
    RowFiles,
    file_digest,
    load_manifest,
    mapped,
    require,
    require_made_by,
)
from data_shards.schema import NAME

FORMAT = 1
FILE = "sidecar.json"
_KINDS = {"float32": ("f32", np.dtype("<f4")), "int64": ("i64", np.dtype("<i8"))}
_CONTENT = {
    "format": int,
    "shards": str,
    "made_by": dict,
    "rows": int,
    "columns": dict,
    "sha256": dict,
}


class SidecarWriter:
    """Writes the columns of a sidecar by number of block; see `RowFiles` for ranks and resuming."""

    def __init__(  # noqa: PLR0913  what it holds, what made it, and whose part this is
        self,
        folder: Path,
        index: Index,
        columns: Mapping[str, str],
        made_by: Mapping[str, Any],
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._files = {name: _file(name, kind) for name, kind in columns.items()}
        plan = {
            "format": FORMAT,
            "shards": index.fingerprint,
            "made_by": made_by,
            "rows": index.rows,
            "columns": columns,
        }
        sizes = {file: kind.itemsize for file, kind in self._files.values()}
        starts = np.append(index.row_starts, index.rows)
        self._rows = RowFiles(folder / FILE, plan, sizes, starts, rank, world_size)

    @property
    def todo(self) -> list[int]:
        """This rank's blocks that are not written yet."""
        return self._rows.todo

    def put(self, block: int, columns: Mapping[str, np.ndarray]) -> None:
        """The values of all rows of the index's block of this number."""
        assert columns.keys() == self._files.keys()
        records = {
            file: columns[name].astype(kind, casting="same_kind", copy=False)
            for name, (file, kind) in self._files.items()
        }
        self._rows.put(block, records)

    def finish(self) -> None:
        """The end, by one rank when all are done."""
        self._rows.finish()


@dataclass(frozen=True)
class Sidecar:
    """The columns of one shard set; `shards` is the set's fingerprint."""

    folder: Path
    shards: str
    made_by: dict[str, Any]
    columns: dict[str, np.ndarray]
    """[rows of the set] by name, memory-mapped"""
    row_starts: np.ndarray
    sha256: dict[str, str]

    @classmethod
    def open(cls, folder: Path, index: Index, expect: Mapping[str, Any] | None = None) -> "Sidecar":
        """UserError unless it is whole, of this set and (if given) made by what is expected."""
        made = load_manifest(folder / FILE, _CONTENT)
        require(folder, "format", made["format"], FORMAT)
        require(folder, "shard set", made["shards"], index.fingerprint)
        require_made_by(folder, made["made_by"], expect)
        require(folder, "rows", made["rows"], index.rows)
        columns = {}
        for name, kind in made["columns"].items():
            file, dtype = _file(name, str(kind))
            columns[name] = mapped(folder / file, dtype, (index.rows,))
        starts, sha256 = index.row_starts, made["sha256"]
        return cls(folder, made["shards"], made["made_by"], columns, starts, sha256)

    def gather(self, blocks: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        """[n] values by column, for the row `rows[i]` of the index's block `blocks[i]`."""
        places = self.row_starts[blocks] + rows
        return {name: np.asarray(column)[places] for name, column in self.columns.items()}

    def verify(self) -> None:
        """UserError naming the first file that is not as it was written."""
        for file, digest in self.sha256.items():
            require(self.folder / file, "sha256", file_digest(self.folder / file), digest)


class SidecarColumns:
    """The sidecars of a loader's shard sets, by the loader's numbers of its `chosen` blocks."""

    def __init__(
        self,
        sidecars: Sequence[Sidecar],
        indexes: Sequence[Index],
        chosen: Sequence[tuple[Index, Block]],
    ) -> None:
        sets = {id(index): place for place, index in enumerate(indexes)}
        numbers = [{block: n for n, block in enumerate(index.blocks)} for index in indexes]
        self._set = np.array([sets[id(index)] for index, _ in chosen])
        self._block = np.array([numbers[sets[id(index)]][block] for index, block in chosen])
        found = _by_set(sidecars, indexes)
        read = np.unique(self._set).tolist()
        self._own = [(place, one) for place in read for one in found[place]]
        self._kinds = _kinds({place: found[place] for place in read})

    def gather(
        self, numbers: np.ndarray, rows: np.ndarray, real: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Values by column, for the row `rows[i]` of block `numbers[i]`; 0 where not `real`."""
        columns = {name: np.zeros(rows.shape, kind) for name, kind in self._kinds.items()}
        for place, sidecar in self._own:
            mine = real & (self._set[numbers] == place)
            found = sidecar.gather(self._block[numbers[mine]], rows[mine])
            for name, values in found.items():
                columns[name][mine] = values
        return columns


def _by_set(sidecars: Sequence[Sidecar], indexes: Sequence[Index]) -> list[list[Sidecar]]:
    """The sidecars of each set; every one is of some set."""
    fingerprints = [index.fingerprint for index in indexes]
    for sidecar in sidecars:
        if sidecar.shards not in fingerprints:
            raise UserError(
                f"{sidecar.folder}: made for another shard set than those that are read; "
                "give that set too, or leave the sidecar out"
            )
    return [_of_set(sidecars, fingerprint) for fingerprint in fingerprints]


def _of_set(sidecars: Sequence[Sidecar], shards: str) -> list[Sidecar]:
    own = [sidecar for sidecar in sidecars if sidecar.shards == shards]
    names: dict[str, Path] = {}
    for sidecar in own:
        for name in sidecar.columns:
            if name in names:
                raise UserError(
                    f"{sidecar.folder}: its column {name!r} stands in {names[name]} too; "
                    "give one of them, or write one under another name"
                )
            names[name] = sidecar.folder
    return own


def _kinds(found: Mapping[int, Sequence[Sidecar]]) -> dict[str, np.dtype]:
    """The columns of the sets that are read, which are the same in each."""
    kinds = {
        place: {name: column.dtype for one in own for name, column in one.columns.items()}
        for place, own in found.items()
    }
    first, *others = kinds
    for place in others:
        if kinds[place] != kinds[first]:
            raise UserError(
                f"sidecars: shard set {place} has the columns {_said(kinds[place])}, shard set "
                f"{first} has {_said(kinds[first])}; give each set sidecars of the same columns"
            )
    return kinds[first]


def _said(kinds: Mapping[str, np.dtype]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in sorted(kinds.items())) or "none"


def _file(name: str, kind: str) -> tuple[str, np.dtype]:
    if not NAME.fullmatch(name):
        raise UserError(f"sidecar column {name!r}: a name is letters, digits and _")
    if kind not in _KINDS:
        raise unknown("type of a sidecar column", kind, _KINDS)
    return f"{name}.{_KINDS[kind][0]}", _KINDS[kind][1]
