"""Planted: click logs made by known rules, at any size, to see how much of the truth is learnt.

`planted_rows` says the rules. Here they become columns, and the best scores that a model can reach.
"""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_shards.errors import UserError, unknown
from data_shards.schema import Field
from data_shards.sources.planted_rows import TAGS_OF_GROUP, PlantedConfig, Rows

PIECE_ROWS = 1 << 20
TABLE_ROWS = 1 << 16
LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "rows": (1, 10**11),
    "days": (1, 1_000),
    "domains": (1, 100_000),
    "tail": (0, 10),
    "users": (1, 10**10),
    "items": (1, 10**10),
    "skew": (0, 10),
    "user_overlap": (0, 1),
    "item_overlap": (0, 1),
    "rate": (0.0001, 0.9999),
    "spread": (0, 10),
    "shared": (0, 10),
    "specific": (0, 10),
    "id_share": (0, 1),
    "extra_ids": (0, 10_000),
    "extra_values": (1, 10**15),
}

SEGMENT = pa.array("artist clerk cook doctor driver farmer student teacher".split())
CATEGORY = pa.array(
    "backpack blanket camera chair guitar jacket kettle keyboard "
    "lamp novel puzzle racket scarf speaker tent watch".split()
)
LOOK = pa.array(
    "antique bright compact cosy deluxe elegant foldable heavy "
    "light modern plain quiet robust rustic slim vivid".split()
)
MATERIAL = pa.array(
    "bamboo brass canvas ceramic copper cotton glass granite "
    "leather linen marble nylon oak silk steel wool".split()
)
FRONT = "Al Bor Cas Dor El Fen Gal Hal Is Kor Lun Mar Nor Or Per Sol".split()
BACK = "bard ca dane den dia fel gren ix lan mond nov ria son ton vale wick".split()
BRAND = pa.array(front + back for front, back in product(FRONT, BACK))
TAG = pa.array(f"{group}{n}" for group in ("style", "use", "offer") for n in range(TAGS_OF_GROUP))
HOUR = pa.array(f"{hour:02d}" for hour in range(24))
DIGITS = np.array([f"{number:04d}" for number in range(10_000)], "S4").view("<u4")

Column = Callable[[Rows], pa.Array]


class Planted:
    """The source `planted`, with the columns of these fields; `columns` says what is on offer."""

    def __init__(self, config: PlantedConfig, fields: tuple[Field, ...]) -> None:
        _check_limits(config)
        offered = columns(config)
        for field in fields:
            _check_field(field, offered, config)
        self.config = config
        self._columns = {field.name: offered[field.name] for field in fields}

    def pieces(self) -> tuple[str, ...]:
        """One for every 1,048,576 rows."""
        return tuple(f"row-{start:012d}" for start in range(0, self.config.rows, PIECE_ROWS))

    def read(self, piece: int, dropped: Counter[str]) -> Iterator[pa.Table]:
        """The rows of a piece by row_id, with their true `probability`; none is dropped."""
        stop = min((piece + 1) * PIECE_ROWS, self.config.rows)
        for start in range(piece * PIECE_ROWS, stop, TABLE_ROWS):
            yield self._table(Rows(self.config, start, min(start + TABLE_ROWS, stop)))

    def state(self) -> list[Any]:
        """Nothing is read."""
        return []

    def describe(self) -> dict[str, Any]:
        """The whole config."""
        return asdict(self.config)

    def _table(self, rows: Rows) -> pa.Table:
        always = {
            "row_id": pa.array(rows.row_id),
            "domain": _domain(rows),
            "label": pa.array(rows.label),
            "time": pa.array(rows.time),
            "probability": pa.array(rows.probability),
        }
        asked = {name: make(rows) for name, make in self._columns.items() if name not in always}
        return pa.table({**always, **asked})


def _check_limits(config: PlantedConfig) -> None:
    values = asdict(config)
    for name, (low, high) in LIMITS.items():
        if not low <= values[name] <= high:
            raise UserError(f"planted: {name} is from {low:g} to {high:g}, not {values[name]}")


def _check_field(field: Field, offered: Mapping[str, Column], config: PlantedConfig) -> None:
    if field.name not in offered:
        raise unknown("planted field", field.name, offered)
    made = offered[field.name](Rows(config, 0, 1)).type
    asked = {"number": pa.float32(), "tokens": pa.list_(pa.int32())}.get(field.kind, pa.string())
    if made != (pa.list_(asked) if field.multi else asked):
        raise UserError(
            f"planted: the field {field.name!r} holds {made}; a number is of kind number, a list "
            "has multi = true, and a string neither"
        )


@cache
def _domain_names(domains: int) -> pa.Array:
    return pa.array(f"d{number}" for number in range(domains))


