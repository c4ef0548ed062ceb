"""A text table: unique texts, addressed by their hash.

It is a folder: `ids.i64` (ascending), `texts.arrow` (in that order), and `texts.json`,
which is written last. It may be larger than memory: sorted runs on disk are merged at the end.
"""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_shards.durable import flush
from data_shards.errors import UserError
from data_shards.prompts import text_id
from data_shards.row_files import file_digest, load_manifest, mapped, require, save_json

FORMAT = 1
_CHUNK = 8192  # texts of a run that are in memory while it is merged
_FAN = 64  # runs that are merged at once
_TABLE = "texts.json"
_TEXTS = pa.schema([("text", pa.string())])
_ID = np.dtype("<i8")


@dataclass(frozen=True)
class TextTable:
    """Unique texts by ascending `prompts.text_id`; the fingerprint is that of the ids."""

    folder: Path
    fingerprint: str
    ids: np.ndarray
    """[n] int64, memory-mapped"""
    texts: pa.ChunkedArray
    """[n] in the order of the ids, memory-mapped"""

    @classmethod
    def build(
        cls, folder: Path, texts: Iterable[pa.Array], buffer_bytes: int = 256 << 20
    ) -> "TextTable":
        """The table of all these texts (null is ""), with about three times `buffer_bytes`.

        The `texts.chunks` of other tables are texts too: so several processes build one.
        """
        if (folder / _TABLE).exists():
            raise UserError(f"{folder}: exists already; give another path or delete it")
        runs = folder / "runs"
        shutil.rmtree(runs, ignore_errors=True)
        runs.mkdir(parents=True)
        digest, count = hashlib.sha256(), 0
        with (folder / "ids.i64").open("wb") as file, _writer(folder / "texts.arrow") as writer:
            for ids, part in _merged(_few(_spilled(texts, runs, buffer_bytes), runs)):
                file.write(ids.tobytes())
                writer.write_batch(pa.record_batch([part], schema=_TEXTS))
                digest.update(ids.tobytes())
                count += len(ids)
        shutil.rmtree(runs)
        for name in ("ids.i64", "texts.arrow"):
            flush(folder / name)
        manifest = {"format": FORMAT, "count": count, "fingerprint": digest.hexdigest()}
        save_json(folder / _TABLE, manifest)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> "TextTable":
        """UserError unless it is whole."""
        made = load_manifest(folder / _TABLE, {"format": int, "count": int, "fingerprint": str})
        require(folder, "format", made["format"], FORMAT)
        ids = mapped(folder / "ids.i64", _ID, (made["count"],))
        try:
            texts = _open(folder / "texts.arrow").read_all()["text"]
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise UserError(
                f"{folder / 'texts.arrow'}: not readable ({error}); write the table again"
            ) from error
        require(folder / "texts.arrow", "number of texts", len(texts), len(ids))
        return cls(folder, made["fingerprint"], ids, texts)

    def __len__(self) -> int:
        return len(self.ids)

    def lookup(self, ids: np.ndarray) -> np.ndarray:
        """[n] places of these ids; -1 for one that is not there."""
        if not len(self):
            return np.full(len(ids), -1)
        order = np.argsort(ids)  # a search for ascending ids stays near the last one
        places = np.empty(len(ids), np.int64)
        places[order] = np.searchsorted(self.ids, ids[order])
        places[places == len(self)] = 0
        return np.where(self.ids[places] == ids, places, -1)

    def verify(self) -> None:
        """UserError unless every text is the one that was written."""
        digest = file_digest(self.folder / "ids.i64")
        require(self.folder / "ids.i64", "sha256", digest, self.fingerprint)
        start = 0
        for part in self.texts.chunks:
            wrong = np.flatnonzero(text_id(part) != self.ids[start : start + len(part)])
            if len(wrong):
                raise UserError(
                    f"{self.folder / 'texts.arrow'}: text {start + wrong[0]} is not the one that "
                    "was written; write the table again"
                )
            start += len(part)


def _spilled(texts: Iterable[pa.Array], runs: Path, buffer_bytes: int) -> list[Path]:
    """Files of unique texts by id, one whenever about `buffer_bytes` of them are in memory."""
    paths: list[Path] = []
    waiting: list[pa.Array] = []
    held = 0
    for part in texts:
        waiting.append(pc.fill_null(part, "").unique())
        held += waiting[-1].nbytes
        if held > buffer_bytes:
            waiting = [pa.chunked_array(waiting).unique()]
            held = waiting[0].nbytes
            if held > buffer_bytes // 2:
                paths.append(_write_run(runs / f"{len(paths)}.arrow", [_by_id(waiting)]))
                waiting, held = [], 0
    if waiting:
        paths.append(_write_run(runs / f"{len(paths)}.arrow", [_by_id(waiting)]))
    return paths


def _by_id(texts: Sequence[pa.Array]) -> tuple[np.ndarray, pa.Array]:
    """(ids ascending, their texts) of what may hold a text more than once."""
    unique = pa.chunked_array(texts).unique()
    ids = text_id(unique)
    order = np.argsort(ids)
    ids, unique = ids[order], unique.take(pa.array(order))
    same = np.flatnonzero(ids[1:] == ids[:-1])
    if len(same):
        one, other = unique[int(same[0])].as_py(), unique[int(same[0]) + 1].as_py()
        raise UserError(
            f"two texts have the id {ids[same[0]]}: {one!r} and {other!r}; change a word of the "
            "prompt, so that all ids change"
        )
    return ids, unique


class _Run:
    """Sorted texts on disk, of which one chunk is in memory."""

    def __init__(self, path: Path) -> None:
        self._file, self._next = _open(path), 0
        self.ids, self.texts = np.empty(0, np.int64), pa.array([], pa.string())

    def fill(self) -> bool:
        """Have a next text; False where there is none."""
        if not len(self.ids) and self._next < self._file.num_record_batches:
            self.texts = self._file.get_batch(self._next).column(0)
            self.ids = text_id(self.texts)
            self._next += 1
        return len(self.ids) > 0

    def until(self, last: int) -> pa.Array:
        """The texts with ids up to `last`, which are gone then."""
        count = int(np.searchsorted(self.ids, last, side="right"))
        texts = self.texts.slice(0, count)
        self.ids, self.texts = self.ids[count:], self.texts.slice(count)
        return texts


def _merged(paths: Sequence[Path]) -> Iterator[tuple[np.ndarray, pa.Array]]:
    """(ids, texts) of all runs, ascending, each once."""
    runs = [_Run(path) for path in paths]
    while runs := [run for run in runs if run.fill()]:
        last = min(run.ids[-1] for run in runs)
        yield _by_id([run.until(last) for run in runs])


def _few(paths: list[Path], runs: Path) -> list[Path]:
    """At most `_FAN` runs with the texts of all."""
    number = len(paths)
    while len(paths) > _FAN:
        first, paths = paths[:_FAN], paths[_FAN:]
        paths.append(_write_run(runs / f"{number}.arrow", _merged(first)))
        number += 1
        for path in first:
            path.unlink()
    return paths


def _write_run(path: Path, parts: Iterable[tuple[np.ndarray, pa.Array]]) -> Path:
    with _writer(path) as writer:
        for _, texts in parts:
            writer.write_table(pa.table([texts], schema=_TEXTS), max_chunksize=_CHUNK)
    return path


def _writer(path: Path) -> pa.ipc.RecordBatchFileWriter:
    return pa.ipc.new_file(str(path), _TEXTS)


def _open(path: Path) -> pa.ipc.RecordBatchFileReader:
    return pa.ipc.open_file(pa.memory_map(str(path)))
