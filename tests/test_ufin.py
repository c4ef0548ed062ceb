"""UFIN: its equations, and how rows are scored whatever the batch (U10-U14, S1, S2)."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_shards import Field, UserError
from models import UFIN, UFINConfig, euler
from models.semantic_experts import sparse
from tests.toy_ufin import (
    CONFIGS,
    EACH,
    INPUTS,
    PLAIN,
    TEXT,
    by_hand,
    fresh,
    part_of,
    rows,
    trained,
)


@pytest.fixture(scope="module", autouse=True)
def exact_logarithms() -> Iterator[None]:
    """Without the floor of moduli, which the equations do not have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(euler, "FLOOR", 0.0)
        yield


SLOTS = [0, 2, -1, 1, 1, 0, -1, 2]


def _close(got: Tensor | tuple, wanted: Tensor | tuple) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@EACH
def test_ufin_is_its_equations(config: UFINConfig) -> None:
    method, features = trained(config), rows(SLOTS)
    assert features.text is not None and features.own is not None
    got = method(features)
    inner = [features.text, features.embedded, features.own]
    for tensor in inner:
        tensor.requires_grad_()
    got = method(features)
    wanted = torch.stack([by_hand(method, features, row) for row in range(len(SLOTS))])
    _close(got, wanted)
    inner = [*inner, *method.parameters()]
    grads = [
        torch.autograd.grad(y.square().sum(), inner, materialize_grads=True) for y in (got, wanted)
    ]
    _close(*grads)


@EACH
@pytest.mark.parametrize("training", [False, True])
def test_s1_s2_a_row_is_scored_as_if_it_were_alone(config: UFINConfig, training: bool) -> None:
    method, features = trained(config).train(training), rows(SLOTS * 2)
    logit = method(features)
    alone = [method(part_of(features, slice(i, i + 1))) for i in range(len(logit))]
    _close(torch.cat(alone), logit)
    order = torch.randperm(len(logit), generator=torch.Generator().manual_seed(1))
    _close(method(part_of(features, order)), logit[order])


def test_u10_semantic_gates_sum_to_1_and_begin_uniform() -> None:
    semantic = trained(PLAIN).semantic
    assert semantic is not None
    s, none = torch.randn(9, TEXT, dtype=torch.float64), torch.full((9,), -1)
    _close(semantic.weights(s).sum(1), torch.ones(9, dtype=torch.float64))
    begun = fresh(PLAIN).semantic
    assert begun is not None and not begun.gate.weight.any()
    experts = begun.layer(s, none).relu().view(9, PLAIN.experts, TEXT)
    _close(begun(s, none), experts.mean(1))


@settings(max_examples=50)
@given(
    weights=st.integers(1, 9).flatmap(
        lambda n: st.lists(
            st.lists(
                st.sampled_from([0.0, 0.1, 0.5, 1.0]) | st.floats(-9, 9), min_size=n, max_size=n
            ),
            min_size=1,
            max_size=6,
        )
    ),
    data=st.data(),
)
def test_u11_u12_a_sparse_gate_keeps_k_of_the_dense_one(weights: list, data: st.DataObject) -> None:
    dense = torch.tensor(weights, dtype=torch.float64).softmax(1)
    experts = dense.shape[1]
    top = data.draw(st.integers(1, experts))
    kept = sparse(dense, top, renormalise=False)
    chosen = kept > 0
    assert (chosen.sum(1) == top).all()
    assert torch.equal(kept[chosen], dense[chosen])
    assert (kept.sum(1) < 1 - 1e-9).all() or top == experts or bool(dense.min() < 1e-6)
    assert (kept.masked_fill(~chosen, 9).amin(1) >= dense.masked_fill(chosen, 0).amax(1)).all()
    if top == experts:
        assert torch.equal(kept, dense)
    if 2 * top > experts:
        assert all((a & b).any() for a in chosen for b in chosen)
    scaled = sparse(dense, top, renormalise=True)
    _close(scaled.sum(1), torch.ones(len(dense), dtype=torch.float64))


def test_of_equal_weights_the_first_are_kept() -> None:
    kept = sparse(torch.tensor([[0.1, 0.3, 0.3, 0.3], [0.25] * 4]), 2, renormalise=False)
    assert (kept > 0).tolist() == [[False, True, True, False], [True, True, False, False]]
    many = sparse(torch.ones(3, 999), 5, renormalise=False)  # enough for another kind of sort
    assert (many > 0).nonzero()[:, 1].tolist() == [0, 1, 2, 3, 4] * 3
    gate = fresh(PLAIN).network
    assert gate is not None and gate.gate.gate.weight.unique().numel() == 3 * TEXT


