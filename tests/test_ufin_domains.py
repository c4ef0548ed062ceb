"""UFIN: teachers, feature adaptors, and what belongs to whom (U15-U17, S4, S5)."""

import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from data_shards import UserError
from models import METHODS, UFIN, EncoderConfig, Features, Parts, UFINConfig
from models.backbones import Inputs, MLPConfig
from tests.toy_method import ABC, copies, same, stir
from tests.toy_ufin import (
    CONFIGS,
    EACH,
    IDS,
    INPUTS,
    PLAIN,
    TEXT,
    fresh,
    part_of,
    rows,
    trained,
)

NAN = float("nan")
SLOTS = [0, 2, -1, 1, 1, 0, -1, 2]
TEACHER = torch.tensor([1.0, NAN, -2.0, 0.5, NAN, 3.0, NAN, 0.0], dtype=torch.float64)
WEIGHT = torch.tensor([1.0, 1.0, 0.5, 1.0, 2.0, 0.0, 1.0, 1.0], dtype=torch.float64)
LABEL = torch.tensor([1.0, 0, 0, 1, 1, 0, 1, 0], dtype=torch.float64)


def _taught() -> Features:
    return replace(rows(SLOTS), teacher=TEACHER)


def _cross_entropy(logit: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logit[:, 0], LABEL, WEIGHT, reduction="sum") / 6


@EACH
def test_u15_a_teacher_pulls_zeta_alone(config: UFINConfig) -> None:
    method, features = trained(replace(config, distill=0.7)), _taught()
    assert features.teacher is not None
    features.teacher.requires_grad_()
    logit = method(features)
    known = ~TEACHER.isnan()
    gap = TEACHER[known] - logit[known, 1]
    distilled = 0.7 * (WEIGHT[known] * gap.square()).sum() / 6
    loss = method.loss(logit, LABEL, WEIGHT, 6)
    torch.testing.assert_close(loss, _cross_entropy(logit) + distilled)
    inner = [features.teacher, *method.parameters()]
    grads = torch.autograd.grad(loss, inner, materialize_grads=True, retain_graph=True)
    assert all(grad.isfinite().all() for grad in grads) and not grads[0].any()
    if method.adaptor is not None:  # the pull alone, at the adaptor
        own = list(method.adaptor.parameters())
        pull = torch.autograd.grad(loss - _cross_entropy(logit), own, materialize_grads=True)
        assert all(grad.abs().max() < 1e-12 for grad in pull)


def test_u15_a_student_like_its_teacher_has_nothing_to_learn_from_it() -> None:
    method, features = trained(PLAIN), rows(SLOTS)
    zeta = method(features)[:, 1].detach()
    logit = method(replace(features, teacher=zeta))
    assert torch.equal(method.loss(logit, LABEL, WEIGHT, 6), _cross_entropy(logit))
    none = method(replace(features, teacher=torch.full_like(zeta, NAN)))
    assert torch.equal(method.loss(none, LABEL, WEIGHT, 6), _cross_entropy(logit))


def test_u15_no_teacher_in_phase_2_nor_without_one() -> None:
    method = trained(PLAIN)
    assert method(rows(SLOTS)).shape == (8, 2) and method(_taught()).shape == (8, 3)
    method.freeze_shared(keep=True)
    assert torch.equal(method(_taught()), method(rows(SLOTS)))


@given(cut=st.integers(0, 8))
def test_losses_of_parts_add_up_to_the_whole(cut: int) -> None:
    method = trained(PLAIN)
    logit = method(_taught()).detach()
    parts = [
        method.loss(logit[part], LABEL[part], WEIGHT[part], 6)
        for part in (slice(cut), slice(cut, 8))
    ]
    torch.testing.assert_close(sum(parts), method.loss(logit, LABEL, WEIGHT, 6))


@pytest.mark.parametrize("adaptor", ["linear", "euler"])
def test_u16_a_feature_adaptor_of_zeros_is_none(adaptor: str) -> None:
    config, features = replace(PLAIN, adaptor=adaptor), rows(SLOTS)
    assert features.own is not None
    begun = fresh(config)(replace(features, own=torch.zeros_like(features.own)))
    torch.testing.assert_close(begun[:, 0], begun[:, 1], rtol=0, atol=1e-6)
    assert (fresh(config)(features)[features.slot >= 0].diff(dim=1) != 0).all()
    silent, alone = trained(config), trained(replace(config, adaptor="none"), ())
    for domain in ABC:
        for name in ("adaptor.bias", "adaptor.out", "adaptor.out_bias"):
            silent.adapter(domain).get(name, torch.empty(0)).zero_()
    if adaptor == "linear":
        features = replace(features, own=torch.zeros_like(features.own))
    assert torch.equal(silent(features), alone(features))


