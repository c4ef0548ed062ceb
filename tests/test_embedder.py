"""Rows that only an added domain has: found by its slot, trained alone, no bit of others moved."""

import pytest
import torch
from torch import Tensor

from embeddings import Embedder, Extension, ShardedTables, extension_tables
from tests.gang import gang
from tests.toy_tables import BATCH, CPU, WIDTH, bags, config, jagged, loss, mine, pooled, toy_tables

pytestmark = pytest.mark.dist
EVERY_WORLD = pytest.mark.parametrize("world", [1, 2, 4])

TRUNK = {"user": 7, "item": 5}
OWN = [[3, 0], [2, 4], [0, 1]]
"""Per slot, a domain's own rows of each field."""
SEEN = {"user": 7 + 5, "item": 5 + 5}  # what ids are drawn from: some are beyond every own row


def _slot() -> Tensor:
    """Of each row of the global batch; -1 for a domain without an adapter."""
    return torch.randint(-1, len(OWN), (BATCH,), generator=torch.Generator().manual_seed(8))


def _trunk() -> ShardedTables:
    tables = toy_tables(config(), TRUNK)
    tables.load({key: weight + 0.5 for key, weight in tables.whole().items()})
    tables.freeze()
    return tables


def _extension(own: list[list[int]], sharding: str = "table_wise") -> Extension:
    rows, plan = Extension.table_rows(list(TRUNK), own), config(sharding)
    tables = ShardedTables(extension_tables(rows, plan, WIDTH), plan, CPU, 5)
    return Extension(tables, own, list(TRUNK.values()))


def _filled(own: list[list[int]], sharding: str = "table_wise") -> Extension:
    """As if trained: a row's values follow from its domain and place in it."""
    extension = _extension(own, sharding)
    weights = extension.tables.whole()
    for field, key in enumerate(TRUNK):
        rows = [(slot, i) for slot, domain in enumerate(own) for i in range(domain[field])]
        for at, (slot, i) in enumerate(rows):
            weights[key][at] = torch.linspace(slot + 1, 10 * i + 7, WIDTH).sin()
    extension.tables.load(weights)
    return extension


def _look(embedder: Embedder, seed: int) -> Tensor:
    return embedder(jagged(bags(seed, SEEN), mine()), _slot()[mine()])


def _own_rows_are_found() -> None:
    trunk, extension = _trunk(), _filled(OWN, "row_wise")
    shared, own = trunk.whole(), extension.tables.whole()
    ids, slots = bags(3, SEEN), _slot().tolist()
    plain = {key: [[i if i < TRUNK[key] else 0 for i in row] for row in ids[key]] for key in TRUNK}
    expected = pooled(shared, plain)
    for field, key in enumerate(TRUNK):
        for row, (slot, values) in enumerate(zip(slots, ids[key], strict=True)):
            for local in (i - TRUNK[key] for i in values):
                if slot >= 0 and 0 <= local < OWN[slot][field]:
                    start = sum(domain[field] for domain in OWN[:slot])
                    expected[row, field] += own[key][start + local]
    found = _look(Embedder(trunk, TRUNK, extension), 3)
    torch.testing.assert_close(found, expected[mine()], rtol=1e-6, atol=1e-6)


def _others_keep_their_bits() -> None:
    trunk, slot = _trunk(), _slot()[mine()]
    for count in (1, 2):
        fewer = Embedder(trunk, TRUNK, _filled(OWN[:count]))
        ids = jagged(bags(3, SEEN), mine())
        before = fewer(ids, torch.where(slot < count, slot, -1))
        after = _look(Embedder(trunk, TRUNK, _filled(OWN)), 3)
        others = slot < count
        assert torch.equal(after[others], before[others])


def _starts_as_the_trunk() -> None:
    trunk = _trunk()
    alone, extended = Embedder(trunk, TRUNK), Embedder(trunk, TRUNK, _extension(OWN))
    ids = jagged(bags(3, SEEN), mine())
    nobody = torch.full((BATCH,), -1)[mine()]
    filled = Embedder(trunk, TRUNK, _filled(OWN))
    expected = alone(ids, _slot()[mine()])
    assert torch.equal(_look(extended, 3), expected)
    assert torch.equal(filled(ids, nobody), expected)
    known = jagged(bags(4, TRUNK), mine())
    assert torch.equal(filled(known, None), filled(known, _slot()[mine()]))
    assert torch.equal(filled(known, None), trunk(known))


def _one_domain_trains_alone() -> None:
    trunk, extension = _trunk(), _filled(OWN)
    shared, before = trunk.digest(), extension.tables.whole()
    slot = torch.full((BATCH,), 1)[mine()]
    for seed in range(4):
        ids = jagged(bags(seed, SEEN), mine())
        loss(Embedder(trunk, TRUNK, extension)(ids, slot), mine(), seed).backward()
    assert trunk.digest() == shared
    for field, key in enumerate(TRUNK):
        start = OWN[0][field]
        own = slice(start, start + OWN[1][field])
        moved = (extension.tables.whole()[key] != before[key]).any(1)
        assert moved[own].all() and int(moved.sum()) == OWN[1][field]


@EVERY_WORLD
def test_an_id_beyond_the_trunk_is_its_domains_own_row(world: int) -> None:
    gang(world, _own_rows_are_found)


@EVERY_WORLD
def test_adding_a_domain_moves_no_bit_of_the_others(world: int) -> None:
    gang(world, _others_keep_their_bits)


@EVERY_WORLD
def test_zero_rows_and_unknown_domains_give_the_trunk_alone(world: int) -> None:
    gang(world, _starts_as_the_trunk)


@EVERY_WORLD
def test_training_moves_the_domains_own_rows_alone(world: int) -> None:
    gang(world, _one_domain_trains_alone)
