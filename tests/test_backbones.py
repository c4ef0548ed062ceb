"""Every backbone against its paper's equations, written out for one row at a time in float64."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from models import euler
from models.backbones import BACKBONES, Backbone, BackboneConfig, Inputs
from tests.toy_method import stir, without_dropout

EVERY = pytest.mark.parametrize("name", BACKBONES)


@pytest.fixture(scope="module", autouse=True)
def exact_logarithms() -> Iterator[None]:
    """EulerNet without the floor of its moduli, which its equations do not have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(euler, "FLOOR", 0.0)
        yield


def _deep(backbone: Backbone, x: Tensor) -> Tensor:
    for layer in backbone.deep.layers:  # type: ignore[union-attr]
        x = F.relu(layer.linear.weight @ x + layer.linear.bias)  # type: ignore[union-attr]
    return x


def _out(backbone: Backbone, x: Tensor) -> Tensor:
    return (backbone.out.weight @ x + backbone.out.bias)[0]  # type: ignore[union-attr, operator]


def _mlp(backbone: Backbone, emb_FD: Tensor, first_F: Tensor, numbers: Tensor) -> Tensor:
    return _out(backbone, _deep(backbone, torch.cat([*emb_FD, numbers])))


def _deepfm(backbone: Backbone, emb_FD: Tensor, first_F: Tensor, numbers: Tensor) -> Tensor:
    fields = range(len(emb_FD))
    pairs = [emb_FD[i] @ emb_FD[j] for i in fields for j in fields if i < j]
    return sum([*first_F, *pairs], start=_mlp(backbone, emb_FD, first_F, numbers))


def _dcn(backbone: Backbone, emb_FD: Tensor, first_F: Tensor, numbers: Tensor) -> Tensor:
    x0 = x = torch.cat([*emb_FD, numbers])
    for w, b in zip(backbone.cross.kernels, backbone.cross.bias, strict=True):  # type: ignore[union-attr]
        x = x0 * (x @ w[:, 0]) + b[:, 0] + x
    return _out(backbone, torch.cat([x, _deep(backbone, x0)]))


def _eulernet(backbone: Backbone, emb_FD: Tensor, first_F: Tensor, numbers: Tensor) -> Tensor:
    """In complex numbers, whose own power has the principal phase."""
    parts = backbone.get_parameter
    of_numbers = (
        [x * unit for x, unit in zip(numbers, parts("unit"), strict=True)] if len(numbers) else []
    )
    phase = torch.stack([*emb_FD, *of_numbers])
    z_FD = parts("mu").unsqueeze(1) * torch.exp(1j * phase)
    for i in range(2):
        layer = f"layers.{i}."
        bias = torch.complex(parts(layer + "log_bias"), parts(layer + "phase_bias")).T
        explicit = torch.stack(
            [(z_FD ** order.unsqueeze(1)).prod(0) for order in parts(layer + "orders").T]
        )
        weight, b = parts(layer + "implicit.linear.weight"), parts(layer + "implicit.linear.bias")
        flat = z_FD.T.flatten()
        implicit = torch.complex(*(F.relu(weight @ part + b) for part in (flat.real, flat.imag)))
        z_FD = explicit * torch.exp(bias) + implicit.view_as(bias.T).T
    flat = z_FD.T.flatten()
    return _out(backbone, flat.real) + _out(backbone, flat.imag)


EQUATIONS = {"mlp": _mlp, "deepfm": _deepfm, "dcn": _dcn, "eulernet": _eulernet}

sizes = st.builds(Inputs, st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
hidden = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)


def _backbone(name: str, inputs: Inputs, hidden: tuple[int, ...], cross: int = 2) -> Backbone:
    backbone = BACKBONES[name](inputs, without_dropout(name, hidden, cross)).double()
    stir((p.data for p in backbone.parameters()), name)
    return backbone


def _rows(inputs: Inputs, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = (inputs.fields, inputs.dim), (inputs.fields,), (inputs.numbers,)
    emb, first, numbers = (
        torch.randn(rows, *shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return emb.requires_grad_(), first.requires_grad_(), numbers.requires_grad_()


def _none(rows: int) -> Tensor:
    return torch.full((rows,), -1)


def test_every_backbone_has_its_equations_here() -> None:
    assert EQUATIONS.keys() == BACKBONES.keys()


@EVERY
@settings(max_examples=30)
@given(inputs=sizes, hidden=hidden, cross=st.integers(1, 3), rows=st.integers(1, 5))
def test_a_backbone_is_its_equations(
    name: str, inputs: Inputs, hidden: tuple[int, ...], cross: int, rows: int
) -> None:
    backbone = _backbone(name, inputs, hidden, cross)
    features = _rows(inputs, rows)
    logit = backbone(*features, _none(rows))
    expected = torch.stack([EQUATIONS[name](backbone, *row) for row in zip(*features, strict=True)])
    torch.testing.assert_close(logit, expected, rtol=1e-10, atol=1e-10)
    inner = [*features, *backbone.parameters()]
    got, wanted = (
        torch.autograd.grad(y.square().sum(), inner, materialize_grads=True)
        for y in (logit, expected)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@EVERY
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    inputs = Inputs(fields=3, dim=2, numbers=2)
    backbone, features = _backbone(name, inputs, (5, 4)), _rows(inputs, 3)
    assert torch.autograd.gradcheck(lambda *x: backbone(*x, _none(3)), features)


@EVERY
@pytest.mark.parametrize("training", [False, True])
def test_no_row_looks_at_another(name: str, training: bool) -> None:
    inputs = Inputs(fields=3, dim=4, numbers=2)
    backbone = _backbone(name, inputs, (8, 5)).train(training)
    features = _rows(inputs, 9)
    logit = backbone(*features, _none(9))
    alone = torch.cat([backbone(*(x[i : i + 1] for x in features), _none(1)) for i in range(9)])
    torch.testing.assert_close(alone, logit, rtol=1e-12, atol=1e-12)
    others = torch.arange(9) != 4
    grads = torch.autograd.grad(logit[4], features, materialize_grads=True)
    assert not any(grad[others].any() for grad in grads)


@EVERY
def test_dropout_works_in_training_alone(name: str) -> None:
    inputs = Inputs(fields=3, dim=4, numbers=0)
    backbone = BACKBONES[name](inputs, BackboneConfig(name, (64,), dropout=0.5)).double()
    features = _rows(inputs, 20)
    once, twice = (backbone(*features, _none(20)) for _ in range(2))
    assert (once != twice).all()
    backbone.eval()
    assert torch.equal(backbone(*features, _none(20)), backbone(*features, _none(20)))


@EVERY
def test_only_who_asks_reads_first_order_weights(name: str) -> None:
    backbone, features = _backbone(name, Inputs(3, 4, 2), (8, 5)), _rows(Inputs(3, 4, 2), 6)
    logit = backbone(*features, _none(6))
    first = torch.autograd.grad(logit.sum(), features[1], materialize_grads=True)[0]
    assert torch.equal(first, torch.full_like(first, float(BACKBONES[name].first_order)))
