"""Arrays of one record per row, written by several ranks at once, and the manifest beside them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np

from data_shards.durable import flush
from data_shards.errors import UserError

_PLAN = "plan.json"


class RowFiles:
    """Files of one record per row, written block by block by any number of ranks at once.

    `record_bytes` has the size of a record by file; block b is the rows [starts[b], starts[b + 1]).
    Ranks give the same `plan`, and each lists the blocks that it wrote, so that a killed writer
    goes on where it was, on any number of ranks. When all are done, one calls `finish`.
    """

    def __init__(  # noqa: PLR0913  the two writers alone call it
        self,
        manifest: Path,
        plan: Mapping[str, Any],
        record_bytes: Mapping[str, int],
        starts: np.ndarray,
        rank: int,
        world_size: int,
    ) -> None:
        self._manifest, self.folder = manifest, manifest.parent
        self._plan, self._record_bytes, self._starts = plain(plan), record_bytes, starts
        if manifest.exists():
            raise UserError(f"{self.folder}: exists already; give another path or delete it")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_plan()
        for name, size in record_bytes.items():
            with (self.folder / name).open("ab") as file:
                file.truncate(int(starts[-1]) * size)
        self._list = self.folder / f"done-{rank}.i64"
        with self._list.open("ab") as file:  # a killed writer may have left half a number
            file.truncate(file.tell() // 8 * 8)
        written = self._times_written()
        self.todo = [b for b in range(rank, len(written), world_size) if not written[b]]
        """This rank's blocks that nobody has written yet."""

    def put(self, block: int, records: Mapping[str, np.ndarray]) -> None:
        """The records of all rows of a block, by file."""
        assert records.keys() == self._record_bytes.keys()
        start, stop = map(int, self._starts[block : block + 2])
        try:
            for name, size in self._record_bytes.items():
                assert records[name].nbytes == (stop - start) * size
                with (self.folder / name).open("r+b") as file:
                    file.seek(start * size)
                    file.write(np.ascontiguousarray(records[name]).data)
            with self._list.open("ab") as file:
                file.write(block.to_bytes(8, "little"))
        except OSError as error:
            raise UserError(
                f"{self.folder}: could not be written ({error.strerror or error}); free some "
                "space and start the same command again, which goes on where it was"
            ) from error

    def finish(self) -> None:
        """Write the manifest; UserError unless every block was written exactly once."""
        written = self._times_written()
        for times, what in ((written == 0, "not written"), (written > 1, "written twice")):
            if times.any():
                raise UserError(
                    f"{self.folder}: {times.sum()} of {len(written)} blocks are {what}, first "
                    f"block {times.argmax()}; each is written once, by one rank: start again, "
                    "or delete the folder first where one was written twice"
                )
        for name in self._record_bytes:
            flush(self.folder / name)
        digests = {name: file_digest(self.folder / name) for name in self._record_bytes}
        save_json(self._manifest, {**self._plan, "sha256": digests})
        for path in (self.folder / _PLAN, *self.folder.glob("done-*.i64")):
            path.unlink()

    def _times_written(self) -> np.ndarray:
        """[blocks] by all ranks together."""
        done = [path.read_bytes() for path in self.folder.glob("done-*.i64")]
        numbers = b"".join(data[: len(data) // 8 * 8] for data in done)
        return np.bincount(np.frombuffer(numbers, "<i8"), minlength=len(self._starts) - 1)

    def _check_plan(self) -> None:
        path = self.folder / _PLAN
        if not path.exists():
            save_json(path, self._plan)
        theirs = json.loads(path.read_text(encoding="utf-8"))
        differs = [key for key in self._plan if theirs.get(key) != self._plan[key]]
        if differs:
            raise UserError(
                f"{self.folder}: begun with other choices (they differ in {', '.join(differs)}); "
                "repeat that command to end it, or delete the folder"
            )


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """What comes back when it is written as JSON."""
    return json.loads(json.dumps(value))


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all, and on the disk."""
    with NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        json.dump(content, file, indent=1)
    flush(Path(file.name))
    Path(file.name).replace(path)
    flush(path.parent)


def load_manifest(path: Path, content: Mapping[str, type]) -> dict[str, Any]:
    """The manifest, which has at least this content; it is written last, so its files are whole."""
    if not path.exists():
        raise UserError(f"{path}: missing, so it was never finished; write it to its end")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        wrong = [key for key, kind in content.items() if not isinstance(found[key], kind)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: cut or corrupt ({type(error).__name__}: {error}); write it again"
        ) from error
    if wrong:
        raise UserError(
            f"{path}: cut or corrupt ({wrong[0]} is {found[wrong[0]]!r}); write it again"
        )
    return found


def require(where: Path, what: str, found: object, expected: object) -> None:
    """UserError naming `what` unless it is as expected."""
    if found != expected:
        raise UserError(
            f"{where}: its {what} is {found!r}, expected {expected!r}; "
            "give the one that belongs here or write it again"
        )


def require_made_by(
    where: Path, made_by: Mapping[str, Any], expected: Mapping[str, Any] | None
) -> None:
    """UserError naming the first thing in which it was made by something else; None: by any."""
    if expected is not None:
        wanted = plain(expected)
        for key in (*wanted, *made_by):
            require(where, f"made_by.{key}", made_by.get(key), wanted.get(key))


def mapped(path: Path, kind: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """A file of exactly this many values, memory-mapped to be read."""
    size = path.stat().st_size if path.exists() else None
    require(path, "size in bytes", size, int(np.prod(shape)) * kind.itemsize)
    if not size:  # nothing can be mapped
        return np.empty(shape, kind)
    return np.memmap(path, kind, "r", shape=shape)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
