"""Multi-domain baselines: equations, routing (S1, S2), domains that come and go (S4, S5)."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_shards import UserError
from models import METHODS, EncoderConfig, Features, Parts
from models.backbones import MLPConfig
from models.multi_domain import (
    BASELINES,
    AESM2Config,
    DFFMConfig,
    HiNetConfig,
    HMoEConfig,
    MMoEConfig,
    MultiDomain,
    MultiDomainConfig,
    PEPNetConfig,
    PLEConfig,
    SharedBottomConfig,
    STARConfig,
)
from tests.baseline_equations import EQUATIONS
from tests.toy_method import ABC, INPUTS, copies, names_of, same, stir, vectors

SIZES: dict[str, Any] = {"tower": (4,), "dropout": 0.0}
CONFIGS: dict[str, MultiDomainConfig] = {
    "shared_bottom": SharedBottomConfig(bottom=(6, 5), **SIZES),
    "mmoe": MMoEConfig(experts=3, expert=(6, 5), **SIZES),
    "ple": PLEConfig(levels=2, shared_experts=2, own_experts=3, expert=(6, 5), **SIZES),
    "hmoe": HMoEConfig(experts=3, expert=(6, 5), others=2, **SIZES),
    "aesm2": AESM2Config(
        experts=5, expert=(6, 5), specific=2, common=1, auxiliary=0.1, layers=2, **SIZES
    ),
    "star": STARConfig(hidden=(6, 5), auxiliary=(3,), **SIZES),
    "star_low_rank": STARConfig(
        hidden=(6, 5), auxiliary=(3,), topology="low_rank", alpha=3, **SIZES
    ),
    "pepnet": PEPNetConfig(hidden=(12, 9), gate=6, tower=(8,), dropout=0.0),
    "dffm": DFFMConfig(hidden=(6, 5), **SIZES),
    "hinet": HiNetConfig(experts=3, expert=(6, 5), others=2, **SIZES),
}
KINDS = {**BASELINES, "star_low_rank": BASELINES["star"]}
EVERY = pytest.mark.parametrize("name", CONFIGS)
BESIDE = ("aesm2", "star", "star_low_rank")  # what adds to the loss
STOPS = ("hmoe", "pepnet")  # what cuts gradients, as finite differences do not
some_names = st.lists(st.sampled_from([*ABC, "unknown"]), min_size=1, max_size=12)


def _fresh(name: str, domains: Sequence[str] = ABC) -> MultiDomain:
    torch.manual_seed(7)
    method = KINDS[name](INPUTS, CONFIGS[name], seed=1)
    for domain in domains:
        method.add_domain(domain, seed=1)
    return method.eval()


def _trained(name: str, domains: Sequence[str] = ABC) -> MultiDomain:
    """As if trained: a domain's part follows its name."""
    method = _fresh(name, domains).double()
    stir(method.shared().values(), "shared")
    for domain in domains:
        stir(method.adapter(domain).values(), domain)
    if name.startswith("star"):  # statistics of a likely size
        for key, parameter in method.named_parameters():
            if key.endswith(("mean", "spread")):
                parameter.data.mul_(0.02)
    return method


def _features(method: MultiDomain, names: Sequence[str]) -> Features:
    place = {domain: slot for slot, domain in enumerate(method.domains)}
    slot = torch.tensor([place.get(name, -1) for name in names])
    return Features(*vectors(len(names), torch.float64), slot)


def _at(features: Features, rows: Tensor) -> Features:
    return Features(features.embedded[rows], features.numbers[rows], features.slot[rows])


