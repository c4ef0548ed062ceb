"""DFFM (Guo et al., 2023): products of features whose own weights know the domain."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.backbones import Inputs
from models.layers import pairs
from models.multi_domain.base import MultiDomain, MultiDomainConfig
from models.multi_domain.parts import First, Head, Slots, Weights


@dataclass(frozen=True)
class DFFMConfig(MultiDomainConfig):
    """The `[method]` section of a run file."""

    name: Literal["dffm"] = "dffm"
    hidden: tuple[int, ...] = (256, 128)
    """Of the network, with `tower` on top of it."""


class DFFM(MultiDomain):
    """logit = tower([x, e_i (W * W_t) . e_j of all pairs i < j]).

    A reading of the paper's abstract, that the parameters of its feature interaction hold what is
    the domain's: W is shared, W_t is the domain's part, and begins with ones. The paper's second
    module, of user behaviour, needs the items of a history apart; here a field of many values is
    one vector.
    """

    def __init__(self, inputs: Inputs, config: DFFMConfig, seed: int) -> None:
        super().__init__(inputs)
        self.config = config
        self.matrix = Slots({"matrix": First(seed, "").matrix("matrix", *[inputs.dim] * 2, 1)})
        products = inputs.fields * (inputs.fields - 1) // 2
        hidden = (*config.hidden, *config.tower)
        self.tower = Head(self.width + products, hidden, config.dropout)
        self.begin(seed)

    def first(self, first: First) -> dict[str, Tensor]:
        return {"matrix": torch.ones(self.inputs.dim, self.inputs.dim)}

    def score(self, rows: Tensor, w: Weights) -> Tensor:
        fields, dim = self.inputs.fields, self.inputs.dim
        shared = self.matrix(torch.zeros(1, dtype=torch.int64, device=rows.device))["matrix"]
        vectors = rows[:, :, : fields * dim]
        tiled = vectors.reshape(len(rows), -1, dim)  # [T, R * F, D]
        turned = torch.bmm(tiled, (shared * w["matrix"]).mT).view(-1, fields, dim)
        first, _ = pairs(turned)
        _, second = pairs(vectors.reshape(-1, fields, dim))
        products = (first * second).sum(2).view(*rows.shape[:2], -1)
        return self.tower(torch.cat([rows, products], 2))
