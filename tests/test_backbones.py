"""Every backbone against its paper's equations, written out for one row at a time in float64."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data_shards import UserError
from models import euler
from models.backbones import BACKBONES, Backbone, FiBiNETConfig, Inputs, IntTowerConfig
from models.backbones.fibinet import FiBiNET
from models.backbones.inttower import IntTower
from tests.equations import EQUATIONS
from tests.toy_method import inputs_of, stir, without_dropout

EVERY = pytest.mark.parametrize("name", BACKBONES)
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in BACKBONES),
    ("pnn", {"product": "outer"}),
    ("dcnv2", {"structure": "stacked"}),
    ("dcnv2", {"rank": 2}),
    ("fibinet", {"bilinear": "all"}),
    ("fibinet", {"bilinear": "each", "reduction": 1}),
    ("xdeepfm", {"width": 10}),  # more maps than terms of two or three fields
]


@pytest.fixture(scope="module", autouse=True)
def exact_logarithms() -> Iterator[None]:
    """EulerNet without the floor of its moduli, which its equations do not have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(euler, "FLOOR", 0.0)
        yield


sizes = st.builds(inputs_of, st.integers(2, 4), st.integers(1, 5), st.integers(0, 3))
hidden = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)


def _backbone(name: str, inputs: Inputs, hidden: tuple[int, ...], **options: Any) -> Backbone:
    config = without_dropout(name, hidden, **options)
    backbone = BACKBONES[name](inputs, config).double()
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


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@settings(max_examples=12)
@given(inputs=sizes, hidden=hidden, cross=st.integers(1, 3), rows=st.integers(1, 3))
def test_a_backbone_is_its_equations(
    name: str,
    options: dict[str, Any],
    inputs: Inputs,
    hidden: tuple[int, ...],
    cross: int,
    rows: int,
) -> None:
    config = without_dropout(name, hidden, cross, **options)
    backbone = _backbone(name, inputs, hidden, cross=cross, **options)
    features = _rows(inputs, rows)
    logit = backbone(*features, _none(rows))
    each = zip(*features, strict=True)
    expected = torch.stack([EQUATIONS[name](backbone, config, row) for row in each])
    torch.testing.assert_close(logit, expected, rtol=1e-10, atol=1e-10)
    inner = [*features, *backbone.parameters()]
    got, wanted = (
        torch.autograd.grad(y.square().sum(), inner, materialize_grads=True)
        for y in (logit, expected)
    )
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@EVERY
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    inputs = inputs_of(3, 2, 2)
    backbone, features = _backbone(name, inputs, (5, 4)), _rows(inputs, 3)
    assert torch.autograd.gradcheck(lambda *x: backbone(*x, _none(3)), features)


@EVERY
@pytest.mark.parametrize("training", [False, True])
def test_no_row_looks_at_another(name: str, training: bool) -> None:
    inputs = inputs_of(3, 4, 2)
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
    inputs = inputs_of(3, 32, 0)
    config = without_dropout(name, (64,))
    which = "explicit_dropout" if name == "eulernet" else "dropout"
    backbone = BACKBONES[name](inputs, replace(config, **{which: 0.5})).double()
    features = _rows(inputs, 20)
    once, twice = (backbone(*features, _none(20)) for _ in range(2))
    assert (once != twice).all()
    backbone.eval()
    assert torch.equal(backbone(*features, _none(20)), backbone(*features, _none(20)))


@EVERY
def test_only_who_asks_reads_first_order_weights(name: str) -> None:
    inputs = inputs_of(3, 4, 2)
    backbone, features = _backbone(name, inputs, (8, 5)), _rows(inputs, 6)
    logit = backbone(*features, _none(6))
    first = torch.autograd.grad(logit.sum(), features[1], materialize_grads=True)[0]
    assert torch.equal(first, torch.full_like(first, float(BACKBONES[name].first_order)))


def _mlp_size(*widths: int) -> int:
    return sum((a + 1) * b for a, b in zip(widths, widths[1:], strict=False))


