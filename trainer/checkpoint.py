"""A whole model on disk, complete or not there at all, for any number of ranks.

Each rank writes the rectangles of tables that it holds; the first rank adds the dense part and the
state of the run, then the manifest with the SHA-256 of every file; then the folder is
renamed into place, and `latest` replaced. All files are safetensors or JSON.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from data_shards import UserError
from data_shards.durable import flush
from embeddings import ShardedTables
from trainer.ranks import Ranks, together

FORMAT = 2
MANIFEST, LATEST = "manifest.json", "latest"
SEPARATOR = "|"


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds beside the tables: tensors by name, and plain values."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def save(
    folder: Path,
    ranks: Ranks,
    tables: ShardedTables,
    snapshot: Snapshot,
    *,
    optimizer: bool = True,
) -> None:
    """Write `folder` whole. Collective. Without `optimizer` only the tables' weights are kept."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    steps = tables.steps()

    def write() -> dict[str, str]:
        files = {f"tables-{ranks.rank:05d}.safetensors": _table_bytes(tables, optimizer)}
        if ranks.first:
            values = {**snapshot.values, "tables": _shapes(tables), "table_steps": steps}
            files["dense.safetensors"] = safetensors.torch.save(
                {name: t.detach().cpu().contiguous() for name, t in snapshot.tensors.items()}
            )
            files["state.json"] = json.dumps(values, indent=1).encode()
        return {name: _write(temporary / name, content) for name, content in files.items()}

    try:
        together(ranks, folder, lambda: _fresh(temporary) if ranks.first else None)
        digests = together(ranks, folder, write)
        merged = {name: digest for rank in digests for name, digest in rank.items()}
        together(
            ranks, folder, lambda: _publish(temporary, folder, merged) if ranks.first else None
        )
    finally:
        if ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)


def load(folder: Path, ranks: Ranks, tables: ShardedTables, *, optimizer: bool = True) -> Snapshot:
    """Fill the tables from `folder` and return the rest. Collective; verifies every file first.

    Without `optimizer` the tables' weights are all that must be there.
    """
    manifest = _verified(folder, ranks)
    parts = [name for name in manifest if name.startswith("tables-")]
    values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    _require_same_tables(folder, values["tables"], _shapes(tables))
    missing = _fill(tables, [folder / name for name in sorted(parts)])
    if optimizer and any(ranks.gather(missing)):
        raise UserError(
            f"{folder}: lacks the tables' optimizer state for this plan; take another checkpoint, "
            "or the sharding types that it was saved with"
        )
    tables.set_steps(values["table_steps"])
    tensors = safetensors.torch.load_file(folder / "dense.safetensors")
    return Snapshot(tensors, values)


def dense(folder: Path, ranks: Ranks) -> dict[str, Tensor]:
    """The tensors beside the tables. Collective; verifies every file first."""
    _verified(folder, ranks)
    return safetensors.torch.load_file(folder / "dense.safetensors")


def mark_latest(root: Path, name: str, ranks: Ranks, keep: int, best: str) -> None:
    """Point `latest` at a checkpoint; of the others keep the newest `keep` and the best."""

    def mark() -> None:
        temporary = root / f".{LATEST}.tmp"
        _write(temporary, name.encode())
        os.replace(temporary, root / LATEST)
        newest_first = sorted((path.name for path in root.glob("step-*")), reverse=True)
        for old in newest_first[keep:]:
            if old not in (best, name):
                shutil.rmtree(root / old)

    together(ranks, root, lambda: mark() if ranks.first else None)


def latest(root: Path) -> Path | None:
    """The checkpoint that `latest` names, or None where there is none."""
    pointer = root / LATEST
    if not pointer.exists():
        return None
    return root / pointer.read_text(encoding="utf-8").strip()


def _table_bytes(tables: ShardedTables, optimizer: bool) -> bytes:
    return safetensors.torch.save(
        {
            SEPARATOR.join((shard.table, name, str(shard.row), str(shard.col))): tensor.detach()
            .cpu()
            .contiguous()
            for shard in tables.shards()
            for name, tensor in shard.tensors.items()
            if optimizer or name == "weight"
        }
    )


def _fill(tables: ShardedTables, files: list[Path]) -> bool:
    """Copy into each live rectangle whatever parts of it lie in the files, whoever wrote them.

    Returns whether something was not there.
    """
    shards = tables.shards()
    missing = {(s.table, n, s.row, s.col): t.numel() for s in shards for n, t in s.tensors.items()}
    for path in files:
        with safetensors.safe_open(path, "pt") as saved:
            for key in saved.keys():  # noqa: SIM118  (not a dict)
                table, name, row, col = key.split(SEPARATOR)
                for shard in shards:
                    if shard.table == table and name in shard.tensors:
                        copied = _overlap(
                            shard.tensors[name],
                            shard.row,
                            shard.col,
                            saved.get_slice(key),
                            int(row),
                            int(col),
                        )
                        missing[table, name, shard.row, shard.col] -= copied
    return sum(missing.values()) > 0


def _shapes(tables: ShardedTables) -> dict[str, list[int]]:
    return {table.field: [table.rows, table.width] for table in tables.tables}


def _require_same_tables(
    folder: Path, saved: Mapping[str, list[int]], live: Mapping[str, list[int]]
) -> None:
    for name in {**live, **saved}:
        if saved.get(name) != live.get(name):
            raise UserError(
                f"{folder}: table {name!r} is {saved.get(name)} (rows, width) there and "
                f"{live.get(name)} here; it is of another shard set or run file"
            )


def _overlap(live: Tensor, row: int, col: int, saved: Any, saved_row: int, saved_col: int) -> int:
    """Copy the common rectangle; returns its elements. A vector is one value per row."""
    shape = saved.get_shape()
    lo, hi = max(row, saved_row), min(row + live.shape[0], saved_row + shape[0])
    if lo >= hi:
        return 0
    if live.ndim == 1:
        if col != saved_col:
            return 0
        live[lo - row : hi - row] = saved[lo - saved_row : hi - saved_row]
        return hi - lo
    left, right = max(col, saved_col), min(col + live.shape[1], saved_col + shape[1])
    if left >= right:
        return 0
    part = saved[lo - saved_row : hi - saved_row, left - saved_col : right - saved_col]
    live.detach()[lo - row : hi - row, left - col : right - col] = part
    return (hi - lo) * (right - left)


def _verified(folder: Path, ranks: Ranks) -> dict[str, str]:
    """The manifest, after each rank has checked its share of the files."""

    def check() -> dict[str, str]:
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(
                f"{folder}: no complete checkpoint (no readable {MANIFEST}); take another one"
            ) from None
        if manifest.get("format") != FORMAT:
            raise UserError(
                f"{folder}: format {manifest.get('format')!r}; this reads {FORMAT}: train it anew"
            )
        files = manifest["files"]
        for name in sorted(files)[ranks.rank :: ranks.world]:
            path = folder / name
            if not path.exists() or _sha256(path) != files[name]:
                raise UserError(f"{path}: missing or changed (SHA-256); take another checkpoint")
        return files

    return together(ranks, folder, check)[0]


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _publish(temporary: Path, folder: Path, digests: Mapping[str, str]) -> None:
    content = json.dumps({"format": FORMAT, "files": dict(digests)}, indent=1).encode()
    _write(temporary / MANIFEST, content)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)
    flush(folder.parent)


def _write(path: Path, content: bytes) -> str:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
