"""Amazon's review files: published counts, both forms, and what is cleaned, kept or counted."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data_shards.errors import UserError
from data_shards.schema import Field
from data_shards.sources.amazon import Amazon, AmazonConfig
from data_shards.sources.amazon_items import clean, price
from data_shards.sources.negatives import NegativesConfig
from data_shards.sources.per_user import HistoryConfig, PerUserConfig

FIELDS = (
    Field("user", "anonymous", side="user"),
    Field("item", "id", side="item"),
    Field("title", "text", side="item"),
    Field("brand", "id", side="item"),
    Field("category", "id", side="item", multi=True),
    Field("main_category", "id", side="item"),
    Field("price", "number", side="item"),
    Field("domain", "id"),
)
STARS = (*FIELDS, Field("stars", "number"))


def _rows(source: Amazon) -> tuple[pa.Table, Counter[str]]:
    dropped: Counter[str] = Counter()
    pieces = range(len(source.pieces()))
    tables = [table for piece in pieces for table in source.read(piece, dropped)]
    return pa.concat_tables(tables), dropped


def _gift_cards(shared_data: Path, **options: Any) -> AmazonConfig:
    folder = shared_data / "amazon-2018"
    files = {
        "reviews": str(folder / "Gift_Cards_5.json.gz"),
        "meta": str(folder / "meta_Gift_Cards.json.gz"),
    }
    return AmazonConfig({"gift_cards": files}, **options)


def test_gift_cards_of_2018(shared_data: Path) -> None:
    rows, dropped = _rows(Amazon(_gift_cards(shared_data), STARS))
    assert len(rows) + dropped["duplicate"] + dropped["three_stars"] == 2_972
    assert dropped["duplicate"] == 3 and dropped["three_stars"] == 32
    assert len(set(rows["row_id"].to_pylist())) == len(rows) == 2_937
    assert rows["row_id"].to_pylist() == sorted(rows["row_id"].to_pylist())
    assert sum(rows["label"].to_pylist()) == 2_752 + 154 - 2
    assert dropped["kept_without_price"] == rows["price"].null_count - rows["title"].null_count
    first = rows.slice(0, 1).to_pylist()[0]
    assert (first["user"], first["item"], first["time"]) == (
        "A31UBHTUUIFJUT",
        "B004LLIKVU",
        1529193600,
    )
    assert first["category"][:2] == ["Gift Cards", "Gift Cards"]
    titles = [title for title in rows["title"].to_pylist() if title]
    assert len(titles) > 2_900 and not any("&#" in title or "<" in title for title in titles)


def test_label_rules(shared_data: Path) -> None:
    every, dropped = _rows(Amazon(_gift_cards(shared_data, label="all_positive"), STARS))
    assert len(every) == 2_969 and set(every["label"].to_pylist()) == {1.0}
    assert "three_stars" not in dropped
    above, _ = _rows(Amazon(_gift_cards(shared_data, label="above_three"), STARS))
    pairs = set(zip(above["stars"].to_pylist(), above["label"].to_pylist(), strict=True))
    assert pairs == {(1.0, 0.0), (2.0, 0.0), (3.0, 0.0), (4.0, 1.0), (5.0, 1.0)}


def test_negatives_bring_their_own_item(shared_data: Path) -> None:
    stage = PerUserConfig(
        history=HistoryConfig(), negatives=NegativesConfig(per_positive=2, seed=3)
    )
    fields = (*FIELDS, Field("history", "id", multi=True))
    config = _gift_cards(shared_data, label="all_positive", per_user=stage)
    rows, dropped = _rows(Amazon(config, fields))
    assert len(rows) == 3 * 2_969 - dropped["negatives_short"] and dropped["duplicate"] == 3
    title = dict(zip(rows["item"].to_pylist(), rows["title"].to_pylist(), strict=True))
    touched = {(row["user"], row["item"]) for row in rows.to_pylist() if row["label"]}
    for row in rows.to_pylist():
        assert row["title"] == title[row["item"]]
        assert row["label"] or (row["user"], row["item"]) not in touched


REVIEWS = [
    {"reviewerID": "A", "asin": "1", "overall": 5.0, "unixReviewTime": 10},
    {"reviewerID": "A", "asin": "2", "overall": 1.0, "unixReviewTime": 20},
    {"reviewerID": "B", "asin": "3", "overall": 4.0, "unixReviewTime": 30},
    {"reviewerID": "B", "asin": "4", "overall": 4.0, "unixReviewTime": 30},
]
META = [
    {"asin": "1", "title": "Drum &amp; sticks", "price": 12.5, "categories": [["Music", "Drums"]]},
    {"asin": "1", "title": "A second one", "price": 1.0},
    {"asin": "2", "title": "var aPageStart = (new Date()).getTime();", "brand": "<b>Acme</b>"},
    {"asin": "3", "title": "  A\n <i>fine</i>  guitar ", "price": "$5.00 - $10.00"},
]


def _published(folder: Path, reviews: str, meta: str) -> AmazonConfig:
    (folder / "reviews.json").write_text(reviews)
    (folder / "meta.json.gz").write_bytes(gzip.compress(meta.encode()))
    paths = {"reviews": str(folder / "reviews.json"), "meta": str(folder / "meta.json.gz")}
    return AmazonConfig({"music": paths})


def _lines(objects: list[dict[str, Any]], spell: Any) -> str:
    return "".join(f"{spell(found)}\n" for found in objects)


@pytest.mark.parametrize("spell", [json.dumps, repr], ids=["json of 2018", "literals of 2014"])
def test_both_forms_read_alike(tmp_path: Path, spell: Any) -> None:
    config = _published(tmp_path, _lines(REVIEWS, spell), _lines(META, spell))
    rows, dropped = _rows(Amazon(config, STARS))
    none = dict.fromkeys(("title", "brand", "category", "main_category", "price"))
    found = [{**none, "title": "Drum & sticks", "price": 12.5, "category": ["Music", "Drums"]}]
    found[0]["main_category"] = "Music"
    found += [{**none, "brand": "Acme"}, {**none, "title": "A fine guitar", "price": 7.5}, none]
    fixed = [
        {"row_id": 0, "label": 1.0, "time": 10, "user": "A", "item": "1", "stars": 5.0},
        {"row_id": 1, "label": 0.0, "time": 20, "user": "A", "item": "2", "stars": 1.0},
        {"row_id": 2, "label": 1.0, "time": 30, "user": "B", "item": "3", "stars": 4.0},
        {"row_id": 3, "label": 1.0, "time": 30, "user": "B", "item": "4", "stars": 4.0},
    ]
    both = zip(fixed, found, strict=True)
    assert rows.to_pylist() == [{**row, **item, "domain": "music"} for row, item in both]
    assert dropped == {
        "kept_without_metadata": 1,
        "kept_script_title": 1,
        "kept_without_price": 1,
    }


def test_a_category_of_one_value_is_the_last(tmp_path: Path) -> None:
    config = _published(tmp_path, _lines(REVIEWS, repr), _lines(META, repr))
    rows, _ = _rows(Amazon(config, (Field("category", "id"),)))
    assert rows["category"].to_pylist() == ["Drums", None, None, None]


def test_without_metadata(tmp_path: Path) -> None:
    config = _published(tmp_path, _lines(REVIEWS, repr), "")
    files = {"music": {"reviews": config.files["music"]["reviews"]}}
    rows, dropped = _rows(Amazon(AmazonConfig(files), FIELDS))
    assert rows["title"].null_count == 4 and dropped == {"kept_without_metadata": 4}


def test_duplicates_across_chunks(tmp_path: Path) -> None:
    many = [
        {"reviewerID": f"U{n % 70_000}", "asin": "1", "overall": 5, "unixReviewTime": 1}
        for n in range(150_000)
    ]
    config = _published(tmp_path, _lines(many, json.dumps), "")
    rows, dropped = _rows(Amazon(config, (Field("user", "id"),)))
    assert rows["row_id"].to_pylist() == list(range(70_000))
    assert dropped["duplicate"] == 80_000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"reviewerID": "A"', r"reviews.json line 5 is no row: neither JSON nor"),
        ("__import__('os').system('true')", "line 5 is no row"),
        ("[1, 2]", r"line 5 is no row: it is '\[1, 2\]'"),
        ("[" * 200_000, "line 5 is no row: maximum recursion depth"),
        (json.dumps({**REVIEWS[0], "asin": None}), "line 5: asin is None; expected an item"),
        (json.dumps({**REVIEWS[0], "overall": 9}), "line 5: overall is 9.0; expected 1 to 5 stars"),
        (json.dumps({**REVIEWS[0], "unixReviewTime": "May"}), "line 5: .* expected whole seconds"),
    ],
)
def test_a_malformed_line(tmp_path: Path, line: str, message: str) -> None:
    config = _published(tmp_path, _lines(REVIEWS, json.dumps) + line + "\n", "")
    with pytest.raises(UserError, match=message):
        _rows(Amazon(config, FIELDS))
    forgiving = AmazonConfig(config.files, bad_rows="drop")
    rows, dropped = _rows(Amazon(forgiving, FIELDS))
    assert len(rows) == 4 and dropped["bad_row"] == 1


@pytest.mark.parametrize("line", ["{'asin'", "[" * 200_000])
def test_a_malformed_line_of_metadata(tmp_path: Path, line: str) -> None:
    config = _published(tmp_path, _lines(REVIEWS, repr), _lines(META, repr) + line + "\n")
    with pytest.raises(UserError, match="meta.json.gz line 5 is no row"):
        _rows(Amazon(config, FIELDS))
    rows, dropped = _rows(Amazon(AmazonConfig(config.files, bad_rows="drop"), FIELDS))
    assert len(rows) == 4 and dropped["kept_without_metadata"] == 1


def test_a_cut_file(shared_data: Path, tmp_path: Path) -> None:
    whole = (shared_data / "amazon-2018" / "Gift_Cards_5.json.gz").read_bytes()
    (tmp_path / "cut.json.gz").write_bytes(whole[:-1000])
    config = AmazonConfig({"cut": {"reviews": str(tmp_path / "cut.json.gz")}})
    with pytest.raises(UserError, match="cut.json.gz: cannot be read as jsonl .*get it again"):
        _rows(Amazon(config, FIELDS))


ONE = AmazonConfig({"a": {"reviews": "nowhere.json"}})
DRAWN = AmazonConfig(ONE.files, per_user=PerUserConfig(negatives=NegativesConfig(per_positive=1)))
MISTAKES = {
    "no files; give files": lambda: AmazonConfig({}),
    "the files of 'a' are reviews and, if you like, meta; not none": lambda: AmazonConfig(
        {"a": {}}
    ),
    "not reviews, items": lambda: AmazonConfig({"a": {"reviews": "x", "items": "y"}}),
    "unknown field of amazon 'titel'; the nearest is 'title'": lambda: Amazon(
        ONE, (Field("titel", "text"),)
    ),
    "price and stars are numbers and no others; 'price' is not": lambda: Amazon(
        ONE, (Field("price", "id"),)
    ),
    "only category can be multi-valued": lambda: Amazon(ONE, (Field("brand", "id", multi=True),)),
    "a drawn negative has no stars": lambda: Amazon(DRAWN, STARS),
    "unknown field of the reviews in per_user 'movie'": lambda: Amazon(
        AmazonConfig(ONE.files, per_user=PerUserConfig(history=HistoryConfig(of="movie"))), FIELDS
    ),
    "nowhere.json: no such file": lambda: _rows(Amazon(ONE, FIELDS)),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message: str) -> None:
    with pytest.raises(UserError, match=message):
        MISTAKES[message]()


def test_reviews_are_one_file(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("{}\n")
    config = AmazonConfig({"a": {"reviews": str(tmp_path / "*.json")}})
    with pytest.raises(UserError, match="reviews of 'a' is one file, no glob"):
        _rows(Amazon(config, FIELDS))


def test_description_names_no_place(shared_data: Path) -> None:
    config = _gift_cards(shared_data)
    assert config.describe()["files"] == {"gift_cards": ["meta", "reviews"]}
    assert str(shared_data) not in json.dumps(Amazon(config, FIELDS).describe())


@pytest.mark.parametrize(
    ("text", "number"),
    [("$12.99", 12.99), ("$5 - $10", 7.5), ("$1,299.00", 1299.0), (3, 3.0), ("", None)]
    + [(".a-box{color:red;margin:0} $5", None), (None, None), ("Unavailable", None), (True, None)],
)
def test_prices(text: object, number: float | None) -> None:
    assert price(text) == number


@pytest.mark.parametrize(
    ("text", "plain"),
    [("3 < 4 &amp;amp; <br/>5", "3 < 4 & 5"), ("<img src='x", None), (" ", None), (7, None)],
)
def test_clean(text: object, plain: str | None) -> None:
    assert clean(text) == plain
