"""Order: every row once, the same global batches on any number of ranks, and no memory."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_shards.order import EpochOrder, schedule

Place = tuple[int, int]
PADDING = (-1, -1)


@st.composite
def orders(draw: st.DrawFn, shuffle: bool | None = None) -> EpochOrder:
    lanes = draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
    return EpochOrder(
        block_rows=np.array(draw(st.lists(st.integers(1, 40), min_size=1, max_size=20))),
        seed=draw(st.integers(0, 3)),
        epoch=draw(st.integers(0, 3)),
        global_batch=draw(st.integers(lanes, 40)),
        lanes=lanes,
        shuffle_rows=draw(st.integers(0, 200)),
        shuffle=draw(st.booleans()) if shuffle is None else shuffle,
    )


def _read(order: EpochOrder, lane_start: int, lane_stop: int) -> list[list[Place]]:
    """Places of some lanes, step by step."""
    steps = []
    for number in range(-(-order.steps // order.window_steps)):
        window = order.window(number, lane_start, lane_stop)
        assert window.first_step == len(steps)
        block, row = window.blocks[window.which], window.row
        steps += [
            [(int(b), int(r)) if real else PADDING for b, r, real in zip(*step, strict=True)]
            for step in zip(block, row, window.real, strict=True)
        ]
        assert len(steps) == window.end
    return steps


def _real(steps: list[list[Place]]) -> list[Place]:
    return [place for step in steps for place in step if place != PADDING]


@given(orders())
def test_every_row_exactly_once(order: EpochOrder) -> None:
    rows = _real(_read(order, 0, order.lanes))
    assert sorted(rows) == [(b, r) for b, n in enumerate(order.block_rows) for r in range(n)]


@given(orders())
def test_every_step_is_full_but_the_last(order: EpochOrder) -> None:
    steps = _read(order, 0, order.lanes)
    real = [sum(place != PADDING for place in step) for step in steps]
    assert len(steps) == order.steps == -(-order.rows // order.global_batch)
    assert real == [order.rows_in_step(step) for step in range(order.steps)]
    assert all(len(step) == order.global_batch for step in steps)
    assert all(count == order.global_batch for count in real[:-1]) and real[-1] > 0


@given(orders(), st.integers(1, 12))
def test_any_number_of_ranks_reads_the_same_global_batches(order: EpochOrder, ranks: int) -> None:
    if order.lanes % ranks or order.global_batch % ranks:
        ranks = 1 if order.global_batch % order.lanes else order.lanes
    per_rank = order.lanes // ranks
    slices = [_read(order, r * per_rank, (r + 1) * per_rank) for r in range(ranks)]
    assert {len(step) for steps in slices for step in steps} == {order.global_batch // ranks}
    joined = [sum(parts, []) for parts in zip(*slices, strict=True)]
    assert joined == _read(order, 0, order.lanes)


@given(orders(shuffle=False))
def test_without_shuffling_a_lane_keeps_the_order_of_the_blocks(order: EpochOrder) -> None:
    for lane in range(order.lanes):
        rows = _real(_read(order, lane, lane + 1))
        assert rows == sorted(rows)
    lanes = [_real(_read(order, lane, lane + 1)) for lane in range(order.lanes)]
    assert sum(lanes, []) == sorted(sum(lanes, []))


@given(orders())
def test_windows_do_not_depend_on_those_before(order: EpochOrder) -> None:
    last = (order.steps - 1) // order.window_steps
    alone = order.window(last, 0, order.lanes)
    after_others = [order.window(n, 0, order.lanes) for n in range(last + 1)][-1]
    assert (alone.blocks == after_others.blocks).all()
    assert (alone.place == after_others.place).all()


def _order(**changes: int | bool) -> EpochOrder:
    defaults = {"seed": 1, "epoch": 0, "global_batch": 16, "lanes": 4, "shuffle_rows": 64}
    settings = {**defaults, "shuffle": True, **changes}
    return EpochOrder(block_rows=np.full(30, 10), **settings)  # pyright: ignore[reportArgumentType]


def test_seed_epoch_and_stream_each_change_the_order() -> None:
    first = _read(_order(), 0, 4)
    for change in ({"seed": 2}, {"epoch": 1}, {"stream": 1}):
        assert _read(_order(**change), 0, 4) != first
    assert _read(_order(), 0, 4) == first


def test_blocks_are_permuted_over_the_whole_epoch() -> None:
    """Without it the first lane would hold the first blocks of the index in every epoch."""
    lanes = [{block for block, _ in _real(_read(_order(epoch=e), 0, 1))} for e in range(5)]
    assert all(lane != set(range(8)) for lane in lanes)
    assert len(set.union(*lanes)) > 16


def test_rows_are_permuted_within_a_window_of_every_lane_and_stay_in_it() -> None:
    order = _order(shuffle_rows=64)
    for lane in range(order.lanes):
        first, second = (order.window(number, lane, lane + 1) for number in (0, 1))
        rows = [(w.blocks[w.which] * 10 + w.row).reshape(-1) for w in (first, second)]
        steps = [np.diff(values) for values in rows]
        # ascending or descending runs cross at most two block borders in 16 rows
        assert all((np.abs(step) != 1).sum() > 4 for step in steps)
        assert not set(rows[0]) & set(rows[1])
        assert len(set(first.blocks)) <= 3


STEPS = st.lists(st.integers(0, 20), min_size=1, max_size=6)


@given(STEPS, st.integers(0, 3), st.booleans())
def test_a_schedule_holds_every_step_of_every_order_in_its_sequence(
    steps: list[int], epoch: int, shuffle: bool
) -> None:
    plan = schedule(steps, seed=1, epoch=epoch, shuffle=shuffle)
    assert len(plan.order) == sum(steps)
    for number, count in enumerate(steps):
        assert plan.step[plan.order == number].tolist() == list(range(count))
    if not shuffle:
        assert (np.diff(plan.order) >= 0).all()


def test_a_schedule_differs_from_epoch_to_epoch() -> None:
    first, second = (schedule([20, 20], 1, epoch, True).order for epoch in (0, 1))
    assert first.tolist() != second.tolist()
