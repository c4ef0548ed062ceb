"""A whole model on disk, complete or not there at all, for any number of ranks.

Each rank writes the rectangles of tables that it holds (`saving`); the first rank adds the dense
part and the state of the run, then the manifest with the SHA-256 of every file; then the folder is
renamed into place, and `latest` replaced. All files are safetensors or JSON. What is read here is
checked first: every byte by the manifest, every name in it to be that of a plain file beside it.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from data_shards import UserError
from data_shards.errors import PASSING, LostError
from embeddings import ShardedTables
from trainer.ranks import Ranks, together
from trainer.tensor_file import read_small, rows_at_once

FORMAT = 3
MANIFEST, LATEST, DENSE, STATE = "manifest.json", "latest", "dense.safetensors", "state.json"
SEPARATOR = "|"
LINKED = "a symbolic link is not followed; move what it points to here"
RESTORE = "restore the folder from a copy of it"
_STEP, _FILE = re.compile(r"step-\d+"), re.compile(r"[a-z]+(-\d+)?\.(safetensors|json)")

Tables = Sequence[ShardedTables]


class NewerFormatError(UserError):
    """Of a version to come, whose work is not to be taken for damage."""


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds beside the tables: tensors by name, and plain values."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose files have all been checked against its manifest."""

    folder: Path
    files: dict[str, str]
    best: str
    """The name of the best one beside it when it was saved; empty where there was none."""
    ranks: Ranks
    best_lost: bool = False

    def load(self, tables: Tables, *, optimizer: bool = True) -> Snapshot:
        """Fill the tables and return the rest. Collective.

        Without `optimizer` the tables' weights are all that must be there.
        """
        values = self.values()
        saved, live = values["tables"], shapes(tables)
        if len(saved) != len(live):
            raise UserError(
                f"{self.folder}: holds {len(saved)} sets of tables and here are {len(live)}; "
                "it is of another run file"
            )
        for theirs, ours in zip(saved, live, strict=True):
            self._require_same(theirs, ours)
        missing = {name for found in self.ranks.gather(self._fill(tables)) for name in found}
        if missing and (optimizer or "weight" in missing):
            raise UserError(
                f"{self.folder}: lacks {', '.join(sorted(missing))} of the tables for this plan; "
                "take another checkpoint, or the sharding types that it was saved with"
            )
        for part, steps in zip(tables, values["table_steps"], strict=True):
            part.set_steps(steps)
        return Snapshot(self.dense(), values)

    def values(self) -> dict[str, Any]:
        """The plain values."""
        return json.loads(read_small(self.folder / STATE))

    def dense(self) -> dict[str, Tensor]:
        """The tensors beside the tables."""
        return safetensors.torch.load_file(self.folder / DENSE)

    def _require_same(self, saved: Mapping[str, list[int]], live: Mapping[str, list[int]]) -> None:
        for name in {**live, **saved}:
            if saved.get(name) != live.get(name):
                raise UserError(
                    f"{self.folder}: table {name!r} is {saved.get(name)} (rows, width) there and "
                    f"{live.get(name)} here; it is of another shard set or run file"
                )

    def _fill(self, tables: Tables) -> list[str]:
        """Copy into each live rectangle whatever parts of it lie in the files, whoever wrote them.

        Returns the names of tensors that were not there whole.
        """
        live = list(rectangles(tables))
        missing = {(key, row, col): tensor.numel() for key, row, col, tensor in live}
        for path in sorted(self.folder / name for name in self.files if name.startswith("tables-")):
            with safetensors.safe_open(path, "pt") as saved:
                for key in saved.keys():  # noqa: SIM118  (not a dict)
                    name, saved_row, saved_col = key.rsplit(SEPARATOR, 2)
                    part, place = saved.get_slice(key), (int(saved_row), int(saved_col))
                    for other, row, col, tensor in live:
                        if other == name:
                            missing[other, row, col] -= _copy(tensor, (row, col), part, place)
        return sorted({key.rsplit(SEPARATOR, 1)[1] for (key, _, _), n in missing.items() if n})


def rectangles(tables: Tables) -> Iterator[tuple[str, int, int, Tensor]]:
    """What this rank holds: set, table and tensor as one key, row, column, and the live tensor."""
    for number, part in enumerate(tables):
        for shard in part.shards():
            for name, tensor in shard.tensors.items():
                key = SEPARATOR.join((str(number), shard.table, name))
                yield key, shard.row, shard.col, tensor


def shapes(tables: Tables) -> list[dict[str, list[int]]]:
    return [{table.field: [table.rows, table.width] for table in part.tables} for part in tables]


def checked(folder: Path, ranks: Ranks) -> Checkpoint:
    """Collective: each rank checks its share of the files; UserError unless all are whole."""

    def check() -> dict[str, Any]:
        manifest = _manifest(folder)
        files = manifest["files"]
        for name in sorted(files)[ranks.rank :: ranks.world]:
            path = folder / name
            if path.is_symlink():
                raise UserError(f"{path}: {LINKED}")
            if not path.is_file() or _sha256(path) != files[name]:
                raise UserError(f"{path}: missing or changed (SHA-256); {RESTORE}")
        return manifest

    manifest = together(ranks, folder, check)[0]
    return Checkpoint(folder, manifest["files"], manifest["best"], ranks)


