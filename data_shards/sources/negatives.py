"""Negatives drawn per user and domain, from the seed and the two names alone.

Each domain's items stand in an order drawn from the seed. A user walks through it by an affine map
modulo a prime, with factors drawn for the user: the walk meets every item once, so what is drawn
is distinct, every untouched item is equally likely, and no other row, file or process matters.
"""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from collections import Counter
from dataclasses import dataclass
from itertools import count
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_shards.errors import UserError
from data_shards.hashing import StringTable, mixed, paired, xxh64

SEPARATOR = "\x1f"


@dataclass(frozen=True)
class NegativesConfig:
    """`negatives`: how many for each positive, by one of three rules."""

    item: str = "item"
    per_positive: int = 0
    """So many for each positive."""
    ratio: tuple[int, ...] = ()
    """(low, high): for each positive a number drawn from low to high."""
    protocol: Literal["", "mlora"] = ""
    """mlora: int(positives / c) for a user in a domain, c drawn for the domain in [0.2, 0.5]."""
    seed: int = 1

    def __post_init__(self) -> None:
        if sum(map(bool, (self.per_positive, self.ratio, self.protocol))) != 1:
            raise UserError(
                "negatives: give one of per_positive = 3, ratio = [2, 5] and protocol = 'mlora'"
            )
        if self.ratio and not (len(self.ratio) == 2 and 0 <= self.ratio[0] <= self.ratio[1]):
            raise UserError(f"negatives: ratio is [low, high], not {list(self.ratio)}")
        if self.per_positive < 0 or self.seed < 0:
            raise UserError("negatives: per_positive and seed are 0 or more")


class Pools:
    """The distinct items of every domain, each domain's in an order drawn from the seed."""

    def __init__(self, items: pa.Table, seed: int) -> None:
        """`items`: unique pairs in columns domain and item."""
        self.seed = mixed(np.array([seed], np.uint64), 0)
        domains = items["domain"].combine_chunks()
        drawn = paired(self.hashed(domains), xxh64(items["item"].combine_chunks()))
        by_name = items.append_column("drawn", pa.array(drawn))
        keys = [("domain", "ascending"), ("drawn", "ascending"), ("item", "ascending")]
        items = by_name.sort_by(keys)
        self.items = items["item"].combine_chunks()
        domains = items["domain"].combine_chunks()
        self.index = StringTable(pc.binary_join_element_wise(domains, self.items, SEPARATOR))
        counts = pc.value_counts(domains)
        self.domains = StringTable(counts.field("values"))
        self.sizes = counts.field("counts").to_numpy()
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.primes = np.array([_prime_from(size) for size in self.sizes.tolist()], np.int64)

    def hashed(self, texts: pa.Array) -> np.ndarray:
        """Hashes of texts under the seed."""
        return paired(self.seed, xxh64(texts))

    def place(self, domains: pa.Array, items: pa.Array) -> np.ndarray:
        """[n] where a domain's item stands among `items`."""
        return self.index.find(pc.binary_join_element_wise(domains, items, SEPARATOR))


