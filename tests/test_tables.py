"""Tables are the same for any plan and number of ranks, learn by the written rule, and can freeze.

Each gang measures everything once; the laws below compare what the gangs found.
"""

from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from embeddings import ShardedTables, TablesConfig, placement
from embeddings.lazy_adam import BETA1, BETA2, EPS
from tests.gang import gang
from tests.toy_tables import (
    BATCH,
    ROWS,
    bags,
    config,
    jagged,
    loss,
    mine,
    pooled,
    toy_tables,
    train,
)

pytestmark = pytest.mark.dist

WORLDS = (1, 2, 4)
STEPS = range(5)
ADAM = {
    "table_wise": config("table_wise", weight_decay=0.1),
    "column_wise": config("column_wise", weight_decay=0.1),
    "row_wise": config("row_wise", weight_decay=0.1),
    "pinned": config(
        "table_wise", weight_decay=0.1, pinned={"user": "row_wise", "item": "column_wise"}
    ),
}
ADAGRAD = {
    "adagrad_table_wise": config("table_wise", optimizer="rowwise_adagrad"),
    "adagrad_row_wise": config("row_wise", optimizer="rowwise_adagrad"),
}
PLANS = {**ADAM, **ADAGRAD}
EVERY_PLAN = pytest.mark.parametrize("plan", PLANS)
EVERY_WORLD = pytest.mark.parametrize("world", WORLDS)

Weights = dict[str, Tensor]


@dataclass
class Measured:
    """One plan in one world; tables are whole."""

    first: Weights
    first_digest: str
    looked_up: Tensor
    trained: Weights
    trained_digest: str
    steps: int
    fewest_rows: int
    """Of any rank's rectangles."""
    continued: bool = False
    """Whether a copy of weights, optimizer state and steps takes the same next step, to the bit."""
    still: dict[str, bool] = field(default_factory=dict)
    """Whether frozen tables kept their bytes, by the name of the attempt on them."""


def _gathered(mine: Tensor) -> Tensor:
    parts: list[Tensor] = [mine] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return torch.cat(parts)


def _state(tables: ShardedTables) -> list[Tensor]:
    return [t.detach().clone() for s in tables.shards() for t in s.tensors.values()]


def _unmoved(tables: ShardedTables, before: list[Tensor]) -> bool:
    same = all(torch.equal(a, b) for a, b in zip(_state(tables), before, strict=True))
    return bool(_gathered(torch.tensor([same])).all())


def _measure_all() -> dict[str, Measured]:
    placement.INIT_ROWS = 8  # so that small tables have several stretches of first weights
    return {name: _measure(plan) for name, plan in PLANS.items()}


def _measure(plan: TablesConfig) -> Measured:
    tables = toy_tables(plan)
    first, digest = tables.whole(), tables.digest()
    with torch.no_grad():
        looked_up = _gathered(tables(jagged(bags(99), mine())))
    train(tables, STEPS)
    rows = torch.tensor([min((len(s.tensors["weight"]) for s in tables.shards()), default=99)])
    found = Measured(
        first=first,
        first_digest=digest,
        looked_up=looked_up,
        trained=tables.whole(),
        trained_digest=tables.digest(),
        steps=tables.steps(),
        fewest_rows=int(_gathered(rows).min()),
    )
    found.continued = _continues(tables, plan)
    found.still = _frozen(tables, plan)
    return found


def _continues(tables: ShardedTables, plan: TablesConfig) -> bool:
    copy = toy_tables(plan, seed=6)
    for live, part in zip(copy.shards(), tables.shards(), strict=True):
        for name, tensor in part.tensors.items():
            live.tensors[name].detach().copy_(tensor)
    copy.set_steps(tables.steps())
    for each in (tables, copy):
        train(each, [50])
    return _unmoved(copy, _state(tables)) and copy.steps() == tables.steps()


def _frozen(tables: ShardedTables, plan: TablesConfig) -> dict[str, bool]:
    other = toy_tables(plan, seed=6)
    tables.freeze()
    state, digest, others = _state(tables), tables.digest(), other.digest()
    scale = torch.ones(1, requires_grad=True)
    loss(tables(jagged(bags(1), mine())) * scale, mine(), 1).backward()
    alone = _unmoved(tables, state)
    for seed in STEPS:
        ids = jagged(bags(seed), mine())
        loss(tables(ids) + other(ids), mine(), seed).backward()
    return {
        "a backward through what was read": alone,
        "beside tables that train": _unmoved(tables, state) and tables.digest() == digest,
        "(the others did train)": other.digest() != others,
    }


@pytest.fixture(scope="module")
def found() -> dict[int, dict[str, Measured]]:
    answers = {world: gang(world, _measure_all) for world in WORLDS}
    for ranks in answers.values():
        for plan in PLANS:
            assert all(rank[plan].trained_digest == ranks[0][plan].trained_digest for rank in ranks)
    return {world: ranks[0] for world, ranks in answers.items()}


Found = dict[int, dict[str, Measured]]