@EACH
def test_without_an_adapter_a_row_is_scored_by_the_shared_part_from_its_text(
    config: UFINConfig,
) -> None:
    method, alone, features = trained(config), trained(config, ()), rows(SLOTS)
    none = features.slot < 0
    logit, wanted = method(features), alone(replace(features, own=None))
    assert torch.equal(logit[none], wanted[none])
    assert torch.equal(wanted[:, 0], wanted[:, 1])
    assert (logit[~none, 0] != wanted[~none, 0]).all()


@EACH
def test_u17_the_shared_part_knows_no_domain(config: UFINConfig) -> None:
    few, many = fresh(config, ()), fresh(config, [f"domain{i}" for i in range(9)])
    assert same(many.shared(), few.shared())


@EACH
def test_parts_partition_all_tensors(config: UFINConfig) -> None:
    method = trained(config)
    everything = [*method.parameters(), *method.buffers()]
    for tensor in everything:
        tensor.detach().zero_()
    for part in (method.shared(), method.frozen(), *(method.adapter(d) for d in ABC)):
        for tensor in part.values():
            tensor.add_(1)
    assert all((tensor == 1).all() for tensor in everything)
    shared, own = method.shared_parameters(), method.adapter_parameters()
    assert {id(p) for p in method.parameters()} == {id(p) for p in shared} | {id(p) for p in own}
    assert not {id(p) for p in shared} & {id(p) for p in own}
    for parameter in own:
        parameter.data.fill_(5)
    assert all((t == 5).all() for domain in ABC for t in method.adapter(domain).values())


@EACH
@settings(max_examples=5)
@given(
    domains=st.lists(st.integers(-1, 3), min_size=1, max_size=80),
    old=st.permutations(ABC).flatmap(lambda p: st.integers(1, 3).map(lambda n: tuple(p[:n]))),
)
def test_s4_adding_and_s5_removing_a_domain_move_no_bit_of_the_others(
    config: UFINConfig, domains: list[int], old: tuple[str, ...]
) -> None:
    names = [(*old, "new")[i] if 0 <= i <= len(old) else "" for i in domains]

    def logits(method: UFIN) -> Tensor:
        known = [method.domains.index(n) if n in method.domains else -1 for n in names]
        return method(replace(rows(domains), slot=torch.tensor(known)))

    method = trained(config, old)
    parts = [copies(method.shared()), *(copies(method.adapter(domain)) for domain in old)]
    others, before = torch.tensor([name != "new" for name in names]), logits(method)
    method.add_domain("new", seed=9)
    stir(method.adapter("new").values(), "new")
    assert torch.equal(logits(method)[others], before[others])
    joined = [method.shared(), *(method.adapter(domain) for domain in old)]
    assert all(same(*pair) for pair in zip(joined, parts, strict=True))

    gone = old[0]
    method.remove_domain(gone)
    assert method.domains == [*old[1:], "new"]
    kept = torch.tensor([name not in ("new", gone) for name in names])
    assert torch.equal(logits(method)[kept], before[kept])
    left = [method.shared(), *(method.adapter(domain) for domain in old[1:])]
    assert all(same(*pair) for pair in zip(left, [parts[0], *parts[2:]], strict=True))


@EACH
def test_s4_training_an_added_domain_moves_no_bit_of_the_shared_part(config: UFINConfig) -> None:
    method, features = trained(config, ("new",)).train(), rows([0] * 9)
    method.freeze_shared(keep=False)
    shared, own = copies(method.shared()), copies(method.adapter("new"))
    adam = torch.optim.Adam(method.adapter_parameters(), lr=0.1, weight_decay=0.1)
    label = (torch.arange(9) % 2).double()
    for _ in range(3):
        adam.zero_grad()
        method.loss(method(features), label, torch.ones_like(label), 9).backward()
        adam.step()
    assert same(method.shared(), shared)
    assert not any(torch.equal(t, own[name]) for name, t in method.adapter("new").items())


def test_first_weights_do_not_depend_on_the_order_of_adding() -> None:
    config = CONFIGS["cin"]
    config = replace(config, alpha=2)
    forth, back = fresh(config), fresh(config, ABC[::-1])
    assert all(same(forth.adapter(domain), back.adapter(domain)) for domain in ABC)
    assert not same(forth.adapter("a"), forth.adapter("b"))
    forth.remove_domain("a")
    forth.add_domain("a", seed=3)
    assert forth.domains == ["b", "c", "a"] and same(forth.adapter("a"), back.adapter("a"))