def newest(root: Path, ranks: Ranks, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that `latest` names, or the newest whole one in its place, which is said.

    One whose best is damaged gives way to one from before that best, which will come to it again;
    where there is none it is returned with `best_lost`. None where nothing was saved; UserError
    where of what was saved nothing is whole, LostError where some could not be read. Collective.
    """
    names, noise = together(ranks, root, lambda: _newest_first(root) if ranks.first else ([], ""))[
        0
    ]
    if noise and names:
        say(f"{root / LATEST}: {noise!r} is no checkpoint's name; the newest whole one is taken")
    lost: set[str] = set()
    spare = unread = None
    for name in names:
        try:
            found = checked(root / name, ranks)
        except NewerFormatError:
            raise
        except UserError as error:
            unread = error if isinstance(error, LostError) else unread
            say(f"{error}; falling back to the one before it")
            continue
        if found.best not in lost and _best_is_whole(found, say):
            return found
        lost.add(found.best)
        spare = spare or replace(found, best_lost=True)
    if unread is not None:
        raise unread
    if spare is not None:
        say(
            f"{root}: none is from before that; {spare.folder.name} stands for the best from now on"
        )
        return spare
    if names:
        raise UserError(
            f"{root}: none of its {len(names)} checkpoints is whole; restore one of them, or "
            "delete the folder to begin anew"
        )
    return None


def _best_is_whole(found: Checkpoint, say: Callable[[str], None]) -> bool:
    try:
        if found.best not in ("", found.folder.name):
            checked(found.folder.with_name(found.best), found.ranks)
    except LostError:
        raise
    except UserError as error:
        say(f"{error}; it is the best up to {found.folder.name}: falling back to one before it")
        return False
    return True


def steps_in(root: Path) -> list[str]:
    """Names of the checkpoints in a folder, the newest first, whole or not."""
    names = (path.name for path in root.glob("step-*"))
    return sorted((name for name in names if _STEP.fullmatch(name)), reverse=True)


def best_of(folder: Path) -> str:
    """The name of the best checkpoint when this one was saved; empty where nobody can tell.

    OSError where the disk does not answer.
    """
    try:
        return str(_manifest(folder)["best"])
    except UserError:
        return ""


def _newest_first(root: Path) -> tuple[list[str], str]:
    """All names, but first of all the one in `latest`, for a person may have gone back by it; and
    what `latest` holds if that is no name."""
    try:
        with (root / LATEST).open("rb") as file:
            marked = file.read(99).decode(errors="replace").strip()
    except FileNotFoundError:  # cut off in the first save
        marked = ""
    except IsADirectoryError:
        marked = "a folder"
    named = _STEP.fullmatch(marked) is not None
    names = {*steps_in(root), marked} if named else {*steps_in(root)}
    newest_first = sorted(names, key=lambda name: (name == marked, name), reverse=True)
    return newest_first, "" if named else marked


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if folder.is_symlink():
        raise UserError(f"{folder}: {LINKED}")
    try:
        manifest = json.loads(read_small(path))
        format_, files, best = manifest["format"], manifest.get("files"), manifest.get("best")
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno in PASSING:
            raise
        raise UserError(
            f"{folder}: no complete checkpoint (no readable {MANIFEST}); {RESTORE}"
        ) from None
    if format_ != FORMAT:
        known = f"{folder}: format {format_!r}; this reads {FORMAT}"
        if type(format_) is int and format_ > FORMAT:
            raise NewerFormatError(f"{known}: go on with the version that wrote it")
        raise UserError(f"{known}: train it anew")
    if not isinstance(files, dict) or not {DENSE, STATE} <= files.keys():
        raise UserError(f"{path}: names no {DENSE} or no {STATE}; {RESTORE}")
    strange = [name for name in files if not _FILE.fullmatch(name)]
    if best != "" and not _STEP.fullmatch(str(best)):
        strange.append(best)
    if strange:
        raise UserError(
            f"{path}: {strange[0]!r} is no file of a checkpoint; take one from a source you trust"
        )
    return manifest


def _copy(live: Tensor, at: tuple[int, int], saved: Any, saved_at: tuple[int, int]) -> int:
    """Copy the common rectangle, some rows at a time; returns its elements.

    A vector is one value per row.
    """
    shape = saved.get_shape()
    (row, col), (saved_row, saved_col) = at, saved_at
    lo, hi = max(row, saved_row), min(row + live.shape[0], saved_row + shape[0])
    if live.ndim == 1:
        left, right = 0, int(col == saved_col)
    else:
        left, right = max(col, saved_col), min(col + live.shape[1], saved_col + shape[1])
    if lo >= hi or left >= right:
        return 0
    target, rows = live.detach(), rows_at_once(live)
    for first in range(lo, hi, rows):
        last = min(first + rows, hi)
        there, here = slice(first - saved_row, last - saved_row), slice(first - row, last - row)
        if live.ndim == 1:
            target[here] = saved[there]
        else:
            columns = slice(left - saved_col, right - saved_col)
            target[here, left - col : right - col] = saved[there, columns]
    return (hi - lo) * (right - left)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
