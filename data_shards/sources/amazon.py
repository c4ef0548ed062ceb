"""Amazon Review Data as published: review files of 2014 or 2018, joined with item metadata on asin.

A domain is one review file, and a piece. Fields: user, item, stars; of the metadata title, brand,
category (multi-valued: the whole path; else its last part), main_category, price. Counted as
dropped: bad_row, duplicate (same user, item and time; the first is kept), three_stars. Counted, the
row kept: kept_without_metadata, kept_script_title (the title is JavaScript or CSS, so null),
kept_without_price.
"""

# Arrow makes its compute functions when it is imported, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_shards.errors import UserError, unknown
from data_shards.hashing import mixed, paired, xxh64
from data_shards.schema import Field
from data_shards.sources.amazon_items import Items, parse_line
from data_shards.sources.per_user import PerUser, PerUserConfig
from data_shards.sources.table_columns import (
    Checked,
    as_integer,
    as_number,
    as_text,
    count,
    mask,
)
from data_shards.sources.table_files import Chunk, Files

REVIEW = ("reviewerID", "asin", "overall", "unixReviewTime")
OF_ITEM = ("title", "brand", "category", "main_category", "price")
OFFERED = ("domain", "user", "item", "stars", *OF_ITEM)
ROW_BITS = 40


@dataclass(frozen=True)
class AmazonConfig:
    """`[data.source]` with kind = "amazon"."""

    files: dict[str, dict[str, str]]
    """Domain to its files: { gift_cards = { reviews = "...", meta = "..." } }."""
    kind: Literal["amazon"] = "amazon"
    label: Literal["above_three_drop_three", "above_three", "all_positive"] = (
        "above_three_drop_three"
    )
    """4 and 5 stars are positive, 3 left out or negative; or every review is positive (MLoRA)."""
    bad_rows: Literal["error", "drop"] = "error"
    per_user: PerUserConfig | None = None

    def __post_init__(self) -> None:
        if not self.files:
            raise UserError("amazon: no files; give files = { domain = { reviews = '...' } }")
        for domain, files in self.files.items():
            if not {"reviews"} <= set(files) <= {"reviews", "meta"}:
                raise UserError(
                    f"amazon: the files of {domain!r} are reviews and, if you like, meta; "
                    f"not {', '.join(files) or 'none'}"
                )

    def describe(self) -> dict[str, Any]:
        """What decides the rows, without the places where files lie."""
        described = asdict(self)
        described["files"] = {domain: sorted(files) for domain, files in self.files.items()}
        return described


class Amazon:
    """Reviews with the fields asked for."""

    def __init__(self, config: AmazonConfig, fields: tuple[Field, ...]) -> None:
        self.config = config
        self.fields = fields
        made = config.per_user.made if config.per_user else ()
        for field in fields:
            _check(field, (*OFFERED, *made), made)
        self._reviews = Reviews(config)
        self._rows: Reviews | PerUser = self._reviews
        if config.per_user:
            _check_keys(config.per_user)
            config.per_user.check(fields, dict.fromkeys(OF_ITEM, "item"))
            if config.per_user.negatives and "stars" in {field.name for field in fields}:
                raise UserError("amazon: a drawn negative has no stars; leave the field out")
            self._rows = PerUser(config.per_user, self._reviews)
        self._items = cache(self._read_items)

    def pieces(self) -> tuple[str, ...]:
        """A domain each, by name; with a per-user stage, a range of users."""
        return self._rows.pieces()

    def read(self, piece: int, dropped: Counter[str]) -> Iterator[pa.Table]:
        """Rows of a piece, in the order of the review file."""
        for rows in self._rows.read(piece, dropped):
            for domain in pc.unique(rows["domain"]).to_pylist():
                own = rows.filter(pc.equal(rows["domain"], domain))
                yield self._with_item(own, domain, dropped)

    def state(self) -> list[Any]:
        """Review and metadata files."""
        paths = [path for files in self.config.files.values() for path in files.values()]
        return [Files(path, "jsonl").states() for path in paths]

    def describe(self) -> dict[str, Any]:
        """What decides the rows, without the places where files lie."""
        return self.config.describe()

    def _with_item(self, rows: pa.Table, domain: str, dropped: Counter[str]) -> pa.Table:
        columns = {name: rows[name] for name in ("row_id", "domain", "label", "time")}
        asked = [field for field in self.fields if field.name in OF_ITEM]
        if asked:
            items = self._items(domain)
            found = items.index.find(rows["item"].combine_chunks())
            items = items.table.take(pa.array(found, mask=found < 0))
            count(dropped, "kept_without_metadata", found < 0)
            self._note(items, found >= 0, dropped)
            columns |= {field.name: _item_column(field, items) for field in asked}
        columns |= {field.name: rows[field.name] for field in self.fields if field not in asked}
        names = [field.name for field in self.fields if field.name != "domain"]
        return pa.table(columns).select(["row_id", "domain", "label", "time", *names])

    def _note(self, items: pa.Table, found: np.ndarray, dropped: Counter[str]) -> None:
        names = {field.name for field in self.fields}
        if "title" in names:
            count(dropped, "kept_script_title", mask(items["script_title"]))
        if "price" in names:
            count(dropped, "kept_without_price", mask(pc.is_null(items["price"])) & found)

    def _read_items(self, domain: str) -> Items:
        if "meta" not in self.config.files[domain]:
            return Items([])
        files = Files(self.config.files[domain]["meta"], "jsonl", parse=parse_line)
        refuse = _bad_line(self.config, files, Counter())
        return Items(files.objects(0, refuse))


