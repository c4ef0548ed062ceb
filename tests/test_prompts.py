"""Prompts: the papers' own sentences letter by letter, missing values, and users' mistakes."""

from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from data_shards.errors import UserError
from data_shards.prompts import PromptConfig, Side, render, text_id
from data_shards.schema import Field

SIDES = get_args(Side)
MOVIE = (
    Field("gender", "id", "user"),
    Field("occupation", "id", "user"),
    Field("title", "text", "item"),
    Field("genre", "id", "item", multi=True),
    Field("year", "id", "item"),
)
LEON = {
    "gender": ["male"],
    "occupation": ["student"],
    "title": ["Leon: The Professional"],
    "genre": [["Crime", "Drama", "Romance", "Thriller"]],
    "year": ["1994"],
}


def _only(fields: tuple[Field, ...], rows: dict[str, list[Any]], config: PromptConfig) -> str:
    (text,) = render(fields, pa.table(rows), config).to_pylist()
    return text


# UFIN (papers/ufin.txt) III-C7: the four sentences as printed there.
@pytest.mark.parametrize(
    ("config", "printed"),
    [
        (
            PromptConfig(names={"year": "it is released at {value}"}, product="movie"),
            "There is a user, whose gender is male, and occupation is student. "
            'There is a movie, its title is "Leon: The Professional", '
            "its genre is Crime Drama Romance Thriller, and it is released at 1994.",
        ),
        (
            PromptConfig("ufin_pairs", names={"year": "release year"}),
            'gender: male; occupation: student; title: "Leon: The Professional"; '
            "genre: Crime Drama Romance Thriller; release year: 1994.",
        ),
        (
            PromptConfig("ufin_masked", names={"year": "it is Field at {value}"}, product="movie"),
            "There is a user, whose Field is male, and Field is student. "
            'There is a movie, its Field is "Leon: The Professional", '
            "its Field is Crime Drama Romance Thriller, and it is Field at 1994.",
        ),
        (
            PromptConfig(without=("year",), product="movie"),
            "There is a user, whose gender is male, and occupation is student. "
            'There is a movie, its title is "Leon: The Professional", '
            "its genre is Crime Drama Romance Thriller.",
        ),
    ],
    ids=["base", "prompt-1", "prompt-2", "prompt-3"],
)
def test_ufin_sentences_as_printed(config: PromptConfig, printed: str) -> None:
    assert _only(MOVIE, LEON, config) == printed


def test_ufin_context_as_printed() -> None:
    """UFIN II-C1 words its item otherwise than III-C7 does; user and context are as here."""
    fields = (*MOVIE[:2], Field("system_time", "id"))
    config = PromptConfig(names={"system_time": "system time"})
    rows = {"gender": ["male"], "occupation": ["student"], "system_time": ["09:21"]}
    assert _only(fields, rows, config) == (
        "There is a user, whose gender is male, and occupation is student. "
        "The system time is 09:21."
    )


SHOP = (
    Field("domain", "id"),
    Field("user", "anonymous", "user"),
    Field("history", "id", "user", multi=True),
    Field("item", "anonymous", "item"),
    Field("title", "text", "item"),
    Field("brand", "id", "item"),
    Field("price", "number", "item"),
)


def test_uni_ctr_template_as_printed() -> None:
    """Uni-CTR (papers/uni-ctr.txt) IV-B prints the template with names in brackets."""
    fields = (*SHOP[:-1], Field("price", "id", "item"))
    rows = {
        "domain": ["Domain Name"],
        "user": ["[User ID]"],
        "history": [["[Product1 Title]", "[Product2 Title]"]],
        "item": ["[Product ID]"],
        "title": ["[Product Name]"],
        "brand": ["[Brand]"],
        "price": ["[Price]"],
    }
    assert _only(fields, rows, PromptConfig("uni_ctr")) == (
        "Domain Name: The user ID is user_[User ID], who clicked on [Product1 Title] & "
        "[Product2 Title] recently. The ID of the current product is product_[Product ID], "
        "the title is [Product Name], the brand is [Brand], the price is [Price]."
    )


GIFT = {
    "domain": ["Gift Cards"],
    "user": ["7"],
    "history": pa.array([[]], pa.list_(pa.string())),
    "item": ["9"],
    "title": ["Card"],
    "brand": pa.array([None], pa.string()),
    "price": pa.array([12.5], pa.float32()),
}


def test_an_empty_history_is_nothing_and_a_missing_brand_is_not_named() -> None:
    assert _only(SHOP, GIFT, PromptConfig("uni_ctr")) == (
        "Gift Cards: The user ID is user_7, who clicked on nothing recently. "
        "The ID of the current product is product_9, the title is Card, the price is 12.5."
    )


