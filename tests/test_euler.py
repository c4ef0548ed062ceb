"""Euler interactions against complex powers (U1-U7), and where floating point ends."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data_shards import UserError
from models import MLoRA, MLoRAConfig, euler
from models.backbones import EulerNetConfig, Inputs
from models.backbones.eulernet import EulerNet
from models.euler import EulerWeights, Polar, euler_nets, first_weights, polar, powers
from tests.toy_method import stir

NONE = torch.zeros(())
CONFIG = EulerNetConfig(explicit_dropout=0.0, implicit_dropout=0.0)


@pytest.fixture
def exact() -> Iterator[None]:
    """Without the floor of moduli."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(euler, "FLOOR", 0.0)
        yield


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _rectangular(found: Polar) -> tuple[Tensor, Tensor]:
    return found.log.exp() * found.phase.cos(), found.log.exp() * found.phase.sin()


def _explicit(real: Tensor, imag: Tensor, orders: Tensor) -> tuple[Tensor, Tensor]:
    return _rectangular(powers(polar(real, imag), orders, NONE, NONE))


def _backbone(config: EulerNetConfig, inputs: Inputs) -> EulerNet:
    torch.manual_seed(0)
    backbone = EulerNet(inputs, config).double()
    stir((p.data for p in backbone.parameters()), "euler")
    return backbone


def _logit(backbone: EulerNet, emb_BFD: Tensor, numbers: Tensor | None = None) -> Tensor:
    rows = len(emb_BFD)
    none = emb_BFD.new_zeros(rows, 0)
    return backbone(emb_BFD, none, none if numbers is None else numbers, torch.full((rows,), -1))


@pytest.mark.parametrize(("floor", "tolerance"), [(0.0, 1e-13), (1e-8, 1e-5)])
def test_u1_pairs_of_orders_1_are_a_factorization_machine(
    monkeypatch: pytest.MonkeyPatch, floor: float, tolerance: float
) -> None:
    monkeypatch.setattr(euler, "FLOOR", floor)
    e_BDF = _normal(20, 3, 5)
    pairs = [(i, j) for i in range(5) for j in range(i)]
    orders = torch.zeros(5, len(pairs), dtype=torch.float64)
    for vector, pair in enumerate(pairs):
        orders[list(pair), vector] = 1
    real, imag = _explicit(e_BDF, torch.zeros_like(e_BDF), orders)
    wanted = torch.stack([e_BDF[:, :, i] * e_BDF[:, :, j] for i, j in pairs], 2)
    torch.testing.assert_close(real, wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(imag, torch.zeros_like(imag), rtol=0, atol=tolerance)
    second = (e_BDF.sum(2).square() - e_BDF.square().sum(2)).sum(1) / 2
    torch.testing.assert_close(real.sum((1, 2)), second, rtol=tolerance, atol=10 * tolerance)


@settings(max_examples=40)
@given(
    fields=st.integers(1, 4),
    vectors=st.integers(1, 4),
    dim=st.integers(1, 3),
    whole=st.booleans(),
    seed=st.integers(0, 999),
)
def test_u2_powers_are_those_of_complex_numbers(
    fields: int, vectors: int, dim: int, whole: bool, seed: int
) -> None:
    orders = _normal(fields, vectors, seed=seed) * 2
    orders = orders.round() if whole else orders
    real, imag = _normal(2, 6, dim, fields, seed=seed + 1).unbind(0)
    got = torch.complex(*_explicit(real, imag, orders))
    z = torch.complex(real, imag).unsqueeze(3)
    wanted = (z**orders).prod(2)
    # the floor of a squared modulus moves a power a by a factor of 1 + a / 2 * FLOOR / |z|^2
    moved = (orders.abs() / 2 * euler.FLOOR / z.abs().square()).sum(2)
    assert ((got - wanted).abs() <= wanted.abs() * (2 * moved + 1e-13)).all()


def test_u3_u4_identity_orders_pass_the_input_through_and_dims_are_alike(exact: None) -> None:
    real, imag = _normal(2, 9, 3, 4).unbind(0)
    for got, wanted in zip(_explicit(real, imag, torch.eye(4).double()), (real, imag), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-14)
    orders, order = _normal(4, 6), torch.tensor([2, 0, 1])
    permuted = _explicit(real[:, order], imag[:, order], orders)
    for got, wanted in zip(permuted, _explicit(real, imag, orders), strict=True):
        assert torch.equal(got, wanted[:, order])


@given(
    modulus=st.floats(0.1, 3), phase=st.floats(-9, 9), order=st.floats(-3, 3), up=st.floats(-1, 1)
)
def test_u5_an_order_raises_the_principal_number(
    modulus: float, phase: float, order: float, up: float
) -> None:
    e, mu, weigh, bias = torch.tensor([phase, modulus, order, up], dtype=torch.float64)
    base = polar(*(mu * part.expand(1, 1, 1) for part in (e.cos(), e.sin())))
    found = powers(base, weigh.expand(1, 1), bias, NONE)
    principal = math.remainder(phase, 2 * math.pi)
    assert float(found.phase) == pytest.approx(principal * order, abs=1e-9)
    assert float(found.log) == pytest.approx(math.log(modulus) * order + up, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e30])
