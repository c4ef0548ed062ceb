"""What goes in and out of tables: digests, whole copies, learning rates, and a plan that fits."""

from itertools import product

import pytest
import torch

from data_shards import UserError
from embeddings import ShardedTables, TablesConfig, extension_tables, table_width, trunk_tables
from tests.gang import gang
from tests.toy_tables import ROWS, WIDTH, config, toy_tables, train

needs_ranks = pytest.mark.dist
EVERY_WORLD = pytest.mark.parametrize("world", [1, 2, 4])
SHARDINGS = ("table_wise", "column_wise", "row_wise")


def _flip(tables: ShardedTables, table: str, row: int, col: int, bit: int) -> None:
    """One bit, on the rank that holds it."""
    for shard in tables.shards():
        weight = shard.tensors["weight"].detach()
        y, x = row - shard.row, col - shard.col
        if shard.table == table and 0 <= y < weight.shape[0] and 0 <= x < weight.shape[1]:
            weight.view(torch.int32)[y, x] ^= -(1 << 31) if bit == 31 else 1 << bit


def _digests_of_flips() -> None:
    draw = torch.Generator().manual_seed(0)
    for sharding in SHARDINGS:
        tables = toy_tables(config(sharding))
        seen = {tables.digest()}
        for table, rows in ROWS.items():
            for _ in range(4):
                row, col, bit = (
                    int(torch.randint(n, (1,), generator=draw)) for n in (rows, WIDTH, 32)
                )
                _flip(tables, table, row, col, bit)
                assert tables.digest() not in seen
                seen.add(tables.digest())
                _flip(tables, table, row, col, bit)
                assert tables.digest() in seen


def _digests_of_moves() -> None:
    """The same values in another place are other tables."""
    tables = toy_tables(config())
    first, digest = tables.whole(), tables.digest()
    rows_swapped = {**first, "user": first["user"][[0, 2, 1, *range(3, ROWS["user"])]]}
    columns_swapped = {**first, "item": first["item"].flip(1)}
    shared = first["user"][:3]
    tables_swapped = {**first, "genre": shared, "user": first["user"].clone()}
    tables_swapped["user"][:3] = first["genre"]
    for other in (rows_swapped, columns_swapped, tables_swapped):
        tables.load(other)
        assert tables.digest() != digest
    tables.load(first)
    assert tables.digest() == digest


def _round_trips() -> None:
    for source, target in product(SHARDINGS, SHARDINGS):
        trained, other = toy_tables(config(source)), toy_tables(config(target), seed=6)
        train(trained, range(2))
        assert other.digest() != trained.digest()
        other.load(trained.whole())
        assert other.digest() == trained.digest()
        assert all(torch.equal(other.whole()[key], trained.whole()[key]) for key in ROWS)


def _rates() -> None:
    for optimizer in ("adam", "rowwise_adagrad"):
        tables = toy_tables(config(optimizer=optimizer))
        first = tables.digest()
        tables.set_lr(0.0)
        train(tables, range(3))
        assert tables.digest() == first
        tables.set_lr(0.1)
        train(tables, range(3))
        assert tables.digest() != first
        tables.set_steps(41)
        train(tables, [0])
        assert tables.steps() == 42


@needs_ranks
@EVERY_WORLD
def test_a_digest_sees_every_bit_and_its_place(world: int) -> None:
    gang(world, _digests_of_flips)
    gang(world, _digests_of_moves)


@needs_ranks
@EVERY_WORLD
def test_whole_tables_load_under_any_plan(world: int) -> None:
    gang(world, _round_trips)


@needs_ranks
@EVERY_WORLD
def test_learning_rate_and_steps_can_be_set(world: int) -> None:
    gang(world, _rates)


def _digest(seed: int, rows: dict[str, int]) -> str:
    return toy_tables(config(), rows, seed).digest()


@needs_ranks
def test_first_weights_follow_from_seed_and_table() -> None:
    one, other = ({"user": 9}, {"item": 9})
    assert gang(2, _digest, 1, one) == gang(1, _digest, 1, one) * 2
    assert (
        len({gang(1, _digest, seed, rows)[0] for seed, rows in product((1, 2), (one, other))}) == 4
    )


@pytest.mark.parametrize(
    ("dim", "first_order", "width"), [(8, False, 8), (8, True, 12), (7, True, 8), (1, False, 4)]
)
def test_a_rows_width_is_a_multiple_of_four_floats(dim: int, first_order: bool, width: int) -> None:
    assert table_width(dim, first_order) == width


def test_each_table_takes_its_own_sharding() -> None:
    plan = config("row_wise", pinned={"item": "column_wise"})
    found = {table.field: table.sharding for table in trunk_tables(ROWS, plan, WIDTH)}
    assert found == dict.fromkeys(ROWS, "row_wise") | {"item": "column_wise"}


def test_extension_tables_start_at_zero_and_have_a_row() -> None:
    tables = extension_tables({"user": 0, "item": 5}, config(), WIDTH)
    assert [(t.field, t.rows, t.init_std) for t in tables] == [("user", 1, 0.0), ("item", 5, 0.0)]


def test_row_wise_adagrad_has_no_weight_decay() -> None:
    with pytest.raises(UserError, match=r'weight_decay: rowwise_adagrad has none; .*"adam"'):
        TablesConfig(optimizer="rowwise_adagrad", weight_decay=0.1)


@pytest.mark.parametrize("plan", [{"sharding": "column_wise"}, {"pinned": {"a": "column_wise"}}])
def test_row_wise_adagrad_refuses_column_wise(plan: dict) -> None:
    with pytest.raises(UserError, match="column_wise the result would depend on the plan; shard"):
        TablesConfig(optimizer="rowwise_adagrad", **plan)


def test_a_pinned_table_must_exist() -> None:
    with pytest.raises(UserError, match=r"tables\.pinned: 'usr'; the nearest is 'user'; there are"):
        trunk_tables(ROWS, config(pinned={"usr": "row_wise"}), WIDTH)
