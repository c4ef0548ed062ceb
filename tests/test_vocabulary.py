"""Vocabulary: encoding equals a dictionary's, and an extension moves no row of its base."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.errors import UserError
from data_shards.schema import Field, Schema
from data_shards.vocabulary import Vocabulary, count_values

HASH_USER = [302, 413, 302, 0]
VALUES = st.one_of(st.none(), st.sampled_from(["a", "b", "c", "ä", ""]), st.text(max_size=3))
COLUMN = st.lists(VALUES, max_size=40)


def _schema(min_count: int = 1) -> Schema:
    return Schema((Field("user", "id", min_count=min_count),))


def _table(values: list[str | None]) -> pa.Table:
    return pa.table({"user": pa.array(values, pa.string())})


def _build(schema: Schema, *columns: list[str | None]) -> Vocabulary:
    return Vocabulary.build(schema, count_values(schema, *map(_table, columns)))


def _ranked(values: list[str | None], min_count: int = 1) -> list[str]:
    counts = Counter(value for value in values if value is not None)
    kept = [value for value, count in counts.items() if count >= min_count]
    return sorted(kept, key=lambda value: (-counts[value], value.encode()))


@given(COLUMN, COLUMN, COLUMN, st.integers(1, 3))
def test_rows_follow_frequency_and_the_rest_is_row_0(
    first: list, second: list, other: list, min_count: int
) -> None:
    vocabulary = _build(_schema(min_count), first, second)
    known = {v: 1 + i for i, v in enumerate(_ranked(first + second, min_count))}
    encoded = vocabulary.encode(_table(first + other))["user"]
    assert encoded.to_pylist() == [known.get(value, 0) for value in first + other]
    assert encoded.type == pa.int32()
    assert vocabulary.size("user") == vocabulary.base_size("user") == len(known) + 1
    assert vocabulary.base_fingerprint is None


@given(COLUMN, COLUMN)
def test_an_extension_moves_no_row_of_the_base(trunk: list, added: list) -> None:
    schema = _schema()
    base = _build(schema, trunk)
    extended = base.extend(count_values(schema, _table(added)))
    new = [value for value in _ranked(added) if value not in trunk]
    known = {v: 1 + i for i, v in enumerate(_ranked(trunk))}
    expected = known | {v: base.size("user") + i for i, v in enumerate(new)}
    rows = extended.encode(_table(trunk + added))["user"].to_pylist()
    assert rows == [expected.get(value, 0) for value in trunk + added]
    assert extended.base_size("user") == base.size("user")
    assert extended.size("user") == base.size("user") + len(new)
    assert extended.added("user").to_pylist() == new
    assert extended.base_fingerprint == base.fingerprint
    assert (extended.fingerprint != base.fingerprint) == bool(new)


@given(COLUMN, COLUMN)
def test_fingerprint_tells_vocabularies_apart(a: list, b: list) -> None:
    first, second = _build(_schema(), a), _build(_schema(), b)
    assert (first.fingerprint == second.fingerprint) == (_ranked(a) == _ranked(b))


@given(st.lists(st.one_of(st.none(), st.lists(VALUES, max_size=4)), min_size=1, max_size=20))
def test_lists_keep_their_lengths(lists: list) -> None:
    schema = Schema((Field("tags", "id", multi=True),))
    table = pa.table({"tags": pa.array(lists, pa.list_(pa.string()))})
    vocabulary = Vocabulary.build(schema, count_values(schema, table))
    rows = [1 + i for i in range(vocabulary.size("tags") - 1)]
    known = dict(zip(vocabulary.values["tags"].to_pylist(), rows, strict=True))
    encoded = vocabulary.encode(table.slice(len(lists) // 2))["tags"].to_pylist()
    expected = [[known.get(v, 0) for v in values or []] for values in lists[len(lists) // 2 :]]
    assert encoded == expected


def _hashed(name: str, buckets: int = 1000) -> Schema:
    return Schema((Field(name, "id", vocabulary="hash", buckets=buckets),))


def _hash_rows(name: str, values: list, buckets: int = 1000) -> list[int]:
    vocabulary = Vocabulary.build(_hashed(name, buckets), {})
    return vocabulary.encode(pa.table({name: pa.array(values, pa.string())}))[name].to_pylist()


@given(COLUMN, st.integers(1, 5))
def test_hashing_stays_within_its_buckets(values: list, buckets: int) -> None:
    rows = _hash_rows("user", values, buckets)
    assert all((row == 0) == (value is None) for row, value in zip(rows, values, strict=True))
    assert all(0 <= row <= buckets for row in rows)


def test_hashing_is_the_same_for_ever_and_its_own_per_field() -> None:
    # written down from a first run: a change would silently reassign every row of old shards
    assert _hash_rows("user", ["a", "b", "a", None]) == HASH_USER
    assert _hash_rows("item", ["a", "b"]) != HASH_USER[:2]


def test_hashed_fields_never_extend() -> None:
    base = Vocabulary.build(_hashed("user", 9), {})
    extended = base.extend({})
    assert extended.size("user") == extended.base_size("user") == 10
    assert extended.added("user").to_pylist() == []


def test_a_loaded_vocabulary_is_the_saved_one(tmp_path: Path) -> None:
    base = _build(_schema(), ["x", "y", "x"])
    extended = base.extend(count_values(_schema(), _table(["z", "x"])))
    extended.save(tmp_path / "vocabulary")
    loaded = Vocabulary.load(
        tmp_path / "vocabulary", _schema(), extended.base_sizes, extended.base_fingerprint
    )
    assert loaded.fingerprint == extended.fingerprint
    assert loaded.encode(_table(["z", "y", "?"]))["user"].to_pylist() == [3, 2, 0]
    assert (loaded.base_size("user"), loaded.base_fingerprint) == (3, base.fingerprint)


def test_a_cut_or_missing_file_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "vocabulary"
    _build(_schema(), ["x"]).save(folder)
    path = folder / "user.arrow"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="user.arrow: not a readable vocabulary"):
        Vocabulary.load(folder, _schema(), {}, None)
    path.unlink()
    with pytest.raises(UserError, match="user.arrow: not a readable vocabulary"):
        Vocabulary.load(folder, _schema(), {}, None)


def test_wrong_rows_are_refused() -> None:
    schema = Schema((Field("user", "id"), Field("price", "number")))
    vocabulary = Vocabulary.build(schema, count_values(schema, _table(["x"])))
    with pytest.raises(UserError, match="no column for the field 'price'; they have: user"):
        vocabulary.encode(_table(["x"]))
    table = _table(["x", "y"]).append_column("price", pa.array([1.0, float("nan")]))
    with pytest.raises(UserError, match="field 'price': the number in row 1 .* not finite"):
        vocabulary.encode(table)


def test_numbers_are_float32_and_missing_ones_zero() -> None:
    schema = Schema((Field("user", "id"), Field("price", "number")))
    vocabulary = Vocabulary.build(schema, count_values(schema, _table(["x"])))
    table = _table(["x", "y"]).append_column("price", pa.array([2.5, None]))
    encoded = vocabulary.encode(table)["price"]
    assert (encoded.type, encoded.to_pylist()) == (pa.float32(), [2.5, 0.0])


@pytest.mark.parametrize("words", [[[1, None], [2]], [None, [2]]])
def test_tokens_are_numbers_without_a_gap(words: list) -> None:
    schema = Schema((Field("user", "id"), Field("words", "tokens")))
    vocabulary = Vocabulary.build(schema, count_values(schema, _table(["x"])))
    table = _table(["x", "y"])
    good = table.append_column("words", pa.array([[5], []], pa.list_(pa.int64())))
    assert vocabulary.encode(good)["words"].to_pylist() == [[5], []]
    bad = table.append_column("words", pa.array(words, pa.list_(pa.int64())))
    with pytest.raises(UserError, match="field 'words': a list of tokens is missing or holds a nu"):
        vocabulary.encode(bad)
