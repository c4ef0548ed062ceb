"""Which part of the data a row belongs to, decided row by row as they stream past.

`random` looks at the row alone, or at what it has in common with others, `until` at its time. The
others count first: `per_domain` gives each domain its exact shares, stratified by label; `time`
cuts all domains at the same moments and `time_per_domain` each at its own, so that rows of one
moment are never separated. What is counted is small (two numbers a domain, or the distinct times),
whatever the number of rows.
"""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import reduce
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa

from data_shards.errors import UserError, unknown
from data_shards.hashing import mixed, paired, xxh64
from data_shards.schema import NAME, Schema
from data_shards.stratified import Stratified, summed

WAYS = ("per_domain", "random", "time", "time_per_domain")
MOST_PARTS = 127
MOST_TIMES = 1 << 22  # (domain, time) pairs that are told apart; beyond it times are coarsened


def _sixty_twenty_twenty() -> dict[str, float]:
    return {"train": 0.6, "valid": 0.2, "test": 0.2}


@dataclass(frozen=True)
class SplitConfig:
    """Named parts that sum to 1. `train` names those that count in the vocabulary (first part)."""

    by: Literal["per_domain", "random", "time", "time_per_domain"] = "per_domain"
    parts: dict[str, float] = field(default_factory=_sixty_twenty_twenty)
    until: dict[str, int | datetime | date] = field(default_factory=dict)
    """Instead of shares: where each part ends (UTC, or seconds); later rows are dropped."""
    seed: int = 123
    train: tuple[str, ...] = ()
    together: tuple[str, ...] = ()
    """For random: rows that are alike in all of these (fields of one id, domain, time) are never
    separated. Negatives that were drawn for a positive have its user and time: apart from it, what
    a user's rows of one part say of those in another is upside down."""

    def __post_init__(self) -> None:
        if self.by not in WAYS:
            raise unknown("way to split", self.by, WAYS)
        if self.together and self.by != "random":
            raise UserError(f'split.together goes with by = "random" only, not with {self.by}')
        if self.until:
            self._take_moments()
        else:
            self._check_shares()
        if len(self.names) > MOST_PARTS:
            raise UserError(
                f"split: {len(self.names)} parts; at most {MOST_PARTS} can be told apart"
            )
        for name in self.names:
            if not NAME.fullmatch(name):
                raise UserError(f"split {name!r}: a name is letters, digits and _")
        if self.seed < 0:
            raise UserError(f"split: the seed is 0 or more, not {self.seed}")
        for name in self.train:
            if name not in self.names:
                raise unknown("split in split.train", name, self.names)

    def _take_moments(self) -> None:
        if self.by != "time":
            raise UserError('split: `until` names moments; it goes with by = "time" only')
        moments = {name: _seconds(moment) for name, moment in self.until.items()}
        if list(moments.values()) != sorted(set(moments.values())):
            raise UserError("split.until: each part ends later than the one before it")
        object.__setattr__(self, "until", moments)
        object.__setattr__(self, "parts", {})

    def _check_shares(self) -> None:
        for name, share in self.parts.items():
            if not 0 < share <= 1:
                raise UserError(f"split {name!r}: a share is above 0 and at most 1, not {share}")
        total = sum(self.parts.values())
        if abs(total - 1) > 1e-9:
            raise UserError(f"split: the parts sum to {total:g}; they must sum to 1")

    def require_fields(self, schema: Schema) -> None:
        """UserError where `together` names what rows do not have, or have many of."""
        known = ["domain", "time", *(field.name for field in schema.ids if not field.multi)]
        for name in self.together:
            if name not in known:
                raise unknown("field in split.together", name, known)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts, in the order given."""
        return tuple(self.until or self.parts)

    @property
    def vocabulary_parts(self) -> tuple[str, ...]:
        """Parts whose rows count in the vocabulary."""
        return self.train or self.names[:1]

    @property
    def counted(self) -> str | None:
        """The column that is counted per domain before any row can be assigned."""
        if self.until or self.by == "random":
            return None
        return "label" if self.by == "per_domain" else "time"


def _seconds(moment: int | datetime | date) -> int:
    if isinstance(moment, int):
        return moment
    if not isinstance(moment, datetime):
        moment = datetime(moment.year, moment.month, moment.day, tzinfo=UTC)
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def count_rows(config: SplitConfig, table: pa.Table) -> pa.Table:
    """Rows per (domain, key) of one raw table: columns domain, key int64, count int64."""
    assert config.counted is not None
    keyed = pa.table({"domain": table["domain"], "key": table[config.counted].cast(pa.int64())})
    return summed([keyed.append_column("count", pa.array(np.ones(len(keyed), np.int64)))])


def joined(config: SplitConfig, pieces: Iterable[pa.Table]) -> pa.Table:
    """The counts of all pieces as one. While there are too many distinct times, their unit doubles.

    What is held does not grow with the number of pieces.
    """
    whole, unit = summed([]), 1
    for counts in pieces:
        whole = summed([whole, _floored(counts, unit)])
        while config.counted == "time" and len(whole) > MOST_TIMES:
            unit *= 2
            whole = summed([_floored(whole, unit)])
    return whole


def _floored(counts: pa.Table, unit: int) -> pa.Table:
    key = counts["key"].to_numpy()
    return counts.set_column(1, "key", pa.array(key - key % unit))


class Split(Protocol):
    """Parts of the rows of one piece."""

    def parts(self, table: pa.Table) -> np.ndarray:
        """Part number of each row of the piece's next table, [n] int8; -1: in none."""
        ...


