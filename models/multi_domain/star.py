"""STAR (Sheng et al., 2021): a network of each domain's around one centre, star-shaped."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.backbones import Inputs
from models.multi_domain.base import MultiDomain, MultiDomainConfig
from models.multi_domain.parts import First, Head, Slots, Weights, tower

EPSILON = 1e-3  # added to a variance
SPEED = 30.0  # of the statistics beside other weights
LEAST = 3e-3  # standard deviation: far below EPSILON, but a feature may be the same in all rows
DEGREES = 8.0  # of freedom
CONSISTENT = 1.11  # standard deviation of normal rows over the scale that fits them best


@dataclass(frozen=True)
class STARConfig(MultiDomainConfig):
    """The `[method]` section of a run file."""

    name: Literal["star"] = "star"
    hidden: tuple[int, ...] = (256, 128)
    """Of the star topology, with `tower` on top of it."""
    auxiliary: tuple[int, ...] = (64,)
    """Hidden layers of the auxiliary network."""
    topology: Literal["factors", "low_rank"] = "factors"
    """What makes the centre a domain's own: STAR's factors, or MLoRA's matrices in their place
    (STAR + MLoRA in that paper's Table 2, as `methods.md` reads it: no file of its code says)."""
    alpha: int = 32
    """Temperature of the latter: rank r = max(d_out / alpha, 1) of each layer (MLoRA, Eq. 10)."""


class STAR(MultiDomain):
    """logit = FCN_t(PN_t(x)) + auxiliary([x, d_t]) (Eq. 9).

    PN_t(x) = (gamma gamma_t) (x - mean_t) / sqrt(var_t + eps) + beta + beta_t (Eq. 3-4); a layer of
    FCN_t is relu((W * W_t) x + b + b_t) (Eq. 5-6). A domain's part: gamma_t, beta_t, mean_t, var_t,
    all W_t and b_t, and its embedding d_t. The general part has statistics and embedding alone.
    With topology "low_rank" a layer is relu((W + B_t A_t) x + b), and A_t, B_t stand for W_t, b_t.

    The paper takes mean and variance of a batch of one domain, and remembers their moving average.
    A batch here is mixed, and no row may look at another (S2), so what is remembered serves in
    training too. It is learned: each row adds its negative log likelihood to the loss, at value
    zero, with a gradient to mean_t and var_t alone.
    """

    def __init__(self, inputs: Inputs, config: STARConfig, seed: int) -> None:
        super().__init__(inputs)
        self.config = config
        self.widths = (self.width, *config.hidden, *config.tower, 1)
        centre = First(seed, "").mlp("centre", self.widths)
        norm = {"gamma": torch.ones(self.width), "beta": torch.zeros(self.width)}
        self.centre = Slots({k: t.unsqueeze(0) for k, t in (norm | centre).items()})
        self.auxiliary = Head(self.width + inputs.dim, config.auxiliary, config.dropout)
        self.begin(seed)

    def first(self, first: First) -> dict[str, Tensor]:
        star = {}
        for i, (a, b) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            if self.config.topology == "low_rank":
                rank = max(b // self.config.alpha, 1)
                star[f"down{i}"] = first.matrix(f"down{i}", a, rank)
                star[f"up{i}"] = torch.zeros(b, rank)
            else:
                star |= {f"star{i}_weight": torch.ones(b, a), f"star{i}_bias": torch.zeros(b)}
        norm = {"gamma": torch.ones(self.width), "beta": torch.zeros(self.width)}
        return {**norm, **star, **self.first_general(first)}

    def first_general(self, first: First) -> dict[str, Tensor]:
        statistics = {"mean": torch.zeros(self.width), "spread": torch.zeros(self.width)}
        return {**statistics, "domain": first.normal("domain", 0.01, self.inputs.dim)}

    def add_domain(self, domain: str, seed: int) -> None:
        """Its statistics begin as the general ones are."""
        super().add_domain(domain, seed)
        adapter, general = self.adapter(domain), self.general.stacked()
        for name in ("mean", "spread"):
            adapter[name].copy_(general[name][0])

    def score(self, rows: Tensor, w: Weights) -> Tensor:
        centre = self.centre(torch.zeros(1, dtype=torch.int64, device=rows.device))
        star = {"gamma": centre["gamma"] * w["gamma"], "beta": centre["beta"] + w["beta"]}
        for i in range(len(self.widths) - 1):
            weight, bias = centre[f"centre{i}_weight"], centre[f"centre{i}_bias"]
            if self.config.topology == "low_rank":
                star[f"centre{i}_weight"] = weight + w[f"up{i}"] @ w[f"down{i}"]
                star[f"centre{i}_bias"] = bias.expand(len(rows), -1)
            else:
                star[f"centre{i}_weight"] = weight * w[f"star{i}_weight"]
                star[f"centre{i}_bias"] = bias + w[f"star{i}_bias"]
        return self._score(rows, star, w)

    def score_general(self, rows: Tensor, w: Weights) -> Tensor:
        centre = self.centre(torch.zeros(1, dtype=torch.int64, device=rows.device))
        return self._score(rows, centre, w)

    def _score(self, rows: Tensor, star: Weights, w: Weights) -> Tensor:
        normal, surprise = normalised(rows, w["mean"], w["spread"])
        normal = normal * star["gamma"].unsqueeze(1) + star["beta"].unsqueeze(1)
        drop = self.drop(self.config.dropout)
        logit = tower(star, "centre", len(self.widths) - 2, normal, drop)
        domain = w["domain"].unsqueeze(1).expand(-1, rows.shape[1], -1)
        logit = logit + self.auxiliary(torch.cat([rows, domain], 2))
        return torch.stack([logit, surprise - surprise.detach()], 2)


def statistics(mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, told by weights that may learn as fast as any other, whatever
    the scale of what they are about: the mean in deviations, the deviation by its logarithm.

    A row from far away moves the deviation through both: were the mean fixed in deviations, a
    larger deviation would carry it further off, and so on without end. The floor is for what never
    varies in a domain, which would drive the deviation to zero.
    """
    std = ((2 * SPEED * spread).exp() + LEAST**2).sqrt()
    return SPEED * mean * std, std


def normalised(x: Tensor, mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [T, R, d] by statistics [T, d], which get no gradient from it; and how little each row
    [T, R] is to be expected by them, which has a gradient to them alone.

    Expected under Student's distribution, of which no row has a gradient above DEGREES: one from
    far away under the normal one would slow down Adam for a thousand steps.
    """
    centre, std = (value.unsqueeze(1) for value in statistics(mean, spread))
    away = ((x.detach() - centre) * CONSISTENT / std).square() / DEGREES
    surprise = (std.log() + (DEGREES + 1) / 2 * away.log1p()).mean(2)
    return (x - centre.detach()) / (std.detach().square() + EPSILON).sqrt(), surprise
