"""The dense engine: plain Adam at any ZeRO stage and number of ranks, and its state fits any other.

Each gang measures everything once; the laws below compare what the gangs found.
"""

from dataclasses import dataclass
from itertools import product

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_shards import UserError
from models import Features, MLoRA
from tests.gang import gang
from tests.toy_method import ABC, names_of, same, slots, trained, vectors
from tests.toy_tables import BATCH, mine
from trainer.engine import Engine, EngineConfig

pytestmark = pytest.mark.dist

WORLDS, STAGES = (1, 2, 4), (0, 1, 2, 3)
LR, DECAY = 0.01, 0.1
SAVED, STEPS = 3, 5  # a state is taken after 3 steps, and the run goes on to 5
DOMAINS = {1: ABC, 2: ("a",)}
NAMES = {1: names_of(BATCH, (*ABC, "unknown")), 2: ["a"] * BATCH}

State = tuple[dict[str, Tensor], dict[str, Tensor]]


def _method(phase: int = 1) -> MLoRA:
    """Some of its parameters are smaller than four ranks."""
    return trained("dcn", DOMAINS[phase], hidden=(6, 3)).train()


def _trainable(method: MLoRA, phase: int) -> list[nn.Parameter]:
    return list(method.parameters()) if phase == 1 else method.adapter_parameters()


def _engine(method: MLoRA, config: EngineConfig, phase: int = 1) -> Engine:
    rows = BATCH // dist.get_world_size()
    return Engine(method, _trainable(method, phase), config, LR, DECAY, rows)


def _slot(method: MLoRA) -> Tensor:
    return slots(method, NAMES[1 if len(method.domains) > 1 else 2])


