"""Splits: decided row by row, the same however the rows are cut into pieces and tables."""

from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards import splits
from data_shards.errors import UserError
from data_shards.schema import Field, Schema
from data_shards.splits import SplitConfig, count_rows, joined, split_of
from data_shards.stratified import standing_before

PARTS = st.lists(st.integers(1, 9), min_size=1, max_size=5).map(
    lambda sizes: {f"part{i}": size / sum(sizes) for i, size in enumerate(sizes)}
)
LABELS = st.tuples(st.integers(0, 40), st.integers(0, 200)).map(
    lambda counts: np.random.default_rng(1).permutation(np.repeat([1, 0], counts))
)
CUTS = st.lists(st.integers(0, 240), max_size=3).map(sorted)


def _rows(label: np.ndarray, domain: str = "d", time: np.ndarray | None = None) -> pa.Table:
    return pa.table(
        {
            "row_id": np.arange(len(label)),
            "domain": pa.array([domain] * len(label), pa.string()),
            "label": label.astype(np.float32),
            "time": np.zeros(len(label), np.int64) if time is None else time,
        }
    )


def _assigned(config: SplitConfig, rows: pa.Table, cuts: Sequence[int] = ()) -> np.ndarray:
    """The part of each row, where the rows come in the pieces between `cuts`."""
    ends = [0, *(min(cut, len(rows)) for cut in cuts), len(rows)]
    pieces = [rows.slice(a, b - a) for a, b in zip(ends, ends[1:], strict=False)]
    counts, standing = None, [None] * len(pieces)
    if config.counted:
        counted = [count_rows(config, piece) for piece in pieces]
        counts, standing = joined(config, iter(counted)), standing_before(counted)
    parts = []
    for piece, before in zip(pieces, standing, strict=True):
        split = split_of(config, counts, before)
        parts += [split.parts(piece.slice(i, 7)) for i in range(0, len(piece), 7)]
    return np.concatenate(parts) if parts else np.empty(0, np.int8)


def _counts(parts: dict[str, float], n: int) -> list[int]:
    cuts = [0] + [round(c * n) for c in np.cumsum(list(parts.values()))]
    return [b - a for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


@given(PARTS, LABELS, CUTS)
def test_per_domain_every_part_has_its_exact_count_and_share_of_positives(
    parts: dict, label: np.ndarray, cuts: list[int]
) -> None:
    part = _assigned(SplitConfig(parts=parts), _rows(label), cuts)
    assert np.bincount(part, minlength=len(parts)).tolist() == _counts(parts, len(label))
    for number, rows in enumerate(_counts(parts, len(label))):
        expected = label.sum() * rows / max(len(label), 1)
        assert abs(label[part == number].sum() - expected) <= 2


@given(st.sampled_from(splits.WAYS), LABELS, CUTS, CUTS)
def test_pieces_decide_nothing(way: Any, label: np.ndarray, one: list, other: list) -> None:
    times = np.random.default_rng(2).integers(0, 50, len(label))
    times[:2] = [0, 1][: len(times)]
    rows = _rows(label, time=times)
    if len(label) < 2:
        return
    config = SplitConfig(way)
    assert (_assigned(config, rows, one) == _assigned(config, rows, other)).all()


@given(st.sampled_from(["time", "time_per_domain"]), PARTS, st.data())
def test_by_time_no_moment_is_cut_and_no_later_row_stands_earlier(
    way: Any, parts: dict, data: st.DataObject
) -> None:
    times = np.array(data.draw(st.lists(st.integers(-9, 9), min_size=2, max_size=60)))
    if len(np.unique(times)) < 2:
        return
    part = _assigned(SplitConfig(way, parts), _rows(np.zeros(len(times)), time=times))
    order = np.argsort(times, kind="stable")
    assert (np.diff(part[order]) >= 0).all()
    assert all(len(set(part[times == moment])) == 1 for moment in times)


def test_by_time_the_cuts_come_nearest_to_the_shares() -> None:
    times = np.arange(1000)
    part = _assigned(SplitConfig("time"), _rows(np.zeros(1000), time=times))
    assert np.bincount(part).tolist() == [600, 200, 200]


def test_time_is_one_clock_or_one_per_domain() -> None:
    early, late = np.arange(10), np.arange(90, 100)
    rows = pa.concat_tables(
        [_rows(np.zeros(10), "early", early), _rows(np.zeros(10), "late", late)]
    )
    halves = {"train": 0.5, "test": 0.5}
    assert _assigned(SplitConfig("time", halves), rows).tolist() == [0] * 10 + [1] * 10
    each = _assigned(SplitConfig("time_per_domain", halves), rows).tolist()
    assert each == [0] * 5 + [1] * 5 + [0] * 5 + [1] * 5


def test_too_many_times_are_told_apart_more_coarsely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "MOST_TIMES", 100)
    times = np.arange(1000)
    part = _assigned(SplitConfig("time"), _rows(np.zeros(1000), time=times), [100, 300])
    assert (np.diff(part) >= 0).all()
    assert np.abs(np.bincount(part) - [600, 200, 200]).max() <= 16


