"""S8: saved by any number of ranks in any form, a state goes on in any other as if undisturbed."""

from collections import Counter
from itertools import combinations, product
from pathlib import Path

import pytest

from tests.gang import gang
from tests.toy_reshard import (
    SHARDINGS,
    STAGES,
    WORLDS,
    Form,
    Joined,
    Pair,
    Went,
    saved,
    taken_over,
    undisturbed,
)

pytestmark = pytest.mark.dist

T, C, R = SHARDINGS
# Ranks, ZeRO stage and sharding of the save and of the load: each two of the six choices meet.
PAIRS = [
    (Form(1, 0, C), Form(1, 0, C)),
    (Form(1, 1, C), Form(2, 2, R)),
    (Form(1, 2, T), Form(3, 3, T)),
    (Form(1, 3, R), Form(4, 1, T)),
    (Form(2, 1, T), Form(1, 1, T)),
    (Form(2, 0, R), Form(2, 3, T)),
    (Form(2, 3, R), Form(3, 2, C)),
    (Form(2, 2, R), Form(4, 0, T)),
    (Form(3, 2, R), Form(1, 2, T)),
    (Form(3, 3, T), Form(2, 0, R)),
    (Form(3, 0, C), Form(3, 1, R)),
    (Form(3, 1, C), Form(4, 3, C)),
    (Form(4, 3, C), Form(1, 3, T)),
    (Form(4, 2, T), Form(2, 1, C)),
    (Form(4, 1, R), Form(3, 0, R)),
    (Form(4, 0, T), Form(4, 2, R)),
    (Form(2, 2, C), Form(1, 3, R)),
    # Loaded where another state was, which must leave nothing behind.
    (Form(1, 2, T), Form(1, 1, T)),
    (Form(2, 3, R), Form(1, 3, T)),
    (Form(3, 0, C), Form(2, 3, T)),
]
EVERY = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}_{pair[1]}")


Found = tuple[Went, dict[Pair, Joined]]


@pytest.fixture(scope="module")
def found(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    output = tmp_path_factory.mktemp("reshard")
    [whole] = gang(1, undisturbed, toy, output)
    first = saved(toy, output, {source for source, _ in PAIRS})
    return whole, taken_over(toy, output, first, PAIRS)


def test_every_two_choices_meet() -> None:
    rows = [(a.world, a.stage, a.sharding, b.world, b.stage, b.sharding) for a, b in PAIRS]
    choices = (WORLDS, STAGES, SHARDINGS) * 2
    for one, other in combinations(range(6), 2):
        met = {(row[one], row[other]) for row in rows}
        assert met == set(product(choices[one], choices[other]))


@EVERY
def test_tables_dense_part_and_optimizer_are_taken_over_bit_by_bit(
    found: Found, pair: Pair
) -> None:
    assert found[1][pair].differences == []


@EVERY
def test_the_next_steps_are_those_of_the_undisturbed_run(found: Found, pair: Pair) -> None:
    whole, others = found
    one = others[pair]
    assert one.losses == pytest.approx(whole.losses, rel=1e-6)
    assert one.distance < 1e-6
    assert Counter(one.rows) == Counter(whole.rows)
    assert len(one.rows) == len(set(one.rows)) > 0
