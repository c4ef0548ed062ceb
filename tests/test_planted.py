"""Planted rows as a source: pure functions of the row number, columns and users' mistakes."""

import hashlib
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.errors import UserError
from data_shards.schema import Field
from data_shards.sources.planted import (
    BRAND,
    CATEGORY,
    COLUMNS,
    HOUR,
    LIMITS,
    LOOK,
    MATERIAL,
    PIECE_ROWS,
    SEGMENT,
    TABLE_ROWS,
    TAG,
    Planted,
    numbered,
)
from data_shards.sources.planted_rows import (
    DAY,
    ITEM_WORDS,
    SEGMENTS,
    START,
    TAG_GROUPS,
    TAGS_OF_GROUP,
    PlantedConfig,
    Rows,
)

KINDS: dict[str, dict[str, Any]] = {
    "age": {"kind": "number"},
    "price": {"kind": "number"},
    "title": {"kind": "text"},
    "tags": {"kind": "id", "multi": True},
}
FIELDS = tuple(Field(name, **KINDS.get(name, {"kind": "id"})) for name in COLUMNS)
USER, DOMAIN = Field("user", "id"), Field("domain", "id")
SMALL = PlantedConfig(rows=200_000, users=500, items=200)


def _table(config: PlantedConfig, fields: tuple[Field, ...] = FIELDS) -> pa.Table:
    source = Planted(config, fields)
    pieces = range(len(source.pieces()))
    return pa.concat_tables([table for piece in pieces for table in source.read(piece, Counter())])


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    return _table(SMALL)


def test_the_columns_of_a_source(rows: pa.Table) -> None:
    assert {field.name: field.type for field in rows.schema} == {
        "row_id": pa.int64(),
        "domain": pa.string(),
        "label": pa.float32(),
        "time": pa.int64(),
        "probability": pa.float32(),
        **{name: pa.string() for name in COLUMNS},
        "age": pa.float32(),
        "price": pa.float32(),
        "tags": pa.list_(pa.string()),
    }
    assert rows["row_id"].to_pylist() == list(range(200_000))
    assert set(rows["label"].unique().to_pylist()) == {0, 1}
    assert all(rows[name].null_count == 0 for name in rows.column_names)
    assert rows["age"].to_numpy().min() >= 18 and rows["age"].to_numpy().max() <= 78
    assert rows["price"].to_numpy().min() > 0


def test_a_piece_alone_is_its_slice_of_the_whole() -> None:
    config = replace(SMALL, rows=PIECE_ROWS + TABLE_ROWS + 17)
    source = Planted(config, (USER,))
    assert source.pieces() == ("row-000000000000", "row-000001048576")
    whole = _table(config, (USER,))
    dropped: Counter[str] = Counter()
    last = pa.concat_tables(Planted(config, (USER,)).read(1, dropped))
    assert last.equals(whole.slice(PIECE_ROWS).combine_chunks()) and not dropped
    assert whole["row_id"].to_pylist() == list(range(config.rows))
    assert [len(table) for table in source.read(1, dropped)] == [TABLE_ROWS, 17]


NUMBERS = ("time", "hour", "domain", "user", "item", "probability", "label")


@settings(max_examples=20)
@given(st.data())
def test_a_row_depends_on_its_number_alone(data: st.DataObject) -> None:
    config = data.draw(st.sampled_from([SMALL, replace(SMALL, skew=1.0, tail=0.0)]))
    start = data.draw(st.integers(0, 1000))
    stop = data.draw(st.integers(start + 1, 1100))
    whole, part = Rows(config, 0, 1100), Rows(config, start, stop)
    for name in NUMBERS:
        assert np.array_equal(getattr(whole, name)[start:stop], getattr(part, name))


def test_fields_asked_for_change_no_row(rows: pa.Table) -> None:
    fields = (Field("f1", "id"), Field("item", "anonymous"), Field("age", "number"))
    some = _table(replace(SMALL, extra_ids=2), fields)
    assert some.column_names[5:] == ["f1", "item", "age"]
    assert some.drop_columns(["f1"]).equals(rows.select(some.drop_columns(["f1"]).column_names))


def test_rows_are_the_same_for_ever() -> None:
    rows = Rows(PlantedConfig(rows=1000), 500, 1000)
    made = (rows.user, rows.item, rows.domain, rows.hour, rows.label)
    digest = hashlib.sha256(b"".join(column.astype("<i8").tobytes() for column in made))
    assert digest.hexdigest() == "fc6382908fdf110392706f66a086fa3c56c97644cfb0aaf0029ae45d2faa7f1c"


