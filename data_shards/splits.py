"""Which part of the data a row belongs to: exact counts per domain, blind to other domains."""

import hashlib
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from data_shards.errors import UserError, unknown
from data_shards.schema import NAME


def _sixty_twenty_twenty() -> dict[str, float]:
    return {"train": 0.6, "valid": 0.2, "test": 0.2}


@dataclass(frozen=True)
class SplitConfig:
    """Named parts that sum to 1. `train` names those that count in the vocabulary (first part)."""

    by: Literal["random", "time"] = "random"
    parts: dict[str, float] = field(default_factory=_sixty_twenty_twenty)
    seed: int = 123
    train: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.by not in ("random", "time"):
            raise unknown("way to split", self.by, ("random", "time"))
        for name, share in self.parts.items():
            if not NAME.fullmatch(name):
                raise UserError(f"split {name!r}: a name is letters, digits and _")
            if not 0 < share <= 1:
                raise UserError(f"split {name!r}: a share is above 0 and at most 1, not {share}")
        total = sum(self.parts.values())
        if abs(total - 1) > 1e-9:
            raise UserError(f"split: the parts sum to {total:g}; they must sum to 1")
        if self.seed < 0:
            raise UserError(f"split: the seed is 0 or more, not {self.seed}")
        for name in self.train:
            if name not in self.parts:
                raise unknown("split in split.train", name, self.parts)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts, in the order given."""
        return tuple(self.parts)

    @property
    def vocabulary_parts(self) -> tuple[str, ...]:
        """Parts whose rows count in the vocabulary."""
        return self.train or self.names[:1]


def assign(config: SplitConfig, domain: str, label: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Part number (int8) of each row of one domain: exact counts, stratified or by time."""
    order = _by_time(time) if config.by == "time" else _stratified(config.seed, domain, label)
    cuts = [round(share * len(label)) for share in np.cumsum(list(config.parts.values()))]
    part = np.empty(len(label), np.int8)
    part[order] = np.repeat(np.arange(len(cuts), dtype=np.int8), np.diff([0, *cuts]))
    return part


def _by_time(time: np.ndarray) -> np.ndarray:
    return np.argsort(time, kind="stable")


def _stratified(seed: int, domain: str, label: np.ndarray) -> np.ndarray:
    """An order of rows in which every prefix holds the domain's share of positives."""
    name = int.from_bytes(hashlib.sha256(domain.encode()).digest()[:8], "little")
    rng = np.random.default_rng([seed, name])
    place = np.empty(len(label))
    for is_class in (label > 0.5, label <= 0.5):
        rows = np.flatnonzero(is_class)
        place[rng.permutation(rows)] = (np.arange(len(rows)) + 0.5) / max(len(rows), 1)
    return np.argsort(place, kind="stable")