def _batch(seed: int, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    embedded, numbers = vectors(BATCH, seed=seed)
    return embedded[rows], numbers[rows], (embedded[:, 0, 0] > 0).float()[rows]


def _run(engine: Engine, method: MLoRA, seeds: range) -> list[float]:
    """Global losses of some steps."""
    losses = []
    for seed in seeds:
        embedded, numbers, label = _batch(seed, mine())
        logit = engine(Features(embedded, numbers, _slot(method)[mine()]))
        share = method.loss(logit, label, torch.ones_like(label), BATCH)
        engine.backward(share * dist.get_world_size())
        engine.step()
        total = share.detach()
        dist.all_reduce(total)
        losses.append(float(total))
    return losses


def _plain(phase: int, clip: float = 0.0) -> tuple[list[float], dict[str, Tensor]]:
    """The same steps by torch alone, in one process."""
    method, losses = _method(phase), []
    trainable = _trainable(method, phase)
    adam = torch.optim.Adam(trainable, lr=LR, weight_decay=DECAY)
    for seed in range(STEPS):
        embedded, numbers, label = _batch(seed, slice(None))
        logit = method(Features(embedded, numbers, _slot(method)))
        loss = method.loss(logit, label, torch.ones_like(label), BATCH)
        adam.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(trainable, clip)
        adam.step()
        losses.append(loss.item())
    wanted = {id(p) for p in trainable}
    return losses, {n: p.data for n, p in method.named_parameters() if id(p) in wanted}


@dataclass
class Run:
    """One phase under one configuration in one world."""

    losses: list[float]
    saved: State
    ended: State


def _measure(config: EngineConfig, phase: int = 1) -> Run:
    method = _method(phase)
    engine = _engine(method, config, phase)
    losses = _run(engine, method, range(SAVED))
    saved = engine.parameters(), engine.optimizer_state()
    losses += _run(engine, method, range(SAVED, STEPS))
    if phase == 2:
        _require_still(method)
    return Run(losses, saved, (engine.parameters(), engine.optimizer_state()))


def _require_still(method: MLoRA) -> None:
    frozen = method.shared_parameters()
    with deepspeed.zero.GatheredParameters(frozen):
        assert all(map(torch.equal, frozen, _method(2).shared_parameters()))


def _clipped(stage: int) -> EngineConfig:
    return EngineConfig(stage, gradient_clipping=0.05)  # type: ignore[arg-type]


def _measure_all() -> dict[str, Run]:
    found = {}
    for stage in STAGES:
        config = EngineConfig(stage)  # type: ignore[arg-type]
        found |= {f"{stage}/{phase}": _measure(config, phase) for phase in (1, 2)}
        found[f"{stage}/clipped"] = _measure(_clipped(stage))
        if stage:
            found[f"{stage}/bf16"] = _measure(EngineConfig(stage, "bf16"))  # type: ignore[arg-type]
    return found


@pytest.fixture(scope="module")
def found() -> dict[int, dict[str, Run]]:
    answers = {world: gang(world, _measure_all) for world in WORLDS}
    for ranks in answers.values():
        for rank, (name, run) in product(ranks, ranks[0].items()):
            _require_equal(rank[name].ended, run.ended, name)
    return {world: ranks[0] for world, ranks in answers.items()}


def _require_equal(one: State, other: State, run: str, within: float = 0.0) -> None:
    for got, wanted in zip(one, other, strict=True):
        torch.testing.assert_close(
            got, wanted, rtol=within, atol=within, msg=lambda text: f"{run}: {text}"
        )


Found = dict[int, dict[str, Run]]
EVERY = pytest.mark.parametrize(("world", "stage"), [*product(WORLDS, STAGES)])
SHARDED = pytest.mark.parametrize(("world", "stage"), [*product(WORLDS, STAGES[1:])])


@EVERY
@pytest.mark.parametrize("phase", [1, 2])
def test_steps_are_those_of_plain_adam(found: Found, world: int, stage: int, phase: int) -> None:
    losses, parameters = _plain(phase)
    run = found[world][f"{stage}/{phase}"]
    assert run.losses == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(run.ended[0], parameters, rtol=1e-5, atol=1e-5)


@EVERY
def test_clipping_is_by_the_norm_over_all_ranks(found: Found, world: int, stage: int) -> None:
    losses, parameters = _plain(1, clip=0.05)
    run = found[world][f"{stage}/clipped"]
    assert run.losses == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(run.ended[0], parameters, rtol=1e-5, atol=1e-5)


@SHARDED
def test_bf16_keeps_fp32_masters(found: Found, world: int, stage: int) -> None:
    run = found[world][f"{stage}/bf16"]
    assert run.losses == pytest.approx(_plain(1)[0], rel=0.05)
    state = {name: tensor for name, tensor in run.ended[1].items() if name != "steps"}
    assert {tensor.dtype for tensor in (*run.ended[0].values(), *state.values())} == {torch.float32}
    masters = torch.cat([tensor.flatten() for tensor in run.ended[0].values()])
    assert (masters != masters.bfloat16().float()).float().mean() > 0.9


def _continue(states: list[tuple[str, int, State]]) -> list[tuple[State, State]]:
    """For each (precision, stage, state): the state as loaded, and after the remaining steps."""
    answers = []
    for precision, stage, state in states:
        method = _method()
        nn.init.zeros_(method.backbone.deep.layers[0].linear.weight)  # type: ignore[union-attr, arg-type]
        engine = _engine(method, EngineConfig(stage, precision))  # type: ignore[arg-type]
        engine.load(*state)
        loaded = engine.parameters(), engine.optimizer_state()
        _run(engine, method, range(SAVED, STEPS))
        answers.append((loaded, (engine.parameters(), engine.optimizer_state())))
    return answers


@pytest.mark.parametrize("world", WORLDS)
def test_a_state_continues_as_if_never_saved(found: Found, world: int) -> None:
    cases = [("fp32", stage, f"{stage}/1") for stage in STAGES]
    cases += [("bf16", stage, f"{stage}/bf16") for stage in STAGES[1:]]
    states = [(kind, stage, found[world][run].saved) for kind, stage, run in cases]
    answers = gang(world, _continue, states)[0]
    # A sum over more than two ranks depends on the order in which autograd's hooks fill a bucket.
    within = {"fp32": 1e-6, "bf16": 1e-3} if world > 2 else {"fp32": 0.0, "bf16": 0.0}
    for (kind, _, run), (loaded, ended) in zip(cases, answers, strict=True):
        _require_equal(loaded, found[world][run].saved, f"{run} as loaded")
        _require_equal(ended, found[world][run].ended, f"{run} at the end", within[kind])


@pytest.mark.parametrize(
    ("source", "target", "up"),
    [(1, 1, 3), (2, 2, 1), (4, 4, 2), (1, 4, 1), (2, 1, 0), (4, 2, 3)],
)
def test_a_state_continues_at_any_stage_in_any_world(
    found: Found, source: int, target: int, up: int
) -> None:
    runs = [found[source][f"{stage}/1"] for stage in STAGES]
    states = [("fp32", (stage + up) % 4, run.saved) for stage, run in enumerate(runs)]
    for run, (loaded, ended) in zip(runs, gang(target, _continue, states)[0], strict=True):
        _require_equal(loaded, run.saved, "as loaded")
        _require_equal(ended, run.ended, "at the end", 1e-6)


def _from_parameters_alone() -> None:
    """A state of before the first step has no moments."""
    for stage in STAGES:
        engine = _engine(method := _method(), EngineConfig(stage))  # type: ignore[arg-type]
        assert engine.optimizer_state() == {}
        start = {name: tensor + 0.01 for name, tensor in engine.parameters().items()}
        engine.load(start, {})
        assert same(engine.parameters(), start) and engine.optimizer_state() == {}
        _run(engine, method, range(2))
        assert int(engine.optimizer_state()["steps"]) == 2


def test_parameters_load_without_an_optimizer_state() -> None:
    gang(2, _from_parameters_alone)


def test_bf16_needs_zero() -> None:
    method = _method()
    with pytest.raises(UserError, match=r'"bf16" needs zero_stage 1, 2 or 3, not 0'):
        Engine(method, list(method.parameters()), EngineConfig(0, "bf16"), LR, DECAY, BATCH)
