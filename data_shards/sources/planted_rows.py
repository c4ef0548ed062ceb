"""The rows of `planted` as numbers: who saw what, when, where, and whether it was clicked.

Every number is a pure function of (config, row_id): nothing is stored, hashes stand for tables. For
a user u, an item i and a domain d

    logit = base_d + shared * (first(u, i, hour) + <p_u, q_i>)
                   + specific * (<a_d, q_i> <b_d, p_u> + <c_d, q_i>)

with each bracket scaled to a variance of about 1. So a domain differs from what all share by its
base rate, by a matrix of rank one between the factors and by one direction of the item's. `first`
sums effects of user, item, hour, age, price and tags. Factors come from attributes (segment; the
four words of a title) and, for the share `id_share` of their variance, from the id alone: the text
of an item never seen tells 1 - id_share of its factors.

A domain knows `users` users and `items` items. The share `user_overlap` (`item_overlap`) of them is
the same in all domains, the others are its own. Whoever is seen often in one domain is so in all.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from math import log, sqrt
from typing import Literal

import numpy as np

START = 19_675 * 86_400  # a midnight, in seconds since 1970
DAY = 86_400
SEGMENTS = 8
ITEM_WORDS = {"category": 16, "brand": 256, "look": 16, "material": 16}
TAG_GROUPS = 3
TAGS_OF_GROUP = 16


@dataclass(frozen=True)
class PlantedConfig:
    """What decides the rows."""

    kind: Literal["planted"] = "planted"
    seed: int = 0
    rows: int = 1_000_000
    days: int = 28
    """The time that the rows are spread over evenly."""
    domains: int = 8
    tail: float = 1.0
    """Domain number d has a share of the rows proportional to (d + 1) ** -tail."""
    users: int = 20_000
    items: int = 5_000
    skew: float = 0.8
    """User or item number r of a domain is seen about (r + 1) ** -skew as often as the first."""
    user_overlap: float = 0.6
    item_overlap: float = 0.2
    rate: float = 0.2
    """Click rate where all effects are 0."""
    spread: float = 0.5
    """Standard deviation of a domain's base logit; `shared`, `specific`: of those effects."""
    shared: float = 1.2
    specific: float = 0.6
    id_share: float = 0.3
    extra_ids: int = 0
    """Further id fields f0, f1, ... of `extra_values` values each, without any effect."""
    extra_values: int = 100_000