@pytest.mark.parametrize("interaction", ["euler", "mlp", "cin", "cross", "autoint"])
def test_u11_an_expert_that_is_not_chosen_learns_nothing(interaction: str) -> None:
    method = trained(replace(PLAIN, interaction=interaction))
    assert method.network is not None
    answers: list[Tensor] = []
    method.network.experts.register_forward_hook(lambda *io: answers.append(io[2]))
    features = rows([-1] * 9)
    zeta = method(features)[:, 1]
    grad = torch.autograd.grad(zeta.sum(), answers[0])[0]
    assert torch.equal(grad, method.gates(features))
    assert ((grad == 0).sum(1) == PLAIN.experts - PLAIN.top).all()


def test_u13_universal_features_are_normal_before_the_affine_part() -> None:
    features = rows(SLOTS)
    e = fresh(PLAIN).universal(features)
    assert e.shape == (len(SLOTS), PLAIN.universal, PLAIN.dim)
    _close(e.mean(2), torch.zeros_like(e[:, :, 0]))
    torch.testing.assert_close(
        e.var(2, correction=0), torch.ones_like(e[:, :, 0]), rtol=0.02, atol=0
    )


def test_u14_anonymous_fields_join_by_option_and_others_never() -> None:
    features = rows(SLOTS)
    for config in (PLAIN, replace(PLAIN, anonymous=False)):
        method, moved = trained(config), features.embedded.clone()
        moved[:, :, INPUTS.dim :] += 1  # spare columns
        same = method(replace(features, embedded=moved))
        assert torch.equal(same, method(features))
        moved[:, 1] += 1
        assert torch.equal(method(replace(features, embedded=moved)), same) != config.anonymous
        kinds = [kind for kind in ("id", "anonymous") if config.reads(Field("f", kind))]
        assert kinds == ["anonymous"] * config.anonymous
    none = torch.zeros(len(SLOTS), 0, 0, dtype=torch.float64)
    textual = trained(replace(PLAIN, anonymous=False))
    assert torch.equal(textual(replace(features, embedded=none)), textual(features))
    method = trained(PLAIN)
    textual.load_state_dict(method.state_dict(), strict=False)
    unseen = method(replace(features, embedded=torch.zeros_like(features.embedded)))
    assert torch.equal(unseen, textual(features))


@EACH
def test_finite_for_zero_huge_and_bf16_inputs(config: UFINConfig) -> None:
    method = trained(config).float().train()
    for scale in (0.0, 1.0, 1e15):
        features = rows(SLOTS).to(torch.float32)
        assert features.text is not None and features.own is not None
        features = replace(
            features,
            text=features.text * scale,
            embedded=features.embedded * min(scale, 1),
            own=features.own * scale,
        )
        for dtype in (torch.float32, torch.bfloat16):
            cast, inputs = method.to(dtype), features.to(dtype)
            logit = cast(inputs)
            assert logit.isfinite().all()
            grads = torch.autograd.grad(
                logit.sum(), list(cast.parameters()), materialize_grads=True
            )
            assert all(grad.isfinite().all() for grad in grads)


@EACH
def test_bf16_weights_give_nearly_the_same_logits(config: UFINConfig) -> None:
    method = trained(replace(config, top=config.experts))  # a near tie may go either way
    wanted = method(rows(SLOTS))
    got = method.bfloat16()(rows(SLOTS).to(torch.bfloat16))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=0.2, atol=0.5)


def test_what_pictures_are_made_of() -> None:
    method, features = trained(PLAIN), rows(SLOTS)
    gates = method.gates(features)
    assert gates.shape == (len(SLOTS), PLAIN.experts) and not gates.requires_grad
    assert ((gates > 0).sum(1) == PLAIN.top).all()
    orders = method.orders()
    assert orders.shape == (PLAIN.experts, PLAIN.universal, PLAIN.orders)
    raw = method.get_parameter("network.experts.orders")[0]
    assert torch.equal(torch.cat(list(orders), 1), raw)
    with pytest.raises(UserError, match="method.interaction: mlp learns no orders; euler does"):
        trained(CONFIGS["deltas_alone"]).orders()
    for look in (UFIN.universal, UFIN.gates):
        with pytest.raises(UserError, match="method.universal is 0, so there are no universal"):
            look(trained(CONFIGS["no_features"]), features)


@settings(max_examples=10)
@given(seed=st.integers(0, 99))
def test_an_order_that_overflows_is_named_and_stays_finite(seed: int) -> None:
    method = trained(PLAIN)
    assert method.diagnose() is None
    generator = torch.Generator().manual_seed(seed)
    field, vector = (int(torch.randint(n, (), generator=generator)) for n in (4, 6))
    method.get_parameter("network.experts.mu").data[0, field] = 1e-3
    method.get_parameter("network.experts.orders").data[0, field, vector] = -12.5
    found = f"order -12.5 of universal feature {field} .* in interaction expert {vector // 2}"
    message = method.diagnose()
    assert message is not None
    with pytest.raises(UserError, match=found):
        raise UserError(message)
    grads = torch.autograd.grad(
        method(rows(SLOTS)).sum(), list(method.parameters()), materialize_grads=True
    )
    assert all(grad.isfinite().all() for grad in grads)