@pytest.mark.parametrize("change", [{"seed": 1}, {"users": 501}, {"specific": 0.0}, {"rate": 0.3}])
def test_another_config_makes_other_rows(rows: pa.Table, change: dict[str, Any]) -> None:
    other = _table(replace(SMALL, **change), (USER,))
    assert not other["probability"].equals(rows["probability"])
    assert Planted(replace(SMALL, **change), ()).describe() != Planted(SMALL, ()).describe()


def test_other_seeds_draw_other_people_and_tastes() -> None:
    one, two = Rows(SMALL, 0, 1000), Rows(replace(SMALL, seed=1), 0, 1000)
    for name in ("user", "item", "domain", "label", "logit"):
        assert (getattr(one, name) == getattr(two, name)).mean() < 0.9


def test_describe_is_the_whole_config() -> None:
    assert PlantedConfig(**Planted(SMALL, ()).describe()) == SMALL


def test_word_lists_have_the_sizes_that_the_rows_pick_from() -> None:
    words = {"category": CATEGORY, "brand": BRAND, "look": LOOK, "material": MATERIAL}
    assert {name: len(set(list_.to_pylist())) for name, list_ in words.items()} == ITEM_WORDS
    assert len(set(SEGMENT.to_pylist())) == SEGMENTS and len(HOUR) == 24
    assert len(set(TAG.to_pylist())) == TAG_GROUPS * TAGS_OF_GROUP


def test_a_title_holds_its_category_and_brand_and_belongs_to_its_item(rows: pa.Table) -> None:
    items = rows.select(["item", "title", "category", "brand", "price", "tags"]).slice(0, 20_000)
    seen: dict[str, dict[str, Any]] = {}
    for row in items.to_pylist():
        assert seen.setdefault(row["item"], row) == row
        look, material, category, by, brand = row["title"].split(" ")
        assert (category, by, brand) == (row["category"], "by", row["brand"])
        assert look in LOOK.to_pylist() and material in MATERIAL.to_pylist()
        assert len(set(row["tags"])) == len(row["tags"]) <= TAG_GROUPS
    assert len(seen) > 200
    counts = Counter(tag for row in seen.values() for tag in row["tags"])
    assert len(counts) == len(TAG)


def test_time_never_falls_and_spans_the_days(rows: pa.Table) -> None:
    time = rows["time"].to_numpy()
    assert time[0] == START and (np.diff(time) >= 0).all()
    assert time[-1] == START + 28 * DAY - -(-28 * DAY // SMALL.rows)
    assert rows["hour"].to_pylist() == [f"{hour:02d}" for hour in time % DAY // 3600]
    far = Rows(PlantedConfig(rows=10**11, days=1000), 10**11 - 1, 10**11)
    assert far.time[0] == START + 1000 * DAY - 1


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=9), st.sampled_from(["", "u", "ab"]))
def test_numbered_strings(numbers: list[int], prefix: str) -> None:
    largest = max(numbers)
    width = -(-len(str(largest)) // 4) * 4
    made = numbered(prefix, np.array(numbers), largest)
    made.validate(full=True)
    assert made.to_pylist() == [f"{prefix}{number:0{width}d}" for number in numbers]


def test_extra_ids_are_within_their_values_and_unlike_each_other() -> None:
    config = replace(SMALL, extra_ids=3, extra_values=50)
    extra = _table(config, tuple(Field(f"f{n}", "id") for n in range(3)))
    assert set(extra["f0"].to_pylist()) == {f"v{n:04d}" for n in range(50)}
    assert not extra["f0"].equals(extra["f1"]) and not extra["f1"].equals(extra["f2"])


@pytest.mark.parametrize("name", sorted(LIMITS))
def test_values_out_of_their_limits_are_refused(name: str) -> None:
    low, high = LIMITS[name]
    for value in (low - 1, high * 2 + 1, float("nan")):
        with pytest.raises(UserError, match=f"planted: {name} is from .* to .*, not "):
            Planted(replace(SMALL, **{name: value}), ())
    for value in (low, high):
        config = replace(SMALL, **{name: value})
        last = Rows(config, config.rows - 5, config.rows)
        assert np.isfinite(last.logit).all() and (last.user >= 0).all() and (last.item >= 0).all()


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (Field("titel", "text"), "unknown planted field 'titel'; the nearest is 'title'"),
        (Field("f2", "id"), "unknown planted field 'f2'"),
        (Field("price", "id"), "'price' holds float; a number is of kind number"),
        (Field("user", "number"), "'user' holds string"),
        (Field("tags", "id"), r"'tags' holds list<.*string>.*; .* a list has multi = true"),
        (Field("brand", "id", multi=True), "'brand' holds string; .* and a string neither"),
    ],
)
def test_fields_not_on_offer_are_refused(field: Field, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Planted(replace(SMALL, extra_ids=2), (DOMAIN, field))
