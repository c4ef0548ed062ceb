"""Whether every row id stands once: sorted runs on disk, of which only those that overlap are read.

Ids that a source makes ascend from piece to piece, so nothing is read again; whatever ids a user
brings, the memory is that of one run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_shards.durable import unfinished
from data_shards.errors import UserError

RUN = 1 << 22  # ids


@dataclass(frozen=True)
class Run:
    """A file of ascending int64, from `first` to `last`, none of them twice."""

    name: str
    piece: int
    first: int
    last: int


class RowIds:
    """The ids of one piece, as runs."""

    def __init__(self, folder: Path, piece: int, pieces: Sequence[str]) -> None:
        self.folder, self.piece, self.pieces = folder, piece, pieces
        self.runs: list[Run] = []
        self._waiting: list[np.ndarray] = []

    def add(self, ids: np.ndarray) -> None:
        """The ids of some rows, [n] int64."""
        self._waiting.append(ids)
        if sum(map(len, self._waiting)) >= RUN:
            self.close()

    def close(self) -> None:
        """End the run being gathered; UserError where an id stands twice in it."""
        if self._waiting:
            ids = np.sort(np.concatenate(self._waiting), kind="stable")
            _require_distinct(ids, [self.pieces[self.piece]])
            name = f"ids-{self.piece:05d}-{len(self.runs):05d}.i64"
            beside = unfinished(self.folder / name)
            ids.tofile(beside)
            beside.replace(self.folder / name)
            self.runs.append(Run(name, self.piece, int(ids[0]), int(ids[-1])))
            self._waiting = []


def require_unique(folder: Path, runs: Sequence[Run], pieces: Sequence[str]) -> None:
    """UserError unless the ids of all runs are distinct."""
    for group in _overlapping(runs):
        if len(group) < 2:  # as all are where the ids follow from the places of the rows
            continue
        for stretch in _merged([np.memmap(folder / run.name, np.int64, "r") for run in group]):
            _require_distinct(stretch, [pieces[p] for p in sorted({run.piece for run in group})])


def _overlapping(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """The groups of runs in which an id could stand twice."""
    group: list[Run] = []
    last = -1
    for run in sorted(runs, key=lambda run: run.first):
        if run.first > last:
            yield group
            group = []
        group.append(run)
        last = max(last, run.last)
    yield group


def _merged(runs: list[np.ndarray]) -> Iterator[np.ndarray]:
    """All numbers of ascending arrays, a stretch of about `RUN` at a time."""
    step = max(RUN // len(runs), 1)
    while runs:
        top = min(int(run[min(step, len(run)) - 1]) for run in runs)
        ends = [int(np.searchsorted(run, top, "right")) for run in runs]
        parts = [run[:end] for run, end in zip(runs, ends, strict=True)]
        yield np.sort(np.concatenate(parts), kind="stable")
        runs = [run[end:] for run, end in zip(runs, ends, strict=True) if end < len(run)]


def _require_distinct(ascending: np.ndarray, pieces: Sequence[str]) -> None:
    twice = np.flatnonzero(ascending[1:] == ascending[:-1])
    if len(twice):
        raise UserError(
            f"the row id {ascending[twice[0]]} stands twice (in {' or '.join(pieces)}); name a "
            "column of unique integers, or leave data.source.row_id out: then a row's place in "
            "the files is its id"
        )
