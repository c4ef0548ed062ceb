"""Schema: two schemas have one fingerprint exactly when they mean the same."""

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.errors import UserError, unknown
from data_shards.schema import Field, Schema

NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,8}", fullmatch=True).filter(
    lambda name: name not in ("row_id", "label", "time", "weight")
)
SIDES = st.sampled_from(["user", "item", "context"])


@st.composite
def _fields(
    draw: st.DrawFn, kinds: tuple[str, ...] = ("id", "anonymous", "number", "text")
) -> Field:
    kind = draw(st.sampled_from(kinds))
    buckets = draw(st.integers(0, 9)) if kind in ("id", "anonymous") else 0
    return Field(
        name=draw(NAMES),
        kind=kind,  # pyright: ignore[reportArgumentType]
        side=draw(SIDES),  # pyright: ignore[reportArgumentType]
        multi=draw(st.booleans()) if kind in ("id", "anonymous") else False,
        vocabulary="hash" if buckets else "frequency",
        min_count=draw(st.integers(1, 9)),
        buckets=buckets,
    )


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    some = draw(st.lists(_fields(), max_size=5, unique_by=lambda field: field.name))
    first = draw(_fields(("id",)).filter(lambda field: field.name not in {f.name for f in some}))
    return Schema((first, *some))


@given(schemas())
def test_json_is_the_same_schema(schema: Schema) -> None:
    again = Schema.from_json(json.loads(json.dumps(schema.to_json())))
    assert again == schema
    assert again.fingerprint() == schema.fingerprint()


@given(schemas(), schemas())
def test_fingerprint_differs_exactly_when_the_schema_does(a: Schema, b: Schema) -> None:
    assert (a.fingerprint() == b.fingerprint()) == (a == b)
    assert (a.first_difference(b) is None) == (a == b)


def test_every_attribute_of_a_field_counts() -> None:
    field = Field("user", "id")
    changes = {
        "name": "item",
        "kind": "anonymous",
        "side": "user",
        "multi": True,
        "min_count": 2,
        "vocabulary": "hash",
        "buckets": 7,
    }
    assert set(changes) == {f.name for f in fields(Field)}
    hashed = Field("user", "id", vocabulary="hash", buckets=5)
    for name, value in changes.items():
        base = hashed if name == "buckets" else field
        change = {name: value} | ({"buckets": 5} if name == "vocabulary" else {})
        assert Schema((replace(base, **change),)).fingerprint() != Schema((base,)).fingerprint()


def test_groups_keep_the_order_of_the_schema() -> None:
    schema = Schema(
        (Field("b", "id"), Field("n", "number"), Field("t", "text"), Field("a", "anonymous"))
    )
    assert [f.name for f in schema.ids] == ["b", "a"]
    assert [f.name for f in schema.numbers] == ["n"]
    assert [f.name for f in schema.texts] == ["t"]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"name": "row_id"}, "field 'row_id': a name is letters"),
        ({"name": "../x"}, "a name is letters, digits and _"),
        ({"kind": "ID"}, "kind is one of id, anonymous, number, text, tokens, not 'ID'"),
        ({"vocabulary": "hash"}, "needs buckets of 1 or more"),
        ({"vocabulary": "hash", "buckets": 1 << 31}, "buckets are below 2147483648, not 2147"),
        ({"buckets": 3}, "buckets are for vocabulary = 'hash' only"),
        ({"min_count": 0}, "min_count is 1 or more, not 0"),
        ({"kind": "number", "multi": True}, "only id and anonymous fields can be multi-valued"),
    ],
)
def test_wrong_fields_are_refused(field: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Field(**{"name": "user", "kind": "id", **field})


def test_wrong_schemas_are_refused() -> None:
    with pytest.raises(UserError, match="the field 'user' stands twice"):
        Schema((Field("user", "id"), Field("user", "number")))
    with pytest.raises(UserError, match="no id field"):
        Schema((Field("price", "number"),))
    with pytest.raises(UserError, match="not of the form this version writes"):
        Schema.from_json({"fields": [{"name": "user", "kind": "id", "colour": 1}]})


def test_unknown_names_the_nearest() -> None:
    error = unknown("split", "trian", ("train", "test"))
    assert str(error) == "unknown split 'trian'; the nearest is 'train'; there are: test, train"
    assert str(unknown("split", "x", ())) == "unknown split 'x'; there are: none"
