"""Random orders: permutations, each a function of its whole key, all equally likely."""

from itertools import permutations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_shards.order import EpochOrder
from data_shards.permute import permute

KEYS = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6)


def _order(n: int, *key: int) -> tuple[int, ...]:
    values = np.arange(n)
    permute(values, *key)
    return tuple(values.tolist())


@given(st.integers(0, 300), KEYS)
def test_every_value_stays_once_and_the_key_alone_decides(n: int, key: list[int]) -> None:
    assert sorted(_order(n, *key)) == list(range(n))
    assert _order(n, *key) == _order(n, *key)


@given(KEYS, st.data())
def test_every_part_of_the_key_and_its_place_matter(key: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(key) - 1))
    other = [*key[:place], key[place] ^ data.draw(st.integers(1, 2**64 - 1)), *key[place + 1 :]]
    assert _order(99, *key) != _order(99, *other)
    assert _order(99, *key) != _order(99, *key, 0)
    if key != key[::-1]:
        assert _order(99, *key) != _order(99, *key[::-1])


def test_all_orders_are_equally_likely() -> None:
    found = [_order(4, 1, number) for number in range(24_000)]
    counts = [found.count(order) for order in permutations(range(4))]
    # chi-square with 23 degrees of freedom is above 65 once in 100,000 times
    assert sum((count - 1000) ** 2 / 1000 for count in counts) < 65


def test_lanes_windows_epochs_and_streams_have_orders_of_their_own() -> None:
    def ranks(epoch: int, stream: int, window: int, lane: int) -> tuple[int, ...]:
        order = EpochOrder(np.full(4, 256), 1, epoch, 16, 4, 256, True, stream)
        place = order.window(window, lane, lane + 1).place.reshape(-1)
        return tuple(np.argsort(np.argsort(place)).tolist())

    seen = {ranks(e, s, w, x) for e in (0, 1) for s in (0, 1) for w in (0, 1) for x in range(4)}
    assert len(seen) == 2 * 2 * 2 * 4