def test_p5_asks_for_an_answer() -> None:
    """Prompt 5-4 of P5: "I would like to recommend some items for user_7 ..."."""
    assert _only(SHOP, GIFT, PromptConfig("p5", product="item")) == (
        "Gift Cards: I would like to recommend some items for user_7, who clicked on nothing "
        "recently. Is the following item a good choice? item_9, the title is Card, the price is "
        "12.5."
    )


def test_each_side_alone() -> None:
    texts = [_only(SHOP, GIFT, PromptConfig("uni_ctr", sides=(side,))) for side in SIDES]
    assert texts == [
        "The user ID is user_7, who clicked on nothing recently.",
        "The ID of the current product is product_9, the title is Card, the price is 12.5.",
        "Gift Cards:",
    ]
    assert _only(MOVIE, LEON, PromptConfig(sides=("user",))) == (
        "There is a user, whose gender is male, and occupation is student."
    )


def test_anonymous_ids_have_no_words_in_ufin() -> None:
    assert _only(SHOP, GIFT, PromptConfig()) == (
        'There is a product, its title is "Card", and its price is 12.5. The domain is Gift Cards.'
    )


@pytest.mark.parametrize(
    ("gender", "occupation", "expected"),
    [
        (None, "student", "There is a user, whose occupation is student."),
        ("male", "  ", "There is a user, whose gender is male."),
        ("", None, ""),
    ],
)
def test_missing_values_take_their_clause_with_them(
    gender: str | None, occupation: str | None, expected: str
) -> None:
    rows = {"gender": pa.array([gender], pa.string()), "occupation": pa.array([occupation])}
    fields = MOVIE[:2]
    assert _only(
        fields, {**rows, "occupation": rows["occupation"].cast("string")}, PromptConfig()
    ) == (expected)
    config = PromptConfig("ufin_pairs")
    assert _only(fields, rows | {"occupation": rows["occupation"].cast("string")}, config).count(
        ":"
    ) == sum(bool(value and value.strip()) for value in (gender, occupation))


def test_numbers_that_are_not_finite_are_missing() -> None:
    fields = (Field("price", "number", "item"),)
    prices = pa.table({"price": pa.array([3.0, float("nan"), float("inf"), None], pa.float32())})
    texts = render(fields, prices, PromptConfig("uni_ctr")).to_pylist()
    assert texts == ["the price is 3.", "", "", ""]


def test_quotes_and_blanks_inside_values() -> None:
    rows = {
        **LEON,
        "title": ['The\n"big"\t\u2003one\u0085 '],
        "genre": [["a\r\nb", None, " ", "c"]],
    }
    text = _only(MOVIE, rows, PromptConfig(sides=("item",)))
    assert text == (
        "There is a product, its title is \"The 'big' one\", its genre is a b c, "
        "and its year is 1994."
    )


def test_values_are_cut_at_max_words() -> None:
    rows = {**LEON, "title": ["one two three four"]}
    text = _only(MOVIE, rows, PromptConfig(sides=("item",), max_words=2))
    assert text == (
        'There is a product, its title is "one two", its genre is Crime Drama, '
        "and its year is 1994."
    )


def test_no_rows_no_fields() -> None:
    table = pa.table(LEON)
    assert render(MOVIE, table.slice(0, 0), PromptConfig()).to_pylist() == []
    assert render((), table, PromptConfig()).to_pylist() == [""]
    assert render(MOVIE, pa.concat_tables([table, table]), PromptConfig()).type == pa.string()


@given(st.lists(st.none() | st.text(max_size=5), max_size=20))
def test_text_ids_are_xxh64_of_utf8(texts: list[str | None]) -> None:
    ids = text_id(pa.array(texts, pa.string()))
    assert ids.dtype == np.int64
    expected = [xxhash.xxh64_intdigest((text or "").encode()) for text in texts]
    assert ids.view(np.uint64).tolist() == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"template": "ufinn"}, "unknown prompt 'ufinn'; the nearest is 'ufin'"),
        ({"sides": ("shop",)}, "unknown side 'shop'"),
        ({"sides": ()}, "sides is empty; name user, item or context"),
        ({"max_words": -1}, "max_words is 0 or more, not -1"),
        ({"names": {"year": "{value} {value}"}}, "names.year holds {value} twice"),
    ],
)
def test_a_wrong_config_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("{", r"\{")):
        PromptConfig(**config)


@pytest.mark.parametrize("config", [{"names": {"yaer": "year"}}, {"without": ("yaer",)}])
def test_a_field_that_the_schema_lacks_is_named(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="unknown field of a prompt 'yaer'; the nearest is 'year'"):
        render(MOVIE, pa.table(LEON), PromptConfig(**config))


def test_a_column_that_the_rows_lack_is_named() -> None:
    with pytest.raises(UserError, match="no column for the field 'year'; they have: gender, occ"):
        render(MOVIE, pa.table(LEON).drop_columns(["year"]), PromptConfig())