def _close(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def _row_by_hand(name: str, method: MultiDomain, features: Features, row: int) -> Tensor:
    """The columns of one row, from live parameters by their names."""
    own = {id(p) for p in method.adapter_parameters()}
    shared = {key: p for key, p in method.named_parameters() if id(p) not in own}
    x = torch.cat([features.embedded[row, :, : INPUTS.dim].flatten(), features.numbers[row]])
    weights = {key[8:]: p[0] for key, p in shared.items() if key.startswith("general.")}
    general = EQUATIONS[name](method, shared, weights, x, True)
    slot, mine = int(features.slot[row]), general
    if slot >= 0:
        assert method.own is not None
        weights = {key: p[slot] for key, p in method.own.named_parameters()}
        mine = EQUATIONS[name](method, shared, weights, x, False)
    learns = torch.tensor(float(slot >= 0), dtype=torch.float64)
    beside = [part for _, part in (mine, general) if part is not None]
    assert len(beside) == 2 * (name in BESIDE)
    return torch.stack([mine[0], general[0], learns, *beside])


def test_every_baseline_has_its_equations_here() -> None:
    assert EQUATIONS.keys() == KINDS.keys() == CONFIGS.keys()


@EVERY
@pytest.mark.parametrize("training", [False, True])
@settings(max_examples=8)
@given(names=some_names)
def test_s2_a_row_is_scored_by_the_equation_whatever_its_batch(
    name: str, training: bool, names: list[str]
) -> None:
    method = _trained(name).train(training)
    features = _features(method, names)
    wanted = torch.stack([_row_by_hand(name, method, features, i) for i in range(len(names))])
    got = method(features)
    _close(got, wanted)
    _close(method(_at(features, torch.tensor([0]))), got[:1])


@EVERY
def test_gradients_are_those_of_the_equation(name: str) -> None:
    names = names_of(9, (*ABC, "unknown"))
    method = _trained(name).train()
    features = _features(method, names)
    inner = [features.embedded.requires_grad_(), *method.parameters()]
    label, weight = torch.arange(9).double() % 2, torch.ones(9).double()
    by_hand = torch.stack([_row_by_hand(name, method, features, i) for i in range(9)])
    got, wanted = (
        torch.autograd.grad(method.loss(logit, label, weight, 9), inner, materialize_grads=True)
        for logit in (method(features), by_hand)
    )
    _close(got, wanted)
    assert all(grad.any() for grad in got)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in STOPS])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    method = _trained(name)
    features = _features(method, names_of(4, (*ABC, "unknown")))

    def logits(embedded: Tensor) -> Tensor:
        return method(Features(embedded, features.numbers, features.slot))[:, :2]

    assert torch.autograd.gradcheck(logits, features.embedded.requires_grad_())


@EVERY
def test_s1_permuting_a_batch_permutes_its_logits(name: str) -> None:
    method = _trained(name)
    features = _features(method, names_of(80, (*ABC, "unknown")))
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    _close(method(_at(features, order)), method(features)[order])


@EVERY
def test_a_domains_rows_are_scored_as_by_a_model_with_its_part_alone(name: str) -> None:
    names = names_of(90, (*ABC, "unknown"))
    method = _trained(name)
    logit = method(_features(method, names))
    for domain in ABC:
        alone, mine = _trained(name, [domain]), torch.tensor([one == domain for one in names])
        assert torch.equal(alone(_features(alone, names))[mine], logit[mine])
    bare, unknown = _trained(name, ()), torch.tensor([one == "unknown" for one in names])
    assert torch.equal(bare(_features(bare, names))[unknown], logit[unknown])
    assert torch.equal(logit[unknown, 0], logit[unknown, 1])
    assert (logit[~unknown, 0] != logit[~unknown, 1]).all()


@EVERY
def test_a_part_learns_from_its_own_rows_alone(name: str) -> None:
    method = _trained(name).train()
    for slot, domain in enumerate(ABC):
        logit = method(_features(method, [domain, "unknown"] * 20))
        loss = method.loss(logit, torch.ones(40).double(), torch.ones(40).double(), 40)
        for grad in torch.autograd.grad(loss, method.adapter_parameters()):
            assert grad[slot].any()
            assert not torch.cat([grad[:slot], grad[slot + 1 :]]).any()