@pytest.mark.parametrize("adaptor", ["linear", "euler"])
def test_a_domains_own_tables_learn_from_zeros(adaptor: str) -> None:
    """A click that its ids alone decide: only a pair of them for Euler, one for the linear one."""
    method = fresh(replace(PLAIN, adaptor=adaptor), ("a",))
    method.freeze_shared(keep=False)
    ids = torch.cartesian_prod(torch.arange(3), torch.arange(3), torch.arange(3))
    label = (ids[:, 0] == ids[:, 1] if adaptor == "euler" else ids[:, 0] == 1).double()
    features = replace(rows([0] * 27), text=torch.ones(27, TEXT, dtype=torch.float64))
    table = torch.zeros(3, 3, method.own_width, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([table, *method.adapter_parameters()], lr=0.05)
    losses: list[float] = []
    for step in range(100):
        own = table[torch.arange(3), ids]
        loss = method.loss(method(replace(features, own=own)), label, torch.ones(27), 27)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
        if step == 1:  # at first, Euler's reaches the fields that an order vector begins with
            assert table.grad is not None and table.grad.abs().amin() > 0
            assert adaptor == "linear" or table.grad.std(2).amin() > 0
    assert losses[-1] < 0.25


def _build(config: UFINConfig, text: int = TEXT, inputs: Inputs = INPUTS, ids: int = IDS) -> UFIN:
    parts = Parts(inputs, MLPConfig(), EncoderConfig(), 1, text, ids)
    method = METHODS["ufin"](config, parts)
    assert isinstance(method, UFIN)
    return method


def test_counts_of_the_papers_sizes() -> None:
    euler = 7 + 7 * 49 + 2 * 16 * 49 + (7 * 16 + 1) * 16 * 49 + 16 * 49 + 7
    for text in (384, 512):
        method = _build(UFINConfig(), text, Inputs(2, 16, 0), 5)
        method.add_domain("a", seed=1)
        semantic = 2 * text + 7 * (text + 1) * text + 7 * text + 2 * 16 * text
        network = 7 * 16 * text + 2 * 16 + euler + 7 * text
        assert sum(t.numel() for t in method.shared().values()) == semantic + network
        assert sum(t.numel() for t in method.adapter("a").values()) == 1
        assert method.own_width == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu"}, "method.activation: unknown 'gelu'; there are: relu, none"),
        ({"interaction": "fm"}, "method.interaction: unknown 'fm'; there are: euler, mlp, autoint"),
        ({"adaptor": "mlp"}, "method.adaptor: unknown 'mlp'; there are: linear, euler, none"),
        ({"experts": 0}, "method.experts is 1 or more, not 0"),
        ({"orders": 0}, "method.orders is 1 or more, not 0"),
        ({"distill": -0.5}, "method.distill is 0 or more, not -0.5"),
        ({"alpha": -1}, "method.alpha is 0 or more, not -1"),
        ({"hidden": ()}, "method.hidden is 1 or more, not 0"),
        ({"dropout": 1.0}, "method.dropout is 0 to below 1, not 1.0"),
        ({"top": 8}, "method.top: 8 of 7 interaction experts cannot answer .* method.experts at"),
        ({"top": 0}, "method.top: 0 of 7 interaction experts cannot answer"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        UFINConfig(**options)


@given(experts=st.integers(1, 9), data=st.data())
def test_a_gate_that_may_share_no_expert_is_warned_of(experts: int, data: st.DataObject) -> None:
    top = data.draw(st.integers(1, experts))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("models.ufin").addHandler(handler)
    _build(replace(PLAIN, experts=experts, top=top))
    logging.getLogger("models.ufin").removeHandler(handler)
    expected = f"with {top} of {experts} interaction experts two domains may share none"
    assert [expected in message for message in said] == [True] * (2 * top <= experts)


def test_mistakes_are_refused() -> None:
    no_text = r"this run has none; give its run file a section \[text\], and write them by `cache-"
    with pytest.raises(UserError, match=no_text):
        _build(PLAIN, text=0)
    with pytest.raises(UserError, match=no_text):
        trained(PLAIN)(replace(part_of(rows([0]), slice(1)), text=None))
    with pytest.raises(UserError, match="method.adaptor: euler reads id fields, and the schema"):
        _build(replace(PLAIN, adaptor="euler"), ids=0)
    with pytest.raises(UserError, match='adaptor "none" and alpha 0 leave a domain nothing to'):
        fresh(replace(PLAIN, adaptor="none"))
    method = fresh(PLAIN)
    with pytest.raises(UserError, match="domain 'a' has an adapter already; remove it first"):
        method.add_domain("a", seed=1)
    with pytest.raises(UserError, match="no adapter for domain 'd' is loaded; loaded: a, b, c"):
        method.remove_domain("d")