@pytest.mark.parametrize("order", [1.0, -40.0, 40.0])
def test_u6_finite_forward_and_backward(
    dtype: torch.dtype, layer_norm: bool, training: bool, scale: float, order: float
) -> None:
    config = replace(CONFIG, orders=(3, 2), layer_norm=layer_norm, explicit_dropout=0.3 * training)
    backbone = _backbone(config, Inputs(3, 4, 0)).train(training)
    backbone.mu.data.copy_(torch.tensor([0.0, 1.0, -1.0]))
    for name, tensor in backbone.named_parameters():
        if name.endswith("orders"):
            tensor.data.fill_(order)
    backbone.to(dtype)
    emb = (_normal(16, 3, 4) * scale).to(dtype).requires_grad_()
    logit = _logit(backbone, emb)
    grads = torch.autograd.grad(logit.sum(), [emb, *backbone.parameters()])
    assert logit.isfinite().all() and all(grad.isfinite().all() for grad in grads)


@given(x=st.floats(-1e-3, 1e-3), y=st.floats(-1e-3, 1e-3))
def test_u6_a_phase_has_a_bounded_gradient(x: float, y: float) -> None:
    place = torch.tensor([x, y], dtype=torch.float64, requires_grad=True)
    grad = torch.autograd.grad(polar(*place).phase, place)[0]
    assert float(grad.norm()) <= 0.5 / math.sqrt(euler.FLOOR) * 1.001
    floored = x * x + y * y + euler.FLOOR
    assert grad.tolist() == pytest.approx([-y / floored, x / floored])


def test_u7_real_and_imaginary_parts_share_the_last_layer() -> None:
    backbone, emb = _backbone(CONFIG, Inputs(5, 4, 0)), _normal(8, 5, 4)
    wanted = _logit(backbone, emb)
    backbone.layers[-1].register_forward_hook(lambda *io: io[2].flip(0))
    torch.testing.assert_close(_logit(backbone, emb), wanted, rtol=1e-12, atol=1e-12)


def test_numbers_are_fields() -> None:
    backbone, emb, numbers = _backbone(CONFIG, Inputs(3, 4, 2)), _normal(8, 3, 4), _normal(8, 2)
    plain = _backbone(CONFIG, Inputs(5, 4, 0))
    unit = backbone.unit
    assert unit is not None and plain.unit is None
    own = {name: tensor for name, tensor in backbone.state_dict().items() if name != "unit"}
    plain.load_state_dict(own)
    joined = torch.cat([emb, numbers.unsqueeze(2) * unit], 1)
    assert torch.equal(_logit(backbone, emb, numbers), _logit(plain, joined))