def test_until_names_moments_and_drops_what_is_later() -> None:
    until = {"train": 100, "test": date(1970, 1, 2), "late": datetime(1970, 1, 3)}
    config = SplitConfig("time", until=until)
    assert config.until == {"train": 100, "test": 86_400, "late": 172_800}
    assert config.names == ("train", "test", "late") and config.counted is None
    aware = datetime(1970, 1, 3, tzinfo=UTC)
    assert SplitConfig("time", until={**until, "late": aware}).until == config.until
    times = np.array([0, 99, 100, 86_399, 86_400, 172_799, 172_800])
    part = _assigned(config, _rows(np.zeros(7), time=times))
    assert part.tolist() == [0, 0, 1, 1, 2, 2, -1]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=60), CUTS)
def test_rows_that_belong_together_are_never_separated(pairs: list, cuts: list[int]) -> None:
    users, times = (np.array([pair[i] for pair in pairs], np.int64) for i in range(2))
    rows = _rows(np.zeros(len(pairs)), time=times)
    rows = rows.append_column("user", pa.array([f"u{user}" for user in users], pa.string()))
    for together in (("user",), ("user", "time"), ("domain", "time")):
        config = SplitConfig("random", {"a": 0.5, "b": 0.5}, together=together)
        part = _assigned(config, rows, cuts)
        keys = list(zip(*(rows[name].to_pylist() for name in together), strict=True))
        assert len(set(zip(keys, part.tolist(), strict=True))) == len(set(keys))