@EVERY_WORLD
@EVERY_PLAN
def test_first_weights_and_digest_depend_on_neither_plan_nor_world(
    found: Found, plan: str, world: int
) -> None:
    one, this = found[1]["table_wise"], found[world][plan]
    assert all(torch.equal(this.first[key], one.first[key]) for key in ROWS)
    assert this.first_digest == one.first_digest != this.trained_digest


def test_first_weights_are_gaussian_with_a_zero_reserved_row(found: Found) -> None:
    first = found[1]["table_wise"].first
    assert not any(weight[0].any() for weight in first.values())
    drawn = torch.cat([weight[1:].flatten() for weight in first.values()])
    assert float(drawn.std()) == pytest.approx(0.1, rel=0.15)
    assert len(drawn.unique()) == len(drawn)  # no stretch or table repeats another


@EVERY_WORLD
@EVERY_PLAN
def test_a_lookup_is_the_sum_of_each_bag_by_key(found: Found, plan: str, world: int) -> None:
    this = found[world][plan]
    torch.testing.assert_close(this.looked_up, pooled(this.first, bags(99)), rtol=1e-6, atol=1e-7)


@EVERY_WORLD
@EVERY_PLAN
def test_steps_on_the_same_global_batches_give_the_same_tables(
    found: Found, plan: str, world: int
) -> None:
    rule = ADAM if plan in ADAM else ADAGRAD
    one, this = found[1][next(iter(rule))], found[world][plan]
    for key in ROWS:
        torch.testing.assert_close(this.trained[key], one.trained[key], rtol=1e-6, atol=1e-6)
    assert this.steps == len(STEPS)


@EVERY_WORLD
@EVERY_PLAN
def test_no_rank_holds_a_rectangle_without_rows(found: Found, plan: str, world: int) -> None:
    assert found[world][plan].fewest_rows > 0


def _touched(key: str, seed: int) -> Tensor:
    return torch.tensor(sorted({i for row in bags(seed)[key] for i in row}), dtype=torch.int64)


def _gradients(weights: Weights, seed: int) -> Weights:
    leaves = {key: weight.clone().requires_grad_() for key, weight in weights.items()}
    vectors = pooled(leaves, bags(seed))
    loss(vectors, slice(0, BATCH), seed).backward()
    return {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}


def _adam(weights: Weights, lr: float, decay: float) -> Weights:
    """Only touched rows move; the bias correction counts all steps; decay is decoupled."""
    m, v = ({key: torch.zeros_like(w) for key, w in weights.items()} for _ in range(2))
    for step, seed in enumerate(STEPS, start=1):
        for key, grad in _gradients(weights, seed).items():
            at = _touched(key, seed)
            g, w = grad[at], weights[key][at]
            m[key][at] = BETA1 * m[key][at] + (1 - BETA1) * g
            v[key][at] = BETA2 * v[key][at] + (1 - BETA2) * g * g
            m_hat, v_hat = m[key][at] / (1 - BETA1**step), v[key][at] / (1 - BETA2**step)
            weights[key][at] = w - lr * (m_hat / (v_hat.sqrt() + EPS) + decay * w)
    return weights


def _rowwise_adagrad(weights: Weights, lr: float) -> Weights:
    """One accumulator per row: the mean square of its gradient."""
    total = {key: torch.zeros(len(w), 1, dtype=w.dtype) for key, w in weights.items()}
    for seed in STEPS:
        for key, grad in _gradients(weights, seed).items():
            total[key] += grad.square().mean(1, keepdim=True)
            weights[key] = weights[key] - lr * grad / (total[key].sqrt() + EPS)
    return weights


@pytest.mark.parametrize("plan", ["table_wise", "adagrad_table_wise"])
def test_tables_learn_by_the_written_rule(found: Found, plan: str) -> None:
    this = found[1][plan]
    first = {key: weight.double() for key, weight in this.first.items()}
    expected = (
        _adam(first, lr=0.01, decay=0.1) if plan in ADAM else _rowwise_adagrad(first, lr=0.01)
    )
    for key in ROWS:
        torch.testing.assert_close(this.trained[key].double(), expected[key], rtol=1e-5, atol=1e-6)


@EVERY_WORLD
@EVERY_PLAN
def test_a_row_that_no_step_touches_keeps_its_bits(found: Found, plan: str, world: int) -> None:
    this = found[world][plan]
    for key, count in ROWS.items():
        touched = torch.cat([_touched(key, seed) for seed in STEPS])
        still = torch.ones(count, dtype=torch.bool).index_fill(0, touched, False)
        moved = (this.trained[key] != this.first[key]).any(1)
        assert not moved[still].any() and moved[~still].all()
        assert still[-1] or count == 1


@EVERY_WORLD
@EVERY_PLAN
def test_a_copy_of_the_state_takes_the_same_next_step(found: Found, plan: str, world: int) -> None:
    assert found[world][plan].continued


@EVERY_WORLD
@EVERY_PLAN
def test_frozen_tables_keep_their_bytes(found: Found, plan: str, world: int) -> None:
    assert all(found[world][plan].still.values()), found[world][plan].still