# For 4 fields of 6 floats, 2 numbers, hidden layers of 10 and 5, and what `without_dropout` says.
PLAIN = _mlp_size(26, 10, 5, 1)
SIZES = {
    ("mlp", ()): PLAIN,
    ("wide_deep", ()): PLAIN,
    ("nfm", ()): _mlp_size(8, 10, 5, 1),
    ("afm", ()): 6 * 3 + 3 + 3 + 8 + 1,
    ("autoint", ()): PLAIN + 4 * 6 * (6 + 1) + 4 * 6 * (6 + 1) + 4 * 6 + 1,
    ("pnn", ()): _mlp_size(26 + 6, 10, 5, 1),
    ("pnn", (("product", "outer"),)): _mlp_size(26 + 36, 10, 5, 1),
    ("dcn", ()): PLAIN + 26 + 2 * (26 + 26),
    ("dcnv2", ()): PLAIN + 26 + 2 * (26 * 26 + 26),
    ("dcnv2", (("rank", 3),)): PLAIN + 26 + 2 * (2 * 26 * 3 + 26),
    ("dcnv2", (("structure", "stacked"),)): PLAIN + 2 * (26 * 26 + 26),
    ("fibinet", ()): _mlp_size(2 * 6 * 6 + 2, 10, 5, 1) + 2 * 4 + 6 * 36,
    ("fibinet", (("bilinear", "all"),)): _mlp_size(2 * 6 * 6 + 2, 10, 5, 1) + 2 * 4 + 36,
    ("fibinet", (("bilinear", "each"),)): _mlp_size(2 * 6 * 6 + 2, 10, 5, 1) + 2 * 4 + 3 * 36,
    ("deepfm", ()): PLAIN,
    ("xdeepfm", ()): PLAIN + 3 * (4 * 4 + 1) + 3 * (3 * 4 + 1) + 2 * 3 + 1,
    ("eulernet", ()): 6
    + 2 * 6
    + (6 * 4 + 2 * 6 * 4 + _mlp_size(36, 24))
    + (4 * 3 + 2 * 6 * 3 + _mlp_size(24, 18))
    + 19,
    ("inttower", ()): 3 * 4
    + 1 * 2
    + _mlp_size(3 * 6 + 1, 10, 5)
    + _mlp_size(6 + 1, 10, 5)
    + 6 * (10 + 1)
    + 2 * 6 * (5 + 1),
}


@pytest.mark.parametrize(("name", "options"), SIZES)
def test_a_backbone_has_as_many_weights_as_its_paper_says(
    name: str, options: tuple[tuple[str, Any], ...]
) -> None:
    backbone = BACKBONES[name](inputs_of(4, 6, 2), without_dropout(name, (10, 5), **dict(options)))
    assert sum(p.numel() for p in backbone.parameters()) == SIZES[name, options]


@EVERY
def test_first_weights_are_glorots_and_biases_zero(name: str) -> None:
    torch.manual_seed(0)
    backbone = BACKBONES[name](inputs_of(6, 40, 2), without_dropout(name, (300, 200)))
    implicit = set(backbone.adaptable().values()) if name == "eulernet" else set()
    small = {id(layer.linear) for layer in implicit}  # 0.01, as its authors have it
    layers = [layer for layer in backbone.modules() if isinstance(layer, nn.Linear)]
    assert any(layer.weight.numel() > 500 for layer in layers) or name == "afm"
    for layer in layers:
        std = 0.01 if id(layer) in small else math.sqrt(2 / sum(layer.weight.shape))
        if layer.weight.numel() > 500:
            assert float(layer.weight.detach().std()) == pytest.approx(std, rel=0.15)
        assert layer.bias is None or not (layer.bias.any() and id(layer) not in small)


def test_a_tower_without_fields_is_refused() -> None:
    for places, side in (((), "user or context"), ((0, 1), "item")):
        with pytest.raises(UserError, match=f"inttower: all id fields are of side {side}, .* give"):
            IntTower(Inputs(2, 4, 0, places), IntTowerConfig())


def test_one_field_makes_no_pair() -> None:
    with pytest.raises(UserError, match="fibinet pairs id fields; give data.fields two or more"):
        FiBiNET(Inputs(1, 4, 0), FiBiNETConfig())