class Rows:
    """The n rows [start, stop)."""

    def __init__(self, config: PlantedConfig, start: int, stop: int) -> None:
        self.config = config
        self.row_id = np.arange(start, stop, dtype=np.int64)

    def uniform(self, name: str) -> np.ndarray:
        """[n] float64 in [0, 1), another draw for each name."""
        return _uniform(self.config.seed, name, self.row_id)

    @cached_property
    def time(self) -> np.ndarray:
        """[n] int64 seconds, never falling."""
        return START + self.row_id * (self.config.days * DAY) // self.config.rows

    @cached_property
    def hour(self) -> np.ndarray:
        """[n] int64 from 0 to 23"""
        return self.time % DAY // 3600

    @cached_property
    def domain(self) -> np.ndarray:
        """[n] int64 below `domains`"""
        edges = np.cumsum(domain_shares(self.config))[:-1]
        return np.searchsorted(edges, self.uniform("domain"), side="right")

    @cached_property
    def user(self) -> np.ndarray:
        """[n] int64 below users * (1 + domains)"""
        return self._member("user", self.config.users, self.config.user_overlap)

    @cached_property
    def item(self) -> np.ndarray:
        """[n] int64 below items * (1 + domains)"""
        return self._member("item", self.config.items, self.config.item_overlap)

    def _member(self, kind: str, size: int, overlap: float) -> np.ndarray:
        rank = _zipf(self.uniform(kind), size, self.config.skew)
        common = _uniform(self.config.seed, f"common {kind}", rank) < overlap
        return np.where(common, rank, rank + size * (1 + self.domain))

    @cached_property
    def _user_bits(self) -> np.ndarray:
        return _bits4(self.config.seed, "user attributes", self.user)

    @cached_property
    def _item_bits(self) -> np.ndarray:
        return _bits4(self.config.seed, "item words", self.item)

    @cached_property
    def _offer_bits(self) -> np.ndarray:
        return _bits4(self.config.seed, "item offer", self.item)

    @property
    def segment(self) -> np.ndarray:
        """[n] below SEGMENTS"""
        return _pick(self._user_bits[:, 0], SEGMENTS)

    @property
    def age(self) -> np.ndarray:
        """[n] float32, mean 0 and variance 1."""
        return _unit(self._user_bits[:, 1])

    @property
    def price(self) -> np.ndarray:
        """[n] float32, mean 0 and variance 1."""
        return _unit(self._offer_bits[:, 0])

    def word(self, name: str) -> np.ndarray:
        """[n] below ITEM_WORDS[name]"""
        return _pick(self._item_bits[:, list(ITEM_WORDS).index(name)], ITEM_WORDS[name])

    @cached_property
    def tags(self) -> tuple[np.ndarray, np.ndarray]:
        """[n, groups] one tag of each group, and whether the item has it: half of them."""
        picked = _pick(self._offer_bits[:, 1:], 2 * TAGS_OF_GROUP)
        place = picked % TAGS_OF_GROUP + TAGS_OF_GROUP * np.arange(TAG_GROUPS, dtype=np.uint32)
        return place, picked < TAGS_OF_GROUP

    def _effects(self, name: str, size: int, of: np.ndarray) -> np.ndarray:
        """[n, 4] float32 for an attribute of `size` values: an effect and three factors."""
        return _unit(_bits4(self.config.seed, name, np.arange(size)))[of]

    def _factors(self, kind: str, known: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """[n, 4] float32 of variance 1: `known` from attributes, the rest from the id."""
        own = _unit(_bits4(self.config.seed, kind, ids))
        share = self.config.id_share
        return np.float32(sqrt(1 - share)) * known + np.float32(sqrt(share)) * own

    @cached_property
    def _user_factors(self) -> np.ndarray:
        known = self._effects("segment", SEGMENTS, self.segment)
        return self._factors("user", known, self.user)

    @cached_property
    def _item_factors(self) -> np.ndarray:
        words = [self._effects(name, size, self.word(name)) for name, size in ITEM_WORDS.items()]
        return self._factors("item", sum(words[1:], words[0]) / np.float32(2), self.item)

    @cached_property
    def logit(self) -> np.ndarray:
        """[n] float32, the truth."""
        config = self.config
        base = self._effects("domain rate", config.domains, self.domain)[:, 0]
        middle = np.float32(log(config.rate / (1 - config.rate)))
        effects = config.shared * self._shared() + config.specific * self._specific()
        return middle + config.spread * base + effects

    def _shared(self) -> np.ndarray:
        first = self._user_factors[:, 0] + self._item_factors[:, 0] + self.age - self.price
        first += self._effects("hour", 24, self.hour)[:, 0]
        tag, has = self.tags
        # a tag is there half the time: three of them have half the variance of three effects
        for group in range(TAG_GROUPS):
            effect = self._effects("tag", TAG_GROUPS * TAGS_OF_GROUP, tag[:, group])[:, 0]
            first += has[:, group] * effect / np.float32(sqrt(TAG_GROUPS / 2))
        return first / sqrt(6 * 2) + _dot(self._user_factors, self._item_factors) / sqrt(3 * 2)

    def _specific(self) -> np.ndarray:
        a, b, c = (
            self._effects(f"domain {name}", self.config.domains, self.domain) for name in "abc"
        )
        bilinear = _dot(a, self._item_factors) * _dot(b, self._user_factors)
        return bilinear / sqrt(9 * 2) + _dot(c, self._item_factors) / sqrt(3 * 2)

    @cached_property
    def probability(self) -> np.ndarray:
        """[n] float32"""
        return (1 / (1 + np.exp(-self.logit.astype(np.float64)))).astype(np.float32)

    @cached_property
    def label(self) -> np.ndarray:
        """[n] float32, 1 with the row's probability."""
        return (self.uniform("label") < self.probability).astype(np.float32)

    def extra(self, name: str) -> np.ndarray:
        """[n] int64 below `extra_values`"""
        return (self.uniform(name) * self.config.extra_values).astype(np.int64)


def domain_shares(config: PlantedConfig) -> np.ndarray:
    """[domains] the expected share of each in the rows, falling."""
    weights = np.arange(1, config.domains + 1, dtype=np.float64) ** -config.tail
    return weights / weights.sum()


def _hash(seed: int, name: str, ids: np.ndarray) -> np.ndarray:
    """[n] uint64: splitmix64 of the ids, from a start of its own for each (seed, name)."""
    start = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    bits = ids.astype(np.uint64)
    bits *= 0x9E3779B97F4A7C15
    bits += int.from_bytes(start, "little")
    bits ^= bits >> 30
    bits *= 0xBF58476D1CE4E5B9
    bits ^= bits >> 27
    bits *= 0x94D049BB133111EB
    bits ^= bits >> 31
    return bits


def _uniform(seed: int, name: str, ids: np.ndarray) -> np.ndarray:
    """[n] float64 in [0, 1)"""
    return (_hash(seed, name, ids) >> 11).view(np.int64) * 2.0**-53


def _bits4(seed: int, name: str, ids: np.ndarray) -> np.ndarray:
    """[n, 4] uint16, independent of each other."""
    return _hash(seed, name, ids).astype("<u8", copy=False).view("<u2").reshape(-1, 4)


def _pick(bits: np.ndarray, size: int) -> np.ndarray:
    """uint32 below `size`, of 16 random bits."""
    return bits.astype(np.uint32) * size >> 16


def _unit(bits: np.ndarray) -> np.ndarray:
    """16 random bits as float32, uniform with mean 0 and variance 1."""
    return (bits.astype(np.float32) - np.float32(32767.5)) * np.float32(sqrt(12) / 65536)


def _dot(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[n] the product of the three factors, which stand behind the effect."""
    pairs = left * right
    return pairs[:, 1] + pairs[:, 2] + pairs[:, 3]


def _zipf(uniform: np.ndarray, size: int, skew: float) -> np.ndarray:
    """[n] int64 below `size`, r about (r + 1) ** -skew as often as 0: a cut Pareto, floored."""
    if skew == 1:
        reached = np.exp(uniform * log(size + 1))
    else:
        power = 1 - skew
        reached = (1 + uniform * ((size + 1) ** power - 1)) ** (1 / power)
    return np.minimum(reached.astype(np.int64) - 1, size - 1)
