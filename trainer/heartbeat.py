"""Signs of life: where each rank stands, told every second, so that one that hangs has a name.

A collective that waits for a rank says only that it waited too long. What each rank last told the
others in the store of the process group says who was missing, and what it did then.
"""

import json
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

EVERY = 1.0  # seconds
ANSWER = timedelta(seconds=5)
KEY = "banyan/beat"


@dataclass(frozen=True)
class Beat:
    """One rank's last sign of life."""

    rank: int
    number: int
    phase: str
    step: int
    collectives: int
    """How many it has begun: the rank that others wait for has begun fewer."""
    time: float

    def __str__(self) -> str:
        ago = max(time.time() - self.time, 0)
        place = f"{self.phase}, step {self.step}" if self.step else self.phase
        return f"rank {self.rank} ({place}; last heard {ago:.0f} s ago)"


class _Place:
    """Where this process stands; written by its main thread, told by the other one."""

    phase, step = "starting", 0
    heart: "Heartbeat | None" = None
    aside: dist.ProcessGroup | None = None


_place = _Place()


def at(phase: str, step: int = 0) -> None:
    """This rank now begins this step of this phase; 0: not yet, or no more, in steps."""
    _place.phase, _place.step = phase, step


def leave_out(group: dist.ProcessGroup) -> None:
    """Collectives of this group, which a thread begins, say nothing of where its rank stands."""
    _place.aside = group


def where() -> tuple[str, int]:
    """This rank's phase and step."""
    return _place.phase, _place.step


class Heartbeat:
    """Tells the other ranks where this one stands, until `stop`."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        store: Any = dist.distributed_c10d._get_default_store()  # its stub knows no clone
        self._store = store.clone()
        self._store.set_timeout(ANSWER)
        self._number = 0
        self._tell()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        _place.heart = self

    def stop(self) -> None:
        _place.heart = _place.aside = None
        self._ended.set()
        self._thread.join(ANSWER.total_seconds())

    def heard(self) -> list[Beat]:
        """The last sign of life of every rank. Raises DistError if the store does not answer."""
        keys = [f"{KEY}/{rank}" for rank in range(self.world)]
        return [Beat(**json.loads(value)) for value in self._store.multi_get(keys)]

    def told(self, key: str) -> bool:
        """Whether some rank has set this key in the group's store. Raises DistError as `heard`."""
        return self._store.check([key])

    def missing(self, before: list[Beat]) -> str:
        """Who keeps the others waiting, or nothing if that cannot be told.

        All ranks without a sign of life since `before`, else those that have begun the fewest
        collectives. Raises DistError as `heard`.
        """
        now = self.heard()
        silent = [b for was, b in zip(before, now, strict=True) if was.number == b.number]
        if silent:
            return f"no sign of life of {_listed(silent)}"
        least = min(beat.collectives for beat in now)
        behind = [beat for beat in now if beat.collectives == least]
        if self.rank in [beat.rank for beat in behind]:
            return ""
        return f"the others wait for {_listed(behind)}"

    def _beat(self) -> None:
        while not self._ended.wait(EVERY):
            with suppress(RuntimeError):  # the store or a group is gone: the main thread finds out
                self._tell()

    def _tell(self) -> None:
        self._number += 1
        beat = Beat(self.rank, self._number, _place.phase, _place.step, _collectives(), time.time())
        self._store.set(f"{KEY}/{self.rank}", json.dumps(asdict(beat)))


class Watch:
    """Who has been silent since it began, by this machine's clock; of a rank alone nobody is."""

    def __init__(self) -> None:
        self._heart, self._answered = _place.heart, time.monotonic()
        self._news: dict[int, tuple[int, float]] = {}

    def silent(self, seconds: float) -> str:
        """The ranks that have told nothing new for so long; to be asked again and again."""
        if self._heart is None:
            return ""
        try:
            beats = self._heart.heard()
        except dist.DistError:
            gone = time.monotonic() - self._answered > seconds
            return "no answer of rank 0, which keeps the store of the group" if gone else ""
        now = self._answered = time.monotonic()
        for beat in beats:
            if self._news.get(beat.rank, (-1, now))[0] != beat.number:
                self._news[beat.rank] = beat.number, now
        silent = [beat for beat in beats if now - self._news[beat.rank][1] > seconds]
        return f"no sign of life of {_listed(silent)}" if silent else ""


def _collectives() -> int:
    groups: Any = dist.distributed_c10d._world.pg_map  # whose stub knows no sequence number
    counted = [group for group in list(groups) if group is not _place.aside]
    return sum(group._get_sequence_number_for_group() for group in counted)


def _listed(beats: list[Beat]) -> str:
    return ", ".join(map(str, beats))