class Reviews:
    """Reviews alone: fixed columns, user, item, stars."""

    def __init__(self, config: AmazonConfig) -> None:
        self.config = config
        self.domains = tuple(sorted(config.files))
        self._files = cache(self._open)

    def _open(self, piece: int) -> Files:
        files = Files(self.config.files[self.domains[piece]]["reviews"], "jsonl", parse=parse_line)
        if len(files.names) != 1:
            raise UserError(f"amazon: reviews of {self.domains[piece]!r} is one file, no glob")
        return files

    def identity(self) -> dict[str, Any]:
        """What the reviews come from, places included."""
        states = [self._files(piece).states() for piece in range(len(self.domains))]
        return {"config": asdict(self.config), "files": states}

    def pieces(self) -> tuple[str, ...]:
        """The domains, by name."""
        return self.domains

    def read(self, piece: int, dropped: Counter[str]) -> Iterator[pa.Table]:
        """A domain's reviews in the order of the file."""
        files = self._files(piece)
        seen = _Seen()
        refuse = _bad_line(self.config, files, dropped)
        for chunk in files.read(files.pieces[0], REVIEW, refuse):
            rows = self._rows(files, piece, chunk, dropped)
            fresh = seen.fresh(_hashes(rows))
            count(dropped, "duplicate", ~fresh)
            rows = rows.filter(pa.array(fresh))
            if self.config.label == "above_three_drop_three":
                three = rows["stars"].to_numpy() == 3
                count(dropped, "three_stars", three)
                rows = rows.filter(pa.array(~three))
            if len(rows):
                yield rows

    def _rows(self, files: Files, piece: int, chunk: Chunk, dropped: Counter[str]) -> pa.Table:
        checked = Checked(files, 0, chunk, drop=self.config.bad_rows == "drop")
        user = checked.column("reviewerID", as_text, "a user", null=False)
        item = checked.column("asin", as_text, "an item", null=False)
        time = checked.column("unixReviewTime", as_integer, "whole seconds", null=False)
        stars = checked.column("overall", as_number, "1 to 5 stars", null=False)
        values = pc.fill_null(stars, np.nan).to_numpy()
        outside = ~((values >= 1) & (values <= 5))
        checked.refuse(outside & ~checked.bad, "overall", None, "1 to 5 stars")
        count(dropped, "bad_row", checked.bad)
        positive = (values > 3) | (self.config.label == "all_positive")
        columns = {
            "row_id": pa.array(chunk.rows | (piece << ROW_BITS), pa.int64()),
            "domain": pa.array([self.domains[piece]] * len(values), pa.string()),
            "label": pa.array(positive.astype(np.float32)),
            "time": time,
            "user": user,
            "item": item,
            "stars": stars.cast(pa.float32()),
        }
        return pa.table(columns).filter(pa.array(~checked.bad))


class _Seen:
    """Hashes met so far, 8 bytes each: sorted runs, of which each is longer than the next."""

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def fresh(self, hashes: np.ndarray) -> np.ndarray:
        """[n] whether a hash is met for the first time."""
        fresh = np.zeros(len(hashes), bool)
        fresh[np.unique(hashes, return_index=True)[1]] = True
        for run in self.runs:
            near = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            fresh &= run[near] != hashes
        new = np.sort(hashes[fresh])
        while self.runs and len(self.runs[-1]) <= len(new):
            new = np.sort(np.concatenate([self.runs.pop(), new]))
        if len(new):
            self.runs.append(new)
        return fresh


def _hashes(rows: pa.Table) -> np.ndarray:
    user, item = (xxh64(rows[name].combine_chunks()) for name in ("user", "item"))
    return paired(paired(user, item), mixed(rows["time"].to_numpy(), 0))


def _bad_line(
    config: AmazonConfig, files: Files, dropped: Counter[str]
) -> Callable[[int, str], None]:
    def bad_line(row: int, wrong: str) -> None:
        if config.bad_rows == "error":
            raise UserError(
                f"{files.row_name(0, row)} {wrong}; get the file again, or set "
                "bad_rows = 'drop' to leave such rows out and count them"
            )
        dropped["bad_row"] += 1

    return bad_line


def _item_column(field: Field, items: pa.Table) -> pa.ChunkedArray | pa.Array:
    if field.name == "category" and not field.multi:
        lasts = [path[-1] if path else None for path in items["category"].to_pylist()]
        return pa.array(lasts, pa.string())
    return items[field.name]


def _check(field: Field, offered: tuple[str, ...], made: tuple[str, ...]) -> None:
    if field.name not in offered:
        raise unknown("field of amazon", field.name, offered)
    if (field.kind == "number") != (field.name in ("price", "stars")):
        raise UserError(f"amazon: price and stars are numbers and no others; {field.name!r} is not")
    if field.multi and field.name not in ("category", *made):
        raise UserError(f"amazon: {field.name!r} has one value; only category can be multi-valued")


def _check_keys(per_user: PerUserConfig) -> None:
    for name in per_user.keys:
        if name not in ("user", "item"):
            raise unknown("field of the reviews in per_user", name, ("user", "item"))