@EVERY
def test_the_loss_is_a_mean_over_real_rows_of_own_and_general_parts(name: str) -> None:
    names = names_of(12, (*ABC, "unknown"))
    method, real = _trained(name), 10
    features = _features(method, names)
    label = torch.arange(12).double() % 3 % 2
    weight = (torch.arange(12) < real).double()  # padding at the end
    columns = method(features)
    probability = columns[:, :2].sigmoid()
    each = torch.where(label.unsqueeze(1) > 0, probability, 1 - probability).log().neg()
    if name in BESIDE:
        each = each + columns[:, 3:]
    known = torch.tensor([one != "unknown" for one in names])[:real]
    wanted = (each[:real, 0].sum() + each[:real, 1][known].sum()) / real
    _close(method.loss(columns, label, weight, real), wanted)
    method.freeze_shared(keep=True)
    _close(method.loss(method(features), label, weight, real), each[:real, 0].mean())


@EVERY
def test_shared_and_adapters_partition_the_model(name: str) -> None:
    method = _trained(name)
    everything = [*method.parameters(), *method.buffers()]
    for tensor in everything:
        tensor.detach().zero_()
    for part in (method.shared(), *(method.adapter(domain) for domain in ABC)):
        for tensor in part.values():
            tensor.add_(1)
    assert all((tensor == 1).all() for tensor in everything)
    lists = [*method.shared_parameters(), *method.adapter_parameters()]
    assert sorted(map(id, lists)) == sorted(map(id, method.parameters()))
    assert {p.data_ptr() for p in method.shared_parameters()} == {
        t.data_ptr() for t in method.shared().values()
    }


@EVERY
def test_s4_adding_and_s5_removing_a_domain_move_no_bit_of_the_others(name: str) -> None:
    names = names_of(70, (*ABC, "new"))
    method = _trained(name)
    parts = [copies(method.shared()), *(copies(method.adapter(domain)) for domain in ABC)]
    others = torch.tensor([one != "new" for one in names])
    before = method(_features(method, names))
    method.add_domain("new", seed=9)
    method.train()
    adam = torch.optim.Adam(method.adapter_parameters(), lr=0.1)
    for _ in range(3):
        adam.zero_grad()
        method(_features(method, ["new"] * 40))[:, 0].square().sum().backward()
        adam.step()
    after = method.eval()(_features(method, names))
    assert torch.equal(after[others], before[others]) and not (after == before)[~others, 0].any()
    now = [method.shared(), *(method.adapter(domain) for domain in ABC)]
    assert all(same(*pair) for pair in zip(now, parts, strict=True))

    method.remove_domain("a")
    assert method.domains == ["b", "c", "new"]
    kept = torch.tensor([one != "a" for one in names])
    assert torch.equal(method(_features(method, names))[kept], after[kept])
    for domain in ("b", "c", "new"):
        method.remove_domain(domain)
    assert not method.adapter_parameters()
    assert torch.equal(method(_features(method, names))[:, 1], before[:, 1])


@EVERY
def test_first_weights_do_not_depend_on_the_order_of_adding(name: str) -> None:
    forth, back = _fresh(name), _fresh(name, ABC[::-1])
    assert all(same(forth.adapter(domain), back.adapter(domain)) for domain in ABC)
    differ = not same(forth.adapter("a"), forth.adapter("b"))
    assert differ == (name != "dffm")  # which begins with ones


@EVERY
def test_a_baseline_is_found_by_its_configs_name(name: str) -> None:
    parts = Parts(INPUTS, MLPConfig(), EncoderConfig(), seed=1)
    method = METHODS[CONFIGS[name].name](CONFIGS[name], parts)  # type: ignore[attr-defined]
    assert type(method) is KINDS[name]


@pytest.mark.parametrize(
    ("config", "mistake", "said"),
    [
        (MMoEConfig, {"expert": (4, 0)}, r"method\.expert: sizes are 1 or more, not \(4, 0\)"),
        (PLEConfig, {"levels": 0}, r"method\.levels: sizes are 1 or more, not 0"),
        (STARConfig, {"dropout": 1.0}, r"method\.dropout is 0 to below 1, not 1\.0"),
        (AESM2Config, {"experts": 1}, "specific = 2 and common = 2 pick among 1 experts; neither"),
    ],
)
def test_a_shape_that_is_none_is_refused(config: Any, mistake: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config(**mistake)