def draw(
    config: NegativesConfig, pools: Pools, rows: pa.Table, user: str, dropped: Counter[str]
) -> tuple[np.ndarray, pa.Array]:
    """The positive that each negative belongs to, by its place in `rows`, and the negative's item.

    `rows` hold all rows of their users, those of a user and domain together. Where a user has
    touched too much of a domain, what is missing is counted as negatives_short.
    """
    domains, users = rows["domain"].combine_chunks(), rows[user].combine_chunks()
    hashes = paired(pools.hashed(domains), xxh64(users))
    group, firsts = _groups(pc.binary_join_element_wise(domains, users, SEPARATOR))
    pool = pools.domains.find(domains.take(pa.array(firsts)))
    positive = rows["label"].to_numpy() > 0.5
    counts = _counts(config, pools, group, pool, hashes, positive)
    need = np.bincount(group, counts, len(firsts)).astype(np.int64)
    places = pools.place(domains, rows[config.item].combine_chunks())
    touched = np.unique(_pairs(pools, group, places))
    tried = np.bincount(touched // len(pools.items), minlength=len(firsts)) + need
    tried = np.where(need > 0, np.minimum(tried, pools.sizes[pool]), 0)
    of, step = _ranges(tried)
    met = _walk(pools, pool[of], hashes[firsts][of], step)
    free = ~np.isin(_pairs(pools, of, met), touched)
    of, met = of[free], met[free]
    rank = np.arange(len(of)) - np.searchsorted(of, of)
    of, met = of[rank < need[of]], met[rank < need[of]]
    got = np.bincount(of, minlength=len(firsts))
    if (got < need).any():
        dropped["negatives_short"] += int((need - got).sum())
    owner_group, nth = _ranges(need)
    owners = np.repeat(np.arange(len(rows)), counts)
    owners = owners[np.argsort(group[owners], kind="stable")]
    return owners[nth < got[owner_group]], pools.items.take(pa.array(met))


def _pairs(pools: Pools, group: np.ndarray, place: np.ndarray) -> np.ndarray:
    return group * len(pools.items) + place


def _groups(names: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Number of each row's group, and the first row of each group."""
    numbers = names.dictionary_encode().indices.to_numpy().astype(np.int64)
    _, firsts = np.unique(numbers, return_index=True)
    return numbers, firsts


def _ranges(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For 2, 0, 3: the ranges 0 0 2 2 2 and the places in them 0 1 0 1 2."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _counts(  # noqa: PLR0913  one row's worth of arrays each
    config: NegativesConfig,
    pools: Pools,
    group: np.ndarray,
    pool: np.ndarray,
    hashes: np.ndarray,
    positive: np.ndarray,
) -> np.ndarray:
    """[n] how many negatives each row has: 0 unless it is a positive."""
    if config.per_positive:
        return positive * config.per_positive
    order = np.argsort(group, kind="stable")
    nth = np.empty(len(group), np.int64)
    sizes = np.bincount(group)
    before = np.cumsum(positive[order]) - positive[order]
    nth[order] = before - np.repeat(before[np.cumsum(sizes) - sizes], sizes)
    if config.ratio:
        low, high = config.ratio
        drawn = mixed(hashes + nth.astype(np.uint64), 0) % np.uint64(high - low + 1)
        return positive * (low + drawn.astype(np.int64))
    total = np.bincount(group, positive).astype(np.int64)
    need = (total / _mlora_share(pools)[pool]).astype(np.int64)[group]
    total = np.maximum(total[group], 1)
    return positive * ((nth + 1) * need // total - nth * need // total)


def _mlora_share(pools: Pools) -> np.ndarray:
    """MLoRA's c of each domain: uniform in [0.2, 0.5]."""
    uniform = (mixed(pools.hashed(pools.domains.values), 0) >> np.uint64(11)) / 2.0**53
    return 0.2 + 0.3 * uniform


def _walk(pools: Pools, pool: np.ndarray, hashes: np.ndarray, step: np.ndarray) -> np.ndarray:
    """[m] the item that a user meets at a step: x -> (a x + b) mod p, again while past the pool."""
    size, prime = (array[pool].astype(np.uint64) for array in (pools.sizes, pools.primes))
    factor = mixed(hashes, 0) % (prime - np.uint64(1)) + np.uint64(1)
    offset = mixed(hashes, 1) % prime
    met = (factor * step.astype(np.uint64) + offset) % prime
    past = np.flatnonzero(met >= size)
    while len(past):
        met[past] = (factor[past] * met[past] + offset[past]) % prime[past]
        past = past[met[past] >= size[past]]
    return met.astype(np.int64) + pools.starts[pool]


def _prime_from(number: int) -> int:
    """The least prime that is not below `number`."""
    return next(n for n in count(max(number, 2)) if all(n % d for d in range(2, int(n**0.5) + 1)))
