"""Prompts: what holds for any rows, whatever stands in them."""

import unicodedata
from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from data_shards.prompts import PROMPTS, PromptConfig, render
from data_shards.schema import Field

VALUE = st.none() | st.text(max_size=8)
TABLE = st.lists(
    st.fixed_dictionaries(
        {
            "user": VALUE,
            "gender": VALUE,
            "history": st.none() | st.lists(VALUE, max_size=3),
            "item": VALUE,
            "title": VALUE,
            "tags": st.none() | st.lists(VALUE, max_size=3),
            "price": st.none() | st.floats(width=32),
            "domain": VALUE,
            "hour": VALUE,
        }
    ),
    min_size=1,
    max_size=5,
)
FIELDS = (
    Field("hour", "id"),
    Field("title", "text", "item"),
    Field("user", "anonymous", "user"),
    Field("gender", "id", "user"),
    Field("history", "id", "user", multi=True),
    Field("item", "anonymous", "item"),
    Field("tags", "id", "item", multi=True),
    Field("price", "number", "item"),
    Field("domain", "id"),
)
TYPES = {"history": pa.list_(pa.string()), "tags": pa.list_(pa.string()), "price": pa.float32()}


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    schema = pa.schema([(f.name, TYPES.get(f.name, pa.string())) for f in FIELDS])
    return pa.Table.from_pylist(rows, schema=schema)


def _plain(value: str | None) -> str:
    """What the module calls clean, by Python's own tables."""
    categories = [(letter, unicodedata.category(letter)) for letter in value or ""]
    spaced = "".join(" " if c[0] == "Z" or c == "Cc" else letter for letter, c in categories)
    return " ".join(word for word in spaced.split(" ") if word)


@given(TABLE, st.sampled_from(sorted(PROMPTS)))
def test_the_whole_is_its_sides_joined(rows: list[dict[str, Any]], template: str) -> None:
    table, prompt = _table(rows), PROMPTS[template]
    sides = [
        render(FIELDS, table, PromptConfig(template, sides=(side,))).to_pylist()
        for side in prompt.parts
    ]
    whole = render(FIELDS, table, PromptConfig(template)).to_pylist()
    for text, parts in zip(whole, zip(*sides, strict=True), strict=True):
        bodies = [part.removesuffix(prompt.end) for part in parts if part]
        assert text == (prompt.between.join(bodies) + prompt.end if bodies else "")


@given(TABLE, st.sampled_from(sorted(PROMPTS)), st.integers(0, 2))
def test_a_prompt_depends_on_its_row_alone(
    rows: list[dict[str, Any]], template: str, max_words: int
) -> None:
    table, config = _table(rows + rows), PromptConfig(template, max_words=max_words)
    whole = render(FIELDS, table, config).to_pylist()
    assert whole[: len(rows)] == whole[len(rows) :]
    assert whole == [
        text
        for at in range(len(table))
        for text in render(FIELDS, table.slice(at, 1), config).to_pylist()
    ]


@given(TABLE, st.sampled_from(sorted(PROMPTS)))
def test_every_value_appears_in_the_order_of_the_schema(
    rows: list[dict[str, Any]], template: str
) -> None:
    prompt = PROMPTS[template]
    texts = render(FIELDS, _table(rows), PromptConfig(template)).to_pylist()
    for row, text in zip(rows, texts, strict=True):
        at = 0
        for side in prompt.parts:
            for field in FIELDS:
                if field.side != side or field.kind not in prompt.kinds or field.kind == "number":
                    continue
                value = row[field.name]
                many = value or [] if field.multi else [value]
                plain = prompt.many.join(filter(None, map(_plain, many)))  # pyright: ignore
                if prompt.quoted and field.kind == "text":
                    plain = plain.replace('"', "'")
                assert text.find(plain, at) >= at
                at = text.find(plain, at) + len(plain)
        assert all(unicodedata.category(c) != "Cc" for c in text)
        assert text == text.strip(" ")


@given(TABLE, st.sampled_from(sorted(PROMPTS)), st.sampled_from([f.name for f in FIELDS]))
def test_a_field_left_out_is_as_a_missing_one(
    rows: list[dict[str, Any]], template: str, name: str
) -> None:
    if name in PROMPTS[template].missing:
        return
    bare = render(FIELDS, _table([{**row, name: None} for row in rows]), PromptConfig(template))
    left_out = render(FIELDS, _table(rows), PromptConfig(template, without=(name,)))
    assert bare.equals(left_out)