def _domain(rows: Rows) -> pa.Array:
    return _domain_names(rows.config.domains).take(pa.array(rows.domain))


def _segment(rows: Rows) -> pa.Array:
    return SEGMENT.take(pa.array(rows.segment))


def _age(rows: Rows) -> pa.Array:
    """Years from 18 to 77."""
    return pa.array(np.floor(48 + rows.age * np.float32(17.3)))


def _category(rows: Rows) -> pa.Array:
    return CATEGORY.take(pa.array(rows.word("category")))


def _brand(rows: Rows) -> pa.Array:
    return BRAND.take(pa.array(rows.word("brand")))


def _title(rows: Rows) -> pa.Array:
    """The item's four words, as in "slim oak chair by Alden"."""
    look, material = pa.array(rows.word("look")), pa.array(rows.word("material"))
    words = (LOOK.take(look), MATERIAL.take(material), _category(rows), "by", _brand(rows))
    return pc.binary_join_element_wise(*words, " ")


def _tags(rows: Rows) -> pa.Array:
    tag, has = rows.tags
    offsets = np.concatenate([[0], np.cumsum(has.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), TAG.take(pa.array(tag[has])))


def _price(rows: Rows) -> pa.Array:
    return pa.array((20 * np.exp(0.8 * rows.price.astype(np.float64))).astype(np.float32))


COLUMNS: dict[str, Column] = {
    "user": lambda rows: _member("u", rows.user, rows.config.users, rows.config),
    "segment": _segment,
    "age": _age,
    "item": lambda rows: _member("i", rows.item, rows.config.items, rows.config),
    "category": _category,
    "brand": _brand,
    "title": _title,
    "tags": _tags,
    "price": _price,
    "hour": lambda rows: HOUR.take(pa.array(rows.hour)),
    "domain": _domain,
}


def columns(config: PlantedConfig) -> dict[str, Column]:
    """What makes each field on offer."""
    return {**COLUMNS, **{f"f{n}": partial(_extra, f"f{n}") for n in range(config.extra_ids)}}


def _member(prefix: str, ids: np.ndarray, size: int, config: PlantedConfig) -> pa.Array:
    return numbered(prefix, ids, size * (1 + config.domains) - 1)


def _extra(name: str, rows: Rows) -> pa.Array:
    return numbered("v", rows.extra(name), rows.config.extra_values - 1)


def numbered(prefix: str, numbers: np.ndarray, largest: int) -> pa.Array:
    """Strings like "u00000042": an ASCII prefix and fours of digits, as many as `largest` needs.

    All are of one width, so that numpy can lay out their bytes.
    """
    fours = [f"four{place}" for place in range(-(-len(str(largest)) // 4))]
    text = np.empty(len(numbers), [("prefix", f"S{len(prefix)}")] + [(n, "<u4") for n in fours])
    text["prefix"] = prefix.encode()
    for four in reversed(fours):
        higher = numbers // 10_000
        text[four] = DIGITS[numbers - higher * 10_000]
        numbers = higher
    ends = np.arange(len(text) + 1, dtype=np.int32) * np.int32(text.itemsize)
    return pa.StringArray.from_buffers(len(text), pa.py_buffer(ends), pa.py_buffer(text))


@dataclass(frozen=True)
class Best:
    """The scores that no model can expect to beat; no AUC where no pair of rows can differ."""

    log_loss: float
    auc: float | None


def best_scores(probability: np.ndarray) -> Best:
    """Expected scores of predicting the true click rates [n] themselves, in O(n log n).

    The log loss is the mean entropy. The AUC is E[pairs of a click and a non-click in the right
    order, ties half] / E[such pairs], over pairs of different rows whose clicks are independent.
    """
    p = probability.astype(np.float64)
    rate, rows = np.unique(p, return_counts=True)
    no_click = rows * (1 - rate)
    below = np.cumsum(no_click) - no_click
    ties = rows * (rows - 1) * rate * (1 - rate)
    right = (rows * rate * below + ties / 2).sum()
    pairs = p.sum() * (1 - p).sum() - (p * (1 - p)).sum()
    return Best(float(_entropy(p).mean()), float(right / pairs) if pairs > 0 else None)


def best_scores_by_domain(probability: np.ndarray, domain: np.ndarray) -> dict[Any, Best]:
    """`best_scores` of each domain's rows; `domain` [n] holds names or numbers."""
    return {name: best_scores(probability[domain == name]) for name in np.unique(domain).tolist()}


def _entropy(p: np.ndarray) -> np.ndarray:
    """[n] in nats, 0 where p is 0 or 1."""
    inner = (p > 0) & (p < 1)
    q = np.where(inner, p, 0.5)
    return np.where(inner, -q * np.log(q) - (1 - q) * np.log1p(-q), 0.0)