def test_layer_norm_is_over_the_floats_of_a_field() -> None:
    backbone = _backbone(replace(CONFIG, layer_norm=True), Inputs(5, 32, 0))
    for norm in backbone.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.reset_parameters()
    seen: list[Tensor] = []
    backbone.layers[0].register_forward_hook(lambda *io: seen.append(io[2]))
    _logit(backbone, _normal(6, 5, 32))
    mean, var = seen[0].mean(2), seen[0].var(2, correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean))
    torch.testing.assert_close(var, torch.ones_like(var), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("which", ["explicit_dropout", "implicit_dropout"])
def test_either_dropout_is_drawn_in_training_alone(which: str) -> None:
    dropping, emb = replace(CONFIG, **{which: 0.5}), _normal(30, 5, 16)
    backbone, plain = (_backbone(config, Inputs(5, 16, 0)) for config in (dropping, CONFIG))
    assert torch.equal(_logit(backbone.eval(), emb), _logit(plain, emb))
    backbone.train()
    assert (_logit(backbone, emb) != _logit(backbone, emb)).all()


def _with_weights(backbone: EulerNet, weights: EulerWeights, net: int, head: int) -> EulerNet:
    """The backbone of one layer that a head of a net is."""
    vectors, dim = weights.orders.shape[2] // weights.out_bias.shape[1], weights.out.shape[1]
    mine = slice(head * vectors, (head + 1) * vectors)
    own = EulerWeights(*(tensor[net].detach() for tensor in weights))
    matrix = own.weight.unflatten(1, (dim, -1))[:, :, mine].flatten(1)
    for name, tensor in {
        "mu": own.mu,
        "layers.0.orders": own.orders[:, mine],
        "layers.0.log_bias": own.log_bias[:, mine],
        "layers.0.phase_bias": own.phase_bias[:, mine],
        "layers.0.implicit.linear.weight": matrix.T,
        "layers.0.implicit.linear.bias": own.bias.unflatten(0, (dim, -1))[:, mine].flatten(),
        "out.weight": own.out[:, mine].flatten().unsqueeze(0),
        "out.bias": own.out_bias[head : head + 1],
    }.items():
        backbone.get_parameter(name).data.copy_(tensor)
    return backbone


def _nets(heads: int = 2, fields: int = 4, dim: int = 3, vectors: int = 5) -> EulerWeights:
    """Two nets, as if trained."""
    first = [first_weights(fields, dim, vectors, heads) for _ in range(2)]
    weights = EulerWeights(*(torch.cat(parts).double() for parts in zip(*first, strict=True)))
    stir(weights, "nets")
    return weights


@pytest.mark.parametrize("heads", [1, 2])
def test_heads_of_nets_are_backbones_of_one_layer(heads: int) -> None:
    weights, x = _nets(heads), _normal(2, 6, 4, 3).requires_grad_()
    assert (weights.mu < 0).any() and (weights.mu > 0).any()
    got = euler_nets(x * 3, weights)  # beyond pi
    assert got.shape == (2, 6, heads)
    backbone = _backbone(replace(CONFIG, orders=(5,)), Inputs(4, 3, 0))
    for net in range(2):
        for head in range(heads):
            logit = _logit(_with_weights(backbone, weights, net, head), x[net] * 3)
            torch.testing.assert_close(got[net, :, head], logit, rtol=1e-6, atol=1e-6)
            grads = [
                torch.autograd.grad(y.sum(), x, retain_graph=True)[0][net]
                for y in (got[net, :, head], logit)
            ]
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_gradients_of_nets_are_those_of_finite_differences() -> None:
    weights = [tensor.requires_grad_() for tensor in _nets(2, 3, 2, 2)]
    x = _normal(2, 2, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *w: euler_nets(x, EulerWeights(*w)), (x, *weights))


def test_autocast_does_not_reach_the_logarithms() -> None:
    weights = EulerWeights(*(tensor.float() for tensor in _nets()))
    x, backbone = _normal(2, 6, 4, 3).float(), _backbone(CONFIG, Inputs(4, 3, 0)).float()
    wanted = euler_nets(x, weights), _logit(backbone, x[0])
    with torch.autocast("cpu", torch.bfloat16):
        got = euler_nets(x, weights), _logit(backbone, x[0])
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_first_weights_are_the_originals() -> None:
    torch.manual_seed(0)
    for orders in (EulerNet(Inputs(7, 16, 0), CONFIG), EulerNet(Inputs(9, 16, 0), CONFIG)):
        found = orders.get_parameter("layers.0.orders").detach()
        torch.testing.assert_close(found.sum(0), torch.ones(7))
        assert torch.equal(found, torch.eye(7)) or float(found.amax(0).median()) > 0.999
        assert (orders.mu == 1).all()
        assert float(orders.get_parameter("layers.0.log_bias").detach().std()) == pytest.approx(
            0.01, rel=0.3
        )
    nets = first_weights(7, 16, 7, 3, torch.Generator().manual_seed(0))
    assert torch.equal(nets.orders[0], torch.eye(7).repeat(1, 3))
    assert float(nets.weight.std()) == pytest.approx(0.01, rel=0.05)
    assert float(nets.out.std()) == pytest.approx(math.sqrt(2 / 113), rel=0.1)


@pytest.mark.parametrize(("field", "order"), [(0, -12.5), (3, -30.0)])
def test_an_order_that_overflows_is_named(field: int, order: float) -> None:
    method = MLoRA(Inputs(3, 4, 1), CONFIG, MLoRAConfig())
    assert method.diagnose() is None
    method.get_parameter("backbone.mu").data[field] = 1e-2
    method.get_parameter("backbone.layers.0.orders").data[field, 5] = order
    message = method.diagnose()
    assert message is not None
    assert f"order {order:.3g} of field {field} " in message and "order vector 5" in message
    method.get_parameter("backbone.mu").data[field] = math.nan
    assert method.diagnose() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"orders": ()}, r"backbone.orders: order vectors of each layer, 1 or more, .* not \[\]"),
        ({"orders": (7, 0)}, r"backbone.orders: .* such as \[7\]; not \[7, 0\]"),
        ({"explicit_dropout": 1.0}, "backbone.explicit_dropout is 0 to below 1, not 1.0"),
        ({"implicit_dropout": -0.1}, "backbone.implicit_dropout is 0 to below 1, not -0.1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        EulerNet(Inputs(3, 4, 0), replace(CONFIG, **options))
