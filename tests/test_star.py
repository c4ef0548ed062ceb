"""STAR's parts (M13), and how many weights each baseline has."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.backbones import Inputs
from models.multi_domain import MultiDomainConfig, STARConfig
from models.multi_domain.star import EPSILON, LEAST, SPEED, STAR, normalised, statistics
from tests.test_multi_domain import CONFIGS, KINDS

WIDE = 5


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _told(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `statistics`."""
    return mean / std / SPEED, (std.square() - LEAST**2).log() / SPEED / 2


def test_m13_with_equal_statistics_and_unit_factors_it_is_batch_norm() -> None:
    x, mean, std = _normal(2, 7, WIDE), _normal(WIDE) * 3, _normal(WIDE).exp()
    norm = nn.BatchNorm1d(WIDE, eps=EPSILON).double().eval()
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(std.square())
    norm.weight.data.copy_(_normal(WIDE))
    norm.bias.data.copy_(_normal(WIDE) + 1)
    told = (part.expand(2, -1) for part in _told(mean, std))
    normal, _ = normalised(x, *told)
    wanted = norm(x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(normal * norm.weight + norm.bias, wanted, rtol=1e-12, atol=1e-12)


def test_m13_a_star_layer_of_unit_factors_is_a_plain_one() -> None:
    torch.manual_seed(0)
    config = STARConfig(hidden=(6,), tower=(4,), auxiliary=(3,), dropout=0.0)
    star = STAR(Inputs(2, 2, 1), config, seed=1).double()
    star.add_domain("a", seed=1)
    rows = _normal(1, 9, WIDE)
    zero, one = torch.zeros(1, WIDE).double(), torch.ones(1, WIDE).double()
    own = {name: t[:1] for name, t in star.own.stacked().items()}  # type: ignore[union-attr]
    own |= dict(zip(("mean", "spread"), _told(zero, one), strict=True))
    assert torch.equal(own["gamma"], one) and torch.equal(own["beta"], zero)
    auxiliary = star.auxiliary(torch.cat([rows, own["domain"].expand(1, 9, -1)], 2))
    plain = rows / (1 + EPSILON) ** 0.5
    for i in range(3):
        weight, bias = (star.centre.get_parameter(f"centre{i}_{p}")[0] for p in ("weight", "bias"))
        plain = nn.functional.linear(plain if i == 0 else plain.relu(), weight, bias)
    got = star.score(rows, own)[:, :, 0] - auxiliary
    torch.testing.assert_close(got, plain.squeeze(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_statistics_become_those_of_the_rows(scale: float) -> None:
    """Whatever their scale, at an ordinary learning rate."""
    x = (_normal(1, 400, WIDE) * torch.arange(1, WIDE + 1) + 2) * scale
    told = [torch.zeros(1, WIDE, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    adam = torch.optim.Adam(told, lr=1e-3)
    for step in range(800):
        adam.param_groups[0]["lr"] = 1e-3 if step < 700 else 1e-4
        adam.zero_grad()
        normalised(x, told[0], told[1])[1].mean().backward()
        adam.step()
    mean, std = statistics(*told)
    wanted = x.std(1, correction=0)
    assert float(((mean - x.mean(1)) / wanted).detach().abs().max()) < 0.08
    assert float((std / wanted - 1).detach().abs().max()) < 0.08


def test_a_feature_that_never_varies_and_then_moves_keeps_its_statistics_in_bounds() -> None:
    """As the field that tells the domains apart does, whose one vector in a domain is learned."""
    told = [torch.zeros(1, 1, requires_grad=True) for _ in range(2)]
    adam = torch.optim.Adam(told, lr=1e-3)
    deviations, normal = [], torch.empty(0)
    for step in range(4000):
        x = torch.full((1, 8, 1), 0.3 if step < 2500 else 0.8)
        adam.zero_grad()
        normal, surprise = normalised(x, *told)
        surprise.mean().backward()
        adam.step()
        assert normal.isfinite().all() and all(part.isfinite().all() for part in told)
        deviations.append(float(statistics(*told)[1].detach()))
    assert LEAST <= min(deviations) < 0.02 and max(deviations) < 1.1
    assert float(normal.detach().abs().max()) < 0.2


def test_an_added_domains_statistics_begin_as_the_general_ones() -> None:
    star = STAR(Inputs(2, 2, 1), STARConfig(), seed=1)
    for name, tensor in star.general.stacked().items():
        tensor.fill_(len(name))
    star.add_domain("a", seed=1)
    assert (star.adapter("a")["mean"] == 4).all() and (star.adapter("a")["spread"] == 6).all()


def _mlp(*widths: int) -> int:
    return sum((a + 1) * b for a, b in zip(widths, widths[1:], strict=False))


# For rows of 14 floats (3 fields of 4 and 2 numbers): weights of one domain, and of the shared part
# without the general one.
X, TOWER = 14, _mlp(5, 4, 1)
COUNTS = {
    "shared_bottom": (TOWER, _mlp(X, 6, 5)),
    "mmoe": (3 * X + TOWER, 3 * _mlp(X, 6, 5)),
    "ple": (
        5 * (X + 5) + 3 * (_mlp(X, 6, 5) + _mlp(5, 6, 5)) + TOWER,
        2 * (_mlp(X, 6, 5) + _mlp(5, 6, 5)) + 5 * X,
    ),
    "hmoe": (3 * X + 3 * X + TOWER, 3 * _mlp(X, 6, 5) + 2 * (3 * X + TOWER)),
    "aesm2": (5 * (X + 5) + TOWER, 5 * (_mlp(X, 6, 5) + _mlp(5, 6, 5)) + 5 * (X + 5)),
    "star": (_mlp(X, 6, 5, 4, 1) + 4 * X + 4, _mlp(X, 6, 5, 4, 1) + 2 * X + _mlp(X + 4, 3, 1)),
    "star_low_rank": (
        2 * (X + 6) + (6 + 5) + (5 + 4) + (4 + 1) + 4 * X + 4,
        _mlp(X, 6, 5, 4, 1) + 2 * X + _mlp(X + 4, 3, 1),
    ),
    "pepnet": (
        4,
        _mlp(X + 4, 6, X)
        + _mlp(X, 12, 9, 8, 1)
        + sum(_mlp(2 * X, 6, width) for width in (12, 9, 8)),
    ),
    "dffm": (16, 16 + _mlp(X + 3, 6, 5, 4, 1)),
    "hinet": (3 * X + 2 + 3 * _mlp(X, 6, 5), 9 * (_mlp(X, 6, 5) + X) + _mlp(15, 4, 1)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_baseline_has_as_many_weights_as_its_paper_says(name: str) -> None:
    method: Any = KINDS[name](Inputs(3, 4, 2), CONFIGS[name], seed=1)
    method.add_domain("a", seed=1)
    own = sum(tensor.numel() for tensor in method.adapter("a").values())
    general = sum(p.numel() for p in method.general.parameters())
    assert (own, sum(t.numel() for t in method.shared().values()) - general) == COUNTS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_first_weights_are_glorots(name: str) -> None:
    config: MultiDomainConfig = type(CONFIGS[name])()
    method = KINDS[name](Inputs(3, 8, 0), config, seed=1)
    matrices = [p for p in method.shared_parameters() if p.dim() >= 2 and p.numel() > 5000]
    assert len(matrices) >= (name == "shared_bottom") and config.dropout == 0.5
    for matrix in matrices:
        fans = sum(matrix.shape[-2:])
        assert float(matrix.detach().std()) == pytest.approx((2 / fans) ** 0.5, rel=0.1)