def split_of(config: SplitConfig, counts: pa.Table | None, standing: pa.Table | None) -> Split:
    """How the rows of a piece are split.

    `counts` from `joined` where rows are counted; `standing` from `standing_before` where they
    are split per domain.
    """
    if config.until:
        return _Moments(list(config.until.values()), last=-1)  # type: ignore[arg-type]
    if config.by == "random":
        return _Random(config)
    assert counts is not None
    if config.by == "per_domain":
        assert standing is not None
        return Stratified(config.seed, list(config.parts.values()), counts, standing)
    if config.by == "time":
        return _Moments(_cuts(config, counts, "all domains"), last=len(config.names) - 1)
    return _MomentsPerDomain(_cuts_of_each(config, counts))


class _Random:
    """A hash of the row's id, or of what it has in common with others; nothing else."""

    def __init__(self, config: SplitConfig) -> None:
        self.seed, self.together = config.seed, config.together
        self.ends = np.cumsum(list(config.parts.values()))[:-1]

    def parts(self, table: pa.Table) -> np.ndarray:
        keys = [xxh64(table[name].combine_chunks().cast(pa.string())) for name in self.together]
        key = reduce(paired, keys) if keys else table["row_id"].to_numpy()
        uniform = mixed(key, self.seed) / 2.0**64
        return np.searchsorted(self.ends, uniform, side="right").astype(np.int8)


class _Moments:
    """Part i holds the times before cuts[i]; `last` is the part of those after all cuts."""

    def __init__(self, cuts: list[int], last: int) -> None:
        self.cuts, self.last = np.array(cuts, np.int64), last

    def parts(self, table: pa.Table) -> np.ndarray:
        part = np.searchsorted(self.cuts, table["time"].to_numpy(), side="right")
        return np.where(part < len(self.cuts), part, self.last).astype(np.int8)


class _MomentsPerDomain:
    """The same, each domain with cuts of its own."""

    def __init__(self, cuts: dict[str, list[int]]) -> None:
        self.cuts = cuts

    def parts(self, table: pa.Table) -> np.ndarray:
        encoded = table["domain"].combine_chunks().dictionary_encode()
        none = [0] * len(next(iter(self.cuts.values()), []))  # of a domain that is held out
        names = encoded.dictionary.to_pylist()
        cuts = np.array([self.cuts.get(name, none) for name in names], np.int64)
        mine = cuts.reshape(len(cuts), -1)[encoded.indices.to_numpy()]
        return (table["time"].to_numpy()[:, None] >= mine).sum(axis=1).astype(np.int8)


def _cuts_of_each(config: SplitConfig, counts: pa.Table) -> dict[str, list[int]]:
    counts = counts.sort_by("domain")
    domains = counts["domain"].combine_chunks().dictionary_encode()
    sizes = np.bincount(domains.indices.to_numpy()).tolist()
    starts = np.cumsum([0, *sizes]).tolist()
    return {
        name: _cuts(config, counts.slice(start, size), name)
        for name, start, size in zip(domains.dictionary.to_pylist(), starts, sizes, strict=False)
    }


def _cuts(config: SplitConfig, counts: pa.Table, whose: str) -> list[int]:
    """The moments, at most one a part but the last, that come nearest to the shares."""
    order = np.argsort(counts["key"].to_numpy(), kind="stable")
    times, first = np.unique(counts["key"].to_numpy()[order], return_index=True)
    if len(times) < 2:
        raise UserError(
            f"split by time: the rows of {whose} have a single time; "
            "name their time column, split by per_domain or random, or hold them out"
        )
    before = np.concatenate([[0], np.cumsum(counts["count"].to_numpy()[order])])
    before = before[[*first, -1]]
    wanted = np.cumsum(list(config.parts.values()))[:-1] * before[-1]
    # never before the first moment: the first part would be empty
    nearest = [1 + int(np.abs(before[1:-1] - rows).argmin()) for rows in wanted]
    return [int(times[i]) for i in nearest]
