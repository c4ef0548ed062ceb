"""The per-user stage against brute force: what a history holds, what is drawn, and for whom."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.errors import UserError
from data_shards.schema import Field
from data_shards.sources import user_scratch
from data_shards.sources.negatives import NegativesConfig
from data_shards.sources.per_user import (
    FIRST_NEGATIVE,
    HistoryConfig,
    PerUser,
    PerUserConfig,
)

Row = tuple[int, int, int, int, bool]
"""User, domain, item, time, positive."""
ROWS = st.lists(
    st.tuples(*(st.integers(0, high) for high in (3, 2, 6, 5)), st.booleans()),
    min_size=1,
    max_size=40,
)


class Given:
    """Rows as a log gives them, in pieces of three."""

    made = 0

    def __init__(self, rows: list[Row], ids: list[int] | None = None) -> None:
        Given.made += 1
        self.name = Given.made
        user, domain, item, time, positive = zip(*rows, strict=True)
        self.table = pa.table(
            {
                "row_id": pa.array(ids or range(len(rows)), pa.int64()),
                "domain": [f"d{number}" for number in domain],
                "label": pa.array([float(label) for label in positive], pa.float32()),
                "time": pa.array(time, pa.int64()),
                "user": [f"u{number}" for number in user],
                "item": [f"i{number}" for number in item],
            }
        )

    def identity(self) -> dict[str, Any]:
        return {"name": self.name}

    def pieces(self) -> tuple[str, ...]:
        return tuple(str(start) for start in range(0, len(self.table), 3))

    def read(self, piece: int, dropped: Counter[str]) -> Iterator[pa.Table]:
        dropped["three"] += 1
        yield self.table.slice(3 * piece, 3)


def _stage(config: PerUserConfig, rows: Given) -> tuple[list[dict[str, Any]], Counter[str]]:
    stage, dropped = PerUser(config, rows), Counter()
    pieces = range(len(stage.pieces()))
    tables = [table for piece in pieces for table in stage.read(piece, dropped)]
    return pa.concat_tables(tables).to_pylist(), dropped


@settings(max_examples=60)
@given(ROWS, st.integers(1, 4), st.booleans())
def test_history_is_the_last_earlier_positives(rows: list[Row], last: int, across: bool) -> None:
    history = HistoryConfig("history", "item", last, across)
    found, dropped = _stage(PerUserConfig(history=history), Given(rows))
    assert sorted(row["row_id"] for row in found) == list(range(len(rows)))
    assert dropped == {"three": -(-len(rows) // 3)}
    for row in found:
        user, domain, _, time, _ = rows[row["row_id"]]
        earlier = [
            (other[3], place, f"i{other[2]}")
            for place, other in enumerate(rows)
            if other[0] == user and other[4] and other[3] < time
            if across or other[1] == domain
        ]
        assert row["history"] == [item for _, _, item in sorted(earlier)][-last:]


RULES = (
    NegativesConfig(per_positive=2),
    NegativesConfig(ratio=(1, 3), seed=7),
    NegativesConfig(protocol="mlora"),
)


@settings(max_examples=60)
@given(ROWS, st.sampled_from(RULES))
def test_negatives_were_never_touched(rows: list[Row], rule: NegativesConfig) -> None:
    stage = PerUserConfig(history=HistoryConfig(), negatives=rule)
    found, dropped = _stage(stage, Given(rows))
    assert len({row["row_id"] for row in found}) == len(found)
    touched, pool, drawn = defaultdict(set), defaultdict(set), defaultdict(list)
    for user, domain, item, _, _ in rows:
        touched[f"u{user}", f"d{domain}"].add(f"i{item}")
        pool[f"d{domain}"].add(f"i{item}")
    moments = {
        (row["user"], row["domain"], row["time"]): row["history"] for row in found if row["label"]
    }
    for row in found:
        if row["row_id"] >= FIRST_NEGATIVE:
            key = row["user"], row["domain"]
            assert row["label"] == 0 and row["item"] in pool[row["domain"]] - touched[key]
            assert row["history"] == moments[*key, row["time"]]
            drawn[key].append(row["item"])
    assert all(len(set(items)) == len(items) for items in drawn.values())
    left = {key: len(pool[key[1]] - touched[key]) for key in touched}
    assert all(len(items) <= left[key] for key, items in drawn.items())
    if rule.per_positive:
        positives = Counter((f"u{row[0]}", f"d{row[1]}") for row in rows if row[4])
        wanted = {key: 2 * count for key, count in positives.items()}
        got = {key: min(count, left[key]) for key, count in wanted.items()}
        assert {key: len(items) for key, items in drawn.items()} == {
            k: n for k, n in got.items() if n
        }
        assert dropped["negatives_short"] == sum(wanted.values()) - sum(got.values())


def _drawn(rows: list[Row], ids: list[int], rule: NegativesConfig) -> Counter[tuple[Any, ...]]:
    found, _ = _stage(PerUserConfig(negatives=rule), Given(rows, ids))
    names = ("user", "domain", "time", "item")
    return Counter(
        tuple(row[name] for name in names) for row in found if row["row_id"] >= FIRST_NEGATIVE
    )


@settings(max_examples=40)
@given(ROWS, st.randoms(use_true_random=False), st.sampled_from(RULES))
def test_negatives_do_not_depend_on_the_order_of_rows(
    rows: list[Row], random: Any, rule: NegativesConfig
) -> None:
    places = list(range(len(rows)))
    random.shuffle(places)
    again = _drawn([rows[place] for place in places], places, rule)
    assert _drawn(rows, list(range(len(rows))), rule) == again


@settings(max_examples=40)
@given(ROWS)
def test_other_users_do_not_matter(rows: list[Row]) -> None:
    """A second user that touches what the domain has already: the first draws as before."""
    rule = NegativesConfig(per_positive=2)
    more = [*rows, *((9, domain, item, 0, True) for _, domain, item, _, _ in rows)]
    with_more = _drawn(more, list(range(len(more))), rule)
    before = _drawn(rows, list(range(len(rows))), rule)
    assert before == Counter({key: n for key, n in with_more.items() if key[0] != "u9"})


def _crowd(users: int, positives: int) -> list[Row]:
    return [
        (user, 0, (user + 7 * nth) % 101, nth, True)
        for user in range(users)
        for nth in range(positives)
    ]


def test_every_untouched_item_is_as_likely() -> None:
    drawn = _drawn(_crowd(2000, 1), list(range(2000)), NegativesConfig(per_positive=3))
    items = Counter()
    for (_, _, _, item), count in drawn.items():
        items[item] += count
    assert len(items) == 101 and sum(items.values()) == 6000
    # 6000 / 101 = 59.4 each; 6 standard deviations are 46
    assert all(abs(count - 59.4) < 46 for count in items.values())


def test_mlora_counts() -> None:
    found, _ = _stage(
        PerUserConfig(negatives=NegativesConfig(protocol="mlora")), Given(_crowd(50, 10))
    )
    per_user = Counter(row["user"] for row in found if row["row_id"] >= FIRST_NEGATIVE)
    (count,) = set(per_user.values())
    assert 20 <= count <= 50 and len(per_user) == 50


def test_ratio_draws_between_its_ends() -> None:
    rule = NegativesConfig(ratio=(2, 5))
    drawn = _drawn(_crowd(300, 2), list(range(600)), rule)
    counts = Counter()
    for (user, _, time, _), count in drawn.items():
        counts[user, time] += count
    assert set(counts.values()) == {2, 3, 4, 5}


def test_another_seed_draws_others() -> None:
    rows = _crowd(20, 2)
    one, two = (NegativesConfig(per_positive=3, seed=seed) for seed in (1, 2))
    assert _drawn(rows, list(range(40)), one) != _drawn(rows, list(range(40)), two)


def test_pieces_hold_whole_users(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, config = _crowd(300, 4), PerUserConfig(history=HistoryConfig())
    whole, _ = _stage(config, Given(rows))
    monkeypatch.setattr(user_scratch, "PIECE_ROWS", 100)
    monkeypatch.setattr(user_scratch, "BUCKET_ROWS", 3)
    stage = PerUser(config, Given(rows))
    pieces = [
        pa.concat_tables(list(stage.read(piece, Counter()))) for piece in range(len(stage.pieces()))
    ]
    assert len(pieces) > 5 and all(len(piece) <= 100 for piece in pieces)
    users = Counter(user for piece in pieces for user in set(piece["user"].to_pylist()))
    assert set(users.values()) == {1} and len(users) == 300
    parts = [row for piece in pieces for row in piece.to_pylist()]
    assert sorted(map(str, parts)) == sorted(map(str, whole))


def test_a_second_stage_finds_the_sorted_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, config = Given(_crowd(9, 2)), PerUserConfig(history=HistoryConfig())
    first = PerUser(config, rows)
    assert first.pieces()
    monkeypatch.setattr(rows, "read", lambda *_: pytest.fail("read again"))
    dropped = Counter()
    assert pa.concat_tables(list(PerUser(config, rows).read(0, dropped))).num_rows == 18
    assert dropped == {"three": 6}


def test_no_room_for_scratch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(user_scratch, "_write", full)
    monkeypatch.setenv(user_scratch.ROOT, str(tmp_path))
    with pytest.raises(UserError, match="no room for rows sorted by user .*set TMPDIR"):
        PerUser(PerUserConfig(history=HistoryConfig()), Given(_crowd(2, 2))).pieces()
    assert not list(tmp_path.iterdir())


MISTAKES = {
    "give one of per_positive": lambda: NegativesConfig(),
    "give one of per": lambda: NegativesConfig(per_positive=1, protocol="mlora"),
    r"ratio is \[low, high\], not \[5, 2\]": lambda: NegativesConfig(ratio=(5, 2)),
    "0 or more": lambda: NegativesConfig(per_positive=1, seed=-1),
    "last is 1 or more": lambda: HistoryConfig(last=0),
    "give history or negatives": lambda: PerUserConfig(),
    "unknown multi-valued field for history 'history'": lambda: PerUserConfig(
        history=HistoryConfig()
    ).check((Field("item", "id"),), {}),
    "a negative has no 'brand'": lambda: PerUserConfig(
        negatives=NegativesConfig(per_positive=1)
    ).check((Field("brand", "id", side="item"),), {"brand": "user"}),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message: str) -> None:
    with pytest.raises(UserError, match=message):
        MISTAKES[message]()


def test_the_prime_walk_meets_every_item_once() -> None:
    """All but one item touched: the one left is found, whatever the pool's size."""
    for size in range(2, 40):
        rows = [(0, 0, item, 0, True) for item in range(size - 1)] + [(1, 0, size - 1, 0, False)]
        drawn = _drawn(rows, list(range(size)), NegativesConfig(per_positive=1))
        assert list(drawn) == [("u0", "d0", 0, f"i{size - 1}")]