def test_what_belongs_together_is_drawn_apart_from_the_rest() -> None:
    rows = _rows(np.zeros(4000), time=np.arange(4000) // 2)
    config = SplitConfig("random", {"a": 0.8, "b": 0.2}, together=("domain", "time"))
    part = _assigned(config, rows)
    assert (part[::2] == part[1::2]).all()
    assert np.mean(part == 0) == pytest.approx(0.8, abs=0.03)


def test_what_belongs_together_is_a_field_of_one_value() -> None:
    schema = Schema((Field("user", "id"), Field("tags", "id", multi=True), Field("n", "number")))
    for name in ("usr", "tags", "n"):
        with pytest.raises(UserError, match=f"unknown field in split.together '{name}'"):
            SplitConfig("random", together=(name,)).require_fields(schema)
    SplitConfig("random", together=("user", "time", "domain")).require_fields(schema)
    with pytest.raises(UserError, match='goes with by = "random" only, not with time'):
        SplitConfig("time", together=("user",))


def test_random_looks_at_the_row_alone() -> None:
    rows = _rows(np.zeros(5000))
    part = _assigned(SplitConfig("random"), rows)
    shuffled = np.random.default_rng(3).permutation(5000)
    assert (_assigned(SplitConfig("random"), rows.take(shuffled)) == part[shuffled]).all()
    assert np.abs(np.bincount(part) / 5000 - [0.6, 0.2, 0.2]).max() < 0.03
    assert (_assigned(SplitConfig("random", seed=5), rows) != part).any()


def test_the_seed_and_the_domain_decide_and_nothing_else() -> None:
    label = np.arange(500) % 3 == 0
    first = _assigned(SplitConfig(), _rows(label, "books"))
    assert (first == _assigned(SplitConfig(), _rows(label, "books"))).all()
    assert (first != _assigned(SplitConfig(), _rows(label, "toys"))).any()
    assert (first != _assigned(SplitConfig(seed=124), _rows(label, "books"))).any()
    both = pa.concat_tables([_rows(label, "books"), _rows(label, "toys")])
    assert (_assigned(SplitConfig(), both)[:500] == first).all()


def test_the_first_part_feeds_the_vocabulary_unless_others_are_named() -> None:
    parts = {"pretrain": 0.5, "adapt": 0.3, "test": 0.2}
    assert SplitConfig(parts=parts).vocabulary_parts == ("pretrain",)
    both = SplitConfig(parts=parts, train=("pretrain", "adapt"))
    assert both.vocabulary_parts == ("pretrain", "adapt")


def test_rows_that_were_not_counted_are_refused() -> None:
    counted = [count_rows(SplitConfig(), _rows(np.zeros(5)))]
    (standing,) = standing_before(counted)
    for rows in (_rows(np.zeros(6)), _rows(np.zeros(1), "new")):
        with pytest.raises(UserError, match="the source has changed since its rows were counted"):
            split_of(SplitConfig(), joined(SplitConfig(), counted), standing).parts(rows)


def test_counts_do_not_grow_with_the_pieces() -> None:
    counted = [count_rows(SplitConfig(), _rows(np.arange(9) % 2, d)) for d in "ab" * 50]
    assert len(joined(SplitConfig(), iter(counted))) == 4
    standing = list(standing_before(iter(counted)))
    assert max(map(len, standing)) == 2
    assert sorted(standing[-1]["count"].to_pylist()) == [4 * 49, 5 * 49]


def test_a_domain_that_is_held_out_needs_no_moments() -> None:
    rows = pa.concat_tables([_rows(np.zeros(9), "a", np.arange(9)), _rows(np.zeros(1), "z")])
    config = SplitConfig("time_per_domain")
    counts = joined(config, [count_rows(config, rows.slice(0, 9))])
    assert len(split_of(config, counts, None).parts(rows)) == 10


def test_one_moment_cannot_be_split_by_time() -> None:
    with pytest.raises(UserError, match="the rows of all domains have a single time; name"):
        _assigned(SplitConfig("time"), _rows(np.zeros(9)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"by": "hash"}, "unknown way to split 'hash'"),
        ({"parts": {"train": 0.5, "test": 0.4}}, "the parts sum to 0.9; they must sum to 1"),
        ({"parts": {}}, "the parts sum to 0; they must sum to 1"),
        ({"parts": {"train": 1.5, "test": -0.5}}, "a share is above 0 and at most 1, not 1.5"),
        ({"parts": {"a/b": 1.0}}, "split 'a/b': a name is letters, digits and _"),
        ({"seed": -1}, "the seed is 0 or more, not -1"),
        ({"train": ("trian",)}, "unknown split in split.train 'trian'; the nearest is 'train'"),
        ({"parts": {f"p{i}": 1 / 128 for i in range(128)}}, "128 parts; .* 127"),
        ({"until": {"train": 5}}, '`until` names moments; it goes with by = "time" only'),
        ({"by": "time", "until": {"a": 5, "b": 5}}, "each part ends later than the one before"),
    ],
)
def test_wrong_configs_are_refused(config: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SplitConfig(**config)
