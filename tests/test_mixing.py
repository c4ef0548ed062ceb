"""Mixing: exact shares, every row of a domain equally often, nothing remembered."""

import tracemalloc
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_shards.mixing import Pieces, domain_epoch, quotas

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=8)
TEMPERATURE = st.sampled_from([1.0, 1.5, 2.0, 5.0, float("inf")])


def _whole(sizes: list[int], first_number: int = 0) -> Pieces:
    return Pieces.whole(np.arange(len(sizes)) + first_number, np.array(sizes))


def _rows(pieces: Pieces) -> list[tuple[int, int]]:
    return [
        (int(block), int(first) + i)
        for block, first, rows in zip(pieces.block, pieces.first, pieces.rows, strict=True)
        for i in range(rows)
    ]


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=50), TEMPERATURE)
def test_quotas_sum_to_all_rows_and_follow_the_temperature(
    rows: list[int], temperature: float
) -> None:
    found = quotas(rows, temperature)
    weight = np.array(rows, float) ** (1 / temperature)
    assert sum(found) == sum(rows)
    assert np.abs(np.array(found) - sum(rows) * weight / weight.sum()).max() < 1 + 1e-6 * sum(rows)
    by_size = [quota for _, quota in sorted(zip(rows, found, strict=True))]
    assert all(b >= a - 1 for a, b in zip(by_size, by_size[1:], strict=False))


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=50))
def test_at_temperature_one_an_epoch_holds_each_row_once(rows: list[int]) -> None:
    assert quotas(rows, 1.0) == rows


def test_at_an_endless_temperature_domains_are_equal() -> None:
    assert quotas([1, 10, 100, 889], float("inf")) == [250, 250, 250, 250]


@given(SIZES, st.integers(1, 200), st.integers(1, 6))
def test_over_epochs_each_row_is_read_equally_often(
    sizes: list[int], quota: int, epochs: int
) -> None:
    counts = Counter({row: 0 for row in _rows(_whole(sizes))})
    for epoch in range(epochs):
        pieces = domain_epoch("toys", _whole(sizes), quota, seed=1, epoch=epoch)
        assert (pieces.rows > 0).all() and int(pieces.rows.sum()) == quota
        counts.update(_rows(pieces))
        assert max(counts.values()) - min(counts.values()) <= 1
    assert len(counts) == sum(sizes)


@given(SIZES, st.integers(1, 200), st.integers(0, 50))
def test_an_epoch_depends_on_no_other(sizes: list[int], quota: int, epoch: int) -> None:
    """And epochs laid end to end are passes laid end to end."""
    whole, longer = _whole(sizes), quota * (epoch + 1)
    alone = _rows(domain_epoch("toys", whole, quota, 3, epoch))
    assert _rows(domain_epoch("toys", whole, longer, 3, 0))[-quota:] == alone


def test_passes_domains_and_seeds_have_orders_of_their_own() -> None:
    whole = _whole([5] * 20)
    first = _rows(domain_epoch("toys", whole, 100, 1, 0))
    for name, seed, epoch in (("toys", 1, 1), ("toys", 2, 0), ("books", 1, 0)):
        other = _rows(domain_epoch(name, whole, 100, seed, epoch))
        assert other != first and sorted(other) == sorted(first)


@given(SIZES, st.data())
def test_a_cut_is_a_slice(sizes: list[int], data: st.DataObject) -> None:
    rows = _rows(_whole(sizes))
    start = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(start, len(rows)))
    assert _rows(_whole(sizes).cut(start, stop)) == rows[start:stop]


def test_a_row_that_is_read_very_often_costs_no_array_each_time() -> None:
    tracemalloc.start()
    pieces = domain_epoch("toys", _whole([1]), 100_000, seed=1, epoch=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert int(pieces.rows.sum()) == 100_000
    assert peak < 130 * 100_000  # an array of its own is 112 bytes more


def test_joined_pieces_go_by_their_blocks() -> None:
    joined = Pieces.joined([_whole([3, 4], 2), _whole([1, 2])])
    assert joined.block.tolist() == [0, 1, 2, 3] and joined.rows.tolist() == [1, 2, 3, 4]
